"""Wall-clock time as Scanfleet writes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, Field, PlainSerializer


def utc_now() -> datetime:
    """Return the current UTC time, truncated to milliseconds as MongoDB stores it, so that a value reads back equal."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def rfc3339(time: datetime) -> str:
    """Format `time` in UTC with a `Z` and milliseconds; the fixed width makes the texts sort like the times."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


Time = Annotated[
    AwareDatetime,
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    Field(json_schema_extra={"format": "date-time"}),
]
"""A time in a model, serialised by `rfc3339`."""
