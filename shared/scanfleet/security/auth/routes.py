"""Routes that require a valid token."""

from __future__ import annotations

from typing import Annotated, Final, Protocol, cast

import structlog
from fastapi import APIRouter, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.types import Receive, Scope, Send

from scanfleet.errors import UnauthorizedError
from scanfleet.runtime.http.probes import readiness
from scanfleet.security.auth.principal import Principal
from scanfleet.security.auth.verifier import Verifier

_bearer: Final = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    bearerFormat="JWT",
    description="A JWT of the configured issuer; the administrator's role makes its user an administrator.",
)


class AuthenticatedRoute(APIRoute):
    """A route that requires a user's valid token, and verifies it before it reads the rest of the request.

    The framework reads the body before it resolves dependencies, so a caller without a token would get validation
    errors.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in (self.methods or ()):
            scope["caller"] = caller = await self.authenticate(Request(scope))
            if caller.token_hash:
                structlog.contextvars.bind_contextvars(token_hash=caller.token_hash)  # for the access log line
            await self.serve(scope, receive, send)
        else:
            await super().handle(scope, receive, send)  # the response is 405, with or without a token

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request of `scope["caller"]` until the response ends; a subclass may refuse it."""
        await super().handle(scope, receive, send)

    async def authenticate(self, request: Request) -> Principal:
        """Return the caller.

        Raises:
            UnauthorizedError: there is no token, or it is refused.
            UnavailableError: tokens cannot be verified now.
        """
        caller = await authenticate(request)
        if not caller.user_id:
            raise UnauthorizedError("the token is not valid", reason="sub is not a user")
        return caller


class Sessions(Protocol):
    """Browser sessions: a token in a cookie, for requests that carry no `Authorization` header."""

    def token(self, request: Request) -> str | None:
        """Return the token in the request's cookie; None if there is no cookie.

        Raises:
            UnauthorizedError: the cookie is not valid, or another site may have made the request.
        """


async def authenticate(request: Request) -> Principal:
    """Return the caller of any kind; raises the same errors as `AuthenticatedRoute.authenticate`."""
    token = await bearer_token(request)
    if token is None:
        sessions: Sessions | None = getattr(request.app.state, "sessions", None)  # only the gateway has them
        token = sessions.token(request) if sessions else None
    if token is None:
        raise UnauthorizedError("a bearer token is required", reason="token is missing")
    return await cast(Verifier, request.app.state.verifier).verify(token)


async def bearer_token(request: Request) -> str | None:
    """Return the token in the `Authorization` header; None if there is none."""
    credentials = await _bearer(request)
    return credentials.credentials if credentials else None


class GatewayRoute(AuthenticatedRoute):
    """A route for requests of the gateway itself, not on behalf of a user."""

    async def authenticate(self, request: Request) -> Principal:
        """See `AuthenticatedRoute`."""
        caller = await authenticate(request)
        if caller.user_id:
            raise UnauthorizedError("the token is not valid", reason="sub is a user")
        return caller


for_gateway = APIRouter(prefix="/internal", route_class=GatewayRoute)
"""Readiness for the gateway on the API port, since it may not reach the probe port."""


@for_gateway.get("/ready")
async def _ready(request: Request) -> Response:
    return await readiness(request)


class _CallerScheme(SecurityBase):
    """Declares the security scheme of an `AuthenticatedRoute` route in the OpenAPI document, and injects the caller."""

    model = _bearer.model
    scheme_name = _bearer.scheme_name

    async def __call__(self, request: Request) -> Principal:
        return cast(Principal, request.scope["caller"])


Caller = Annotated[Principal, Security(_CallerScheme())]
"""The authenticated caller of an `AuthenticatedRoute` route; there is none on any other route."""
