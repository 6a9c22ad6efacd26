"""W3C trace context and spans: the trace of the current work, and the header to propagate.

Only this package imports OpenTelemetry. Without a collector no span is created: the caller's span stays the parent of
downstream calls, at the cost of a microsecond.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal, Protocol, TypeGuard, TypeVar

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

from scanfleet.contracts.messages.base import TRACEPARENT
from scanfleet.runtime.settings import CommonSettings

Kind = Literal["internal", "server", "producer", "consumer"]
Attributes = Mapping[str, str | int]

_K = TypeVar("_K", int, str)

__all__ = ["Span", "configure", "current", "export_to", "span", "spans", "stop", "trace_id", "within"]


class Exporting(Protocol):
    """Exports spans."""

    tracer: Tracer

    def stop(self) -> None:
        """Export the remaining spans, with a timeout of a few seconds."""


_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_exporting: Exporting | None = None


def configure(service: str, settings: CommonSettings) -> None:
    """Enable spans if the settings name a collector, else disable them."""
    if settings.otlp_endpoint is None:
        export_to(None)
        return
    from scanfleet.runtime.tracing.export import OtlpExporting  # noqa: PLC0415 # 10 MB and 0.2 s, paid only if it is used

    export_to(OtlpExporting(service, settings.instance, str(settings.otlp_endpoint), settings.otlp_ratio))


def export_to(exporting: Exporting | None) -> None:
    """Set the exporter of this process and stop the previous one."""
    global _exporting  # one per process, like the configuration of logs
    before, _exporting = _exporting, exporting
    if before is not None:
        before.stop()


async def stop() -> None:
    """Export the remaining spans and disable recording."""
    if _exporting is not None:
        await asyncio.to_thread(export_to, None)


def current() -> str | None:
    """Return the traceparent to propagate, None outside of a trace."""
    return _current.get()


def trace_id(traceparent: str) -> str:
    return traceparent.split("-")[1]


@contextmanager
def within(header: str | None) -> Iterator[Span]:
    """Run the block in the trace that `header` names, or in none, without a span."""
    token = _current.set(header if _valid(header) else None)
    try:
        yield INVALID_SPAN
    finally:
        _current.reset(token)


@contextmanager
def span(
    name: str, header: str | None, kind: Kind = "internal", attributes: Attributes | None = None
) -> Iterator[Span]:
    """Run the block in a span, in the trace that `header` names, or in a new one if it names none.

    Args:
        name: the operation; of low cardinality.
        header: a traceparent; its sampled flag is honoured.
        kind: span kind of OpenTelemetry.
        attributes: the object of the operation.

    Yields:
        The span, for attributes that are known only at the end. A span that is not recorded ignores them.
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
    """Run a block that works on several traces at once in a span of each.

    Args:
        name: the operation, or a function that returns it for a key.
        headers: traceparent by key; keys without one get no span.
        kind: span kind of OpenTelemetry.
        attribute: name of the attribute with the key.

    Yields:
        The traceparent to propagate for each key.
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
    parent = Context()  # empty: spans of other users of OpenTelemetry in this process must not become parents
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
        # Only its type: the text may contain a caller's input or a credential.
        made.set_attribute("error.type", type(error).__qualname__)
        made.set_status(StatusCode.ERROR)
    made.end()
