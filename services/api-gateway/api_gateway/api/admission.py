"""How much one user may ask, so that nobody's requests cost others theirs.

A user is who the token says, never an address or a header: another token or another address is no other user, and whoever
has no good token uses up nobody's share.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.types import Receive, Scope, Send

from api_gateway.settings import Settings
from scanfleet.auth import Guarded, Principal
from scanfleet.errors import Rule, TooManyRequestsError, UnavailableError

_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Admission:
    """Counts what each user asks of this replica: requests a minute, and requests at once."""

    def __init__(self, settings: Settings) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._reads = RateLimitItemPerMinute(settings.reads_per_minute, namespace="reads")
        self._writes = RateLimitItemPerMinute(settings.writes_per_minute, namespace="writes")
        self._at_once_per_user = settings.requests_at_once_per_user
        self._at_once = settings.requests_at_once
        self._running: Counter[int] = Counter()

    @asynccontextmanager
    async def admit(self, user_id: int, method: str) -> AsyncIterator[None]:
        """Hold one of the user's places for the length of the block.

        Raises:
            TooManyRequestsError: the user has none left, or has asked too much in the last minute.
            UnavailableError: all users together have none left.
        """
        await self._count(user_id, self._reads if method in _READS else self._writes)
        if self._running[user_id] >= self._at_once_per_user:
            raise TooManyRequestsError("too many requests of yours are under way", rule=Rule.CONCURRENCY)
        if self._running.total() >= self._at_once:
            raise UnavailableError("too many requests are under way; try again")
        self._running[user_id] += 1
        try:
            yield
        finally:
            self._running[user_id] -= 1
            if not self._running[user_id]:
                del self._running[user_id]

    async def _count(self, user_id: int, limit: RateLimitItemPerMinute) -> None:
        if not await self._limiter.hit(limit, str(user_id)):
            free_at, _ = await self._limiter.get_window_stats(limit, str(user_id))
            raise TooManyRequestsError(
                f"more than {limit.amount} {limit.namespace} a minute",
                retry_after=max(1, math.ceil(free_at - time.time())),
                rule=Rule.RATE,
            )


class Route(Guarded):
    """A route of the public API: it answers a good token within its user's limits."""

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = cast(Principal, scope["caller"])
        admission = cast(Admission, scope["app"].state.admission)
        async with admission.admit(caller.user_id, scope["method"]):
            await super().serve(scope, receive, send)
