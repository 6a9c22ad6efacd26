"""What the gateway asks of the orchestrator, and the answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scanfleet.messages.base import Message
from scanfleet.messages.jobs import Job

MAX_SUBNETS = 1_000  # of one SubmitJobs: more is a loop over the API, not a request


class _Command(Message):
    command_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Made by the gateway for each request; never the caller's own request id, which two callers may share."""

    user_id: Annotated[int, Field(ge=1)]
    source: str = ""
    """The address that the request came from."""

    request_id: str = ""

    @property
    def event_id(self) -> str:
        return self.command_id

    @property
    def subject(self) -> str:
        return f"command/{self.command_id}"


class SubmitJobs(_Command):
    """Create one job for each subnet."""

    policy_id: int
    subnet_ids: Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_SUBNETS)]
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class CancelJob(_Command):
    """Cancel one job."""

    job_id: int
    admin: bool = False
    """The caller's token is an administrator's: the job may be another user's."""


class _Reply(Message):
    command_id: str

    @property
    def subject(self) -> str:
        return f"command/{self.command_id}"


class CommandAccepted(_Reply):
    """The command is stored and done; `jobs` are the jobs that it made or changed."""

    jobs: tuple[Job, ...]


class CommandRejected(_Reply):
    """The command changed nothing; `status` and `error` are the HTTP answer."""

    status: Annotated[int, Field(ge=400, le=599)]
    error: str
    rule: str = ""
    """Which rule refused, for the audit log."""
