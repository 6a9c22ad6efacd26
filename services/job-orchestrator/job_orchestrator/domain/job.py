"""A job and all of its state changes.

`TABLE` defines the life cycle of a job. Only functions of this module change a job's status, progress or outbox, and each of
them increments `seq`, by which readers order its events. An illegal change raises without side effects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeVar

from pydantic import AwareDatetime, PositiveInt, StrictInt

from job_orchestrator.domain.totals import EMPTY, Totals
from scanfleet.contracts.messages import (
    Job,
    JobCancelled,
    JobCompleted,
    JobCreated,
    JobEvent,
    JobFailed,
    JobProgressed,
    JobStarted,
    JobStatus,
)
from scanfleet.errors import ScanfleetError
from scanfleet.scanning.policy import ScanPolicy

_E = TypeVar("_E", bound=JobEvent)


class JobTrigger(StrEnum):
    START = "start"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


TABLE: Final[dict[JobStatus, dict[JobTrigger, JobStatus]]] = {
    JobStatus.PENDING: {
        JobTrigger.START: JobStatus.RUNNING,
        JobTrigger.FAIL: JobStatus.FAILED,
        JobTrigger.CANCEL: JobStatus.CANCELLED,
    },
    JobStatus.RUNNING: {
        JobTrigger.COMPLETE: JobStatus.COMPLETED,
        JobTrigger.FAIL: JobStatus.FAILED,
        JobTrigger.CANCEL: JobStatus.CANCELLED,
    },
    JobStatus.COMPLETED: {},
    JobStatus.FAILED: {},
    JobStatus.CANCELLED: {},
}

_EVENTS: Final[dict[JobTrigger, type[JobEvent]]] = {
    JobTrigger.START: JobStarted,
    JobTrigger.COMPLETE: JobCompleted,
    JobTrigger.FAIL: JobFailed,
    JobTrigger.CANCEL: JobCancelled,
}


MAX_AHEAD: Final = timedelta(minutes=1)  # later events in an outbox are from a clock that was ahead
UNFINISHED: Final = (JobStatus.PENDING, JobStatus.RUNNING)


class IllegalJobChangeError(ScanfleetError):
    """The transition is not in the table."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event that is stored in the job until the bus has acknowledged it; `at` is when it was added."""

    event: JobEvent
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The stored parameters of a job's plan, so that a release with another algorithm creates the same chunks.

    `chunk_count` is the number that the job reports; a slice whose addresses are all excluded has no chunk.
    """

    addresses: int
    excluded: int
    ports: int
    chunk_addresses: PositiveInt
    chunk_ports: PositiveInt
    blocks: PositiveInt
    """Number of blocks of ports, which are scanned one after the other for each address."""
    chunk_count: int
    estimate: float
    """Estimated slot seconds of the whole job, by its policy."""
    blockwise: bool = True
    """Chunks are numbered block by block; slice by slice in documents of release 0.1."""

    @property
    def probes(self) -> int:
        """Addresses × ports of the request."""
        return self.addresses * self.ports

    @property
    def slice_count(self) -> int:
        """Number of slices of addresses, each scanned block by block."""
        return self.chunk_count // self.blocks

    @property
    def parallel(self) -> int:
        """Maximum number of chunks at once, at any rate: one of each slice, but all of a job of release 0.1."""
        return self.slice_count if self.blockwise else self.chunk_count


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanJob:
    """A job with its snapshot of subnet and policy. Every stored change increments `rev`, the compare-and-set token."""

    id: int
    user_id: int
    policy_id: int
    subnet_id: int
    cidr: str
    exclude: tuple[str, ...]
    policy: ScanPolicy
    plan: Plan
    partition: int
    """Partition of the topics that are keyed by job: its owner in scan-progress drives the job."""
    created_at: AwareDatetime
    updated_at: AwareDatetime
    command_id: str
    zone: str = ""
    """The network from which it is scanned; always empty, since there is one. Stored since 0.1."""
    granted_by: str = ""
    """The user grant that it was accepted under; empty if there were none."""
    turn: int = 0
    """Position of its first chunk among the chunks of its user."""
    made: int = 0
    """Number of chunks created so far: those with a lower index exist."""
    totals: Totals = EMPTY
    """Totals of the first chunks, all of which have ended."""
    seconds_left: float = 0.0
    """Expected slot seconds of the rest of the job."""
    status: JobStatus = JobStatus.PENDING
    start_time: AwareDatetime | None = None
    end_time: AwareDatetime | None = None
    progress: int = 0
    machines_found: int = 0
    error: str = ""
    eta_seconds: float | None = None
    waiting: str = ""
    waiting_since: AwareDatetime | None = None
    seq: int = 0
    rev: StrictInt = 0
    cancel_command: str | None = None
    settled: bool = False
    """The job and all of its chunks are final: nothing is left to reconcile."""
    traceparent: str | None = None
    outbox: tuple[Outgoing, ...] = ()

    @property
    def final(self) -> bool:
        return self.status.final

    @property
    def view(self) -> Job:
        return Job(
            id=self.id,
            user_id=self.user_id,
            policy_id=self.policy_id,
            subnet_id=self.subnet_id,
            status=self.status,
            start_time=self.start_time,
            end_time=self.end_time,
            created_at=self.created_at,
            updated_at=self.updated_at,
        )


def create(job: ScanJob) -> ScanJob:
    """Return the job with its first event."""
    return _emit(job, JobCreated, job.created_at)


def change(job: ScanJob, trigger: JobTrigger, now: datetime, **fields: Any) -> ScanJob:
    """Return the job after `trigger`, with the corresponding event in its outbox.

    Args:
        job: the job as it was read.
        trigger: the transition.
        now: UTC; the times of a job never decrease.
        fields: other fields that change: `progress`, `machines_found`, `error`, `cancel_command`.

    Raises:
        IllegalJobChangeError: the transition is not in the table.
    """
    status = TABLE[job.status].get(trigger)
    if status is None:
        raise IllegalJobChangeError(f"cannot {trigger} job {job.id}: it is {job.status}")
    now = max(now, job.updated_at)
    if status is JobStatus.RUNNING:
        fields["start_time"] = now
    else:
        fields |= {"end_time": now, "eta_seconds": None, "seconds_left": 0.0, "waiting": "", "waiting_since": None}
    return _emit(replace(job, status=status, updated_at=now, **fields), _EVENTS[trigger], now)


def observe(
    job: ScanJob,
    progress: int,
    machines_found: int,
    now: datetime,
    *,
    eta_seconds: float | None = None,
) -> tuple[ScanJob, JobProgressed] | None:
    """Return the job with higher progress and the event for it, or None if nothing changed.

    Only a running job with an empty outbox progresses, so that no reader sees progress before the start or after the end.
    """
    progress = max(job.progress, min(progress, 99))
    machines_found = max(job.machines_found, machines_found)
    news = (progress, machines_found) != (job.progress, job.machines_found)
    if job.status is not JobStatus.RUNNING or job.outbox or not news:
        return None
    found = {"progress": progress, "machines_found": machines_found, "eta_seconds": eta_seconds}
    return _progressed(job, now, **found, waiting="", waiting_since=None)


def wait(job: ScanJob, reason: str, now: datetime) -> tuple[ScanJob, JobProgressed] | None:
    """Return the job with the reason why no worker can hold its chunks ("" for none) and the event; None if unchanged.

    Each reason has its own time: a job that waited for its hours has not yet waited for a worker.
    """
    if job.final or job.outbox or job.waiting == reason:
        return None
    fields = {"waiting_since": now, "eta_seconds": None} if reason else {"waiting_since": None}
    return _progressed(job, now, waiting=reason, **fields)


def _progressed(job: ScanJob, now: datetime, **fields: Any) -> tuple[ScanJob, JobProgressed]:
    changed = replace(job, updated_at=max(now, job.updated_at), seq=job.seq + 1, **fields)
    return changed, _event(changed, JobProgressed, changed.seq)


def published(job: ScanJob, seq: int) -> ScanJob:
    """Return the job without the events up to `seq`, which the bus has acknowledged."""
    left = tuple(out for out in job.outbox if out.event.seq > seq)
    return job if left == job.outbox else replace(job, outbox=left)


def restored_from_backup(job: ScanJob, seq: int) -> ScanJob:
    """Return an unfinished job after a restore of its database from a backup, ready to continue from the backup's state.

    Args:
        job: the job as it was read.
        seq: not below any that it had reached before the restore, so that readers do not discard its next events as old.
    """
    return replace(job, seq=max(job.seq, seq))


def _emit(job: ScanJob, kind: type[JobEvent], now: datetime) -> ScanJob:
    event = _event(job, kind, job.seq + 1)
    return replace(job, seq=event.seq, outbox=(*job.outbox, Outgoing(event, now)))


def _event(job: ScanJob, kind: type[_E], seq: int) -> _E:
    return kind(
        user_id=job.user_id,
        seq=seq,
        job=job.view,
        progress=job.progress,
        machines_found=job.machines_found,
        error=job.error,
        eta_seconds=job.eta_seconds,
        waiting=job.waiting,
        traceparent=job.traceparent,
    )
