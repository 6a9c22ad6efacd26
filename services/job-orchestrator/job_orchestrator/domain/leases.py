"""Track lease timeouts of chunks by the time that this process was able to receive reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from job_orchestrator.domain.fairness import Held
from scanfleet.contracts.messages import FencingToken

_LONGEST_CHECK_SECONDS: Final = 3.0  # maximum that one check adds; checks are about a second apart


class LeaseTimers:
    """Seconds without a report for each chunk's current attempt, while this process was reading reports.

    If this process was slow, stopped or disconnected, a late check adds at most `_LONGEST_CHECK_SECONDS`, and a chunk that is
    watched for the first time starts at zero, so that no lease expires because of this process.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silence: dict[FencingToken, float] = {}
        self._looked = float("inf")

    def renew(self, token: FencingToken) -> None:
        """Reset the timeout of an attempt after a report of its worker."""
        self._silence.pop(token, None)

    def overdue(self, watched: Iterable[Held], now: float) -> list[Held]:
        """Return those of `watched` whose lease has expired; chunks that are not in `watched` are no longer tracked.

        Args:
            watched: chunks that workers hold, after all of their reports were read.
            now: seconds of a monotonic clock.
        """
        listened = max(0.0, min(now - self._looked, _LONGEST_CHECK_SECONDS))
        self._looked = now
        chunks = {held.token: held for held in watched}
        self._silence = {token: self._silence[token] + listened if token in self._silence else 0.0 for token in chunks}
        return [held for token, held in chunks.items() if self._silence[token] > self._seconds]
