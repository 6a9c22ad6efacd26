"""Signing in to the page at the issuer: OpenID Connect's code flow with PKCE, with the gateway as the client.

The state of a sign-in is in an encrypted cookie for ten minutes. Errors redirect to the page with a code; the
issuer's text is not shown, because any link to the callback can contain text.
"""

from __future__ import annotations

import hmac
import re
import time
from secrets import token_urlsafe
from typing import Any, Final, cast

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from api_gateway.api.admission import Admission
from api_gateway.api.session import Sessions, set_cookie
from api_gateway.api.state import State, StateDep
from api_gateway.auth import RefusedSignInError, SignIn
from scanfleet.errors import (
    BadRequestError,
    DependencyError,
    NotFoundError,
    Rule,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)
from scanfleet.runtime.http.audit import record_refusal
from scanfleet.runtime.http.proxies import client_network
from scanfleet.runtime.http.requests import source
from scanfleet.security.auth import Verifier

LOGIN_COOKIE: Final = "__Host-login"
LOGIN_SECONDS: Final = 600  # time to enter a password and a second factor

_HOME: Final = "/app/"
_NEXT: Final = re.compile(r"/app/[A-Za-z0-9/_.,:?&=%+~*-]*")
_MAX_NEXT_CHARS: Final = 2_000  # the cookie that keeps it has 4,096 bytes at most

router = APIRouter(prefix="/session", include_in_schema=False)
_log = structlog.stdlib.get_logger(__name__)


@router.get("/login", name="login")
async def login(request: Request, next: str = _HOME) -> Response:  # noqa: A002 # the name of the parameter
    """Send the user to the issuer."""
    sign_in, sessions = _parts(request)
    if _NEXT.fullmatch(next) is None or len(next) > _MAX_NEXT_CHARS or "//" in next:
        raise BadRequestError("next: must be a path of the page, which begins with /app/")
    state, nonce, verifier = (token_urlsafe(32) for _ in range(3))
    try:
        location = await sign_in.location(state, nonce, verifier)
    except DependencyError as error:
        _log.warning("dependency_unavailable", dependency="issuer", error=str(error))
        return _failed("unavailable", next)
    until = time.time() + LOGIN_SECONDS
    kept = sessions.seal({"state": state, "nonce": nonce, "verifier": verifier, "next": next, "until": until})
    cookie = set_cookie(LOGIN_COOKIE, kept, max_age=LOGIN_SECONDS, same_site="Lax")  # the way back is from another site
    return RedirectResponse(location, 302, {"Set-Cookie": cookie, "Cache-Control": "no-store"})


@router.get("/callback", name="create_session")
async def callback(request: Request, state: StateDep) -> Response:
    """Handle the issuer's redirect, and begin a session."""
    sign_in, sessions = _parts(request)
    try:
        kept = _kept(request, sessions)
    except RefusedSignInError as error:  # the cookie stays: it may be of a sign-in in another tab
        return _refused(request, "refused", str(error), _HOME)
    try:
        cookie = await _begin(request, state, sign_in, sessions, kept)
    except (DependencyError, UnavailableError) as error:
        _log.warning("dependency_unavailable", dependency="issuer", error=str(error))
        answer = _failed("unavailable", kept["next"])
    except RefusedSignInError as error:
        answer = _refused(request, "refused", str(error), kept["next"])
    except TooManyRequestsError as error:
        answer = _refused(request, "limit", error.message, kept["next"], rule=Rule.RATE)
    except BadRequestError as error:  # no session can hold the token
        answer = _refused(request, "large", error.message, kept["next"])
    except UnauthorizedError as error:  # the issuer's access token is not one that this gateway accepts
        answer = _refused(request, "token", error.reason or error.message, kept["next"])
    else:
        answer = RedirectResponse(kept["next"], 303, {"Set-Cookie": cookie, "Cache-Control": "no-store"})
    answer.headers.append("Set-Cookie", set_cookie(LOGIN_COOKIE, "", max_age=0, same_site="Lax"))
    return answer


def _kept(request: Request, sessions: Sessions) -> dict[str, Any]:
    """Return the state that `login` stored in this browser for this sign-in.

    Raises:
        RefusedSignInError: the request does not belong to the latest sign-in of this browser.
    """
    kept = sessions.unseal(request.cookies.get(LOGIN_COOKIE, ""))
    if kept is None or kept.get("until", 0) < time.time():
        raise RefusedSignInError("this browser has no sign-in in progress")
    if not hmac.compare_digest(request.query_params.get("state", "").encode(), kept["state"].encode()):
        raise RefusedSignInError("state is not of this sign-in")
    return kept


async def _begin(request: Request, state: State, sign_in: SignIn, sessions: Sessions, kept: dict[str, Any]) -> str:
    """Exchange the code for tokens and record the session; return its cookie.

    Raises:
        RefusedSignInError: the issuer has refused the user or the code.
        UnauthorizedError: its access token is not valid here.
        BadRequestError: its access token is too large for a session.
        TooManyRequestsError: the client's network has exceeded the rate limit of sign-ins.
        DependencyError, UnavailableError: a dependency is unavailable.
    """
    query = request.query_params
    if "error" in query or "code" not in query:
        raise RefusedSignInError("the issuer has not signed the user in")
    await cast(Admission, request.app.state.admission).admit_sign_in(client_network(source(request)))
    tokens = await sign_in.redeem(query["code"], kept["verifier"], kept["nonce"])
    caller = await cast(Verifier, request.app.state.verifier).verify(tokens.access)
    request.scope["caller"] = caller
    cookie = sessions.cookie(tokens.access, caller.expires_at, refresh=tokens.refresh)
    await state.orchestrator.record_session(state.orchestrator.identity(request), "create")
    return cookie


def _refused(request: Request, why: str, reason: str, next_: str, rule: Rule = Rule.TOKEN) -> Response:
    record_refusal(request, rule, reason=reason)
    return _failed(why, next_)


def _failed(why: str, next_: str) -> Response:
    """Redirect to the origin of the sign-in; the page shows the message of the code `why`."""
    location = f"{next_}{'&' if '?' in next_ else '?'}sign_in={why}"
    return RedirectResponse(location, 303, {"Cache-Control": "no-store"})


def _parts(request: Request) -> tuple[SignIn, Sessions]:
    sign_in: SignIn | None = request.app.state.sign_in
    sessions: Sessions | None = request.app.state.sessions
    if sign_in is None or sessions is None:
        raise NotFoundError(
            "sign-in at the issuer is off: an operator must set SCANFLEET_SESSION_KEYS_FILE, "
            "SCANFLEET_PUBLIC_URL and SCANFLEET_OIDC_CLIENT_ID"
        )
    return sign_in, sessions
