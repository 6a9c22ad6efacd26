"""The worker's own metrics."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

SLOTS: Final = Gauge(
    "scanfleet_worker_slots", "Maximum number of concurrent nmap processes; 0 during shutdown or exclusion."
)
EXCLUDED: Final = Gauge(
    "scanfleet_worker_excluded", "1 if the worker gets no chunks because it cannot run nmap, else 0."
)
EXCLUSIONS: Final = Counter(
    "scanfleet_worker_exclusions_total", "Times that the worker was excluded because nmap failed."
)
NMAP_STARTS: Final = Counter(
    "scanfleet_worker_nmap_starts_total", "nmap processes started; one process can scan several small chunks."
)
NMAP_RUNNING: Final = Gauge("scanfleet_worker_nmap_running", "nmap processes running.")
ADDRESSES: Final = Counter("scanfleet_worker_addresses_total", "Addresses finished, by outcome.", ["outcome"])
CHUNKS: Final = Counter("scanfleet_worker_chunks_total", "Chunk attempts finished on this worker, by result.", ["end"])
