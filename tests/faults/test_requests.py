"""Concurrent requests, and requests that race with the completion of a job."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from scanfleet.contracts.messages import JobEvent
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from tests.faults.invariants import Invariants
from tests.faults.kit import TINY, Caller, Platform

pytestmark = pytest.mark.e2e

AT_ONCE = 50


@pytest.mark.proves("F13", "G2")
def test_concurrent_posts_with_one_key_create_one_job(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Concurrent posts create one job, which all answers return; another body is a 400, another user gets a separate job."""
    subnet, policy, key = user.subnet(platform.network(30)), user.policy(**TINY), uuid4().hex
    body = {"subnet_ids": [subnet], "policy_id": policy}
    second = platform.caller(int(user.http.get(f"/api/v1/policy/{policy}").json()["user_id"]), "api-gateway-2")

    def post(number: int) -> httpx2.Response:
        return (user, second)[number % 2].http.post("/api/v1/task", json=body, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(post, range(AT_ONCE)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["jobs"][0]["id"] for answer in answers}) == 1
    assert user.http.get("/api/v1/task").json()["total"] == 1
    other = user.http.post(
        "/api/v1/task",
        json=body | {"subnet_ids": [user.subnet(platform.network(31))]},
        headers={"Idempotency-Key": key},
    )
    assert other.status_code == 400
    stranger = platform.caller()
    (job,) = stranger.submit([stranger.subnet(platform.network(30))], stranger.policy(**TINY), key)
    assert job["id"] != answers[0].json()["jobs"][0]["id"]
    for each in (second, stranger):
        each.close()
    invariants.check()


@pytest.mark.parametrize(("path", "other"), [("subnet", {"cidr": "127.0.0.2"}), ("policy", {"preset": "full"})])
def test_concurrent_posts_of_a_resource_with_one_key_create_one(
    platform: Platform, user: Caller, path: str, other: dict[str, str]
) -> None:
    """Concurrent posts get one answer and create one object; another body is a 400, another user gets a separate object."""
    body = {"name": "keyed"} | ({"cidr": "127.0.0.1"} if path == "subnet" else {})
    headers = {"Idempotency-Key": uuid4().hex}
    second = platform.caller(int(user.http.get("/api/v1/me").json()["user_id"]), "api-gateway-2")
    stranger = platform.caller()

    def post(caller: Caller, **changed: str) -> httpx2.Response:
        return caller.http.post(f"/api/v1/{path}", json=body | changed, headers=headers)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(post, [user, second] * (AT_ONCE // 2)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert user.http.get(f"/api/v1/{path}").json()["total"] == 1
    assert post(user, **other).status_code == 400
    assert post(stranger).json()["id"] != answers[0].json()["id"]
    for each in (second, stranger):
        each.close()


@pytest.mark.proves("F11", "G6", "G8")
def test_cancel_during_completion_has_one_outcome(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """A job cancelled while it completes is either cancelled or completed, and answer, GET and events agree."""
    subnet, policy = user.subnet(platform.network(30)), user.policy(**TINY)

    def lived(job_id: int) -> float:
        began = time.monotonic()
        user.finished(job_id)
        return time.monotonic() - began

    moment = min(lived(user.submit([subnet], policy)[0]["id"]) for _ in range(3))
    chance = random.Random(11)  # noqa: S311 # moments, not secrets

    def race(_: int) -> tuple[int, httpx2.Response, str]:
        nonlocal moment
        job_id = user.submit([subnet], policy)[0]["id"]
        time.sleep(max(0.0, moment + chance.uniform(-0.05, 0.05)))  # the timing is the fault
        answer = user.http.post(f"/api/v1/task/{job_id}/cancel")
        moment *= 1.1 if answer.is_success else 0.9  # towards the completion, however long it takes beside the others
        return job_id, answer, user.finished(job_id)["status"]["status"]

    with ThreadPoolExecutor(3) as threads:
        races: list[tuple[int, httpx2.Response, str]] = list(threads.map(race, range(40)))
    invariants.check()  # and all events are published
    ends: dict[int, Any] = {}
    for published in platform.topics.messages(SCAN_EVENTS, JobEvent):
        assert isinstance(published.message, JobEvent)
        if published.message.job.end_time is not None:
            ends.setdefault(published.message.job.id, set()).add(published.message.job.status)
    for job_id, answer, status in races:
        assert (answer.status_code, status) in {(200, "cancelled"), (400, "completed")}
        assert user.status(job_id) == status
        assert ends[job_id] == {status}
    assert {status for _, _, status in races} == {"cancelled", "completed"}
