"""Authentication of callers by bearer tokens (JWT)."""

from __future__ import annotations

from scanfleet.security.auth.internal import (
    THE_GATEWAY,
    InternalTokens,
    InternalVerifier,
    read_private_key,
    read_public_keys,
)
from scanfleet.security.auth.keys import FixedKeys, JwksKeys, Key, Keys
from scanfleet.security.auth.principal import Principal
from scanfleet.security.auth.routes import (
    AuthenticatedRoute,
    Caller,
    GatewayRoute,
    Sessions,
    authenticate,
    bearer_token,
    for_gateway,
)
from scanfleet.security.auth.verifier import Revoked, TokenVerifier, Users, Verifier, open_verifier

__all__ = [
    "THE_GATEWAY",
    "AuthenticatedRoute",
    "Caller",
    "FixedKeys",
    "GatewayRoute",
    "InternalTokens",
    "InternalVerifier",
    "JwksKeys",
    "Key",
    "Keys",
    "Principal",
    "Revoked",
    "Sessions",
    "TokenVerifier",
    "Users",
    "Verifier",
    "authenticate",
    "bearer_token",
    "for_gateway",
    "open_verifier",
    "read_private_key",
    "read_public_keys",
]
