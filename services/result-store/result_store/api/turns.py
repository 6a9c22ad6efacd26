"""Limit how many answers of a user are read from the store at once: each holds a page of hosts, and one of them decoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, cast
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from scanfleet.errors import UnavailableError
from scanfleet.security.auth import Caller

AT_ONCE: Final = 4  # per user; with the largest hosts they take about 100 MB
WAIT_SECONDS: Final = 10.0  # less than the 15 s of the gateway


class Turns:
    """The answers that are being read, by user; further requests of a user wait in order."""

    def __init__(self, wait_seconds: float = WAIT_SECONDS) -> None:
        self._wait_seconds = wait_seconds
        self._of_users: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    async def take(self, user_id: int) -> asyncio.Semaphore:
        """Wait for a turn of the user, and return what releases it.

        Raises:
            UnavailableError: none has become free in time.
        """
        turns = self._of_users.setdefault(user_id, asyncio.Semaphore(AT_ONCE))
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turns.acquire()
        except TimeoutError:
            raise UnavailableError(f"{AT_ONCE} of your requests for results are being answered; try again") from None
        return turns


async def _turn(caller: Caller, request: Request) -> AsyncIterator[None]:
    turn = await cast(Turns, request.app.state.turns).take(caller.user_id)
    try:
        yield  # to the end of the answer
    finally:
        turn.release()


TURN: Final = Depends(_turn)
"""Of a route that reads a whole job."""
