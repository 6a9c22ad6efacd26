"""Faults of the local environment: clock, disk and the issuer's keys."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime, timedelta

import httpx2
import pytest

from local.wait import until
from scanfleet.contracts.messages import ChunkScanned
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet_testing.tokens import Issuer
from tests.client import FINAL
from tests.faults import faulty_nmap
from tests.faults.faulty_nmap import FAULTS
from tests.faults.invariants import Invariants
from tests.faults.kit import FAILING, LIMIT, STEADY, TINY, Caller, Platform, scanned

pytestmark = pytest.mark.e2e


@pytest.mark.proves("F19", "G4")
def test_clock_skew_of_two_hours_has_no_effect(platform: Platform, invariants: Invariants) -> None:
    """With a worker two hours fast and a gateway two hours slow no lease expires early, and stored times are correct."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")
    slow = platform.caller(gateway="api-gateway-2")
    platform.stack.stop("scanner-worker-2")
    try:
        began = datetime.now().astimezone()
        job_id = slow.scan(platform.network(24), **STEADY)
        job = slow.finished(job_id)["job"]
    finally:
        platform.stack.start("scanner-worker-2")
    assert job["status"] == "completed"
    hour = timedelta(hours=1)
    assert began - hour < datetime.fromisoformat(job["created_at"]) <= datetime.fromisoformat(job["end_time"])
    assert datetime.fromisoformat(job["end_time"]) < began + hour
    times = [
        datetime.fromisoformat(published.headers["ce_time"])
        for published in platform.messages(SCAN_PROGRESS, ChunkScanned)
        if isinstance(published.message, ChunkScanned) and published.message.job_id == job_id
    ]
    assert min(times) > began + hour  # so its clock was off
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    assert {chunk["failures"] for chunk in platform.chunks(job_id)} == {0}
    slow.close()
    invariants.check()


@pytest.mark.proves("F19", "G14")
def test_token_from_the_future_returns_401(platform: Platform) -> None:
    """A gateway that is two hours slow rejects a token issued now with 401, because its own clock decides."""
    now = platform.keys.issuer.token(7)
    for gateway, status in (("api-gateway-1", 200), ("api-gateway-2", 401)):
        caller = platform.caller(gateway=gateway, token=now)
        assert caller.http.get("/api/v1/task").status_code == status
        caller.close()


@pytest.mark.proves("F21", "G1")
@pytest.mark.parametrize("trouble", ["gone", "full"])
def test_job_of_only_worker_without_disk_completes_after_recovery(
    platform: Platform, user: Caller, invariants: Invariants, trouble: str
) -> None:
    """Without space for temporary files a worker is alive and unready, and its job waits and completes once there is space."""
    platform.stack.stop("scanner-worker-1")
    try:
        until(lambda: platform.ready("scanner-worker-2"), LIMIT, "the second worker to be ready")
        assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
        pid = platform.pid("scanner-worker-2")
        with platform.no_disk(full=trouble == "full"):
            job_id = user.scan(platform.network(30), **TINY)
            until(lambda: not platform.ready("scanner-worker-2"), LIMIT, "the second worker to exclude itself")
            platform.wait(5)  # long enough for many attempts of a worker that accepts chunks
            assert user.status(job_id) not in FINAL
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {chunk["failures"] for chunk in platform.chunks(job_id)} == {0}
        assert platform.ready("scanner-worker-2")
        assert platform.pid("scanner-worker-2") == pid
    finally:
        platform.stack.start("scanner-worker-1")
    invariants.check()


@pytest.mark.proves("F25", "G17")
def test_worker_without_disk_does_not_affect_results(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """With one of two workers unable to start nmap, results and ledger are complete, and no chunk has a failure."""
    with platform.servers() as places, platform.no_disk(full=True):
        jobs = [user.scan(platform.network(24), **TINY) for _ in range(6)]  # more than the healthy worker has slots
        until(
            lambda: platform.metric("scanner-worker", "scanfleet_worker_excluded") == 1,
            LIMIT,
            "the broken worker to exclude itself",
        )
        states = [user.finished(job_id)["status"]["status"] for job_id in jobs]
    assert states == ["completed"] * len(jobs)
    for job_id in jobs:
        assert user.ledger(job_id)["counts"]["answered"] == 256 * 20
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == places
        assert {chunk["failures"] for chunk in platform.chunks(job_id)} == {0}
    until(lambda: platform.ready("scanner-worker-2"), LIMIT, "the worker to be included again")
    invariants.check()


@pytest.mark.proves("F25", "G17")
def test_worker_whose_scans_fail_does_not_affect_results(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """With nmap always exiting with 1 on one of two workers, jobs have the results and ledger of a job without that worker."""
    with platform.servers():
        before = scanned(user, user.scan(platform.network(24), **TINY))
        with platform.scans_by(FAILING, "scanner-worker-2"):
            jobs = [user.scan(platform.network(24), **TINY) for _ in range(6)]  # more than the other worker has slots
            until(
                lambda: platform.metric("scanner-worker", "scanfleet_worker_excluded") == 1,
                LIMIT,
                "the broken worker to exclude itself",
            )
            after = [scanned(user, job_id) for job_id in jobs]
    assert before[0]["answered"] == 256 * 20
    assert after == [before] * len(jobs)
    until(lambda: platform.ready("scanner-worker-2"), LIMIT, "the worker to be included again")
    invariants.check()


@pytest.mark.proves("F26", "G17")
def test_hosts_that_break_nmap_are_lost_alone(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Of hosts that crash nmap, flood its output and break its XML each is lost by itself, and all others are scanned."""
    broken = {f"{platform.net}.8.{place}": fault for place, fault in zip((2, 30, 46), FAULTS, strict=True)}
    program = [sys.executable, "-I", faulty_nmap.__file__, ",".join("=".join(each) for each in broken.items())]
    with (
        platform.servers((1, 3, 17, 31, 33, 47, 50)) as places,
        platform.scans_by(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n', *platform.names("scanner-worker")),
    ):
        # Their chunks share an nmap at first, so that one host fails the chunks of several jobs.
        subnets = [user.subnet(f"{platform.net}.8.{each}") for each in ("0/30", "16/28", "32/28", "48/28")]
        jobs = [job["id"] for job in user.submit(subnets, user.policy(**TINY))]
        *failed, healthy = [user.finished(job_id)["status"] for job_id in jobs]
    assert (healthy["status"], healthy["error"]) == ("completed", "")
    causes = ("nmap was killed by SIGSEGV", "a host of more than", "malformed nmap output")
    for job_id, address, status, cause in zip(jobs, broken, failed, causes, strict=False):
        ledger = user.ledger(job_id)
        assert status["status"] == "failed"
        assert status["error"].startswith("1 address lost: ")
        assert cause in status["error"]
        assert (ledger["counts"]["answered"], ledger["counts"]["lost"]) == (ledger["request"]["probes"] - 20, 20)
        assert [each["address"] for each in ledger["not_probed"]["addresses"]] == [address]
    found = {(each["ip_address"], each["port"]) for job_id in jobs for each in user.results(job_id)}
    assert found == places
    invariants.check()


@pytest.mark.proves("F23", "G14")
def test_keys_rotate_during_endpoint_outage(platform: Platform) -> None:
    """While the endpoint is unavailable known keys work and unknown ones are 401; a new key is accepted after it recovers."""
    keys, old = platform.keys, platform.keys.issuer
    caller = platform.caller(7)

    def status(token: str) -> int:
        return caller.http.get("/api/v1/task", headers={"Authorization": f"Bearer {token}"}).status_code

    before, new = platform.token(7), Issuer("key-2")
    assert status(before) == httpx2.codes.OK
    keys.away = True
    keys.issuer = new
    try:
        after = platform.token(7)
        assert status(before) == httpx2.codes.OK
        assert status(after) == httpx2.codes.UNAUTHORIZED
        keys.away = False
        until(lambda: status(after) == httpx2.codes.OK, 10, "the new key to be accepted")
        assert status(before) == httpx2.codes.UNAUTHORIZED
    finally:
        keys.away, keys.issuer = False, old
    until(lambda: status(before) == httpx2.codes.OK, 10, "the old key to be back")
    caller.close()
