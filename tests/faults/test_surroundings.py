"""What a process stands on: its clock, its disk, the keys that it believes."""

from __future__ import annotations

from datetime import datetime, timedelta

import httpx
import pytest

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
def test_a_worker_without_a_temporary_folder(
    platform: Platform, user: Caller, invariants: Invariants, trouble: str
) -> None:
    """Without a place for temporary files a worker fails its chunks with a reason, stays up, and scans when there is one."""
    platform.stack.stop("scanner-worker-1")
    try:
        until(lambda: platform.ready("scanner-worker-2"), LIMIT, "the second worker to be ready")
        assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
        pid = platform.pid("scanner-worker-2")
        with platform.no_disk(full=trouble == "full"):
            job_id = user.scan(platform.network(30), **TINY)
            status = user.finished(job_id)["status"]
        assert status["status"] == "failed"
        assert user.ledger(job_id)["counts"]["lost"] == 4 * 20
        assert "nmap could not be started" in " ".join(chunk["reason"] for chunk in platform.chunks(job_id))
        assert user.finished(user.scan(platform.network(30), **TINY))["status"]["status"] == "completed"
        assert platform.pid("scanner-worker-2") == pid
    finally:
        platform.stack.start("scanner-worker-1")
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
