"""Verification of users' tokens."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2
import structlog
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from scanfleet.errors import ConfigurationError, DependencyError, UnauthorizedError
from scanfleet.runtime.settings import AuthSettings
from scanfleet.security.auth import claims
from scanfleet.security.auth.claims import Expected
from scanfleet.security.auth.keys import JWKS_TIMEOUT_SECONDS, FixedKeys, JwksKeys, Key, Keys, algorithms_of
from scanfleet.security.auth.principal import Principal, RefusedError
from scanfleet.security.auth.tokens import Reader

_log = structlog.stdlib.get_logger(__name__)


class Verifier(Protocol):
    async def verify(self, text: str) -> Principal:
        """Verify the token and return its caller.

        Raises:
            UnauthorizedError: the token is refused.
            UnavailableError: the keys are unavailable.
        """


class Users(Protocol):
    async def user_id(self, issuer: str, subject: str) -> int:
        """Return the stable user id assigned to the issuer's `subject`.

        Raises:
            DependencyError: the assigning service is unavailable.
        """


class Revoked(Protocol):
    def revokes(self, *, token_id: str, subject: str, user_id: int, issued_at: float) -> bool:
        """Return whether an administrator has revoked this token.

        Raises:
            UnavailableError: the list of revocations is unavailable.
        """


@dataclass(frozen=True, slots=True)
class _Found:
    """The caller, and the attributes by which the token may be revoked."""

    principal: Principal
    subject: str
    token_id: str
    issued_at: float


class TokenVerifier:
    """Verifies a user's bearer token and returns its `Principal`.

    Args:
        settings: rules for accepted tokens.
        keys: keys of the issuer.
        users: assigns user ids; needed for `jwt_user_ids=mapped`.
        revoked: the revoked tokens.
        roles: the roles of a token that the `Principal` keeps.
    """

    def __init__(
        self,
        settings: AuthSettings,
        keys: Keys,
        *,
        users: Users | None = None,
        revoked: Revoked | None = None,
        roles: AbstractSet[str] = frozenset(),
    ) -> None:
        expected = Expected(
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            audience_claim=settings.jwt_audience_claim,
            max_life=settings.jwt_max_life_seconds,
            leeway=settings.jwt_leeway_seconds,
        )
        self._reader = Reader(
            keys, expected, types=settings.jwt_types, max_chars=settings.jwt_max_chars, judge=self._judge
        )
        self._settings = settings
        self._keys = keys
        self._users = users
        self._revoked = revoked
        self._roles = frozenset(roles)

    async def check(self) -> None:
        """Check that tokens can be verified; see `Keys.check`."""
        await self._keys.check()

    @property
    def key_names(self) -> Sequence[str]:
        """The names of the keys that verify tokens now."""
        return [key.name for key in self._keys.current]

    async def verify(self, text: str) -> Principal:
        """See `Verifier`."""
        with refusals():
            found = await self._reader.read(text)
            if self._revoked is not None and self._revoked.revokes(
                token_id=found.token_id,
                subject=found.subject,
                user_id=found.principal.user_id,
                issued_at=found.issued_at,
            ):
                raise RefusedError("token", "is revoked", message="the token has been revoked")
            return found.principal

    async def _judge(self, of_token: Mapping[str, Any]) -> _Found:
        issuer, issued_at = self._settings.jwt_issuer, of_token["iat"]
        subject, token_id = claims.subject(of_token), claims.token_id(of_token)
        roles = claims.roles(of_token, self._settings.jwt_roles_claim)
        if self._settings.jwt_user_ids == "claim":
            user_id = claims.user_id(of_token, self._settings.jwt_user_claim)
        elif self._users is None:
            raise ConfigurationError("SCANFLEET_JWT_USER_IDS=mapped needs a service that assigns user ids")
        else:
            user_id = await self._users.user_id(issuer, subject)
        named = "\n".join((issuer, subject, token_id, str(issued_at)))
        token_hash = hashlib.sha256(named.encode(errors="surrogatepass")).hexdigest()[:16]
        principal = Principal(
            user_id,
            admin=self._settings.jwt_admin_role in roles,
            roles=self._roles & roles,
            token_hash=token_hash,
            expires_at=float(of_token["exp"]),
        )
        return _Found(principal, subject, token_id, issued_at)


@contextmanager
def refusals() -> Iterator[None]:
    """Log the reason of a refusal, and raise the error for the caller."""
    try:
        yield
    except RefusedError as error:
        _log.warning("token_refused", part=error.part, reason=error.reason)
        raise UnauthorizedError(error.message, reason=str(error)) from None


@asynccontextmanager
async def open_verifier(
    settings: AuthSettings,
    *,
    users: Users | None = None,
    revoked: Revoked | None = None,
    roles: AbstractSet[str] = frozenset(),
    transport: httpx2.AsyncBaseTransport | None = None,
) -> AsyncIterator[TokenVerifier]:
    """Yield the verifier of users' tokens. Problems with the issuer's keys are logged at once.

    Args:
        settings: the source of keys, and rules for accepted tokens.
        users: assigns user ids.
        revoked: the revoked tokens.
        roles: the roles of a token that the `Principal` keeps.
        transport: HTTP transport for the JWKS; replaced in tests.

    Raises:
        ValueError: the PEM file holds no public key for the configured algorithms.
        OSError: it cannot be read.
    """
    async with httpx2.AsyncClient(transport=transport, timeout=JWKS_TIMEOUT_SECONDS) as client:
        verifier = TokenVerifier(settings, _keys(settings, client), users=users, revoked=revoked, roles=roles)
        try:
            await verifier.check()
        except ConfigurationError as error:
            _log.critical(
                "token_verification_unavailable",
                error=str(error),
                next_step="correct SCANFLEET_JWT_JWKS_URL or SCANFLEET_JWT_ALGORITHMS",
            )
        except DependencyError as error:
            _log.warning(
                "token_verification_unavailable", error=str(error), next_step="the service fetches the keys again"
            )
        yield verifier


def _keys(settings: AuthSettings, client: httpx2.AsyncClient) -> Keys:
    if settings.jwt_development_secret is not None:
        return FixedKeys(Key(settings.jwt_development_secret.get_secret_value(), ("HS256",)))
    if settings.jwt_public_key_file is not None:
        material = load_pem_public_key(settings.jwt_public_key_file.read_bytes())
        algorithms = algorithms_of(material, settings.jwt_algorithms)
        if not algorithms:
            raise ValueError(f"the key in {settings.jwt_public_key_file} supports none of {settings.jwt_algorithms}")
        return FixedKeys(Key(material, algorithms))
    return JwksKeys(
        client,
        str(settings.jwt_jwks_url),
        algorithms=settings.jwt_algorithms,
        cooldown_seconds=settings.jwt_jwks_cooldown_seconds,
        max_age_seconds=settings.jwt_jwks_max_age_seconds,
        max_stale_seconds=settings.jwt_jwks_max_stale_seconds,
    )
