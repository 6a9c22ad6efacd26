"""What the gateway must know of a caller besides the token: the user id that was assigned, and whether the token is revoked."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final

import structlog

from scanfleet.errors import DependencyError, UnavailableError
from scanfleet.rest import Revoked

REFRESH_S: Final = 2.0
ASK_LIMIT_S: Final = 5.0
MAX_STALE_S: Final = 60.0  # a list that is older is no list: what is revoked meanwhile would not be known
MAX_USERS: Final = 10_000  # whose ids are kept: two megabytes

_log = structlog.get_logger()


class UserIds:
    """User ids by issuer and subject, which never change once they are assigned.

    Args:
        ask: the service that assigns them.
    """

    def __init__(self, ask: Callable[[str, str], Awaitable[int]]) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], int] = {}

    async def user_id(self, issuer: str, subject: str) -> int:
        """See `scanfleet.auth.Users`."""
        user_id = self._known.get((issuer, subject))
        if user_id is None:
            user_id = await self._ask(issuer, subject)
            if len(self._known) >= MAX_USERS:
                del self._known[next(iter(self._known))]
            self._known[issuer, subject] = user_id
        return user_id


class Revocations:
    """The list of revoked tokens as it was a moment ago.

    Args:
        ask: the service that keeps the list.
        clock: in seconds.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[Sequence[Revoked]]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._read_at = float("-inf")
        self._token_ids: frozenset[str] = frozenset()
        self._by_subject: dict[str, float] = {}
        self._by_user: dict[int, float] = {}

    async def refresh(self) -> None:
        """Read the list; if that fails the one before stays for `MAX_STALE_S`."""
        asked_at = self._clock()
        try:
            async with asyncio.timeout(ASK_LIMIT_S):
                revoked = await self._ask()
        except (DependencyError, TimeoutError) as error:
            _log.warning("the revocations could not be read", error=repr(error))
            return
        by_subject: dict[str, float] = defaultdict(float)
        by_user: dict[int, float] = defaultdict(float)
        for each in revoked:
            if each.sub is not None:
                by_subject[each.sub] = max(by_subject[each.sub], _seconds(each.issued_before))
            if each.user_id is not None:
                by_user[each.user_id] = max(by_user[each.user_id], _seconds(each.issued_before))
        self._token_ids = frozenset(each.jti for each in revoked if each.jti is not None)
        self._by_subject, self._by_user = by_subject, by_user
        self._read_at = asked_at

    async def check(self) -> None:
        """Return if the list was read once.

        Raises:
            DependencyError: it was not.
        """
        if self._read_at == float("-inf"):
            raise DependencyError("the revocations were not read yet")

    def revokes(self, *, token_id: str, subject: str, user_id: int, issued_at: float) -> bool:
        """See `scanfleet.auth.Revoked`."""
        if self._clock() - self._read_at > MAX_STALE_S:
            raise UnavailableError("the list of revoked tokens is unavailable; try again")
        return (
            (bool(token_id) and token_id in self._token_ids)
            or issued_at < self._by_subject.get(subject, 0)
            or issued_at < self._by_user.get(user_id, 0)
        )


def _seconds(time_: datetime | None) -> float:
    return time_.timestamp() if time_ is not None else float("inf")
