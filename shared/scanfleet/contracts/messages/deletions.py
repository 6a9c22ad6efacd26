"""The deletion of finished jobs."""

from __future__ import annotations

from typing import Literal

from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import Id


class _OfJob(Message):
    job_id: Id

    @property
    def subject(self) -> str:
        return f"job/{self.job_id}"


class DeleteResults(_OfJob):
    """Delete all results of the job. It is repeated until ResultsDeleted answers it."""

    reason: Literal["request", "retention"] = "request"


class ResultsDeleted(_OfJob):
    """No result of the job is stored any more, and those that arrive late will be deleted too."""
