"""Faults of the database: kills, outages, cut connections, elections and slow responses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event
from time import monotonic
from typing import Final

import httpx2
import pytest
from pymongo.errors import AutoReconnect

from local.wait import until
from scanfleet.services import WITH_DATABASE
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, STEADY, TINY, Caller, Platform

pytestmark = pytest.mark.e2e

VIEWS: Final = ("ledger", "map", "snapshot", "waiting", "results", "hosts")  # of a job
SLOW_SECONDS: Final = 6.0  # for a request that needs some round trips of half a second
GROWTH: Final = 64 * 1024  # kilobytes: maximum growth of a process meanwhile


@contextmanager
def load(platform: Platform, user: Caller, least: int = 3) -> Iterator[list[int]]:
    """Submit small jobs one after the other until the end of the block, at least `least`; yield the acknowledged ones."""
    subnet, policy = user.subnet(platform.network(28)), user.policy(**TINY)
    jobs: list[int] = []
    enough = Event()

    def work() -> None:
        while not enough.is_set() or len(jobs) < least:
            answer = user.http.post("/api/v1/task", json={"subnet_ids": [subnet], "policy_id": policy})
            assert answer.status_code in {201, 503}
            if answer.status_code == httpx2.codes.CREATED:
                jobs.append(answer.json()["jobs"][0]["id"])

    with ThreadPoolExecutor() as threads:
        working = threads.submit(work)
        try:
            until(lambda: bool(jobs) or working.done(), LIMIT_SECONDS, "the load to begin")
            yield jobs
        finally:
            enough.set()
        working.result()


@pytest.mark.proves("F6", "G1")
def test_mongod_killed_under_load_loses_nothing(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """kill -9 of mongod loses nothing that was acknowledged."""
    with load(platform, user) as jobs:
        for _ in range(2):
            gone = platform.pid("mongod")
            before = len(jobs)
            platform.kill("mongod")
            until(lambda gone=gone: platform.running("mongod") not in (0, gone), LIMIT_SECONDS, "mongod to come back")  # type: ignore[misc] # mypy infers no type for a lambda with a default
            platform.servers.wait_until_ready()
            until(lambda before=before: len(jobs) > before, LIMIT_SECONDS, "jobs to be accepted again")  # type: ignore[misc] # as above
    for job_id in jobs:
        assert user.finished(job_id)["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F6", "G1", "G16")
def test_mongod_outage_in_mid_scan_loses_nothing(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """During an outage of twenty seconds in mid-scan the services are unready, no lease expires, and the scan completes."""
    with platform.listeners() as servers:
        job_id = user.scan(platform.network(23), **STEADY)
        until(lambda: bool(platform.documents.hosts(job_id=job_id)), LIMIT_SECONDS, "hosts to be stored")
        platform.servers.stop("mongod")
        try:
            names = [name for service in WITH_DATABASE for name in platform.names(service)]
            until(lambda: not any(map(platform.ready, names)), LIMIT_SECONDS, "all that need it to be unready")
            assert user.http.get(f"/api/v1/task/{job_id}").status_code == httpx2.codes.SERVICE_UNAVAILABLE
            assert platform.ready("api-gateway-1")
            platform.wait(20)
        finally:
            platform.servers.start("mongod")
        platform.stack.wait_until_ready()
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    assert {chunk["failures"] for chunk in platform.documents.chunks(job_id)} == {0}
    invariants.check()


@pytest.mark.proves("F7", "G3", "G6")
def test_writes_with_cut_connections_are_applied_once(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Writes whose connection is closed before or after they are applied are applied once."""
    writes = ["insert", "update", "findAndModify"]
    with load(platform, user, 6) as jobs:
        with platform.documents.failing(failCommands=writes, closeConnection=True, mode={"activationProbability": 0.3}):
            before = len(jobs)
            until(lambda: len(jobs) > before + 2, LIMIT_SECONDS, "jobs to be accepted all the same")
        for _ in range(5):
            before = len(jobs)
            for proxy in platform.servers.proxies("mongod"):
                proxy.cut()  # commands and responses in flight are lost
            until(lambda before=before: len(jobs) > before, LIMIT_SECONDS, "jobs to be accepted again")  # type: ignore[misc] # mypy infers no type for a lambda with a default
    for job_id in jobs:
        assert user.finished(job_id)["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.proves("F7", "G1", "G3")
def test_primary_stepdown_loses_nothing(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """A primary that steps down under load, for seconds without a successor, causes only a delay."""
    with load(platform, user) as jobs:
        before = len(jobs)
        with suppress(AutoReconnect):  # it may close the connection that asked for it
            platform.documents.client.admin.command("replSetStepDown", 3, force=True)
        platform.servers.wait_until_ready()
        until(lambda: len(jobs) > before, LIMIT_SECONDS, "jobs to be accepted again")
    for job_id in jobs:
        assert user.finished(job_id)["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F16", "G11")
def test_slow_database_expires_no_lease(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """With MongoDB half a second slower, scans complete, requests are answered in seconds, and no lease expires."""
    expired = platform.metric("job-orchestrator", "scanfleet_leases_expired_total")
    memory = platform.memory()
    try:
        for proxy in platform.servers.proxies("mongod"):
            proxy.delay(0.25)
        with platform.listeners() as servers:
            job_id = user.scan(platform.network(24), **STEADY)
            task = f"/api/v1/task/{job_id}"
            for path in ("/api/v1/task", "/api/v1/subnet", task, *(f"{task}/{view}" for view in VIEWS)):
                begun = monotonic()
                assert user.http.get(path).status_code == 200, path
                assert monotonic() - begun < SLOW_SECONDS, path
            assert user.finished(job_id)["status"]["status"] == "completed"
            assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    finally:
        for proxy in platform.servers.proxies("mongod"):
            proxy.heal()
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    after = platform.memory()
    for name in memory.keys() & after.keys():
        assert after[name][0] < memory[name][0] + GROWTH, name
    invariants.check()
