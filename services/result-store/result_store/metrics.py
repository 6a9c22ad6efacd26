"""The metrics of result-store."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter

HOSTS_STORED: Final = Counter("scanfleet_results_hosts_stored_total", "Hosts stored.")
DUPLICATES: Final = Counter("scanfleet_results_duplicates_total", "Hosts that were already stored.")
LATE: Final = Counter(
    "scanfleet_results_late_total", "Hosts received after their chunk was closed; they are not added to the results."
)
CHUNKS_CLOSED: Final = Counter("scanfleet_results_chunks_closed_total", "Chunks closed.")
CHUNKS_INCOMPLETE: Final = Counter(
    "scanfleet_results_chunks_incomplete_total", "ChunkScanned messages with hosts that were not stored."
)
OF_DELETED_JOBS: Final = Counter(
    "scanfleet_results_of_deleted_jobs_total", "Batches with results of deleted jobs, which are deleted again."
)
DELETED_DOCUMENTS: Final = Counter(
    "scanfleet_results_deleted_documents_total",
    "Deleted documents of deleted jobs: hosts, closed chunks or their port_sets.",
    ["kind"],
)
DELETIONS_FAILED: Final = Counter(
    "scanfleet_results_deletions_failed_total",
    "Failed attempts to delete the results of a job; retried after a minute.",
)
UNCOVERED: Final = Counter(
    "scanfleet_results_uncovered_total",
    "Records dropped because no valid signature covers them, or their ports are invalid.",
)
