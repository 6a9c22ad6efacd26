"""Who is calling: bearer tokens (JWT) verified the same way by every service.

A key is only ever tried with the algorithms that are made for its type, so no token can choose how it is checked.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol, cast

import httpx
import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from fastapi import Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.types import Receive, Scope, Send

from scanfleet.errors import UnauthorizedError, UnavailableError
from scanfleet.rest import MAX_ID
from scanfleet.settings import AuthSettings

MAX_TOKEN_CHARS: Final = 8_192  # what servers commonly take as one header; real tokens have a tenth of it
JWKS_TIMEOUT_S: Final = 2.0  # of one fetch: a caller waits for it
MAX_JWKS_BYTES: Final = 1 << 20  # far more than any issuer has keys
KNOWN_TOKENS: Final = 1_000  # verified ones that are remembered: a megabyte or two, 8 if all are as long as may be
EMPTY_COOLDOWN_S: Final = 1.0  # between fetches while no key is known at all and every caller gets a 503

_USER_ID: Final = re.compile(r"[1-9][0-9]{0,15}")
# Headers by which a token names its own key or changes what is signed: none that we believe has a use for one.
_FORBIDDEN_HEADERS: Final = frozenset({"crit", "b64", "jku", "jwk", "x5u", "x5c", "zip", "enc"})
# What reading a hostile token raises: deep or huge JSON, numbers beyond any float, text that is none.
_UNREADABLE: Final = (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError)

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller, as a verified token names them."""

    user_id: int
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms that a token may be signed with by it."""

    material: Any
    algorithms: tuple[str, ...]


class Keys(Protocol):
    async def find(self, kid: str | None) -> Key | None:
        """The key that `kid` names, or the only one if it names none.

        Raises:
            UnavailableError: no key could be had so far, so no token can be judged.
        """


class FixedKey:
    """One key for the life of the process, whatever a token calls it."""

    def __init__(self, key: Key) -> None:
        self._key = key

    async def find(self, kid: str | None) -> Key | None:  # noqa: ARG002 # the port's signature
        return self._key


class JwksKeys:
    """The keys that an issuer publishes. When it is away the ones last seen go on working.

    Args:
        client: fetches from `url`, within its own time limits.
        cooldown_s: shortest time between two fetches because of an unknown key id.
        max_age_s: fetch again after this time, so that withdrawn keys end.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        *,
        algorithms: tuple[str, ...],
        cooldown_s: float,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._url = url
        self._algorithms = algorithms
        self._cooldown_s = cooldown_s
        self._max_age_s = max_age_s
        self._clock = clock
        self._keys: dict[str | None, Key] = {}
        self._tried = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None) -> Key | None:
        if kid in self._keys and self._age_s < self._max_age_s:
            return self._keys[kid]
        async with self._lock:  # callers that come during a fetch share its outcome
            if self._age_s >= self._patience_s(kid):
                await self._refresh()
        if not self._keys:
            raise UnavailableError("the keys that sign tokens are not available; try again")
        return self._keys.get(kid)

    @property
    def _age_s(self) -> float:
        return self._clock() - self._tried

    def _patience_s(self, kid: str | None) -> float:
        if not self._keys:
            return EMPTY_COOLDOWN_S
        return self._max_age_s if kid in self._keys else self._cooldown_s

    async def _refresh(self) -> None:
        self._tried = self._clock()
        try:
            self._keys = _from_jwks(await self._fetch(), self._algorithms)
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError) as error:
            _log.warning("signing keys not fetched", error=repr(error), known=len(self._keys))

    async def _fetch(self) -> Any:
        async with asyncio.timeout(JWKS_TIMEOUT_S), self._client.stream("GET", self._url) as response:
            response.raise_for_status()
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_JWKS_BYTES:
                    raise ValueError("more than a key set can have")
        return httpx.Response(200, content=bytes(body)).json()


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of a token, good until `until` (Unix time) as long as `kid` names the very same key."""

    principal: Principal
    kid: str | None
    key: Key
    until: int


class TokenVerifier:
    """Turns a bearer token into a `Principal`, or refuses it."""

    def __init__(self, settings: AuthSettings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._known: dict[str, _Known] = {}

    async def verify(self, token: str) -> Principal:
        """The caller whom the token names.

        Raises:
            UnauthorizedError: it is malformed, expired, made for longer than allowed, or not by and for whom it should be.
            UnavailableError: the keys to judge it by are not available.
        """
        known = self._known.get(token)
        # The key is asked for each time: when it is withdrawn, a token that was seen before ends as any other.
        if known and await self._keys.find(known.kid) is known.key and time.time() < known.until:
            return known.principal
        try:
            return await self._judge(token)
        except _UNREADABLE as error:
            # The class says enough; the text may quote the token.
            _log.warning("token refused", reason=type(error).__name__)
            expired = isinstance(error, jwt.ExpiredSignatureError)
            raise UnauthorizedError("the token has expired" if expired else "the token is not valid") from None

    async def _judge(self, token: str) -> Principal:
        if len(token) > MAX_TOKEN_CHARS:
            raise jwt.DecodeError("too long")
        header = jwt.get_unverified_header(token)
        if not _FORBIDDEN_HEADERS.isdisjoint(header):
            raise jwt.InvalidTokenError("a header that is not allowed")
        kid = header.get("kid")
        key = await self._keys.find(kid)
        if key is None:
            raise jwt.InvalidKeyError("unknown key")
        claims = jwt.decode(
            token,
            key.material,
            algorithms=key.algorithms,
            audience=self._settings.jwt_audience,
            issuer=self._settings.jwt_issuer,
            leeway=self._settings.jwt_leeway_seconds,
            options={"require": ["exp", "iat", "sub", "aud", "iss"], "enforce_minimum_key_length": True},
        )
        principal = self._principal(claims)
        if len(self._known) >= KNOWN_TOKENS:
            del self._known[next(iter(self._known))]
        self._known[token] = _Known(principal, kid, key, int(claims["exp"]))  # whole, as the library reads it
        return principal

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        # The library takes numbers in strings and booleans for times; RFC 7519 does not.
        if not all(type(claims[name]) in (int, float) for name in ("exp", "iat", "nbf") if name in claims):
            raise jwt.DecodeError("a time that is no number")
        if claims["exp"] - claims["iat"] > self._settings.jwt_max_life_seconds:
            raise jwt.InvalidTokenError("made for longer than allowed")
        user = claims.get(self._settings.jwt_user_claim)
        if not isinstance(user, str) or _USER_ID.fullmatch(user) is None or int(user) > MAX_ID:
            raise jwt.InvalidTokenError("not a user id")
        roles = claims.get(self._settings.jwt_roles_claim, [])
        if not isinstance(roles, list):
            raise jwt.InvalidTokenError("roles are no list")
        return Principal(int(user), admin=self._settings.jwt_admin_role in roles)


@asynccontextmanager
async def open_verifier(
    settings: AuthSettings,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[TokenVerifier]:
    """The verifier that the settings describe; a lifespan keeps it as `app.state.verifier`.

    Args:
        settings: which source of keys there is.
        transport: how the JWKS is fetched; a test replaces it.

    Raises:
        ValueError: the PEM file holds no public key for the configured algorithms.
        OSError: it cannot be read.
    """
    if settings.jwt_development_secret is not None:
        secret = settings.jwt_development_secret.get_secret_value()
        yield TokenVerifier(settings, FixedKey(Key(secret, ("HS256",))))
    elif settings.jwt_public_key_file is not None:
        # Read before the service answers anyone, so blocking the loop harms nobody.
        material = load_pem_public_key(settings.jwt_public_key_file.read_bytes())
        algorithms = _algorithms(material, settings.jwt_algorithms)
        if not algorithms:
            raise ValueError(f"the key in {settings.jwt_public_key_file} fits none of {settings.jwt_algorithms}")
        yield TokenVerifier(settings, FixedKey(Key(material, algorithms)))
    else:
        async with httpx.AsyncClient(transport=transport, timeout=JWKS_TIMEOUT_S) as client:
            keys = JwksKeys(
                client,
                str(settings.jwt_jwks_url),
                algorithms=settings.jwt_algorithms,
                cooldown_s=settings.jwt_jwks_cooldown_seconds,
                max_age_s=settings.jwt_jwks_max_age_seconds,
            )
            yield TokenVerifier(settings, keys)


_bearer: Final = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    bearerFormat="JWT",
    description="A JWT whose `sub` is the user id; a token with the role `admin` is an administrator's.",
)


class Guarded(APIRoute):
    """A route that answers only to a good token, and reads nothing else of a request before that.

    The framework reads a body before it resolves a dependency: a caller without a token would be told what is wrong with it.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in (self.methods or ()):
            scope["caller"] = await self._authenticate(Request(scope))
            await self.serve(scope, receive, send)
        else:
            await super().handle(scope, receive, send)  # answers 405, whoever asks

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request of `scope["caller"]`, to the end of the answer; a subclass may refuse it."""
        await super().handle(scope, receive, send)

    @staticmethod
    async def _authenticate(request: Request) -> Principal:
        credentials = await _bearer(request)
        if credentials is None:
            raise UnauthorizedError("a bearer token is required")
        return await cast(TokenVerifier, request.app.state.verifier).verify(credentials.credentials)


class _LetIn(SecurityBase):
    """What the OpenAPI document says of a `Guarded` route, and whom that has let in."""

    model = _bearer.model
    scheme_name = _bearer.scheme_name

    async def __call__(self, request: Request) -> Principal:
        return cast(Principal, request.scope["caller"])


Caller = Annotated[Principal, Security(_LetIn())]
"""The caller whom a `Guarded` route has let in; on any other route nobody is."""


def _from_jwks(document: Any, allowed: tuple[str, ...]) -> dict[str | None, Key]:
    """The usable signing keys by `kid`; the only one also under None.

    Raises:
        ValueError: the document has no key that we can use.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    keys: dict[str | None, Key] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("kid", ""), str) and (key := _from_jwk(entry, allowed)):
            keys[entry.get("kid")] = key
    if not keys:
        raise ValueError("no usable key in the key set")
    if len(keys) == 1:
        keys[None] = next(iter(keys.values()))
    else:
        keys.pop(None, None)
    return keys


def _from_jwk(entry: dict[str, Any], allowed: tuple[str, ...]) -> Key | None:
    if entry.get("use", "sig") != "sig":
        return None
    try:
        jwk = jwt.PyJWK.from_dict(entry)
    except (jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm):
        return None  # a key for something else; issuers publish those too
    algorithms = _algorithms(jwk.key, allowed)
    if "alg" in entry:
        algorithms = tuple(name for name in algorithms if name == entry["alg"])
    return Key(jwk.key, algorithms) if algorithms else None


def _algorithms(material: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `allowed` that are made for a key of this type; none for a private or symmetric key."""
    if isinstance(material, RSAPublicKey):
        fitting = {"RS256", "PS256"}
    elif isinstance(material, EllipticCurvePublicKey) and isinstance(material.curve, SECP256R1):
        fitting = {"ES256"}
    elif isinstance(material, Ed25519PublicKey):
        fitting = {"EdDSA"}
    else:
        return ()
    return tuple(name for name in allowed if name in fitting)
