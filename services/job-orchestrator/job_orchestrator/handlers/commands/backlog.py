"""Share the sum of all unfinished work between the requests that need it."""

from __future__ import annotations

import asyncio
from typing import Final

from job_orchestrator.domain.ports import JobRepository
from job_orchestrator.domain.time import PlatformTime

_FRESH_SECONDS: Final = 1.0  # reading 100,000 unfinished jobs takes MongoDB a tenth of a second


class Backlog:
    """The expected slot seconds of the unfinished jobs, read at most once a second for all callers."""

    def __init__(self, jobs: JobRepository, clock: PlatformTime) -> None:
        self._jobs = jobs
        self._clock = clock
        self._begun = float("-inf")
        self._read: asyncio.Task[float] | None = None

    async def seconds(self) -> float:
        """Return the slot seconds, without those of jobs outside the hours of their grants.

        Raises:
            DependencyError: the database is unavailable.
        """
        now = self._clock.monotonic()
        if self._read is None or now - self._begun >= _FRESH_SECONDS:
            self._begun = now
            self._read = asyncio.create_task(self._jobs.seconds_left())
        return await asyncio.shield(self._read)  # a caller that is cancelled does not end the read of the others
