"""A token issuer for tests."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from scanfleet.runtime.settings import AuthSettings
from scanfleet.security.auth import FixedKeys, InternalTokens, InternalVerifier, Key, Principal, TokenVerifier


class JwksEndpoint(httpx2.AsyncBaseTransport):
    """An issuer's JWKS endpoint.

    Attributes:
        answer: a document, or a complete response.
        calls: number of requests.
        unavailable: whether connections are refused.
        called: set at each call.
        open: responses wait for it.
    """

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.calls = 0
        self.unavailable = False
        self.called = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.calls += 1
        self.called.set()
        await self.open.wait()
        if self.unavailable:
            raise httpx2.ConnectError("refused", request=request)
        return self.answer if isinstance(self.answer, httpx2.Response) else httpx2.Response(200, json=self.answer)


class Issuer:
    """Creates valid tokens, or invalid ones with a changed claim or header.

    Attributes:
        settings: accept this issuer, whose keys are at `jwt_jwks_url`.
    """

    def __init__(self, kid: str = "key-1") -> None:
        self.kid = kid
        self.private_key = Ed25519PrivateKey.generate()
        self.settings = AuthSettings(
            jwt_issuer="https://issuer.test",
            jwt_audience="scanfleet",
            jwt_jwks_url="https://issuer.test/jwks",
        )

    @property
    def verifier(self) -> TokenVerifier:
        """A verifier with this issuer's key, without a network."""
        return TokenVerifier(self.settings, FixedKeys(Key(self.private_key.public_key(), ("EdDSA", "Ed25519"))))

    @property
    def jwks(self) -> dict[str, Any]:
        public = json.loads(jwt.get_algorithm_by_name("EdDSA").to_jwk(self.private_key.public_key()))
        return {"keys": [{**public, "kid": self.kid, "use": "sig", "alg": "EdDSA"}]}

    def claims(self, user_id: int = 7, *, admin: bool = False, **changed: Any) -> dict[str, Any]:
        """Return the claims of a token that is valid for five minutes; a claim changed to None is omitted."""
        now = int(time.time())
        claims = {
            "iss": self.settings.jwt_issuer,
            "aud": self.settings.jwt_audience,
            "sub": str(user_id),
            "iat": now,
            "exp": now + 300,
            "roles": ["admin"] if admin else [],
        } | changed
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self,
        user_id: int = 7,
        *,
        admin: bool = False,
        headers: dict[str, Any] | None = None,
        **changed: Any,
    ) -> str:
        return self.sign(json.dumps(self.claims(user_id, admin=admin, **changed)).encode(), headers)

    def sign(self, payload: bytes, headers: dict[str, Any] | None = None) -> str:
        """Sign any payload: libraries refuse to create most tokens of an attacker."""
        header = json.dumps({"alg": "EdDSA", "typ": "JWT", "kid": self.kid} | (headers or {})).encode()
        signed = _segment(header) + b"." + _segment(payload)
        return (signed + b"." + _segment(self.private_key.sign(signed))).decode()

    def bearer(self, user_id: int = 7, *, admin: bool = False) -> dict[str, str]:
        """Return the headers of a valid request."""
        return {"Authorization": f"Bearer {self.token(user_id, admin=admin)}"}


class InternalKeys:
    """The gateway's key pair, in two files.

    Attributes:
        key_file: private key, for the gateway.
        public_keys_file: public key, for the services behind the gateway.
    """

    def __init__(self, folder: Path) -> None:
        self.private_key = Ed25519PrivateKey.generate()
        self.key_file = folder / "internal.pem"
        self.key_file.write_bytes(self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.public_keys_file = folder / "internal-public.pem"
        public_key = self.private_key.public_key()
        self.public_keys_file.write_bytes(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def bearer(self, audience: str, user_id: int = 7, *, admin: bool = False) -> dict[str, str]:
        """Return the headers of a request that the gateway sends for this user."""
        return {"Authorization": InternalTokens(self.private_key, audience).bearer(Principal(user_id, admin=admin))}

    async def caller(self, audience: str, authorization: str) -> Principal:
        """Return the caller that the service `audience` sees.

        Raises:
            UnauthorizedError: that service would refuse the token.
        """
        verifier = InternalVerifier([self.private_key.public_key()], audience)
        return await verifier.verify(authorization.removeprefix("Bearer "))


def _segment(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
