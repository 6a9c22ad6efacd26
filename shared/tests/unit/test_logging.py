"""Logs are one JSON line an entry, and hold no credentials."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from scanfleet import logging as ours
from scanfleet import tracing
from scanfleet.settings import CommonSettings
from scanfleet.testing.tokens import Issuer


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
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return read


@pytest.mark.proves("A17")
def test_an_entry_is_one_line(lines: Any) -> None:
    """Newlines, terminal escapes and other scripts in an entry stay on its one ASCII line."""
    hostile = 'a\nb\r\n{"level": "info"}\x1b[2J\u2028\u202e'
    structlog.get_logger("x").info("event", value=hostile)
    logging.getLogger("library").warning("from a library: %s", hostile)
    first, second = lines()
    assert (first["event"], first["value"]) == ("event", hostile)
    assert second["event"] == f"from a library: {hostile}"


def test_an_entry_says_where_it_is_from(lines: Any) -> None:
    """An entry names its service, instance, logger and level, and the request and the trace in hand."""
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


def test_the_level_is_a_setting(lines: Any) -> None:
    """Entries below the configured level are left out."""
    structlog.stdlib.get_logger("x").debug("hidden")
    logging.getLogger("library").debug("hidden")
    assert lines() == []


@pytest.mark.proves("A17")
def test_an_exception_is_on_its_line(lines: Any) -> None:
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
