"""Look up user ids and revocations of callers, and get tokens from the issuer for browser sign-in."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Self, cast
from urllib.parse import urlencode

import httpx2
import structlog
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from pydantic import AfterValidator, BaseModel, ValidationError

from api_gateway.settings import Settings
from scanfleet.contracts.rest import Revoked
from scanfleet.errors import DependencyError, UnavailableError
from scanfleet.runtime.settings import is_authentic, read_secret

REFRESH_SECONDS: Final = 2.0
# Two queries and the interval between them are the 5 s in which a revocation takes effect.
ASK_LIMIT_SECONDS: Final = 1.5
REPORT_LIMIT_SECONDS: Final = 5.0
MAX_STALE_SECONDS: Final = 60.0  # an older list is not used, because it lacks recent revocations
MAX_USERS: Final = 10_000  # maximum cached ids: two megabytes
DISCOVERY_SECONDS: Final = 3_600.0  # age at which the issuer's endpoints are read again; they rarely change
ISSUER_SECONDS: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


class UserIds:
    """User ids by issuer and subject, which never change once they are assigned.

    Args:
        ask: queries the service that assigns them.
    """

    def __init__(self, ask: Callable[[str, str], Awaitable[int]]) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], int] = {}

    async def user_id(self, issuer: str, subject: str) -> int:
        """See `scanfleet.security.auth.Users`."""
        user_id = self._known.get((issuer, subject))
        if user_id is None:
            user_id = await self._ask(issuer, subject)
            if len(self._known) >= MAX_USERS:
                del self._known[next(iter(self._known))]
            self._known[issuer, subject] = user_id
        return user_id


class KeyReports:
    """Record in the audit log which keys of the issuer verify tokens.

    Args:
        current: returns the names of the current keys.
        report: records them; idempotent.
    """

    def __init__(
        self, current: Callable[[], Sequence[str]], report: Callable[[Sequence[str]], Awaitable[None]]
    ) -> None:
        self._current = current
        self._report = report
        self._reported: Sequence[str] = ()

    async def refresh(self) -> None:
        """Record changed keys; a failed record is retried by the next call."""
        names = self._current()
        if set(names) == set(self._reported):
            return
        try:
            async with asyncio.timeout(REPORT_LIMIT_SECONDS):
                await self._report(names)
        except (DependencyError, TimeoutError) as error:
            _log.warning(
                "issuer_keys_unrecorded", error=repr(error), next_step="the next call records them in the audit log"
            )
            return
        self._reported = names


class Revocations:
    """A recent copy of the list of revoked tokens.

    Args:
        ask: queries the service that stores the list.
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
        """Read the list; if that fails, the previous one stays valid for `MAX_STALE_SECONDS`."""
        asked_at = self._clock()
        try:
            async with asyncio.timeout(ASK_LIMIT_SECONDS):
                revoked = await self._ask()
        except (DependencyError, TimeoutError) as error:
            _log.warning("revocations_unavailable", error=repr(error))
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
        """Check that the list was read at least once.

        Raises:
            DependencyError: it was not read yet.
        """
        if self._read_at == float("-inf"):
            raise DependencyError("the revocations were not read yet")

    def revokes(self, *, token_id: str, subject: str, user_id: int, issued_at: float) -> bool:
        """See `scanfleet.security.auth.Revoked`."""
        if self._clock() - self._read_at > MAX_STALE_SECONDS:
            raise UnavailableError("the list of revoked tokens is unavailable; try again")
        return (
            (bool(token_id) and token_id in self._token_ids)
            or issued_at < self._by_subject.get(subject, 0)
            or issued_at < self._by_user.get(user_id, 0)
        )


def _seconds(time_: datetime | None) -> float:
    return time_.timestamp() if time_ is not None else float("inf")


class RefusedSignInError(Exception):
    """The issuer refused the sign-in, or the parameters of the callback are invalid."""


def _authentic(url: str) -> str:
    if not is_authentic(url):
        raise ValueError("is not an https URL")
    return url


_Endpoint = Annotated[str, AfterValidator(_authentic)]


class _Discovered(BaseModel):
    issuer: str
    authorization_endpoint: _Endpoint
    token_endpoint: _Endpoint
    end_session_endpoint: _Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    access: str
    refresh: str | None


class SignIn:
    """The gateway as a client of the issuer.

    Every endpoint is https, or on this machine, because TLS authenticates the issuer's responses.

    Args:
        settings: with a client id, a public URL and the issuer.
        transport: carries the requests to the issuer, over the network unless given.
    """

    def __init__(self, settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._issuer = settings.jwt_issuer
        self._client_id = settings.oidc_client_id
        file = settings.oidc_client_secret_file
        self._secret = read_secret(file) if file else None
        self._scopes = settings.oidc_scopes
        self._own = str(settings.public_url).rstrip("/")
        self._transport = transport
        self._tls = httpx2.create_ssl_context()  # takes tens of milliseconds of CPU, so once for all clients
        self._reading: asyncio.Task[_Discovered] | None = None
        self._found: _Discovered | None = None
        self._found_until = 0.0

    @classmethod
    def open(cls, settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> Self | None:
        """Return the sign-in according to the settings; None if it is off.

        Raises:
            OSError: the file with the client's secret cannot be read.
        """
        return cls(settings, transport) if settings.signs_in else None

    async def location(self, state: str, nonce: str, verifier: str) -> str:
        """Return the issuer's URL to redirect the user to.

        Raises:
            DependencyError: the issuer's addresses cannot be read.
        """
        discovered = await self._discover()
        async with self._client() as client:
            url, _ = client.create_authorization_url(
                discovered.authorization_endpoint, state=state, nonce=nonce, code_verifier=verifier
            )
        return cast(str, url)

    async def redeem(self, code: str, verifier: str, nonce: str) -> Tokens:
        """Exchange the code of the callback for tokens.

        Raises:
            RefusedSignInError: the issuer refuses the code, or its id token is not for this sign-in.
            DependencyError: the issuer is unavailable.
        """
        answer = await self._ask("authorization_code", code=code, code_verifier=verifier)
        if not hmac.compare_digest(_nonce(answer.get("id_token")).encode(), nonce.encode()):
            raise RefusedSignInError("the id token has another nonce")
        return _tokens(answer)

    async def refresh(self, refresh_token: str) -> Tokens:
        """Exchange a refresh token, which may be valid only once, for new tokens.

        Raises:
            RefusedSignInError: the issuer refuses it.
            DependencyError: the issuer is unavailable.
        """
        return _tokens(await self._ask("refresh_token", refresh_token=refresh_token))

    async def logout_url(self) -> str | None:
        """Return the issuer's URL for sign-out; None if it has none or is unavailable."""
        try:
            end = (await self._discover()).end_session_endpoint
        except DependencyError:
            return None
        asked = {"client_id": self._client_id, "post_logout_redirect_uri": f"{self._own}/app/"}
        return f"{end}{'&' if '?' in end else '?'}{urlencode(asked)}" if end else None

    async def _ask(self, grant_type: str, **parameters: str) -> dict[str, Any]:
        discovered = await self._discover()
        try:
            async with self._client() as client:
                return dict(await client.fetch_token(discovered.token_endpoint, grant_type=grant_type, **parameters))
        except OAuthError as error:
            raise RefusedSignInError(f"the issuer answers {error.error}") from error
        except (httpx2.HTTPError, ValueError) as error:
            raise DependencyError(f"{discovered.token_endpoint}: {error!r}") from error

    async def _discover(self) -> _Discovered:
        if self._found is not None and time.monotonic() <= self._found_until:
            return self._found
        if self._reading is None or self._reading.done():  # callers share the request in progress
            self._reading = asyncio.create_task(self._read_discovery())
        self._found = await asyncio.shield(self._reading)
        self._found_until = time.monotonic() + DISCOVERY_SECONDS
        return self._found

    async def _read_discovery(self) -> _Discovered:
        url = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            async with httpx2.AsyncClient(
                verify=self._tls, transport=self._transport, timeout=ISSUER_SECONDS
            ) as client:
                answer = await client.get(url)
            found = _Discovered.model_validate_json(answer.raise_for_status().content)
        except (httpx2.HTTPError, ValidationError) as error:
            raise DependencyError(f"{url}: {error!r}") from error
        if found.issuer != self._issuer:
            raise DependencyError(f"{url} is of the issuer {found.issuer!r}, not of SCANFLEET_JWT_ISSUER")
        return found

    def _client(self) -> AsyncOAuth2Client:
        return AsyncOAuth2Client(
            self._client_id,
            self._secret,
            token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
            scope=" ".join(self._scopes),
            redirect_uri=f"{self._own}/session/callback",
            code_challenge_method="S256",
            verify=self._tls,
            transport=self._transport,
            timeout=ISSUER_SECONDS,
        )


def _tokens(answer: dict[str, Any]) -> Tokens:
    access, refresh = answer.get("access_token"), answer.get("refresh_token")
    if not isinstance(access, str):
        raise RefusedSignInError("the issuer's answer has no access token")
    return Tokens(access, refresh if isinstance(refresh, str) else None)


def _nonce(id_token: object) -> str:
    """Return the nonce of an id token from the token endpoint, which TLS authenticates (OpenID Connect Core, 3.1.3.7)."""
    try:
        payload = str(id_token).split(".")[1]
        return str(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["nonce"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RefusedSignInError("the issuer's answer has no id token with a nonce") from error
