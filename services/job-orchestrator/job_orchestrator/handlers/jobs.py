"""A job's state is derived: read the job and its chunks, do what is missing, until nothing is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

import structlog

from job_orchestrator.domain import ledger, plan
from job_orchestrator.domain.chunk import HELD, OPEN, ChunkState, cancel
from job_orchestrator.domain.job import JobTrigger, ScanJob, observe, published
from job_orchestrator.domain.job import change as change_job
from job_orchestrator.domain.store import Store
from job_orchestrator.handlers.chunks import change as change_chunks
from job_orchestrator.handlers.chunks import stop
from scanfleet.bus import Publisher
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.messages import JobProgressed, JobStatus
from scanfleet.messages.topics import SCAN_EVENTS, SCAN_TASKS

_log = structlog.get_logger()

_ROUNDS: Final = 50  # a job needs about five; more is other replicas winning every race
_PROGRESS_SECONDS: Final = 1.0  # between two events of one job's progress
_CHUNKS_A_SECOND: Final = 1_000  # read for progress at most, so that a huge job's progress does not cost a core
_INSERT: Final = 1_000  # chunks in one write

_BEGUN: Final = (ChunkState.RUNNING, ChunkState.SCANNED, ChunkState.STORED, ChunkState.FAILED)
_DONE: Final = (ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED)


class Jobs:
    """Drives jobs. Safe to call for any job at any time, on any replica.

    Args:
        store: where jobs and chunks are.
        publisher: for job events and stops.
        wake: called when there are new chunks to dispatch.
    """

    def __init__(self, store: Store, publisher: Publisher, wake: Callable[[], None]) -> None:
        self._store = store
        self._publisher = publisher
        self._wake = wake
        self._next_progress: dict[int, float] = {}

    async def reconcile(self, job_ids: Collection[int]) -> None:
        """Bring these jobs to where their chunks say that they are.

        Raises:
            DependencyError: something is half done; calling again finishes it.
        """
        left = set(job_ids)
        for _ in range(_ROUNDS):
            if not left:
                return
            jobs = await self._store.jobs(left)
            states = await self._store.chunk_states(left)
            left, changed = set(), []
            for job in jobs.values():
                after = await self._step(job, states[job.id])
                if after is None:
                    left.add(job.id)
                elif after != job:
                    left.add(job.id)
                    changed.append(after)
            await self._save(changed)
        raise DependencyError(f"jobs kept changing under us: {sorted(left)[:5]}")

    async def relay(self, job_ids: Collection[int]) -> None:
        """Publish what these jobs have in their outboxes, in order, and then empty them.

        Raises:
            DependencyError: events may be published and still be in the outbox; they will be published again.
        """
        await self._publish([job for job in (await self._store.jobs(job_ids)).values() if job.outbox])

    async def progress(self, job_ids: Iterable[int]) -> None:
        """Tell how far these jobs are, each at most once a second.

        Raises:
            DependencyError: nothing is lost; the next second tells more.
        """
        now = time.monotonic()
        due = [job_id for job_id in job_ids if self._next_progress.get(job_id, 0.0) <= now]
        events: list[JobProgressed] = []
        for job in (await self._store.jobs(due)).values() if due else ():
            if job.status is not JobStatus.RUNNING:
                self._next_progress.pop(job.id, None)
                continue
            self._next_progress[job.id] = now + max(_PROGRESS_SECONDS, job.chunk_count / _CHUNKS_A_SECOND)
            tally = ledger.tally(job.status, await self._store.job_chunks(job.id))
            seen = observe(job, ledger.progress(job, tally), tally.machines_found, utc_now())
            if seen and not await self._store.save_jobs([seen[0]]):
                events.append(seen[1])
        if events:
            await self._publisher.publish(SCAN_EVENTS, events)

    async def _step(self, job: ScanJob, states: Counter[ChunkState]) -> ScanJob | None:
        """The job as it should be stored now, or None when only its chunks were changed."""
        done = sum(states[state] for state in _DONE)
        if job.final:
            if any(states[state] for state in OPEN):
                await self._cancel_chunks(job)
                return None
            return replace(job, settled=True)
        if states.total() < job.chunk_count:
            await self._insert_chunks(job)
            return None
        if job.status is JobStatus.PENDING:
            begun = any(states[state] for state in _BEGUN)
            return change_job(job, JobTrigger.START, utc_now()) if begun else job
        return await self._end(job) if done == job.chunk_count else job

    async def _insert_chunks(self, job: ScanJob) -> None:
        chunks = list(plan.chunks(job, await self._store.first_turn(job.user_id)))
        for start in range(0, len(chunks), _INSERT):
            await self._store.insert_chunks(chunks[start : start + _INSERT])
        self._wake()

    async def _end(self, job: ScanJob) -> ScanJob:
        chunks = await self._store.job_chunks(job.id)
        tally = ledger.tally(job.status, chunks)
        counts = ledger.counts(job, tally)
        proven = sum(counts[name] for name in ledger.ACCOUNTED) == job.addresses * job.ports
        self._next_progress.pop(job.id, None)
        if proven and all(chunk.state is ChunkState.STORED for chunk in chunks):
            trigger, progress, error = JobTrigger.COMPLETE, 100, ""
        else:
            trigger = JobTrigger.FAIL
            progress, error = max(job.progress, ledger.progress(job, tally)), ledger.error(tally)
        found = max(job.machines_found, tally.machines_found)
        return change_job(
            replace(job, settled=True),
            trigger,
            utc_now(),
            progress=progress,
            machines_found=found,
            error=error,
        )

    async def _cancel_chunks(self, job: ScanJob) -> None:
        open_chunks = await self._store.job_chunks(job.id, OPEN)
        changed = await change_chunks(
            self._store,
            [chunk.id for chunk in open_chunks],
            lambda chunk: cancel(chunk) if chunk.state in OPEN else chunk,
        )
        stops = [stop(each.before, f"job {job.status}") for each in changed if each.moved and each.before.state in HELD]
        await self._publisher.publish(SCAN_TASKS, stops)

    async def _save(self, jobs: list[ScanJob]) -> None:
        losers = await self._store.save_jobs(jobs)
        await self._publish([replace(job, rev=job.rev + 1) for job in jobs if job.id not in losers and job.outbox])

    async def _publish(self, jobs: Collection[ScanJob]) -> None:
        if not jobs:
            return
        await self._publisher.publish(SCAN_EVENTS, [out.event for job in jobs for out in job.outbox])
        sent = {job.id: {out.event.event_id for out in job.outbox} for job in jobs}
        left: Collection[ScanJob] = jobs
        for _ in range(_ROUNDS):
            losers = await self._store.save_jobs([published(job, sent[job.id]) for job in left])
            if not losers:
                return
            left = (await self._store.jobs(losers)).values()
        # What is left in an outbox is published again by the sweep: twice is allowed, never is not.
        _log.warning("events stay in the outbox", jobs=sorted(losers)[:5])
