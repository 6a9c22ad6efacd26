"""Limit the requests of each user, so that one user's requests do not delay another's.

Requests are counted by the user in the token, not by token, address or header. Requests without a valid token do not count
against any user.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import ClassVar, Final, cast

from fastapi import Request
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from api_gateway.settings import Settings
from scanfleet.contracts import rest
from scanfleet.contracts.messages.fields import is_id
from scanfleet.errors import BadRequestError, Rule, TooManyRequestsError, UnavailableError
from scanfleet.security.auth import AuthenticatedRoute, Principal

_WITH_BODY: Final = frozenset({"POST", "PUT"})
_MAX_ERROR_CHARS: Final = 200  # an error may contain a part of the request
_JSON: Final = "application/json"
_WINDOW_SECONDS: Final = 60  # window of every rate limit


class Places:
    """Concurrent requests of one kind, by user and in total."""

    def __init__(self, kind: str, per_user: int, total: int) -> None:
        self._kind = kind
        self._per_user = per_user
        self._total = total
        self._taken: Counter[int] = Counter()

    def left(self, user_id: int) -> rest.PlacesLeft:
        """Return how many more places the user may take."""
        return rest.PlacesLeft(limit=self._per_user, left=max(0, self._per_user - self._taken[user_id]))

    @asynccontextmanager
    async def take(self, user_id: int) -> AsyncIterator[None]:
        """Hold one of the user's places for the length of the block.

        Raises:
            TooManyRequestsError: the user has none left.
            UnavailableError: all users together have none left.
        """
        if self._taken[user_id] >= self._per_user:
            raise TooManyRequestsError(
                f"{self._per_user} of your {self._kind} are in progress, which is the limit; wait until one has ended",
                rule=Rule.CONCURRENCY,
            )
        if self._taken.total() >= self._total:
            raise UnavailableError(
                f"{self._total} {self._kind} are in progress, which is the limit of this replica; try again"
            )
        self._taken[user_id] += 1
        try:
            yield
        finally:
            self._taken[user_id] -= 1
            if not self._taken[user_id]:
                del self._taken[user_id]


class Admission:
    """Counts the requests of each user at this replica: per minute, and concurrent ones.

    Cancels and event streams are counted separately, so that other requests do not delay a cancel, and open streams do not
    use up the concurrent requests.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._rates = {
            name: RateLimitItemPerMinute(amount, namespace=name)
            for name, amount in (
                ("reads", settings.reads_per_minute),
                ("writes", settings.writes_per_minute),
                ("cancels", settings.cancels_per_minute),
                ("sign-ins", settings.sign_ins_per_minute),
            )
        }
        self._places = {
            "requests": Places("requests", settings.requests_at_once_per_user, settings.requests_at_once),
            "cancels": Places("cancels", settings.cancels_at_once_per_user, settings.cancels_at_once),
            "streams": Places("event streams", settings.streams_at_once_per_user, settings.streams_at_once),
        }

    @asynccontextmanager
    async def admit(
        self, user_id: int, *, rate: str, lane: str, headers: list[tuple[bytes, bytes]]
    ) -> AsyncIterator[None]:
        """Count the request against `rate`, and hold one of the user's places in `lane` for the length of the block.

        Args:
            user_id: the user of the request.
            rate: `reads`, `writes` or `cancels`.
            lane: `requests`, `cancels` or `streams`.
            headers: of the answer; `RateLimit` and `RateLimit-Policy` are added, whatever the answer will be.

        Raises:
            TooManyRequestsError: the user has no place left, or has exceeded the rate limit.
            UnavailableError: all users together have no place left.
        """
        granted = await self._limiter.hit(self._rates[rate], str(user_id))
        quota = await self._quota(user_id, rate)
        headers += (
            (b"ratelimit-policy", f'"{rate}";q={quota.limit};w={_WINDOW_SECONDS}'.encode()),
            (b"ratelimit", f'"{rate}";r={quota.left};t={quota.reset}'.encode()),
        )
        if not granted:
            seconds = max(1, quota.reset)
            raise TooManyRequestsError(
                f"more than {quota.limit} {rate} a minute, which is the limit; try again in {seconds} s",
                retry_after=seconds,
                rule=Rule.RATE,
            )
        async with self._places[lane].take(user_id):
            yield

    async def admit_sign_in(self, source: str) -> None:
        """Count a redemption of a sign-in code, which costs the issuer work before it is known who signs in.

        Args:
            source: an IPv4 address or an IPv6 /64 network, as `client_network` returns it.

        Raises:
            TooManyRequestsError: the source has exceeded the rate limit.
        """
        limit = self._rates["sign-ins"]
        if not await self._limiter.hit(limit, source):
            raise TooManyRequestsError(
                f"more than {limit.amount} sign-ins a minute from {source}, which is the limit; try again in a minute",
                rule=Rule.RATE,
            )

    async def left(self, user_id: int) -> rest.Limits:
        """Return the remaining limits of the user."""
        return rest.Limits(
            reads=await self._quota(user_id, "reads"),
            writes=await self._quota(user_id, "writes"),
            cancels=await self._quota(user_id, "cancels"),
            at_once=self._places["requests"].left(user_id),
        )

    async def _quota(self, user_id: int, rate: str) -> rest.Quota:
        limit = self._rates[rate]
        free_at, left = await self._limiter.get_window_stats(limit, str(user_id))
        return rest.Quota(limit=limit.amount, left=left, reset=max(0, math.ceil(free_at - time.time())))


class Route(AuthenticatedRoute):
    """A route of the public API, which requires a valid token and applies its user's limits."""

    lane: ClassVar[str] = "requests"

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        # Any other word in place of an id is part of the path of another route, or of none.
        ids = child.get("path_params", {}).values()
        # The pattern of a path also matches a path that ends with a newline.
        if scope["path"].endswith("\n") or not all(map(is_id, ids)):
            return Match.NONE, {}
        return match, child

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = cast(Principal, scope["caller"])
        admission = cast(Admission, scope["app"].state.admission)
        async with admission.admit(caller.user_id, rate=self._rate, lane=self.lane, headers=scope["answer_headers"]):
            self._refuse_unknown_queries(scope)
            self._refuse_other_content(scope)
            await super().serve(scope, receive, send)

    @property
    def _rate(self) -> str:
        return "reads" if self.methods == {"GET"} else "writes"

    def _refuse_unknown_queries(self, scope: Scope) -> None:
        """Refuse undocumented query parameters: a misspelled filter would otherwise select everything.

        Raises:
            BadRequestError: the route does not have one of the query parameters.
        """
        if not scope["query_string"]:
            return
        if unknown := Request(scope).query_params.keys() - self._queries:
            raise BadRequestError(f"unknown query parameters: {', '.join(sorted(unknown))}"[:_MAX_ERROR_CHARS])

    @cached_property
    def _queries(self) -> frozenset[str]:
        documented = [each for each in (self.openapi_extra or {}).get("parameters", ()) if each["in"] == "query"]
        lists = [f"{each['name']}[]" for each in documented if each["schema"].get("type") == "array"]
        return frozenset((*(each["name"] for each in documented), *lists))

    def _refuse_other_content(self, scope: Scope) -> None:
        """Refuse bodies of another content type; the framework would read them as text, and report a misleading error.

        Raises:
            BadRequestError: by its headers the body is not JSON, or not of the content type that the route accepts instead.
        """
        has_body = self.body_field is not None or "requestBody" in (self.openapi_extra or {})
        if scope["method"] not in _WITH_BODY or not has_body:
            return
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        kind = headers.get(b"content-type", "").partition(";")[0].strip()
        (taken,) = (self.openapi_extra or {}).get("requestBody", {}).get("content", {_JSON: {}})
        name = taken.rpartition("/")[2].upper()
        is_taken = kind == taken or (taken == _JSON and kind.startswith("application/") and kind.endswith("+json"))
        if not is_taken:
            raise BadRequestError(f'the body must be {name}, sent with the header "Content-Type: {taken}"')
        if headers.get(b"content-encoding", "identity") != "identity":
            raise BadRequestError(f'the body must be {name} as it is, without the header "Content-Encoding"')


class CancelRoute(Route):
    """A route that cancels jobs; the limits of other requests do not apply."""

    lane = "cancels"

    @property
    def _rate(self) -> str:
        return "cancels"


class StreamRoute(Route):
    """A route whose response is an event stream."""

    lane = "streams"
