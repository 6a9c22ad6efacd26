"""Leave jobs and users out of dispatch for a time, so that the others continue."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import timedelta
from typing import Final, TypeVar

import structlog

from job_orchestrator.domain.fairness import Candidate
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.metrics import SKIPPED_JOBS

_SKIP_SECONDS: Final = 60.0  # time to skip a job whose documents cannot be read
_LEADER_SECONDS: Final = 2.0  # time to skip a job whose partition has no leader: often for a moment only
_CLOSED_SECONDS: Final = 600.0  # maximum time to skip a job outside its hours: the clock stops while a machine sleeps
# A job that another replica created may wait as long as its user is left out, or the user's other jobs are cached.
_LEFT_OUT_SECONDS: Final = 10.0  # time to skip a user who has only such jobs
_RECHECK_SECONDS: Final = 1.0  # time to cache the ids of a user's other jobs
_FEW: Final = 10  # skipped jobs of a user: a query passes by their chunks, at most 256 each, and names no others
_JOBS: Final = 100_000  # unfinished jobs of a user: far above the quota

_log = structlog.stdlib.get_logger(__name__)

_Key = TypeVar("_Key")


class Skips:
    """The skipped jobs of each user, and the users who have no others."""

    def __init__(self, jobs: JobRepository, clock: PlatformTime) -> None:
        self._jobs = jobs
        self._clock = clock
        self._skipped: dict[int, dict[int, float]] = {}
        """By user and job, until when its chunks are skipped."""
        self._others: dict[int, tuple[float, Collection[int]]] = {}
        """By user with skipped jobs: until when they are cached, and the ids of the user's other unfinished jobs."""
        self._resting: dict[int, float] = {}
        """By user without other jobs, until when no chunk is queried."""
        self.later: dict[tuple[int, bool], float] = {}
        """By user whose chunks may only start later, with and without those that need raw packets, until when none is queried; they
        stay active unless they have skipped jobs too. `wake` replaces the mappings: a caller gets them before its query, so that
        new chunks which the query missed are not delayed."""

    def expire(self) -> None:
        """Remove expired entries."""
        now = self._clock.monotonic()
        skipped = {user: _after(now, jobs) for user, jobs in self._skipped.items()}
        self._skipped = {user: jobs for user, jobs in skipped.items() if jobs}
        self._others = {user: each for user, each in self._others.items() if each[0] > now}
        self._resting = _after(now, self._resting)
        self.later = _after(now, self.later)

    def wake(self, users: Collection[int]) -> None:
        """Query the chunks of these users again: they have new ones."""
        self._others = {user: each for user, each in self._others.items() if user not in users}
        self._resting = {user: until for user, until in self._resting.items() if user not in users}
        self.later = {key: until for key, until in self.later.items() if key[0] not in users}

    def rests(self, user: int, *, raw: bool) -> bool:
        return user in self._resting or (user, raw) in self.later

    def resting(self, looks: Collection[bool]) -> Collection[int]:
        """Return the users with skipped jobs whose other jobs have no dispatchable chunk.

        Args:
            looks: whether there are workers with raw packets, and without; a kind that this replica does not serve keeps users
                active.
        """
        later = {user for user in self._skipped if all((user, raw) in self.later for raw in looks)}
        return self._resting.keys() | later

    async def jobs(self, user: int) -> tuple[Collection[int] | None, Collection[int]]:
        """Return the ids of the user's jobs whose chunks may be dispatched, None for all, and of those of which none may be.

        A user without any job of the first kind is skipped.

        Raises:
            DependencyError: the database is unavailable.
        """
        if not (skipped := self._skipped.get(user)):
            return None, ()
        known, resting = self._others, self._resting
        if user not in known:
            now = self._clock.monotonic()
            unfinished = await self._jobs.unfinished(user, _JOBS)
            known[user] = now + _RECHECK_SECONDS, [id_ for id_ in unfinished if id_ not in skipped]
            if not known[user][1]:  # a query for chunks would go through those of all skipped jobs
                resting[user] = min(now + _LEFT_OUT_SECONDS, *skipped.values())
        _, others = known[user]
        return (None, skipped) if others and len(skipped) <= _FEW else (others, ())

    def skip(self, candidate: Candidate, cause: str) -> None:
        """Skip a job whose documents cannot be read or dispatched, so that the user's other jobs continue."""
        self._add(candidate.user_id, [candidate.job_id], self._clock.monotonic() + _SKIP_SECONDS)
        SKIPPED_JOBS.inc()
        _log.error("job_skipped", job_id=candidate.job_id, chunk_id=candidate.chunk_id, cause=cause)

    def await_leader(self, candidate: Candidate) -> None:
        """Skip a job for a moment, because its partition of scan-progress has no leader."""
        self._add(candidate.user_id, [candidate.job_id], self._clock.monotonic() + _LEADER_SECONDS)

    async def await_hours(self, job: ScanJob, begin_in: timedelta | None) -> None:
        """Skip the job, and all others of its user under its grant, until the hours of the grant begin; None is never."""
        seconds = min(begin_in.total_seconds(), _CLOSED_SECONDS) if begin_in is not None else _CLOSED_SECONDS
        others = await self._jobs.unfinished(job.user_id, _JOBS, granted_by=job.granted_by)
        # Together with the user's other skips: between them, all chunks are queried, also those that an ended job left queued.
        until = min([self._clock.monotonic() + seconds, *self._skipped.get(job.user_id, {}).values()])
        self._add(job.user_id, [job.id, *others], until)

    def _add(self, user: int, jobs: Iterable[int], until: float) -> None:
        self._skipped.setdefault(user, {}).update(dict.fromkeys(jobs, until))
        self._others.pop(user, None)


def _after(now: float, untils: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: until for key, until in untils.items() if until > now}
