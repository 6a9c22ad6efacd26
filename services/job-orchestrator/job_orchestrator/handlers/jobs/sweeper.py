"""Repair unfinished jobs periodically, on the replica that owns the job's partition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain, islice
from typing import Final, Self, TypeVar

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import request_check
from job_orchestrator.domain.fairness import LIVE, Credit
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import ChunkRepository, DeletionRepository, DispatchRepository, JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.domain.user_grants import JobGrants
from job_orchestrator.handlers.chunks.changer import ChunkChanger, scanned_again
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.handlers.jobs.faults import Faults
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.handlers.jobs.reporter import Reporter
from job_orchestrator.metrics import CHUNK_CENSUS, DELETION_CENSUS, JOB_CENSUS, OUTBOX_AGE, CensusGauges
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.topics import SCAN_RESULTS
from scanfleet.errors import DependencyError
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import Publisher
from scanfleet.security.chunk_grants import Signer

_OLD_EVENT: Final = timedelta(seconds=5)  # a running replica publishes its events within milliseconds
# The send timeout of the bus; with a shorter one, each sweep would publish events again that a slow broker acknowledges
# later.
_RELAY_SECONDS: Final = 10.0
_RECONCILE_SECONDS: Final = 10.0
_CENSUS_SECONDS: Final = 10.0  # interval: a census reads an index of all unfinished jobs
_PAGE: Final = 500
_PARTS: Final = 6  # a waiting job is checked in every sixth pass, once a minute, although no change of it is known
_MAX_WAITING: Final = 50_000  # waiting jobs that are not read in each pass: 15 MB

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A job, as far as the reasons why it waits need it."""

    user_id: int
    granted_by: str
    status: JobStatus
    waiting: str
    waiting_since: datetime | None
    needs_raw: bool

    @classmethod
    def of(cls, job: ScanJob) -> Self:
        return cls(job.user_id, job.granted_by, job.status, job.waiting, job.waiting_since, plan.needs_raw(job))


class Sweeper:
    """Runs on every replica for the jobs in its partitions; concurrent sweeps are harmless.

    Args:
        publisher: publishes repeated requests to result-store.
        partitions: returns the partitions of scan-progress that this replica owns.
        assignments: returns a number that has changed if another replica may have owned some of them meanwhile.
        signer: signs the repeated requests.
        stored_seconds: timeout for result-store to check a scanned chunk before it is asked again.
        raw_worker_seconds: timeout of a job that waits for a worker with raw packets; then it fails.
        grants: which jobs wait for their hours.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        chunks: ChunkRepository,
        dispatch: DispatchRepository,
        held: HeldChunks,
        deletions: DeletionRepository,
        changer: ChunkChanger,
        publisher: Publisher,
        outbox: Outbox,
        reporter: Reporter,
        faults: Faults,
        reconciler: Reconciler,
        partitions: Callable[[], Collection[int]],
        assignments: Callable[[], int],
        clock: PlatformTime,
        signer: Signer,
        stored_seconds: float,
        raw_worker_seconds: float,
        grants: JobGrants,
    ) -> None:
        self._jobs = jobs
        self._chunks = chunks
        self._dispatch = dispatch
        self._held = held
        self._deletions = deletions
        self._changer = changer
        self._publisher = publisher
        self._signer = signer
        self._outbox = outbox
        self._reporter = reporter
        self._faults = faults
        self._reconciler = reconciler
        self._partitions = partitions
        self._assignments = assignments
        self._clock = clock
        self._patience = timedelta(seconds=stored_seconds)
        self._raw_patience = timedelta(seconds=raw_worker_seconds)
        self._grants = grants
        self._began: datetime | None = None
        self._reconciled = float("-inf")
        self._passes = 0
        self._assigned = 0
        self._waiting: dict[int, _Unfinished] = {}
        """Jobs that waited at their last check, of whose chunks no change is known since then."""
        self._counted = float("-inf")

    async def sweep(self) -> None:
        """Run one pass; called about once a second.

        Raises:
            DependencyError: the next pass does the rest.
        """
        failures: list[DependencyError] = []
        for part in (self._request_checks, self._take_census, self._reconcile_all, self._relay):
            try:
                await part()
            except DependencyError as error:  # the other parts may not need the unavailable dependency
                failures.append(error)
        if failures:
            raise failures[0]

    async def _request_checks(self) -> None:
        now = self._clock.now()
        overdue = await self._chunks.overdue(now, _PAGE, self._partitions())
        if not overdue:
            return
        requests = list(scanned_again(overdue, self._signer))
        await try_publish(self._publisher, SCAN_RESULTS, requests, "result-store is asked again after a delay")
        ids = [chunk.id for chunk in overdue]
        await self._changer.change(ids, lambda chunk: request_check(chunk, now, self._patience), now)

    async def _take_census(self) -> None:
        now = self._clock.monotonic()
        if now - self._counted > _CENSUS_SECONDS:
            self._counted = now  # also after a failure, so that a failing database is not queried more often
            done = await asyncio.gather(
                _show(JOB_CENSUS, self._jobs.census),
                _show(OUTBOX_AGE, self._jobs.outbox_age),
                _show(CHUNK_CENSUS, self._chunks.census),
                _show(DELETION_CENSUS, self._deletions.census),
                return_exceptions=True,  # a query that fails ends only its own gauges
            )
            for each in done:
                if each is not None:
                    raise each

    async def _relay(self) -> None:
        before, partitions = self._clock.now() - _OLD_EVENT, self._partitions()
        if not await self._jobs.with_old_events(before, 1, partitions):
            return
        # By partition: the jobs of one without a leader, which keep their events, would fill a page of all.
        limit = max(1, _PAGE // len(partitions))
        pages = await asyncio.gather(*(self._jobs.with_old_events(before, limit, [each]) for each in partitions))
        await self._outbox.try_publish(chain.from_iterable(pages), _RELAY_SECONDS)

    async def _reconcile_all(self) -> None:
        now = self._clock.monotonic()
        if now - self._reconciled <= _RECONCILE_SECONDS:
            return
        self._began = self._began or self._clock.now()
        live = await self._dispatch.live_workers(LIVE)
        held = {each.token.job_id for each in await self._held.read()}
        self._forget(held | self._changer.take_touched())
        after, waiting = 0, dict[int, _Unfinished]()
        while page := await self._jobs.unsettled(after, _PAGE, self._partitions()):
            known = ((id_, self._waiting.get(id_), state) for id_, state in page.items())
            jobs = {id_: job for id_, job, state in known if job and (job.status, job.waiting) == state}
            read = await self._reconciler.reconcile([id_ for id_ in page if id_ not in jobs])
            jobs |= self._unfinished(read.values())
            jobs |= await self._look_for_workers(jobs, read, live, held)
            waits = ((id_, job) for id_, job in jobs.items() if job.status is JobStatus.PENDING)
            waiting |= islice(waits, _MAX_WAITING - len(waiting))
            after = max(page)
        self._reconciled, self._waiting = now, waiting

    def _forget(self, touched: Collection[int]) -> None:
        """Remove from the waiting jobs those that the next pass must check: `touched` ones, and a part of the others in turn."""
        self._passes += 1
        if self._assigned != (assigned := self._assignments()):
            self._assigned, self._waiting = assigned, {}
        self._waiting = {
            id_: job for id_, job in self._waiting.items() if id_ not in touched and (id_ + self._passes) % _PARTS
        }

    def _unfinished(self, jobs: Iterable[ScanJob]) -> dict[int, _Unfinished]:
        found: dict[int, _Unfinished] = {}
        for job in jobs:
            if not job.final and not self._faults.has(job):
                with self._faults.isolated(job):
                    found[job.id] = _Unfinished.of(job)
        return found

    async def _look_for_workers(
        self,
        jobs: Mapping[int, _Unfinished],
        read: Mapping[int, ScanJob],
        live: Collection[Credit],
        held: Collection[int],
    ) -> Mapping[int, _Unfinished]:
        """Report why jobs without a held chunk are waiting, and fail those that have waited too long.

        Args:
            jobs: the unfinished jobs.
            read: those that were just read.
            live: the live workers.
            held: jobs with held chunks.

        Returns:
            The jobs that wait for another reason now.
        """
        raw = any(worker.raw for worker in live)
        now = self._clock.now()

        def reason(id_: int, job: _Unfinished) -> str:
            if id_ in held:
                return ""
            if self._grants.closed(job, now):
                return "window"
            if not live:
                return "no_worker"
            return "no_raw_worker" if not raw and job.needs_raw else ""

        reasons = {id_: reason(id_, job) for id_, job in jobs.items()}
        changed = [id_ for id_, why in reasons.items() if why != jobs[id_].waiting]
        known = {**read, **await self._jobs.get([id_ for id_ in changed if id_ not in read])}
        stored = await self._reporter.publish_waiting((known[id_], reasons[id_]) for id_ in changed if id_ in known)
        late = [
            id_
            for id_, why in reasons.items()
            if why == jobs[id_].waiting == "no_raw_worker" and self._waited(jobs[id_], now) > self._raw_patience
        ]
        # A worker may have come since the sweep began, which takes long if there are many jobs.
        if late and not any(worker.raw for worker in await self._dispatch.live_workers(LIVE)):
            for id_ in late:
                await self._reconciler.give_up(
                    id_,
                    f"no worker that may send raw packets was available for {self._raw_patience.total_seconds():.0f} s: "
                    "start one, or use a policy without SYN scans, UDP ports and OS detection",
                )
        return self._unfinished(stored)

    def _waited(self, job: _Unfinished, now: datetime) -> timedelta:
        """Return for how long the job has been waiting since this process began and since a step of the clock.

        Workers may have come, and the clock may have been changed, while no process was running.
        """
        since, step = max(job.waiting_since or now, self._began or now), self._clock.stepped_at
        if step is not None and not step <= since <= now:
            since = step
        return now - since


async def _show(gauges: CensusGauges[_Part], count: Callable[[], Awaitable[_Part]]) -> None:
    gauges.show(await count())
