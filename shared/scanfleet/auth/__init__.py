"""Who is calling: bearer tokens (JWT), verified in one place."""

from __future__ import annotations

from scanfleet.auth.keys import FixedKeys, JwksKeys, Key, Keys
from scanfleet.auth.principal import Principal
from scanfleet.auth.routes import Caller, Guarded
from scanfleet.auth.verifier import Revoked, TokenVerifier, Users, Verifier, open_verifier

__all__ = [
    "Caller",
    "FixedKeys",
    "Guarded",
    "JwksKeys",
    "Key",
    "Keys",
    "Principal",
    "Revoked",
    "TokenVerifier",
    "Users",
    "Verifier",
    "open_verifier",
]
