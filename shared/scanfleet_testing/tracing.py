"""In-memory recording of spans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from scanfleet.runtime import tracing
from scanfleet.runtime.tracing.export import SdkExporting


@contextmanager
def recording(*, ratio: float = 1.0) -> Iterator[InMemorySpanExporter]:
    """Record every span that ends in the block; `ratio` is the fraction of new traces to record."""
    exporter = InMemorySpanExporter()
    tracing.export_to(SdkExporting("test", "test", ratio, SimpleSpanProcessor(exporter)))
    try:
        yield exporter
    finally:
        tracing.export_to(None)


def ids(span: ReadableSpan) -> SpanContext:
    """Return the span's context, which every recorded span has."""
    context = span.get_span_context()
    if context is None:
        raise AssertionError(f"{span.name} has no context")
    return context
