"""How long something may stay silent, as heard by the one who watches it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.fairness import Held

_LONGEST_LOOK: Final = 3.0  # seconds of silence that one look can add; looks are about a second apart


class Watch:
    """Silence of chunks under their current attempt, in seconds that were really listened to.

    A watcher that is late, because it was slow, frozen or cut off, adds no more than one look's worth of silence, and a
    chunk that it sees for the first time starts afresh: it blames nobody for its own absence.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silence: dict[tuple[str, int], float] = {}
        self._looked = float("inf")

    def renew(self, chunk: Chunk) -> None:
        """Count its silence from the next look on: its worker reported."""
        self._silence.pop((chunk.id, chunk.attempt), None)

    def overdue(self, watched: Iterable[Held], now: float) -> list[Held]:
        """Look: those of `watched` that were silent for too long. What is not in `watched` is forgotten.

        Args:
            watched: what workers hold, after all their reports were read.
            now: seconds of a monotonic clock.
        """
        listened = max(0.0, min(now - self._looked, _LONGEST_LOOK))
        self._looked = now
        chunks = {(held.chunk_id, held.attempt): held for held in watched}
        self._silence = {token: self._silence[token] + listened if token in self._silence else 0.0 for token in chunks}
        return [held for token, held in chunks.items() if self._silence[token] > self._seconds]
