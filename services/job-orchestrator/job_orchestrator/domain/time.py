"""Platform time: the database's clock, identical on every machine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from scanfleet.errors import DependencyError

JUMP: Final = timedelta(hours=1)  # far above the difference between the clocks of a database's machines
_STEP: Final = timedelta(minutes=1)  # far above the time that a read takes


class PlatformTime:
    """The database's time, advanced by the local monotonic clock; accurate to one round trip.

    Args:
        read: reads the time of the database.
        monotonic: returns seconds of a monotonic clock.

    Attributes:
        monotonic: for intervals within this process.
        jump: the last change of the database's clock by more than `JUMP`, against the monotonic clock; None if there was none.
        stepped_at: the time after its last change by more than a minute; None if there was none. Intervals from earlier times
            contain the change.
    """

    def __init__(
        self, read: Callable[[], Awaitable[datetime]], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self.monotonic = monotonic
        self._read_at: float | None = None
        self._then: datetime | None = None
        self.jump: timedelta | None = None
        self.stepped_at: datetime | None = None

    async def refresh(self) -> None:
        """Read the database's time; called about once a second.

        Raises:
            DependencyError: the database is unavailable; the time continues from the last answer.
        """
        asked = self.monotonic()
        self._set(await self._read(), asked)

    def now(self) -> datetime:
        """Return the time in UTC, with MongoDB's resolution of milliseconds.

        Raises:
            DependencyError: the database's time was never read.
        """
        if self._then is None or self._read_at is None:
            raise DependencyError("the database's time has not been read yet")
        now = self._then + timedelta(seconds=self.monotonic() - self._read_at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)

    def _set(self, then: datetime, asked: float) -> None:
        if self._then is not None and self._read_at is not None:
            jump = then - self._then - timedelta(seconds=asked - self._read_at)
            if abs(jump) > JUMP:
                self.jump = jump
            if abs(jump) > _STEP:
                self.stepped_at = then
        self._then, self._read_at = then, asked
