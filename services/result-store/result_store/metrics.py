"""The metrics of result-store."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter

HOSTS_STORED: Final = Counter("scanfleet_results_hosts_stored", "Hosts stored.")
DUPLICATES: Final = Counter("scanfleet_results_duplicates", "Hosts that were already stored.")
LATE: Final = Counter(
    "scanfleet_results_late", "Hosts received after their chunk was closed; they are not added to the results."
)
CHUNKS_CLOSED: Final = Counter("scanfleet_results_chunks_closed", "Chunks closed.")
CHUNKS_INCOMPLETE: Final = Counter(
    "scanfleet_results_chunks_incomplete", "ChunkScanned messages with hosts that were not stored."
)
OF_DELETED_JOBS: Final = Counter(
    "scanfleet_results_of_deleted_jobs", "Batches with results of deleted jobs, which are deleted again."
)
DELETED_DOCUMENTS: Final = Counter(
    "scanfleet_results_deleted_documents",
    "Deleted documents of deleted jobs: hosts, closed chunks or their port_sets.",
    ["kind"],
)
DELETIONS_FAILED: Final = Counter(
    "scanfleet_results_deletions_failed", "Failed attempts to delete the results of a job; retried after a minute."
)
UNCOVERED: Final = Counter(
    "scanfleet_results_uncovered", "Records dropped because no valid signature covers them, or their ports are invalid."
)
