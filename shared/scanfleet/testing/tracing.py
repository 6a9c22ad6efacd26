"""Spans kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from scanfleet import tracing
from scanfleet.tracing.export import SdkExporting


@contextmanager
def recording(*, ratio: float = 1.0) -> Iterator[InMemorySpanExporter]:
    """Every span that ends in the block; `ratio` of the traces that begin in it are recorded."""
    exporter = InMemorySpanExporter()
    tracing.export_to(SdkExporting("test", "test", ratio, SimpleSpanProcessor(exporter)))
    try:
        yield exporter
    finally:
        tracing.export_to(None)


def ids(span: ReadableSpan) -> SpanContext:
    """What names the span; every span of ours has one."""
    context = span.get_span_context()
    if context is None:
        raise AssertionError(f"{span.name} has no context")
    return context
