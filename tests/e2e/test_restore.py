"""Restore MongoDB from a backup, while Kafka and its consumers have later data."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from local.stack import Stack
from local.wait import until
from scanfleet.contracts.messages import JobEvent
from scanfleet.contracts.messages.envelope import decode
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings
from scanfleet.services import SERVICES
from tests.client import FINAL, Client

pytestmark = pytest.mark.e2e

PREFIX: Final = "restore-"
QUICK: Final = {"ports": "8020-8090", "service_detection": False}
SLOW: Final = QUICK | {"discovery": "none", "max_rate": 1000}
"""A /24 with this policy takes 18 seconds."""
ENDLESS: Final = {"ports": "1-1000", "service_detection": False, "discovery": "none", "max_rate": 100}


@pytest.fixture
def own_stack(kafka: str, tmp_path: Path) -> Iterator[Stack]:
    """One of every service, with a separate MongoDB that can be restored."""
    replicas = dict.fromkeys(SERVICES, 1)
    stack = Stack(tmp_path / "stack", replicas=replicas, kafka_at=kafka, topic_prefix=PREFIX)
    stack.up()
    yield stack
    stack.down()


@pytest.fixture
def caller(own_stack: Stack) -> Iterator[Client]:
    client = Client(own_stack.url, own_stack.token(7))
    yield client
    client.close()


@pytest.fixture
def listeners() -> Iterator[None]:
    with socket.create_server(("127.9.6.1", 8022)), socket.create_server(("127.9.6.200", 8080)):
        yield


def seen(caller: Client, job_id: int) -> tuple[Any, ...]:
    """Return everything that a user can read of a job."""
    return caller.task(job_id), caller.results(job_id), caller.ledger(job_id)


async def job_events(kafka: str) -> dict[tuple[int, int], JobEvent]:
    """Return all job events, by partition and offset."""
    bus = KafkaBus(TopicSettings(kafka=kafka, topic_prefix=PREFIX), source="test", instance="test")
    await bus.start()
    try:
        messages = {(each.partition, each.offset): decode(SCAN_EVENTS, each) async for each in bus.past(SCAN_EVENTS)}
    finally:
        await bus.stop()
    return {place: message for place, message in messages.items() if isinstance(message, JobEvent)}


@pytest.mark.proves("F38", "G24")
@pytest.mark.long
@pytest.mark.usefixtures("listeners")
def test_restore_keeps_finished_jobs_and_reuses_no_id(own_stack: Stack, caller: Client, tmp_path: Path) -> None:
    """After a restore finished jobs are unchanged, others finish, cancelled and deleted ones stay so, and no id is reused."""
    finished = caller.scan("127.9.6.0/26", **QUICK)
    caller.finished(finished)
    before = seen(caller, finished)
    running, deleted = (caller.scan("127.9.6.0/24", **SLOW) for _ in range(2))
    cancelled = caller.scan("127.9.6.0/24", **ENDLESS)
    until(lambda: 0 < caller.task(running)["status"]["progress"] < 100, 60, "the scan to be under way")

    own_stack.backup(tmp_path / "backup")
    assert {caller.status(running), caller.status(deleted)}.isdisjoint(FINAL)

    caller.cancel(cancelled)
    since = caller.scan("127.9.6.0/26", **QUICK)
    assert caller.finished(since)["status"]["status"] == "completed"
    assert caller.finished(running)["status"]["status"] == "completed"
    assert caller.finished(deleted)["status"]["status"] == "completed"
    assert caller.http.delete(f"/api/v1/task/{deleted}").status_code == 200
    until(lambda: open_deletions(caller) == 0, 60, "the job to be deleted")
    lost = caller.task(since)["job"], caller.results(since)
    events = asyncio.run(job_events(own_stack.servers.kafka))

    own_stack.restore(tmp_path / "backup")

    assert seen(caller, finished) == before
    assert caller.finished(running)["status"]["status"] == "completed"
    assert places(caller, running) == {("127.9.6.1", 8022), ("127.9.6.200", 8080)}
    assert caller.ledger(running)["accounted"]
    assert caller.finished(cancelled)["status"]["status"] == "cancelled"
    assert caller.http.get(f"/api/v1/task/{since}").status_code == 404
    assert caller.http.get(f"/api/v1/task/{since}/results").status_code == 404

    until(lambda: caller.http.get(f"/api/v1/task/{deleted}").status_code == 404, 60, "the job to be deleted again")
    fresh = caller.scan("127.9.6.0/26", **QUICK)
    job = caller.finished(fresh)["job"]
    assert min(job[name] - lost[0][name] for name in ("id", "subnet_id", "policy_id")) > 0
    assert places(caller, fresh) == {("127.9.6.1", 8022)}
    assert {each["id"] for each in caller.results(fresh)}.isdisjoint(each["id"] for each in lost[1])
    everything = asyncio.run(job_events(own_stack.servers.kafka))
    meanings = {(event.event_id, event.model_dump_json()) for event in everything.values()}
    assert len(meanings) == len({event_id for event_id, _ in meanings})
    for job_id, status in ((running, "completed"), (cancelled, "cancelled"), (fresh, "completed")):
        place, last = max(everything.items(), key=lambda item: (item[1].job.id == job_id, item[1].seq))
        assert place not in events
        assert last.job.status == status


def places(caller: Client, job_id: int) -> set[tuple[str, int]]:
    return {(each["ip_address"], each["port"]) for each in caller.results(job_id)}


def open_deletions(caller: Client) -> int:
    total: int = caller.http.get("/api/v1/deletion", params={"state": "open"}).json()["total"]
    return total
