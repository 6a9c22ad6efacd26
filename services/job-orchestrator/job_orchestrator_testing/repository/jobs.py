"""Jobs in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

from job_orchestrator.api.tasks import task_status
from job_orchestrator.domain.census import JobCensus
from job_orchestrator.domain.job import MAX_AHEAD, UNFINISHED, ScanJob
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.retention import EndedJob
from job_orchestrator_testing.repository.data import MemoryRepository
from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job, JobStatus

_FAR_FUTURE = datetime(9999, 1, 1, tzinfo=UTC)


class MemoryJobs(MemoryRepository):
    """A `JobRepository`."""

    async def take_ids(self, count: int = 1) -> range:
        return self._take_ids("jobs", count)

    async def insert(self, jobs: Sequence[ScanJob]) -> None:
        for job in jobs:
            if job.id not in self._data.receipts:
                self._data.jobs.setdefault(job.id, job)

    async def missing(self, ids: Collection[int]) -> set[int]:
        return set(ids) - self._data.jobs.keys() - self._data.receipts.keys()

    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]:
        return {id_: self._data.jobs[id_] for id_ in ids if id_ in self._data.jobs}

    async def snapshots(self, ids: Collection[int]) -> list[rest.Snapshot]:
        found = sorted((await self.get(ids)).items())
        return [rest.Snapshot(seq=job.seq, task=task_status(job)) for _, job in found]

    async def save(self, jobs: Sequence[ScanJob]) -> set[int]:
        losers = {job.id for job in jobs if job.id not in self._data.jobs or self._data.jobs[job.id].rev != job.rev}
        self._data.jobs |= {job.id: replace(job, rev=job.rev + 1) for job in jobs if job.id not in losers}
        return losers

    async def page(
        self,
        user_id: int | None,
        statuses: Collection[JobStatus],
        skip: int,
        limit: int,
        *,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        since: datetime | None = None,
    ) -> tuple[list[Job], int]:
        mine = [
            job
            for job in self._data.jobs.values()
            if user_id in (None, job.user_id)
            and (not statuses or job.status in statuses)
            and subnet_id in (None, job.subnet_id)
            and policy_id in (None, job.policy_id)
            and (since is None or job.created_at >= since)
        ]
        mine.sort(key=lambda job: (job.start_time or job.end_time or _FAR_FUTURE, job.id), reverse=True)
        return [job.view for job in mine[skip : skip + limit]], len(mine)

    async def latest(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        mine = (job for job in self._data.jobs.values() if user_id in (None, job.user_id) and job.id > after)
        unfinished = (job for job in mine if not job.final)
        return sorted(job.id for job in unfinished if changed_since is None or job.updated_at >= changed_since)[:limit]

    async def ended(
        self, user_id: int | None, since: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        mine = (job for job in self._data.jobs.values() if user_id in (None, job.user_id))
        ended = sorted((job.end_time, job.id) for job in mine if job.end_time is not None and job.end_time >= since)
        return [each for each in ended if after is None or each > after][:limit]

    async def unsettled(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> dict[int, tuple[str, str]]:
        unsettled = (job for _, job in sorted(self._data.jobs.items()) if job.id > after and not job.settled)
        mine = (job for job in unsettled if partitions is None or job.partition in partitions)
        return {job.id: (job.status, job.waiting) for job in islice(mine, limit)}

    async def with_old_events(self, before: datetime, limit: int, partitions: Collection[int]) -> list[ScanJob]:
        mine = (job for job in self._data.jobs.values() if job.partition in partitions)
        old = (job for job in mine if any(not before <= out.at <= before + MAX_AHEAD for out in job.outbox))
        return list(islice(old, limit))

    async def empty_outboxes(self, seqs: Mapping[int, int]) -> None:
        full = [job for id_ in seqs if (job := self._data.jobs.get(id_)) and job.outbox]
        self._data.jobs |= {
            job.id: replace(job, outbox=(), rev=job.rev + 1) for job in full if job.outbox[-1].event.seq <= seqs[job.id]
        }

    async def has_unfinished(self, subnet_id: int) -> bool:
        return any(job.subnet_id == subnet_id and not job.final for job in self._data.jobs.values())

    async def unfinished(
        self,
        user_id: int,
        limit: int,
        *,
        statuses: Collection[JobStatus] = UNFINISHED,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        granted_by: str | None = None,
    ) -> list[int]:
        matching = (
            job.id
            for job in self._data.jobs.values()
            if job.user_id == user_id
            and job.status in statuses
            and subnet_id in (None, job.subnet_id)
            and policy_id in (None, job.policy_id)
            and granted_by in (None, job.granted_by)
        )
        return list(islice(matching, limit))

    async def expired(self, before: datetime, limit: int, after: tuple[datetime, int] | None = None) -> list[EndedJob]:
        ended = sorted((job.end_time, job.id) for job in self._data.jobs.values() if job.end_time and job.settled)
        found = [each for each in ended if each[0] < before and (after is None or each > after)][:limit]
        return [EndedJob(id_, end_time, self._data.jobs[id_].subnet_id) for end_time, id_ in found]

    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        usage: dict[int, Usage] = {}
        for job in self._data.jobs.values():
            if job.user_id in users and not job.final:
                usage[job.user_id] = usage.get(job.user_id, Usage()) + Usage(1, job.seconds_left)
        return usage

    async def seconds_left(self) -> float:
        return sum(job.seconds_left for job in self._unfinished() if _is_due(job))

    async def census(self) -> JobCensus:
        jobs = self._unfinished()
        due = [job for job in jobs if _is_due(job)]
        return JobCensus(
            numbers=Counter(job.status for job in jobs),
            ages_seconds={
                status: max((_age(job.created_at) for job in due if job.status is status), default=0.0)
                for status in {job.status for job in jobs}
            },
            slot_seconds=sum(job.seconds_left for job in due),
        )

    async def outbox_age(self) -> float:
        return max((_age(out.at) for job in self._data.jobs.values() for out in job.outbox), default=0.0)

    def _unfinished(self) -> list[ScanJob]:
        return [job for job in self._data.jobs.values() if job.status in UNFINISHED]


def _is_due(job: ScanJob) -> bool:
    return job.waiting != "window"


def _age(time_: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - time_).total_seconds())
