"""How long something may stay silent, on the monotonic clock of the one who watches it."""

from __future__ import annotations

from collections.abc import Iterable

from job_orchestrator.domain.chunk import Chunk


class Watch:
    """Deadlines of chunks under their current attempt. Time is handed in: seconds of any one monotonic clock.

    A chunk that was not seen before starts afresh, so a watcher that was away blames nobody for its own silence.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines: dict[tuple[str, int], float] = {}

    def renew(self, chunk: Chunk, now: float) -> None:
        self._deadlines[chunk.id, chunk.attempt] = now + self._seconds

    def overdue(self, watched: Iterable[Chunk], now: float) -> list[Chunk]:
        """Those of `watched` whose time is over. What is not in `watched` is forgotten."""
        before, self._deadlines = self._deadlines, {}
        late: list[Chunk] = []
        for chunk in watched:
            token = (chunk.id, chunk.attempt)
            self._deadlines[token] = before.get(token, now + self._seconds)
            if self._deadlines[token] < now:
                late.append(chunk)
        return late

    def forget(self) -> None:
        """Start all afresh."""
        self._deadlines.clear()
