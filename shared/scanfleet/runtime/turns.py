"""Limit how many answers that read a whole job a user has at once, since each holds a page of documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

from scanfleet.errors import UnavailableError

AT_ONCE: Final = 4  # per user; with the largest documents they take about 30 MB
WAIT_SECONDS: Final = 10.0  # less than the 15 s of the gateway


class Turns:
    """The answers that are being built or sent, by user; further requests of a user wait in order."""

    def __init__(self, at_once: int = AT_ONCE, wait_seconds: float = WAIT_SECONDS) -> None:
        self._at_once = at_once
        self._wait_seconds = wait_seconds
        self._of_users: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, user_id: int) -> AsyncIterator[None]:
        """Wait for a turn of the user, and hold it.

        Raises:
            UnavailableError: none has become free in time.
        """
        turns = self._of_users.setdefault(user_id, asyncio.Semaphore(self._at_once))
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turns.acquire()
        except TimeoutError:
            raise UnavailableError(
                f"{self._at_once} of your requests that read a whole job are being answered; try again"
            ) from None
        try:
            yield
        finally:
            turns.release()
