"""Leave jobs and users out of dispatch for a time, so that the others continue."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import Final, TypeVar

import structlog

from job_orchestrator.domain.fairness import Candidate
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.metrics import SKIPPED_JOBS

_SKIP_SECONDS: Final = 60.0  # for which a job whose documents cannot be read is skipped
_CLOSED_SECONDS: Final = 600.0  # for which jobs outside their hours are: the clock stops while a machine is suspended
_LEFT_OUT_SECONDS: Final = 10.0  # for which a user with only such jobs is; a new job that another replica created waits
_RECHECK_SECONDS: Final = 1.0  # for which a user with another job is: any replica may create or requeue its chunks
_JOBS: Final = 100_000  # unfinished jobs of a user under one grant: far above the quota

_log = structlog.get_logger()

_Key = TypeVar("_Key")


class Skips:
    """The skipped jobs of each user, and the users whose queued chunks all belong to skipped jobs."""

    def __init__(self, jobs: JobRepository, clock: PlatformTime) -> None:
        self._jobs = jobs
        self._clock = clock
        self._skipped: dict[int, dict[int, float]] = {}
        """By user and job, until when its chunks are skipped."""
        self._resting: dict[tuple[int, bool], float] = {}
        """By user without other chunks, with and without those that need raw packets, until when none is queried."""
        self.later: dict[tuple[int, bool], float] = {}
        """The same of users whose chunks may only start later; they stay active. `wake` replaces the mapping: a caller gets it before
        its query, so that new chunks which the query missed are not delayed."""

    def expire(self) -> None:
        """Remove what has lasted its time."""
        now = self._clock.monotonic()
        skipped = {user: _after(now, jobs) for user, jobs in self._skipped.items()}
        self._skipped = {user: jobs for user, jobs in skipped.items() if jobs}
        self._resting = _after(now, self._resting)
        self.later = _after(now, self.later)

    def wake(self, users: Collection[int]) -> None:
        """Query the chunks of these users again: they have new ones."""
        self._resting = {key: until for key, until in self._resting.items() if key[0] not in users}
        self.later = {key: until for key, until in self.later.items() if key[0] not in users}

    def jobs(self, user: int) -> Collection[int]:
        return self._skipped.get(user, ())

    def rests(self, user: int, *, raw: bool) -> bool:
        return (user, raw) in self._resting or (user, raw) in self.later

    def resting(self, looks: AbstractSet[bool]) -> set[int]:
        """Return the users who rest in every kind of query that the workers need, with raw packets or without."""
        return set[int].intersection(*({user for user, raw in self._resting if raw is look} for look in looks))

    def skip(self, candidate: Candidate, cause: str) -> None:
        """Skip a job whose documents cannot be read or dispatched, so that the user's other jobs continue."""
        self._skipped.setdefault(candidate.user_id, {})[candidate.job_id] = self._clock.monotonic() + _SKIP_SECONDS
        SKIPPED_JOBS.inc()
        _log.error("job_skipped", job_id=candidate.job_id, chunk_id=candidate.chunk_id, cause=cause)

    async def await_hours(self, job: ScanJob, begin_in: timedelta | None) -> None:
        """Skip the job, and all others of its user under its grant, until the hours of the grant begin; None is never."""
        seconds = min(begin_in.total_seconds(), _CLOSED_SECONDS) if begin_in is not None else _CLOSED_SECONDS
        others = await self._jobs.unfinished(job.user_id, _JOBS, granted_by=job.granted_by)
        until = self._clock.monotonic() + seconds
        self._skipped.setdefault(job.user_id, {}).update(dict.fromkeys((job.id, *others), until))

    async def rest(self, user: int, *, raw: bool) -> None:
        """Leave a user out whose queued chunks all belong to skipped jobs, until one of these may continue."""
        skipped, resting = self._skipped[user], self._resting
        monotonic = self._clock.monotonic()
        seconds = min(_LEFT_OUT_SECONDS, min(skipped.values()) - monotonic)
        unfinished = await self._jobs.unfinished(user, len(skipped) + 1)
        if not skipped.keys() >= set(unfinished):
            seconds = min(seconds, _RECHECK_SECONDS)
        resting[user, raw] = monotonic + seconds  # without effect if `wake` has replaced the mapping during the query


def _after(now: float, untils: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: until for key, until in untils.items() if until > now}
