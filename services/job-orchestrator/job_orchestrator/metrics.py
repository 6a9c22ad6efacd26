"""What the orchestrator counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

LEASES_EXPIRED = Counter(
    "scanfleet_leases_expired_total", "Running chunks taken back because their worker fell silent."
)
STALE_REPORTS = Counter(
    "scanfleet_stale_reports_total", "Reports of workers refused because their token was not current."
)
UNKNOWN_CHUNKS = Counter(
    "scanfleet_unknown_chunks_total", "Messages about chunks that there are not: forged, or older than the database."
)
QUEUED_SECONDS = Gauge(
    "scanfleet_queued_slot_seconds", "Estimated slot seconds of all queued chunks, whoever's: what to scale workers on."
)
