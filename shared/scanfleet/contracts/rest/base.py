"""Bodies, answers and fields that all models of the REST API share."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from scanfleet.contracts.messages.fields import MAX_ID

MAX_BODY_BYTES = 16 * 1024  # per request; the largest policy, with 10,000 characters of ports, takes 13 kB

BODY_LIMITS = {
    "/api/v1/task/estimate": 80 * 1024,  # 1,000 excluded IPv6 networks, and the values of a policy
    "/api/v1/task": 32 * 1024,  # 1,000 subnet ids of 17 digits
    "/api/v1/subnet/import": 128 * 1024,  # 1,000 lines of 128 characters
    "/api/v1/subnet": 64 * 1024,  # 1,000 excluded IPv6 networks
}
"""Larger body limits, by path prefix."""

MAX_NAME_CHARS = 50  # of an unknown field's name in an error
MAX_UNKNOWN = 5  # fields reported per error; enough to correct a request in a few attempts

Id = Annotated[StrictInt, Field(ge=1, le=MAX_ID)]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"


def worded(pattern: str, sentence: str) -> BeforeValidator:
    """Return a validator that reports text which does not match the pattern of its field by a sentence."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value and not re.fullmatch(pattern, value):
            raise PydanticCustomError("pattern", sentence)
        return value

    return BeforeValidator(check)


WITHOUT_CONTROLS: Final = worded(PRINTABLE, "must be text without control characters")


def _rfc3339(value: Any) -> Any:
    # pydantic also accepts numbers as seconds since 1970, which are undocumented.
    if not isinstance(value, datetime) and not (isinstance(value, str) and _DATE_AND_TIME.match(value)):
        raise PydanticCustomError("time", "a time as in RFC 3339 is expected, such as 2026-01-01T12:00:00Z")
    return value


def _utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise PydanticCustomError("time", "must be a time with a time zone, such as 2026-01-01T12:00:00Z")
    # In UTC it may lie outside the years 1 to 9999, which neither datetime nor MongoDB can express.
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("time", "the time is out of range") from None


_DATE_AND_TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]")

InputTime = Annotated[datetime, BeforeValidator(_rfc3339), AfterValidator(_utc)]

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PRINTABLE), WITHOUT_CONTROLS]


class Body(BaseModel):
    """A request body. Unknown fields are rejected before validation, at the cost of one pass over the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        fields = cls.model_fields
        if isinstance(given, dict) and (unknown := [name for name in given if name not in fields]):
            named = ", ".join(ascii(name[:MAX_NAME_CHARS])[1:-1] for name in unknown[:MAX_UNKNOWN])
            more = f" and {len(unknown) - MAX_UNKNOWN} more" if len(unknown) > MAX_UNKNOWN else ""
            raise PydanticCustomError("unknown_fields", "unknown fields: {named}{more}", {"named": named, "more": more})
        return given


class NamedBody(Body):
    """The body of an object that its user names."""

    name: Name


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Error(Answer):
    error: str


class Done(Answer):
    message: str


Text = Annotated[str, Field(min_length=1, max_length=255, pattern=PRINTABLE), WITHOUT_CONTROLS]
