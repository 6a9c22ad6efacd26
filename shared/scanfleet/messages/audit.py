"""Entries of the audit log."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from scanfleet.clock import Time
from scanfleet.messages.base import Message
from scanfleet.messages.fields import Positive

MAX_REASON_CHARS: Final = 300
MAX_TARGET_CHARS: Final = 300  # of a refusal
MAX_TARGETS_CHARS: Final = 32_000  # of one command that names a thousand subnets or jobs

Name = Annotated[str, Field(max_length=200)]


class AuditEntry(BaseModel):
    """One thing that was done or refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: Name
    time: Time
    """By the clock of the service that decided."""

    service: Name
    """Which service decided."""

    subject: Name
    """The user's id; empty for a request without a valid token."""

    source: Name
    """The address that the request came from; of a message its topic, and of one that cannot be read its partition and offset."""

    action: Name
    """The operation, by its name in the OpenAPI document; or that a message was consumed."""

    target: Annotated[str, Field(max_length=MAX_TARGETS_CHARS)]
    """What it was done to, or would have been."""

    decision: Literal["allowed", "refused"]
    rule: Name
    """Which rule decided; empty when a user did what is theirs to do."""

    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)] = ""
    """What was wrong, where the rule does not say it all: of a refused token the claim and why, never its value."""

    request_id: Name
    count: Positive = 1
    """How many refusals alike this entry stands for; `target` and `request_id` are those of the last."""


class Audited(Message):
    """A refusal for the audit log; what was allowed, job-orchestrator itself records where it does it."""

    entry: AuditEntry

    @field_validator("entry")
    @classmethod
    def _is_a_refusal(cls, entry: AuditEntry) -> AuditEntry:
        if entry.decision != "refused":
            raise ValueError("only refusals are recorded over the bus")
        if len(entry.target) > MAX_TARGET_CHARS:
            raise ValueError(f"target has {len(entry.target)} characters; {MAX_TARGET_CHARS} is the limit")
        return entry

    @property
    def event_id(self) -> str:
        return self.entry.id

    @property
    def subject(self) -> str:
        return f"audit/{self.entry.id}"
