"""Routes that answer only to a good token."""

from __future__ import annotations

from typing import Annotated, Final, Protocol, cast

import structlog
from fastapi import Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.types import Receive, Scope, Send

from scanfleet.auth.principal import Principal
from scanfleet.auth.verifier import Verifier
from scanfleet.errors import UnauthorizedError

_bearer: Final = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    bearerFormat="JWT",
    description="A JWT of the configured issuer; one with the administrator's role is an administrator's.",
)


class Guarded(APIRoute):
    """A route that answers only to a user's good token, and reads nothing else of a request before that.

    The framework reads a body before it resolves a dependency: a caller without a token would learn what is wrong with it.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in (self.methods or ()):
            scope["caller"] = caller = await self.authenticate(Request(scope))
            if caller.token_hash:
                structlog.contextvars.bind_contextvars(token_hash=caller.token_hash)  # so that the access line names it
            await self.serve(scope, receive, send)
        else:
            await super().handle(scope, receive, send)  # answers 405, with or without a token

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request of `scope["caller"]`, to the end of the answer; a subclass may refuse it."""
        await super().handle(scope, receive, send)

    async def authenticate(self, request: Request) -> Principal:
        """The caller.

        Raises:
            UnauthorizedError: there is no token, or it is refused.
            UnavailableError: tokens cannot be judged now.
        """
        caller = await authenticate(request)
        if not caller.user_id:
            raise UnauthorizedError("the token is not valid", reason="sub is not a user")
        return caller


class Sessions(Protocol):
    """Browser sessions: a token in a cookie, for requests that carry no `Authorization` header."""

    def token(self, request: Request) -> str | None:
        """The token in the request's cookie; None if there is no cookie.

        Raises:
            UnauthorizedError: the cookie is not valid, or another site may have made the request.
        """


async def authenticate(request: Request) -> Principal:
    """The caller of any kind; raises as `Guarded.authenticate`."""
    token = await bearer_token(request)
    if token is None:
        sessions: Sessions | None = getattr(request.app.state, "sessions", None)  # only the gateway has them
        token = sessions.token(request) if sessions else None
    if token is None:
        raise UnauthorizedError("a bearer token is required", reason="token is missing")
    return await cast(Verifier, request.app.state.verifier).verify(token)


async def bearer_token(request: Request) -> str | None:
    """The token in the `Authorization` header; None if there is none."""
    credentials = await _bearer(request)
    return credentials.credentials if credentials else None


class GatewayRoute(Guarded):
    """A route for what the gateway asks for itself, in no user's name."""

    async def authenticate(self, request: Request) -> Principal:
        """See `Guarded`."""
        caller = await authenticate(request)
        if caller.user_id:
            raise UnauthorizedError("the token is not valid", reason="sub is a user")
        return caller


class _LetIn(SecurityBase):
    """What the OpenAPI document says of a `Guarded` route, and the caller that it has let in."""

    model = _bearer.model
    scheme_name = _bearer.scheme_name

    async def __call__(self, request: Request) -> Principal:
        return cast(Principal, request.scope["caller"])


Caller = Annotated[Principal, Security(_LetIn())]
"""The caller that a `Guarded` route has let in; there is none on any other route."""
