"""Cache each user's unfinished work, so that a command needs no query."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from job_orchestrator.domain.ports import JobRepository
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.time import PlatformTime

_FRESH_SECONDS: Final = 1.0  # reading 10,000 unfinished jobs of a user takes 10 ms


class Usages:
    """Usage by user: read at most once a second, plus what this replica has admitted since.

    The jobs that other replicas admit within that second are missing, so users may exceed a quota by them.
    """

    def __init__(self, jobs: JobRepository, clock: PlatformTime) -> None:
        self._jobs = jobs
        self._clock = clock
        self._known: dict[int, tuple[float, Usage]] = {}
        """By user, with the time of reading."""

    async def of(self, users: Collection[int], *, fresh: bool = False) -> dict[int, Usage]:
        """Return the usage of these users; with `fresh`, read it from the database.

        Raises:
            DependencyError: the database is unavailable.
        """
        now = self._clock.monotonic()
        self._known = {user: known for user, known in self._known.items() if now - known[0] < _FRESH_SECONDS}
        unknown = set(users) if fresh else set(users) - self._known.keys()
        if unknown:
            read = await self._jobs.usage(unknown)
            self._known |= {user: (now, read.get(user, Usage())) for user in unknown}
        return {user: self._known[user][1] for user in users}

    def note(self, usage: Mapping[int, Usage]) -> None:
        """Cache the usage of these users after an admission."""
        for user, each in usage.items():
            self._known[user] = (self._known[user][0], each)
