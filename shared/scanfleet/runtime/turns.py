"""Limit how many large answers are built or sent at once, since each holds a page of documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

from scanfleet.errors import UnavailableError

AT_ONCE: Final = 4  # per user; with the largest documents they take about 50 MB
IN_ALL: Final = 8
WAIT_SECONDS: Final = 10.0  # less than the 15 s of the gateway


class Turns:
    """The large answers that are being built or sent; further requests of a user, and of all users, wait in order.

    Args:
        at_once: maximum number per user.
        in_all: maximum number of all users.
        wait_seconds: time after which a waiting request fails.
    """

    def __init__(self, at_once: int = AT_ONCE, in_all: int = IN_ALL, wait_seconds: float = WAIT_SECONDS) -> None:
        self._at_once = at_once
        self._wait_seconds = wait_seconds
        self._of_all = asyncio.Semaphore(in_all)
        self._of_users: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, user_id: int) -> AsyncIterator[None]:
        """Wait for a turn of the user, and hold it.

        Raises:
            UnavailableError: none has become free in time.
        """
        of_user = self._of_users.setdefault(user_id, asyncio.Semaphore(self._at_once))
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await held.enter_async_context(of_user)
                    await held.enter_async_context(self._of_all)
            except TimeoutError:
                raise UnavailableError("too many requests of this kind are in progress; try again") from None
            yield
