"""The platform's time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from job_orchestrator.domain.time import PlatformTime
from scanfleet.errors import DependencyError

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clocks:
    """A database's clock and a monotonic one.

    Attributes:
        database: what the database answers; None while it is unavailable.
        monotonic: seconds.
        trip: seconds that an answer takes.
    """

    def __init__(self) -> None:
        self.database: datetime | None = NOON
        self.monotonic = 50.0
        self.trip = 0.0

    async def read(self) -> datetime:
        if self.database is None:
            raise DependencyError("the database is unavailable")
        self.monotonic += self.trip
        return self.database

    def clock(self) -> PlatformTime:
        return PlatformTime(self.read, lambda: self.monotonic)


def test_time_is_unknown_before_the_first_answer() -> None:
    """Without any answer of the database there is no time, whatever the machine's own clock shows."""
    with pytest.raises(DependencyError, match="not been read yet"):
        Clocks().clock().now()


async def test_time_is_the_databases_carried_on_by_the_monotonic_clock() -> None:
    """Between two answers the time advances with the monotonic clock, in milliseconds; the next answer corrects it."""
    clocks = Clocks()
    clock = clocks.clock()
    await clock.refresh()
    assert clock.now() == NOON
    clocks.monotonic += 1.2345678
    assert clock.now() == NOON + timedelta(milliseconds=1_234)
    clocks.database = NOON + timedelta(seconds=9)
    await clock.refresh()
    assert clock.now() == NOON + timedelta(seconds=9)


async def test_time_is_accurate_to_one_round_trip() -> None:
    """A slow answer makes the time late or early by at most the round trip."""
    clocks = Clocks()
    clocks.trip = 0.5
    clock = clocks.clock()
    await clock.refresh()
    assert timedelta(0) <= clock.now() - NOON <= timedelta(seconds=0.5)


async def test_time_continues_while_the_database_is_unavailable() -> None:
    """A refresh that fails raises, and the last answer still counts."""
    clocks = Clocks()
    clock = clocks.clock()
    await clock.refresh()
    clocks.database = None
    clocks.monotonic += 60.0
    with pytest.raises(DependencyError):
        await clock.refresh()
    assert clock.now() == NOON + timedelta(seconds=60)


@pytest.mark.parametrize(
    ("passed", "shown", "jump", "step"),
    [
        (60.0, timedelta(seconds=60), None, False),
        (60.0, timedelta(seconds=100), None, False),
        (7_200.0, timedelta(hours=2, minutes=50), None, True),
        (1.0, timedelta(days=1, seconds=1), timedelta(days=1), True),
        (7_200.0, timedelta(0), timedelta(hours=-2), True),
    ],
)
async def test_time_reports_a_jump_of_the_database_clock(
    *, passed: float, shown: timedelta, jump: timedelta | None, step: bool
) -> None:
    """A change of the database's clock by more than an hour, against the monotonic clock, is a jump, and by a minute a step."""
    clocks = Clocks()
    clock = clocks.clock()
    await clock.refresh()
    assert clock.jump is None
    clocks.monotonic += passed
    clocks.database = NOON + shown
    await clock.refresh()
    assert clock.jump == jump
    assert clock.stepped_at == (clock.now() if step else None)
