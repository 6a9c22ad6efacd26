"""Parsing and validation of the claims of common identity providers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from scanfleet.contracts.messages.fields import MAX_ID, is_id
from scanfleet.security.auth.principal import RefusedError

MAX_SUBJECT_CHARS: Final = 255  # the limit of `sub` in OpenID Connect Core, section 2

_MAX_TIME: Final = 2**53
# These mark tokens that are not plain bearer access tokens: `cnf` binds a token to a key (RFC 7800), and `events`
# belongs to logout tokens and security events (RFC 8417), which the same issuer signs for the same audience.
_FOREIGN: Final = {
    "cnf": "binds the token to a key, which is not verified",
    "events": "belongs to an event, not a caller",
}
_SPACED: Final = frozenset({"scope", "scp"})  # one string of words (RFC 6749, 3.3); any other string is one role


@dataclass(frozen=True, slots=True)
class Expected:
    """The required claims of a token.

    Attributes:
        issuer: the only accepted `iss`.
        audience: value of the claim `audience_claim`, or one of its values.
        audience_claim: name of the claim, usually `aud`.
        max_life: maximum seconds between `iat` and `exp`.
        leeway: maximum clock difference to the issuer in seconds.
    """

    issuer: str
    audience: str
    max_life: int
    leeway: int
    audience_claim: str = "aud"


def find(claims: Mapping[str, Any], name: str) -> Any:
    """Return the claim with this name, or at this dot-separated path; None if there is none.

    Names may contain dots, as URLs do: a complete name takes precedence over a path.
    """
    if name in claims:
        return claims[name]
    for match in re.finditer(r"\.", name):
        inner = claims.get(name[: match.start()])
        if isinstance(inner, Mapping) and (found := find(inner, name[match.end() :])) is not None:
            return found
    return None


def check(claims: Mapping[str, Any], expected: Expected) -> None:
    """Check the registered claims (RFC 7519, 4.1) of a token with a valid signature.

    Raises:
        RefusedError: one is missing or wrong.
    """
    for name in ("iss", expected.audience_claim, "sub", "iat", "exp"):
        if find(claims, name) is None:
            raise RefusedError(name, "is missing")
    for name, reason in _FOREIGN.items():
        if claims.get(name) is not None:
            raise RefusedError(name, reason)
    if claims["iss"] != expected.issuer:
        raise RefusedError("iss", "is not the configured issuer")
    audience = find(claims, expected.audience_claim)
    if expected.audience not in (audience if isinstance(audience, list) else [audience]):
        raise RefusedError(expected.audience_claim, "does not contain the configured audience")
    _check_times(claims, expected)


def _check_times(claims: Mapping[str, Any], expected: Expected) -> None:
    times = {name: _time(claims, name) for name in ("iat", "exp", "nbf") if claims.get(name) is not None}
    now = time.time()
    if times["exp"] <= now - expected.leeway:
        raise RefusedError("exp", "is in the past", message="the token has expired")
    for name in ("iat", "nbf"):
        if times.get(name, now) > now + expected.leeway:
            raise RefusedError(name, "is in the future")
    if times["exp"] - times["iat"] > expected.max_life:
        raise RefusedError("exp", f"is more than {expected.max_life} s after iat")


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    if type(value) not in (int, float):  # a Python bool is an int
        raise RefusedError(name, "is not a number")
    if not 0 <= value < _MAX_TIME:  # also rejects NaN
        raise RefusedError(name, "is out of range")
    return float(value)


def user_id(claims: Mapping[str, Any], name: str) -> int:
    """Return the user id in this claim: an integer, or a string of digits.

    Raises:
        RefusedError: it is anything else.
    """
    value = find(claims, name)
    if value is None:
        raise RefusedError(name, "is missing")
    text = str(value) if type(value) is int and 0 < value <= MAX_ID else value
    if not isinstance(text, str) or not is_id(text):
        raise RefusedError(name, f"is not an integer from 1 to {MAX_ID}")
    return int(text)


def subject(claims: Mapping[str, Any]) -> str:
    """Return the caller's name at the issuer.

    Raises:
        RefusedError: it cannot be stored.
    """
    value = str(claims["sub"]) if type(claims["sub"]) is int else claims["sub"]
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SUBJECT_CHARS or not value.isprintable():
        raise RefusedError("sub", f"is not a printable string of 1 to {MAX_SUBJECT_CHARS} characters")
    return value


def token_id(claims: Mapping[str, Any]) -> str:
    """Return the `jti`; empty if there is none.

    Raises:
        RefusedError: it is not a string.
    """
    value = claims.get("jti")
    if value is not None and not isinstance(value, str):
        raise RefusedError("jti", "is not a string")
    return value or ""


def roles(claims: Mapping[str, Any], name: str) -> AbstractSet[str]:
    """Return the roles in this claim: a list, a string, the words of a scope or the keys of an object; else none."""
    value = find(claims, name)
    if isinstance(value, str):
        return frozenset(value.split() if re.split(r"[./]", name)[-1] in _SPACED else [value])
    if isinstance(value, Mapping):  # the value names the organisation in which the role is held
        return frozenset(role for role, held in value.items() if held not in (None, False))
    return frozenset(role for role in value if isinstance(role, str)) if isinstance(value, list) else frozenset()
