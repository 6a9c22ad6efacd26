"""An OpenTelemetry collector that keeps received spans in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """Ids are in hexadecimal; `parent` is empty at the root."""

    trace: str
    id: str
    parent: str
    service: str
    name: str


@dataclass
class Collector:
    """Listens at `url` for OTLP over HTTP."""

    url: str
    spans: list[Span] = field(default_factory=list)

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in list(self.spans) if span.trace == trace_id]


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    serving = Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for of_service in request.resource_spans:
        attributes = {each.key: each.value.string_value for each in of_service.resource.attributes}
        for scope in of_service.scope_spans:
            for each in scope.spans:
                ids = (each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex())
                yield Span(*ids, attributes["service.name"], each.name)
