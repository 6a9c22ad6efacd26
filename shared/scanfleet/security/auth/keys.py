"""The keys that verify tokens.

A key is used only with the algorithms of its type, so a token cannot choose how it is verified.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Protocol

import httpx2
import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from scanfleet.errors import ConfigurationError, DependencyError, UnavailableError
from scanfleet.security.auth.principal import RefusedError

JWKS_TIMEOUT_SECONDS: Final = 1.5  # per fetch: callers wait for it, and so does a readiness check, which has 2 s
MAX_JWKS_BYTES: Final = 1 << 20  # far above the size of any issuer's key set
MIN_RSA_BITS: Final = 2_048  # RFC 7518, 3.3
EMPTY_COOLDOWN_SECONDS: Final = 1.0  # interval of fetches while no key is available and every caller gets a 503

_MAX_KID_CHARS: Final = 32  # of an escaped id in a key's name

# Raised by the library for an incomplete key or one of an unknown type.
_UNUSABLE: Final = (
    jwt.PyJWTError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    UnsupportedAlgorithm,
)
_BUSY: Final = frozenset({408, 429})  # client errors that are transient

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms that it may verify."""

    material: Any
    algorithms: tuple[str, ...]
    kid: str | None = None

    @property
    def name(self) -> str:
        """Its fingerprint (SHA-256, shortened) and its id, in printable ASCII."""
        if isinstance(self.material, str):
            return "development secret"  # short enough to be guessed from a fingerprint
        der = self.material.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        kid = f", kid {ascii(self.kid)[:_MAX_KID_CHARS]}" if self.kid is not None else ""
        return f"{sha256(der).hexdigest()[:16]}{kid}"


class Keys(Protocol):
    @property
    def current(self) -> Sequence[Key]:
        """The keys that verify tokens now."""

    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        """Return the keys, at least one, that may have signed a token with this header.

        Raises:
            RefusedError: there is none.
            UnavailableError: the keys are unavailable, so no token can be verified.
        """

    async def check(self) -> None:
        """Check that tokens can be verified.

        Raises:
            ConfigurationError: an operator must correct a setting first.
            DependencyError: the keys are unavailable.
        """


class FixedKeys:
    """Keys that never change in a process."""

    def __init__(self, *keys: Key) -> None:
        self._keys = keys

    @property
    def current(self) -> Sequence[Key]:
        return self._keys

    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        return _matching(self._keys, kid, algorithm) or _refuse()

    async def check(self) -> None:
        """Always succeed."""


class _FetchError(Exception):
    def __init__(self, reason: str, *, permanent: bool) -> None:
        super().__init__(reason)
        self.permanent = permanent


class _NoKeyError(_FetchError):
    """The issuer publishes no usable key."""


class JwksKeys:
    """The keys that an issuer publishes. If a fetch fails, the previous ones stay valid for up to `max_stale_seconds`.

    Args:
        client: fetches `url`, with its own timeouts.
        cooldown_seconds: minimum interval between two fetches.
        max_age_seconds: age after which the keys are refetched, so that withdrawn keys expire.
        max_stale_seconds: age at which keys expire if they could not be refetched.
    """

    def __init__(
        self,
        client: httpx2.AsyncClient,
        url: str,
        *,
        algorithms: tuple[str, ...],
        cooldown_seconds: float,
        max_age_seconds: float,
        max_stale_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._url = url
        self._algorithms = algorithms
        self._cooldown_seconds = cooldown_seconds
        self._max_age_seconds = max_age_seconds
        self._max_stale_seconds = max_stale_seconds
        self._clock = clock
        self._fetched: Sequence[Key] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._failure = _FetchError("not fetched yet", permanent=False)
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        found = _matching(self._keys, kid, algorithm)
        # One caller waits for the refetch of aged keys; the others use the old ones until it ends.
        if found and (self._age_seconds < self._max_age_seconds or self._lock.locked()):
            return found
        async with self._lock:  # callers with an unknown key that arrive during a fetch share its result
            await self._refresh(known=bool(_matching(self._keys, kid, algorithm)))
        return _matching(self._keys, kid, algorithm) or self._refuse()

    async def check(self) -> None:
        async with self._lock:
            await self._refresh(known=True)
        if not self._keys:
            raise (ConfigurationError if self._failure.permanent else DependencyError)(str(self._failure))

    @property
    def current(self) -> Sequence[Key]:
        return self._keys

    @property
    def _keys(self) -> Sequence[Key]:
        return self._fetched if self._age_seconds < self._max_stale_seconds else ()

    @property
    def _age_seconds(self) -> float:
        return self._clock() - self._fetched_at

    def _refuse(self) -> Sequence[Key]:
        if self._keys:
            return _refuse()
        if isinstance(self._failure, _NoKeyError):
            raise RefusedError("header alg", str(self._failure))
        if self._failure.permanent:
            raise UnavailableError(
                "tokens cannot be verified until the service is configured correctly", retry_after=60
            )
        raise UnavailableError("the issuer's keys are unavailable; try again")

    async def _refresh(self, *, known: bool) -> None:
        """Fetch the keys unless they are recent enough for a token whose key is `known` or not."""
        if known and self._keys and self._age_seconds < self._max_age_seconds:
            return
        passing = not self._keys and not self._failure.permanent
        if self._clock() - self._tried_at < (EMPTY_COOLDOWN_SECONDS if passing else self._cooldown_seconds):
            return
        self._tried_at = self._clock()
        try:
            self._fetched = _from_jwks(await self._fetch(), self._algorithms)
            self._fetched_at = self._clock()
        except _FetchError as error:
            if isinstance(error, _NoKeyError):  # fetched: the issuer has withdrawn the previous keys
                self._fetched, self._fetched_at = (), self._clock()
            self._failure = error
            level = logging.ERROR if error.permanent else logging.WARNING
            _log.log(level, "issuer_keys_unavailable", url=self._url, error=str(error), known=len(self._keys))

    async def _fetch(self) -> Any:
        try:
            async with asyncio.timeout(JWKS_TIMEOUT_SECONDS), self._client.stream("GET", self._url) as response:
                if not response.is_success:
                    permanent = response.status_code < 500 and response.status_code not in _BUSY  # noqa: PLR2004 # server errors
                    hint = ": configure the URL that it redirects to" if response.is_redirect else ""
                    raise _FetchError(f"the JWKS URL answered {response.status_code}{hint}", permanent=permanent)
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_JWKS_BYTES:
                        raise _FetchError(f"the JWKS has more than {MAX_JWKS_BYTES} bytes", permanent=True)
        except (httpx2.HTTPError, TimeoutError) as error:
            raise _FetchError(f"the JWKS URL did not answer: {error!r}", permanent=False) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _FetchError("the JWKS URL returned a response that is not JSON", permanent=True) from error


def algorithms_of(material: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the algorithms in `allowed` for a key of this type; none for a private, symmetric or short key."""
    if isinstance(material, RSAPublicKey) and material.key_size >= MIN_RSA_BITS:
        fitting = {"RS256", "PS256"}
    elif isinstance(material, EllipticCurvePublicKey) and isinstance(material.curve, SECP256R1):
        fitting = {"ES256"}
    elif isinstance(material, Ed25519PublicKey):
        return ("EdDSA", "Ed25519") if "EdDSA" in allowed else ()  # two names of the same algorithm (RFC 9864)
    else:
        return ()
    return tuple(name for name in allowed if name in fitting)


def _matching(keys: Sequence[Key], kid: str | None, algorithm: str) -> Sequence[Key]:
    """Return the keys for this algorithm with this id, or else without an id; all of them for a token without one."""
    fitting = [key for key in keys if algorithm in key.algorithms]
    if kid is None:
        return fitting
    return [key for key in fitting if key.kid == kid] or [key for key in fitting if key.kid is None]


def _refuse() -> Sequence[Key]:
    raise RefusedError("header kid", "and alg match no key of the issuer")


def _from_jwks(document: Any, allowed: tuple[str, ...]) -> Sequence[Key]:
    """Return the usable signing keys.

    Raises:
        _FetchError: there is none.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise _FetchError("the JWKS URL returned JSON that is not a key set", permanent=True)
    keys = [key for entry in entries if isinstance(entry, dict) and (key := _from_jwk(entry, allowed))]
    if not keys:
        raise _NoKeyError(f"no key of the JWKS is for an allowed algorithm ({', '.join(allowed)})", permanent=True)
    return keys


def _from_jwk(entry: dict[str, Any], allowed: tuple[str, ...]) -> Key | None:
    entry = {name: value for name, value in entry.items() if value is not None}
    kid = entry.get("kid")
    if entry.get("use", "sig") != "sig" or not isinstance(kid, str | None):
        return None
    algorithm = entry.pop("alg", None)  # the library supports one of the two names of EdDSA
    try:
        material = jwt.PyJWK.from_dict(entry).key
    except _UNUSABLE:
        return None  # a key for another purpose; issuers publish those too
    algorithms = algorithms_of(material, allowed)
    if algorithm is not None and algorithm not in algorithms:
        return None
    return (
        Key(material, algorithms if algorithm in (None, "EdDSA", "Ed25519") else (algorithm,), kid)
        if algorithms
        else None
    )
