"""Publish the events that jobs hold in their outboxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

from job_orchestrator.domain.job import ScanJob, published
from job_orchestrator.domain.ports import JobRepository
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet.errors import DependencyError
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Publisher
from scanfleet.runtime.loop import Loop

_ROUNDS: Final = 50  # more lost races in a row are an error
_EMPTY_SECONDS: Final = 1.0  # interval of the clean-up: most jobs are saved meanwhile, without published events


class Outbox:
    """Publishes events, and removes them from the jobs later, many jobs at once; until then they are cached here.

    Args:
        publisher: publishes job events.
    """

    def __init__(self, jobs: JobRepository, publisher: Publisher) -> None:
        self._jobs = jobs
        self._publisher = publisher
        self._sent: defaultdict[int, set[str]] = defaultdict(set)
        """By job, the events in its outbox that the bus has acknowledged."""
        self.loop = Loop("outbox", _EMPTY_SECONDS, self.empty, vital=False)

    async def relay(self, job_ids: Collection[int]) -> None:
        """Publish the events in the outboxes of these jobs.

        Raises:
            DependencyError: some of them may be published; a retry publishes all of them.
        """
        await self.publish((await self._jobs.get(job_ids)).values())

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
            self._sent[job.id] |= {out.event.event_id for out in job.outbox}

    def unsent(self, job: ScanJob) -> ScanJob:
        """Return the job without events in its outbox that were already published."""
        return published(job, self._sent[job.id]) if job.id in self._sent else job

    async def empty(self) -> None:
        """Remove published events from the outboxes.

        Raises:
            DependencyError: they are still there, and the next call removes them; another replica may publish them again.
        """
        sent = {id_: frozenset(events) for id_, events in self._sent.items()}
        left: Collection[int] = sent
        for _ in range(_ROUNDS):
            if not left:
                break
            jobs = await self._jobs.get(left)
            emptied = [(job, published(job, sent[job.id])) for job in jobs.values()]
            left = await self._jobs.save([after for before, after in emptied if after != before])
        else:
            raise DependencyError(f"outboxes were changed by other replicas each time: {sorted(left)[:5]}")
        for id_, events in sent.items():
            self._sent[id_] -= events
            if not self._sent[id_]:
                del self._sent[id_]
