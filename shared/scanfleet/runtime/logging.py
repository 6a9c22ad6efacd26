"""Logs as JSON lines on standard output: one line per entry, whatever its values contain."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import traceback
from typing import Any, Final

import structlog

from scanfleet.runtime import tracing
from scanfleet.runtime.settings import CommonSettings

# Matches text that looks like a credential; its length is bounded. Each alternative is linear: it either fails within a
# few characters, or consumes the whole run (`++`) without backtracking. Text that `_cut` has truncated matches too.
_SECRETS: Final = re.compile(
    r"eyJ[\w-]{5,}+(?:\.[\w-]*+){0,2}|(?<=[Bb]earer )[\w.~+/=-]{8,}+|(?<=://)[^/\s:@\"]++:[^/\s@\"]++(?=@| \[\d+ characters cut)"
)

# Per value: an error with its cause fits; a longer one quotes input of a caller or a scanned host.
MAX_CHARS: Final = 2_000
MAX_PATH_CHARS: Final = 200  # every path of the API is shorter
MAX_TRACEBACK_CHARS: Final = 20_000  # some 200 frames
_LIMITS: Final = {"path": MAX_PATH_CHARS, "exception": MAX_TRACEBACK_CHARS}


def configure(service: str, settings: CommonSettings) -> None:
    """Route all logs of the process, including those of libraries, through one renderer.

    Lines carry the service, the instance, the `trace_id` if there is a trace, and the values in
    `structlog.contextvars`: `request_id` for a request; `command_id`, `job_id` and `chunk_id` where the current work
    belongs to one of them.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _trace,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _origin(service, settings.instance),
        structlog.processors.ExceptionRenderer(_traceback),
    ]
    structlog.configure(
        processors=[*shared],  # structlog's `capture_logs` changes the list in place
        logger_factory=_Logger,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        ),
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    # A line per outgoing call would only repeat the access line of the called service.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    # It logs an unavailable broker a hundred times a second; `scanfleet.runtime.consumer` logs it once, and its recovery.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def render(_logger: Any, _method: str, entry: structlog.typing.EventDict) -> str:
    """Render one line of printable ASCII JSON: line breaks, control and non-ASCII characters are escaped.

    Each value is first truncated to its limit and then redacted, so that the limits bound the cost of both.
    """
    bounded = {name: _clean(value, _LIMITS.get(name, MAX_CHARS)) for name, value in entry.items()}
    return json.dumps(bounded).replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


def _clean(value: object, most: int) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRETS.sub("[secret]", _cut(value if isinstance(value, str) else repr(value), most))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} [{len(text) - most} characters cut]"


def _traceback(exc_info: structlog.typing.ExcInfo) -> str:
    """Return the end of the traceback with the error and the nearest frames; each error's text is truncated too."""
    text = "".join(_cut(part, MAX_CHARS) for part in traceback.format_exception(*exc_info)).rstrip()
    # Cut at a line break: part of a line could be part of a credential.
    return text if len(text) <= MAX_TRACEBACK_CHARS else text[-MAX_TRACEBACK_CHARS:].partition("\n")[2]


class _Logger:
    """Writes the entries of the platform's own code: through `logging` a line would cost twice as much.

    Args:
        name: name of the logger.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def debug(self, **entry: object) -> None:
        try:
            _write(render(None, "", entry))
        except Exception:  # noqa: BLE001 # as logging handlers do: a failed log write must not stop the caller
            _print_error()

    info = warning = error = critical = debug


class _Handler(logging.Handler):
    """Writes the records of libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write(self.format(record))
        except Exception:  # noqa: BLE001 # as above
            _print_error()


def _write(line: str) -> None:
    """Write to the current `sys.stdout`, which a test may have replaced since."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _print_error() -> None:
    """Print the current exception to standard error, which may be full, closed or missing too."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()


def _trace(_logger: Any, _method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if traceparent := tracing.current():
        entry.setdefault("trace_id", tracing.trace_id(traceparent))
    return entry


def _origin(service: str, instance: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"service": service, "instance": instance, **entry}

    return add
