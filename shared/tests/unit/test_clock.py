"""Wall-clock time as it is stored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from scanfleet.clock import utc_now


def test_now_is_utc_in_whole_milliseconds() -> None:
    """The value is what MongoDB gives back: aware, UTC, without microseconds of its own."""
    before = datetime.now(UTC)
    now = utc_now()
    assert now.utcoffset() == timedelta(0)
    assert now.microsecond % 1000 == 0
    assert before - timedelta(milliseconds=1) < now <= datetime.now(UTC)
