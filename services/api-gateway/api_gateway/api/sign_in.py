"""Signing in to the page at the issuer: OpenID Connect's code flow with PKCE, of which the gateway is the client.

What must be kept until the user returns is in an encrypted cookie of ten minutes. Errors lead back to the page, which says what
went wrong; the issuer's own words are not repeated, since whoever makes a link to the callback chooses them.
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

from api_gateway.api.session import Sessions, set_cookie
from api_gateway.api.state import Handed
from api_gateway.auth import RefusedSignInError, SignIn
from scanfleet.auth import Verifier
from scanfleet.errors import BadRequestError, DependencyError, NotFoundError, PublicError

LOGIN_COOKIE: Final = "__Host-login"
LOGIN_SECONDS: Final = 600  # to enter a password and a second factor

_NEXT: Final = re.compile(r"/app/[A-Za-z0-9/_.,:?&=%+~-]*")
_MAX_NEXT_CHARS: Final = 1_000

router = APIRouter(prefix="/session", include_in_schema=False)
_log = structlog.stdlib.get_logger(__name__)


@router.get("/login", name="login")
async def login(request: Request, next: str = "/app/") -> Response:  # noqa: A002 # the name of the parameter
    """Send the user to the issuer."""
    sign_in, sessions = _parts(request)
    if _NEXT.fullmatch(next) is None or len(next) > _MAX_NEXT_CHARS or "//" in next:
        raise BadRequestError("next: must be a path of the page, which begins with /app/")
    state, nonce, verifier = (token_urlsafe(32) for _ in range(3))
    try:
        location = await sign_in.location(state, nonce, verifier)
    except DependencyError as error:
        _log.warning("dependency away", error=str(error))
        return _failed("unavailable")
    until = time.time() + LOGIN_SECONDS
    kept = sessions.seal({"state": state, "nonce": nonce, "verifier": verifier, "next": next, "until": until})
    cookie = set_cookie(LOGIN_COOKIE, kept, max_age=LOGIN_SECONDS, same_site="Lax")  # the way back is from another site
    return RedirectResponse(location, 302, {"Set-Cookie": cookie, "Cache-Control": "no-store"})


@router.get("/callback", name="create_session")
async def callback(request: Request, state: Handed) -> Response:
    """Take the user back from the issuer, and begin a session."""
    sign_in, sessions = _parts(request)
    try:
        kept = _kept(request, sessions)
        tokens = await sign_in.redeem(request.query_params["code"], kept["verifier"], kept["nonce"])
        caller = await cast(Verifier, request.app.state.verifier).verify(tokens.access)
        request.scope["caller"] = caller
        cookie = sessions.cookie(tokens.access, caller.expires_at, refresh=tokens.refresh)
        await state.orchestrator.record_session(state.orchestrator.identity(request), "create")
    except RefusedSignInError as error:
        _log.warning("sign-in refused", reason=str(error))
        return _failed("refused")
    except DependencyError as error:
        _log.warning("dependency away", error=str(error))
        return _failed("unavailable")
    except PublicError as error:  # the issuer's access token is not one that this gateway accepts
        _log.warning("sign-in refused", reason=error.reason or error.message)
        return _failed("large" if isinstance(error, BadRequestError) else "token")
    answer = RedirectResponse(kept["next"], 303, {"Cache-Control": "no-store"})
    answer.raw_headers += [(b"set-cookie", each.encode()) for each in (cookie, _no_login())]
    return answer


def _kept(request: Request, sessions: Sessions) -> dict[str, Any]:
    """What `login` has kept in this browser, if the user comes back from there with a code.

    Raises:
        RefusedSignInError: the request does not belong to a sign-in of this browser, or the issuer has refused the user.
    """
    query = request.query_params
    kept = sessions.unseal(request.cookies.get(LOGIN_COOKIE, ""))
    if kept is None or kept.get("until", 0) < time.time():
        raise RefusedSignInError("there is no sign-in under way in this browser")
    if not hmac.compare_digest(query.get("state", "").encode(), kept["state"].encode()):
        raise RefusedSignInError("state is not of this sign-in")
    if "error" in query or "code" not in query:
        raise RefusedSignInError("the issuer has not signed the user in")
    return kept


def _failed(why: str) -> Response:
    return RedirectResponse(f"/app/?sign_in={why}", 303, {"Set-Cookie": _no_login(), "Cache-Control": "no-store"})


def _no_login() -> str:
    return set_cookie(LOGIN_COOKIE, "", max_age=0, same_site="Lax")


def _parts(request: Request) -> tuple[SignIn, Sessions]:
    sign_in: SignIn | None = request.app.state.sign_in
    sessions: Sessions | None = request.app.state.sessions
    if sign_in is None or sessions is None:
        raise NotFoundError(
            "sign-in at the issuer is off: whoever runs Scanfleet must set SCANFLEET_SESSION_KEYS_FILE, "
            "SCANFLEET_PUBLIC_URL and SCANFLEET_OIDC_CLIENT_ID"
        )
    return sign_in, sessions
