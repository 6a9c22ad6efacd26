"""Entries of the audit log."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from scanfleet.clock import Time
from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import Positive

RESTORE: Final = "restore_database"  # action of a service's restore command
MAX_REASON_CHARS: Final = 300
MAX_TARGET_CHARS: Final = 300  # for a refusal
MAX_TARGETS_CHARS: Final = 32_000  # for one command that names a thousand subnets or jobs

Name = Annotated[str, Field(max_length=200)]


class AuditEntry(BaseModel):
    """One change or refusal."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: Name
    time: Time
    """Time by the clock of the deciding service."""

    service: Name
    """The deciding service."""

    subject: Name
    """The user's id; empty for a request without a valid token."""

    source: Name
    """Source address of the request; for a message its topic, for an unreadable one also partition and offset."""

    action: Name
    """The operation id in the OpenAPI document, or `consume` and the topic."""

    target: Annotated[str, Field(max_length=MAX_TARGETS_CHARS)]
    """The object of the operation."""

    decision: Literal["allowed", "refused"]
    rule: Name
    """The deciding rule; empty for ordinary actions on the user's own objects."""

    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)] = ""
    """Details beyond the rule: for a refused token the claim and the reason, never its value."""

    request_id: Name
    count: Positive = 1
    """Number of equal refusals that this entry represents; `target` and `request_id` are those of the last."""


class _OfEntry(Message):
    entry: AuditEntry

    @property
    def event_id(self) -> str:
        return self.entry.id

    @property
    def subject(self) -> str:
        return f"audit/{self.entry.id}"


class OperatorActed(_OfEntry):
    """A command that an operator has run: as an administrator of the bus, or the restore command of result-store."""


class Audited(_OfEntry):
    """A refusal for the audit log; job-orchestrator records allowed actions itself."""

    @field_validator("entry")
    @classmethod
    def _is_a_refusal(cls, entry: AuditEntry) -> AuditEntry:
        if entry.decision != "refused":
            raise ValueError("only refusals are recorded over the bus")
        if len(entry.target) > MAX_TARGET_CHARS:
            raise ValueError(f"target has {len(entry.target)} characters; {MAX_TARGET_CHARS} is the limit")
        return entry
