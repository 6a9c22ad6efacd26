"""W3C trace context, and the spans of this process: which trace the work in hand belongs to, and the header to hand on.

Nothing but this package knows OpenTelemetry. Without a collector no span is made: the caller's stays the parent of whatever
is called next, and all of this costs a microsecond.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Final, Literal, Protocol, TypeGuard, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from scanfleet.settings import CommonSettings

TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Kind = Literal["internal", "server", "producer", "consumer"]
Attributes = Mapping[str, str | int]

_K = TypeVar("_K", int, str)

__all__ = ["TRACEPARENT", "Span", "configure", "current", "export_to", "span", "spans", "stop", "trace_id", "within"]


class Exporting(Protocol):
    """Where spans go."""

    tracer: Tracer

    def stop(self) -> None:
        """Send what is left; gives up after a few seconds."""


_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_exporting: Exporting | None = None


def configure(service: str, settings: CommonSettings) -> None:
    """Record spans from now on if the settings name a collector, else none."""
    if settings.otlp_endpoint is None:
        export_to(None)
        return
    from scanfleet.tracing.export import OtlpExporting  # noqa: PLC0415 # 10 MB and 0.2 s that only those pay who use it

    export_to(OtlpExporting(service, settings.instance, str(settings.otlp_endpoint), settings.otlp_ratio))


def export_to(exporting: Exporting | None) -> None:
    """Let every span of this process go there; the one before is stopped."""
    global _exporting  # one a process, as the logs' configuration is
    before, _exporting = _exporting, exporting
    if before is not None:
        before.stop()


async def stop() -> None:
    """Send what is left, and record nothing from now on."""
    if _exporting is not None:
        await asyncio.to_thread(export_to, None)


def current() -> str | None:
    """The traceparent to hand on, None outside of any trace."""
    return _current.get()


def trace_id(traceparent: str) -> str:
    return traceparent.split("-")[1]


@contextmanager
def within(header: str | None) -> Iterator[Span]:
    """Let what is done in the block belong to the trace that `header` names, or to none; no span tells of it."""
    token = _current.set(header if _valid(header) else None)
    try:
        yield INVALID_SPAN
    finally:
        _current.reset(token)


@contextmanager
def span(
    name: str, header: str | None, kind: Kind = "internal", attributes: Attributes | None = None
) -> Iterator[Span]:
    """A span around the block, in the trace that `header` names, or in a new one if it names none.

    Args:
        name: what is done; of low cardinality.
        header: a traceparent from anywhere; its sampled flag is honoured.
        kind: as OpenTelemetry has it.
        attributes: which one it is done to.

    Yields:
        The span, to name and describe what only the end tells. One that is not recorded takes everything and does nothing.
    """
    made = _start(name, header, kind, attributes)
    if made is not INVALID_SPAN:
        onward = _traceparent(made)
    elif _valid(header):
        onward = header
    else:
        onward = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    token = _current.set(onward)
    with ExitStack() as ending:
        ending.callback(_current.reset, token)
        ending.push(partial(_end, made))
        yield made


@contextmanager
def spans(
    name: str | Callable[[_K], str],
    headers: Mapping[_K, str | None],
    kind: Kind,
    attribute: str,
) -> Iterator[Mapping[_K, str | None]]:
    """A span for each of these traces around one block, which works for all of them at once.

    Args:
        name: what is done, or how to name it for a key.
        headers: the traceparent of each thing that is worked on; those without one get no span.
        kind: as OpenTelemetry has it.
        attribute: under which name the span holds its key.

    Yields:
        The traceparent to hand on for each.
    """
    if _exporting is None:
        yield headers
        return
    onward = dict(headers)
    with ExitStack() as ending:
        for key, header in headers.items():
            if not _valid(header):
                continue
            made = _start(name if isinstance(name, str) else name(key), header, kind, {attribute: key})
            if made is not INVALID_SPAN:
                onward[key] = _traceparent(made)
                ending.push(partial(_end, made))
        yield onward


def _valid(header: str | None) -> TypeGuard[str]:
    return header is not None and TRACEPARENT.fullmatch(header) is not None


def _start(name: str, header: str | None, kind: Kind, attributes: Attributes | None) -> Span:
    if _exporting is None:
        return INVALID_SPAN
    parent = Context()  # an empty one: whoever else uses OpenTelemetry in this process is no parent of ours
    if _valid(header):
        _, trace, caller, flags = header.split("-")
        if not int(flags, 16) & TraceFlags.SAMPLED:
            return INVALID_SPAN
        context = SpanContext(int(trace, 16), int(caller, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
        parent = set_span_in_context(NonRecordingSpan(context), parent)
    return _exporting.tracer.start_span(name, parent, SpanKind[kind.upper()], attributes)


def _traceparent(made: Span) -> str:
    context = made.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _end(made: Span, _kind: object, error: BaseException | None, _traceback: object) -> None:
    if error is not None:
        # Its kind alone: what it says may quote a caller or a credential.
        made.set_attribute("error.type", type(error).__qualname__)
        made.set_status(StatusCode.ERROR)
    made.end()
