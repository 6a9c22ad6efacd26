"""The platform's time: the database's clock, whichever machine asks."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from scanfleet.errors import DependencyError


class PlatformTime:
    """The database's time, carried on by our own monotonic clock; wrong by one round trip at most.

    Args:
        read: asks the database for its time.
        monotonic: seconds.
    """

    def __init__(
        self, read: Callable[[], Awaitable[datetime]], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._monotonic = monotonic
        self._read_at: float | None = None
        self._then: datetime | None = None

    async def refresh(self) -> None:
        """Ask the database; called about once a second.

        Raises:
            DependencyError: the database is unavailable; the time runs on from the last answer.
        """
        asked = self._monotonic()
        self._then = await self._read()
        self._read_at = asked

    def now(self) -> datetime:
        """UTC, in the milliseconds that MongoDB keeps.

        Raises:
            DependencyError: the database was never asked.
        """
        if self._then is None or self._read_at is None:
            raise DependencyError("the database's time is not known yet")
        now = self._then + timedelta(seconds=self._monotonic() - self._read_at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)
