"""Derive a job's state: read the job and its chunks, and perform missing steps until there are none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from types import MappingProxyType
from typing import Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.census import Standing
from job_orchestrator.domain.chunk import OPEN, Chunk, ChunkState, cancel
from job_orchestrator.domain.job import JobTrigger, ScanJob
from job_orchestrator.domain.job import change as change_job
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.ports import ChunkRepository, DispatchRepository, JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.domain.totals import EMPTY
from job_orchestrator.domain.work_queue import WorkQueue
from job_orchestrator.handlers.chunks.canceller import ChunkCanceller, reason, reasons
from job_orchestrator.handlers.chunks.changer import Changed, ChunkChanger
from job_orchestrator.handlers.jobs.faults import Faults
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.handlers.jobs.reporter import Reporter
from job_orchestrator.metrics import PROBES, count_transition
from scanfleet.contracts.messages import JobStatus
from scanfleet.errors import DependencyError
from scanfleet.runtime.loop import Loop

_ROUNDS: Final = 50  # a job needs about five; more means that other replicas win every race
_PAGE: Final = 1_000  # chunks counted or created at once: about 50 ms, then other jobs are processed
_WORK_SECONDS: Final = 10.0  # interval of the work loop, which is also woken when there is work
_STARTED: Final = 10_000  # started jobs that are cached, so that their claims need no query

_DONE: Final = frozenset(ChunkState) - OPEN

Known = Mapping[str, Chunk]
"""Chunks by id, as they were just stored."""

_NOTHING: Final[Known] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Step:
    """A job as it was read, its successive versions, and the ledger of its probes if it has ended."""

    before: ScanJob
    stages: tuple[ScanJob, ...] = ()
    ledger: Mapping[str, int] = field(default_factory=dict)

    @property
    def after(self) -> ScanJob:
        """The version of the job to store."""
        return self.stages[-1] if self.stages else self.before

    @property
    def stored(self) -> ScanJob:
        """The job as it is stored after this step."""
        return replace(self.after, rev=self.before.rev + bool(self.stages))


class Reconciler:
    """Drives jobs. Safe to call for any job at any time, on any replica.

    Chunks are created in a window ahead of dispatch, and added to the job's totals in index order as they end. The work loop
    continues work that is too large for one step, so that neither handlers nor small jobs wait for a large job.

    Args:
        wake: called with the users who have new chunks to dispatch.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        chunks: ChunkRepository,
        changer: ChunkChanger,
        dispatch: DispatchRepository,
        canceller: ChunkCanceller,
        outbox: Outbox,
        reporter: Reporter,
        faults: Faults,
        wake: Callable[[Collection[int]], None],
        clock: PlatformTime,
    ) -> None:
        self._jobs = jobs
        self._chunks = chunks
        self._changer = changer
        self._dispatch = dispatch
        self._canceller = canceller
        self._outbox = outbox
        self._reporter = reporter
        self._faults = faults
        self._wake = wake
        self._clock = clock
        self._queue = WorkQueue()
        self._started: dict[int, None] = {}
        self.loop = Loop("jobs", _WORK_SECONDS, self.work, vital=False)

    async def reconcile(self, job_ids: Collection[int], known: Known = _NOTHING) -> Mapping[int, ScanJob]:
        """Update these jobs to the state of their chunks; return them as they are stored then.

        Args:
            job_ids: ids of the jobs.
            known: chunks that need not be read again.

        Raises:
            DependencyError: some steps may be missing; a retry performs them.
        """
        jobs = await self._jobs.get(job_ids) if job_ids else {}
        updated: dict[int, ScanJob] = {}
        for _ in range(_ROUNDS):
            if not jobs:
                return updated
            if await self._canceller.stop_scans(reasons(jobs.values())):
                known = {}
            standings = await self._standings(jobs.values(), known)
            turns = await self._first_turns(jobs.values())
            left: set[int] = set()
            steps: list[_Step] = []
            window: list[Chunk] = []
            for job in jobs.values():
                step = await self._guarded(job, standings[job.id], known, turns, window)
                updated[job.id] = step.stored
                steps.append(step)
                if len(window) >= _PAGE:
                    left |= await self._store(steps, window)
                    steps, window = [], []
            left |= await self._store(steps, window)
            updated |= {job.id: job for job in jobs.values() if self._faults.has(job)}
            known = {}  # chunks of jobs that lost a race may have changed
            jobs = await self._jobs.get(left) if left else {}
        raise DependencyError(f"jobs were changed by other replicas each time: {sorted(left)[:5]}")

    async def start(self, jobs: Collection[ScanJob]) -> None:
        """Create the first chunks of these new jobs, which count them as created already.

        Raises:
            DependencyError: some are missing; `reconcile` creates them.
        """
        window: list[Chunk] = []
        for job in jobs:
            with self._faults.isolated(job):
                window += plan.chunks(job, 0, job.made)
        self._changer.cache(window)  # first: a dispatch may follow at once
        await self._create({job.id: job for job in jobs}, window)
        if window:
            self._wake({chunk.user_id for chunk in window})
        self.begin(job for job in jobs if not job.made)

    def begin(self, jobs: Iterable[ScanJob]) -> None:
        """Schedule the first chunks of new jobs and the cancellation of those of ended ones."""
        for job in jobs:
            self._continue(job)

    async def work(self) -> None:
        """Continue a few of the jobs that have more to do, their users in turn.

        Raises:
            DependencyError: `reconcile` finds the remaining work again.
        """
        await self.reconcile(self._queue.take(_PAGE))
        if self.busy:
            self.loop.wake()

    @property
    def busy(self) -> bool:
        """Whether the work loop has more to do."""
        return bool(self._queue)

    async def follow(self, changes: Iterable[Changed]) -> None:
        """Update the jobs of these changed chunks, and publish their progress.

        Raises:
            DependencyError: the next sweep over all unfinished jobs does the rest.
        """
        changes = list(changes)
        await self.reopen(changes)
        moved = {each.after.job_id for each in changes if self._matters(each) or _is_late(each)}
        updated = await self.reconcile(moved, {each.after.id: each.after for each in changes})
        self._reporter.note(each.after.job_id for each in changes if each.after.outcomes != each.before.outcomes)
        self._reporter.end(job.id for job in updated.values() if job.final)

    async def reopen(self, changes: Iterable[Changed]) -> None:
        """Count the jobs of cancelled chunks whose maps change again, from their first chunks.

        Call it also before the changes are saved: if the process dies in between, the sweep finds the jobs unsettled.

        Raises:
            DependencyError: the database is unavailable, or another replica changed a job meanwhile.
        """
        late: dict[int, int] = {}
        for each in changes:
            if _is_late(each):
                late[each.after.job_id] = min(each.after.index, late.get(each.after.job_id, each.after.index))
        if not late:
            return
        jobs = await self._jobs.get(late)
        again = [replace(job, totals=EMPTY, settled=False) for job in jobs.values() if job.totals.done > late[job.id]]
        if await self._jobs.save(again):
            raise DependencyError("a job was changed by another replica while its totals were reset")

    async def give_up(self, job_id: int, error: str) -> bool:
        """Fail a job that no worker can execute, unless it has ended meanwhile, and cancel its chunks.

        Returns:
            False if the job is damaged and cannot be failed; its chunks stay queued.

        Raises:
            DependencyError: the next sweep does it.
        """
        job = (await self._jobs.get([job_id])).get(job_id)
        if job is None or job.final:
            return True
        with self._faults.isolated(job):
            failed = change_job(job, JobTrigger.FAIL, self._clock.now(), error=error)
            if not await self._save([_Step(job, (failed,))]):
                await self.reconcile([job_id])
            return True
        return False

    def _continue(self, job: ScanJob) -> None:
        self._queue.add(job)
        self.loop.wake()

    def _matters(self, changed: Changed) -> bool:
        """Return whether the change may start, continue or end the job.

        A scanned chunk starts its job with the verdict of result-store, which follows within milliseconds, or with the next sweep.
        A verdict that changes nothing of a stored chunk may be a repeated one, whose replica stopped before it had saved the job.
        """
        before, after = changed.before.state, changed.after.state
        if after in _DONE and before not in _DONE:
            return True
        if after is ChunkState.STORED and changed.after == changed.before:
            return True
        return after is ChunkState.RUNNING is not before and changed.after.job_id not in self._started

    async def _store(self, steps: Sequence[_Step], window: Sequence[Chunk]) -> set[int]:
        """Store the new chunks, and then their jobs; return the jobs that another replica changed meanwhile."""
        await self._create({step.before.id: step.before for step in steps}, window)
        return await self._save([step for step in steps if step.stages and not self._faults.has(step.before)])

    async def _create(self, jobs: Mapping[int, ScanJob], window: Sequence[Chunk]) -> None:
        """Store the new chunks of all these jobs at once, or, after an unexpected error, those of each job by itself."""
        try:
            await self._chunks.insert(window)
        except DependencyError:
            raise
        except Exception:  # noqa: BLE001 # an error that recurs for a single job is reported there
            for job_id, chunks in groupby(window, key=lambda chunk: chunk.job_id):
                with self._faults.isolated(jobs[job_id]):
                    await self._chunks.insert(list(chunks))

    async def _guarded(
        self, job: ScanJob, standing: Standing, known: Known, turns: Mapping[int, int], window: list[Chunk]
    ) -> _Step:
        if not self._faults.has(job):
            with self._faults.isolated(job):
                step, new = await self._step(self._outbox.unsent(job), standing, known, turns)
                window += new
                return step
        return _Step(job)

    async def _step(
        self, job: ScanJob, standing: Standing, known: Known, turns: Mapping[int, int]
    ) -> tuple[_Step, Sequence[Chunk]]:
        """Derive the job's versions from its chunks, from its start to its end if it is over, and the chunks to create."""
        if job.final:
            # Held chunks too: one may have been dispatched since the scans were stopped.
            if standing.open and await self._canceller.cancel({job.id: reason(job)}):
                self._continue(job)  # it is settled only when a query finds none
            counted = await self._count(job, standing, known)
            # After a full page there may be more chunks that a replica created without counting them in `made`.
            complete = counted.totals.done == counted.made and counted.totals.done - job.totals.done < _PAGE
            after = replace(counted, settled=not standing.open and complete)
            return _Step(job, () if after == job else (after,)), ()
        started = job
        if job.status is JobStatus.PENDING and (standing.begun or standing.open < job.made):
            if (
                not standing.begun
                and _uncounted(job, known) is None
                and not await self._chunks.ids_in([job.id], _DONE, 1)
            ):
                # The replica that accepted the job has not created them yet, or stopped before (ADR 73).
                return _Step(job), list(plan.chunks(job, 0, job.made))
            started = change_job(job, JobTrigger.START, self._clock.now(), waiting="", waiting_since=None)
        if job.status is JobStatus.RUNNING:
            self._remember(job.id)
        counted = await self._count(started, standing, known)
        if counted.totals.done == job.plan.chunk_count:
            ended, ledger = self._end(counted)
            return _Step(job, (ended,) if started is job else (started, ended), ledger), ()
        after, new = _fill_window(counted, standing, turns.get(job.user_id, 0))
        return _Step(job, () if after == job else (after,)), new

    def _end(self, job: ScanJob) -> tuple[ScanJob, Mapping[str, int]]:
        tally = Tally(job)
        if tally.accounted:
            trigger, progress, error = JobTrigger.COMPLETE, 100, ""
        else:
            trigger, progress, error = JobTrigger.FAIL, max(job.progress, tally.progress), tally.error
        ended = change_job(
            job,
            trigger,
            self._clock.now(),
            settled=True,
            progress=progress,
            machines_found=max(job.machines_found, tally.machines_found),
            error=error,
        )
        return ended, tally.counts

    async def _count(self, job: ScanJob, standing: Standing, known: Known) -> ScanJob:
        """Return the job with its ended chunks added to the totals, in index order up to the first that has not ended."""
        first = job.totals.done
        # A replica that created chunks of a job that has ended meanwhile could not save it: they are beyond `made`.
        last = job.plan.chunk_count if job.final else job.made
        ended = last if standing.lowest is None else standing.lowest
        end = min(ended, first + _PAGE)
        if first >= end:
            return job
        tally = Tally(job)
        done = first
        async for chunk in self._counted(job, first, end, known):
            if chunk.index != done or chunk.state in OPEN:
                break
            tally.end(chunk)
            done += 1
        # A replica stopped before it had created them (ADR 73), or release 0.1 halfway: existing chunks are kept.
        if missing := list(plan.chunks(job, done, min(end, job.made))):
            await self._chunks.insert([cancel(chunk) for chunk in missing] if job.final else missing)
        # A job without progress, as with an unreadable chunk, waits for the next sweep.
        if first < done < ended and (missing or done == end):
            self._continue(job)
        counted = replace(job, totals=tally.totals, made=max(job.made, done), seconds_left=0.0)
        over = job.final or done == job.plan.chunk_count
        return counted if over else replace(counted, seconds_left=Tally(counted).seconds_left)

    async def _counted(self, job: ScanJob, first: int, end: int, known: Known) -> AsyncIterator[Chunk]:
        ids = [plan.chunk_id(job, index) for index in range(first, end)]
        if all(id_ in known for id_ in ids):
            for id_ in ids:
                yield known[id_]
            return
        async for chunk in self._chunks.of_job(job.id, first, end):
            yield chunk

    async def _standings(self, jobs: Collection[ScanJob], known: Known) -> Mapping[int, Standing]:
        """Return the state of the jobs' chunks, without a query for jobs of which every open chunk is known.

        The query must follow that of the jobs, so that all chunks created by then are visible.
        """
        unfinished = (job for job in jobs if not job.final)  # final ones may have chunks beyond `made`
        found = {job.id: Standing.of(chunks) for job in unfinished if (chunks := _uncounted(job, known)) is not None}
        if unknown := [job.id for job in jobs if job.id not in found]:
            found |= await self._chunks.standings(unknown)
        return found

    async def _first_turns(self, jobs: Iterable[ScanJob]) -> Mapping[int, int]:
        """Return the turn at which new jobs of each user begin."""
        users = {job.user_id for job in jobs if not job.made and not job.final}
        return await self._dispatch.first_turns(users) if users else {}

    def _remember(self, job_id: int) -> None:
        self._started[job_id] = None
        if len(self._started) > _STARTED:
            del self._started[next(iter(self._started))]

    async def _save(self, steps: Sequence[_Step]) -> set[int]:
        losers = await self._jobs.save([step.after for step in steps])
        saved = [step for step in steps if step.after.id not in losers]
        if made := {step.after.user_id for step in saved if step.after.made > step.before.made}:
            self._wake(made)  # not before: a chunk that ends before its job is saved costs both another round
        for step in saved:
            if step.after.status is JobStatus.RUNNING:
                self._remember(step.after.id)
            for before, stage in pairwise((step.before, *step.stages)):
                if stage.status is not before.status:
                    count_transition(stage)
            for outcome, probes in step.ledger.items():
                PROBES.labels(outcome).inc(probes)
        await self._outbox.try_publish(step.after for step in saved)
        return losers


def _is_late(changed: Changed) -> bool:
    """Return whether a cancelled chunk, which may be counted already, gets another map."""
    return changed.before.state is ChunkState.CANCELLED and changed.after.outcomes != changed.before.outcomes


def _uncounted(job: ScanJob, known: Known) -> list[Chunk] | None:
    """Return the chunks that are not in the job's totals yet, or None if some of them are not known."""
    indexes = range(job.totals.done, job.made)
    if not 0 < len(indexes) <= len(known):
        return None
    found = [known.get(plan.chunk_id(job, index)) for index in indexes]
    chunks = [chunk for chunk in found if chunk is not None]
    return chunks if len(chunks) == len(found) else None


def _fill_window(job: ScanJob, standing: Standing, first_turn: int) -> tuple[ScanJob, Sequence[Chunk]]:
    """Return the job with its window of chunks filled up, and the chunks that must be stored before it."""
    end = plan.made_up_to(job, standing.open, standing.lowest)
    if end == job.made:
        return job, ()
    if not job.made:
        job = replace(job, turn=first_turn)
    return replace(job, made=end), list(plan.chunks(job, job.made, end))
