"""`scanfleet login`: both flows against a provider, and the tokens that are kept."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import keyring.backend
import keyring.backends.fail
import keyring.errors
import pytest

from scanfleet.scanning.policy import PRESETS, Preset, fill_in
from scanfleet_cli.login import Callback
from scanfleet_cli.session import Effects
from scanfleet_cli.tokens import FileStore, KeyringStore, StoredTokens, store_in
from scanfleet_cli_testing.api import TOKEN, FakeApi
from scanfleet_cli_testing.issuer import CLIENT_ID, URL, Issuer, served

GATEWAY = "http://scanfleet.test"
ME = {"user_id": 7, "admin": False, "expires_at": "2026-03-14T21:00:00Z"}
QUOTA = {"limit": 600, "left": 600, "reset": 60}


@pytest.fixture
def issuer(api: FakeApi) -> Issuer:
    """A provider whose tokens the gateway takes."""
    issuer = Issuer(api)
    api.tokens = issuer.access_tokens
    limits = {"reads": QUOTA, "writes": QUOTA, "cancels": QUOTA, "at_once": {"limit": 64, "left": 63}}
    api.answers["GET", "/api/v1/me"] = ME | {"limits": limits}
    api.answers["GET", "/api/v1/info"] = {
        "version": "1", "api": "v1", "issuer": URL, "client_id": CLIENT_ID, "audience": "scanfleet", "scopes": ["openid"],
        "presets": {preset: fill_in(Preset(preset), {}).model_dump(mode="json") for preset in PRESETS},
        "scripts": [], "max_addresses": 65_536, "sign_in": ["token", "oidc"],
    }  # fmt: skip
    return issuer


@pytest.fixture
def slept() -> list[float]:
    """Seconds that the command slept."""
    return []


@pytest.fixture
def effects(api: FakeApi, issuer: Issuer, slept: list[float], tmp_path: Path) -> Iterator[Effects]:
    """A machine whose browser signs the user in."""
    browsers: list[threading.Thread] = []

    def browse(address: str) -> bool:
        def visit() -> None:
            urllib.request.urlopen(issuer.sign_in(address), timeout=10).read()  # noqa: S310 # the command's own server

        browsers.append(threading.Thread(target=visit))
        browsers[-1].start()
        return True

    store = FileStore(tmp_path / "tokens.json")
    yield Effects(
        transport=issuer, async_transport=api, first_pause_seconds=0.001, browse=browse, sleep=slept.append, store=store
    )
    for browser in browsers:
        browser.join()


def test_browser_signs_in_by_code_with_pkce(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """With a display the browser redirects to this machine, and the tokens are stored for this gateway."""
    ended = run("login", GATEWAY, environment={"DISPLAY": ":0"})
    assert ended.code == 0, ended.err
    file = tmp_path / "tokens.json"
    assert ended.err.endswith(
        f'✓ Signed in to scanfleet.test as user 7 (context "scanfleet.test", token in the file {file}, which only you can read)\n'
    )
    assert file.stat().st_mode & 0o777 == 0o600
    assert run("subnet", "list", environment={}).code == 0
    assert issuer.codes == {}
    assert "code_challenge_method=S256" in ended.err
    assert "the sign-in of context scanfleet.test" in run("whoami", environment={}).out


def test_device_signs_in_by_a_code_in_any_browser(issuer: Issuer, run: Any, slept: list[float]) -> None:
    """Without a display the code is shown, and the issuer is asked at its own pace until the user has typed it."""
    issuer.pending = ["authorization_pending", "slow_down", "authorization_pending"]
    ended = run("login", GATEWAY, environment={})
    assert ended.code == 0, ended.err
    assert ended.err.startswith("First copy your one-time code: ")
    assert f"Open {URL}/device in any browser … waiting (expires in 30:00)" in ended.err
    assert slept == [5, 5, 10, 10]
    assert run("subnet", "list", environment={}).code == 0


def test_device_sign_in_continues_after_a_lost_connection(issuer: Issuer, run: Any, slept: list[float]) -> None:
    """The issuer is asked again more slowly (RFC 8628, 3.5)."""
    issuer.faults = [httpx2.ReadTimeout("no response"), httpx2.Response(503), httpx2.ConnectError("refused")]
    ended = run("login", GATEWAY, environment={})
    assert ended.code == 0, ended.err
    assert slept == [5, 10, 20, 30]


@pytest.mark.parametrize(
    "answer",
    [
        {"device_code": "x", "verification_uri": f"{URL}/device"},
        {"device_code": "x", "user_code": 5, "verification_uri": f"{URL}/device"},
        {"device_code": "x", "user_code": "y"},
        {"device_code": "x", "user_code": "y", "verification_uri": f"{URL}/device", "interval": 0},
        [],
    ],
)
def test_malformed_device_code_exits_1(issuer: Issuer, run: Any, answer: Any) -> None:
    """A response without what the user needs is an error of the issuer, not a traceback."""
    issuer.answers["/device_authorization"] = httpx2.Response(200, json=answer)
    ended = run("login", GATEWAY, environment={})
    assert ended.code == 1
    assert "the response of the issuer is malformed" in ended.err


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        (f"{URL}/authorize\x1b[2J", "is not a URL"),
        (f"{URL}/autho\u202erize", "is not a URL"),
        ("https://[::1/authorize", "is not a URL"),
        (5, "is malformed"),
    ],
)
def test_endpoint_that_is_no_url_is_refused_and_not_printed_raw(
    issuer: Issuer, run: Any, endpoint: Any, problem: str
) -> None:
    """The address is shown on the terminal and opened in the browser."""
    path = "/.well-known/openid-configuration"
    found = issuer.handle_request(httpx2.Request("GET", f"{URL}{path}")).json()
    issuer.answers[path] = httpx2.Response(200, json=found | {"authorization_endpoint": endpoint})
    ended = run("login", GATEWAY, environment={"DISPLAY": ":0"})
    assert ended.code == 1
    assert problem in ended.err
    assert not {"\x1b", "\u202e"} & set(ended.err)


@pytest.mark.parametrize("endpoint", ["token_endpoint", "device_authorization_endpoint"])
def test_endpoint_with_an_invalid_port_is_refused(issuer: Issuer, run: Any, endpoint: str) -> None:
    """The address is parsed as the client that sends the tokens parses it."""
    path = "/.well-known/openid-configuration"
    found = issuer.handle_request(httpx2.Request("GET", f"{URL}{path}")).json()
    issuer.answers[path] = httpx2.Response(200, json=found | {endpoint: "https://issuer.test:abc/"})
    ended = run("login", GATEWAY, "--device", environment={})
    assert ended.code == 1
    assert "https://issuer.test:abc/ is not a URL" in ended.err


@pytest.mark.parametrize("flow", [["--device"], []])
def test_refused_sign_in_exits_4_and_stores_no_token(issuer: Issuer, run: Any, tmp_path: Path, flow: list[str]) -> None:
    """When the user refuses, the issuer's reason is shown."""
    issuer.approves = False
    ended = run("login", GATEWAY, *flow, environment={"DISPLAY": ":0"})
    assert ended.code == 4
    assert "the issuer refused the sign-in: " in ended.err
    assert not (tmp_path / "config.toml").exists()


def test_redirect_of_another_sign_in_is_refused(effects: Effects, run: Any, api: FakeApi) -> None:
    """A redirect with another state is rejected: an attacker may have started that sign-in."""
    assert api

    def browse(address: str) -> bool:
        return effects.browse(address.replace("state=", "state=forged"))

    ended = run("login", GATEWAY, environment={"DISPLAY": ":0"}, effects=replace(effects, browse=browse))
    assert ended.code == 4
    assert "another sign-in" in ended.err


def test_idle_connection_does_not_block_the_browser() -> None:
    """A connection that a browser opened in advance and sends nothing on is closed, and the next one is answered."""
    with Callback(idle=0.05) as callback, socket.create_connection(("127.0.0.1", urlsplit(callback.url).port)):
        answers: list[dict[str, str]] = []
        waiting = threading.Thread(target=lambda: answers.append(callback.wait(10)))
        waiting.start()
        urllib.request.urlopen(f"{callback.url}?code=1&state=2", timeout=5).read()  # noqa: S310 # the command's own server
        waiting.join()
    assert answers == [{"code": "1", "state": "2"}]


def test_token_of_stdin_is_kept(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """--token-stdin keeps a token that the service takes, and no other."""
    api.tokens = [TOKEN]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\n"))
    assert run("login", GATEWAY, "--token-stdin", environment={}).code == 0
    assert run("subnet", "list", environment={}).code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("stale\n"))
    assert run("login", "http://other.test", "--token-stdin", environment={}).code == 4
    assert run("context", "list", "-o", "name", environment={}).out == "scanfleet.test\n"
    assert run("logout", environment={}).code == 0
    assert run("subnet", "list", environment={}).code == 4


def test_kept_tokens_go_to_no_other_gateway(run: Any) -> None:
    """A context whose URL has changed has no token until the user signs in again."""
    run("login", GATEWAY, environment={})
    run("context", "add", "scanfleet.test", "--url", "http://elsewhere.test", environment={})
    ended = run("subnet", "list", environment={})
    assert ended.code == 4
    assert "not signed in to http://elsewhere.test" in ended.err


def age(folder: Path, **fields: Any) -> None:
    """Let the kept token end in half a minute, or give it other fields."""
    kept = StoredTokens(folder, FileStore(folder / "tokens.json"))
    tokens = kept.read("scanfleet.test", GATEWAY)
    assert tokens is not None
    kept.keep("scanfleet.test", replace(tokens, **({"expires_at": time.time() + 30} | fields)))


def test_concurrent_processes_refresh_a_token_once(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """One of several processes refreshes a token that expires within a minute, and the others use the new one."""
    run("login", GATEWAY, environment={})
    age(tmp_path)
    found: list[str | None] = []

    def shell() -> None:
        kept = StoredTokens(tmp_path, FileStore(tmp_path / "tokens.json"), issuer)
        found.append(kept.current("scanfleet.test", GATEWAY))

    shells = [threading.Thread(target=shell) for _ in range(4)]
    for each in shells:
        each.start()
    for each in shells:
        each.join()
    assert found == [issuer.access_tokens[1]] * 4
    assert len(issuer.access_tokens) == 2
    assert run("subnet", "list", environment={}).code == 0


def test_refresh_that_is_refused_asks_to_sign_in(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """When the issuer gives no new token the command exits 4."""
    run("login", GATEWAY, environment={})
    age(tmp_path)
    issuer.refresh_tokens.clear()
    ended = run("subnet", "list", environment={})
    assert ended.code == 4
    assert "scanfleet login" in ended.err


@pytest.mark.parametrize("left", [30, -1])
def test_watch_continues_while_the_issuer_is_unavailable(
    api: FakeApi, issuer: Issuer, run: Any, tmp_path: Path, left: int
) -> None:
    """The old token is used up to its end, and after it the watch waits for the issuer as for the gateway."""
    run("login", GATEWAY, environment={})
    run("scan", "127.9.8.0/24", "--no-watch", environment={})
    age(tmp_path, expires_at=time.time() + left)
    api.cut_after = 1
    issuer.faults = [httpx2.Response(503), httpx2.ConnectError("connection refused")]
    ended = run("job", "watch", "41", environment={})
    assert ended.code == 0, ended.err
    assert "job 41 completed" in ended.err
    assert not issuer.faults


def test_unavailable_issuer_after_the_end_of_the_token_exits_6(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """Without a valid token no request is sent, and the command may be repeated."""
    run("login", GATEWAY, environment={})
    age(tmp_path, expires_at=time.time() - 1)
    issuer.faults = [httpx2.Response(503)]
    ended = run("--retry", "0", "subnet", "list", environment={})
    assert ended.code == 6
    assert "the issuer is unavailable" in ended.err


def test_issuer_that_is_unavailable_once_is_asked_again(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """The retries of a request cover the refresh of its token."""
    run("login", GATEWAY, environment={})
    age(tmp_path, expires_at=time.time() - 1)
    issuer.faults = [httpx2.Response(503)]
    ended = run("subnet", "list", environment={})
    assert ended.code == 0, ended.err
    assert not issuer.faults


def test_submit_without_a_token_for_its_retry_prints_the_key(
    api: FakeApi, issuer: Issuer, run: Any, tmp_path: Path
) -> None:
    """The jobs may have been created by the first attempt, although the last one was not sent."""
    run("login", GATEWAY, environment={})

    def fault(request: httpx2.Request) -> Exception | None:
        if (request.method, request.url.path) != ("POST", "/api/v1/task"):
            return None
        api.carry_out(request)
        age(tmp_path, expires_at=time.time() - 1)
        issuer.faults = [httpx2.Response(503)] * 1_000
        return httpx2.ReadTimeout("no response")

    api.fault_of = fault
    submit = ("--retry", "0.1", "scan", "127.9.8.0/24", "--no-watch")
    ended = run(*submit, environment={})
    assert ended.code == 1
    assert "the issuer is unavailable" in ended.err
    key = ended.err.split("--key ")[1].split()[0]
    api.fault_of, issuer.faults = (lambda _request: None), []
    assert run(*submit, "--key", key, environment={}).code == 0
    assert list(api.jobs) == [41]


def test_token_without_a_refresh_token_is_used_up_to_its_end(run: Any, tmp_path: Path) -> None:
    """A token that nothing can replace is not discarded a minute early."""
    run("login", GATEWAY, environment={})
    age(tmp_path, refresh_token=None)
    assert run("subnet", "list", environment={}).code == 0
    age(tmp_path, refresh_token=None, expires_at=time.time() - 1)
    ended = run("subnet", "list", environment={})
    assert ended.code == 4
    assert "the token has expired" in ended.err


def test_token_expiry_without_expires_in_is_read_from_the_token(issuer: Issuer, run: Any) -> None:
    """A JWT without `expires_in` is refreshed in time too."""
    ends = iter([time.time() + 30, time.time() + 3_600])

    def token() -> str:
        claims = base64.urlsafe_b64encode(json.dumps({"exp": next(ends)}).encode()).decode().rstrip("=")
        return f"e30.{claims}.x"

    issuer.life, issuer.new_access_token = None, token
    run("login", GATEWAY, environment={})
    for _ in range(2):
        assert run("subnet", "list", environment={}).code == 0
    assert len(issuer.access_tokens) == 2


@pytest.mark.parametrize("command", [["subnet", "list"], ["job", "watch", "41"]])
def test_rejected_token_is_refreshed_once(
    api: FakeApi, issuer: Issuer, run: Any, tmp_path: Path, command: list[str]
) -> None:
    """A 401 is followed by the same request with a new token, and a second one is an error."""
    run("login", GATEWAY, environment={})
    run("scan", "127.9.8.0/24", "--no-watch", environment={})
    age(tmp_path, expires_at=None)
    api.tokens = [issuer.access_tokens[0] + "x"]
    ended = run(*command, environment={})
    assert (ended.code, len(issuer.access_tokens)) == (4, 2)
    age(tmp_path, expires_at=None)
    api.tokens = issuer.access_tokens = [issuer.access_tokens[0]]
    assert run(*command, environment={}).code == 0
    assert len(issuer.access_tokens) == 2


def test_refresh_that_waited_for_a_logout_stores_nothing(issuer: Issuer, run: Any, tmp_path: Path) -> None:
    """The tokens are read again under the lock: a refresh does not undo a logout."""
    run("login", GATEWAY, environment={})
    age(tmp_path)

    class Slow(FileStore):
        def read(self, name: str) -> str | None:
            found = super().read(name)
            self.delete(name)  # by another process, before this one has the lock
            return found

    assert StoredTokens(tmp_path, Slow(tmp_path / "tokens.json"), issuer).current("scanfleet.test", GATEWAY) is None
    assert FileStore(tmp_path / "tokens.json").read("scanfleet.test") is None
    assert len(issuer.access_tokens) == 1


@pytest.mark.parametrize(
    ("info", "hint"),
    [({"sign_in": ["token"]}, "--token-stdin"), ({"issuer": "http://issuer.test"}, "is not https")],
)
@pytest.mark.usefixtures("issuer")
def test_impossible_sign_in_exits_with_the_reason(api: FakeApi, run: Any, info: dict[str, Any], hint: str) -> None:
    """The error names a gateway without an issuer and an issuer without TLS."""
    api.answers["GET", "/api/v1/info"] |= info
    ended = run("login", GATEWAY, environment={})
    assert ended.code != 0
    assert hint in ended.err


class MemoryKeyring(keyring.backend.KeyringBackend):
    priority = 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # the library ships half of its types
        self.entries: dict[tuple[str, str], str] = {}
        self.locked = self.full = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise keyring.errors.KeyringLocked("the collection is locked")
        return self.entries.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        if self.locked or self.full:
            raise keyring.errors.PasswordSetError("the password is too long")
        self.entries[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        if self.locked:
            raise keyring.errors.PasswordDeleteError("the collection is locked")
        del self.entries[service, username]


@pytest.fixture
def use_keyring() -> Iterator[Callable[[keyring.backend.KeyringBackend], None]]:
    before = keyring.get_keyring()
    yield keyring.set_keyring
    keyring.set_keyring(before)


def test_tokens_are_kept_in_the_keyring_of_the_system(
    use_keyring: Any, run: Any, effects: Effects, tmp_path: Path
) -> None:
    """On a system with a keyring the tokens are stored there and in no file."""
    use_keyring(backend := MemoryKeyring())
    store = store_in(tmp_path)
    assert isinstance(store, KeyringStore)
    ended = run("login", GATEWAY, environment={}, effects=replace(effects, store=store))
    assert "token in the system keyring" in ended.err
    assert json.loads(backend.entries["scanfleet", "scanfleet.test"])["url"] == GATEWAY
    assert not (tmp_path / "tokens.json").exists()
    assert run("subnet", "list", environment={}, effects=replace(effects, store=store)).code == 0
    run("logout", environment={}, effects=replace(effects, store=store))
    assert backend.entries == {}


@pytest.mark.parametrize("command", [("subnet", "list"), ("logout",), ("context", "remove", "scanfleet.test", "--yes")])
def test_locked_keyring_exits_4_with_the_reason(
    use_keyring: Any, run: Any, effects: Effects, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Tokens that cannot be read or deleted are an error with a hint, not a traceback, and remain stored."""
    use_keyring(backend := MemoryKeyring())
    effects = replace(effects, store=store_in(tmp_path))
    run("login", GATEWAY, environment={}, effects=effects)
    backend.locked = True
    ended = run(*command, environment={}, effects=effects)
    assert ended.code == 4
    assert "cannot use the system keyring: the collection is locked" in ended.err
    assert "SCANFLEET_TOKEN" in ended.err
    assert backend.entries
    assert run("context", "list", "-o", "name", environment={}, effects=effects).out == "scanfleet.test\n"


def test_keyring_that_refuses_a_token_is_replaced_by_a_file(
    use_keyring: Any, run: Any, effects: Effects, tmp_path: Path
) -> None:
    """The tokens are in one of the two, and the command names which."""
    use_keyring(backend := MemoryKeyring())
    effects = replace(effects, store=store_in(tmp_path))
    run("login", GATEWAY, environment={}, effects=effects)
    backend.full = True
    assert f"token in the file {tmp_path / 'tokens.json'}" in run("login", GATEWAY, environment={}, effects=effects).err
    assert run("subnet", "list", environment={}, effects=effects).code == 0
    assert f"the file {tmp_path / 'tokens.json'}" in run("whoami", environment={}, effects=effects).out
    backend.full = False
    assert "token in the system keyring" in run("login", GATEWAY, environment={}, effects=effects).err
    assert "scanfleet.test" not in (tmp_path / "tokens.json").read_text()
    backend.full = True
    run("login", GATEWAY, environment={}, effects=effects)
    run("logout", environment={}, effects=effects)
    assert (backend.entries, run("subnet", "list", environment={}, effects=effects).code) == ({}, 4)


def test_refreshed_token_that_the_keyring_refuses_is_stored_in_a_file_with_a_note(
    use_keyring: Any, run: Any, effects: Effects, tmp_path: Path
) -> None:
    """A token leaves the keyring only with a note that names the file."""
    use_keyring(backend := MemoryKeyring())
    effects = replace(effects, store=(store := store_in(tmp_path)))
    run("login", GATEWAY, environment={}, effects=effects)
    assert "is now in" not in run("subnet", "list", environment={}, effects=effects).err
    kept = StoredTokens(tmp_path, store)
    tokens = kept.read("scanfleet.test", GATEWAY)
    assert tokens is not None
    kept.keep("scanfleet.test", replace(tokens, expires_at=time.time() + 30))
    backend.full = True
    ended = run("subnet", "list", environment={}, effects=effects)
    assert ended.code == 0
    assert f"the token of context scanfleet.test is now in the file {tmp_path / 'tokens.json'}" in ended.err
    assert "is now in" not in run("subnet", "list", environment={}, effects=effects).err


def test_machine_without_a_keyring_has_a_file(use_keyring: Any, tmp_path: Path) -> None:
    """Without a working keyring, tokens are stored in a file."""
    use_keyring(keyring.backends.fail.Keyring())  # type: ignore[no-untyped-call] # as above
    assert isinstance(store_in(tmp_path), FileStore)


def test_served_issuer_stops_after_an_error(api: FakeApi) -> None:
    """A test that fails does not leave the provider's server behind."""
    before = threading.active_count()
    with pytest.raises(RuntimeError), served(Issuer(api, "http://127.0.0.1:0")):
        raise RuntimeError
    assert threading.active_count() == before
