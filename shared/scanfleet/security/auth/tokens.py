"""Verification of a token: its form, its signature and the registered claims."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import jwt
from jwt.algorithms import OKPAlgorithm

from scanfleet.security.auth.claims import Expected, check
from scanfleet.security.auth.keys import Key, Keys
from scanfleet.security.auth.principal import RefusedError

KNOWN_TOKENS: Final = 1_000  # cached tokens, by their hashes: half a megabyte
MAX_TRIES: Final = 4  # keys tried for one token: more than any issuer has at once for one algorithm

# Headers by which a token supplies its own key or changes the signed data; no accepted token needs one.
_FORBIDDEN_HEADERS: Final = frozenset({"crit", "b64", "jku", "jwk", "x5u", "x5c", "zip", "enc"})
# Raised by parsing a hostile token: deep or huge JSON, numbers out of range, invalid UTF-8.
_UNREADABLE: Final = (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError)


_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class _Verified(Generic[_Found]):
    """The verified content of a token, valid until `until` (Unix time) while its header selects the same key."""

    found: _Found
    key: Key
    kid: str | None
    algorithm: str
    until: float


class Reader(Generic[_Found]):
    """Reads tokens of one issuer for one audience, and caches the result for tokens in use.

    Args:
        keys: keys of the issuer.
        expected: the required registered claims.
        types: accepted values of the header `typ`; a token without `typ` is accepted too.
        max_chars: maximum length of a token.
        judge: extracts the required data from the claims of a valid token; raises RefusedError.
    """

    def __init__(
        self,
        keys: Keys,
        expected: Expected,
        *,
        types: Collection[str],
        max_chars: int,
        judge: Callable[[Mapping[str, Any]], Awaitable[_Found]],
    ) -> None:
        self._keys = keys
        self._expected = expected
        self._types = frozenset(type_.lower() for type_ in types)
        self._max_chars = max_chars
        self._judge = judge
        self._signatures = jwt.PyJWS(options={"verify_signature": True, "enforce_minimum_key_length": True})
        self._signatures.register_algorithm("Ed25519", OKPAlgorithm())
        self._known: dict[bytes, _Verified[_Found]] = {}

    async def read(self, text: str) -> _Found:
        """Verify the token and return the result of `judge`.

        Raises:
            RefusedError: the token is malformed, expired, or of another issuer or audience.
            UnavailableError: the issuer's keys are unavailable.
        """
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        known = self._known.get(digest)
        # The key is looked up every time: once it is withdrawn, cached tokens expire as well.
        if known and time.time() < known.until and await self._is_current(known):
            return known.found
        known = await self._read(text)
        if len(self._known) >= KNOWN_TOKENS:
            del self._known[next(iter(self._known))]
        self._known[digest] = known
        return known.found

    async def _is_current(self, known: _Verified[_Found]) -> bool:
        return any(key is known.key for key in await self._keys.find(known.kid, known.algorithm))

    async def _read(self, text: str) -> _Verified[_Found]:
        if len(text) > self._max_chars:
            raise RefusedError("token", f"has more than {self._max_chars} characters")
        try:
            kid, algorithm = self._check_header(self._signatures.get_unverified_header(text))
            keys = await self._keys.find(kid, algorithm)
            payload, key = self._verify(text, keys)
            claims = json.loads(payload)
        except _UNREADABLE as error:  # its text may contain the token
            if type(error) is jwt.InvalidTokenError:  # raised by the library for an invalid `kid` or `crit`
                raise RefusedError("header", "has an invalid kid or crit") from None
            raise RefusedError("token", f"is malformed ({type(error).__name__})") from None
        if not isinstance(claims, dict):
            raise RefusedError("payload", "is not a JSON object")
        check(claims, self._expected)
        return _Verified(await self._judge(claims), key, kid, algorithm, claims["exp"])

    def _check_header(self, header: dict[str, Any]) -> tuple[str | None, str]:
        for name in sorted(_FORBIDDEN_HEADERS & header.keys()):
            raise RefusedError(f"header {name}", "is not accepted")
        type_ = header.get("typ")
        if type_ is not None and not (isinstance(type_, str) and self._is_accepted(type_.lower())):
            raise RefusedError("header typ", "is not an accepted token type")
        algorithm = header.get("alg")
        if not isinstance(algorithm, str):
            raise RefusedError("header alg", "is not a string")
        return header.get("kid"), algorithm

    def _is_accepted(self, type_: str) -> bool:
        return type_.removeprefix("application/") in self._types  # RFC 7515, 4.1.9

    def _verify(self, text: str, keys: Collection[Key]) -> tuple[bytes, Key]:
        for key in list(keys)[:MAX_TRIES]:
            try:
                return self._signatures.decode(text, key.material, algorithms=key.algorithms), key
            except jwt.InvalidSignatureError:
                continue
        raise RefusedError("signature", "does not match")
