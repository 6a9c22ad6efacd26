"""Publish the events that jobs hold in their outboxes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

from job_orchestrator.domain.job import ScanJob, published
from job_orchestrator.domain.ports import JobRepository
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet.runtime import tracing
from scanfleet.runtime.best_effort import TIMEOUT_SECONDS, best_effort
from scanfleet.runtime.bus import Publisher
from scanfleet.runtime.loop import Loop

_EMPTY_SECONDS: Final = 1.0  # interval of the clean-up: most jobs are saved meanwhile, without published events


class Outbox:
    """Publishes events, and removes them from the jobs later, many jobs at once; until then they are cached here.

    Args:
        publisher: publishes job events.
    """

    def __init__(self, jobs: JobRepository, publisher: Publisher) -> None:
        self._jobs = jobs
        self._publisher = publisher
        self._sent: dict[int, int] = {}
        """By job, the `seq` of the last event in its outbox that the bus has acknowledged."""
        self.loop = Loop("outbox", _EMPTY_SECONDS, self.empty, vital=False)

    async def relay(self, job_ids: Collection[int]) -> None:
        """Read these jobs, and publish the events in their outboxes as `try_publish` does.

        Raises:
            DependencyError: the database is unavailable.
        """
        await self.try_publish((await self._jobs.get(job_ids)).values())

    async def try_publish(self, jobs: Iterable[ScanJob], seconds: float = TIMEOUT_SECONDS) -> None:
        """Publish the events in the outboxes of these jobs; those that are not acknowledged are left to the sweep.

        A partition without a leader delays neither the events of other partitions nor the caller's other work.

        Args:
            jobs: with the events to publish.
            seconds: timeout of the acknowledgements.
        """
        by_partition: defaultdict[int, list[ScanJob]] = defaultdict(list)
        for job in jobs:
            by_partition[job.partition].append(job)
        await asyncio.gather(*(self._try_publish(each, seconds) for each in by_partition.values()))

    async def _try_publish(self, jobs: Collection[ScanJob], seconds: float) -> None:
        events = sum(len(job.outbox) for job in jobs)
        async with best_effort(SCAN_EVENTS, events, "the sweep publishes the events of these jobs", seconds):
            await self.publish(jobs)

    async def publish(self, jobs: Iterable[ScanJob]) -> None:
        """Publish the events in the outboxes of these jobs as they are stored, in order, and schedule their removal.

        Raises:
            DependencyError: some of them may be published; a retry publishes all of them.
        """
        full = [job for each in jobs if (job := self.unsent(each)).outbox]
        if not full:
            return
        news = {job.id: type(job.outbox[-1].event).__name__ for job in full}
        traces = {job.id: job.traceparent for job in full}
        with tracing.spans(news.__getitem__, traces, "producer", "scanfleet.job.id"):
            await self._publisher.publish(SCAN_EVENTS, [out.event for job in full for out in job.outbox])
        for job in full:
            self._sent[job.id] = max(job.outbox[-1].event.seq, self._sent.get(job.id, 0))

    def unsent(self, job: ScanJob) -> ScanJob:
        """Return the job without events in its outbox that were already published."""
        return published(job, self._sent[job.id]) if job.id in self._sent else job

    async def empty(self) -> None:
        """Remove published events from the outboxes of jobs without later events.

        The replica that publishes a later event removes all of them.

        Raises:
            DependencyError: they are still there, and the next call removes them; another replica may publish them again.
        """
        sent = dict(self._sent)
        await self._jobs.empty_outboxes(sent)
        self._sent = {id_: seq for id_, seq in self._sent.items() if seq != sent.get(id_)}
