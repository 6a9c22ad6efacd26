"""What a process stands on: its clock, its disk, the keys that it believes."""

from __future__ import annotations

from datetime import datetime, timedelta

import httpx
import pytest

from local.client import FINAL
from local.wait import until
from scanfleet.messages import ChunkScanned
from scanfleet.messages.topics import SCAN_PROGRESS
from scanfleet.testing.tokens import Issuer
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT, STEADY, TINY, Caller, Platform

pytestmark = pytest.mark.e2e


@pytest.mark.proves("F19", "G4")
def test_clocks_that_are_two_hours_off(platform: Platform, invariants: Invariants) -> None:
    """A worker two hours fast and a gateway two hours slow: no lease ends early, and times are those of the others."""
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
        datetime.fromisoformat(said.headers["ce_time"])
        for said in platform.said(SCAN_PROGRESS, ChunkScanned)
        if isinstance(said.message, ChunkScanned) and said.message.job_id == job_id
    ]
    assert min(times) > began + hour  # so its clock was off
    assert platform.metric("job-orchestrator", "scanfleet_leases_expired_total") == expired
    assert {chunk["failures"] for chunk in platform.chunks(job_id)} == {0}
    slow.close()
    invariants.check()


@pytest.mark.proves("F19", "G14")
def test_a_token_from_the_future(platform: Platform) -> None:
    """To a gateway two hours slow a token made now is from the future: 401, with no way around its own clock."""
    now = platform.keys.issuer.token(7)
    for gateway, status in (("api-gateway-1", 200), ("api-gateway-2", 401)):
        caller = platform.caller(gateway=gateway, token=now)
        assert caller.http.get("/api/v1/task").status_code == status
        caller.close()


@pytest.mark.proves("F21", "G1")
@pytest.mark.parametrize("trouble", ["gone", "full"])
def test_job_of_a_lone_worker_without_disk_completes_once_there_is_room(
    platform: Platform, user: Caller, invariants: Invariants, trouble: str
) -> None:
    """Without a place for temporary files a worker is unready and stays up, its job waits, and completes when there is one."""
    platform.stack.stop("scanner-worker-1")
    try:
        until(lambda: platform.ready("scanner-worker-2"), LIMIT, "the second worker to be ready")
        assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
        pid = platform.pid("scanner-worker-2")
        with platform.no_disk(full=trouble == "full"):
            job_id = user.scan(platform.network(30), **TINY)
            until(lambda: not platform.ready("scanner-worker-2"), LIMIT, "the second worker to exclude itself")
            platform.wait(5)  # many attempts of a worker that goes on taking chunks
            assert user.status(job_id) not in FINAL
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {chunk["failures"] for chunk in platform.chunks(job_id)} == {0}
        assert platform.ready("scanner-worker-2")
        assert platform.pid("scanner-worker-2") == pid
    finally:
        platform.stack.start("scanner-worker-1")
    invariants.check()


@pytest.mark.proves("F25", "G17")
def test_worker_without_disk_beside_a_healthy_one_changes_no_result(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """Of two workers one cannot start nmap: the job's results and ledger are those of two healthy ones, and no chunk has a failure."""
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


@pytest.mark.proves("F23", "G14")
def test_keys_rotate_and_their_endpoint_goes_away(platform: Platform) -> None:
    """Known keys work while the endpoint is away, unknown ones are 401, and a new one is accepted when it is back."""
    keys, old = platform.keys, platform.keys.issuer
    caller = platform.caller(7)

    def status(token: str) -> int:
        return caller.http.get("/api/v1/task", headers={"Authorization": f"Bearer {token}"}).status_code

    before, new = platform.token(7), Issuer("key-2")
    assert status(before) == httpx.codes.OK
    keys.away = True
    keys.issuer = new
    try:
        after = platform.token(7)
        assert status(before) == httpx.codes.OK
        assert status(after) == httpx.codes.UNAUTHORIZED
        keys.away = False
        until(lambda: status(after) == httpx.codes.OK, 10, "the new key to be accepted")
        assert status(before) == httpx.codes.UNAUTHORIZED
    finally:
        keys.away, keys.issuer = False, old
    until(lambda: status(before) == httpx.codes.OK, 10, "the old key to be back")
    caller.close()
