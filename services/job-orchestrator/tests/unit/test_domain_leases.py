"""Lease timers, which measure the time without a heartbeat at each observation."""

from __future__ import annotations

from job_orchestrator.domain.fairness import Held
from job_orchestrator.domain.leases import LeaseTimers
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import FencingToken

LEASE_SECONDS = 10.0


def held(id_: str, attempt: int = 1) -> Held:
    return Held(
        token=FencingToken(1, id_, attempt, "w-1"),
        user_id=7,
        partition=0,
        estimate=1.0,
        share=1.0,
        dispatched_at=THEN,
    )


FIRST, SECOND = held("1-0"), held("1-1")


def look_on(timers: LeaseTimers, start: float, seconds: int, *, reporting: bool = False) -> list[str]:
    """Look each second, and stop at the first that is overdue."""
    for second in range(1, seconds + 1):
        if reporting:
            timers.renew(FIRST.token)
        if late := timers.overdue([FIRST], start + second):
            return [each.token.chunk_id for each in late]
    return []


def test_silence_for_longer_than_the_lease_is_overdue() -> None:
    """A chunk without a report is overdue after the lease, and not before it."""
    timers = LeaseTimers(LEASE_SECONDS)
    assert timers.overdue([FIRST], 100.0) == []
    assert look_on(timers, 100.0, 10) == []
    assert look_on(timers, 110.0, 1) == ["1-0"]


def test_report_renews_the_lease() -> None:
    """A chunk with reports between checks is never overdue, and after its last report it has a whole lease."""
    timers = LeaseTimers(LEASE_SECONDS)
    assert look_on(timers, 0.0, 60, reporting=True) == []
    assert look_on(timers, 60.0, 10) == []
    assert look_on(timers, 70.0, 1) == ["1-0"]


def test_frozen_observer_expires_no_lease() -> None:
    """An hour between two checks adds a few seconds to the silence, not an hour."""
    timers = LeaseTimers(LEASE_SECONDS)
    timers.overdue([FIRST], 0.0)
    assert timers.overdue([FIRST], 3_600.0) == []
    assert look_on(timers, 3_600.0, 7) == []
    assert look_on(timers, 3_607.0, 1) == ["1-0"]


def test_lease_of_a_new_chunk_or_attempt_starts_at_zero() -> None:
    """A chunk that appears among silent ones, or under another attempt, has its whole lease."""
    timers = LeaseTimers(LEASE_SECONDS)
    look_on(timers, 0.0, 10)
    again = held("1-0", attempt=2)
    assert timers.overdue([again, SECOND], 12.0) == []
    assert [each.token.chunk_id for each in timers.overdue([FIRST], 13.0)] == []


def test_repeated_checks_at_one_time_add_no_silence() -> None:
    """Any number of checks at the same time count as one."""
    timers = LeaseTimers(LEASE_SECONDS)
    assert [timers.overdue([FIRST], 5.0) for _ in range(100)] == [[]] * 100


def test_chunks_are_overdue_independently() -> None:
    """The silence of each chunk is measured separately."""
    timers = LeaseTimers(LEASE_SECONDS)
    late: set[str] = set()
    for second in range(12):
        timers.renew(SECOND.token)
        late |= {each.token.chunk_id for each in timers.overdue([FIRST, SECOND], float(second))}
    assert late == {"1-0"}
