"""The command as a shell would run it, against a double of the API."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from scanfleet_cli import main
from scanfleet_cli.config import Config
from scanfleet_cli.output import Output
from scanfleet_cli.session import Effects, Session
from scanfleet_cli.tokens import FileStore
from scanfleet_cli_testing.api import TOKEN, FakeApi

URL = "http://scanfleet.test"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def effects(api: FakeApi, tmp_path: Path) -> Effects:
    store = FileStore(tmp_path / "tokens.json")
    return Effects(transport=api, async_transport=api, first_pause_seconds=0.001, poll_seconds=0.001, store=store)


@pytest.fixture
def run(effects: Effects, tmp_path: Path) -> Run:
    """Runs `scanfleet ARGUMENTS` with a token in the environment; `width` is that of a terminal."""

    def go(
        *arguments: object, width: int = 0, environment: dict[str, str] | None = None, effects: Effects = effects
    ) -> Ended:
        output = Output(io.StringIO(), io.StringIO())
        output.width = width
        known = {"SCANFLEET_URL": URL, "SCANFLEET_TOKEN": TOKEN} if environment is None else environment
        session = Session(Config(tmp_path, known), output, effects)
        code = main.run(list(map(str, arguments)), session)
        assert isinstance(output.stdout, io.StringIO)
        assert isinstance(output.stderr, io.StringIO)
        return Ended(int(code), output.stdout.getvalue(), output.stderr.getvalue())

    return go
