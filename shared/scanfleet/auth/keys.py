"""The keys that sign tokens.

A key is only ever tried with the algorithms that are made for its type, so no token can choose how it is checked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx
import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from scanfleet.auth.principal import RefusedError
from scanfleet.errors import ConfigurationError, DependencyError, UnavailableError

JWKS_TIMEOUT_S: Final = 1.5  # of one fetch: a caller waits for it, and so does a readiness check, which has 2 s
MAX_JWKS_BYTES: Final = 1 << 20  # far more than any issuer has keys
EMPTY_COOLDOWN_S: Final = 1.0  # between fetches while no key is known and every caller gets a 503

# What the library raises for a key that is incomplete or of a kind that it does not know.
_UNUSABLE: Final = (
    jwt.PyJWTError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    UnsupportedAlgorithm,
)
_BUSY: Final = frozenset({408, 429})  # of the client errors, those that pass by themselves

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms that a token may be signed with by it."""

    material: Any
    algorithms: tuple[str, ...]
    kid: str | None = None


class Keys(Protocol):
    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        """The keys that may have signed a token with this header; at least one.

        Raises:
            RefusedError: there is none.
            UnavailableError: the keys are not known, so no token can be judged.
        """

    async def check(self) -> None:
        """Return if tokens can be judged.

        Raises:
            ConfigurationError: they cannot until an operator corrects a setting.
            DependencyError: the keys are unavailable.
        """


class FixedKeys:
    """Keys for the life of the process."""

    def __init__(self, *keys: Key) -> None:
        self._keys = keys

    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        return _matching(self._keys, kid, algorithm) or _refuse()

    async def check(self) -> None:
        """They are here."""


class _FetchError(Exception):
    def __init__(self, reason: str, *, permanent: bool) -> None:
        super().__init__(reason)
        self.permanent = permanent


class _NoKeyError(_FetchError):
    """The issuer publishes no key that may be used."""


class JwksKeys:
    """The keys that an issuer publishes. While they cannot be fetched the last ones stay valid for `max_stale_s`.

    Args:
        client: fetches from `url`, within its own time limits.
        cooldown_s: shortest time between two fetches.
        max_age_s: fetch again after this time, so that withdrawn keys end.
        max_stale_s: age at which keys end if they could not be fetched again.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        *,
        algorithms: tuple[str, ...],
        cooldown_s: float,
        max_age_s: float,
        max_stale_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._url = url
        self._algorithms = algorithms
        self._cooldown_s = cooldown_s
        self._max_age_s = max_age_s
        self._max_stale_s = max_stale_s
        self._clock = clock
        self._fetched: Sequence[Key] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._failure = _FetchError("not fetched yet", permanent=False)
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> Sequence[Key]:
        found = _matching(self._keys, kid, algorithm)
        # One caller waits for the fetch of keys that are too old; for the others they are good until it ends.
        if found and (self._age_s < self._max_age_s or self._lock.locked()):
            return found
        async with self._lock:  # callers with an unknown key that come during a fetch share its outcome
            await self._refresh(known=bool(_matching(self._keys, kid, algorithm)))
        return _matching(self._keys, kid, algorithm) or self._refuse()

    async def check(self) -> None:
        async with self._lock:
            await self._refresh(known=True)
        if not self._keys:
            raise (ConfigurationError if self._failure.permanent else DependencyError)(str(self._failure))

    @property
    def _keys(self) -> Sequence[Key]:
        return self._fetched if self._age_s < self._max_stale_s else ()

    @property
    def _age_s(self) -> float:
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
        """Fetch the keys unless they are new enough, for a token whose key is `known` or not."""
        if known and self._keys and self._age_s < self._max_age_s:
            return
        passing = not self._keys and not self._failure.permanent
        if self._clock() - self._tried_at < (EMPTY_COOLDOWN_S if passing else self._cooldown_s):
            return
        self._tried_at = self._clock()
        try:
            self._fetched = _from_jwks(await self._fetch(), self._algorithms)
            self._fetched_at = self._clock()
        except _FetchError as error:
            self._failure = error
            log = _log.error if error.permanent else _log.warning
            log("the issuer's keys could not be fetched", url=self._url, error=str(error), known=len(self._keys))

    async def _fetch(self) -> Any:
        try:
            async with asyncio.timeout(JWKS_TIMEOUT_S), self._client.stream("GET", self._url) as response:
                if not response.is_success:
                    permanent = response.status_code < 500 and response.status_code not in _BUSY  # noqa: PLR2004 # server errors
                    hint = ": name the address it leads to" if response.is_redirect else ""
                    raise _FetchError(f"the JWKS URL answered {response.status_code}{hint}", permanent=permanent)
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_JWKS_BYTES:
                        raise _FetchError(f"the JWKS has more than {MAX_JWKS_BYTES} bytes", permanent=True)
        except (httpx.HTTPError, TimeoutError) as error:
            raise _FetchError(f"the JWKS URL did not answer: {error!r}", permanent=False) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _FetchError("the JWKS URL answered something that is not JSON", permanent=True) from error


def algorithms_of(material: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `allowed` that are made for a key of this type; none for a private or symmetric key."""
    if isinstance(material, RSAPublicKey):
        fitting = {"RS256", "PS256"}
    elif isinstance(material, EllipticCurvePublicKey) and isinstance(material.curve, SECP256R1):
        fitting = {"ES256"}
    elif isinstance(material, Ed25519PublicKey):
        return ("EdDSA", "Ed25519") if "EdDSA" in allowed else ()  # two names of one (RFC 9864)
    else:
        return ()
    return tuple(name for name in allowed if name in fitting)


def _matching(keys: Sequence[Key], kid: str | None, algorithm: str) -> Sequence[Key]:
    """The keys for this algorithm of this id, or else without any; all of them for a token that names none."""
    fitting = [key for key in keys if algorithm in key.algorithms]
    if kid is None:
        return fitting
    return [key for key in fitting if key.kid == kid] or [key for key in fitting if key.kid is None]


def _refuse() -> Sequence[Key]:
    raise RefusedError("header kid", "and alg fit no key of the issuer")


def _from_jwks(document: Any, allowed: tuple[str, ...]) -> Sequence[Key]:
    """The usable signing keys.

    Raises:
        _FetchError: there is none.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise _FetchError("the JWKS URL answered JSON that is not a key set", permanent=True)
    keys = [key for entry in entries if isinstance(entry, dict) and (key := _from_jwk(entry, allowed))]
    if not keys:
        raise _NoKeyError(f"no key of the JWKS is for an allowed algorithm ({', '.join(allowed)})", permanent=True)
    return keys


def _from_jwk(entry: dict[str, Any], allowed: tuple[str, ...]) -> Key | None:
    entry = {name: value for name, value in entry.items() if value is not None}
    kid = entry.get("kid")
    if entry.get("use", "sig") != "sig" or not isinstance(kid, str | None):
        return None
    algorithm = entry.pop("alg", None)  # the library knows one of the two names of EdDSA
    try:
        material = jwt.PyJWK.from_dict(entry).key
    except _UNUSABLE:
        return None  # a key for something else; issuers publish those too
    algorithms = algorithms_of(material, allowed)
    if algorithm is not None and algorithm not in algorithms:
        return None
    return (
        Key(material, algorithms if algorithm in (None, "EdDSA", "Ed25519") else (algorithm,), kid)
        if algorithms
        else None
    )
