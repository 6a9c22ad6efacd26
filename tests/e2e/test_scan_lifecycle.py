"""The main use case end to end with real parts: register, scan, watch, cancel, read."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import httpx2
import pytest

from local.nmap import OpenPorts, open_ports, running_under
from local.stack import Stack
from local.wait import until
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet_testing.kafka import read
from tests.client import FINAL, Client

pytestmark = pytest.mark.e2e

SUBNET = "127.9.8.0/24"
PORTS = "8020-8090"
SLOW = {"ports": "1-1000", "service_detection": False, "discovery": "none", "max_rate": 100}
"""A /24 with this policy would take almost an hour."""


def found(results: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(each["ip_address"], each["port"]) for each in results]


async def events(stack: Stack, job_id: int) -> list[tuple[str, dict[str, Any]]]:
    """Return type and value of every event of the job, in log order."""
    records = await read(stack.servers.kafka, SCAN_EVENTS, prefix="e2e-")
    events = [((dict(each.headers)["ce_type"] or b"").decode(), json.loads(each.value or b"")) for each in records]
    return [(kind.split(".")[1], value) for kind, value in events if value["job"]["id"] == job_id]


@pytest.mark.proves("F22", "G16")
def test_scan_matches_nmap_and_accounts_for_every_probe(
    user: Client,
    servers: OpenPorts,
) -> None:
    """A completed scan's results are those of nmap itself, and its ledger adds up to the request."""
    job_id = user.scan(SUBNET, ports=PORTS, service_detection=False)
    task = user.finished(job_id)
    assert task["status"] == {"status": "completed", "progress": 100, "machines_found": 256, "error": ""}
    assert task["job"]["start_time"] <= task["job"]["end_time"]
    results = user.results(job_id)
    assert sorted(found(results)) == sorted(servers) == sorted(open_ports("-p", PORTS, SUBNET))
    assert len({each["id"] for each in results}) == len(results)
    ledger = user.ledger(job_id)
    assert ledger["accounted"]
    assert ledger["request"]["probes"] == 256 * 71 == sum(ledger["counts"].values()) == ledger["counts"]["answered"]


@pytest.mark.parametrize("ports", ["8020-8030", "8020-8090"])
def test_export_has_the_ports_that_nmap_writes(user: Client, servers: OpenPorts, ports: str) -> None:
    """The export lists open and closed ports one by one, or sums them up, with nmap's reasons, as plain nmap does."""
    network = "127.9.8.0/29"
    job_id = user.scan(network, ports=ports, technique="connect", service_detection=False)
    user.finished(job_id)
    written = user.http.get(f"/api/v1/task/{job_id}/nmap.xml").text
    arguments = ["nmap", "-n", "-sT", "-p", ports, "-oX", "-", network]
    plain = subprocess.run(arguments, capture_output=True, check=True, text=True).stdout
    assert servers
    assert listed(written) == listed(plain)


def listed(written: str) -> dict[str, list[str]]:
    """Return the elements of the ports of each address in nmap's XML."""
    hosts = ET.fromstring(written).iter("host")  # noqa: S314 # written by nmap and by result-store
    return {
        host.find("address").attrib["addr"]: [  # type: ignore[union-attr] # every host has one
            ET.canonicalize(ET.tostring(each), strip_text=True) for each in host.findall("ports/*")
        ]
        for host in hosts
    }


@pytest.mark.proves("F22", "G7")
async def test_job_events_are_in_order(stack: Stack, user: Client) -> None:
    """JobCreated, JobStarted and JobCompleted first appear in that order, under a rising `seq` without gaps."""
    job_id = user.scan("127.9.8.0/26", ports=PORTS, service_detection=False)
    await asyncio.to_thread(user.finished, job_id)

    seen: list[tuple[str, dict[str, Any]]] = []
    for _ in range(50):
        seen = await events(stack, job_id)
        if seen and seen[-1][0] == "JobCompleted":
            break
        await asyncio.sleep(0.1)
    first = {value["seq"]: kind for kind, value in reversed(seen)}
    assert [kind for _, kind in sorted(first.items()) if kind != "JobProgressed"] == [
        "JobCreated",
        "JobStarted",
        "JobCompleted",
    ]
    assert list(dict.fromkeys(value["seq"] for _, value in seen)) == sorted(first)
    assert seen[-1][1]["job"]["status"] == "completed"
    assert {value["user_id"] for _, value in seen} == {7}


def test_event_stream_follows_a_scan_to_its_end(user: Client, stranger: Client) -> None:
    """One stream reports a scan from its creation to its end in order, and its last state equals a GET's."""
    job_id = user.scan(SUBNET, ports=PORTS, service_detection=False, max_rate=3000)
    with pytest.raises(httpx2.HTTPStatusError, match="404"):
        next(stranger.watch(job_id))
    tasks = list(user.watch(job_id))
    order = ("pending", "running", "completed")
    states = [(order.index(task["status"]["status"]), task["status"]["progress"]) for task in tasks]
    assert states == sorted(states)
    assert {status for status, _ in states} >= {1, 2}
    assert tasks[-1] == user.task(job_id)
    assert list(user.watch(job_id)) == tasks[-1:]


def test_gateway_shutdown_ends_its_streams(stack: Stack, user: Client) -> None:
    """On SIGTERM a gateway ends its streams properly, and a new stream starts with the current state."""
    job_id = user.scan(SUBNET, **SLOW)
    watching = user.watch(job_id)
    assert next(watching)["job"]["id"] == job_id
    pid = stack.pid("api-gateway-1")
    stack.kill("api-gateway-1", signal.SIGTERM)
    assert {task["status"]["status"] for task in watching} <= {"pending", "running"}
    until(lambda: pid not in {process.pid for process in stack.processes()}, 30, "the gateway to be gone")
    stack.wait_until_ready()
    user.cancel(job_id)
    (last,) = user.watch(job_id)
    assert last == user.task(job_id)
    assert last["status"]["status"] == "cancelled"


@pytest.mark.proves("G8")
def test_cancel_stops_nmap(
    user: Client,
    running_nmaps: Callable[[], list[int]],
) -> None:
    """After a cancel no nmap of the job runs, the job stays cancelled, and its ledger lists the unprobed addresses."""
    job_id = user.scan(SUBNET, **SLOW)
    until(lambda: user.status(job_id) == "running" and bool(running_nmaps()), 30, "the scan to run")
    user.cancel(job_id)
    until(lambda: not running_nmaps(), 10, "nmap to end")
    task = user.task(job_id)
    assert task["status"]["status"] == task["job"]["status"] == "cancelled"
    assert task["job"]["end_time"] is not None
    ledger = user.ledger(job_id)
    assert ledger["counts"]["cancelled"] > 0
    assert sum(ledger["counts"].values()) == ledger["request"]["probes"]
    assert not ledger["accounted"]
    with pytest.raises(httpx2.HTTPStatusError, match="400"):
        user.cancel(job_id)


@pytest.mark.proves("G8")
def test_jobs_are_cancelled_by_filter(
    user: Client,
    stranger: Client,
    running_nmaps: Callable[[], list[int]],
) -> None:
    """A cancel by subnet ends the jobs of that subnet, a cancel of all ends the others, and no other user's."""
    policy_id, first, second = user.policy(**SLOW), user.subnet(SUBNET), user.subnet(SUBNET)
    jobs = [job["id"] for subnet in (first, second, first) for job in user.submit([subnet], policy_id)]
    theirs = stranger.scan("127.9.8.0/30", **SLOW)
    cancelled = user.http.post(
        "/api/v1/task/cancel", json={"subnet_id": first, "status": ["pending", "running"]}
    ).json()
    assert (cancelled["message"], sorted(cancelled["job_ids"])) == ("2 jobs cancelled", sorted((jobs[0], jobs[2])))
    assert user.status(jobs[1]) in {"pending", "running"}
    assert user.http.post("/api/v1/task/cancel", json={"all": True}).json()["job_ids"] == [jobs[1]]
    assert user.unfinished() == 0
    assert stranger.unfinished() == 1
    stranger.cancel(theirs)
    until(lambda: not running_nmaps(), 10, "nmap to end")


@pytest.mark.usefixtures("servers")
def test_users_see_only_their_own_objects(user: Client, stranger: Client, admin: Client) -> None:
    """Another user gets 404 for all objects and 403 for results; an administrator can read jobs and results."""
    subnet_id, policy_id = user.subnet("127.9.8.1/32"), user.policy(ports="8022", service_detection=False)
    (job,) = user.submit([subnet_id], policy_id)
    user.finished(job["id"])
    for path in (f"subnet/{subnet_id}", f"policy/{policy_id}", f"task/{job['id']}", f"task/{job['id']}/ledger"):
        assert stranger.http.get(f"/api/v1/{path}").status_code == 404
        assert admin.http.get(f"/api/v1/{path}").status_code == (200 if path.startswith("task") else 404)
    assert stranger.http.post(f"/api/v1/task/{job['id']}/cancel").status_code == 404
    assert stranger.http.get(f"/api/v1/task/{job['id']}/results").status_code == 403
    assert stranger.http.get("/api/v1/task/999999999/results").status_code == 404
    refused = stranger.http.post("/api/v1/task", json={"subnet_ids": [subnet_id], "policy_id": policy_id})
    assert refused.status_code == 400
    assert job["id"] not in {each["id"] for each in stranger.http.get("/api/v1/task").json()["jobs"]}
    assert found(admin.results(job["id"])) == found(user.results(job["id"])) == [("127.9.8.1", 8022)]


def test_job_is_shared_by_two_workers(stack: Stack, user: Client, running_nmaps: Callable[[], list[int]]) -> None:
    """While a job of several chunks runs, both workers scan."""
    job_id = user.scan(SUBNET, **(SLOW | {"max_rate": 2_000}))  # which four nmaps share

    def both() -> bool:
        busy = [process.name for process in stack.processes() if process.name.startswith("scanner-worker")]
        return len(busy) == 2 and len(running_nmaps()) > 2

    until(both, 30, "both workers to scan")
    user.cancel(job_id)
    until(lambda: not running_nmaps(), 10, "nmap to end")


@pytest.mark.proves("F2", "G3")
def test_worker_killed_in_mid_scan_loses_no_result(
    stack: Stack,
    user: Client,
    servers: OpenPorts,
    running_nmaps: Callable[[], list[int]],
) -> None:
    """After kill -9 of a scanning worker no nmap is left, and the job completes with the same results, without duplicates."""
    job_id = user.scan(SUBNET, ports=PORTS, service_detection=False, max_rate=1500)
    worker = stack.pid("scanner-worker-1")
    until(lambda: bool(running_under([worker])), 30, "the worker to scan")
    stack.kill("scanner-worker-1")
    task = user.finished(job_id)
    assert task["status"]["status"] == "completed", task
    assert sorted(found(user.results(job_id))) == sorted(servers)
    assert user.ledger(job_id)["accounted"]
    until(lambda: not running_nmaps(), 10, "nmap to end")
    stack.wait_until_ready()


@pytest.mark.proves("G1", "G3")
@pytest.mark.parametrize("name", ["job-orchestrator-1", "result-store-1", "api-gateway-1"])
def test_service_killed_in_mid_scan_loses_no_result(stack: Stack, user: Client, servers: OpenPorts, name: str) -> None:
    """kill -9 of any other service during a scan changes neither its final state nor its results."""
    job_id = user.scan(SUBNET, ports=PORTS, service_detection=False, max_rate=1500)
    until(lambda: user.status(job_id) == "running", 30, "the scan to run")
    stack.kill(name)
    stack.wait_until_ready()
    task = user.finished(job_id)
    assert task["status"]["status"] == "completed", task
    assert sorted(found(user.results(job_id))) == sorted(servers)


def test_task_list_is_paged_and_filtered(user: Client) -> None:
    """The list is paged, filtered by status in every notation, and has the total number of matches."""
    every = user.http.get("/api/v1/task", params={"page_size": 100}).json()
    assert every["total"] == len(every["jobs"])
    final = user.http.get("/api/v1/task?status=completed&status[]=failed&status=cancelled,completed&page_size=1").json()
    assert final["total"] == sum(job["status"] in FINAL for job in every["jobs"])
    assert final["jobs"] == [job for job in every["jobs"] if job["status"] in FINAL][:1]
    assert user.http.get("/api/v1/task?status=nonsense").status_code == 400
