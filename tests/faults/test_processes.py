"""Processes that are killed, stopped, shut down, or restarted."""

from __future__ import annotations

import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from time import monotonic as clock
from typing import TypeVar
from uuid import uuid4

import httpx2
import pytest

from local.wait import until
from scanfleet.contracts.messages import ChunkClaimed, ChunkReleased, HostScanned, JobCreated, JobDeleted, ScanChunk
from scanfleet.contracts.messages.topics import (
    SCAN_CHANGES,
    SCAN_COMMANDS,
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_RESULTS,
    SCAN_TASKS,
    TOPICS,
)
from scanfleet.scanning.outcomes import Outcome
from tests.faults.documents import Document, holder
from tests.faults.invariants import Invariants
from tests.faults.kit import (
    ENDLESS,
    LIMIT_SECONDS,
    REQUEUE_SECONDS,
    SLOTS,
    STEADY,
    TINY,
    Caller,
    Platform,
    assert_scanned_once,
    caught,
    requeued,
    scanned,
)

pytestmark = pytest.mark.e2e

CHURN_SECONDS = 60.0  # during which a worker leaves and joins

Reported = TypeVar("Reported", ChunkClaimed, ChunkReleased)


@pytest.mark.proves("F1", "G1", "G2")
def test_gateway_killed_before_its_answer_creates_one_job(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """A gateway killed between publishing a command and answering leaves one job, which the client's retry returns."""
    subnet, policy, key = user.subnet(platform.network(30)), user.policy(**TINY), uuid4().hex

    for name in platform.names("job-orchestrator"):
        platform.kill(name, signal.SIGSTOP)  # so that there is no reply yet
    try:
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(user.submit, [subnet], policy, key)
            until(
                lambda: platform.topics.behind("job-orchestrator-scan-commands", SCAN_COMMANDS) > 0,
                LIMIT_SECONDS,
                "the command to be published",
            )
            platform.kill("api-gateway-1")
            with pytest.raises(httpx2.TransportError):
                asked.result()
    finally:
        for name in platform.names("job-orchestrator"):
            platform.kill(name, signal.SIGCONT)
    platform.stack.wait_until_ready()
    (job,) = user.submit([subnet], policy, key)
    listed = user.http.get("/api/v1/task").json()
    assert [each["id"] for each in listed["jobs"]] == [job["id"]]
    invariants.check()


@pytest.mark.proves("F3", "F4", "G1", "G7")
@pytest.mark.parametrize("published", [False, True])
def test_orchestrators_killed_around_a_publish_lose_no_event(
    platform: Platform, user: Caller, invariants: Invariants, *, published: bool
) -> None:
    """After all orchestrators die with an event in an outbox, it is published at least once with the same id; the job continues."""
    subnet, policy, key = user.subnet(platform.network(30)), user.policy(**TINY), uuid4().hex
    body = {"subnet_ids": [subnet], "policy_id": policy}
    proxy = platform.servers.proxy("job-orchestrator", "kafka")
    killed = Event()

    def ask() -> None:
        """Repeat the POST while the gateway times out: over the slow connection, a fetch may take longer than its five seconds."""
        while user.http.post("/api/v1/task", json=body, headers={"Idempotency-Key": key}).status_code == 503:
            if killed.is_set():
                return

    def unpublished() -> Document | None:
        return next(iter(platform.documents.jobs(subnet_id=subnet, outbox={"$exists": True})), None)

    def created_ids() -> list[str]:
        """Return the ids with which the job's creation was published."""
        events = platform.topics.messages(SCAN_EVENTS, JobCreated)
        return [each.headers["ce_id"] for each in events if each.record.key == str(job["_id"]).encode()]

    proxy.delay(1)  # leaves time between the write and the publish
    try:
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(ask)
            job = caught(unpublished, LIMIT_SECONDS, "a job to be written")
            if published:
                proxy.delay(5)  # the event arrives, but the broker's acknowledgement does not
                until(lambda: bool(created_ids()), LIMIT_SECONDS, "its creation to be published")
            proxy.swallow()
            killed.set()
            for name in platform.names("job-orchestrator"):
                platform.kill(name)
            still = unpublished()
            assert still is not None
            assert still["outbox"][: len(job["outbox"])] == job["outbox"]  # later events may follow
            before = len(created_ids())
            assert bool(before) is published
            asked.result()
    finally:
        proxy.cut()  # drops data that the killed processes had sent
        proxy.heal()
    platform.stack.wait_until_ready()
    until(lambda: len(created_ids()) > before, LIMIT_SECONDS, "its creation to be published again")
    assert len(set(created_ids())) == 1
    (again,) = user.submit([subnet], policy, key)
    assert again["id"] == job["_id"]
    assert user.finished(again["id"])["status"]["status"] == "completed"
    invariants.check()


def halfway(platform: Platform, job_id: int) -> Document | None:
    """Return a running chunk of the job with finished and unfinished addresses."""
    for chunk in platform.documents.chunks(job_id):
        if chunk["state"] == "running" and len(set(chunk["outcomes"])) > 1 and Outcome.BLANK in chunk["outcomes"]:
            return chunk
    return None


@pytest.mark.proves("F2", "G3", "G4", "G16")
def test_worker_killed_in_mid_scan_repeats_no_host(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """A worker killed in mid-scan leaves no nmap, and the next attempt scans exactly the unfinished addresses."""
    with platform.listeners() as servers:
        job_id = user.scan(platform.network(24), **STEADY)
        chunk = caught(lambda: halfway(platform, job_id), LIMIT_SECONDS, "a chunk to be half done")
        done = {index for index, letter in enumerate(chunk["outcomes"]) if letter != Outcome.BLANK}
        nmaps = platform.nmaps_of(holder(chunk))
        platform.kill(holder(chunk))
        until(lambda: not set(nmaps) & platform.nmaps().keys(), 10, "the nmaps of a killed worker to end")
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    attempts = [each.message for each in platform.topics.messages(SCAN_TASKS, ScanChunk)]
    again = [task for task in attempts if isinstance(task, ScanChunk) and task.chunk_id == chunk["_id"]]
    again = [task for task in again if task.attempt > chunk["attempt"]]
    assert again
    assert all(task.outcomes[index] != Outcome.BLANK for task in again for index in done)
    hosts = [each.message for each in platform.topics.messages(SCAN_RESULTS, HostScanned)]
    first = chunk["first_address"].rpartition(".")
    base = int(first[2])
    reports = Counter(host.address for host in hosts if isinstance(host, HostScanned) and host.chunk_id == chunk["_id"])
    assert {reports[f"{first[0]}.{base + index}"] for index in done} == {1}
    invariants.check()


@pytest.mark.proves("F38", "G24")
@pytest.mark.parametrize("service", ["job-orchestrator", "result-store"])
def test_service_killed_during_a_deletion_completes_it(
    platform: Platform, user: Caller, invariants: Invariants, service: str
) -> None:
    """A deletion whose processes are killed between two of its steps is complete after their restart, and its job stays deleted."""
    with platform.listeners():
        job_id = user.scan(platform.network(24), **TINY)
        assert user.finished(job_id)["status"]["status"] == "completed"
    stored = len(platform.documents.hosts(job_id=job_id))
    assert stored == 256
    for name in platform.names("result-store"):
        platform.kill(name, signal.SIGSTOP)
    assert user.http.delete(f"/api/v1/task/{job_id}").status_code == 200
    until(lambda: bool(platform.documents.deletions(_id=job_id)), LIMIT_SECONDS, "the receipt of the deletion")
    for name in platform.names("result-store"):
        platform.kill(name, signal.SIGCONT)
    if service == "result-store":
        until(
            lambda: 0 < len(platform.documents.hosts(job_id=job_id)) < stored,
            LIMIT_SECONDS,
            "some hosts to be deleted",
            0.01,
        )
    for name in platform.names(service):
        platform.kill(name)
    platform.stack.wait_until_ready()
    until(
        lambda: platform.documents.deletions(_id=job_id)[0]["deletion"]["stage"] == "done",
        LIMIT_SECONDS,
        "the deletion to be complete",
    )
    assert user.http.get(f"/api/v1/task/{job_id}").status_code == 404
    (receipt,) = user.http.get("/api/v1/deletion").json()["deletions"]
    assert receipt["job_id"] == job_id
    events = platform.topics.messages(SCAN_CHANGES, JobDeleted)
    assert {each.record.key for each in events} >= {str(job_id).encode()}
    invariants.check()


@pytest.mark.proves("F5", "G3", "G16")
def test_result_store_killed_before_commit_stores_hosts_once(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """A result-store killed between storing and committing hosts reads them again and stores each once."""
    with platform.listeners() as servers:
        platform.servers.proxy("result-store", "kafka").delay(0.5)  # delays its commits
        try:
            job_id = user.scan(platform.network(25), **TINY)
            until(lambda: bool(platform.documents.hosts(job_id=job_id)), LIMIT_SECONDS, "hosts to be stored")
            for name in platform.names("result-store"):
                platform.kill(name)
            assert platform.topics.behind("result-store", SCAN_RESULTS) > 0
            stored = platform.documents.hosts(job_id=job_id)
        finally:
            platform.servers.proxy("result-store", "kafka").heal()
        platform.stack.wait_until_ready()
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    assert [host for host in platform.documents.hosts(job_id=job_id) if host in stored] == stored
    invariants.check()


@pytest.mark.proves("F8", "G4", "G5")
def test_worker_stopped_past_its_lease_is_superseded(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """A worker resumed after its lease ends its nmap within about a second, and its reports are ignored."""
    # One chunk for each worker, so that the other has a free slot; its nmap outlives the lease.
    job_id = user.scan(platform.network(31), **{**ENDLESS, "max_rate": 20})
    chunk = caught(
        lambda: next(iter(each for each in platform.documents.chunks(job_id) if each["state"] == "running"), None),
        LIMIT_SECONDS,
        "a chunk to run",
    )
    frozen, stale = holder(chunk), platform.metric("job-orchestrator", "scanfleet_stale_reports_total")
    nmaps = set(platform.nmaps_of(frozen))
    assert nmaps
    platform.kill(frozen, signal.SIGSTOP)
    try:
        until(lambda: requeued(platform, chunk), REQUEUE_SECONDS, "the chunk to be requeued", 0.05)
        taken = caught(
            lambda: next(
                iter(
                    each
                    for each in platform.documents.chunks(job_id)
                    if each["_id"] == chunk["_id"] and each["state"] == "running" and holder(each) not in ("", frozen)
                ),
                None,
            ),
            LIMIT_SECONDS,
            "another worker to have the chunk",
        )
    finally:
        platform.kill(frozen, signal.SIGCONT)
    until(lambda: not nmaps & platform.nmaps().keys(), 5, "the thawed worker's nmaps to end")
    until(
        lambda: platform.metric("job-orchestrator", "scanfleet_stale_reports_total") > stale,
        LIMIT_SECONDS,
        "its report to be counted as stale",
    )
    (now,) = [each for each in platform.documents.chunks(job_id) if each["_id"] == chunk["_id"]]
    assert (now["state"], now["attempt"], now["worker_id"]) == ("running", taken["attempt"], taken["worker_id"])
    assert now["failures"] == chunk["failures"] + 1
    user.cancel(job_id)
    invariants.check()


@pytest.mark.proves("F8", "G3", "G4", "G5")
def test_job_of_a_worker_stopped_in_mid_scan_has_the_same_results(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """A job whose worker is stopped in mid-scan has the results and ledger of a job without the fault, also after it resumes."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")

    def released() -> bool:
        late = {(each.chunk_id, each.attempt) for each in reported(platform, ChunkReleased)}
        return (chunk["_id"], chunk["attempt"]) in late

    with platform.listeners():
        before = scanned(user, user.scan(platform.network(25), **STEADY))
        job_id = user.scan(platform.network(25), **STEADY)
        chunk = caught(lambda: halfway(platform, job_id), LIMIT_SECONDS, "a chunk to be half done")
        frozen = holder(chunk)
        nmaps = set(platform.nmaps_of(frozen))
        platform.kill(frozen, signal.SIGSTOP)
        try:
            until(lambda: requeued(platform, chunk), REQUEUE_SECONDS, "the chunk to be requeued", 0.05)
            after = scanned(user, job_id)
            stored = platform.documents.hosts(job_id=job_id)
        finally:
            platform.kill(frozen, signal.SIGCONT)
        until(lambda: not nmaps & platform.nmaps().keys(), 5, "the resumed worker's nmaps to end")
        until(released, LIMIT_SECONDS, "its late report")
        platform.topics.until_read()
    assert len(stored) == 128
    assert platform.documents.hosts(job_id=job_id) == stored
    assert scanned(user, job_id) == after == before
    assert before[0]["answered"] == 128 * 20
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") > expired
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F10", "F22", "G3", "G10")
def test_worker_that_restarts_repeatedly_loses_no_lease(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """While a worker leaves and joins for a minute no lease expires, no token is reused, and no host is scanned again."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")

    def restarted(gone: int) -> bool:
        return platform.running("scanner-worker-2") not in (0, gone)

    with platform.listeners() as servers:
        jobs = [user.scan(platform.network(24), **STEADY)]
        restarts, began = 0, clock()
        while clock() - began < CHURN_SECONDS:
            if user.status(jobs[-1]) == "completed":
                jobs.append(user.scan(platform.network(24), **STEADY))
            until(
                lambda: bool(platform.nmaps_of("scanner-worker-2")) or not platform.documents.jobs(settled=False),
                LIMIT_SECONDS,
                "the worker to scan",
            )
            gone = platform.pid("scanner-worker-2")
            platform.kill("scanner-worker-2", signal.SIGTERM)
            until(partial(restarted, gone), LIMIT_SECONDS, "the worker to restart")
            platform.stack.wait_until_ready()
            restarts += 1
        assert restarts > 1
        for job_id in jobs:
            assert user.finished(job_id)["status"]["status"] == "completed"
            assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    claims = [each for each in reported(platform, ChunkClaimed) if each.job_id in jobs]
    releases = [each for each in reported(platform, ChunkReleased) if each.job_id in jobs]
    assert releases
    assert max(Counter((each.chunk_id, each.attempt) for each in claims).values()) == 1
    attempts = {chunk["_id"]: chunk["attempt"] for job_id in jobs for chunk in platform.documents.chunks(job_id)}
    assert attempts == {id_: 1 + sum(each.chunk_id == id_ for each in releases) for id_ in attempts}
    assert_scanned_once(platform, jobs)
    invariants.check()


@pytest.mark.proves("F14", "G10")
@pytest.mark.parametrize(("name", "finishes"), [("scanner-worker-1", True), ("scanner-worker-2", False)])
def test_worker_sigterm_finishes_or_releases_chunks(
    platform: Platform, user: Caller, invariants: Invariants, name: str, *, finishes: bool
) -> None:
    """On SIGTERM with three running chunks a worker finishes them, or releases them without grace, and exits with 0."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")
    other = {"scanner-worker-1": "scanner-worker-2", "scanner-worker-2": "scanner-worker-1"}[name]
    platform.stack.stop(other)
    try:
        # The rate of each job allows one chunk at a time.
        jobs = [user.scan(platform.network(24), **STEADY) for _ in range(SLOTS)]
        until(lambda: len(platform.nmaps_of(name)) == SLOTS, LIMIT_SECONDS, "three chunks to run")
        held = {
            chunk["_id"]
            for job_id in jobs
            for chunk in platform.documents.chunks(job_id)
            if chunk["state"] == "running"
        }
        gone = platform.pid(name)
        platform.kill(name, signal.SIGTERM)
        until(lambda: platform.running(name) not in (0, gone), LIMIT_SECONDS, "the worker to end and come back")
    finally:
        platform.stack.start(other)
    for job_id in jobs:
        assert user.finished(job_id)["status"]["status"] == "completed"
    ends = {each.chunk_id for each in reported(platform, ChunkReleased) if each.job_id in jobs}
    assert held & ends == (set() if finishes else held)
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    assert platform.exits(name)[-1] == 0
    assert_scanned_once(platform, jobs)
    invariants.check()


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="raw packets need root: run the tests as root")
@pytest.mark.proves("F28", "G10")
def test_job_waits_while_the_only_raw_worker_is_unavailable(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """While the only worker with raw packets is drained its job waits, with the reason; it continues when the worker returns."""

    def reasons() -> set[str]:
        return {each["kind"] for each in user.http.get(f"/api/v1/task/{job_id}/waiting").json()["reasons"]}

    def holders() -> set[str]:
        return {each.worker_id.rpartition("-")[0] for each in reported(platform, ChunkClaimed) if each.job_id == job_id}

    def dead_lettered() -> int:
        return sum(len(platform.topics.records(topic, letters=True)) for topic in TOPICS)

    before = dead_lettered()
    with platform.listeners() as servers, platform.without_raw_packets():
        job_id = user.scan(platform.network(22), **STEADY, technique="syn")
        until(lambda: bool(platform.nmaps_of("scanner-worker-1")), LIMIT_SECONDS, "the raw worker to scan")
        platform.stack.stop("scanner-worker-1")
        try:
            until(lambda: reasons() == {"no_raw_worker"}, LIMIT_SECONDS, "the job to have the reason")
            for _ in range(3):  # jobs that need none are scanned meanwhile
                _, found = scanned(user, user.scan(platform.network(29), **TINY, technique="connect"))
                assert {(address, int(port)) for address, _, port, *_ in found} < servers
            assert reasons() == {"no_raw_worker"}
        finally:
            platform.stack.start("scanner-worker-1")
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
        assert holders() == {"scanner-worker-1"}
    assert dead_lettered() == before
    assert_scanned_once(platform, [job_id])
    invariants.check()


def reported(platform: Platform, kind: type[Reported]) -> list[Reported]:
    """Return the workers' messages of this kind."""
    return [each.message for each in platform.topics.messages(SCAN_PROGRESS, kind) if isinstance(each.message, kind)]
