"""What the orchestrator counts."""

from __future__ import annotations

from prometheus_client import Counter

LEASES_EXPIRED = Counter(
    "scanfleet_leases_expired_total", "Running chunks taken back because their worker fell silent."
)
STALE_REPORTS = Counter(
    "scanfleet_stale_reports_total", "Reports of workers refused because their token was not current."
)
