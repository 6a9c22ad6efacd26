"""Browser sessions: a cookie that only the page itself can use."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet

from api_gateway.api.session import COOKIE, Sessions
from api_gateway_testing.gateway import Gateway, Running
from scanfleet.security.auth import Principal

SESSION = "/api/v1/session"
TASKS = "http://orchestrator/api/v1/task"
RECORDS = "http://orchestrator/internal/session"
OWN = {"Sec-Fetch-Site": "same-origin", "Origin": "http://gateway"}


def key_file(folder: Path, *keys: str) -> Path:
    file = folder / "session.keys"
    file.write_text("".join(f"{key}\n" for key in keys))
    return file


@asynccontextmanager
async def running(folder: Path, *keys: str, **settings: Any) -> AsyncIterator[Running]:
    file = key_file(folder, *(keys or [Fernet.generate_key().decode()]))
    async with Gateway().run(session_keys_file=file, **settings) as gateway:
        gateway.services.on("GET", TASKS, httpx2.Response(200, json={}))
        gateway.services.on("POST", "http://orchestrator/api/v1/subnet", httpx2.Response(201, json={}))
        for what in ("create", "end"):
            gateway.services.on("POST", f"{RECORDS}/{what}", httpx2.Response(204))
        yield gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as gateway:
        yield gateway


async def sign_in(gateway: Running, **claims: Any) -> str:
    """The value of a new session's cookie; the client has no header and no cookie of its own from then on."""
    headers = {"Authorization": f"Bearer {gateway.issuer.token(**claims)}"}
    answer = await gateway.client.post(SESSION, headers=headers)
    assert answer.status_code == 204, answer.text
    gateway.client.headers.pop("Authorization", None)
    gateway.client.cookies.clear()
    return SimpleCookie(answer.headers["Set-Cookie"])[COOKIE].value


async def ask(gateway: Running, cookie: str, method: str = "GET", path: str = "/api/v1/task", **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {"Cookie": f"{COOKIE}={cookie}", **names}
    answer = await gateway.client.request(method, path, headers=sent, json={} if method == "POST" else None)
    return answer.status_code


async def test_session_of_a_valid_token_is_an_encrypted_host_cookie(gateway: Running) -> None:
    """The cookie is bound to this host and path, hidden from scripts and other sites, and ends with the token."""
    token = gateway.issuer.token()
    answer = await gateway.client.post(SESSION, headers={"Authorization": f"Bearer {token}"})
    cookie = SimpleCookie(answer.headers["Set-Cookie"])[COOKIE]
    assert (answer.status_code, answer.content) == (204, b"")
    assert (cookie["path"], cookie["domain"], cookie["samesite"]) == ("/", "", "Strict")
    assert cookie["secure"]
    assert cookie["httponly"]
    assert 290 <= int(cookie["max-age"]) <= 300
    assert token not in answer.headers["Set-Cookie"]
    assert len(cookie.value) < 2 * len(token)


async def test_session_request_of_the_page_is_forwarded_as_its_user(gateway: Running) -> None:
    """A request with the cookie is forwarded in the user's name, with the same rights, and without the cookie."""
    cookie = await sign_in(gateway, user_id=8, admin=True)
    assert await ask(gateway, cookie, **OWN) == 200
    assert await ask(gateway, cookie, "POST", "/api/v1/subnet", **OWN) == 201
    asked = [each for each in gateway.services.requests if "/api/v1/" in str(each.url)]
    assert [await gateway.caller(each) for each in asked] == [Principal(8, admin=True)] * 2
    assert all("cookie" not in each.headers for each in asked)


@pytest.mark.proves("A31")
@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", None])
async def test_session_request_of_another_site_is_refused(gateway: Running, site: str | None) -> None:
    """The cookie is refused unless the browser marks the request as one of the page."""
    cookie = await sign_in(gateway)
    headers = {"Origin": "http://gateway"} | ({} if site is None else {"Sec-Fetch-Site": site})
    for method, path in (("GET", "/api/v1/task"), ("POST", "/api/v1/subnet"), ("DELETE", SESSION)):
        assert await ask(gateway, cookie, method, path, **headers) == 401


@pytest.mark.proves("A31")
@pytest.mark.parametrize(
    "origin", ["null", "http://gateway.evil.test", "http://evil.test", "gateway", "ftp://gateway", ""]
)
async def test_session_change_from_another_origin_is_refused(gateway: Running, origin: str) -> None:
    """A request that changes something needs the page's own Origin too; one that reads does not."""
    cookie = await sign_in(gateway)
    headers = {"Sec-Fetch-Site": "same-origin"} | ({"Origin": origin} if origin else {})
    assert await ask(gateway, cookie, "POST", "/api/v1/subnet", **headers) == 401
    assert await ask(gateway, cookie, **headers) == 200


async def test_session_origin_is_the_public_url_when_it_is_set(tmp_path: Path) -> None:
    """Behind a proxy that changes `Host`, the page's Origin is the configured one alone."""
    async with running(tmp_path, public_url="https://scanfleet.test") as gateway:
        cookie = await sign_in(gateway)
        own = {"Sec-Fetch-Site": "same-origin"}
        assert await ask(gateway, cookie, "POST", "/api/v1/subnet", **own, Origin="https://scanfleet.test") == 201
        assert await ask(gateway, cookie, "POST", "/api/v1/subnet", **own, Origin="http://gateway") == 401


@pytest.mark.proves("A31")
async def test_session_with_an_authorization_header_is_ignored(gateway: Running) -> None:
    """With a header and a cookie the header applies, whether it is valid or not."""
    cookie = await sign_in(gateway, user_id=8)
    gateway.services.requests.clear()
    assert await ask(gateway, cookie, Authorization=f"Bearer {gateway.issuer.token(9)}", **OWN) == 200
    assert [await gateway.caller(each) for each in gateway.services.requests] == [Principal(9)]
    assert await ask(gateway, cookie, Authorization="Bearer forged", **OWN) == 401


@pytest.mark.proves("A31")
async def test_session_cookie_that_is_invalid_is_refused(gateway: Running) -> None:
    """A cookie of another key, a changed one, a huge one and a malformed one are refused like an invalid token."""
    cookie = await sign_in(gateway)
    other = SimpleCookie(Sessions([Fernet.generate_key().decode()]).cookie("token", 9e9))[COOKIE].value
    changed = cookie[:40] + ("A" if cookie[40] != "A" else "B") + cookie[41:]
    for bad in (other, changed, "A" * 9_000, "", "junk", "%00", "gAAAAA==", '"\\351"'):
        assert await ask(gateway, bad, **OWN) == 401, bad


async def test_session_ends_with_its_token(gateway: Running) -> None:
    """A cookie is refused once its token has expired, even if the browser keeps it."""
    sessions: Sessions = gateway.app.state.sessions
    token = gateway.issuer.token(iat=1_000, exp=1_300)
    cookie = SimpleCookie(sessions.cookie(token, 9e9))[COOKIE].value
    gateway.client.headers.pop("Authorization")
    assert await ask(gateway, cookie, **OWN) == 401


async def test_session_keys_rotate(tmp_path: Path) -> None:
    """A new key in front encrypts, and the old one behind it still decrypts until it is removed."""
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    of_old = SimpleCookie(Sessions([old]).cookie("token", 9e9))[COOKIE].value
    of_new = SimpleCookie(Sessions([new, old]).cookie("token", 9e9))[COOKIE].value
    for keys, cookie, good in (([new, old], of_old, True), ([new], of_new, True), ([new], of_old, False)):
        async with running(tmp_path, *keys) as gateway:
            token = SimpleCookie(Sessions(keys).cookie(gateway.issuer.token(), 9e9))[COOKIE].value
            assert await ask(gateway, token, **OWN) == 200
            headers = {"Cookie": f"{COOKIE}={cookie}", **OWN}
            del gateway.client.headers["Authorization"]
            error = (await gateway.client.get("/api/v1/task", headers=headers)).json()["error"]
            assert (error == "the token is not valid") is good


async def test_session_of_a_token_too_large_is_refused(gateway: Running) -> None:
    """A token that is too large for a cookie is a 400 with its size."""
    token = gateway.issuer.token(groups=[secrets.token_hex(16) for _ in range(250)])
    answer = await gateway.client.post(SESSION, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 400
    assert "too large for a session" in answer.json()["error"]
    assert "Set-Cookie" not in answer.headers


@pytest.mark.proves("A31")
async def test_session_from_a_session_is_refused(gateway: Running) -> None:
    """A session begins with a header alone, so that a cookie cannot extend itself."""
    cookie = await sign_in(gateway)
    assert await ask(gateway, cookie, "POST", SESSION, **OWN) == 401


async def test_session_that_ends_is_cleared_and_recorded(gateway: Running) -> None:
    """The end of a session removes the cookie, and beginning and end are recorded in the user's name."""
    cookie = await sign_in(gateway, user_id=8)
    answer = await gateway.client.delete(SESSION, headers={"Cookie": f"{COOKIE}={cookie}", **OWN})
    assert (answer.status_code, answer.json()) == (200, {"logout_url": None})
    assert SimpleCookie(answer.headers["Set-Cookie"])[COOKIE]["max-age"] == "0"
    recorded = [each for each in gateway.services.requests if str(each.url).startswith(RECORDS)]
    assert [each.url.path for each in recorded] == ["/internal/session/create", "/internal/session/end"]
    assert [await gateway.caller(each) for each in recorded] == [Principal(8)] * 2


async def test_session_that_cannot_be_recorded_does_not_begin(gateway: Running) -> None:
    """While the audit log is unavailable no session begins."""
    gateway.services.unavailable.add("orchestrator")
    answer = await gateway.client.post(SESSION)
    assert answer.status_code == 503
    assert "Set-Cookie" not in answer.headers


async def test_session_without_keys_is_off() -> None:
    """Without keys no session begins, the error names the setting, and a cookie is not accepted as a token."""
    async with Gateway().run() as gateway:
        answer = await gateway.client.post(SESSION)
        assert answer.status_code == 404
        assert "SCANFLEET_SESSION_KEYS_FILE" in answer.json()["error"]
        del gateway.client.headers["Authorization"]
        assert await ask(gateway, "anything", **OWN) == 401


@pytest.mark.parametrize("content", ["", "\n", "short\n"])
async def test_session_keys_that_are_invalid_end_the_start(tmp_path: Path, content: str) -> None:
    """A file without valid keys is an error at start that names the file."""
    with pytest.raises(ValueError, match=r"session\.keys does not hold Fernet keys"):
        async with running(tmp_path, content):
            pass
