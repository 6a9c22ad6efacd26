"""Contexts, their configuration file, and where a token comes from."""

from __future__ import annotations

import base64
import io
import json
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from scanfleet_cli.config import Config, Context, check_url, same_url, write_private
from scanfleet_cli.errors import CommandError
from scanfleet_cli.tokens import CommandToken, FileStore, StoredTokens, Tokens
from scanfleet_cli_testing.api import TOKEN, FakeApi

URL = "http://scanfleet.test"


def test_remove_of_a_context_deletes_its_tokens(run: Any, tmp_path: Path) -> None:
    """The tokens of a removed context are deleted, and those of others stay."""
    kept = StoredTokens(tmp_path, store := FileStore(tmp_path / "tokens.json"))
    for name in ("lab", "prod"):
        run("context", "add", name, "--url", URL, environment={})
        kept.keep(name, Tokens(URL, TOKEN))
    assert run("context", "remove", "lab", "--yes", environment={}).code == 0
    assert store.read("lab") is None
    assert store.read("prod") is not None


def test_contexts_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    """One run at a time reads the file, changes it and writes it."""
    together = threading.Barrier(8)

    def add(number: int) -> None:
        together.wait()
        Config(tmp_path, {}).add(Context(f"lab{number}", URL), use=False)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(Config(tmp_path, {}).contexts()) == [f"lab{number}" for number in range(8)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.lock", "config.toml"]


def test_remove_of_a_context_without_tokens_writes_no_file(run: Any, tmp_path: Path) -> None:
    """A removal without stored tokens writes no file."""
    run("context", "add", "lab", "--url", URL, environment={})
    assert run("context", "remove", "lab", "--yes", environment={}).code == 0
    assert not (tmp_path / "tokens.json").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Configuration and tokens in a folder that cannot be created or written yield an error with a remedy."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "scanfleet"  # also for root
    with pytest.raises(CommandError, match=rf"cannot write {folder}/config.toml: Not a directory"):
        write_private(folder / "config.toml", "")
    with pytest.raises(CommandError, match=rf"cannot write {folder}/tokens.lock: Not a directory"):
        StoredTokens(folder, FileStore(folder / "tokens.json")).keep("lab", Tokens(URL, TOKEN))


def test_logout_of_a_context_with_a_token_command_exits_2(run: Any) -> None:
    """The next command would be signed in again."""
    run("context", "add", "lab", "--url", "http://scanfleet.test", "--token-command", "true", environment={})
    ended = run("logout", environment={})
    assert ended.code == 2
    assert "signed out" not in ended.err
    assert "scanfleet context remove lab" in ended.err


def test_list_of_contexts_has_a_limit(run: Any) -> None:
    """--limit is as of any list, and the total is noted."""
    for name in ("lab", "prod"):
        run("context", "add", name, "--url", URL, environment={})
    ended = run("context", "list", "--limit", "1", "-o", "name", environment={})
    assert (ended.out, ended.err) == ("lab\n", "1 of 2; --limit 0 for all\n")


def login(run: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\n"))
    return run(*arguments, "--token-stdin", environment={})


def test_login_with_context_stores_the_token_under_that_context(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--context names the context to sign in to, also when another context has the same gateway."""
    for name in ("first", "second"):
        run("context", "add", name, "--url", URL, environment={})
    run("context", "use", "first", environment={})
    store = FileStore(tmp_path / "tokens.json")
    assert login(run, monkeypatch, "--context", "second", "login").code == 0
    assert (store.read("first"), store.read("second") is None) == (None, False)
    run("context", "use", "first", environment={})
    assert login(run, monkeypatch, "login").code == 0
    assert store.read("first") is not None


def test_login_to_another_gateway_under_a_known_name_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign-in does not change the address of a context."""
    run("context", "add", "lab", "--url", URL, environment={})
    ended = login(run, monkeypatch, "login", "http://elsewhere.test", "--name", "lab")
    assert ended.code == 2
    assert f"context lab has the gateway {URL}, not http://elsewhere.test" in ended.err


def test_context_add_of_a_known_name_keeps_omitted_options(run: Any) -> None:
    """`context add` of a known name changes the options that it is given."""
    run("context", "add", "lab", "--url", URL, "--token-command", f"echo {TOKEN}", environment={})
    run("context", "add", "lab", "--url", f"{URL}/v2", environment={})
    shown = json.loads(run("context", "show", "lab", "-o", "json", environment={}).out)
    assert (shown["url"], shown["token_command"]) == (f"{URL}/v2", ["echo", TOKEN])
    run("context", "add", "lab", "--token-command", "cat token", environment={})
    shown = json.loads(run("context", "show", "lab", "-o", "json", environment={}).out)
    assert (shown["url"], shown["token_command"]) == (f"{URL}/v2", ["cat", "token"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("current = 5", "current is not the name of a context"),
        ('context = "prod"', "context is not a table"),
        ('[context]\nprod = "http://scanfleet.test"', "context prod is not a table with a url"),
        ("[context.prod]\nurl = 5", "context prod is not a table with a url"),
        ('[context.prod]\nurl = "http://scanfleet.test"\ntoken_command = "echo x"', "is not a list of texts"),
        ('[context.prod]\nurl = "http://scanfleet.test"\ntoken_command = [1]', "is not a list of texts"),
        ("[[context]]\nurl = 5", "context is not a table"),
        ("current = ", "cannot read"),
    ],
)
@pytest.mark.parametrize("command", [["context", "list"], ["subnet", "list"], ["context", "add", "lab"]])
def test_configuration_with_a_wrong_type_exits_2(
    run: Any, tmp_path: Path, text: str, problem: str, command: list[str]
) -> None:
    """The error names the value and the file, the exit code is 2, and the file is unchanged."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    ended = run(*command, environment={})
    assert ended.code == 2, ended.err
    assert problem in ended.err
    assert str(file) in ended.err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://scanfleet.test/", "HTTPS://Scanfleet.test:443", True),
        ("http://scanfleet.test/a/", "http://scanfleet.test/a", True),
        ("https://scanfleet.test/Team", "https://scanfleet.test/team", False),
        ("https://scanfleet.test", "http://scanfleet.test", False),
        ("https://scanfleet.test:8443", "https://scanfleet.test", False),
        ("https://scanfleet.test", "http://[::1", False),
    ],
)
def test_url_comparison_ignores_differences_without_effect(one: str, other: str, same: bool) -> None:
    """A path is compared as it is, scheme and host in any case."""
    assert same_url(one, other) is same


@pytest.mark.parametrize("url", ["scanfleet.test", "ftp://scanfleet.test", "http://scanfleet.test:port", "http://[::1"])
def test_check_of_an_invalid_url_raises(url: str) -> None:
    """Each is an error with an example, and none a traceback."""
    with pytest.raises(CommandError, match="is not the URL of a gateway"):
        check_url(url)


def test_url_that_cannot_be_parsed_exits_2(run: Any) -> None:
    """The error names the URL, also where a context's URL is compared with it."""
    run("context", "add", "lab", "--url", URL, environment={})
    ended = run("--url", "http://[::1", "job", "list", environment={})
    assert ended.code == 2
    assert "http://[::1 is not the URL of a gateway" in ended.err


def test_tokens_of_the_same_gateway_in_another_notation_are_used(tmp_path: Path) -> None:
    """Tokens belong to a gateway however its URL is written, and to no other gateway."""
    kept = StoredTokens(tmp_path, FileStore(tmp_path / "tokens.json"))
    kept.keep("lab", Tokens("https://scanfleet.test", TOKEN))
    assert kept.current("lab", "https://Scanfleet.test:443") == TOKEN
    assert kept.current("lab", "https://scanfleet.test:8443") is None


# Token commands


def jwt(seconds: float) -> str:
    claims = json.dumps({"exp": time.time() + seconds}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.x"


def counting(folder: Path, *tokens: str) -> list[str]:
    """Return a command that prints the next of these tokens each time it runs, the last one again and again."""
    script = (
        "import pathlib, sys; runs = pathlib.Path(sys.argv[1]); number = len(runs.read_text()) if runs.exists() else 0; "
        "runs.write_text('x' * (number + 1)); print(sys.argv[2:][min(number, len(sys.argv) - 3)])"
    )
    return [sys.executable, "-c", script, str(folder / "runs"), *tokens]


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


@pytest.mark.parametrize(("seconds", "expected"), [(30, 2), (3_600, 1)])
def test_token_command_runs_again_before_its_token_ends(tmp_path: Path, seconds: float, expected: int) -> None:
    """A token is used until a minute before its end."""
    token = CommandToken(counting(tmp_path, jwt(seconds), jwt(7_200)), "the command")
    token.current(), token.current(), token.current()
    assert runs(tmp_path) == expected


@pytest.mark.parametrize("output", ["", "two words"])
def test_token_command_that_prints_no_token_leaves_its_last_token_until_that_ends(tmp_path: Path, output: str) -> None:
    """An output that is not a token is a failure of the command, and does not replace a valid token."""
    first = jwt(30)
    token = CommandToken(counting(tmp_path, first, output), "the command")
    assert [token.current(), token.current()] == [first, first]
    token.refused(first)
    with pytest.raises(CommandError, match="no token in the command"):
        token.current()


def test_token_command_runs_once_for_several_threads(tmp_path: Path) -> None:
    """Of several requests at once, one runs the command and the others use what it printed."""
    token = CommandToken(counting(tmp_path, "opaque"), "the command")
    threads = [threading.Thread(target=token.current) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("command", [["subnet", "list"], ["job", "watch", "41"]])
def test_token_command_runs_again_when_its_token_is_refused(run: Any, tmp_path: Path, command: list[str]) -> None:
    """A 401 is followed by the same request with a new token, once."""
    run("scan", "127.9.8.0/24", "--no-watch")
    line = shlex.join(counting(tmp_path, "stale", TOKEN))
    run("context", "add", "lab", "--url", URL, "--token-command", line, environment={})
    assert run(*command, environment={}).code == 0
    assert runs(tmp_path) == 2


@pytest.mark.parametrize(("seconds", "code"), [(30, 0), (-1, 4)])
def test_token_command_that_fails_leaves_its_last_token_until_that_ends(
    api: FakeApi, run: Any, tmp_path: Path, seconds: float, code: int
) -> None:
    """A failure within the last minute of the token does not end the command; one after it does."""
    api.tokens = [token := jwt(seconds)]
    script = "import pathlib, sys; runs = pathlib.Path(sys.argv[1]); runs.exists() and sys.exit(1); runs.touch(); print(sys.argv[2])"
    line = shlex.join([sys.executable, "-c", script, str(tmp_path / "runs"), token])
    run("context", "add", "lab", "--url", URL, "--token-command", line, environment={})
    run("scan", "127.9.8.0/24", "--no-watch", environment={"SCANFLEET_URL": URL, "SCANFLEET_TOKEN": token})
    assert run("job", "watch", "41", environment={}).code == code


def test_token_that_is_refused_again_exits_4(api: FakeApi, run: Any, tmp_path: Path) -> None:
    """A command that prints no better token ends after two runs."""
    line = shlex.join(counting(tmp_path, "stale", "stale-too"))
    run("context", "add", "lab", "--url", URL, "--token-command", line, environment={})
    api.requests.clear()
    ended = run("subnet", "list", environment={})
    assert ended.code == 4
    assert len(api.requests) == runs(tmp_path) == 2


def test_token_of_the_environment_that_is_refused_is_not_sent_again(api: FakeApi, run: Any) -> None:
    """Only a token that can be replaced is followed by another request."""
    assert run("subnet", "list", environment={"SCANFLEET_URL": URL, "SCANFLEET_TOKEN": "stale"}).code == 4
    assert [each.headers["authorization"] for each in api.requests] == ["Bearer stale"]


HIDDEN = "sesame.sesame.sesame"
MALFORMED = {
    "two lines": f"make: Entering directory\n{HIDDEN}",
    "not ASCII": f"{HIDDEN}é",
    "a space": f"a {HIDDEN}",
    "empty": "",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("source", ["command", "variable", "file", "option", "sign-in"])
def test_malformed_token_exits_4_and_is_not_printed(
    api: FakeApi, run: Any, tmp_path: Path, source: str, text: str
) -> None:
    """A text that is not a token is not sent; the error names its source and not the text."""
    file = tmp_path / "token"
    file.write_text(text)
    arguments, environment = [], {"SCANFLEET_URL": URL}
    match source:
        case "command":
            line = shlex.join([sys.executable, "-X", "utf8", "-c", "import sys; print(sys.argv[1])", text])
            run("context", "add", "lab", "--url", URL, "--token-command", line, environment={})
            environment, named = {}, "the token_command of context"
        case "variable":
            environment["SCANFLEET_TOKEN"], named = text, "SCANFLEET_TOKEN"
        case "file":
            environment["SCANFLEET_TOKEN_FILE"], named = str(file), f"{file} (SCANFLEET_TOKEN_FILE)"
        case "option":
            arguments, named = ["--token-file", file], f"{file} (--token-file)"
        case "sign-in":
            run("context", "add", "lab", "--url", URL, environment={})
            StoredTokens(tmp_path, FileStore(tmp_path / "tokens.json")).keep("lab", Tokens(URL, text))
            environment, named = {}, "the sign-in of context lab"
    ended = run(*arguments, "subnet", "list", environment=environment)
    assert ended.code == 4
    assert named in ended.err
    assert HIDDEN not in ended.err
    assert not api.requests


def test_blank_token_variable_is_ignored_and_not_named(run: Any, tmp_path: Path) -> None:
    """The error names the source that was read."""
    file = tmp_path / "token"
    file.write_text("two words")
    environment = {"SCANFLEET_URL": URL, "SCANFLEET_TOKEN": " ", "SCANFLEET_TOKEN_FILE": str(file)}
    assert f"no token in the file {file}" in run("subnet", "list", environment=environment).err


@pytest.mark.parametrize("text", [f"make: Entering directory {HIDDEN}\n", f"{HIDDEN}é\n"])
def test_malformed_token_of_stdin_exits_4_and_is_not_printed(
    api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A text that is not a token is neither sent nor stored."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    ended = run("login", URL, "--token-stdin", environment={})
    assert ended.code == 4
    assert "stdin" in ended.err
    assert HIDDEN not in ended.err
    assert not api.requests
