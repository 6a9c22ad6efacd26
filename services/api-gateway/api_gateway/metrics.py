"""The gateway's own metrics."""

from __future__ import annotations

from typing import Final

from prometheus_client import Gauge

STREAMS: Final = Gauge("scanfleet_gateway_streams", "Open streams of job events")
