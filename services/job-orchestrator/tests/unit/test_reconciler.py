"""Many jobs of one user do not delay those of others, nor the stops of cancelled ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator_testing import MemoryStore, World, scan_policy
from job_orchestrator_testing.repository.chunks import MemoryChunks
from job_orchestrator_testing.repository.data import Data
from job_orchestrator_testing.repository.jobs import MemoryJobs
from scanfleet.contracts.messages import Message, ScanChunk, StopChunk
from scanfleet.contracts.messages.topics import Topic
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


class LargeWorld(World):
    """A world in which user 7 submits many jobs, each of more chunks than fit into its window."""

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
    world = LargeWorld()
    await world.start()
    await world.submit_many()
    step = asyncio.create_task(world.only.reconciler.work())
    await asyncio.sleep(0)
    await world.submit("127.99.0.1/32", user_id=8)
    await world.deliver()
    await step
    await world.settle()
    assert world.chunks.inserted.index(8) <= 2 * (PAGE + plan.WINDOW)
    assert world.chunks.inserted.count(7) == LARGE * plan.WINDOW


async def test_jobs_are_saved_with_each_page_of_their_chunks() -> None:
    """The first jobs of a large step are saved before the chunks of the others are created, in the work loop and the sweep."""
    for sweep in (False, True):
        world = LargeWorld()
        await world.start()
        ids = await world.submit_many()
        world.jobs.saves.append(len(world.chunks.inserted))  # chunks that are created with their jobs
        await (world.only.reconciler.reconcile(ids) if sweep else world.settle())
        steps = [after - before for before, after in pairwise((0, *world.jobs.saves, len(world.chunks.inserted)))]
        assert max(steps) <= PAGE + plan.WINDOW


async def test_cancel_of_many_jobs_stops_their_scans_before_queued_chunks_are_cancelled() -> None:
    """The stops of many cancelled jobs precede the cancels of their queued chunks, in the work loop and in one step."""
    for one_step in (False, True):
        world = LargeWorld()
        await world.start()
        ids = await world.submit_many()
        await world.settle()
        for job_id in ids[-2:]:
            (chunk,) = (await world.store.chunks.get([f"{job_id}-0"])).values()
            await world.store.chunks.save([_held(chunk)])
        world.chunks.saved = 0
        if one_step:
            for job_id in ids:
                await world.cancel(job_id)
            await world.deliver()
        else:
            await world.only.commands.cancel(ids)
        await world.settle()
        assert [saved <= 2 for saved in world.publisher.stops] == [True, True]
        assert world.chunks.saved == LARGE * plan.WINDOW


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


async def cancelled() -> tuple[World, ReadingChunks, list[ScanChunk]]:
    """A world with a cancelled job of 256 chunks, two of which were being scanned."""
    store = MemoryStore()
    store.chunks = chunks = ReadingChunks(store.data)
    world = World(store)
    world.worker.slots = 2
    world.worker.hold = True
    await world.start()
    await world.worker.announce()
    await world.submit("127.9.0.0/16", policy=scan_policy(ports="1-60000"))
    await world.settle()
    for task in world.worker.tasks:
        await world.worker.claim(task)
    await world.settle()
    await world.cancel(1)
    await world.settle()
    chunks.read = 0
    return world, chunks, world.worker.tasks


async def test_late_reports_without_news_read_no_chunk_and_leave_the_job_settled() -> None:
    """Reports of a cancelled job's workers whose maps are as stored, and repeated ones, do not count the job again."""
    world, chunks, tasks = await cancelled()
    for _ in range(2):
        for task in tasks:
            await world.worker.release(task)
            await world.worker.progress(task, task.outcomes)
            await world.deliver()
            assert (await world.store.jobs.get([1]))[1].settled
    assert chunks.read == 0


async def test_late_report_with_news_counts_the_job_again_once() -> None:
    """A changed map of a cancelled chunk reads each chunk of the job once; the repeated report reads none."""
    world, chunks, tasks = await cancelled()
    news = "a" + tasks[0].outcomes[1:]
    for expected in (plan.WINDOW, 0):
        chunks.read = 0
        await world.worker.release(tasks[0], news)
        await world.settle()
        job = (await world.store.jobs.get([1]))[1]
        assert (job.settled, job.totals.addresses) == (True, {"answered": 1})
        assert chunks.read <= expected + 1


async def test_late_report_counts_although_the_replica_dies_after_the_save() -> None:
    """If a replica dies between the save of a late map and the count, the sweep counts the job again."""
    world, chunks, tasks = await cancelled()
    chunks.broken = True
    await world.worker.release(tasks[0], "a" + tasks[0].outcomes[1:])
    with pytest.raises(DependencyError):
        await world.deliver()
    await world.restart()
    await world.wait(2)
    job = (await world.store.jobs.get([1]))[1]
    assert (job.settled, job.totals.addresses) == (True, {"answered": 1})


def _held(chunk: Chunk) -> Chunk:
    return replace(chunk, state=ChunkState.RUNNING, attempt=1, worker_id="w-1")
