"""Tokens that `scanfleet.security.auth` accepts and refuses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from scanfleet.errors import DependencyError, UnauthorizedError, UnavailableError
from scanfleet.runtime.settings import AuthSettings
from scanfleet.security.auth import JwksKeys, Principal, TokenVerifier, open_verifier
from scanfleet.security.auth.tokens import KNOWN_TOKENS
from scanfleet_testing.tokens import Issuer, JwksEndpoint

NO_ISSUER = "https://issuer.test/none"


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def segment(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def hs256(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """An HS256 token made by hand: the library refuses to sign with a public key."""
    signed = f"{segment(header)}.{segment(claims)}"
    return f"{signed}.{segment(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@asynccontextmanager
async def keys_of(endpoint: JwksEndpoint, time: Time) -> AsyncIterator[JwksKeys]:
    async with httpx2.AsyncClient(transport=endpoint) as client:
        yield JwksKeys(
            client,
            "https://issuer.test/jwks",
            algorithms=("RS256", "PS256", "ES256", "EdDSA"),
            cooldown_seconds=10,
            max_age_seconds=300,
            max_stale_seconds=14_400,
            clock=time,
        )


async def test_verifier_accepts_a_valid_token(issuer: Issuer) -> None:
    """A valid token identifies its user, who is no administrator."""
    assert await issuer.verifier.verify(issuer.token(7)) == Principal(7, admin=False)


async def test_verifier_recognises_the_administrator_role(issuer: Issuer) -> None:
    """A token whose roles contain admin is an administrator's."""
    assert await issuer.verifier.verify(issuer.token(7, admin=True)) == Principal(7, admin=True)


async def test_roles_may_be_absent(issuer: Issuer) -> None:
    """A token without roles is an ordinary user's."""
    assert await issuer.verifier.verify(issuer.token(7, roles=None)) == Principal(7, admin=False)


async def test_verifier_accepts_one_of_several_audiences(issuer: Issuer) -> None:
    """A token for several audiences is valid if the service is one of them."""
    assert (await issuer.verifier.verify(issuer.token(aud=["other", "scanfleet"]))).user_id == 7


async def test_claim_names_are_settings(issuer: Issuer) -> None:
    """The user and the role are read from the claims that the settings name."""
    settings = issuer.settings.model_copy(
        update={"jwt_user_claim": "uid", "jwt_roles_claim": "groups", "jwt_admin_role": "root"},
    )
    verifier = TokenVerifier(settings, issuer.verifier._keys)
    token = issuer.token(sub="someone", uid="9", groups=["root"])
    assert await verifier.verify(token) == Principal(9, admin=True)


BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "no exp": {"exp": None},
    "no iat": {"iat": None},
    "no sub": {"sub": None},
    "no aud": {"aud": None},
    "no iss": {"iss": None},
    "another issuer": {"iss": "https://other.test"},
    "a list of issuers": {"iss": ["https://issuer.test"]},
    "another audience": {"aud": "other"},
    "other audiences": {"aud": ["other", "another"]},
    "no audience at all": {"aud": []},
    "an audience of odd types": {"aud": [1, None]},
    "an audience in an object": {"aud": {"scanfleet": 1}},
    "an end beyond time": {"exp": 10**30},
    "an end beyond floats": {"exp": 10**400},
    "an infinite end": {"exp": float("inf")},
    "an end that is no number": {"exp": float("nan")},
    "an end in a string": {"exp": "4000000000"},
    "an end in a list": {"exp": [4000000000]},
    "an end of true": {"exp": True},
    "long ago": {"iat": 1, "exp": 2},
    "too long a life": {"iat": 1},
    "made in the future": {"iat": 4_000_000_000, "exp": 4_000_000_100},
    "not before later": {"nbf": 4_000_000_000},
    "not before of true": {"nbf": True},
    "user zero": {"sub": "0"},
    "a negative user": {"sub": "-7"},
    "a spaced user": {"sub": " 7"},
    "a user with a newline": {"sub": "7\n"},
    "a user in other digits": {"sub": "\u0667"},  # Arabic-Indic seven
    "a padded user": {"sub": "07"},
    "a user in words": {"sub": "seven"},
    "a fractional user": {"sub": "7.0"},
    "a user beyond JavaScript": {"sub": str(2**53)},
    "an enormous user": {"sub": "9" * 5000},
    "a key to be proved": {"cnf": {"jkt": "x"}},
    "an event": {"events": {"http://schemas.openid.net/event/backchannel-logout": {}}},
    "a token id of another type": {"jti": 7},
    "a control character in the subject": {"sub": "7\x1b"},
}


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize("changed", BAD_CLAIMS.values(), ids=BAD_CLAIMS)
async def test_verifier_refuses_invalid_claims(issuer: Issuer, changed: dict[str, Any]) -> None:
    """A token with a valid signature is refused if a claim is invalid."""
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(issuer.token(**changed))


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize("sub", [True, 7.0, 0, 2**53, ["7"], {"7": 7}])
async def test_verifier_refuses_a_user_id_of_another_type(issuer: Issuer, sub: object) -> None:
    """A user id that is neither an integer within bounds nor a string is refused."""
    token = issuer.token(sub=sub)
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(token)


@pytest.mark.proves("A7", "G14")
async def test_expired_token_is_refused_with_that_reason(issuer: Issuer) -> None:
    """An expired token is rejected with an error that asks the caller to renew it."""
    with pytest.raises(UnauthorizedError, match="expired") as caught:
        await issuer.verifier.verify(issuer.token(iat=1_000_000, exp=1_000_300))
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


JUNK: dict[str, str] = {
    "nothing": "",
    "a word": "junk",
    "dots": "..",
    "many dots": "a.b.c.d.e",
    "no JSON": f"{segment(b'no json')}.{segment({})}.x",
    "no UTF-8": f"{segment(bytes([0xFF, 0xFE]))}.{segment({})}.x",
    "a header that is a list": f"{segment([])}.{segment({})}.x",
    "a header that is null": f"{segment(None)}.{segment({})}.x",
    "deep JSON": f"{segment(b'[' * 5000)}.{segment({})}.x",
    "a deep kid": segment(b'{"kid":' + b"[" * 3000 + b"]" * 3000 + b"}") + ".e30.x",
    "a huge number": segment(b'{"kid":' + b"9" * 5000 + b"}") + ".e30.x",
    "not ASCII": "\u00e9\u00e9.\u00e9.\u00e9",
    "a lone surrogate": "\ud800.a.b",
    "NUL": "\0.\0.\0",
}


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize("token", JUNK.values(), ids=JUNK)
async def test_junk_is_refused(issuer: Issuer, token: str) -> None:
    """Text that is not a token is refused like an invalid token."""
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(token)


@pytest.mark.proves("A7", "G14")
async def test_verifier_refuses_a_deeply_nested_payload(issuer: Issuer) -> None:
    """A payload that is nested too deeply is refused even if its signature is valid."""
    token = issuer.sign(b"[" * 3000)
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(token)


@pytest.mark.proves("A7", "G14")
async def test_verifier_refuses_a_token_above_the_size_limit(issuer: Issuer) -> None:
    """A token above the limit is refused, although its signature is valid."""
    token = issuer.token(padding="x" * issuer.settings.jwt_max_chars)
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(token)


BAD_HEADERS: dict[str, dict[str, Any]] = {
    "a key of its own by URL": {"jku": "https://evil.test/jwks"},
    "a key of its own": {"jwk": {"kty": "oct", "k": "AAAA"}},
    "a certificate of its own by URL": {"x5u": "https://evil.test/"},
    "a certificate of its own": {"x5c": ["AAAA"]},
    "a critical extension": {"crit": ["exp"], "exp": 1},
    "an empty critical list": {"crit": []},
    "b64 of true": {"b64": True},
    "compression": {"zip": "DEF"},
}


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize("headers", BAD_HEADERS.values(), ids=BAD_HEADERS)
async def test_verifier_refuses_invalid_headers(issuer: Issuer, headers: dict[str, Any]) -> None:
    """A header that names a key, or changes the signed content, is refused whichever key signed the token."""
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(issuer.token(headers=headers))


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize("kid", [7, True, ["key-1"], {"key-1": 1}, None, 10**40])
async def test_verifier_refuses_a_kid_of_another_type(kid: object) -> None:
    """A key id that is not a string is refused and does not cause an internal error."""
    issuer = Issuer()
    document = {"keys": issuer.jwks["keys"] + Issuer("key-2").jwks["keys"]}
    async with keys_of(JwksEndpoint(document), Time()) as keys:
        token = hs256({"alg": "EdDSA", "kid": kid}, issuer.claims(), b"secret")
        with pytest.raises(UnauthorizedError):
            await TokenVerifier(issuer.settings, keys).verify(token)


@pytest.mark.proves("A7", "G14")
async def test_verifier_refuses_an_unsigned_token(issuer: Issuer) -> None:
    """`alg: none` is refused in every spelling, with or without a signature."""
    for alg in ("none", "None", "NONE", ""):
        for signature in ("", "x"):
            token = f"{segment({'alg': alg, 'kid': issuer.kid})}.{segment(issuer.claims())}.{signature}"
            with pytest.raises(UnauthorizedError):
                await issuer.verifier.verify(token)


@pytest.mark.proves("A7", "G14")
async def test_verifier_refuses_a_signature_of_another_key(issuer: Issuer) -> None:
    """A token signed by another key under the issuer's key id is refused."""
    with pytest.raises(UnauthorizedError):
        await issuer.verifier.verify(Issuer().token())


@pytest.mark.proves("A7", "G14")
async def test_verifier_refuses_a_public_key_as_hs256_secret(issuer: Issuer) -> None:
    """An HS256 token signed with the published key, in any of its forms, is refused."""
    public = issuer.private_key.public_key()
    forms = (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.Raw, PublicFormat.Raw),
        json.dumps(issuer.jwks["keys"][0]).encode(),
    )
    for secret in forms:
        token = hs256({"alg": "HS256", "kid": issuer.kid}, issuer.claims(), secret)
        with pytest.raises(UnauthorizedError):
            await issuer.verifier.verify(token)


PRIVATE_KEYS: dict[str, Callable[[], Any]] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
async def test_keys_work_for_each_algorithm_from_jwks_and_file(algorithm: str, tmp_path: Path) -> None:
    """Each algorithm works with a key set, with or without `alg`, and with a PEM file."""
    issuer = Issuer()
    private = PRIVATE_KEYS[algorithm]()
    token = jwt.encode(issuer.claims(), private, algorithm, headers={"kid": "k"})
    public = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key()))
    for extra in ({}, {"alg": algorithm}):
        async with keys_of(JwksEndpoint({"keys": [{**public, "kid": "k", **extra}]}), Time()) as keys:
            assert (await TokenVerifier(issuer.settings, keys).verify(token)).user_id == 7

    pem = tmp_path / "key.pem"
    pem.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    settings = AuthSettings(
        jwt_issuer=issuer.settings.jwt_issuer,
        jwt_audience=issuer.settings.jwt_audience,
        jwt_public_key_file=pem,
    )
    async with open_verifier(settings) as verifier:
        assert (await verifier.verify(token)).user_id == 7


@pytest.mark.proves("A7", "G14")
async def test_keys_of_an_unconfigured_algorithm_prevent_the_start(tmp_path: Path) -> None:
    """A key of a type that the configured algorithms do not use prevents the start."""
    pem = tmp_path / "key.pem"
    pem.write_bytes(Issuer().private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    settings = AuthSettings(jwt_issuer="i", jwt_audience="a", jwt_public_key_file=pem, jwt_algorithms=("ES256",))
    with pytest.raises(ValueError, match="supports none"):
        async with open_verifier(settings):
            pass


@pytest.mark.proves("A7", "G14")
async def test_keys_verify_only_their_published_algorithm() -> None:
    """An RSA key published for PS256 verifies no RS256 token."""
    issuer = Issuer()
    private = rsa.generate_private_key(65537, 2048)
    public = json.loads(jwt.get_algorithm_by_name("PS256").to_jwk(private.public_key()))
    async with keys_of(JwksEndpoint({"keys": [{**public, "kid": "k", "alg": "PS256"}]}), Time()) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        with pytest.raises(UnauthorizedError):
            await verifier.verify(jwt.encode(issuer.claims(), private, "RS256", headers={"kid": "k"}))


async def test_keys_exclude_short_rsa_keys() -> None:
    """An RSA key below 2048 bits verifies nothing."""
    issuer = Issuer()
    private = rsa.generate_private_key(65537, 1024)  # noqa: S505 # that is the claim
    public = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(private.public_key()))
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        token = jwt.encode(issuer.claims(), private, "RS256", headers={"kid": "k"})
    async with keys_of(JwksEndpoint({"keys": [{**public, "kid": "k"}]}), Time()) as keys:
        with pytest.raises(UnauthorizedError):
            await TokenVerifier(issuer.settings, keys).verify(token)


async def test_keys_ignore_all_but_public_signing_keys_of_a_set() -> None:
    """Secrets, private keys, encryption keys and invalid entries of a key set are ignored."""
    issuer = Issuer()
    good = issuer.jwks["keys"][0]
    secret = {"kty": "oct", "k": segment(b"s" * 32), "kid": "secret"}
    private = json.loads(jwt.get_algorithm_by_name("EdDSA").to_jwk(issuer.private_key)) | {"kid": "private"}
    junk = [secret, private, {**good, "use": "enc", "kid": "enc"}, {**good, "kid": 7}, {"kty": "??"}, 7, None, {}]
    async with keys_of(JwksEndpoint({"keys": [*junk, good]}), Time()) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        assert (await verifier.verify(issuer.token())).user_id == 7
        for kid in ("private", "enc"):
            with pytest.raises(UnauthorizedError):
                await verifier.verify(issuer.token(headers={"kid": kid}))
        with pytest.raises(UnauthorizedError):
            await verifier.verify(hs256({"alg": "HS256", "kid": "secret"}, issuer.claims(), b"s" * 32))


async def test_keys_are_all_tried_for_a_token_without_kid() -> None:
    """A token without a key id is valid if any key of its algorithm signed it, and refused otherwise."""
    issuer, other = Issuer(), Issuer("key-2")
    token = jwt.encode(issuer.claims(), issuer.private_key, "EdDSA")
    for keys_in in (issuer.jwks["keys"], other.jwks["keys"] + issuer.jwks["keys"]):
        async with keys_of(JwksEndpoint({"keys": keys_in}), Time()) as keys:
            assert (await TokenVerifier(issuer.settings, keys).verify(token)).user_id == 7
    async with keys_of(JwksEndpoint(other.jwks), Time()) as keys:
        with pytest.raises(UnauthorizedError):
            await TokenVerifier(issuer.settings, keys).verify(token)


@pytest.mark.proves("A8", "G14")
async def test_unknown_kids_cost_one_fetch_per_cooldown() -> None:
    """A thousand unknown key ids, `../../x` and long ones among them, lead to one fetch until the cooldown is over."""
    issuer, time = Issuer(), Time()
    endpoint = JwksEndpoint(issuer.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        await verifier.verify(issuer.token())
        assert endpoint.calls == 1
        time.now += 10
        kids = ["../../x", "x" * 5000, *(f"unknown-{number}" for number in range(1000))]
        answers = await asyncio.gather(
            *(verifier.verify(issuer.token(headers={"kid": kid})) for kid in kids),
            return_exceptions=True,
        )
        assert {type(answer) for answer in answers} == {UnauthorizedError}
        assert endpoint.calls == 2


@pytest.mark.proves("A8", "G14")
async def test_known_keys_do_not_wait_for_a_fetch() -> None:
    """A fetch that hangs because of an unknown key id does not delay tokens with a known key."""
    issuer, time = Issuer(), Time()
    endpoint = JwksEndpoint(issuer.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        await verifier.verify(issuer.token())
        time.now += 10
        endpoint.open.clear()
        endpoint.called.clear()
        unknown = asyncio.create_task(verifier.verify(issuer.token(headers={"kid": "unknown"})))
        await endpoint.called.wait()
        assert (await verifier.verify(issuer.token())).user_id == 7
        assert not unknown.done()
        endpoint.open.set()
        with pytest.raises(UnauthorizedError):
            await unknown


@pytest.mark.proves("A9", "G14")
async def test_keys_rotate_without_a_restart() -> None:
    """After the cooldown a new key is accepted, and the old one is refused from then on."""
    old, new, time = Issuer("old"), Issuer("new"), Time()
    endpoint = JwksEndpoint(old.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(old.settings, keys)
        await verifier.verify(old.token())
        endpoint.answer = new.jwks
        with pytest.raises(UnauthorizedError):
            await verifier.verify(new.token())
        time.now += 10
        assert (await verifier.verify(new.token())).user_id == 7
        with pytest.raises(UnauthorizedError):
            await verifier.verify(old.token())


@pytest.mark.proves("A9", "G14")
async def test_withdrawn_keys_expire_without_new_ones() -> None:
    """A key that the issuer has withdrawn is refused once the key set has reached its maximum age."""
    old, new, time = Issuer("old"), Issuer("new"), Time()
    endpoint = JwksEndpoint(old.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(old.settings, keys)
        await verifier.verify(old.token())
        endpoint.answer = new.jwks
        time.now += 300
        with pytest.raises(UnauthorizedError):
            await verifier.verify(old.token())


@pytest.mark.proves("A9", "G14")
@pytest.mark.parametrize("withdrawn", [[], [{}]], ids=["no keys", "no usable keys"])
async def test_withdrawal_of_all_keys_rejects_known_keys(withdrawn: list[object]) -> None:
    """A key set without a usable key withdraws the previous keys, and is fetched again after the cooldown."""
    old, new, time = Issuer("old"), Issuer("new"), Time()
    endpoint = JwksEndpoint(old.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(old.settings, keys)
        await verifier.verify(old.token())
        endpoint.answer = {"keys": withdrawn}
        time.now += 300
        with pytest.raises(UnauthorizedError):
            await verifier.verify(old.token())
        with pytest.raises(DependencyError):
            await verifier.check()
        endpoint.answer = new.jwks
        time.now += 10
        assert (await verifier.verify(new.token())).user_id == 7


@pytest.mark.proves("A9", "G14")
@pytest.mark.parametrize("seconds", [10, 300])
async def test_cached_token_is_refused_after_its_key_is_withdrawn(seconds: float) -> None:
    """A token that was accepted is refused once its key is withdrawn, replaced under its id or not."""
    for new in (Issuer("new"), Issuer("old")):
        old, time = Issuer("old"), Time()
        endpoint = JwksEndpoint(old.jwks)
        async with keys_of(endpoint, time) as keys:
            verifier = TokenVerifier(old.settings, keys)
            token = old.token()
            for _ in range(2):
                assert (await verifier.verify(token)).user_id == 7
            endpoint.answer = new.jwks
            time.now += seconds
            if seconds < 300:  # an unknown id makes it look before the keys are too old
                with pytest.raises(UnauthorizedError):
                    await verifier.verify(new.token(headers={"kid": "unknown"}))
            with pytest.raises(UnauthorizedError):
                await verifier.verify(token)


async def test_cached_token_is_refused_after_its_expiry() -> None:
    """A token that was accepted is refused as expired from its `exp` on."""
    issuer = Issuer()
    verifier = TokenVerifier(issuer.settings.model_copy(update={"jwt_leeway_seconds": 0}), issuer.verifier._keys)
    end = int(time.time()) + 2
    token = issuer.token(exp=end)
    assert (await verifier.verify(token)).user_id == 7
    await asyncio.sleep(end - time.time() + 0.01)  # the time itself is what is waited for
    with pytest.raises(UnauthorizedError, match="expired"):
        await verifier.verify(token)


async def test_token_cache_is_bounded() -> None:
    """The cache is bounded for any number of valid tokens, and all stay accepted."""
    issuer = Issuer()
    verifier = issuer.verifier
    tokens = [issuer.token(user) for user in range(1, KNOWN_TOKENS + 3)]
    for user, token in enumerate(tokens, 1):
        assert (await verifier.verify(token)).user_id == user
    assert len(verifier._reader._known) == KNOWN_TOKENS
    assert (await verifier.verify(tokens[0])).user_id == 1


UNUSABLE: dict[str, object] = {
    "refused connections": None,
    "a list": [],
    "keys of another type": {"keys": 7},
    "an error": httpx2.Response(500),
    "no such page": httpx2.Response(404),
    "a redirect": httpx2.Response(302, headers={"Location": "https://issuer.test/other"}),
    "HTML": httpx2.Response(200, html="<html>"),
}


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize("answer", UNUSABLE.values(), ids=UNUSABLE)
async def test_known_keys_after_the_maximum_staleness_are_rejected(answer: object) -> None:
    """While the endpoint is unavailable or answers junk, known keys work until they are too old, then nothing is judged."""
    issuer, time = Issuer(), Time()
    endpoint = JwksEndpoint(issuer.jwks)
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        await verifier.verify(issuer.token())
        endpoint.unavailable = answer is None
        endpoint.answer = answer
        time.now += 14_399
        assert (await verifier.verify(issuer.token())).user_id == 7
        await verifier.check()
        with pytest.raises(UnauthorizedError):
            await verifier.verify(issuer.token(headers={"kid": "unknown"}))
        time.now += 1
        with pytest.raises((UnavailableError, UnauthorizedError)):
            await verifier.verify(issuer.token())
        with pytest.raises(DependencyError):
            await verifier.check()
        endpoint.unavailable, endpoint.answer = False, issuer.jwks
        time.now += 10
        assert (await verifier.verify(issuer.token())).user_id == 7


async def test_keys_before_the_first_fetch_answer_503() -> None:
    """Until the first key set was fetched the answer is 503, and tokens are verified once the endpoint recovers."""
    issuer, time = Issuer(), Time()
    endpoint = JwksEndpoint(issuer.jwks)
    endpoint.unavailable = True
    async with keys_of(endpoint, time) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        with pytest.raises(UnavailableError):
            await verifier.verify(issuer.token())
        endpoint.unavailable = False
        time.now += 1
        assert (await verifier.verify(issuer.token())).user_id == 7


async def test_keys_share_the_first_fetch_between_callers() -> None:
    """Callers during the first fetch wait for it instead of failing."""
    issuer = Issuer()
    endpoint = JwksEndpoint(issuer.jwks)
    async with keys_of(endpoint, Time()) as keys:
        verifier = TokenVerifier(issuer.settings, keys)
        callers = await asyncio.gather(*(verifier.verify(issuer.token(user)) for user in range(1, 6)))
    assert [caller.user_id for caller in callers] == [1, 2, 3, 4, 5]
    assert endpoint.calls == 1


async def test_keys_of_a_jwks_url_are_fetched_from_it() -> None:
    """With a JWKS URL in the settings, keys are fetched from it."""
    issuer = Issuer()
    async with open_verifier(issuer.settings, transport=JwksEndpoint(issuer.jwks)) as verifier:
        assert (await verifier.verify(issuer.token())).user_id == 7


async def test_development_secret_accepts_hs256_only() -> None:
    """With a development secret only HS256 is accepted."""
    issuer = Issuer()
    secret = "for development only, and long enough"  # noqa: S105 # a made-up one
    settings = AuthSettings(
        jwt_issuer=issuer.settings.jwt_issuer,
        jwt_audience=issuer.settings.jwt_audience,
        jwt_development_secret=secret,
    )
    async with open_verifier(settings) as verifier:
        assert (await verifier.verify(jwt.encode(issuer.claims(), secret, "HS256"))).user_id == 7
        for token in (issuer.token(), jwt.encode(issuer.claims(), secret * 2, "HS512")):
            with pytest.raises(UnauthorizedError):
                await verifier.verify(token)


def test_exactly_one_source_of_keys() -> None:
    """Settings without a source of keys, with two, or with a short secret are refused."""
    for sources in (
        {},
        {"jwt_jwks_url": NO_ISSUER, "jwt_public_key_file": "key.pem"},
        {"jwt_development_secret": "short"},
    ):
        with pytest.raises(ValidationError):
            AuthSettings.model_validate({"jwt_issuer": "i", "jwt_audience": "a"} | sources)
