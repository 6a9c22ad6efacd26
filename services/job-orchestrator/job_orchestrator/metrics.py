"""Metrics of the orchestrator: counters, and gauges of the last census of the database."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from job_orchestrator.domain.census import MAX_COUNTED, DeletionCensus, JobCensus
from job_orchestrator.domain.chunk import OPEN, ChunkState
from job_orchestrator.domain.deletion import REASONS
from job_orchestrator.domain.job import UNFINISHED, ScanJob
from job_orchestrator.domain.ledger import NAMES
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.rest import RESOURCES
from scanfleet.services import SERVICES

_FRESH_SECONDS: Final = 30.0  # maximum age of an exported census; they are 10 s apart
_SECONDS: Final = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 86_400)  # a scan takes from a second to a day

_Part = TypeVar("_Part")

LEASES_EXPIRED: Final = Counter(
    "scanfleet_leases_expired_total",
    "Attempts that ended because their worker sent no report within the lease, or was replaced by another process.",
)
DUPLICATE_WORKERS: Final = Counter(
    "scanfleet_duplicate_workers_total",
    "Announcements of a worker process after another process had replaced it under the same name; the log has the name.",
)
IGNORED_WORKERS: Final = Counter(
    "scanfleet_ignored_workers_total",
    "Announcements of workers that were ignored since the replica had the maximum number of worker instances.",
)
AUDIT_EXCESS: Final = Counter(
    "scanfleet_audit_excess_total",
    "Refusals that are only counted in the audit log, since their service had sent the maximum number of a minute.",
    ["service"],
)
STALE_REPORTS: Final = Counter(
    "scanfleet_stale_reports_total", "Worker reports rejected because their token was not current."
)
UNKNOWN_CHUNKS: Final = Counter(
    "scanfleet_unknown_chunks_total", "Messages about unknown chunks: forged, or older than a restored database."
)
UNREADABLE: Final = Counter(
    "scanfleet_unreadable_documents_total",
    "Documents that could not be read and were omitted, by collection; the log has their ids.",
    ["collection"],
)
SKIPPED_JOBS: Final = Counter(
    "scanfleet_skipped_jobs_total",
    "Number of times that a job was skipped because of an error or an unreadable document; the log has its id.",
)
CHUNK_TRANSITIONS: Final = Counter(
    "scanfleet_chunk_transitions_total", "Chunks stored in a new state; queued counts requeued ones.", ["state"]
)
DELETIONS: Final = Counter("scanfleet_deletions_total", "Accepted deletions of jobs.", ["reason"])
DELETED_JOBS: Final = Counter(
    "scanfleet_deleted_jobs_total",
    "Completed deletions: only the receipt and the attempts of the job remain.",
    ["reason"],
)
DELETED_CHUNKS: Final = Counter("scanfleet_deleted_chunks_total", "Deleted chunks of deleted jobs.")
RETENTION_HALTED: Final = Gauge(
    "scanfleet_retention_halted",
    "1 while deletion by age is halted: the database's clock has jumped, or no orchestrator was running for longer than the "
    "shortest retention.",
)
PROBES: Final = Counter(
    "scanfleet_job_probes_total",
    "Probes of completed and failed jobs, by outcome; those of cancelled jobs are only in their ledgers.",
    ["outcome"],
)
_JOB_TRANSITIONS: Final = Counter("scanfleet_job_transitions_total", "Job transitions, by new status.", ["status"])
_JOB_WAIT: Final = Histogram(
    "scanfleet_job_wait_seconds", "Time from the creation of a job to its start.", buckets=_SECONDS
)
_JOB_RUN: Final = Histogram("scanfleet_job_run_seconds", "Time from the start of a job to its end.", buckets=_SECONDS)

# Exported from the start: otherwise Prometheus would not see the first event as an increase.
for _state in ChunkState:
    CHUNK_TRANSITIONS.labels(_state)
_COLLECTIONS: Final = ("jobs", "chunks", "clocks", "workers", "audit", "deletions", "revocations")
for _collection in (*_COLLECTIONS, *(each.plural for each in RESOURCES)):
    UNREADABLE.labels(_collection)
for _service in SERVICES:
    AUDIT_EXCESS.labels(_service)
for _reason in REASONS:
    DELETIONS.labels(_reason)
    DELETED_JOBS.labels(_reason)
for _outcome in NAMES:
    PROBES.labels(_outcome)
for _status in JobStatus:
    _JOB_TRANSITIONS.labels(_status)


def count_transition(job: ScanJob) -> None:
    """Count the job's transition to its status."""
    _JOB_TRANSITIONS.labels(job.status).inc()
    if job.status is JobStatus.RUNNING and job.start_time:
        _JOB_WAIT.observe((job.start_time - job.created_at).total_seconds())
    elif job.start_time and job.end_time:
        _JOB_RUN.observe((job.end_time - job.start_time).total_seconds())


class CensusGauges(Collector, Generic[_Part]):
    """Gauges of the last part of a census while it is fresh: without a reachable database no values are exported.

    Args:
        gauges: by name and label: the description, and the values by label value.
        monotonic: returns a time in seconds that never decreases.
    """

    def __init__(
        self,
        gauges: Mapping[tuple[str, str], tuple[str, Callable[[_Part], Mapping[str, float]]]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gauges = gauges
        self._monotonic = monotonic
        self._part: _Part | None = None
        self._taken = float("-inf")

    def show(self, part: _Part) -> None:
        self._part = part
        self._taken = self._monotonic()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        fresh = self._monotonic() - self._taken < _FRESH_SECONDS
        for (name, label), (what, read) in self._gauges.items():
            text = f"{what}. Every replica counts the same database: use the maximum over replicas, not the sum."
            family = GaugeMetricFamily(name, text, labels=[label] if label else [])
            for value, number in read(self._part).items() if self._part is not None and fresh else ():
                family.add_metric([value] if label else [], number)
            yield family


JOB_CENSUS: Final = CensusGauges[JobCensus](
    {
        ("scanfleet_jobs", "status"): (
            "Unfinished jobs",
            lambda jobs: {status: jobs.numbers[status] for status in UNFINISHED},
        ),
        ("scanfleet_oldest_job_age_seconds", "status"): (
            "Age since creation of the oldest unfinished job, without those that wait for their user's hours; 0 if there is none",
            lambda jobs: {status: jobs.ages_seconds.get(status, 0.0) for status in UNFINISHED},
        ),
        ("scanfleet_queued_slot_seconds", ""): (
            "Expected slot seconds of all unfinished jobs that do not wait for their user's hours, for scaling workers",
            lambda jobs: {"": jobs.slot_seconds},
        ),
    }
)
OUTBOX_AGE: Final = CensusGauges[float](
    {
        ("scanfleet_outbox_age_seconds", ""): (
            "Age of the oldest unpublished job event, 0 if there is none",
            lambda age: {"": age},
        ),
    }
)
CHUNK_CENSUS: Final = CensusGauges[collections.Counter[ChunkState]](
    {
        ("scanfleet_chunks", "state"): (
            f"Chunks that are not final, each state counted up to {MAX_COUNTED:,}",
            lambda chunks: {state: chunks[state] for state in ChunkState if state in OPEN},
        ),
    }
)
DELETION_CENSUS: Final = CensusGauges[DeletionCensus](
    {
        ("scanfleet_deletions_open", ""): (
            "Deletions of jobs that are accepted and not complete",
            lambda deletions: {"": deletions.open},
        ),
        ("scanfleet_deletion_oldest_seconds", ""): (
            "Time since the request of the oldest deletion that is not complete, 0 if there is none",
            lambda deletions: {"": deletions.age_seconds},
        ),
    }
)
for _gauges in (JOB_CENSUS, OUTBOX_AGE, CHUNK_CENSUS, DELETION_CENSUS):
    REGISTRY.register(_gauges)
