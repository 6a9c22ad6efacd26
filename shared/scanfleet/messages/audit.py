"""What the audit log is told."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from scanfleet.clock import Time
from scanfleet.messages.base import Message
from scanfleet.messages.fields import Positive, Word

MAX_REASON_CHARS: Final = 300
MAX_TARGET_CHARS: Final = 20_000  # a command names up to a thousand subnets or jobs
MAX_NAME_CHARS: Final = 255  # of a user or a source

Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]


class AuditEntry(BaseModel):
    """One thing that was done or refused, exactly as administrators read it."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: Word
    time: Time
    service: Word
    """Who decided."""

    subject: Name
    """The user's id; empty when no good token said whose request it was."""

    source: Name
    """The address that the request came from; of a message its topic, and of one that cannot be read its partition and offset."""

    action: Word
    """The operation, by its name in the OpenAPI document; or that a message was consumed."""

    target: Annotated[str, Field(max_length=MAX_TARGET_CHARS)]
    """What it was done to, or would have been."""

    decision: Literal["allowed", "refused"]
    rule: Word
    """Which rule decided; empty when a user did what is theirs to do."""

    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)] = ""
    """What was wrong, where the rule does not say it all: of a refused token the claim and why, never its value."""

    request_id: Word
    count: Positive = 1
    """How many refusals alike this entry stands for; `target` and `request_id` are those of the last."""


class Audited(Message):
    """An entry for the audit log."""

    entry: AuditEntry

    @property
    def event_id(self) -> str:
        return self.entry.id

    @property
    def subject(self) -> str:
        return f"audit/{self.entry.id}"
