"""Export of spans to a collector, by OTLP over HTTP."""

from __future__ import annotations

from threading import Thread
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

BATCH_MS: Final = 1_000.0  # a span is visible about a second after its end
EXPORT_SECONDS: Final = 10.0  # timeout per batch, including retries
STOP_SECONDS: Final = 2.0  # timeout for the remaining spans at shutdown: below a supervisor's stop timeout


class SdkExporting:
    """Records spans with OpenTelemetry's SDK.

    Args:
        service: name of the service.
        instance: name of this process.
        ratio: fraction of the traces started here to record; for others the caller decides.
        processor: handles finished spans.
    """

    def __init__(self, service: str, instance: str, ratio: float, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(ratio),
            resource=Resource.create({"service.name": service, "service.instance.id": instance}),
            shutdown_on_exit=False,  # the owner of the process does
        )
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("scanfleet")

    def stop(self) -> None:
        # By default it waits half a minute for an unavailable collector.
        ending = Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_SECONDS)


class OtlpExporting(SdkExporting):
    """Sends spans in the background to the collector at `endpoint`; undelivered ones are dropped and logged."""

    def __init__(self, service: str, instance: str, endpoint: str, ratio: float) -> None:
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        super().__init__(service, instance, ratio, BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_MS))
