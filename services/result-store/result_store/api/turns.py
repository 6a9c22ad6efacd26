"""Limit how many answers each user has at once: a turn while an answer begins, a place for a download until it is sent."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Final

from fastapi import Depends, Request

from scanfleet.runtime.turns import Turns
from scanfleet.security.auth import Caller

DOWNLOADS: Final = 8  # per user; with the largest documents they take about 80 MB


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a replica."""

    turns: Turns = field(default_factory=Turns)
    downloads: Turns = field(default_factory=lambda: Turns(at_once=DOWNLOADS, in_all=sys.maxsize, wait_seconds=0.0))


@dataclass(frozen=True, slots=True)
class Turn:
    """The share of one answer in the limits of its user."""

    _limits: Limits
    _user_id: int
    _until_sent: AsyncExitStack

    def to_begin(self) -> AbstractAsyncContextManager[None]:
        """Wait for a turn, and hold it in the block. Its end does not depend on how fast the client reads.

        Raises:
            UnavailableError: none has become free in time.
        """
        return self._limits.turns.turn(self._user_id)

    async def download(self) -> None:
        """Take a place until the answer is sent. It is not waited for, since the answer holds a page of documents.

        Raises:
            UnavailableError: none is free.
        """
        await self._until_sent.enter_async_context(self._limits.downloads.turn(self._user_id))


async def _turn(caller: Caller, request: Request) -> AsyncIterator[Turn]:
    async with AsyncExitStack() as until_sent:
        yield Turn(request.app.state.limits, caller.user_id, until_sent)


ItsTurn = Annotated[Turn, Depends(_turn)]
