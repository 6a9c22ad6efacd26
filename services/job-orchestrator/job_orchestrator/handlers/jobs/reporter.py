"""Publish the progress of running jobs, and why jobs wait."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import HELD
from job_orchestrator.domain.job import ScanJob, observe, wait
from job_orchestrator.domain.ledger import RunningCount
from job_orchestrator.domain.ports import ChunkRepository, JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.jobs.faults import Faults
from job_orchestrator.handlers.jobs.outbox import Outbox
from scanfleet.contracts.messages import JobProgressed, JobStatus
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import Publisher
from scanfleet.runtime.loop import Loop

_PROGRESS_SECONDS: Final = 1.0  # interval of progress updates
_MAX_COUNTS: Final = 1_000  # jobs whose ended chunks are not read again: a few kB each, and 25 kB for a /16


class Reporter:
    """Publishes progress once a second; most short jobs have ended by then.

    Args:
        publisher: publishes job events.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        chunks: ChunkRepository,
        publisher: Publisher,
        outbox: Outbox,
        faults: Faults,
        clock: PlatformTime,
    ) -> None:
        self._jobs = jobs
        self._chunks = chunks
        self._publisher = publisher
        self._outbox = outbox
        self._faults = faults
        self._clock = clock
        self._further: set[int] = set()
        self._next_progress: dict[int, float] = {}
        self._counts: dict[int, RunningCount] = {}
        self.loop = Loop("progress", _PROGRESS_SECONDS, self.report, vital=False)

    def note(self, job_ids: Iterable[int]) -> None:
        """Report the progress of these jobs soon: outcomes of their chunks have changed."""
        self._further |= set(job_ids)

    def end(self, job_ids: Iterable[int]) -> None:
        """Do not read these jobs, which have ended, for a report."""
        for id_ in job_ids:
            self._further.discard(id_)
            self._counts.pop(id_, None)

    async def report(self) -> None:
        """Publish the progress of jobs that has increased since the last call; called about once a second.

        Raises:
            DependencyError: nothing is lost; the next call publishes more.
        """
        now = self._clock.monotonic()
        self._next_progress = {id_: due for id_, due in self._next_progress.items() if due > now}
        due = self._further - self._next_progress.keys()
        if not due:
            return
        self._further -= due  # before the first query: jobs that are noted meanwhile are for the next call
        left = due
        try:
            left = await self._report(due, now)
        finally:
            self._further |= left

    async def _report(self, due: Collection[int], now: float) -> set[int]:
        """Publish the progress of these jobs; return those for which it has to be tried again."""
        left: set[int] = set()
        seen: dict[int, tuple[ScanJob, JobProgressed]] = {}
        for each in (await self._jobs.get(due)).values():
            job = self._outbox.unsent(each)
            if job.status is not JobStatus.RUNNING:
                self._counts.pop(job.id, None)
                continue
            if job.outbox:
                left.add(job.id)
                continue
            self._next_progress[job.id] = now + _PROGRESS_SECONDS
            with self._faults.isolated(job):
                if news := await self._observe(job):
                    seen[job.id] = news
        left |= await self._jobs.save([job for job, _ in seen.values()])
        await self._publish({id_: news for id_, news in seen.items() if id_ not in left})
        return left

    async def publish_waiting(self, jobs: Iterable[tuple[ScanJob, str]]) -> list[ScanJob]:
        """Store and publish why these jobs, as just read, are waiting; "" for those that no longer are.

        Returns:
            The jobs of which the reason is stored now.

        Raises:
            DependencyError: the next sweep does it.
        """
        now = self._clock.now()
        news: dict[int, tuple[ScanJob, JobProgressed]] = {}
        for job, reason in jobs:
            if self._faults.has(job):
                continue
            with self._faults.isolated(job):
                if each := wait(self._outbox.unsent(job), reason, now):
                    news[job.id] = each
        losers = await self._jobs.save([job for job, _ in news.values()])
        stored = {id_: each for id_, each in news.items() if id_ not in losers}
        await self._publish(stored)
        return [job for job, _ in stored.values()]

    async def _observe(self, job: ScanJob) -> tuple[ScanJob, JobProgressed] | None:
        now = self._clock.now()
        count = self._counts.get(job.id) or RunningCount()
        near = count.start(job)
        queued = set(await self._chunks.queued(job.id, near.start, near.stop))
        others = (index for index in near if index not in queued and not count.is_counted(index))
        chunks = await self._chunks.get([plan.chunk_id(job, index) for index in others])
        tally = count.tally(job, chunks.values())
        self._keep(job, count)
        held = sum(chunk.share for chunk in chunks.values() if chunk.state in HELD)
        left = tally.seconds_left
        eta = round(left / max(1.0, held), 1) if tally.measured else None
        job = replace(job, seconds_left=left)
        return observe(job, tally.progress, tally.machines_found, now, eta_seconds=eta)

    def _keep(self, job: ScanJob, count: RunningCount) -> None:
        self._counts.pop(job.id, None)
        self._counts[job.id] = count
        if len(self._counts) > _MAX_COUNTS:
            del self._counts[next(iter(self._counts))]  # the job that was reported least recently

    async def _publish(self, news: Mapping[int, tuple[ScanJob, JobProgressed]]) -> None:
        events = [event for _, event in news.values()]
        await try_publish(self._publisher, SCAN_EVENTS, events, "the next progress of each job replaces it")
