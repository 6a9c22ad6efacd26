"""Spans to a collector, by OTLP over HTTP."""

from __future__ import annotations

from threading import Thread
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

BATCH_MS: Final = 1_000.0  # a span can be looked at about a second after its end
EXPORT_S: Final = 10.0  # for one batch, its retries included
STOP_S: Final = 2.0  # for what is left at the end, when a supervisor's patience is short


class SdkExporting:
    """Spans through OpenTelemetry's SDK.

    Args:
        service: that they are spans of.
        instance: this process.
        ratio: share of the traces begun here that are recorded; of others the caller decides.
        processor: what becomes of a span that has ended.
    """

    def __init__(self, service: str, instance: str, ratio: float, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(ratio),
            resource=Resource.create({"service.name": service, "service.instance.id": instance}),
            shutdown_on_exit=False,  # its owner does
        )
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("scanfleet")

    def stop(self) -> None:
        # By itself it waits half a minute for a collector that is away.
        ending = Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_S)


class OtlpExporting(SdkExporting):
    """Sends spans in the background to the collector at `endpoint`; what it does not take is dropped, with a log line."""

    def __init__(self, service: str, instance: str, endpoint: str, ratio: float) -> None:
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S)
        super().__init__(service, instance, ratio, BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_MS))
