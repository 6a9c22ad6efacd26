"""Traces of scans."""

from __future__ import annotations

import json

import pytest

from local.stack import Stack
from local.wait import until
from tests.client import Client
from tests.e2e.collector import Collector

pytestmark = pytest.mark.e2e

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
QUIET = "a3ce929d0e0e47364bf92f3577b34da6"
AFTERWARDS = "0af7651916cd43dd8448eb211c80319c"
CALLER = "00f067aa0ba902b7"
# The expected spans, by service and name.
STORY = {
    ("api-gateway", "POST /api/v1/task"),
    ("job-orchestrator", "SubmitJobs"),
    ("job-orchestrator", "JobCreated"),
    ("job-orchestrator", "dispatch chunk"),
    ("scanner-worker", "scan chunk"),
    ("scanner-worker", "nmap"),
    ("result-store", "store results"),
    ("job-orchestrator", "JobCompleted"),
}
# JobStarted of a scan of less than a quarter of a second is published with JobCompleted, in one span.
PUBLISHED_ALONE = ("job-orchestrator", "JobStarted")


def test_trace_of_a_scan_is_one_tree(user: Client, stack: Stack, collector: Collector) -> None:
    """A scan is one tree of spans of all four services, from the request over Kafka and nmap to the stored results."""
    body = {
        "subnet_ids": [user.subnet("127.9.8.0/30")],
        "policy_id": user.policy(ports="8022", service_detection=False),
    }
    traced = user.http.post("/api/v1/task", json=body, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    (job,) = traced.json()["jobs"]
    user.finished(job["id"])
    until(lambda: {(s.service, s.name) for s in collector.trace(TRACE)} >= STORY, 30, "the spans of every service")
    spans = collector.trace(TRACE)
    assert {(span.service, span.name) for span in spans} - {PUBLISHED_ALONE} == STORY
    names = {span.id: span.name for span in spans} | {CALLER: "the caller"}
    parents = {span.name: names[span.parent] for span in spans}
    assert (parents["POST /api/v1/task"], parents["dispatch chunk"]) == ("the caller", "POST /api/v1/task")
    assert (parents["scan chunk"], parents["nmap"]) == ("dispatch chunk", "scan chunk")
    assert parents["store results"] in {"scan chunk", "nmap"}
    logs = [line for file in stack.folder.glob("logs/*.log") for line in file.read_text().splitlines()]
    lines = [json.loads(line) for line in logs if TRACE in line]
    assert {"api-gateway", "scanner-worker"} <= {line["service"] for line in lines}
    assert {line["job_id"] for line in lines if line["service"] == "scanner-worker"} == {job["id"]}


def test_unsampled_scan_creates_no_spans(user: Client, collector: Collector) -> None:
    """A scan with an unsampled trace, or without a traceparent, creates no spans."""
    body = {
        "subnet_ids": [user.subnet("127.9.8.0/30")],
        "policy_id": user.policy(ports="8022", service_detection=False),
    }
    quiet = user.http.post("/api/v1/task", json=body, headers={"traceparent": f"00-{QUIET}-{CALLER}-00"})
    user.finished(quiet.json()["jobs"][0]["id"])
    traced = user.http.get("/api/v1/task", headers={"traceparent": f"00-{AFTERWARDS}-{CALLER}-01"})
    assert traced.is_success
    until(lambda: bool(collector.trace(AFTERWARDS)), 30, "the spans of the request after it")
    assert collector.trace(QUIET) == []
    assert {span.trace for span in collector.spans} <= {TRACE, AFTERWARDS}
