"""The recipes of docs/identity-providers.md, with tokens and keys in each provider's shape, signed by our own keys."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from scanfleet.errors import UnauthorizedError
from scanfleet.runtime.settings import AuthSettings
from scanfleet.security.auth import Principal, open_verifier
from scanfleet_testing.tokens import JwksEndpoint

PAGE = Path(__file__).parents[3] / "docs" / "identity-providers.md"
ASSIGNED = 41
SIGNING = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
NOW = int(time.time())
TENANT = "11111111-2222-3333-4444-555555555555"


def public(key: RSAPrivateKey, **members: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(key.public_key()))
    return {name: found[name] for name in ("kty", "n", "e")} | members


# By provider: the header, the claims of a user, what an administrator's have more, and the key set.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "Keycloak": (
        {"typ": "JWT", "kid": "k1"},
        {
            "exp": NOW + 300,
            "iat": NOW,
            "jti": "onrtro:0d1e7c4f-0a2f-4d8e-9c0b-3f1c2b7a5d11",
            "iss": "https://id.example.com/realms/example",
            "aud": ["scanfleet", "account"],
            "sub": "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
            "typ": "Bearer",
            "azp": "console",
            "sid": "3b0b1a3c-58a5-4d3f-8d0a-1f6f5b1f2f10",
            "acr": "1",
            "allowed-origins": ["https://console.example.com"],
            "realm_access": {"roles": ["offline_access", "default-roles-example"]},
            "resource_access": {"account": {"roles": ["manage-account"]}},
            "scope": "email profile",
            "email_verified": True,
            "preferred_username": "user",
        },
        {"realm_access": {"roles": ["offline_access", "scanfleet-admin"]}},
        [
            public(OTHER, kid="k2", alg="RSA-OAEP", use="enc", x5c=["MIIC"], x5t="x"),
            public(SIGNING, kid="k1", alg="RS256", use="sig", x5c=["MIIC"], x5t="x"),
        ],
    ),
    "Entra": (
        {"typ": "JWT", "kid": "k1"},
        {
            "aud": "66666666-7777-8888-9999-000000000000",
            "iss": f"https://login.microsoftonline.com/{TENANT}/v2.0",
            "iat": NOW,
            "nbf": NOW,
            "exp": NOW + 28 * 3_600,
            "aio": "AXQAi/8TAAAA",
            "azp": "99999999-0000-1111-2222-333333333333",
            "azpacr": "0",
            "groups": [f"{number:08x}-aaaa-bbbb-cccc-dddddddddddd" for number in range(200)],
            "oid": "0f8fad5b-d9cb-469f-a165-70867728950e",
            "rh": "0.AXoA",
            "scp": "scan",
            "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ",
            "tid": TENANT,
            "uti": "aBcDeFgHiJkLmNoPqRsTuV",
            "ver": "2.0",
            "xms_cc": ["CP1"],
        },
        {"roles": ["scanfleet-admin"]},
        [
            public(
                OTHER,
                use="sig",
                kid="k0",
                x5t="k0",
                x5c=["MIIC"],
                issuer="https://login.microsoftonline.com/{tenantid}",
            ),
            public(SIGNING, use="sig", kid="k1", x5t="k1", x5c=["MIIC"], cloud_instance_name="microsoftonline.com"),
        ],
    ),
    "Auth0": (
        {"typ": "at+jwt", "kid": "k1"},
        {
            "https://scanfleet.example.com/roles": [],
            "iss": "https://example.eu.auth0.com/",
            "sub": "auth0|65f0c0ffee0123456789abcd",
            "aud": ["https://scanfleet.example.com", "https://example.eu.auth0.com/userinfo"],
            "iat": NOW,
            "exp": NOW + 86_400,
            "scope": "openid profile",
            "jti": "MVrzJ2k3wC9q",
            "client_id": "a1b2c3",
            "permissions": [],
        },
        {"https://scanfleet.example.com/roles": ["scanfleet-admin"]},
        [
            public(SIGNING, use="sig", kid="k1", x5t="x", x5c=["MIIC"], alg="RS256"),
            public(OTHER, use="sig", kid="k2", x5t="x", x5c=["MIIC"], alg="RS256"),
        ],
    ),
    "Cognito": (
        {"typ": None, "kid": "k1"},
        {
            "sub": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "iss": "https://cognito-idp.eu-central-1.amazonaws.com/eu-central-1_Example",
            "client_id": "1example23456789",
            "origin_jti": "dddddddd-0000-0000-0000-000000000000",
            "event_id": "64f513be-32db-42b0-b78e-b02127b4f463",
            "token_use": "access",
            "scope": "aws.cognito.signin.user.admin",
            "auth_time": NOW,
            "exp": NOW + 3_600,
            "iat": NOW,
            "jti": "eeeeeeee-0000-0000-0000-000000000000",
            "username": "user",
        },
        {"cognito:groups": ["scanfleet-admin"]},
        [
            public(OTHER, alg="RS256", kid="k0", use="sig"),
            public(SIGNING, alg="RS256", kid="k1", use="sig"),
        ],
    ),
    "Google": (
        {"typ": "JWT", "kid": "k1"},
        {
            "iss": "https://accounts.google.com",
            "azp": "1234567890-example.apps.googleusercontent.com",
            "aud": "1234567890-example.apps.googleusercontent.com",
            "sub": "110169484474386270000",
            "hd": "example.com",
            "email": "user@example.com",
            "email_verified": True,
            "at_hash": "HK6E_P6Dh8Y93mRNtsDB1Q",
            "nonce": "0394852-3190485-2490358",
            "iat": NOW,
            "exp": NOW + 3_600,
        },
        {"sub": "110169484474386276334"},
        [
            public(SIGNING, use="sig", alg="RS256", kid="k1"),
            public(OTHER, use="sig", alg="RS256", kid="k2"),
        ],
    ),
}


class Users:
    """Assigns one id, and keeps the names that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def user_id(self, issuer: str, subject: str) -> int:
        self.asked.append((issuer, subject))
        return ASSIGNED


def recipes() -> dict[str, dict[str, str]]:
    """The variables on the page, by provider."""
    sections = [part.split("\n", 1) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]]
    blocks = {title: re.search(r"```sh\n(SCANFLEET_JWT_.*?)```", body, re.DOTALL) for title, body in sections}
    return {
        title: dict(line.split("=", 1) for line in block[1].splitlines()) for title, block in blocks.items() if block
    }


def settings(variables: Mapping[str, str]) -> AuthSettings:
    with mock.patch.dict(os.environ, variables, clear=True):
        return AuthSettings()


def token(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """Return a token that was issued now: a run of tests may take longer than a token lives."""
    late = int(time.time()) - NOW
    times = {name: claims[name] + late for name in ("auth_time", "iat", "nbf", "exp") if name in claims}
    return jwt.encode(claims | times, SIGNING, "RS256", headers=header)


def test_page_has_a_recipe_for_each_provider() -> None:
    """The page has a recipe for each provider of these tests, and for no other."""
    assert recipes().keys() == SHAPES.keys()


@pytest.mark.parametrize("provider", SHAPES)
async def test_recipe_accepts_the_providers_tokens(provider: str) -> None:
    """With the page's settings, users and administrators of the provider are accepted, under assigned ids."""
    header, claims, admins, keys = SHAPES[provider]
    users = Users()
    async with open_verifier(
        settings(recipes()[provider]), users=users, transport=JwksEndpoint({"keys": keys})
    ) as verifier:
        await verifier.check()
        assert await verifier.verify(token(header, claims)) == Principal(ASSIGNED)
        assert await verifier.verify(token(header, claims | admins)) == Principal(ASSIGNED, admin=True)
    assert users.asked == [(claims["iss"], claims["sub"]), (claims["iss"], (claims | admins)["sub"])]


@pytest.mark.parametrize("provider", SHAPES)
async def test_recipe_refuses_other_audiences(provider: str) -> None:
    """A token of the same provider for another application is refused."""
    header, claims, _, keys = SHAPES[provider]
    recipe = recipes()[provider]
    claim = recipe.get("SCANFLEET_JWT_AUDIENCE_CLAIM", "aud")
    async with open_verifier(settings(recipe), users=Users(), transport=JwksEndpoint({"keys": keys})) as verifier:
        with pytest.raises(UnauthorizedError) as caught:
            await verifier.verify(token(header, claims | {claim: "another"}))
    assert caught.value.reason == f"{claim} does not contain the configured audience"


@pytest.mark.parametrize("provider", SHAPES)
async def test_recipe_without_mapped_ids_names_the_reason(provider: str) -> None:
    """No provider's `sub` is a user id; without `mapped` the error names the reason."""
    header, claims, _, keys = SHAPES[provider]
    recipe = recipes()[provider] | {"SCANFLEET_JWT_USER_IDS": "claim"}
    async with open_verifier(settings(recipe), transport=JwksEndpoint({"keys": keys})) as verifier:
        with pytest.raises(UnauthorizedError) as caught:
            await verifier.verify(token(header, claims))
    assert caught.value.reason == "sub is not an integer from 1 to 9007199254740991"


async def test_entra_without_its_longer_life_is_refused() -> None:
    """Entra's longest tokens need the setting that the page names."""
    header, claims, _, keys = SHAPES["Entra"]
    recipe = recipes()["Entra"]
    del recipe["SCANFLEET_JWT_MAX_LIFE_SECONDS"]
    async with open_verifier(settings(recipe), users=Users(), transport=JwksEndpoint({"keys": keys})) as verifier:
        with pytest.raises(UnauthorizedError) as caught:
            await verifier.verify(token(header, claims))
    assert caught.value.reason == "exp is more than 86400 s after iat"
