"""What the orchestrator counts, and what it last counted in the database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from job_orchestrator.domain.chunk import OPEN, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import NAMES
from job_orchestrator.domain.store import UNFINISHED, Census
from scanfleet.messages import JobStatus

_FRESH_SECONDS: Final = (
    30.0  # a census that was followed by none for so long says nothing about now; they are 10 s apart
)
_SECONDS: Final = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 86_400)  # a scan takes a second, or a day

LEASES_EXPIRED: Final = Counter(
    "scanfleet_leases_expired_total", "Running chunks taken back because their worker fell silent."
)
STALE_REPORTS: Final = Counter(
    "scanfleet_stale_reports_total", "Reports of workers refused because their token was not current."
)
UNKNOWN_CHUNKS: Final = Counter(
    "scanfleet_unknown_chunks_total", "Messages about chunks that there are not: forged, or older than the database."
)
UNREADABLE: Final = Counter(
    "scanfleet_unreadable_documents_total",
    "Documents that could not be read and were left out, by collection; the log names them.",
    ["collection"],
)
SKIPPED_JOBS: Final = Counter(
    "scanfleet_skipped_jobs_total",
    "Times that a job was skipped because of a fault or an unreadable document; the log names it.",
)
CHUNK_TRANSITIONS: Final = Counter(
    "scanfleet_chunk_transitions_total", "Chunks stored in a new state; in queued, those that came back.", ["state"]
)
PROBES: Final = Counter(
    "scanfleet_job_probes_total",
    "Probes of the jobs that completed or failed, by outcome; those of a cancelled one are in its ledger alone.",
    ["outcome"],
)
_JOB_TRANSITIONS: Final = Counter("scanfleet_job_transitions_total", "Jobs that came to a status.", ["status"])
_JOB_WAIT: Final = Histogram("scanfleet_job_wait_seconds", "From the creation of a job to its start.", buckets=_SECONDS)
_JOB_RUN: Final = Histogram("scanfleet_job_run_seconds", "From the start of a job to its end.", buckets=_SECONDS)

# Shown from the start: the first of its kind would otherwise be no increase to Prometheus.
for _state in ChunkState:
    CHUNK_TRANSITIONS.labels(_state)
for _collection in ("jobs", "chunks"):
    UNREADABLE.labels(_collection)
for _outcome in NAMES:
    PROBES.labels(_outcome)
for _status in JobStatus:
    _JOB_TRANSITIONS.labels(_status)


def job_came(job: ScanJob) -> None:
    """Count that a job came to its status."""
    _JOB_TRANSITIONS.labels(job.status).inc()
    if job.status is JobStatus.RUNNING and job.start_time:
        _JOB_WAIT.observe((job.start_time - job.created_at).total_seconds())
    elif job.start_time and job.end_time:
        _JOB_RUN.observe((job.end_time - job.start_time).total_seconds())


class CensusGauges(Collector):
    """The last census, for as long as it is true: no number is better than one of a database that cannot be asked."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._census: Census | None = None
        self._taken = float("-inf")

    def show(self, census: Census) -> None:
        self._census = census
        self._taken = self._monotonic()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        fresh = self._monotonic() - self._taken < _FRESH_SECONDS
        for (name, label), (what, read) in _GAUGES.items():
            text = f"{what}. Every replica counts the same database: take the max of them, not the sum."
            family = GaugeMetricFamily(name, text, labels=[label] if label else [])
            for value, number in read(self._census).items() if self._census and fresh else ():
                family.add_metric([value] if label else [], number)
            yield family


# What is shown of a census: name and label, what it means, and the values by that of the label.
_GAUGES: Final[dict[tuple[str, str], tuple[str, Callable[[Census], Mapping[str, float]]]]] = {
    ("scanfleet_jobs", "status"): (
        "Unfinished jobs",
        lambda census: {status: census.jobs[status] for status in UNFINISHED},
    ),
    ("scanfleet_oldest_job_age_seconds", "status"): (
        "Since the oldest unfinished job was created, 0 if there is none",
        lambda census: {status: census.job_ages.get(status, 0.0) for status in UNFINISHED},
    ),
    ("scanfleet_chunks", "state"): (
        "Chunks that are not final",
        lambda census: {state: census.chunks[state] for state in ChunkState if state in OPEN},
    ),
    ("scanfleet_queued_slot_seconds", ""): (
        "Slot seconds that all unfinished jobs are expected to take: what to scale workers on",
        lambda census: {"": census.slot_seconds},
    ),
    ("scanfleet_outbox_age_seconds", ""): (
        "Since the oldest job event that is not yet published was made, 0 if there is none",
        lambda census: {"": census.outbox_age},
    ),
}

CENSUS: Final = CensusGauges()
REGISTRY.register(CENSUS)
