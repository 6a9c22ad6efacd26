"""Faults of the bus: replays, invalid messages, outages and data loss."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import monotonic as clock
from typing import Any

import pytest

from local.wait import until
from scanfleet.contracts.messages import ScanChunk, WorkerReady, export
from scanfleet.contracts.messages.envelope import RawRecord, encode
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.contracts.messages.topics import (
    SCAN_COMMANDS,
    SCAN_PROGRESS,
    SCAN_REPLIES,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_TASKS,
    SCAN_WORKERS,
    Topic,
)
from scanfleet_testing.hostile import hostile_messages
from tests.faults.documents import Document, holder
from tests.faults.invariants import Invariants
from tests.faults.kit import (
    ENDLESS,
    LEASE_SECONDS,
    LIMIT_SECONDS,
    REQUEUE_SECONDS,
    STEADY,
    TINY,
    Caller,
    Platform,
    caught,
    requeued,
)

pytestmark = pytest.mark.e2e

CONSUMED = (SCAN_COMMANDS, SCAN_REPLIES, SCAN_WORKERS, SCAN_TASKS, SCAN_PROGRESS, SCAN_RESULTS, SCAN_STORED)
PROGRESS = "job-orchestrator-scan-progress"  # the group that reads it
SLOW = {**ENDLESS, "max_rate": 20}  # a /31 with this policy is one chunk of more than a minute
REBALANCE_SECONDS = LEASE_SECONDS * 20 / 45  # between two rebalances: as one every 20 seconds with a lease of 45
POST_SECONDS = 5 + 2  # the timeout of a command, and the query for its outcome
ENVELOPE = [("ce_specversion", b"1.0"), ("content-type", b"application/json")]


def truth(platform: Platform) -> dict[str, list[Document]]:
    """Return all documents with the state of jobs."""
    kinds = {
        "jobs": platform.documents.jobs(),
        "hosts": platform.documents.hosts(),
        "closed": platform.documents.closed(),
    }
    kinds["chunks"] = [chunk for job in kinds["jobs"] for chunk in platform.documents.chunks(job["_id"])]
    kinds["commands"] = platform.documents.commands()
    return {kind: sorted(documents, key=lambda each: str(each["_id"])) for kind, documents in kinds.items()}


@pytest.mark.proves("F9", "G3", "G6", "G7", "G24")
def test_replayed_messages_change_nothing(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Replaying all messages three times, in any order between jobs, changes no document and brings back no deleted job."""
    with platform.listeners():
        for _ in range(3):
            user.finished(user.scan(platform.network(25), **TINY))
        deleted = user.scan(platform.network(25), **TINY)
        user.finished(deleted)
    assert platform.documents.hosts(job_id=deleted)
    assert user.http.delete(f"/api/v1/task/{deleted}").status_code == 200
    invariants.check()  # and the deletion is complete
    before = truth(platform)
    assert not [
        each for kind in ("jobs", "chunks") for each in before[kind] if deleted in {each["_id"], each.get("job_id")}
    ]
    assert any(f'"job_id":{deleted},'.encode() in (each.value or b"") for each in platform.topics.records(SCAN_RESULTS))
    chance = random.Random(9)  # noqa: S311 # an order, not a secret
    for topic in CONSUMED:
        by_key: dict[Any, list[Any]] = defaultdict(list)
        for record in platform.topics.records(topic):
            if record.value is not None and record.key is not None and len(record.value) < 1_000_000:
                by_key[record.key].append((topic.name, None, record.key, record.value, record.headers))
        messages = []
        for _ in range(3):
            queues = [list(records) for records in by_key.values()]
            while queues:
                queue = chance.choice(queues)
                messages.append(queue.pop(0))
                queues = [each for each in queues if each]
        platform.topics.send(messages)
    platform.topics.until_read()
    # Replayed results of the deleted job are stored, and deleted again at once.
    until(lambda: not platform.documents.closed(job_id=deleted), LIMIT_SECONDS, "the results to be deleted again")
    invariants.check()
    assert truth(platform) == before
    assert user.http.get(f"/api/v1/task/{deleted}").status_code == 404


def poison(topic: Topic) -> list[tuple[bytes | None, list[tuple[str, bytes]]]]:
    """Return value and headers of records that no consumer accepts."""
    kind = topic.messages[0].type_name().encode()
    return [
        (os.urandom(64), [*ENVELOPE, ("ce_type", kind)]),
        (b'{"job_id": "x", "worker_id": 7}', [*ENVELOPE, ("ce_type", kind)]),
        (b'{"x": "' + b"y" * MAX_BYTES + b'"}', [*ENVELOPE, ("ce_type", kind)]),
        (b"{}", [*ENVELOPE, ("ce_type", b"scanfleet.Nonsense.v1")]),
        (b"{}", []),
        (None, [*ENVELOPE, ("ce_type", kind)]),
    ]


def dead_letters(platform: Platform, topic: Topic, count: int) -> list[RawRecord]:
    """Return the dead letters of the topic once there are `count`."""
    until(
        lambda: len(platform.topics.records(topic, letters=True)) >= count,
        LIMIT_SECONDS,
        f"{count} dead letters of {topic.name}",
    )
    return platform.topics.records(topic, letters=True)


@pytest.mark.proves("F12", "G9")
def test_invalid_records_are_dead_lettered_or_skipped(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Six kinds of invalid records in every partition are dead-lettered by groups and skipped by others, and scans continue."""
    job_id = user.scan(platform.network(28), **TINY)
    assert user.finished(job_id)["status"]["status"] == "completed"
    worker = str(platform.documents.chunks(job_id)[0]["worker_id"]).encode()  # which reads the tasks with this key
    before = {topic.name: len(platform.topics.records(topic, letters=True)) for topic in CONSUMED}
    skipped = platform.metric("scanner-worker", "scanfleet_bus_skipped_total")
    sent: dict[str, int] = {}
    for topic in CONSUMED:
        records = [
            (topic.name, partition, worker if topic is SCAN_TASKS else b"poison", value, headers)
            for partition in range(topic.partitions)
            for value, headers in poison(topic)
        ]
        sent[topic.name] = len(records)
        platform.topics.send(records)
    assert user.finished(user.scan(platform.network(28), **TINY))["status"]["status"] == "completed"
    for topic in CONSUMED:
        if topic in (SCAN_REPLIES, SCAN_TASKS):  # their readers decode only the records with their own keys
            assert len(platform.topics.records(topic, letters=True)) == before[topic.name]
            continue
        letters = dead_letters(platform, topic, before[topic.name] + sent[topic.name])[before[topic.name] :]
        headers = [dict(letter.headers) for letter in letters]
        assert all(each["dlq_reason"] and each["dlq_topic"] == topic.name.encode() for each in headers)
        assert len({(each["dlq_partition"], each["dlq_offset"]) for each in headers}) == sent[topic.name]
    until(
        lambda: platform.metric("scanner-worker", "scanfleet_bus_skipped_total") - skipped == len(poison(SCAN_TASKS)),
        LIMIT_SECONDS,
        "the worker to have counted the junk with its key, in the one partition that it reads",
    )
    invariants.check()


def cpu_seconds(platform: Platform) -> float:
    """Return the CPU time that the processes of all services have used so far."""
    ticks = 0
    for process in platform.stack.processes():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def hostile(topic: Topic) -> Iterator[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    """Key, value and headers: each message of the topic with a hostile value in place of each of its parts."""
    for kind in topic.messages:
        example = json.loads((export.EXAMPLES / export.CURRENT / export.file_name(kind)).read_text(encoding="utf-8"))
        if kind is WorkerReady:
            example["slots"] = 0  # an accepted message must not attract chunks to a worker that does not exist
        good = encode(topic, kind.model_validate(example), source="forger")
        for _, value in hostile_messages(example, size=20_000):
            yield good.key, value, list(good.headers)


@pytest.mark.proves("F12", "A21", "G9")
def test_hostile_values_have_bounded_cost(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Valid JSON with a hostile value in any field costs bounded CPU time, and the records behind it are handled."""
    platform.topics.until_read()
    began, count = cpu_seconds(platform), 0
    before = {topic.name: len(platform.topics.records(topic, letters=True)) for topic in CONSUMED}
    for topic in CONSUMED:
        records = [(topic.name, None, *each) for each in hostile(topic)]
        count += len(records)
        for first in range(0, len(records), 500):
            platform.topics.send(records[first : first + 500])
    assert user.finished(user.scan(platform.network(28), **TINY))["status"]["status"] == "completed"
    platform.topics.until_read()
    # At least two replicas read a topic without a group, and each rejected record is logged; a quadratic step on a single
    # value would take seconds.
    assert cpu_seconds(platform) - began < 0.05 * count
    for topic in CONSUMED:
        if topic not in (SCAN_REPLIES, SCAN_TASKS):  # every process reads all records of these topics
            assert len(platform.topics.records(topic, letters=True)) > before[topic.name]
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F15", "G1", "G11")
def test_broker_unavailable_for_long_delays_jobs_only(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """While the broker refuses connections or hangs, a POST is a 503 in bounded time and reads work; then all services recover."""
    job_id = user.scan(platform.network(24), **STEADY)
    before = platform.memory()

    def unavailable(seconds: float) -> None:
        began = clock()
        while clock() - began < seconds:
            asked = clock()
            answer = user.http.post("/api/v1/task", json=body, headers={"Idempotency-Key": f"{asked}"})
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
            assert clock() - asked < POST_SECONDS
            assert user.task(job_id)["job"]["id"] == job_id

    body = {"subnet_ids": [user.subnet(platform.network(30))], "policy_id": user.policy(**TINY)}
    proxies = platform.servers.proxies("kafka")
    try:
        for proxy in proxies:
            proxy.refuse()
        unavailable(20)
        for proxy in proxies:
            proxy.heal()
            proxy.swallow()
        unavailable(45)
        after = platform.memory()
        for name in before.keys() & after.keys():
            assert after[name][0] < before[name][0] + 64 * 1024, name
    finally:
        for proxy in proxies:
            proxy.heal()
    platform.stack.wait_until_ready()
    assert user.finished(job_id)["status"]["status"] == "completed"
    assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.proves("F17", "G4", "G6")
def test_orchestrator_without_broker_expires_no_lease(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Orchestrators that lose only the bus for longer than a lease expire no lease and end no job twice."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")
    with platform.listeners() as servers:
        job_id = user.scan(platform.network(23), **STEADY)
        until(lambda: bool(platform.nmaps()), LIMIT_SECONDS, "the scan to run")
        proxy = platform.servers.proxy("job-orchestrator", "kafka")
        proxy.swallow()
        try:
            platform.wait(1.5 * LEASE_SECONDS)
        finally:
            proxy.heal()
        platform.stack.wait_until_ready()
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    assert {chunk["failures"] for chunk in platform.documents.chunks(job_id)} == {0}
    invariants.check()


def running(platform: Platform, job_id: int) -> Document | None:
    """Return the chunk of a job of one chunk while it runs."""
    return next((chunk for chunk in platform.documents.chunks(job_id) if chunk["state"] == "running"), None)


def dispatched_once(platform: Platform, job_id: int) -> bool:
    """Return whether no attempt of the job's chunks was dispatched twice."""
    tasks = [each.message for each in platform.topics.messages(SCAN_TASKS, ScanChunk)]
    given = Counter(
        (task.chunk_id, task.attempt) for task in tasks if isinstance(task, ScanChunk) and task.job_id == job_id
    )
    return set(given.values()) == {1}


@pytest.mark.proves("F29", "G4")
def test_rebalances_extend_no_lease_of_a_stopped_worker(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """While rebalances of scan-progress are more frequent than a lease, only chunks of a stopped worker are reassigned, in time."""
    jobs = [user.scan(platform.network(31), **SLOW) for _ in range(3)]
    before = [caught(lambda: running(platform, job_id), LIMIT_SECONDS, "the job to run") for job_id in jobs]  # noqa: B023 # called before the next turn
    stopped = holder(before[0])
    lost = [chunk for chunk in before if holder(chunk) == stopped]

    def reassigned() -> bool:
        now = [running(platform, chunk["job_id"]) for chunk in lost]
        return all(each is not None and holder(each) != stopped for each in now)

    with platform.topics.rebalances(PROGRESS, REBALANCE_SECONDS):
        platform.kill(stopped, signal.SIGSTOP)
        try:
            for chunk in lost:
                until(lambda: requeued(platform, chunk), REQUEUE_SECONDS, "the chunk to be requeued", 0.05)  # noqa: B023 # called before the next turn
            until(reassigned, LIMIT_SECONDS, "another worker to have the chunks")
        finally:
            platform.kill(stopped, signal.SIGCONT)
    for chunk in before:
        (now,) = platform.documents.chunks(chunk["job_id"])
        assert now["attempt"] == chunk["attempt"] + (chunk in lost)
        assert dispatched_once(platform, chunk["job_id"])
        user.cancel(chunk["job_id"])
    invariants.check()


@pytest.mark.proves("F29")
def test_unread_progress_expires_no_lease(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """While scan-progress is unread for two leases, and all else is read, no lease expires and no chunk is dispatched twice."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")
    before = user.scan(platform.network(31), **SLOW)
    caught(lambda: running(platform, before), LIMIT_SECONDS, "the first job to run")
    unread, began = 0, clock()
    with platform.topics.stalled(PROGRESS, 2 * LEASE_SECONDS) as stall:
        meanwhile = user.scan(platform.network(31), **SLOW)  # its claims are unread
        while not stall.done():
            unread = max(unread, platform.topics.behind(PROGRESS, SCAN_PROGRESS))
    assert clock() - began > 1.5 * LEASE_SECONDS
    assert unread > LEASE_SECONDS  # workers report once a second
    for job_id in (before, meanwhile):
        caught(lambda: running(platform, job_id), LIMIT_SECONDS, "the job to run")  # noqa: B023 # called before the next turn
        assert {(chunk["attempt"], chunk["failures"]) for chunk in platform.documents.chunks(job_id)} == {(1, 0)}
        assert dispatched_once(platform, job_id)
        user.cancel(job_id)
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F18", "G1")
def test_broker_data_loss_is_survived(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """After the broker lost its data every process restarts, and all unfinished and new jobs finish."""
    with platform.listeners() as servers:
        jobs = [user.scan(platform.network(24), **STEADY) for _ in range(3)]
        until(
            lambda: any(platform.documents.hosts(job_id=job_id) for job_id in jobs), LIMIT_SECONDS, "hosts to be stored"
        )
        before = {each.name: platform.pid(each.name) for each in platform.stack.processes()}
        platform.lose_the_log()
        for name, pid in before.items():
            until(lambda: platform.running(name) not in (0, pid), LIMIT_SECONDS, f"{name} to restart")  # noqa: B023 # called before the next turn
        platform.stack.wait_until_ready()
        for job_id in jobs:
            assert user.finished(job_id, 180)["status"]["status"] == "completed"
            assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
        job_id = user.scan(platform.network(25), **TINY)
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    invariants.check()
