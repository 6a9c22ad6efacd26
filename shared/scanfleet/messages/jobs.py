"""Jobs as the world sees them, and the events of their life."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from scanfleet.messages.base import Message
from scanfleet.messages.fields import MAX_COUNT, MAX_ERROR_CHARS, Count, Id, Seconds, Word


class JobStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether a job in it stays as it is for ever."""
        return self in {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}


class Job(BaseModel):
    """A job exactly as the public API shows it."""

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
    """A full snapshot of a job under its `seq`; a reader skips a `seq` that is not above its last."""

    user_id: Id
    seq: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    job: Job
    progress: Annotated[int, Field(ge=0, le=100)]
    machines_found: Count
    error: Annotated[str, Field(max_length=MAX_ERROR_CHARS)]
    eta_seconds: Seconds | None = None
    """Seconds until the job is expected to end; null while unknown, and in its final events."""

    waiting: Word = ""
    """Why no worker holds a chunk of the job, for example `no_raw_worker`; empty while one does."""

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
    """Sent at most once a second; the only event of a job that may be missing."""


class JobCompleted(JobEvent):
    pass


class JobFailed(JobEvent):
    pass


class JobCancelled(JobEvent):
    pass
