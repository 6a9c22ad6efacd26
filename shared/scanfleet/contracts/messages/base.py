"""The base class of all messages: frozen, versioned, carried with CloudEvents headers."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import ClassVar, Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

MAX_TRACEPARENT_CHARS: Final = 55
TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Message(BaseModel):
    """A command or an event. Unknown fields are ignored, so that a contract can grow by optional fields."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    version: ClassVar[int] = 1
    traceparent: str | None = Field(default=None, exclude=True, max_length=MAX_TRACEPARENT_CHARS)
    """W3C trace context; sent in the header of that name, never in the value."""

    @property
    def event_id(self) -> str:
        """`ce_id`. Messages that readers deduplicate derive it from their content."""
        return uuid4().hex

    @property
    @abstractmethod
    def subject(self) -> str:
        """`ce_subject`: the object of the message."""

    @classmethod
    def type_name(cls) -> str:
        """Return `ce_type`, for example `scanfleet.JobCreated.v1`."""
        return f"scanfleet.{cls.__name__}.v{cls.version}"
