"""A job's state is derived: read the job and its chunks, do what is missing, until nothing is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

import structlog

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, ChunkState, cancel
from job_orchestrator.domain.job import JobTrigger, ScanJob, observe, published
from job_orchestrator.domain.job import change as change_job
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.store import Store
from job_orchestrator.handlers.chunks import Changed, stop
from job_orchestrator.handlers.chunks import change as change_chunks
from job_orchestrator.metrics import PROBES, job_came
from scanfleet import tracing
from scanfleet.bus import Publisher
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.loop import Loop
from scanfleet.messages import JobProgressed, JobStatus
from scanfleet.messages.topics import SCAN_EVENTS, SCAN_TASKS

_log = structlog.get_logger()

_ROUNDS: Final = 50  # a job needs about five; more is other replicas winning every race
_PROGRESS_SECONDS: Final = 1.0  # between two looks at how far jobs are
_CHUNKS_A_SECOND: Final = 1_000  # read for progress at most, so that a huge job's progress does not cost a core
_PAGE: Final = 1_000  # chunks made or cancelled at once: about 100 ms, and then it is another job's turn
_BULK_SECONDS: Final = 10.0  # between looks for bulk work; it is woken when there is some

_BEGUN: Final = frozenset({ChunkState.RUNNING, ChunkState.SCANNED, ChunkState.STORED, ChunkState.FAILED})
_DONE: Final = frozenset({ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED})


@dataclass(frozen=True, slots=True)
class _Step:
    """A job as it was read and as it should be stored, and at its end what became of its probes."""

    before: ScanJob
    after: ScanJob
    ledger: Mapping[str, int] = field(default_factory=dict)


class Jobs:
    """Drives jobs. Safe to call for any job at any time, on any replica.

    What takes long, making and cancelling the chunks of large jobs, is done page by page by a loop, so that no handler
    waits for it and no small job waits for a large one. Another tells once a second how far jobs are; most short ones have
    ended by then.

    Args:
        store: where jobs and chunks are.
        publisher: for job events and stops.
        wake: called when there are new chunks to dispatch.
    """

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        wake: Callable[[], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._wake = wake
        self._monotonic = monotonic
        self._further: set[int] = set()
        self._next_progress: dict[int, float] = {}
        self._bulky: set[int] = set()
        self._plans: dict[int, Iterator[Chunk]] = {}
        self._bulk = Loop("bulk", _BULK_SECONDS, self.work)
        self.loops = (self._bulk, Loop("progress", _PROGRESS_SECONDS, self.progress))

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
            steps = [await self._step(job, states[job.id]) for job in jobs.values()]
            changed = [step for step in steps if step.after != step.before]
            started = {step.after.id for step in changed if not step.after.final}
            left = await self._save(changed) | {id_ for id_ in started if _is_over(jobs[id_], states[id_])}
        raise DependencyError(f"jobs kept changing under us: {sorted(left)[:5]}")

    def make(self, job_ids: Collection[int]) -> None:
        """Have the chunks of these new jobs made at once; `reconcile` would find that they are missing, but later."""
        self._bulky |= set(job_ids)
        self._bulk.wake()

    async def work(self) -> None:
        """Make or cancel the next page of chunks of each job that was found to lack it.

        Raises:
            DependencyError: what is left undone is found again by `reconcile`.
        """
        wanted = set(self._bulky)
        jobs = await self._store.jobs(wanted)
        made = await self._make([job for job in jobs.values() if not job.final])
        unmade = {job.id for job in jobs.values() if not job.final} - made
        self._bulky -= wanted - unmade
        await self.reconcile(wanted - unmade)
        self._bulky -= made  # what a whole plan did not mend is not tried at once again
        if self._bulky:
            self._bulk.wake()

    async def follow(self, changes: Iterable[Changed]) -> None:
        """Bring about what follows from these changes of chunks, and tell of the progress.

        Raises:
            DependencyError: the next pass over all unfinished jobs does what is left.
        """
        changes = list(changes)
        await self.reconcile({each.after.job_id for each in changes if _matters(each)})
        self._further |= {each.after.job_id for each in changes if each.after.outcomes != each.before.outcomes}

    async def relay(self, job_ids: Collection[int]) -> None:
        """Publish what these jobs have in their outboxes, in order, and then empty them.

        Raises:
            DependencyError: events may be published and still be in the outbox; they will be published again.
        """
        await self._publish([job for job in (await self._store.jobs(job_ids)).values() if job.outbox])

    async def progress(self) -> None:
        """Tell how far those jobs are that got further since they were last told of; called about once a second.

        Raises:
            DependencyError: nothing is lost; the next call tells more.
        """
        now = self._monotonic()
        self._next_progress = {id_: due for id_, due in self._next_progress.items() if due > now}
        due = self._further - self._next_progress.keys()
        if not due:
            return
        untold: set[int] = set()
        seen: dict[int, tuple[ScanJob, JobProgressed]] = {}
        for job in (await self._store.jobs(due)).values():
            if job.status is not JobStatus.RUNNING:
                continue
            if job.outbox:
                untold.add(job.id)
                continue
            self._next_progress[job.id] = now + job.chunk_count / _CHUNKS_A_SECOND
            tally = await self._tally(job)
            if news := observe(job, tally.progress, tally.machines_found, utc_now()):
                seen[job.id] = news
        untold |= await self._store.save_jobs([job for job, _ in seen.values()])
        self._further -= due - untold
        await self._publisher.publish(SCAN_EVENTS, [event for id_, (_, event) in seen.items() if id_ not in untold])

    async def _step(self, job: ScanJob, states: Counter[ChunkState]) -> _Step:
        """The job as it should be stored now."""
        if job.final:
            await self._cancel(job, states)
            return _Step(job, replace(job, settled=not any(states[state] for state in OPEN)))
        if states.total() < job.chunk_count:
            self.make([job.id])
        if job.status is JobStatus.PENDING:
            begun = any(states[state] for state in _BEGUN)
            return _Step(job, change_job(job, JobTrigger.START, utc_now()) if begun else job)
        return await self._end(job) if _is_over(job, states) else _Step(job, job)

    async def _end(self, job: ScanJob) -> _Step:
        tally = await self._tally(job)
        if tally.accounted and tally.chunks[ChunkState.STORED] == job.chunk_count:
            trigger, progress, error = JobTrigger.COMPLETE, 100, ""
        else:
            trigger, progress, error = JobTrigger.FAIL, max(job.progress, tally.progress), tally.error
        ended = change_job(
            replace(job, settled=True),
            trigger,
            utc_now(),
            progress=progress,
            machines_found=max(job.machines_found, tally.machines_found),
            error=error,
        )
        return _Step(job, ended, tally.counts)

    async def _tally(self, job: ScanJob) -> Tally:
        tally = Tally(job)
        async for chunk in self._store.job_chunks(job.id):
            tally.add(chunk)
        return tally

    async def _make(self, jobs: Sequence[ScanJob]) -> set[int]:
        """Store the next chunks of each job; answer the jobs that have all now."""
        plans, self._plans = self._plans, {}  # if the insert fails they begin anew, and nothing is left out
        batch: list[Chunk] = []
        made: set[int] = set()
        turns = {user_id: await self._store.first_turn(user_id) for user_id in {job.user_id for job in jobs}}
        for job in jobs:
            chunks = plans.get(job.id) or plan.chunks(job, turns[job.user_id])
            share = -(-_PAGE // len(jobs))
            page = list(islice(chunks, share))
            batch += page
            if len(page) < share:
                made.add(job.id)
            plans[job.id] = chunks
        await self._store.insert_chunks(batch)
        self._plans = {job.id: plans[job.id] for job in jobs if job.id not in made}
        if batch:
            self._wake()
        return made

    async def _cancel(self, job: ScanJob, states: Counter[ChunkState]) -> None:
        """Cancel a page of the chunks that are not final, first those that send packets now."""
        for kind in (HELD, OPEN - HELD):
            count = sum(states[state] for state in kind)
            if not count:
                continue
            changed = await change_chunks(
                self._store,
                await self._store.chunks_in(job.id, kind, _PAGE),
                lambda chunk: cancel(chunk) if chunk.state in OPEN else chunk,
            )
            held = [each.before for each in changed if each.moved and each.before.state in HELD]
            await self._publisher.publish(SCAN_TASKS, [stop(chunk, f"job {job.status}") for chunk in held])
            self.make([job.id])  # it is settled only when a look finds none

    async def _save(self, steps: Sequence[_Step]) -> set[int]:
        jobs = [step.after for step in steps]
        losers = await self._store.save_jobs(jobs)
        for step in (step for step in steps if step.after.id not in losers):
            if step.after.status is not step.before.status:
                job_came(step.after)
            for outcome, probes in step.ledger.items():
                PROBES.labels(outcome).inc(probes)
        await self._publish([replace(job, rev=job.rev + 1) for job in jobs if job.id not in losers and job.outbox])
        return losers

    async def _publish(self, jobs: Collection[ScanJob]) -> None:
        if not jobs:
            return
        news = {job.id: type(job.outbox[-1].event).__name__ for job in jobs}
        traces = {job.id: job.traceparent for job in jobs}
        with tracing.spans(news.__getitem__, traces, "producer", "scanfleet.job.id"):
            await self._publisher.publish(SCAN_EVENTS, [out.event for job in jobs for out in job.outbox])
        sent = {job.id: {out.event.event_id for out in job.outbox} for job in jobs}
        left: Collection[ScanJob] = jobs
        for _ in range(_ROUNDS):
            emptied = [(job, published(job, sent[job.id])) for job in left]
            losers = await self._store.save_jobs([after for job, after in emptied if after != job])
            if not losers:
                return
            left = (await self._store.jobs(losers)).values()
        # What is left in an outbox is published again by the sweep: twice is allowed, never is not.
        _log.warning("events stay in the outbox", jobs=sorted(losers)[:5])


def _is_over(job: ScanJob, states: Counter[ChunkState]) -> bool:
    """Whether every chunk of the plan is there and final."""
    return sum(states[state] for state in _DONE) == job.chunk_count


def _matters(changed: Changed) -> bool:
    """Whether the job may start or end by this: what goes on between means nothing to it."""
    before, after = changed.before.state, changed.after.state
    return (after in _BEGUN and before not in _BEGUN) or (after in _DONE and before not in _DONE)
