"""Workers with different faults at once beside a healthy one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import ClassVar, Final

import pytest

from local.wait import until
from scanfleet.contracts.messages import instance_of
from scanfleet.services import ORCHESTRATOR, WORKER
from tests.faults.conftest import Shared
from tests.faults.kit import LIMIT_SECONDS, REPLICAS, Platform, scanned

pytestmark = [pytest.mark.e2e, pytest.mark.long]

HEALTHY, FULL_DISK, CRASHING, MALFORMED, STOPPED, KILLED = (f"{WORKER}-{number}" for number in range(1, 7))
NMAPS: Final = {
    CRASHING: """#!/bin/sh\nnmap "$@" | sed '/<host /,$d'\nkill -SEGV $$\n""",
    MALFORMED: """#!/bin/sh\necho '<nmaprun><host></nmaprun>'\n""",
}
CAUSES: Final = {
    FULL_DISK: "cannot create a temporary folder for nmap",
    CRASHING: "nmap was killed by SIGSEGV",
    MALFORMED: "malformed nmap output",
}
WIDE: Final = {"ports": "8020-8119", "service_detection": False, "max_rate": 8_000}
"""A /24 with this policy is 16 chunks of three seconds, which may all run at once."""


class Fleet(Platform):
    """A platform with six workers."""

    replicas: ClassVar = {**REPLICAS, WORKER: 6}


@pytest.fixture
def fleet(shared: Shared[Platform]) -> Iterator[Shared[Fleet]]:
    with shared.replaced(Fleet) as found:
        yield found


@pytest.mark.proves("F2", "F8", "F25", "G3", "G4", "G16", "G17")
def test_workers_with_different_faults_do_not_affect_results(fleet: Shared[Fleet]) -> None:
    """Five workers with different faults beside a healthy one do not change a job's results, and logs and attempts name each."""
    platform, invariants = fleet.lend()
    user = platform.caller()
    with platform.listeners(), ExitStack() as faults:
        before = scanned(user, user.scan(platform.network(24), **WIDE))
        faults.enter_context(platform.no_disk(full=True))
        for name, program in NMAPS.items():
            faults.enter_context(platform.scans_by(program, name))
        job_id = user.scan(platform.network(24), **WIDE)
        for name, number in ((STOPPED, signal.SIGSTOP), (KILLED, signal.SIGKILL)):
            until(lambda: bool(platform.nmaps_of(name)), LIMIT_SECONDS, f"{name} to scan")  # noqa: B023 # called before the next turn
            platform.kill(name, number)
        faults.callback(platform.kill, STOPPED, signal.SIGCONT)
        after = scanned(user, job_id)
    assert after == before
    assert before[0]["answered"] == 256 * 100
    attempts = [each for chunk in platform.documents.chunks(job_id) for each in chunk["attempts"]]
    ends = {(instance_of(each["worker"]), each["how"]) for each in attempts}
    assert {end for end in ends if end[1] in {"failed", "expired"}} == {
        (CRASHING, "failed"),
        (MALFORMED, "failed"),
        (STOPPED, "expired"),
        (KILLED, "expired"),
    }
    assert (FULL_DISK, "released") in ends
    for name, cause in CAUSES.items():
        reports = [event for event in platform.log(name, "chunk_ended") if event["job_id"] == job_id]
        assert any(event["reason"].startswith(cause) for event in reports), name
    lost = [event for name in platform.names(ORCHESTRATOR) for event in platform.log(name, "lease_expired")]
    assert {instance_of(event["worker_id"]) for event in lost} == {STOPPED, KILLED}
    user.close()
    invariants.check()
