"""Tokens and key sets in the shapes that identity providers give them; what is refused is refused by name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import capture_logs

from scanfleet.errors import ConfigurationError, UnauthorizedError, UnavailableError
from scanfleet.runtime.settings import AuthSettings
from scanfleet.security.auth import Principal, TokenVerifier, open_verifier
from scanfleet.security.auth.keys import _FetchError, _from_jwks
from scanfleet_testing.tokens import Issuer, JwksEndpoint

PRIVATE_KEYS: dict[str, Any] = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "short RSA": rsa.generate_private_key(65537, 1024),  # noqa: S505 # that is the claim
    "EC": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "OKP": ed25519.Ed25519PrivateKey.generate(),
}
ISSUER = Issuer()
ALGORITHMS = {"RSA": "RS256", "short RSA": "RS256", "EC": "ES256", "P-384": "ES384", "OKP": "EdDSA"}


def jwk(kind: str, **members: Any) -> dict[str, Any]:
    """The public key of this kind with these members more."""
    algorithm = jwt.get_algorithm_by_name(ALGORITHMS[kind])
    return {**json.loads(algorithm.to_jwk(PRIVATE_KEYS[kind].public_key())), **members}


@asynccontextmanager
async def verifying(answer: object, **changed: Any) -> AsyncIterator[TokenVerifier]:
    """A verifier that fetches this from its JWKS URL."""
    changed_settings = AuthSettings.model_validate(Issuer().settings.model_dump() | changed)
    async with open_verifier(changed_settings, transport=JwksEndpoint(answer)) as verifier:
        yield verifier


def sign(kind: str, algorithm: str = "", **changed: Any) -> str:
    """A good token by the key of this kind."""
    return jwt.encode(
        Issuer().claims(**changed),
        PRIVATE_KEYS[kind],
        algorithm or ALGORITHMS[kind],
        headers={"kid": "k"},
    )


def with_settings(issuer: Issuer, **changed: Any) -> TokenVerifier:
    """Accepts the issuer's tokens under changed settings."""
    return TokenVerifier(issuer.settings.model_copy(update=changed), issuer.verifier._keys)


ROLES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a list": ("roles", {"roles": ["user", "admin"]}, True),
    "a list without it": ("roles", {"roles": ["administrator", 7, None, ["admin"]]}, False),
    "one string": ("roles", {"roles": "admin"}, True),
    "another string": ("roles", {"roles": "user"}, False),
    "a string that mentions it": ("roles", {"roles": "no admin"}, False),
    "null": ("roles", {"roles": None, "scope": "admin"}, False),
    "nothing": ("roles", {"roles": None}, False),
    "a number": ("roles", {"roles": 7}, False),
    "an object": ("roles", {"roles": {"admin": {"org": "example.test"}}}, True),
    "an object that denies it": ("roles", {"roles": {"admin": False}}, False),
    "an empty object": ("roles", {"roles": {}}, False),
    "a path": ("realm_access.roles", {"realm_access": {"roles": ["admin"]}}, True),
    "a path to nothing": ("realm_access.roles", {"realm_access": {"other": ["admin"]}}, False),
    "a path through a list": ("realm_access.roles", {"realm_access": ["roles"]}, False),
    "a client whose name has dots": (
        "resource_access.scan.example.test.roles",
        {"resource_access": {"scan.example.test": {"roles": ["admin"]}}},
        True,
    ),
    "a URL": ("https://example.test/roles", {"https://example.test/roles": ["admin"]}, True),
    "a URL before a path": (
        "https://example.test/roles",
        {"https://example": {"test/roles": ["admin"]}, "https://example.test/roles": []},
        False,
    ),
    "the words of a scope": ("scope", {"scope": "openid admin profile"}, True),
    "a scope without it": ("scope", {"scope": "openid administer"}, False),
    "scp": ("scp", {"scp": "admin"}, True),
}


@pytest.mark.parametrize(("claim", "claims", "admin"), ROLES.values(), ids=ROLES)
async def test_roles_of_every_shape_are_read(claim: str, claims: dict[str, Any], *, admin: bool) -> None:
    """A role counts in every shape that holds it and in no other, and no shape locks an ordinary user out."""
    issuer = Issuer()
    token = issuer.token(**({"roles": None} | claims))
    assert await with_settings(issuer, jwt_roles_claim=claim).verify(token) == Principal(7, admin=admin)


@pytest.mark.parametrize(
    ("claim", "claims"),
    [
        ("uid", {"uid": 9}),
        ("uid", {"uid": "9"}),
        ("sub", {"sub": 9}),
        ("profile.number", {"profile": {"number": 9}}),
        ("https://example.test/user_id", {"https://example.test/user_id": 9}),
    ],
)
async def test_user_id_is_a_number_or_string_at_any_path(claim: str, claims: dict[str, Any]) -> None:
    """A user id is read from a number or a string, at the top level or at a path."""
    issuer = Issuer()
    verifier = with_settings(issuer, jwt_user_claim=claim)
    assert (await verifier.verify(issuer.token(**({"sub": "someone"} | claims)))).user_id == 9


async def test_200_groups_fit() -> None:
    """A token with the most groups that Entra puts into one is accepted, and a longer one than configured is not."""
    issuer = Issuer()
    token = issuer.token(groups=[f"{number:08x}-aaaa-bbbb-cccc-dddddddddddd" for number in range(200)])
    assert len(token) > 10_000
    assert (await issuer.verifier.verify(token)).user_id == 7
    with pytest.raises(UnauthorizedError):
        await with_settings(issuer, jwt_max_chars=10_000).verify(token)


TYPES: dict[str, tuple[Any, bool]] = {
    "JWT": ("JWT", True),
    "lower case": ("jwt", True),
    "an access token": ("at+jwt", True),
    "a media type": ("application/at+jwt", True),
    "none": (None, True),
    "a logout token": ("logout+jwt", False),
    "a security event": ("secevent+jwt", False),
    "a proof of possession": ("dpop+jwt", False),
    "no string": (["JWT"], False),
    "empty": ("", False),
}


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize(("type_", "good"), TYPES.values(), ids=TYPES)
async def test_token_of_another_type_is_refused(type_: Any, *, good: bool) -> None:
    """If `typ` is present it must be an accepted one, in any case."""
    issuer = Issuer()
    token = issuer.token(headers={"typ": type_})
    if good:
        assert (await issuer.verifier.verify(token)).user_id == 7
    else:
        with pytest.raises(UnauthorizedError) as caught:
            await issuer.verifier.verify(token)
        assert caught.value.reason == "header typ is not an accepted token type"


async def test_types_are_a_setting() -> None:
    """With other types configured, only those are accepted."""
    issuer = Issuer()
    verifier = with_settings(issuer, jwt_types=("at+jwt",))
    assert (await verifier.verify(issuer.token(headers={"typ": "AT+JWT"}))).user_id == 7
    with pytest.raises(UnauthorizedError):
        await verifier.verify(issuer.token(headers={"typ": "JWT"}))


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no exp": ({"exp": None}, {}, "exp is missing"),
    "ended": ({"iat": 1, "exp": 2}, {}, "exp is in the past"),
    "too long": ({"iat": 1}, {}, "exp is more than 86400 s after iat"),
    "made later": ({"iat": 4_000_000_000, "exp": 4_000_000_100}, {}, "iat is in the future"),
    "good later": ({"nbf": 4_000_000_000}, {}, "nbf is in the future"),
    "a time in a string": ({"exp": "4000000000"}, {}, "exp is not a number"),
    "another issuer": ({"iss": "https://secret.test"}, {}, "iss is not the configured issuer"),
    "another audience": ({"aud": "secret"}, {}, "aud does not contain the configured audience"),
    "a UUID": ({"sub": "0f8fad5b-secret"}, {}, "sub is not an integer from 1 to 9007199254740991"),
    "bound to a key": ({"cnf": {"jkt": "secret"}}, {}, "cnf binds the token to a key, which is not verified"),
    "an event": ({"events": {"secret": {}}}, {}, "events belongs to an event, not a caller"),
    "an unknown key": ({}, {"kid": "secret"}, "header kid and alg match no key of the issuer"),
    "a key of its own": ({}, {"jku": "https://secret.test"}, "header jku is not accepted"),
    "another type": ({}, {"typ": "secret"}, "header typ is not an accepted token type"),
}


@pytest.mark.proves("A28", "A7", "G14")
@pytest.mark.parametrize(("claims", "headers", "reason"), REASONS.values(), ids=REASONS)
async def test_refusal_names_the_claim_but_not_its_value(
    claims: dict[str, Any], headers: dict[str, Any], reason: str
) -> None:
    """The logs have the claim and the reason; the caller gets neither, and the value is in none of them."""
    issuer = Issuer()
    async with verifying(issuer.jwks) as verifier:
        with capture_logs() as logs, pytest.raises(UnauthorizedError) as caught:
            await verifier.verify(issuer.token(headers=headers, **claims))
    assert caught.value.reason == reason
    assert caught.value.message in {"the token is not valid", "the token has expired"}
    [line] = logs
    assert f"{line['part']} {line['reason']}" == reason
    assert "secret" not in json.dumps(logs)


async def test_keys_with_the_same_id_are_selected_by_algorithm() -> None:
    """Among keys with the same id, the token's algorithm selects."""
    keys = {"keys": [jwk("RSA", kid="k", alg="RS256"), jwk("EC", kid="k"), jwk("RSA", kid="k", alg="PS256")]}
    async with verifying(keys) as verifier:
        for token in (sign("RSA", "RS256"), sign("RSA", "PS256"), sign("EC")):
            assert (await verifier.verify(token)).user_id == 7
        with pytest.raises(UnauthorizedError):
            await verifier.verify(sign("OKP"))


@pytest.mark.parametrize("kinds", [("short RSA", "RSA"), ("RSA", "short RSA")])
async def test_short_rsa_key_refuses_no_token_of_another_key(kinds: tuple[str, str]) -> None:
    """Beside an RSA key below 2,048 bits with the same id, the tokens of another key are accepted."""
    async with verifying({"keys": [jwk(kind, kid="k") for kind in kinds]}) as verifier:
        assert (await verifier.verify(sign("RSA"))).user_id == 7


async def test_members_of_null_are_absent() -> None:
    """A key whose optional members are null is used like one without them."""
    nulls = dict.fromkeys(("alg", "use", "d", "key_ops", "x5c", "kid"))
    async with verifying({"keys": [jwk("RSA") | nulls]}) as verifier:
        assert (await verifier.verify(sign("RSA"))).user_id == 7


async def test_keys_without_ids_are_tried_by_algorithm() -> None:
    """If keys have no id, a token that one of them signed is valid, whatever id it names."""
    async with verifying({"keys": [jwk("EC"), jwk("OKP"), jwk("RSA")]}) as verifier:
        for kind in ("RSA", "EC", "OKP"):
            assert (await verifier.verify(sign(kind))).user_id == 7


@pytest.mark.parametrize("published", [None, "EdDSA", "Ed25519"])
@pytest.mark.parametrize("named", ["EdDSA", "Ed25519"])
async def test_both_names_of_ed25519_are_accepted(published: str | None, named: str) -> None:
    """A key and a token may each call the algorithm EdDSA or Ed25519."""
    issuer = Issuer()
    [key] = issuer.jwks["keys"]
    async with verifying({"keys": [key | {"alg": published}]}) as verifier:
        assert (await verifier.verify(issuer.token(headers={"alg": named}))).user_id == 7


MISTAKES: dict[str, tuple[object, str]] = {
    "no such page": (httpx2.Response(404), "answered 404"),
    "a redirect": (httpx2.Response(302, headers={"Location": "https://other.test"}), "answered 302"),
    "HTML": (httpx2.Response(200, html="<html>"), "not JSON"),
    "no key set": ({"issuer": "https://issuer.test"}, "not a key set"),
}


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize(("answer", "reason"), MISTAKES.values(), ids=MISTAKES)
async def test_wrong_jwks_url_is_a_configuration_error(answer: object, reason: str) -> None:
    """A wrong JWKS URL is reported at start and by the readiness check, without a short Retry-After for callers."""
    with capture_logs() as logs:
        async with verifying(answer) as verifier:
            assert [line["log_level"] for line in logs] == ["error", "critical"]
            with pytest.raises(ConfigurationError, match=reason):
                await verifier.check()
            with pytest.raises(UnavailableError, match="configured") as caught:
                await verifier.verify(Issuer().token())
    assert caught.value.headers == {"Retry-After": "60"}


@pytest.mark.parametrize(
    "key",
    [jwk("RSA", alg="RS512"), jwk("P-384"), jwk("RSA", use="enc"), jwk("short RSA"), {"kty": "oct", "k": "AAAA"}],
)
async def test_key_set_without_an_allowed_algorithm_is_reported(key: dict[str, Any]) -> None:
    """If no key is for an allowed algorithm, readiness names it and tokens are refused: a retry cannot help."""
    async with verifying({"keys": [key]}) as verifier:
        with pytest.raises(ConfigurationError, match="for an allowed algorithm"):
            await verifier.check()
        with pytest.raises(UnauthorizedError) as caught:
            await verifier.verify(Issuer().token())
    assert caught.value.reason.startswith("header alg no key of the JWKS is for an allowed algorithm (RS256, PS256,")


async def test_unavailable_jwks_url_is_a_dependency_failure() -> None:
    """A temporarily failing endpoint is not a configuration error: callers may retry soon."""
    for answer in (httpx2.Response(500), httpx2.Response(429), httpx2.Response(408)):
        async with verifying(answer) as verifier:
            with pytest.raises(UnavailableError) as caught:
                await verifier.verify(Issuer().token())
            assert caught.value.headers == {"Retry-After": "1"}


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://issuer.test/jwks", True),
        ("http://127.0.0.1:9/jwks", True),
        ("http://[::1]:9/jwks", True),
        ("http://localhost/jwks", True),
        ("http://issuer.test/jwks", False),
        ("http://127.0.0.1.issuer.test/jwks", False),
        ("http://10.0.0.1/jwks", False),
        ("http://localhost.issuer.test/jwks", False),
    ],
)
def test_jwks_url_without_https_is_refused(url: str, *, good: bool) -> None:
    """A JWKS URL without TLS is refused unless it is on this machine."""
    given_settings = {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": url}
    if good:
        AuthSettings.model_validate(given_settings)
    else:
        with pytest.raises(ValidationError, match="https"):
            AuthSettings.model_validate(given_settings)


def test_keys_cannot_end_before_they_are_fetched_again() -> None:
    """A greatest age below the age at which keys are fetched again is refused."""
    with pytest.raises(ValidationError, match="MAX_STALE"):
        AuthSettings.model_validate(Issuer().settings.model_dump() | {"jwt_jwks_max_stale_seconds": 299})


TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too, which JSON can escape
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
JWK = st.dictionaries(
    st.sampled_from(["kty", "kid", "alg", "use", "crv", "n", "e", "x", "y", "k", "d"]),
    JSON | st.sampled_from(["RSA", "EC", "OKP", "oct", "P-256", "Ed25519", "AQAB"]),
    max_size=7,
)
NAMES = ["iss", "aud", "sub", "iat", "exp", "nbf", "jti", "roles", "cnf", "events", "scope"]
HEADERS = ["alg", "kid", "typ", "crit", "jku", "x5c", "b64", "zip"]


@pytest.mark.proves("A7")
@pytest.mark.parametrize(
    ("claim", "good"), [("jti", True), ("roles", True), ("sub", False), ("aud", False), ("iss", False)]
)
async def test_lone_surrogate_causes_no_internal_error(claim: str, *, good: bool) -> None:
    """Text that is valid in JSON but not in UTF-8 is refused, or harmless where any text is allowed."""
    changed: dict[str, Any] = {claim: "\ud800"}
    token = ISSUER.token(**changed)
    if good:
        assert (await ISSUER.verifier.verify(token)).user_id == 7
    else:
        with pytest.raises(UnauthorizedError):
            await ISSUER.verifier.verify(token)


@pytest.mark.proves("A7", "A28", "G14")
@settings(max_examples=150, deadline=None)
@given(
    claims=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
    headers=st.dictionaries(st.sampled_from(HEADERS), JSON, max_size=3),
    user_claim=st.sampled_from(["sub", "roles", "a.b", "jti"]),
)
async def test_token_of_any_shape_causes_no_internal_error(
    claims: dict[str, Any], headers: dict[str, Any], user_claim: str
) -> None:
    """A signed token with any JSON in any place is accepted or refused."""
    issuer = ISSUER
    verifier = with_settings(issuer, jwt_user_claim=user_claim, jwt_roles_claim="roles")
    good = issuer.claims() | claims
    token = issuer.sign(json.dumps(good).encode(), headers)
    with suppress(UnauthorizedError):
        assert (await verifier.verify(token)).user_id > 0


@settings(max_examples=150, deadline=None)
@given(document=JSON | st.fixed_dictionaries({"keys": st.lists(JSON | JWK, max_size=3)}))
async def test_key_set_of_any_shape_causes_no_internal_error(document: Any) -> None:
    """Any JSON from the JWKS URL yields some usable keys or none."""
    with suppress(_FetchError):
        assert _from_jwks(document, ("RS256", "ES256", "EdDSA"))
