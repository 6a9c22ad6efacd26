"""Many jobs of one user do not delay those of others, nor the stops of cancelled ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from job_orchestrator.domain import plan
from job_orchestrator.domain.census import Standing
from job_orchestrator.domain.chunk import OPEN, Chunk, ChunkState
from job_orchestrator.domain.job import JobTrigger, ScanJob, change
from job_orchestrator.domain.ledger import Tally
from job_orchestrator_testing import MemoryStore, Simulation, chunk, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository.chunks import MemoryChunks
from job_orchestrator_testing.repository.data import Data
from job_orchestrator_testing.repository.jobs import MemoryJobs
from scanfleet.contracts.messages import JobStatus, Message, ScanChunk, StopChunk
from scanfleet.contracts.messages.topics import SCAN_TASKS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher

LARGE = 12  # jobs of the user who submits or cancels many
PAGE = 1_000  # chunks of one step of the work loop


class CountingChunks(MemoryChunks):
    """Counts the chunks that are inserted and saved, and yields as a driver does.

    Attributes:
        inserted: their users, in order.
        saved: number of chunks.
    """

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.inserted: list[int] = []
        self.saved = 0

    async def insert(self, chunks: Sequence[Chunk]) -> None:
        await asyncio.sleep(0)
        self.inserted += [each.user_id for each in chunks]
        await super().insert(chunks)

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        self.saved += len(chunks)
        return await super().save(chunks)


class CountingJobs(MemoryJobs):
    """Records how many chunks were inserted before each save of jobs with chunks."""

    def __init__(self, data: Data, chunks: CountingChunks) -> None:
        super().__init__(data)
        self._chunks = chunks
        self.saves: list[int] = []

    async def save(self, jobs: Sequence[ScanJob]) -> set[int]:
        if any(job.made for job in jobs):
            self.saves.append(len(self._chunks.inserted))
        return await super().save(jobs)


class CountingPublisher:
    """Records how many chunks were saved before each stop."""

    def __init__(self, publisher: Publisher, chunks: CountingChunks) -> None:
        self._publisher = publisher
        self._chunks = chunks
        self.stops: list[int] = []

    async def publish(self, topic: Topic[Message], messages: Iterable[Message]) -> None:
        messages = list(messages)
        self.stops += [self._chunks.saved for each in messages if isinstance(each, StopChunk)]
        await self._publisher.publish(topic, messages)


class LargeSimulation(Simulation):
    """A simulation in which user 7 submits many jobs, each of more chunks than fit into its window."""

    def __init__(self) -> None:
        store = MemoryStore()
        self.chunks = store.chunks = CountingChunks(store.data)
        self.jobs = store.jobs = CountingJobs(store.data, self.chunks)
        super().__init__(store)
        self.publisher = CountingPublisher(self.bus, self.chunks)
        self.replicas = [self.replica(publisher=self.publisher)]
        self.worker.slots = 2
        self.worker.hold = True

    async def submit_many(self) -> list[int]:
        cidrs = (f"127.{number}.0.0/16" for number in range(1, LARGE + 1))
        command = await self.submit(*cidrs, policy=scan_policy(ports="1-60000"))
        await self.deliver()
        return [job.id for job in self.accepted(command)]


async def test_jobs_of_one_request_do_not_delay_another_users_job() -> None:
    """While a request for many large jobs is processed, at most two pages of its chunks precede those of another user's job."""
    simulation = LargeSimulation()
    await simulation.start()
    await simulation.submit_many()
    step = asyncio.create_task(simulation.only.reconciler.work())
    await asyncio.sleep(0)
    await simulation.submit("127.99.0.1/32", user_id=8)
    await simulation.deliver()
    await step
    await simulation.settle()
    assert simulation.chunks.inserted.index(8) <= 2 * (PAGE + plan.WINDOW)
    assert simulation.chunks.inserted.count(7) == LARGE * plan.WINDOW


async def test_jobs_are_saved_with_each_page_of_their_chunks() -> None:
    """The first jobs of a large step are saved before the chunks of the others are created, in the work loop and the sweep."""
    for sweep in (False, True):
        simulation = LargeSimulation()
        await simulation.start()
        ids = await simulation.submit_many()
        simulation.jobs.saves.append(len(simulation.chunks.inserted))  # chunks that are created with their jobs
        await (simulation.only.reconciler.reconcile(ids) if sweep else simulation.settle())
        steps = [
            after - before for before, after in pairwise((0, *simulation.jobs.saves, len(simulation.chunks.inserted)))
        ]
        assert max(steps) <= PAGE + plan.WINDOW


async def test_cancel_of_many_jobs_stops_their_scans_before_queued_chunks_are_cancelled() -> None:
    """The stops of many cancelled jobs precede the cancels of their queued chunks, in the work loop and in one step."""
    for one_step in (False, True):
        simulation = LargeSimulation()
        await simulation.start()
        ids = await simulation.submit_many()
        await simulation.settle()
        for job_id in ids[-2:]:
            (chunk,) = (await simulation.store.chunks.get([f"{job_id}-0"])).values()
            await simulation.store.chunks.save([_held(chunk)])
        simulation.chunks.saved = 0
        if one_step:
            for job_id in ids:
                await simulation.cancel(job_id)
            await simulation.deliver()
        else:
            await simulation.only.cancels.cancel(ids)
        await simulation.settle()
        assert [saved <= 2 for saved in simulation.publisher.stops] == [True, True]
        assert simulation.chunks.saved == LARGE * plan.WINDOW


class QueryingChunks(MemoryChunks):
    """Records the queries for chunks of ended jobs that workers hold.

    Attributes:
        queries: the jobs of each.
    """

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.queries: list[list[int]] = []

    async def ids_in(self, job_ids: Collection[int], states: Collection[ChunkState], limit: int) -> list[str]:
        if ChunkState.RUNNING in states and ChunkState.QUEUED not in states:
            self.queries.append(sorted(job_ids))
        return await super().ids_in(job_ids, states, limit)


async def cancelled_jobs(*held: Chunk) -> tuple[Simulation, QueryingChunks]:
    """A simulation with three cancelled jobs of three chunks each, except for `held` all queued."""
    store = MemoryStore()
    store.chunks = chunks = QueryingChunks(store.data)
    jobs = [scan_job(id_, cidr="127.9.8.0/30", chunk_count=3, made=3) for id_ in (1, 2, 3)]
    await store.jobs.insert([replace(change(job, JobTrigger.CANCEL, THEN), outbox=()) for job in jobs])
    await store.chunks.insert(held)
    await store.chunks.insert([chunk(id=f"{id_}-{n}", job_id=id_, index=n) for id_ in (1, 2, 3) for n in range(3)])
    simulation = Simulation(store)
    await simulation.start()
    return simulation, chunks


async def test_scans_of_ended_jobs_are_looked_for_once_for_all() -> None:
    """A step with several ended jobs has one query for the chunks that workers hold, and cancels all others."""
    simulation, chunks = await cancelled_jobs()
    await simulation.only.reconciler.reconcile([1, 2, 3])
    assert chunks.queries == [[1, 2, 3]]
    assert await chunks.ids_in([1, 2, 3], OPEN, 9) == []


async def test_damaged_worker_id_does_not_prevent_the_other_stops() -> None:
    """A held chunk whose worker id is invalid is cancelled and logged, and the scans of all other chunks are stopped."""
    damaged = chunk(id="1-0", state=ChunkState.RUNNING, attempt=1, worker_id="not/valid")
    simulation, chunks = await cancelled_jobs(
        damaged, _held(chunk(id="1-1", index=1)), _held(chunk(id="2-0", job_id=2))
    )
    with capture_logs() as logs:
        await simulation.only.reconciler.reconcile([1, 2, 3])
    assert await chunks.ids_in([1, 2, 3], OPEN, 9) == []
    stops = [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)]
    assert sorted(each.chunk_id for each in stops) == ["1-1", "2-0"]
    assert [each["chunk_id"] for each in logs if each["event"] == "scan_not_stopped"] == ["1-0"]


class DispatchedChunks(MemoryChunks):
    """Another replica dispatches every queued chunk right after its job's states have been queried."""

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        found = await super().standings(job_ids)
        for each in self._data.chunks.values():
            if each.state is ChunkState.QUEUED:
                self._data.chunks[each.id] = _held(each)
        return found


async def test_chunk_dispatched_during_a_cancel_is_stopped_by_the_same_step() -> None:
    """A chunk that is dispatched after the scans of an ended job were stopped does not run until the next sweep."""
    store = MemoryStore()
    store.chunks = DispatchedChunks(store.data)
    job = scan_job(1, cidr="127.9.8.0/30", chunk_count=3, made=3)
    await store.jobs.insert([change(job, JobTrigger.CANCEL, THEN)])
    await store.chunks.insert([chunk(id=f"1-{n}", index=n) for n in range(3)])
    simulation = Simulation(store)
    await simulation.start()
    await simulation.only.reconciler.reconcile([1])
    stops = [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)]
    assert sorted(each.chunk_id for each in stops) == ["1-0", "1-1", "1-2"]


class RacingChunks(MemoryChunks):
    """Another replica creates the chunks of new jobs right after their states have been queried."""

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        found = await super().standings(job_ids)
        for job_id in job_ids:
            job = self._data.jobs[job_id]
            await self.insert(list(plan.chunks(job, 0, job.made)))
        return found


@pytest.mark.parametrize(("max_rate", "window"), [(100, 1), (None, plan.WINDOW)])
async def test_job_whose_chunks_are_created_meanwhile_is_not_started(max_rate: int | None, window: int) -> None:
    """A job whose chunks another replica creates during a step stays pending, with one window of chunks."""
    store = MemoryStore()
    store.chunks = RacingChunks(store.data)
    simulation = Simulation(store)
    await simulation.start()
    policy = scan_policy(ports="1-60000", max_rate=max_rate)
    await store.jobs.insert([replace(scan_job(cidr="127.0.0.0/16", policy=policy, made=window), outbox=())])
    await simulation.only.reconciler.reconcile([1])
    job = (await store.jobs.get([1]))[1]
    assert (job.status, job.made, await store.chunks.count(1)) == (JobStatus.PENDING, window, window)


class ReadingChunks(MemoryChunks):
    """Counts the chunks that are read, and fails a save once it is broken.

    Attributes:
        read: number of chunks.
        broken: whether the next save fails.
    """

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.read = 0
        self.broken = False

    async def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        async for each in super().of_job(job_id, first, end):
            self.read += 1
            yield each

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        losers = await super().save(chunks)
        if self.broken:
            self.broken = False
            raise DependencyError("the process dies after the save")
        return losers


async def cancelled() -> tuple[Simulation, ReadingChunks, list[ScanChunk]]:
    """A simulation with a cancelled job of 256 chunks, two of which were being scanned."""
    store = MemoryStore()
    store.chunks = chunks = ReadingChunks(store.data)
    simulation = Simulation(store)
    simulation.worker.slots = 2
    simulation.worker.hold = True
    await simulation.start_scan("127.9.0.0/16", policy=scan_policy(ports="1-60000"))
    for task in simulation.worker.tasks:
        await simulation.worker.claim(task)
    await simulation.settle()
    await simulation.cancel(1)
    await simulation.settle()
    chunks.read = 0
    return simulation, chunks, simulation.worker.tasks


async def test_late_reports_without_news_read_no_chunk_and_leave_the_job_settled() -> None:
    """Reports of a cancelled job's workers whose maps are as stored, and repeated ones, do not count the job again."""
    simulation, chunks, tasks = await cancelled()
    for _ in range(2):
        for task in tasks:
            await simulation.worker.release(task)
            await simulation.worker.progress(task, task.outcomes)
            await simulation.deliver()
            assert (await simulation.store.jobs.get([1]))[1].settled
    assert chunks.read == 0


async def test_late_report_with_news_counts_the_job_again_once() -> None:
    """A changed map of a cancelled chunk reads each chunk of the job once; the repeated report reads none."""
    simulation, chunks, tasks = await cancelled()
    news = "a" + tasks[0].outcomes[1:]
    for expected in (plan.WINDOW, 0):
        chunks.read = 0
        await simulation.worker.release(tasks[0], news)
        await simulation.settle()
        job = (await simulation.store.jobs.get([1]))[1]
        assert (job.settled, job.totals.addresses) == (True, {"answered": 1})
        assert chunks.read <= expected + 1


async def test_late_report_counts_although_the_replica_dies_after_the_save() -> None:
    """If a replica dies between the save of a late map and the count, the sweep counts the job again."""
    simulation, chunks, tasks = await cancelled()
    chunks.broken = True
    await simulation.worker.release(tasks[0], "a" + tasks[0].outcomes[1:])
    with pytest.raises(DependencyError):
        await simulation.deliver()
    await simulation.restart()
    await simulation.wait(2)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.settled, job.totals.addresses) == (True, {"answered": 1})


def _held(chunk: Chunk) -> Chunk:
    return replace(chunk, state=ChunkState.RUNNING, attempt=1, worker_id="w-1")


@pytest.mark.parametrize("states", [[ChunkState.STORED] * 3 + [ChunkState.QUEUED], [ChunkState.STORED] * 4])
async def test_chunks_that_a_replica_created_before_it_stopped_are_counted_after_a_cancel(
    simulation: Simulation, states: list[ChunkState]
) -> None:
    """A cancelled job whose last chunks are not counted as created settles, and its ledger shows all stored results."""
    job = replace(scan_job(9, cidr="127.9.8.0/27", chunk_addresses=4, chunk_count=8, made=2), status=JobStatus.RUNNING)
    await simulation.store.jobs.insert([replace(job, outbox=())])
    created = zip(plan.chunks(job, 0, 4), states, strict=True)
    stored = [
        replace(each, state=state, outcomes="ssss" if state is ChunkState.STORED else each.outcomes)
        for each, state in created
    ]
    await simulation.store.chunks.insert(stored)
    await simulation.cancel(9)
    await simulation.wait(2)
    after = (await simulation.store.jobs.get([9]))[9]
    assert (after.status, after.settled, after.totals.done, after.made) == (JobStatus.CANCELLED, True, 4, 4)
    assert Tally(after).counts["silent"] == 4 * 2 * states.count(ChunkState.STORED)


async def test_missing_chunks_of_a_cancelled_job_are_created_as_cancelled(simulation: Simulation) -> None:
    """The dispatcher finds no queued chunk of a job that has ended."""
    await simulation.store.jobs.insert([change(scan_job(9, chunk_count=2, made=2), JobTrigger.CANCEL, THEN)])
    await simulation.only.reconciler.reconcile([9])
    assert [each.state async for each in simulation.store.chunks.of_job(9)] == [ChunkState.CANCELLED] * 2
    simulation.now += 11.0
    await simulation.only.sweeper.sweep()
    assert (await simulation.store.jobs.get([9]))[9].settled
