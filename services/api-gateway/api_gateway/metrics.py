"""The gateway's own numbers on /metrics."""

from __future__ import annotations

from typing import Final

from prometheus_client import Gauge

STREAMS: Final = Gauge("scanfleet_gateway_streams", "Streams of job events that are open")
