"""Signing in to the page at an OpenID provider."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock
from urllib.parse import parse_qs, urlsplit

import httpcore2
import httpx2
import pytest
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from cryptography.fernet import Fernet
from pydantic import ValidationError

from api_gateway.api.session import COOKIE, MAX_COOKIE_BYTES, Sessions
from api_gateway.api.sign_in import LOGIN_COOKIE
from api_gateway.auth import SignIn
from api_gateway_testing.gateway import Gateway, Running
from scanfleet.contracts.messages import Audited, AuditEntry
from scanfleet.contracts.messages.envelope import decode
from scanfleet.contracts.messages.topics import SCAN_AUDIT
from scanfleet.errors import ScanfleetError, UnauthorizedError, UnavailableError
from scanfleet.security.auth import Caller, Principal
from scanfleet.services import GATEWAY
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.tokens import Issuer
from scanfleet_testing.waiting import until

LOGIN = "/session/login"
ENDPOINTS = ("authorization_endpoint", "token_endpoint")
CALLBACK = "/session/callback"
PUBLIC = "https://scanfleet.test"
OWN = {"Sec-Fetch-Site": "same-origin", "Origin": PUBLIC}


class Provider(httpx2.AsyncBaseTransport):
    """A small OpenID provider: codes are good once, with the verifier of their challenge; refresh tokens are good once."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.claims: dict[str, Any] = {}
        self.nonce: str | None = None
        self.unavailable = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.discoveries = 0
        self.named = issuer.settings.jwt_issuer
        self.endpoints: dict[str, str] = {}
        self.asked: list[dict[str, str]] = []
        self._codes: dict[str, dict[str, str]] = {}
        self._refresh_tokens: set[str] = set()

    def authorize(self, location: str) -> str:
        """Return the query of the callback after the user has signed in."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
        assert (query["client_id"], query["redirect_uri"]) == ("page", f"{PUBLIC}{CALLBACK}")
        assert (query["response_type"], query["code_challenge_method"]) == ("code", "S256")
        code = f"code-{len(self._codes)}"
        self._codes[code] = query
        return f"code={code}&state={query['state']}"

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.unavailable:
            raise httpx2.ConnectError("refused", request=request)
        base = "https://issuer.test"
        if request.url.path == "/.well-known/openid-configuration":
            self.discoveries += 1
            await self.answers.wait()
            endpoints = {"authorization_endpoint": f"{base}/authorize", "token_endpoint": f"{base}/token"}
            endpoints |= {"end_session_endpoint": f"{base}/out"} | self.endpoints
            return httpx2.Response(200, json={"issuer": self.named, **endpoints})
        form = {name: values[0] for name, values in parse_qs((await request.aread()).decode()).items()}
        self.asked.append(form | {"authorization": request.headers.get("authorization", "")})
        nonce = self._redeem(form)
        if nonce is None:
            return httpx2.Response(400, json={"error": "invalid_grant"})
        refresh_token = f"refresh-{len(self.asked)}"
        self._refresh_tokens.add(refresh_token)
        id_token = ".".join(
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "none"}, {"nonce": self.nonce or nonce}, "")
        )
        access = self.issuer.token(**self.claims)
        tokens = {"access_token": access, "id_token": id_token, "refresh_token": refresh_token, "token_type": "Bearer"}
        return httpx2.Response(200, json={**tokens, "expires_in": 300})

    def _redeem(self, form: dict[str, str]) -> str | None:
        if form["grant_type"] == "refresh_token":
            known = form["refresh_token"] in self._refresh_tokens
            self._refresh_tokens.discard(form["refresh_token"])
            return "" if known else None
        query = self._codes.pop(form["code"], None)
        if query is None or create_s256_code_challenge(form["code_verifier"]) != query["code_challenge"]:
            return None
        return query["nonce"]


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[tuple[Running, Provider]]:
    keys = folder / "session.keys"
    keys.write_text(Fernet.generate_key().decode())
    issuer = Issuer()
    provider = Provider(issuer)
    settings = {"session_keys_file": keys, "public_url": PUBLIC, "oidc_client_id": "page"} | settings
    async with Gateway(issuer, provider).run(**settings) as gateway:
        for what in ("create", "refresh", "end"):
            gateway.services.on("POST", f"http://orchestrator/internal/session/{what}", httpx2.Response(204))
        gateway.services.on("GET", "http://orchestrator/api/v1/task", httpx2.Response(200, json={}))
        del gateway.client.headers["Authorization"]
        yield gateway, provider


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[tuple[Running, Provider]]:
    async with running(tmp_path) as both:
        yield both


def cookies(answer: httpx2.Response) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in answer.headers.get_list("Set-Cookie"):
        found |= {name: morsel.value for name, morsel in SimpleCookie(line).items()}
    return found


async def login(gateway: Running, to: str = "/app/jobs/41") -> tuple[str, str]:
    """The issuer's address, and the login cookie."""
    answer = await gateway.client.get(LOGIN, params={"next": to})
    assert answer.status_code == 302, answer.text
    gateway.client.cookies.clear()
    return answer.headers["Location"], cookies(answer)[LOGIN_COOKIE]


async def come_back(gateway: Running, query: str, kept: str | None) -> httpx2.Response:
    headers = {} if kept is None else {"Cookie": f"{LOGIN_COOKIE}={kept}"}
    answer = await gateway.client.get(f"{CALLBACK}?{query}", headers=headers)
    gateway.client.cookies.clear()
    return answer


async def refresh(gateway: Running, session: str) -> httpx2.Response:
    answer = await gateway.client.post("/api/v1/session/refresh", headers={"Cookie": f"{COOKIE}={session}", **OWN})
    gateway.client.cookies.clear()
    return answer


def failed(answer: httpx2.Response, why: str) -> None:
    """Assert that the sign-in has failed with a redirect to the path where it began."""
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/app/jobs/41?sign_in={why}")
    assert COOKIE not in cookies(answer)
    assert cookies(answer)[LOGIN_COOKIE] == ""


def unknown(answer: httpx2.Response) -> None:
    """Assert that the callback belongs to no sign-in, and ends none."""
    assert (answer.status_code, answer.headers["Location"]) == (303, "/app/?sign_in=refused")
    assert cookies(answer) == {}


async def audited(gateway: Running) -> list[AuditEntry]:
    await gateway.app.state.refusals.flush(MemoryBus(gateway.broker))
    messages = [decode(SCAN_AUDIT[GATEWAY], record) for record in gateway.broker.records("scan-audit-api-gateway")]
    return [each.entry for each in messages if isinstance(each, Audited)]


async def test_sign_in_redirects_with_a_session(both: tuple[Running, Provider]) -> None:
    """After the callback with the issuer's code the user has a session, and is redirected to the page where the sign-in began."""
    gateway, provider = both
    provider.claims = {"user_id": 8, "admin": True}
    location, kept = await login(gateway)
    assert location.startswith("https://issuer.test/authorize?")
    answer = await come_back(gateway, provider.authorize(location), kept)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/app/jobs/41")
    session = cookies(answer)[COOKIE]
    assert cookies(answer)[LOGIN_COOKIE] == ""
    asked = await gateway.client.get("/api/v1/task", headers={"Cookie": f"{COOKIE}={session}", **OWN})
    assert asked.status_code == 200
    created, listed = gateway.services.requests
    assert created.url.path == "/internal/session/create"
    assert [await gateway.caller(each) for each in (created, listed)] == [Principal(8, admin=True)] * 2


async def test_sign_in_with_a_secret_authenticates_the_client(tmp_path: Path) -> None:
    """A client with a secret sends it by HTTP Basic, and never in the URL of the redirect."""
    (tmp_path / "secret").write_text("s3cret\n")
    async with running(tmp_path, oidc_client_secret_file=tmp_path / "secret") as (gateway, provider):
        location, kept = await login(gateway)
        assert "s3cret" not in location
        await come_back(gateway, provider.authorize(location), kept)
        (asked,) = provider.asked
        assert base64.b64decode(asked["authorization"].removeprefix("Basic ")) == b"page:s3cret"


@pytest.mark.proves("A31")
async def test_sign_in_that_this_browser_did_not_begin_is_refused(both: tuple[Running, Provider]) -> None:
    """A callback with a wrong or missing state, without the cookie or with a foreign one begins no session."""
    gateway, provider = both
    location, kept = await login(gateway)
    query = provider.authorize(location)
    code = query.partition("&")[0]
    other = Sessions([Fernet.generate_key().decode()]).seal({"state": "s", "until": 9e9})
    for bad, cookie in (
        (f"{code}&state=wrong", kept),
        (code, kept),
        (f"{code}&state=%C3%A9", kept),
        (query, None),
        (query, other),
        (query, '"\\351"'),
    ):
        unknown(await come_back(gateway, bad, cookie))
    for bad in (query.replace("code=", "no="), f"{query}&error=access_denied"):
        failed(await come_back(gateway, bad, kept), "refused")
    assert provider.asked == []


async def test_sign_in_in_two_tabs_completes_the_later_one(both: tuple[Running, Provider]) -> None:
    """After the callback of the earlier of two sign-ins the later one can still be completed."""
    gateway, provider = both
    earlier, _ = await login(gateway)
    later, kept = await login(gateway)
    unknown(await come_back(gateway, provider.authorize(earlier), kept))
    assert COOKIE in cookies(await come_back(gateway, provider.authorize(later), kept))


@pytest.mark.proves("A31")
@pytest.mark.parametrize(
    ("sources", "other"),
    [
        (["192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1"], "192.0.2.2"),
        (["2001:db8::1", "2001:db8::2", "2001:db8::a:b:c:d"], "2001:db8:0:1::1"),
    ],
    ids=["IPv4 address", "IPv6 network"],
)
async def test_sign_ins_beyond_the_limit_of_a_client_send_nothing_to_the_issuer(
    tmp_path: Path, sources: list[str], other: str
) -> None:
    """One IPv4 address or IPv6 /64 network redeems a limited number of codes a minute, however many sign-ins it begins."""
    trusted = ("127.0.0.1/32",)
    async with running(tmp_path, sign_ins_per_minute=2, trusted_proxies=trusted) as (gateway, provider):
        for source in sources[:2]:
            gateway.client.headers["X-Forwarded-For"] = source
            location, kept = await login(gateway)
            failed(await come_back(gateway, provider.authorize(location).replace("code=", "code=x"), kept), "refused")
        gateway.client.headers["X-Forwarded-For"] = sources[2]
        location, kept = await login(gateway)
        failed(await come_back(gateway, provider.authorize(location), kept), "limit")
        assert len(provider.asked) == 2
        assert (await audited(gateway))[-1].rule == "rate"
        gateway.client.headers["X-Forwarded-For"] = other
        location, kept = await login(gateway)
        assert COOKIE in cookies(await come_back(gateway, provider.authorize(location), kept))


@pytest.mark.proves("G15")
async def test_sign_in_refused_is_audited(both: tuple[Running, Provider]) -> None:
    """A refused sign-in is an entry with its reason, in the user's name if the token is valid."""
    gateway, provider = both
    location, kept = await login(gateway)
    await come_back(gateway, "code=x&state=wrong", kept)
    await come_back(gateway, f"{provider.authorize(location)}&error=access_denied", kept)
    for claims in ({"aud": "another"}, {"user_id": 8, "groups": [secrets.token_hex(16) for _ in range(250)]}):
        provider.claims = claims
        location, kept = await login(gateway)
        await come_back(gateway, provider.authorize(location), kept)
    entries = await audited(gateway)
    assert {(each.action, each.decision, each.rule) for each in entries} == {("create_session", "refused", "token")}
    state, refused, token, large = [each.reason for each in entries]
    assert (state, refused) == ("state is not of this sign-in", "the issuer has not signed the user in")
    assert "aud" in token
    assert "too large for a session" in large
    assert [each.subject for each in entries] == ["", "", "", "8"]


@pytest.mark.proves("A31")
async def test_sign_in_callback_is_accepted_once(both: tuple[Running, Provider]) -> None:
    """The same callback a second time begins no session, with the cookie too."""
    gateway, provider = both
    location, kept = await login(gateway)
    query = provider.authorize(location)
    assert COOKIE in cookies(await come_back(gateway, query, kept))
    failed(await come_back(gateway, query, kept), "refused")


async def test_sign_in_expired_is_refused(both: tuple[Running, Provider]) -> None:
    """A sign-in that takes longer than ten minutes is refused."""
    gateway, provider = both
    location, kept = await login(gateway)
    sessions: Sessions = gateway.app.state.sessions
    old = sessions.seal((sessions.unseal(kept) or {}) | {"until": 1.0})
    unknown(await come_back(gateway, provider.authorize(location), old))


@pytest.mark.proves("A31")
@pytest.mark.parametrize(
    "to",
    [
        "//evil.test",
        "/\\evil.test",
        "https://evil.test/app/",
        "/app",
        "/app//evil.test",
        "/app/\r\nX: y",
        "/apps/",
        "/app/" + "a" * 2_000,
        "",
    ],
)
async def test_sign_in_redirects_only_to_the_page(both: tuple[Running, Provider], to: str) -> None:
    """The redirect after the sign-in is to a path of the page only."""
    answer = await both[0].client.get(LOGIN, params={"next": to})
    assert answer.status_code == 400
    assert "Set-Cookie" not in answer.headers


async def test_sign_in_redirects_to_any_path_of_the_page(both: tuple[Running, Provider]) -> None:
    """A long query and every character that a browser leaves unescaped in it survive, in a cookie that a browser keeps."""
    gateway, provider = both
    to = "/app/jobs?q=a*-._%20+" + secrets.token_urlsafe(1_450)
    location, kept = await login(gateway, to)
    assert len(kept) < MAX_COOKIE_BYTES
    answer = await come_back(gateway, provider.authorize(location), kept)
    assert answer.headers["Location"] == to
    location, kept = await login(gateway, to)
    answer = await come_back(gateway, f"{provider.authorize(location)}&error=access_denied", kept)
    assert answer.headers["Location"] == f"{to}&sign_in=refused"


@pytest.mark.proves("A31")
async def test_sign_in_with_an_unacceptable_token_is_refused(both: tuple[Running, Provider]) -> None:
    """An id token with another nonce, and an access token that is not for this platform, begin no session."""
    gateway, provider = both
    for nonce in ("another", "é"):
        provider.nonce = nonce
        location, kept = await login(gateway)
        failed(await come_back(gateway, provider.authorize(location), kept), "refused")
    provider.nonce, provider.claims = None, {"aud": "another"}
    location, kept = await login(gateway)
    failed(await come_back(gateway, provider.authorize(location), kept), "token")


async def test_sign_in_without_the_issuer_shows_that_it_is_unavailable(both: tuple[Running, Provider]) -> None:
    """Without the issuer, or with another issuer's document at its URL, the page shows that sign-in is unavailable."""
    gateway, provider = both
    provider.unavailable = True
    unavailable = "/app/subnets?sign_in=unavailable"
    assert (await gateway.client.get(LOGIN, params={"next": "/app/subnets"})).headers["Location"] == unavailable
    provider.unavailable, provider.named = False, "https://evil.test"
    assert (await gateway.client.get(LOGIN, params={"next": "/app/subnets"})).headers["Location"] == unavailable
    provider.named = "https://issuer.test"
    location, kept = await login(gateway)
    provider.unavailable = True
    failed(await come_back(gateway, provider.authorize(location), kept), "unavailable")


@pytest.mark.proves("A31")
@pytest.mark.parametrize("endpoint", [*ENDPOINTS, "end_session_endpoint"])
async def test_sign_in_at_an_endpoint_without_https_is_unavailable(
    both: tuple[Running, Provider], endpoint: str
) -> None:
    """If the issuer publishes an endpoint that is neither https nor on this machine, no user is sent to it, nor any code."""
    gateway, provider = both
    for bad in (
        "http://issuer.test",
        "http://127.0.0.1.issuer.test",
        "javascript:alert(1)",
        "https:///x",
        "https://[x",
    ):
        provider.endpoints[endpoint] = bad
        where = (await gateway.client.get(LOGIN, params={"next": "/app/subnets"})).headers["Location"]
        assert where == "/app/subnets?sign_in=unavailable", bad
    provider.endpoints[endpoint] = "http://[::1]:9/x"
    await login(gateway)


@pytest.mark.proves("A31")
@pytest.mark.parametrize(
    ("issuer", "good"),
    [
        ("http://issuer.test", False),
        ("issuer.test", False),
        ("scanfleet-local", False),
        ("https://issuer.test", True),
        ("http://localhost:9", True),
    ],
)
def test_sign_in_at_an_issuer_without_https_is_refused(tmp_path: Path, issuer: str, *, good: bool) -> None:
    """Sign-in needs an issuer that is https or on this machine; without sign-in any issuer is accepted."""
    sign_in = {"session_keys_file": tmp_path, "public_url": PUBLIC, "oidc_client_id": "page"}
    for left_out in sign_in:
        assert not Gateway().settings(jwt_issuer=issuer, **sign_in | {left_out: None}).signs_in
    if good:
        assert Gateway().settings(jwt_issuer=issuer, **sign_in).signs_in
    else:
        with pytest.raises(ValidationError, match="SCANFLEET_JWT_ISSUER is not an https URL"):
            Gateway().settings(jwt_issuer=issuer, **sign_in)


async def test_sign_in_without_the_orchestrator_shows_that_it_is_unavailable(both: tuple[Running, Provider]) -> None:
    """While the session cannot be recorded, or revocations are unknown, the page shows that sign-in is unavailable."""
    gateway, provider = both
    location, kept = await login(gateway)
    gateway.services.unavailable.add("orchestrator")
    failed(await come_back(gateway, provider.authorize(location), kept), "unavailable")
    gateway.services.unavailable.clear()

    async def verify(_token: str) -> None:
        raise UnavailableError("the list of revoked tokens is unavailable; try again")

    gateway.app.state.verifier = SimpleNamespace(verify=verify)
    location, kept = await login(gateway)
    failed(await come_back(gateway, provider.authorize(location), kept), "unavailable")
    assert await audited(gateway) == []


async def test_sign_in_with_a_slow_issuer_shares_one_request(both: tuple[Running, Provider]) -> None:
    """Concurrent sign-ins wait for one request for the issuer's URLs, and an aborted one does not end the others."""
    gateway, provider = both
    provider.answers.clear()
    sign_ins = [asyncio.create_task(gateway.client.get(LOGIN)) for _ in range(3)]
    await until(lambda: provider.discoveries)
    sign_ins.pop(0).cancel()
    provider.answers.set()
    async with asyncio.timeout(10):
        assert [each.status_code for each in await asyncio.gather(*sign_ins)] == [302] * 2
    assert provider.discoveries == 1


async def test_sign_in_creates_no_tls_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context costs tens of milliseconds of CPU, and a request for the issuer's address needs no token."""
    sign_in = SignIn(Gateway().settings(public_url=PUBLIC, oidc_client_id="page"))
    location = "https://issuer.test/authorize"
    discovered = httpx2.Response(
        200, json={"issuer": Issuer().settings.jwt_issuer} | dict.fromkeys(ENDPOINTS, location)
    )
    discovered.request = httpx2.Request("GET", location)
    monkeypatch.setattr(httpx2.AsyncClient, "get", AsyncMock(return_value=discovered))
    monkeypatch.setattr(httpcore2, "default_ssl_context", Mock(side_effect=AssertionError("a TLS context is created")))
    assert (await sign_in.location("state", "nonce", "verifier")).startswith(location)


async def test_session_is_refreshed_until_the_issuer_ends_it(both: tuple[Running, Provider]) -> None:
    """A session continues with new tokens, each refresh token is accepted once, and a refresh that the issuer refuses is a 401."""
    gateway, provider = both
    location, kept = await login(gateway)
    session = cookies(await come_back(gateway, provider.authorize(location), kept))[COOKIE]

    first = await refresh(gateway, session)
    assert first.status_code == 204
    assert (await refresh(gateway, cookies(first)[COOKIE])).status_code == 204
    again = await refresh(gateway, session)
    assert (again.status_code, again.json()["error"]) == (401, "the issuer has ended the session; sign in again")
    provider.claims = {"user_id": 9}
    location, kept = await login(gateway)
    other = cookies(await come_back(gateway, provider.authorize(location), kept))[COOKIE]
    provider.claims = {"user_id": 8}
    answer = await refresh(gateway, other)
    assert (answer.status_code, COOKIE in cookies(answer)) == (401, False)


async def test_session_whose_refresh_is_not_recorded_keeps_its_refresh_token(both: tuple[Running, Provider]) -> None:
    """While the audit log is unavailable a refresh is a 503 that does not use up the refresh token."""
    gateway, provider = both
    location, kept = await login(gateway)
    session = cookies(await come_back(gateway, provider.authorize(location), kept))[COOKIE]
    provider.asked.clear()
    gateway.services.unavailable.add("orchestrator")
    assert (await refresh(gateway, session)).status_code == 503
    assert provider.asked == []
    gateway.services.unavailable.clear()
    assert (await refresh(gateway, session)).status_code == 204


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnavailableError("the issuer's keys are unavailable; try again"), 503),
        (UnauthorizedError("the token is not valid", reason="the key is unknown until the next fetch"), 401),
    ],
    ids=["keys unavailable", "key unknown"],
)
async def test_session_whose_new_token_cannot_be_verified_keeps_the_new_refresh_token(
    both: tuple[Running, Provider], monkeypatch: pytest.MonkeyPatch, error: ScanfleetError, status: int
) -> None:
    """A refresh that fails after the exchange returns the old token with the new refresh token."""
    gateway, provider = both
    location, kept = await login(gateway)
    session = cookies(await come_back(gateway, provider.authorize(location), kept))[COOKIE]
    old = gateway.app.state.sessions.unseal(session)["access"]
    provider.claims = {"user_id": 7, "jti": "new"}
    verify = gateway.app.state.verifier.verify

    async def verify_old(token: str) -> Caller:
        if token != old:
            raise error
        return cast(Caller, await verify(token))

    with monkeypatch.context() as patch:
        patch.setattr(gateway.app.state.verifier, "verify", verify_old)
        answer = await refresh(gateway, session)
        assert answer.status_code == status
        assert (await refresh(gateway, session)).status_code == 401  # its refresh token is used up
        session = cookies(answer)[COOKIE]
        assert gateway.app.state.sessions.unseal(session)["access"] == old
    assert (await refresh(gateway, session)).status_code == 204


async def test_session_of_a_pasted_token_has_nothing_to_refresh(both: tuple[Running, Provider]) -> None:
    """A session without a refresh token ends with its token, and the end names the issuer's logout address."""
    gateway, _ = both
    cookie = cookies(await gateway.client.post("/api/v1/session", headers=gateway.issuer.bearer()))[COOKIE]
    gateway.client.cookies.clear()
    headers = {"Cookie": f"{COOKIE}={cookie}", **OWN}
    assert (await gateway.client.post("/api/v1/session/refresh", headers=headers)).status_code == 400
    url = (await gateway.client.delete("/api/v1/session", headers=headers)).json()["logout_url"]
    assert url.startswith(
        "https://issuer.test/out?client_id=page&post_logout_redirect_uri=https%3A%2F%2Fscanfleet.test"
    )


async def test_sign_in_that_is_not_configured_is_a_404(tmp_path: Path) -> None:
    """Without a client id there is no sign-in at the issuer, and the error names the settings."""
    async with running(tmp_path, oidc_client_id=None) as (gateway, _):
        for path in (LOGIN, CALLBACK):
            answer = await gateway.client.get(path)
            assert answer.status_code == 404
            assert "SCANFLEET_OIDC_CLIENT_ID" in answer.json()["error"]
