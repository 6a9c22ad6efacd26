"""The public representation of jobs, and their life-cycle events."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import MAX_COUNT, MAX_ERROR_CHARS, Count, Id, Seconds, Word


class JobStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the status is terminal."""
        return self in {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}


class Job(BaseModel):
    """A job exactly as in the public API."""

    model_config = ConfigDict(frozen=True)

    id: Id
    user_id: Id
    policy_id: Id
    subnet_id: Id
    status: JobStatus
    start_time: AwareDatetime | None
    end_time: AwareDatetime | None
    created_at: AwareDatetime
    updated_at: AwareDatetime


class JobEvent(Message):
    """A full snapshot of a job with its `seq`; readers skip a `seq` that is not greater than the last one."""

    user_id: Id
    seq: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    job: Job
    progress: Annotated[int, Field(ge=0, le=100)]
    machines_found: Count
    error: Annotated[str, Field(max_length=MAX_ERROR_CHARS)]
    eta_seconds: Seconds | None = None
    """Seconds until the expected end of the job; null while unknown, and in terminal events."""

    waiting: Word = ""
    """The reason why no worker holds a chunk of the job, for example `no_raw_worker`; empty while one does."""

    @property
    def event_id(self) -> str:
        return f"job-{self.job.id}-{self.seq}"

    @property
    def subject(self) -> str:
        return f"job/{self.job.id}"


class JobCreated(JobEvent):
    pass


class JobStarted(JobEvent):
    pass


class JobProgressed(JobEvent):
    """Sent at most once a second; the only job event that may be omitted."""


class JobCompleted(JobEvent):
    pass


class JobFailed(JobEvent):
    pass


class JobCancelled(JobEvent):
    pass
