"""Logs are one JSON line an entry, and hold no credentials."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scanfleet.runtime import logging as ours
from scanfleet.runtime import tracing
from scanfleet.runtime.settings import CommonSettings
from scanfleet_testing.tokens import Issuer


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def lines(_restored: None, capsys: pytest.CaptureFixture[str]) -> Any:
    ours.configure("test-service", CommonSettings(instance="test-1", log_level="info"))

    def read() -> list[dict[str, Any]]:
        text = capsys.readouterr().out
        assert re.fullmatch(r"[\n\x20-\x7e]*", text)
        return [json.loads(line) for line in text.splitlines()]

    return read


@pytest.mark.proves("A17", "A29")
def test_entry_with_control_characters_is_one_printable_line(lines: Any) -> None:
    """Line breaks, terminal escapes, C1 and bidirectional characters in an entry stay on its one printable ASCII line."""
    hostile = 'a\nb\r\n{"level": "info"}\x1b[2J\x7f\x9b31m\u2028\u202e'
    structlog.get_logger("x").info("event", value=hostile)
    logging.getLogger("library").warning("from a library: %s", hostile)
    first, second = lines()
    assert (first["event"], first["value"]) == ("event", hostile)
    assert second["event"] == f"from a library: {hostile}"


def test_entry_names_service_logger_request_and_trace(lines: Any) -> None:
    """An entry has its service, instance, logger and level, and the current request and trace."""
    with (
        tracing.within("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        structlog.contextvars.bound_contextvars(request_id="r-1", job_id=41),
    ):
        structlog.stdlib.get_logger("x.y").warning("event")
    (entry,) = lines()
    assert (entry["service"], entry["instance"]) == ("test-service", "test-1")
    assert (entry["logger"], entry["level"]) == ("x.y", "warning")
    assert (entry["request_id"], entry["job_id"]) == ("r-1", 41)
    assert entry["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert entry["timestamp"].endswith("Z")


def test_entries_below_the_level_are_omitted(lines: Any) -> None:
    """Entries below the configured level are omitted."""
    structlog.stdlib.get_logger("x").debug("hidden")
    logging.getLogger("library").debug("hidden")
    assert lines() == []


def test_entry_that_cannot_be_rendered_does_not_stop_its_caller(lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The caller of a failed log write continues, and the cause is on standard error."""

    class Broken:
        def __repr__(self) -> str:
            raise ValueError("no text")

    structlog.get_logger("x").info("event", value=Broken())
    written = capsys.readouterr()
    assert written.out == ""
    assert "ValueError: no text" in written.err
    structlog.get_logger("x").info("next")
    assert [entry["event"] for entry in lines()] == ["next"]


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("closed"), None])
def test_entry_that_neither_stream_accepts_does_not_stop_its_caller(
    lines: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """The caller continues if both streams fail, or standard error does not exist."""

    class Failing(io.StringIO):
        def write(self, _text: str) -> int:
            raise error or OSError

    with monkeypatch.context() as replaced:
        replaced.setattr(sys, "stdout", Failing())
        replaced.setattr(sys, "stderr", Failing() if error else None)
        structlog.get_logger("x").info("event")
        logging.getLogger("library").warning("event")
    structlog.get_logger("x").info("next")
    assert [entry["event"] for entry in lines()] == ["next"]


def test_entry_of_a_library_is_written_while_a_test_captures_logs(lines: Any) -> None:
    """Only the platform's own entries are captured."""
    with structlog.testing.capture_logs() as captured:
        structlog.get_logger("x").info("own")
        logging.getLogger("library").info("theirs")
    assert [entry["event"] for entry in captured] == ["own"]
    assert [entry["event"] for entry in lines()] == ["theirs"]


@pytest.mark.proves("A17")
def test_exception_is_in_one_line_with_its_entry(lines: Any) -> None:
    """A traceback is part of its entry."""
    structlog.stdlib.get_logger("x").error("failed", exc_info=ValueError("two\nlines"))
    (entry,) = lines()
    assert "ValueError: two\nlines" in entry["exception"]


@pytest.mark.proves("A17")
@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {token}",
        "authorization: bearer {token}",
        "{token}",
        "Bearer opaque-token-{secret}",
        "mongodb://user:{secret}@host:27017/?replicaSet=rs0",
        "mongodb://user:p{secret}%40word@host",
    ],
)
def test_credentials_are_cut_out(lines: Any, text: str) -> None:
    """A token or a password in any field, message or traceback does not reach the log."""
    token, secret = Issuer().token(), "Sesame99"
    hostile = text.format(token=token, secret=secret)
    log = structlog.stdlib.get_logger("x")
    log.info(hostile, field=hostile, nested={"deep": [hostile]})
    logging.getLogger("library").warning("%s", hostile)
    log.error("failed", exc_info=ValueError(hostile))
    entries = lines()
    assert len(entries) == 3
    for entry in entries:
        assert secret not in str(entry)
        assert token.split(".")[1] not in str(entry)
        assert "[secret]" in str(entry)


def test_value_over_its_limit_is_cut(lines: Any) -> None:
    """A path is cut at 200 characters, another value at 2,000 and a traceback at 20,000, of which the end is kept."""
    log = structlog.stdlib.get_logger("x")
    log.info("x" * 3_000, path="/" * 3_000, field="y" * 3_000, nested={"deep": ["z" * 3_000]})
    try:
        raise ExceptionGroup("many", [ValueError(f"{number} " + "w" * 3_000) for number in range(15)])  # noqa: TRY301 # only a raised one has a traceback
    except ExceptionGroup:
        log.exception("failed")
    first, second = lines()
    assert first["path"] == "/" * 200 + " [2800 characters cut]"
    for name in ("event", "field"):
        assert first[name] == first[name][0] * 2_000 + " [1000 characters cut]"
    assert len(first["nested"]) < 2_050
    assert len(second["exception"]) <= 20_000
    assert "ValueError: 14 www" in second["exception"]


@pytest.mark.proves("A17")
@pytest.mark.parametrize("text", ["{token}", "Bearer opaque-token-{secret}", "mongodb://user:{secret}@host"])
@pytest.mark.parametrize("kept", range(1, 12))
def test_credential_across_the_limit_is_cut_out(lines: Any, text: str, kept: int) -> None:
    """A credential that the limit of its value cuts in two leaves nothing of use in the log."""
    hostile = text.format(token=Issuer().token(), secret="Sesame99-" * 30)
    for before in (ours.MAX_CHARS - 15 - kept, ours.MAX_CHARS - 30 * kept):
        structlog.stdlib.get_logger("x").info("event", field=" " * before + hostile)
    for entry in lines():
        assert "Sesame99" not in entry["field"]
        assert not re.search(r"eyJ[\w-]{5}", entry["field"])


PIECES = (
    "eyJ",
    "eyJaaaaa",
    ".",
    "-",
    "a",
    ":",
    "@",
    "/",
    "://",
    "://a:",
    "Bearer ",
    "bearer",
    '"',
    "\\",
    "\n",
    "\x00",
    "\u202e",
)
SECONDS_PER_CHARACTER = 2e-7  # six values of each entry hold the text; ten times what they take on a quiet machine


@pytest.mark.proves("A19")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    unit=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    characters=st.sampled_from([2**16, 2**20]),
)
def test_rendering_costs_no_more_than_its_length(lines: Any, unit: str, characters: int) -> None:
    """An entry of n characters, whatever they are, takes CPU time in proportion to n at most, and its line is bounded."""
    text = unit * (characters // len(unit))
    log = structlog.stdlib.get_logger("x")
    started = time.process_time()
    log.error(text, path=text, field=text, nested=[text], exc_info=ValueError(text))
    logging.getLogger("library").error("%s", text)
    spent = time.process_time() - started
    assert sum(len(str(entry)) for entry in lines()) < 100_000
    assert spent < 0.05 + SECONDS_PER_CHARACTER * 6 * len(text)
