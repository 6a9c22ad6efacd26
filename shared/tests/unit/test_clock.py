"""Wall-clock time as it is stored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import TypeAdapter, ValidationError

from scanfleet.clock import Time, utc_now


def test_now_is_utc_in_whole_milliseconds() -> None:
    """The value equals the one that MongoDB returns: aware, UTC, whole milliseconds."""
    before = datetime.now(UTC)
    now = utc_now()
    assert now.utcoffset() == timedelta(0)
    assert now.microsecond % 1000 == 0
    assert before - timedelta(milliseconds=1) < now <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 678_999, tzinfo=UTC), "2026-01-02T03:04:05.678Z"),
        (datetime(2026, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T01:04:00.000Z"),
    ],
)
def test_times_are_written_in_one_width(time: datetime, text: str) -> None:
    """A time in a model's JSON is RFC 3339 in UTC with a Z and three digits of a second, so that texts sort as times do."""
    model = TypeAdapter(Time)
    assert model.dump_json(time) == f'"{text}"'.encode()
    assert model.json_schema(mode="serialization") == {"type": "string", "format": "date-time"}


def test_time_without_a_zone_is_refused() -> None:
    """A time without a time zone is refused."""
    with pytest.raises(ValidationError):
        TypeAdapter(Time).validate_python(datetime(2026, 1, 1))  # noqa: DTZ001 # that is the claim
