"""Order the jobs that have more work than one step performs."""

from __future__ import annotations

from job_orchestrator.domain import plan
from job_orchestrator.domain.job import ScanJob


class WorkQueue:
    """Jobs with more to do. Their users take turns, so that a user with many jobs does not delay the others."""

    def __init__(self) -> None:
        self._users: dict[int, dict[int, int]] = {}
        """By user, in the order of their turns, and by job: the maximum number of its chunks that are open at once."""

    def __bool__(self) -> bool:
        return bool(self._users)

    def add(self, job: ScanJob) -> None:
        self._users.setdefault(job.user_id, {})[job.id] = min(plan.width(job.policy), job.plan.chunk_count)

    def take(self, chunks: int) -> list[int]:
        """Remove and return jobs with about this number of chunks, one of each user in turn."""
        taken: list[int] = []
        size = 0
        while self._users and size < chunks:
            user = next(iter(self._users))
            jobs = self._users.pop(user)
            job_id = next(iter(jobs))
            size += jobs.pop(job_id)
            taken.append(job_id)
            if jobs:
                self._users[user] = jobs  # behind the other users
        return taken
