"""Internal tokens: the gateway uses them to identify the caller to the services behind it.

They are short-lived and valid for one service, so a service cannot use a received token at another one. Only the
gateway has the signing key, so no service can create a token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from scanfleet.errors import BadRequestError
from scanfleet.security.auth import claims
from scanfleet.security.auth.claims import Expected
from scanfleet.security.auth.keys import FixedKeys, Key
from scanfleet.security.auth.principal import Principal, RefusedError
from scanfleet.security.auth.tokens import MAX_TRIES, Reader
from scanfleet.security.auth.verifier import refusals

ISSUER: Final = "scanfleet-api-gateway"
TYPE: Final = "scanfleet-internal+jwt"
LIFE_SECONDS: Final = 60
# Reuse of a token for requests of the same caller; most of its lifetime remains for the last one.
REUSE_SECONDS: Final = 20
LEEWAY_SECONDS: Final = 10
MAX_ROLES_CHARS: Final = 9_000  # of the claim with roles: what the largest token of a user can have in ASCII
MAX_CHARS: Final = 13_000  # of a token with that claim; others have 500, and the headers of a request at most 16,384
MAX_SIGNED: Final = 1_000  # callers with a cached token
MAX_OFFSET_SECONDS: Final = 86_400  # maximum clock difference; beyond it the clock of a machine must be corrected first

THE_GATEWAY: Final = Principal(0)
"""The principal of tokens for requests of the gateway itself."""

_END: Final = "-----END PUBLIC KEY-----"


@dataclass(frozen=True, slots=True)
class _Signed:
    text: str
    at: float


class InternalTokens:
    """Creates the tokens for one service.

    Their times follow that service's clock, taken from its responses, so the gateway's clock does not matter.

    Args:
        key: the gateway's private key.
        audience: name of the service.
        clock: returns Unix time on the gateway.
    """

    def __init__(self, key: Ed25519PrivateKey, audience: str, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._audience = audience
        self._clock = clock
        self._offset = 0.0
        self._signed: dict[tuple[int, bool, str, AbstractSet[str]], _Signed] = {}

    def bearer(self, caller: Principal, *, with_roles: bool = False) -> str:
        """Return the value of the Authorization header for a request of this caller.

        Args:
            caller: the caller.
            with_roles: whether the token has the caller's roles, which few requests need.

        Raises:
            BadRequestError: the roles are longer than `MAX_ROLES_CHARS`.
        """
        now = self._clock() + self._offset
        roles: AbstractSet[str] = caller.roles if with_roles else frozenset()
        whose = (caller.user_id, caller.admin, caller.token_hash, roles)
        signed = self._signed.get(whose)
        if signed is None or not 0 <= now - signed.at < REUSE_SECONDS:
            self._signed.pop(whose, None)
            if len(self._signed) >= MAX_SIGNED:
                del self._signed[next(iter(self._signed))]
            signed = self._signed[whose] = _Signed(f"Bearer {self._sign(caller, roles, int(now))}", now)
        return signed.text

    def learn(self, date: str | None) -> None:
        """Derive the service's clock from the Date header of a response."""
        try:
            offset = _unix_time(date or "") - self._clock()
        except ValueError:
            return  # missing or invalid
        if abs(offset - self._offset) > 1 and abs(offset) <= MAX_OFFSET_SECONDS:  # the header has whole seconds
            self._offset = offset
            self._signed.clear()

    def _sign(self, caller: Principal, roles: AbstractSet[str], now: int) -> str:
        named = {"grant_roles": sorted(roles)} if roles else {}
        if (chars := len(json.dumps(named))) > MAX_ROLES_CHARS:
            raise BadRequestError(
                f"your token's roles that user grants refer to have {chars} characters, and the limit is "
                f"{MAX_ROLES_CHARS}"
            )
        return jwt.encode(
            {
                "iss": ISSUER,
                "aud": self._audience,
                "sub": str(caller.user_id),
                "roles": ["admin"] if caller.admin else [],
                "token_hash": caller.token_hash,
                **named,
                "iat": now,
                "exp": now + LIFE_SECONDS,
            },
            self._key,
            "EdDSA",
            headers={"typ": TYPE},
        )


@lru_cache(maxsize=2)  # the header of each service changes once a second
def _unix_time(date: str) -> float:
    return parsedate_to_datetime(date).timestamp()


class InternalVerifier:
    """A `Verifier` of internal tokens.

    Args:
        keys: the gateway's public keys; several during a key rotation.
        audience: name of this service.
    """

    def __init__(self, keys: Sequence[Ed25519PublicKey], audience: str) -> None:
        expected = Expected(ISSUER, audience, max_life=LIFE_SECONDS, leeway=LEEWAY_SECONDS)
        self._reader = Reader(
            FixedKeys(*(Key(key, ("EdDSA",)) for key in keys)),
            expected,
            types=(TYPE,),
            max_chars=MAX_CHARS,
            judge=_judge,
        )

    async def verify(self, text: str) -> Principal:
        """See `Verifier`."""
        with refusals():
            return await self._reader.read(text)


async def _judge(of_token: Mapping[str, Any]) -> Principal:
    token_hash = of_token.get("token_hash")
    if not isinstance(token_hash, str):
        raise RefusedError("token_hash", "is not a string")
    user_id = 0 if of_token["sub"] == "0" else claims.user_id(of_token, "sub")
    return Principal(
        user_id,
        admin="admin" in claims.roles(of_token, "roles"),
        roles=frozenset(claims.roles(of_token, "grant_roles")),
        token_hash=token_hash,
    )


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """Read the key that signs internal tokens, or chunks.

    Raises:
        ValueError: the file holds no Ed25519 private key.
        OSError: it cannot be read.
    """
    key = load_pem_private_key(file.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file} holds no Ed25519 private key")  # noqa: TRY004 # the file is invalid, not an argument
    return key


def read_public_keys(file: Path) -> list[Ed25519PublicKey]:
    """Read the keys whose signatures are accepted.

    Raises:
        ValueError: the file holds anything but 1 to `MAX_TRIES` Ed25519 public keys.
        OSError: it cannot be read.
    """
    parts = [part for part in file.read_text(encoding="ascii").split(_END) if part.strip()]
    found = [load_pem_public_key(f"{part.strip()}\n{_END}\n".encode()) for part in parts]
    keys = [key for key in found if isinstance(key, Ed25519PublicKey)]
    if not 0 < len(keys) == len(found) <= MAX_TRIES:
        raise ValueError(f"{file} does not hold 1 to {MAX_TRIES} Ed25519 public keys")
    return keys
