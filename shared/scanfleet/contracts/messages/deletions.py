"""The deletion of finished jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import Count, Id

DeletionReason = Literal["request", "retention"]


class _OfJob(Message):
    job_id: Id

    @property
    def subject(self) -> str:
        return f"job/{self.job_id}"


class DeleteResults(_OfJob):
    """Delete all results of the job. The orchestrator repeats it until it receives ResultsDeleted."""

    reason: DeletionReason = "request"
    requested_by: Id | None = None
    """The user who requested it; null for retention, and if the sender is of release 0.1."""

    requested_at: AwareDatetime | None = None
    """When it was accepted."""

    signature: Annotated[str, Field(max_length=100)] | None = None
    """By which job-orchestrator recognises its own message after a restore; null if the sender is of release 0.2 or older."""


class ResultsDeleted(_OfJob):
    """All results of the job have been deleted; late results will be deleted too."""

    hosts: Count | None = None
    """Number of deleted host documents: one per address and block of ports; null if unknown."""

    rows: Count | None = None
    """Number of results that were deleted with them."""


class JobDeleted(_OfJob):
    """The job and its results are deleted: delete their copies. Records of the job may follow it, newer ones too: ignore them."""

    user_id: Id
    """The owner of the job."""

    subnet_id: Id
    reason: DeletionReason
    requested_at: AwareDatetime
    """When it was accepted."""

    @property
    def event_id(self) -> str:
        return f"deleted-{self.job_id}"
