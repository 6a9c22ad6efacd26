"""A job's state is derived: read the job and its chunks, do what is missing, until nothing is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Final

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

_ROUNDS: Final = 50  # a job needs about five; more is other replicas winning every race
_PROGRESS_SECONDS: Final = 1.0  # between two looks at how far jobs are
_CHUNKS_A_SECOND: Final = 1_000  # read for progress at most, so that a huge job's progress does not cost a core
_PAGE: Final = 1_000  # chunks made or cancelled at once: about 100 ms, and then it is another job's turn
_BULK_SECONDS: Final = 10.0  # between looks for bulk work; it is woken when there is some
_EMPTY_SECONDS: Final = 1.0  # between looks for outboxes to empty; it is woken when there are some
_LEAST_SECONDS: Final = 0.1  # between two rounds of emptying: no reader waits for it, and many jobs share one

_BEGUN: Final = frozenset({ChunkState.RUNNING, ChunkState.SCANNED, ChunkState.STORED, ChunkState.FAILED})
_DONE: Final = frozenset({ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED})


@dataclass(frozen=True, slots=True)
class _Step:
    """A job as it was read, what it came to be one after the other, and at its end what became of its probes."""

    before: ScanJob
    stages: tuple[ScanJob, ...]
    ledger: Mapping[str, int] = field(default_factory=dict)

    @property
    def after(self) -> ScanJob:
        """The job as it should be stored."""
        return self.stages[-1] if self.stages else self.before


class Jobs:
    """Drives jobs. Safe to call for any job at any time, on any replica.

    What takes long, making and cancelling the chunks of large jobs, is done page by page by a loop, so that no handler
    waits for it and no small job waits for a large one. Another tells once a second how far jobs are; most short ones have
    ended by then. A third takes out of the outboxes what was published, many jobs at once: until then it is known here.

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
        self._sent: defaultdict[int, set[str]] = defaultdict(set)
        """By job, the events in its outbox that the bus has acknowledged."""
        self._bulk = Loop("bulk", _BULK_SECONDS, self.work)
        self._emptying = Loop("outbox", _EMPTY_SECONDS, self.empty, least=_LEAST_SECONDS)
        self.loops = (self._bulk, self._emptying, Loop("progress", _PROGRESS_SECONDS, self.progress))

    async def reconcile(self, job_ids: Collection[int]) -> None:
        """Bring these jobs to where their chunks say that they are.

        Raises:
            DependencyError: something is half done; calling again finishes it.
        """
        left = set(job_ids)
        for _ in range(_ROUNDS):
            if not left:
                return
            jobs, states = await asyncio.gather(self._store.jobs(left), self._store.chunk_states(left))
            steps = [await self._step(self._unsent(job), states[job.id]) for job in jobs.values()]
            left = await self._save([step for step in steps if step.stages])
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
        """Publish what these jobs have in their outboxes.

        Raises:
            DependencyError: some of it may be published; calling again publishes all of it.
        """
        await self.tell((await self._store.jobs(job_ids)).values())

    async def tell(self, jobs: Iterable[ScanJob]) -> None:
        """Publish what is in the outboxes of these jobs as they are stored, in order, and have it taken out of them.

        Raises:
            DependencyError: some of it may be published; calling again publishes all of it.
        """
        full = [job for each in jobs if (job := self._unsent(each)).outbox]
        if not full:
            return
        news = {job.id: type(job.outbox[-1].event).__name__ for job in full}
        traces = {job.id: job.traceparent for job in full}
        with tracing.spans(news.__getitem__, traces, "producer", "scanfleet.job.id"):
            await self._publisher.publish(SCAN_EVENTS, [out.event for job in full for out in job.outbox])
        for job in full:
            self._sent[job.id] |= {out.event.event_id for out in job.outbox}
        self._emptying.wake()

    async def empty(self) -> None:
        """Take out of the outboxes what was published.

        Raises:
            DependencyError: it is still there, and the next call takes it out; a replica that comes before publishes it again.
        """
        sent = {id_: frozenset(events) for id_, events in self._sent.items()}
        left: Collection[int] = sent
        for _ in range(_ROUNDS):
            if not left:
                break
            jobs = await self._store.jobs(left)
            emptied = [(job, published(job, sent[job.id])) for job in jobs.values()]
            left = await self._store.save_jobs([after for before, after in emptied if after != before])
        else:
            raise DependencyError(f"outboxes kept changing under us: {sorted(left)[:5]}")
        for id_, events in sent.items():
            self._sent[id_] -= events
            if not self._sent[id_]:
                del self._sent[id_]

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
        for each in (await self._store.jobs(due)).values():
            job = self._unsent(each)
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

    def _unsent(self, job: ScanJob) -> ScanJob:
        """The job without those events that are still in its outbox and were published."""
        return published(job, self._sent[job.id]) if job.id in self._sent else job

    async def _step(self, job: ScanJob, states: Counter[ChunkState]) -> _Step:
        """What the job comes to be by its chunks, from its start to its end if it is over."""
        if job.final:
            await self._cancel(job, states)
            settled = not any(states[state] for state in OPEN)
            return _Step(job, () if settled is job.settled else (replace(job, settled=settled),))
        if states.total() < job.chunk_count:
            self.make([job.id])
        if job.status is JobStatus.RUNNING:
            started = job
        elif any(states[state] for state in _BEGUN):
            started = change_job(job, JobTrigger.START, utc_now())
        else:
            return _Step(job, ())
        stages = () if started is job else (started,)
        if not _is_over(job, states):
            return _Step(job, stages)
        ended, ledger = await self._end(started)
        return _Step(job, (*stages, ended), ledger)

    async def _end(self, job: ScanJob) -> tuple[ScanJob, Mapping[str, int]]:
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
        return ended, tally.counts

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
        losers = await self._store.save_jobs([step.after for step in steps])
        saved = [step for step in steps if step.after.id not in losers]
        for step in saved:
            for before, stage in pairwise((step.before, *step.stages)):
                if stage.status is not before.status:
                    job_came(stage)
            for outcome, probes in step.ledger.items():
                PROBES.labels(outcome).inc(probes)
        await self.tell([step.after for step in saved])
        return losers


def _is_over(job: ScanJob, states: Counter[ChunkState]) -> bool:
    """Whether every chunk of the plan is there and final."""
    return sum(states[state] for state in _DONE) == job.chunk_count


def _matters(changed: Changed) -> bool:
    """Whether the job may start or end by this: what goes on between means nothing to it."""
    before, after = changed.before.state, changed.after.state
    return (after in _BEGUN and before not in _BEGUN) or (after in _DONE and before not in _DONE)
