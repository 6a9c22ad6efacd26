"""Internal tokens: made by the gateway for one service, good for a minute."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from scanfleet.errors import BadRequestError, UnauthorizedError
from scanfleet.security.auth import (
    THE_GATEWAY,
    InternalTokens,
    InternalVerifier,
    Principal,
    read_private_key,
    read_public_keys,
)
from scanfleet.security.auth.internal import (
    ISSUER,
    LEEWAY_SECONDS,
    LIFE_SECONDS,
    MAX_CHARS,
    MAX_ROLES_CHARS,
    MAX_SIGNED,
    REUSE_SECONDS,
    TYPE,
)
from scanfleet_testing.tokens import InternalKeys, Issuer

pytestmark = pytest.mark.proves("G14")

KEY = Ed25519PrivateKey.generate()
CALLER = Principal(7, admin=True, token_hash="0123456789abcdef")  # noqa: S106 # a hash


class Time:
    """The gateway's clock."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def text(bearer: str) -> str:
    return bearer.removeprefix("Bearer ")


async def verify(bearer: str, *keys: Ed25519PrivateKey, audience: str = "result-store") -> Principal:
    return await InternalVerifier([key.public_key() for key in keys or [KEY]], audience).verify(text(bearer))


async def test_token_identifies_the_caller() -> None:
    """A token has the user id, the role and the hash of the caller's own token, and no other data of the caller."""
    bearer = InternalTokens(KEY, "result-store").bearer(CALLER)
    found = await verify(bearer)
    assert (found, found.token_hash) == (CALLER, CALLER.token_hash)
    claims = jwt.decode(text(bearer), options={"verify_signature": False})
    assert claims.keys() == {"iss", "aud", "sub", "roles", "token_hash", "iat", "exp"}
    assert claims["exp"] - claims["iat"] == LIFE_SECONDS
    assert await verify(InternalTokens(KEY, "result-store").bearer(THE_GATEWAY)) == THE_GATEWAY


async def test_token_with_roles_carries_those_that_grants_name() -> None:
    """A token has the caller's roles only on request, and a token without them is of a caller without roles."""
    caller = Principal(7, roles=frozenset({"ops", "night"}), token_hash=CALLER.token_hash)
    tokens = InternalTokens(KEY, "result-store")
    assert (await verify(tokens.bearer(caller, with_roles=True))).roles == {"ops", "night"}
    assert (await verify(tokens.bearer(caller))).roles == frozenset()


async def test_token_with_the_longest_roles_is_accepted_and_longer_ones_are_refused() -> None:
    """The longest claim fits into the limit of a token; beyond it the caller reads the limit."""
    tokens = InternalTokens(KEY, "result-store")
    around = len('{"grant_roles": [""]}')
    longest = Principal(2**53 - 1, admin=True, roles=frozenset({"x" * (MAX_ROLES_CHARS - around)}), token_hash="f" * 16)
    bearer = tokens.bearer(longest, with_roles=True)
    assert len(text(bearer)) <= MAX_CHARS
    assert (await verify(bearer)).roles == longest.roles
    longer = Principal(7, roles=frozenset({"x" * (MAX_ROLES_CHARS - around + 1)}))
    with pytest.raises(BadRequestError, match=f"{MAX_ROLES_CHARS + 1} characters, and the limit is {MAX_ROLES_CHARS}"):
        tokens.bearer(longer, with_roles=True)


@pytest.mark.proves("A7")
async def test_token_for_another_service_is_refused() -> None:
    """A token for one service is refused by another."""
    bearer = InternalTokens(KEY, "result-store").bearer(CALLER)
    with pytest.raises(UnauthorizedError) as caught:
        await verify(bearer, audience="job-orchestrator")
    assert caught.value.reason == "aud does not contain the configured audience"


@pytest.mark.proves("A7")
async def test_token_expires_after_a_minute() -> None:
    """A token is refused a minute after its creation, plus the allowed clock difference."""
    clock = Time()
    for age, good in (
        (LIFE_SECONDS + LEEWAY_SECONDS - 2, True),
        (LIFE_SECONDS + LEEWAY_SECONDS + 2, False),
        (-LEEWAY_SECONDS - 2, False),
    ):
        clock.now = time.time() - age
        bearer = InternalTokens(KEY, "result-store", clock=clock).bearer(CALLER)
        if good:
            assert await verify(bearer) == CALLER
        else:
            with pytest.raises(UnauthorizedError):
                await verify(bearer)


CLAIMS: dict[str, dict[str, Any]] = {
    "a longer life": {"exp": 10_000_000_000},
    "a user in words": {"sub": "admin"},
    "no user": {"sub": None},
    "no hash": {"token_hash": None},
    "the issuer of users": {"iss": "https://issuer.test"},
}


@pytest.mark.proves("A7")
@pytest.mark.parametrize("changed", CLAIMS.values(), ids=CLAIMS)
async def test_verifier_refuses_other_claims(changed: dict[str, Any]) -> None:
    """A token signed with the gateway's key is refused if its claims are not those of the gateway."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": "result-store", "sub": "7", "token_hash": "", "iat": now, "exp": now + LIFE_SECONDS}
    good = jwt.encode(claims, KEY, "EdDSA", headers={"typ": TYPE})
    assert await verify(good) == Principal(7)
    wrong = {name: value for name, value in (claims | changed).items() if value is not None}
    with pytest.raises(UnauthorizedError):
        await verify(jwt.encode(wrong, KEY, "EdDSA", headers={"typ": TYPE}))


@pytest.mark.proves("A7")
async def test_verifier_refuses_tokens_of_other_keys_and_types() -> None:
    """Tokens by other keys, of the users' issuer, of another type or without a signature are refused."""
    issuer = Issuer()
    claims = {
        "iss": ISSUER,
        "aud": "result-store",
        "sub": "7",
        "token_hash": "",
        "iat": time.time(),
        "exp": time.time() + 30,
    }
    unsigned = jwt.encode(claims, None, "none")  # type: ignore[arg-type] # no key is the point
    for forged in (
        issuer.token(),
        issuer.sign(json.dumps(claims).encode(), {"typ": TYPE}),
        jwt.encode(claims, KEY, "EdDSA", headers={"typ": "JWT"}),
        unsigned,
    ):
        with pytest.raises(UnauthorizedError):
            await verify(forged)


async def test_token_is_reused_for_requests_of_one_caller() -> None:
    """Requests of one caller share a token for some seconds; other callers, services and times get others."""
    clock = Time()
    tokens = InternalTokens(KEY, "result-store", clock=clock)
    first = tokens.bearer(CALLER)
    clock.now += REUSE_SECONDS - 1
    assert tokens.bearer(CALLER) == first
    others = {
        tokens.bearer(Principal(8, admin=True, token_hash=CALLER.token_hash)),
        tokens.bearer(Principal(7, token_hash=CALLER.token_hash)),
        InternalTokens(KEY, "job-orchestrator", clock=clock).bearer(CALLER),
    }
    assert len(others | {first}) == 4
    clock.now += 1
    assert tokens.bearer(CALLER) != first


async def test_token_cache_is_bounded() -> None:
    """The memory of cached tokens is bounded for any number of callers."""
    tokens = InternalTokens(KEY, "result-store")
    for user in range(1, MAX_SIGNED + 3):
        tokens.bearer(Principal(user))
    assert len(tokens._signed) == MAX_SIGNED


async def test_token_costs_little_cpu_time() -> None:
    """A caller's next request costs at most 0.1 ms on both sides, a new caller's 2 ms."""
    tokens = InternalTokens(KEY, "result-store")
    verifier = InternalVerifier([KEY.public_key()], "result-store")
    await verifier.verify(text(tokens.bearer(CALLER)))
    started = time.process_time()
    for _ in range(200):
        await verifier.verify(text(tokens.bearer(CALLER)))
    assert (time.process_time() - started) / 200 < 0.0001
    started = time.process_time()
    for user in range(1, 101):
        await verifier.verify(text(tokens.bearer(Principal(user))))
    assert (time.process_time() - started) / 100 < 0.002


@pytest.mark.parametrize("hours", [-2, 2])
async def test_token_times_follow_the_services_clock(hours: int) -> None:
    """A gateway with a wrong clock creates valid tokens after the first response, also when its clock is corrected."""
    clock = Time()
    clock.now += hours * 3_600
    tokens = InternalTokens(KEY, "result-store", clock=clock)
    with pytest.raises(UnauthorizedError):
        await verify(tokens.bearer(CALLER))
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    tokens.learn(date)
    assert await verify(tokens.bearer(CALLER)) == CALLER
    clock.now = time.time()
    tokens.learn(date)
    assert await verify(tokens.bearer(CALLER)) == CALLER


@pytest.mark.parametrize(
    "date", [None, "", "yesterday", "Fri, 31 Dec 9999 23:59:59 GMT", "Thu, 01 Jan 1970 00:00:00 GMT"]
)
async def test_token_times_ignore_an_invalid_date_header(date: str | None) -> None:
    """A Date that is missing, invalid or more than a day off changes nothing."""
    tokens = InternalTokens(KEY, "result-store")
    first = tokens.bearer(CALLER)
    tokens.learn(date)
    assert tokens.bearer(CALLER) == first


async def test_keys_in_rotation_accept_old_and_new_tokens(tmp_path: Path) -> None:
    """While a service has the old and the new public key in its file it accepts tokens by both, then by the new one alone."""
    (tmp_path / "new").mkdir()
    old, new = InternalKeys(tmp_path), InternalKeys(tmp_path / "new")
    both = tmp_path / "both.pem"
    both.write_text(old.public_keys_file.read_text() + "\n" + new.public_keys_file.read_text())
    bearers = [InternalTokens(read_private_key(each.key_file), "result-store").bearer(CALLER) for each in (old, new)]
    verifier = InternalVerifier(read_public_keys(both), "result-store")
    assert [await verifier.verify(text(bearer)) for bearer in bearers] == [CALLER] * 2
    verifier = InternalVerifier(read_public_keys(new.public_keys_file), "result-store")
    assert await verifier.verify(text(bearers[1])) == CALLER
    with pytest.raises(UnauthorizedError):
        await verifier.verify(text(bearers[0]))


def test_invalid_key_file_prevents_the_start(tmp_path: Path) -> None:
    """A file without keys, with too many, of another kind or with the private key is refused by name."""
    keys = InternalKeys(tmp_path)
    other = ec.generate_private_key(ec.SECP256R1())
    public = keys.public_keys_file.read_text()
    foreign = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    file = tmp_path / "file.pem"
    for content in ("", "no key", public * 5, foreign, public + foreign, keys.key_file.read_text()):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"file\.pem|PEM"):
            read_public_keys(file)
    file.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ValueError, match=r"file\.pem"):
        read_private_key(file)
    with pytest.raises(OSError, match="missing"):
        read_public_keys(tmp_path / "missing.pem")
