"""W3C trace context: which trace the work in hand belongs to, and the header to hand on."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from typing import Final

TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


def enter(header: str | None) -> str:
    """Let the current task continue the trace that `header` names, or begin one if it names none; answer its traceparent.

    No span is recorded, so the caller's span stays the parent of whatever is called next.
    """
    if header is None or TRACEPARENT.fullmatch(header) is None:
        header = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    _current.set(header)
    return header


def current() -> str | None:
    """The traceparent to hand on, None outside of any trace."""
    return _current.get()


def trace_id(traceparent: str) -> str:
    return traceparent.split("-")[1]
