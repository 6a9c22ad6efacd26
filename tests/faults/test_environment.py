"""Faults of the local environment: clock, disk and the issuer's keys."""

from __future__ import annotations

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from statistics import median
from threading import Event
from time import monotonic as clock

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
from tests.faults.kit import (
    COOLDOWN_SECONDS,
    FAILING,
    LIMIT_SECONDS,
    MAX_AGE_SECONDS,
    MAX_STALE_SECONDS,
    STEADY,
    TINY,
    Caller,
    Platform,
    scanned,
)

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
        for published in platform.topics.messages(SCAN_PROGRESS, ChunkScanned)
        if isinstance(published.message, ChunkScanned) and published.message.job_id == job_id
    ]
    assert min(times) > began + hour  # so its clock was off
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    assert {chunk["failures"] for chunk in platform.documents.chunks(job_id)} == {0}
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
        until(lambda: platform.ready("scanner-worker-2"), LIMIT_SECONDS, "the second worker to be ready")
        assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
        pid = platform.pid("scanner-worker-2")
        with platform.no_disk(full=trouble == "full"):
            job_id = user.scan(platform.network(30), **TINY)
            until(lambda: not platform.ready("scanner-worker-2"), LIMIT_SECONDS, "the second worker to exclude itself")
            platform.wait(5)  # long enough for many attempts of a worker that accepts chunks
            assert user.status(job_id) not in FINAL
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {chunk["failures"] for chunk in platform.documents.chunks(job_id)} == {0}
        assert platform.ready("scanner-worker-2")
        assert platform.pid("scanner-worker-2") == pid
    finally:
        platform.stack.start("scanner-worker-1")
    invariants.check()


@pytest.mark.proves("F25", "G17")
def test_worker_without_disk_does_not_affect_results(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """With one of two workers unable to start nmap, results and ledger are complete, and no chunk has a failure."""
    with platform.listeners() as places, platform.no_disk(full=True):
        excluded = platform.metric("scanner-worker", "scanfleet_worker_exclusions_total")
        jobs = [user.scan(platform.network(24), **TINY) for _ in range(6)]  # more than the healthy worker has slots
        until(
            lambda: platform.metric("scanner-worker", "scanfleet_worker_exclusions_total") > excluded,
            LIMIT_SECONDS,
            "the broken worker to exclude itself",
        )
        states = [user.finished(job_id)["status"]["status"] for job_id in jobs]
    assert states == ["completed"] * len(jobs)
    for job_id in jobs:
        assert user.ledger(job_id)["counts"]["answered"] == 256 * 20
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == places
        assert {chunk["failures"] for chunk in platform.documents.chunks(job_id)} == {0}
    until(lambda: platform.ready("scanner-worker-2"), LIMIT_SECONDS, "the worker to be included again")
    invariants.check()


@pytest.mark.proves("F25", "G17")
def test_worker_whose_scans_fail_does_not_affect_results(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """With nmap always exiting with 1 on one of two workers, jobs have the results and ledger of a job without that worker."""
    with platform.listeners():
        before = scanned(user, user.scan(platform.network(24), **TINY))
        with platform.scans_by(FAILING, "scanner-worker-2"):
            excluded = platform.metric("scanner-worker", "scanfleet_worker_exclusions_total")
            jobs = [user.scan(platform.network(24), **TINY) for _ in range(6)]  # more than the other worker has slots
            until(
                lambda: platform.metric("scanner-worker", "scanfleet_worker_exclusions_total") > excluded,
                LIMIT_SECONDS,
                "the broken worker to exclude itself",
            )
            after = [scanned(user, job_id) for job_id in jobs]
    assert before[0]["answered"] == 256 * 20
    assert after == [before] * len(jobs)
    until(lambda: platform.ready("scanner-worker-2"), LIMIT_SECONDS, "the worker to be included again")
    invariants.check()


@pytest.mark.proves("F26", "G17")
def test_hosts_that_break_nmap_are_lost_alone(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Of hosts that crash nmap, flood its output and break its XML each is lost by itself, and all others are scanned."""
    broken = {f"{platform.net}.8.{place}": fault for place, fault in zip((2, 30, 46), FAULTS, strict=True)}
    program = [sys.executable, "-I", faulty_nmap.__file__, ",".join("=".join(each) for each in broken.items())]
    with (
        platform.listeners((1, 3, 17, 31, 33, 47, 50)) as places,
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
    keys.unavailable = True
    keys.issuer = new
    try:
        after = platform.token(7)
        assert status(before) == httpx2.codes.OK
        assert status(after) == httpx2.codes.UNAUTHORIZED
        keys.unavailable = False
        until(lambda: status(after) == httpx2.codes.OK, LIMIT_SECONDS, "the new key to be accepted")
        assert status(before) == httpx2.codes.UNAUTHORIZED
    finally:
        keys.unavailable, keys.issuer = False, old
    until(lambda: status(before) == httpx2.codes.OK, LIMIT_SECONDS, "the old key to be back")
    caller.close()


@pytest.mark.proves("A9", "F23", "G14")
def test_keys_rotate_during_traffic(platform: Platform) -> None:
    """Under continuous requests a new key is accepted and the old one refused within the cooldown; no request has another error."""
    keys, old, new = platform.keys, platform.keys.issuer, Issuer("key-2")
    before, after = platform.token(7), new.token(7)
    answered: list[tuple[str, int]] = []
    slowest = 0.0
    over = Event()

    def ask(token: str) -> None:
        nonlocal slowest
        caller = platform.caller(token=token)
        while not over.is_set():
            asked_at = clock()
            answered.append((token, caller.http.get("/api/v1/task").status_code))
            slowest = max(slowest, clock() - asked_at)
        caller.close()

    def latest(token: str) -> int:
        return next(status for each, status in reversed(answered) if each == token)

    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(ask, token) for token in (before, before, after)]
        try:
            until(lambda: {token for token, _ in answered} == {before, after}, LIMIT_SECONDS, "the first answers")
            assert set(answered) == {(before, 200), (after, 401)}
            keys.issuer, began = new, clock()
            until(lambda: latest(after) == 200, LIMIT_SECONDS, "the new key to be accepted", 0.02)
            until(lambda: latest(before) == 401, LIMIT_SECONDS, "the old key to be refused", 0.02)
            assert (
                clock() - began < COOLDOWN_SECONDS + 1 + 2 * slowest
            )  # one request before the fetch, and one after it
        finally:
            keys.issuer = old
            over.set()
    for each in asked:
        each.result()
    assert {status for _, status in answered} == {200, 401}
    caller = platform.caller(token=before)
    until(lambda: caller.http.get("/api/v1/task").is_success, LIMIT_SECONDS, "the old key to be back")
    caller.close()


@pytest.mark.proves("A8", "G14")
def test_unknown_keys_cause_one_fetch_per_cooldown(platform: Platform) -> None:
    """A thousand tokens with unknown keys cause one fetch per cooldown, and another user's requests are answered meanwhile."""
    forger, caller = Issuer(), platform.caller(7)
    tokens = [forger.token(7, headers={"kid": f"unknown-{number}"}) for number in range(1_000)]
    refused: list[int] = []

    def forge(some: list[str]) -> None:
        with httpx2.Client(base_url=str(caller.http.base_url)) as http:
            refused.extend(
                http.get("/api/v1/task", headers={"Authorization": f"Bearer {token}"}).status_code for token in some
            )

    fetched, began, waits = platform.keys.asked, clock(), []
    with ThreadPoolExecutor() as threads:
        forging = [threads.submit(forge, tokens[number::8]) for number in range(8)]
        while not all(each.done() for each in forging):
            asked = clock()
            assert caller.http.get("/api/v1/task").status_code == 200
            waits.append(clock() - asked)
    lasted = clock() - began
    assert refused == [401] * 1_000
    # The second gateway fetches the keys at the latest when they are as old as it allows.
    assert 1 <= platform.keys.asked - fetched <= 1 + lasted / COOLDOWN_SECONDS + 1 + lasted / MAX_AGE_SECONDS
    assert len(waits) > 10
    assert median(waits) < COOLDOWN_SECONDS / 2  # they wait for no fetch
    caller.close()


@pytest.mark.proves("A28", "G14")
def test_known_key_is_refused_once_it_is_too_stale(platform: Platform) -> None:
    """While the endpoint is unavailable a gateway accepts known keys for the set time and no longer."""
    caller = platform.caller(7, "api-gateway-2")

    accepted = 0.0

    def status() -> int:
        nonlocal accepted
        asked = clock()
        code = caller.http.get("/api/v1/task").status_code
        if code == httpx2.codes.OK:
            accepted = asked
        return code

    until(lambda: status() == 200, LIMIT_SECONDS, "the key to be known")
    platform.keys.unavailable = True
    began = clock()
    try:
        until(lambda: status() != 200, LIMIT_SECONDS, "the key to be refused")
        assert status() == 503
        assert clock() - began > MAX_STALE_SECONDS - MAX_AGE_SECONDS - 1
        assert accepted - began < MAX_STALE_SECONDS
    finally:
        platform.keys.unavailable = False
    until(lambda: status() == 200, LIMIT_SECONDS, "the key to be accepted again")
    caller.close()
