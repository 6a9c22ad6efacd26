"""What the gateway asks of the orchestrator, and the answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, Field

from scanfleet.messages.base import Message
from scanfleet.messages.fields import MAX_ADDRESS_CHARS, MAX_ERROR_CHARS, MAX_ID, Id, Word
from scanfleet.messages.jobs import Job

MAX_SUBNETS = 1_000  # of one SubmitJobs: more is a loop over the API, not a request

CommandId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=64)]


class _Command(Message):
    command_id: CommandId
    """Made by the gateway for each request; never the caller's own request id, which two callers may share."""

    user_id: Annotated[int, Field(ge=1, le=MAX_ID)]
    source: Annotated[str, Field(max_length=MAX_ADDRESS_CHARS + 55)] = ""
    """The address that the request came from."""

    request_id: Word = ""

    @property
    def event_id(self) -> str:
        return self.command_id

    @property
    def subject(self) -> str:
        return f"command/{self.command_id}"


class SubmitJobs(_Command):
    """Create one job for each subnet."""

    policy_id: Id
    subnet_ids: Annotated[tuple[Id, ...], Field(min_length=1, max_length=MAX_SUBNETS), FailFast()]
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class CancelJob(_Command):
    """Cancel one job."""

    job_id: Id
    admin: bool = False
    """The caller's token is an administrator's: the job may be another user's."""


class _Reply(Message):
    command_id: CommandId

    @property
    def subject(self) -> str:
        return f"command/{self.command_id}"


class CommandAccepted(_Reply):
    """The command is stored and done; `jobs` are the jobs that it made or changed."""

    jobs: Annotated[tuple[Job, ...], Field(max_length=MAX_SUBNETS), FailFast()]


class CommandRejected(_Reply):
    """The command changed nothing; `status` and `error` are the HTTP answer."""

    status: Annotated[int, Field(ge=400, le=599)]
    error: Annotated[str, Field(max_length=MAX_ERROR_CHARS)]
    rule: Word = ""
    """Which rule refused, for the audit log."""
