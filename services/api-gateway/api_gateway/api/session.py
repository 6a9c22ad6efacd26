"""Browser sessions: the user's token in an encrypted cookie that scripts cannot read.

The gateway keeps nothing but its keys. A cookie is sent by the browser with every request to this host, whichever site made
it, so a request is accepted by its cookie alone only if the browser's headers show that the page made it.
"""

from __future__ import annotations

import json
import time
import zlib
from http.cookies import SimpleCookie
from typing import Any, Final, Self, cast

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import errors
from api_gateway.api.state import StateDep
from api_gateway.auth import RefusedSignInError, SignIn
from api_gateway.settings import Settings
from scanfleet.contracts import rest
from scanfleet.errors import BadRequestError, NotFoundError, UnauthorizedError, UnavailableError
from scanfleet.security.auth import Caller, Verifier, bearer_token

COOKIE: Final = "__Host-session"  # the prefix binds it to this host, path / and https
MAX_COOKIE_BYTES: Final = 3_800  # browsers drop a cookie above 4,096 bytes, its name and attributes included

_SAFE: Final = frozenset({"GET", "HEAD"})

router = APIRouter(prefix="/api/v1/session", tags=["session"], route_class=Route)


class Sessions:
    """Creates and reads session cookies.

    Args:
        keys: Fernet keys, the newest first: it encrypts, all decrypt.
        origin: the only `Origin` of the page; by default that of the request's `Host` header.

    Raises:
        ValueError: a key is malformed, or there is none.
    """

    def __init__(self, keys: list[str], origin: str | None = None) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])
        self._origin = origin

    @classmethod
    def open(cls, settings: Settings) -> Self | None:
        """Return the sessions according to the settings; None if they are off.

        Raises:
            ValueError: the file holds no valid keys.
            OSError: it cannot be read.
        """
        if settings.session_keys_file is None:
            return None
        origin = str(settings.public_url).rstrip("/") if settings.public_url else None
        try:
            return cls(settings.session_keys_file.read_text(encoding="ascii").split(), origin)
        except ValueError as error:
            raise ValueError(
                f"{settings.session_keys_file} does not hold Fernet keys (32 bytes, URL-safe base64), one on a line"
            ) from error

    def cookie(self, token: str, expires_at: float, *, refresh: str | None = None) -> str:
        """Return the `Set-Cookie` header that begins or replaces a session.

        Args:
            token: the user's access token, verified.
            expires_at: when it ends, in Unix time; the cookie ends with it.
            refresh: the refresh token that came with it, left out if both do not fit.

        Raises:
            BadRequestError: the cookie is too large for browsers.
        """
        value = self.seal({"access": token} | ({"refresh": refresh} if refresh else {}))
        if refresh and len(value) > MAX_COOKIE_BYTES:
            value = self.seal({"access": token})
        if len(value) > MAX_COOKIE_BYTES:
            raise BadRequestError(
                f"the issuer's token is too large for a session ({len(value)} bytes encrypted, at most {MAX_COOKIE_BYTES})"
            )
        return set_cookie(COOKIE, value, max_age=max(1, int(expires_at - time.time())))

    def token(self, request: Request) -> str | None:
        """See `scanfleet.security.auth.Sessions`."""
        value = request.cookies.get(COOKIE)
        if value is None:
            return None
        if request.headers.get("sec-fetch-site") != "same-origin":
            raise UnauthorizedError("a bearer token is required", reason="session cookie of a request by another site")
        if request.method not in _SAFE and not self._is_own(request):
            raise UnauthorizedError("a bearer token is required", reason="session cookie with a foreign Origin")
        opened = self.unseal(value)
        if opened is None or "access" not in opened:
            raise UnauthorizedError("the session is not valid; sign in again", reason="session is malformed")
        return str(opened["access"])

    def refresh_token(self, request: Request) -> str | None:
        """Return the refresh token in the cookie of a request whose `token` was accepted; None if it has none."""
        return (self.unseal(request.cookies.get(COOKIE, "")) or {}).get("refresh")

    def seal(self, content: dict[str, Any]) -> str:
        """Return `content` encrypted with the newest key."""
        return self._fernet.encrypt(zlib.compress(json.dumps(content).encode(), level=9)).decode()

    def unseal(self, text: str) -> dict[str, Any] | None:
        """Return the content of a value of `seal`; None for any other value."""
        try:
            opened: dict[str, Any] = json.loads(zlib.decompress(self._fernet.decrypt(text)))
        except (InvalidToken, ValueError):  # ValueError: not ASCII; only values of `seal` can be decrypted
            return None
        return opened

    def _is_own(self, request: Request) -> bool:
        origin = request.headers.get("origin", "")
        if self._origin is not None:
            return origin == self._origin
        scheme, _, host = origin.partition("://")
        return scheme in {"http", "https"} and host == request.headers.get("host")


@router.post("", status_code=204, response_class=Response, responses=errors(400, 404))
async def create_session(request: Request, caller: Caller, state: StateDep) -> Response:
    """Begin a browser session with the bearer token of this request; it ends when the token does."""
    sessions = _sessions(request)
    token = await bearer_token(request)
    if token is None:  # it is a session already
        raise UnauthorizedError("a bearer token is required", reason="token is missing")
    cookie = sessions.cookie(token, caller.expires_at)
    await state.orchestrator.record_session(state.orchestrator.identity(request), "create")
    return Response(status_code=204, headers={"Set-Cookie": cookie, "Cache-Control": "no-store"})


@router.delete("", responses=errors(404))
async def end_session(request: Request, response: Response, _caller: Caller, state: StateDep) -> rest.SessionEnded:
    """End the browser session."""
    _sessions(request)
    await state.orchestrator.record_session(state.orchestrator.identity(request), "end")
    response.headers["Set-Cookie"] = set_cookie(COOKIE, "", max_age=0)
    sign_in: SignIn | None = request.app.state.sign_in
    return rest.SessionEnded(logout_url=await sign_in.logout_url() if sign_in else None)


@router.post("/refresh", status_code=204, response_class=Response, responses=errors(400, 404))
async def refresh_session(request: Request, caller: Caller, state: StateDep) -> Response:
    """Replace the session's tokens by new ones of the issuer. Not concurrently: a refresh token may be valid only once."""
    sessions = _sessions(request)
    sign_in: SignIn | None = request.app.state.sign_in
    current, token = sessions.token(request), sessions.refresh_token(request)
    if sign_in is None or current is None or token is None:
        raise BadRequestError("this session has no refresh token: it ends with its token")
    # Before the exchange, which may use up the refresh token: an error after it would lose the new one.
    await state.orchestrator.record_session(state.orchestrator.identity(request), "refresh")
    try:
        tokens = await sign_in.refresh(token)
    except RefusedSignInError as error:
        raise UnauthorizedError("the issuer has ended the session; sign in again", reason=str(error)) from error
    try:
        verified = await cast(Verifier, request.app.state.verifier).verify(tokens.access)
    except (UnavailableError, UnauthorizedError):  # the latter also of a key that the verifier has not fetched yet
        # The exchange may have used up the previous refresh token.
        kept = sessions.cookie(current, caller.expires_at, refresh=tokens.refresh or token)
        request.scope["answer_headers"].append((b"set-cookie", kept.encode()))
        raise
    if verified.user_id != caller.user_id:
        raise UnauthorizedError("the session is not valid; sign in again", reason="refreshed token is of another user")
    cookie = sessions.cookie(tokens.access, verified.expires_at, refresh=tokens.refresh or token)
    return Response(status_code=204, headers={"Set-Cookie": cookie, "Cache-Control": "no-store"})


def _sessions(request: Request) -> Sessions:
    sessions: Sessions | None = request.app.state.sessions
    if sessions is None:
        raise NotFoundError("browser sessions are disabled; an operator must set SCANFLEET_SESSION_KEYS_FILE")
    return sessions


def set_cookie(name: str, value: str, *, max_age: int, same_site: str = "Strict") -> str:
    """Return a `Set-Cookie` header; a `max_age` of 0 removes the cookie."""
    cookie: SimpleCookie = SimpleCookie({name: value})
    cookie[name] |= {"path": "/", "secure": True, "httponly": True, "samesite": same_site, "max-age": max_age}
    return cookie[name].OutputString()
