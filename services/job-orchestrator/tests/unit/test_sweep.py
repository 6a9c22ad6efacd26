"""Repairs, and jobs that need many steps."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from job_orchestrator.domain import plan
from job_orchestrator.domain.census import Standing
from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.fairness import Credit, Held
from job_orchestrator.domain.job import JobTrigger, ScanJob, change, restored_from_backup
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.handlers.jobs import sweeper
from job_orchestrator.metrics import SKIPPED_JOBS
from job_orchestrator_testing import MemoryStore, Simulation, chunk, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import Data, MemoryChunks, MemoryDispatch, MemoryJobs
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    ChunkScanned,
    ChunkStored,
    JobCancelled,
    JobCompleted,
    JobCreated,
    JobStarted,
    JobStatus,
    Message,
    Run,
)
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_EVENTS, SCAN_RESULTS, SCAN_STORED, SCAN_TASKS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.best_effort import TIMEOUT_SECONDS
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet_testing.chunk_grants import grants
from scanfleet_testing.waiting import until


async def test_old_event_in_an_outbox_is_published(simulation: Simulation) -> None:
    """Events that are in an outbox for five seconds are published in order by any replica, and removed."""
    job = change(scan_job(9), JobTrigger.CANCEL, THEN)
    await simulation.store.jobs.insert([job])
    await simulation.only.sweeper.sweep()
    assert [event.seq for event in simulation.events(9)] == [1, 2]
    await simulation.only.outbox.empty()
    assert (await simulation.store.jobs.get([9]))[9].outbox == ()
    await simulation.only.sweeper.sweep()
    assert len(simulation.events(9)) == 2


async def test_partition_without_a_leader_ends_no_sweep(simulation: Simulation) -> None:
    """Events that cannot be published stop neither the other repairs nor the events of other partitions, sent once each."""
    simulation.bus.broker.leaderless = {(SCAN_EVENTS.name, SCAN_EVENTS.partition_of("1"))}
    await simulation.store.jobs.insert([scan_job(1), replace(scan_job(2, made=1), status=JobStatus.RUNNING)])
    await simulation.store.chunks.insert([chunk(id="2-0", job_id=2, state=ChunkState.STORED, outcomes="asdt")])
    for _ in range(30):
        simulation.now += 1.0
        await simulation.only.sweeper.sweep()
        await simulation.only.outbox.empty()
    assert (await simulation.store.jobs.get([2]))[2].status is JobStatus.COMPLETED
    assert [event.seq for event in simulation.events(2)] == [1, 2]
    simulation.bus.broker.leaderless.clear()
    await simulation.only.sweeper.sweep()
    assert [event.seq for event in simulation.events(1)] == [1]


async def test_old_event_is_not_repeated_by_a_sweep_while_its_acknowledgement_is_slow(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that the broker acknowledges after longer than a command may wait is published once."""
    publish = simulation.bus.publish

    async def slowly(topic: Topic, messages: Iterable[Message]) -> None:
        await publish(topic, messages)
        await asyncio.sleep(1.2 * TIMEOUT_SECONDS)

    await simulation.only.sweeper.sweep()  # reconciles all jobs, and again in ten seconds
    await simulation.store.jobs.insert([scan_job(9)])
    monkeypatch.setattr(simulation.bus, "publish", slowly)
    for _ in range(2):
        await simulation.only.sweeper.sweep()
        await simulation.only.outbox.empty()
    assert [event.seq for event in simulation.events(9)] == [1]


async def test_partition_without_a_leader_fills_no_page_of_old_events(simulation: Simulation) -> None:
    """The event of a job is published although more than a page of older ones is for a partition without a leader."""
    dead = SCAN_EVENTS.partition_of("1")
    simulation.bus.broker.leaderless = {(SCAN_EVENTS.name, dead)}
    of_dead = [id_ for id_ in range(1, 20_000) if SCAN_EVENTS.partition_of(str(id_)) == dead][:501]
    healthy = of_dead[-1] + 1
    assert SCAN_EVENTS.partition_of(str(healthy)) != dead
    await simulation.only.sweeper.sweep()  # reconciles all jobs, and again in ten seconds
    await simulation.store.jobs.insert([scan_job(id_) for id_ in (*of_dead, healthy)])
    await simulation.only.sweeper.sweep()
    assert [event.seq for event in simulation.events(healthy)] == [1]


async def test_request_to_a_partition_without_a_leader_repeats_no_other(simulation: Simulation) -> None:
    """result-store is asked once for a chunk, although another request of the page cannot be published."""
    scanned = [
        chunk(id=f"{n}-0", job_id=n, partition=n, state=ChunkState.SCANNED, outcomes="asdt", attempt=1, worker_id="w")
        for n in (1, 2)
    ]
    await simulation.store.chunks.insert(scanned)
    simulation.bus.broker.leaderless = {(SCAN_RESULTS.name, SCAN_RESULTS.partition_of("1"))}
    for _ in range(3):
        await simulation.only.sweeper.sweep()
    assert [asked.chunk_id for asked in simulation.bus.messages(SCAN_RESULTS)] == ["2-0"]
    assert {each.asked for each in (await simulation.store.chunks.get(["1-0", "2-0"])).values()} == {1}


async def test_failed_part_of_a_sweep_does_not_stop_the_others() -> None:
    """A census that takes too long fails its sweep, which publishes old events and repairs jobs all the same."""
    store = MemoryStore()
    store.chunks = UncountedChunks(store.data)
    simulation = Simulation(store)
    await simulation.start()
    await store.jobs.insert([replace(scan_job(9, made=1), status=JobStatus.RUNNING)])
    await store.chunks.insert([chunk(id="9-0", job_id=9, state=ChunkState.STORED, outcomes="asdt")])
    with pytest.raises(DependencyError):
        await simulation.only.sweeper.sweep()
    assert [event.seq for event in simulation.events(9)] == [1, 2]


class UncountedChunks(MemoryChunks):
    """Cannot count the chunks of all jobs in time."""

    async def census(self) -> Counter[ChunkState]:
        raise DependencyError("the census took too long")


async def test_fresh_event_is_left_to_its_replica(simulation: Simulation) -> None:
    """An event younger than five seconds is not published by the sweep: it would be published twice."""
    await simulation.only.sweeper.sweep()
    await simulation.store.jobs.insert([scan_job(9, created_at=utc_now())])
    await simulation.only.sweeper.sweep()
    assert simulation.events(9) == []


async def test_sweep_creates_missing_chunks_of_a_pending_job(simulation: Simulation) -> None:
    """The sweep creates the chunks of a job whose replica stopped between the inserts of the job and of its chunks."""
    await simulation.submit("127.9.8.0/30")
    await simulation.deliver()
    chunks = [chunk.id async for chunk in simulation.store.chunks.of_job(1)]
    assert await simulation.store.chunks.delete(1, 10) == len(chunks) > 0
    await simulation.only.sweeper.sweep()
    assert [chunk.id async for chunk in simulation.store.chunks.of_job(1)] == chunks
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.PENDING
    await simulation.wait(2)
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED


async def test_overdue_scanned_chunk_is_requested_again(simulation: Simulation) -> None:
    """The ChunkScanned of a chunk without a verdict is sent again when due, by the owner of its partition."""
    scanned = chunk(
        id="9-0",
        job_id=9,
        partition=3,
        state=ChunkState.SCANNED,
        outcomes="asdt",
        attempt=3,
        worker_id="w-7",
        technique="syn",
        ask_at=utc_now() - timedelta(seconds=1),
    )
    later = replace(scanned, id="9-1", index=1, ask_at=utc_now() + timedelta(seconds=240))
    await simulation.store.chunks.insert([scanned, later])
    await simulation.only.sweeper.sweep()
    await simulation.only.sweeper.sweep()
    (asked,) = simulation.bus.messages(SCAN_RESULTS)
    assert isinstance(asked, ChunkScanned)
    assert grants().fault(asked) == ""
    assert asked.model_copy(update={"grant": None}) == ChunkScanned(
        job_id=9,
        chunk_id="9-0",
        attempt=3,
        worker_id="w-7",
        first_address="127.9.8.0",
        outcomes="asdt",
        slot_seconds=0.0,
        technique="syn",
    )


class CountedJobs(MemoryJobs):
    """Counts how often each job is read."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.read: Counter[int] = Counter()

    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]:
        self.read.update(ids)
        return await super().get(ids)


class CountedHeld(MemoryDispatch):
    """Counts the held chunks that it reads again."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.read: Counter[str] = Counter()

    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        held = await super().held(partitions, known)
        same = {each.token for each in (known or {}).values()}
        self.read.update(each.token.chunk_id for each in held if each.token not in same)
        return held


class WaitingJobs(Simulation):
    """Jobs of one queued chunk each, which a sweep has checked."""

    def __init__(self, count: int) -> None:
        store = MemoryStore()
        self.counted = store.jobs = CountedJobs(store.data)
        self.held = store.dispatch = CountedHeld(store.data)
        super().__init__(store)
        self.workers = []
        self.ids = range(1, count + 1)

    async def begin(self, reason: str = "no_worker") -> None:
        await self.start()
        jobs = [replace(scan_job(id_, made=1), waiting=reason, waiting_since=THEN) for id_ in self.ids]
        await self.store.jobs.insert([replace(job, outbox=()) for job in jobs])
        await self.store.chunks.insert(
            [chunk(id=f"{job.id}-0", job_id=job.id, partition=job.partition) for job in jobs]
        )
        assert await self.passes(1) == dict.fromkeys(self.ids, 1)

    async def passes(self, number: int) -> Counter[int]:
        """Sweep so many times; return how often each job was read."""
        self.counted.read.clear()
        for _ in range(number):
            self.now += 11
            await self.only.sweeper.sweep()
        return self.counted.read

    async def change(self, id_: str, **fields: Any) -> None:
        """Change a chunk as another replica does."""
        [before] = (await self.store.chunks.get([id_])).values()
        await self.store.chunks.save([replace(before, **fields)])

    async def status(self, job_id: int) -> JobStatus:
        return (await self.store.jobs.get([job_id]))[job_id].status


async def test_sweep_reads_an_unchanged_waiting_job_once_a_minute() -> None:
    """A job that waits is read in one of six passes, and in this one its chunks are checked too."""
    waiting = WaitingJobs(12)
    await waiting.begin()
    for _ in range(2):
        assert await waiting.passes(6) == dict.fromkeys(waiting.ids, 1)
    await waiting.change("9-0", state=ChunkState.STORED, outcomes="asdt")
    await waiting.passes(6)
    assert await waiting.status(9) is JobStatus.COMPLETED


async def test_sweep_reads_changed_waiting_jobs_in_the_next_pass() -> None:
    """A job with another state or a held chunk is read in the next pass."""
    waiting = WaitingJobs(12)
    await waiting.begin()
    jobs = await waiting.store.jobs.get([4, 5])
    await waiting.store.jobs.save([replace(jobs[4], waiting="window"), change(jobs[5], JobTrigger.CANCEL, THEN)])
    await waiting.change("7-0", state=ChunkState.RUNNING, attempt=1, worker_id="w-1")
    assert (await waiting.passes(1)).keys() >= {4, 5, 7}
    assert [await waiting.status(id_) for id_ in (5, 7)] == [JobStatus.CANCELLED, JobStatus.RUNNING]


async def test_sweep_keeps_a_limited_number_of_waiting_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting jobs beyond the number that is kept are read in each pass."""
    monkeypatch.setattr(sweeper, "_MAX_WAITING", 6)
    waiting = WaitingJobs(12)
    await waiting.begin()
    read = await waiting.passes(6)
    assert [read[id_] for id_ in waiting.ids] == [1] * 6 + [6] * 6


@pytest.mark.parametrize("failing", ["chunks", "jobs"])
async def test_sweep_reads_a_job_whose_chunk_was_changed_by_a_failed_step_in_the_next_pass(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails after it has stored a change of a chunk, or that of the job after it, is repaired by the next pass."""
    waiting = WaitingJobs(1)
    await waiting.begin()
    repository = getattr(waiting.store, failing)
    save = repository.save

    async def fail(changed: Sequence[Any]) -> set[int]:
        if failing == "chunks":
            await save(changed)
        raise DependencyError("no answer")

    await waiting.change("1-0", state=ChunkState.SCANNED, outcomes="....", attempt=1, worker_id="w-1")
    await waiting.bus.publish(SCAN_STORED, [ChunkStored(job_id=1, chunk_id="1-0", outcomes="asdt")])
    with monkeypatch.context() as patch:
        patch.setattr(repository, "save", fail)
        with pytest.raises(DependencyError):
            await waiting.hand(SCAN_STORED, waiting.take(SCAN_STORED))
    await waiting.passes(1)
    assert await waiting.status(1) is JobStatus.COMPLETED


async def test_repeated_verdict_ends_a_job_that_its_first_replica_did_not_save() -> None:
    """A verdict whose replica stopped after the save of the chunk ends the job when another replica reads it, without a sweep."""
    waiting = WaitingJobs(1)
    await waiting.begin()
    await waiting.change("1-0", state=ChunkState.STORED, outcomes="asdt")
    await waiting.bus.publish(SCAN_STORED, [ChunkStored(job_id=1, chunk_id="1-0", outcomes="asdt")])
    await waiting.deliver()
    assert await waiting.status(1) is JobStatus.COMPLETED


async def test_sweep_reads_all_jobs_of_newly_assigned_partitions() -> None:
    """After a rebalance a replica checks all jobs: another one may have changed them meanwhile."""
    waiting = WaitingJobs(12)
    await waiting.begin()
    await waiting.start()
    assert await waiting.passes(1) == dict.fromkeys(waiting.ids, 1)


async def test_sweep_publishes_why_an_unread_job_waits() -> None:
    """A job that has been saved since it was read, without a change of its state, gets its new reason in the next pass."""
    waiting = WaitingJobs(6)
    await waiting.begin()
    await waiting.store.jobs.save(list((await waiting.store.jobs.get(waiting.ids)).values()))
    await waiting.store.dispatch.seen_workers([Credit("w-1", "w", 4, raw=True, partition=0)])
    await waiting.passes(1)
    assert {job.waiting for job in (await waiting.store.jobs.get(waiting.ids)).values()} == {""}


async def test_sweep_reads_a_new_waiting_job_once() -> None:
    """The pass that checks a new job publishes why it waits without reading it again; the next passes read it in turn."""
    waiting = WaitingJobs(6)
    await waiting.begin("")
    assert await waiting.passes(6) == dict.fromkeys(waiting.ids, 1)
    assert {job.waiting for job in (await waiting.store.jobs.get(waiting.ids)).values()} == {"no_worker"}


async def test_lost_request_to_result_store_is_repeated(simulation: Simulation) -> None:
    """A job whose ChunkScanned got lost completes after it was asked for again."""
    await simulation.store.jobs.insert([replace(scan_job(9, made=1), status=JobStatus.RUNNING, outbox=())])
    await simulation.store.chunks.insert(
        [chunk(id="9-0", job_id=9, state=ChunkState.SCANNED, outcomes="asdt", attempt=1, worker_id="w")]
    )
    await simulation.wait(1)
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.COMPLETED


async def test_job_without_its_last_step_is_completed(simulation: Simulation) -> None:
    """A job whose replica died before the last step is ended by the next pass."""
    await simulation.store.jobs.insert([replace(scan_job(9, made=1), status=JobStatus.RUNNING, outbox=())])
    await simulation.store.chunks.insert([chunk(id="9-0", job_id=9, state=ChunkState.STORED, outcomes="asdt")])
    await simulation.only.sweeper.sweep()
    job = (await simulation.store.jobs.get([9]))[9]
    assert (job.status, job.progress, job.machines_found, job.settled) == (JobStatus.COMPLETED, 100, 1, True)


async def test_job_without_chunks_is_planned(simulation: Simulation) -> None:
    """A job of a replica that died immediately after accepting it is planned and scanned by another."""
    await simulation.store.jobs.insert([scan_job(9, cidr="127.9.8.0/24")])
    await simulation.wait(1)
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.COMPLETED


async def test_open_chunks_of_an_ended_job_are_cancelled(simulation: Simulation) -> None:
    """A cancelled job that was left with open chunks, settled or not, is cleaned up, and their holders are stopped."""
    ended = change(scan_job(9, chunk_count=2, made=2), JobTrigger.CANCEL, THEN)
    await simulation.store.jobs.insert([ended])
    await simulation.store.chunks.insert(
        [
            chunk(id="9-0", job_id=9, state=ChunkState.RUNNING, worker_id="w-1", attempt=1, partition=3),
            chunk(id="9-1", job_id=9, index=1),
        ],
    )
    await simulation.only.sweeper.sweep()
    await simulation.settle()
    assert [each.state async for each in simulation.store.chunks.of_job(9)] == [ChunkState.CANCELLED] * 2
    assert (await simulation.store.jobs.get([9]))[9].settled
    assert [stop.chunk_id for stop in simulation.worker.stops] == ["9-0"]


async def test_unfinished_jobs_are_looked_at_every_ten_seconds(simulation: Simulation) -> None:
    """Between two looks at all unfinished jobs lie ten seconds, whatever else is swept."""
    await simulation.only.sweeper.sweep()
    await simulation.store.jobs.insert([replace(scan_job(9, made=1), status=JobStatus.RUNNING, outbox=())])
    await simulation.store.chunks.insert([chunk(id="9-0", job_id=9, state=ChunkState.STORED, outcomes="asdt")])
    simulation.now += 9.0
    await simulation.only.sweeper.sweep()
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.RUNNING
    simulation.now += 2.0
    await simulation.only.sweeper.sweep()
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.COMPLETED


@pytest.mark.proves("F34", "G20")
async def test_large_job_is_created_in_a_window(simulation: Simulation) -> None:
    """Of a job of 65,536 chunks at most a window is created ahead of dispatch, and all are scanned and counted once."""
    simulation.worker.hold = True
    large = await simulation.submit(
        "127.8.0.0/16", policy=fill_in(Preset.FULL, {"service_detection": False, "scripts": ()})
    )
    small = await simulation.submit("127.9.8.0/30", user_id=8)
    await simulation.settle()
    (large_job,), (small_job,) = simulation.accepted(large), simulation.accepted(small)
    job = (await simulation.store.jobs.get([large_job.id]))[large_job.id]
    assert job.plan.chunk_count > 65_000
    assert job.made == plan.WINDOW
    assert (await simulation.store.jobs.get([small_job.id]))[small_job.id].made == 1
    done = 0
    while done < 2_000:
        for task in simulation.worker.tasks[done:]:
            done += 1
            await simulation.worker.claim(task)
            await simulation.worker.scanned(task)
        await simulation.worker.announce()
        await simulation.settle()
    job = (await simulation.store.jobs.get([large_job.id]))[large_job.id]
    standing = (await simulation.store.chunks.standings([job.id]))[job.id]
    assert standing.open <= plan.WINDOW
    assert job.totals.done == standing.lowest
    assert (job.plan.chunk_addresses, job.plan.chunk_ports) == (4, 8_192)
    assert sum(job.totals.probes.values()) == 4 * 8_192 * job.totals.done


async def test_cancel_of_a_large_job_creates_no_further_chunks(simulation: Simulation) -> None:
    """A cancel of a job of thousands of chunks cancels the existing ones, and no others are created afterwards."""
    simulation.workers = []
    await simulation.submit("127.8.0.0/16", policy=scan_policy(ports="1-5000"))
    await simulation.settle()
    await simulation.cancel(1)
    await simulation.settle()
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.settled) == (JobStatus.CANCELLED, True)
    assert [each.state async for each in simulation.store.chunks.of_job(1)] == [ChunkState.CANCELLED] * plan.WINDOW
    assert Tally(job).counts["cancelled"] == job.plan.addresses * job.plan.ports


async def test_three_replicas_create_each_chunk_once() -> None:
    """Each chunk of a job is inserted by the replica that works on the job, and by no other."""
    inserted: Counter[str] = Counter()

    class Counting(MemoryChunks):
        async def insert(self, chunks: Sequence[Chunk]) -> None:
            inserted.update(each.id for each in chunks)
            await super().insert(chunks)

    store = MemoryStore()
    store.chunks = Counting(store.data)
    simulation = Simulation(store, replicas=3)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.submit("127.9.0.0/20", policy=scan_policy(ports="1-1000"))
    await simulation.wait(40)
    job = (await simulation.store.jobs.get([1]))[1]
    assert job.status is JobStatus.COMPLETED
    assert inserted.total() == len(inserted) == job.plan.chunk_count


@pytest.mark.proves("F27", "G17")
async def test_faulty_job_is_skipped(simulation: Simulation) -> None:
    """A job that raises an unexpected error is logged, counted and skipped until it changes; the others end."""
    await simulation.store.jobs.insert([scan_job(8, cidr="127.9.8.0/30", chunk_addresses=0), scan_job(9)])
    before = SKIPPED_JOBS._value.get()
    with capture_logs() as logs:
        await simulation.wait(2)
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.COMPLETED
    assert (await simulation.store.jobs.get([8]))[8].status is JobStatus.PENDING
    skipped = [entry["job_id"] for entry in logs if entry["event"] == "job_skipped"]
    assert set(skipped) == {8}
    assert SKIPPED_JOBS._value.get() - before == len(skipped)


@pytest.mark.proves("F27", "G17")
async def test_sweep_skips_a_job_without_a_known_waiting_reason(simulation: Simulation) -> None:
    """An unexpected error in finding out why a job waits stops neither the sweep nor the other jobs."""
    running = replace(scan_job(8, made=1, chunk_addresses=0), status=JobStatus.RUNNING, outbox=())
    await simulation.store.jobs.insert([running, scan_job(9)])
    await simulation.store.chunks.insert([chunk(id="8-0", job_id=8, needs_raw=True)])
    await simulation.wait(12)
    assert (await simulation.store.jobs.get([9]))[9].status is JobStatus.COMPLETED


@pytest.mark.proves("F27", "G17")
async def test_job_whose_waiting_event_is_invalid_is_logged_once_until_it_changes() -> None:
    """Two minutes of passes log and count it once, and once more after a change of the job."""
    waiting = WaitingJobs(2)
    await waiting.begin()
    await waiting.store.dispatch.seen_workers([Credit("w-1", "w-1", 4, raw=True, partition=1)])
    job = (await waiting.store.jobs.get([1]))[1]
    await waiting.store.jobs.save([replace(job, machines_found=-1)])
    before = SKIPPED_JOBS._value.get()
    for times in (1, 2):
        with capture_logs() as logs:
            await waiting.passes(12)
        assert [entry["job_id"] for entry in logs if entry["event"] == "job_skipped"] == [1]
        assert SKIPPED_JOBS._value.get() - before == times
        job = (await waiting.store.jobs.get([1]))[1]
        await waiting.store.jobs.save([replace(job, machines_found=-2)])
    assert (await waiting.store.jobs.get([2]))[2].waiting == ""


async def test_sweep_reads_changed_held_chunks_only() -> None:
    """A pass reads those of other attempts than the last one, and reports why the job of one that was requeued waits."""
    waiting = WaitingJobs(4)
    await waiting.begin()
    for id_ in (1, 2, 3):
        await waiting.change(f"{id_}-0", state=ChunkState.RUNNING, attempt=1, worker_id="w-1")
    await waiting.passes(1)
    assert waiting.held.read == {"1-0": 1, "2-0": 1, "3-0": 1}
    waiting.held.read.clear()
    await waiting.change("2-0", attempt=2, worker_id="w-2")
    await waiting.change("3-0", state=ChunkState.QUEUED)
    await waiting.passes(1)
    assert waiting.held.read == {"2-0": 1}
    jobs = await waiting.store.jobs.get([2, 3])
    assert [jobs[id_].waiting for id_ in (2, 3)] == ["", "no_worker"]


@pytest.mark.proves("F27", "G17")
async def test_job_whose_events_are_invalid_is_skipped(simulation: Simulation) -> None:
    """A damaged count of machines stops neither the sweep nor the events of other jobs, nor a give-up of the dispatcher."""
    simulation.workers = []
    damaged = replace(scan_job(8), machines_found=-1, outbox=())
    await simulation.store.jobs.insert([damaged, replace(scan_job(9), outbox=())])
    simulation.now += 60.0
    await simulation.only.sweeper.sweep()
    assert (await simulation.store.jobs.get([9]))[9].waiting == "no_worker"
    await simulation.only.reconciler.give_up(8, "refused")
    assert (await simulation.store.jobs.get([8]))[8].status is JobStatus.PENDING


async def test_cancel_of_a_large_job_stops_running_chunks_first(simulation: Simulation) -> None:
    """A cancel of a job with thousands of queued chunks stops the running ones first."""
    await simulation.store.jobs.insert(
        [replace(scan_job(9, chunk_count=5_001, made=5_001), status=JobStatus.RUNNING, outbox=())]
    )
    await simulation.store.chunks.insert([chunk(id=f"9-{n}", job_id=9, index=n) for n in range(5_000)])
    held = chunk(id="9-5000", job_id=9, index=5_000, state=ChunkState.RUNNING, worker_id="w-1", attempt=1)
    await simulation.store.chunks.insert([held])
    await simulation.cancel(9)
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert len(simulation.bus.messages(SCAN_TASKS)) == 1
    assert (await simulation.store.chunks.get([held.id]))[held.id].state is ChunkState.CANCELLED


async def test_failing_repairs_leave_the_api_ready() -> None:
    """While repairs fail, as with a census that takes too long, no replica becomes unready: they are repeated."""
    store = MemoryStore()
    simulation = Simulation(store)
    await simulation.start()
    await simulation.submit()
    await simulation.deliver()
    store.data.unavailable = True
    simulation.only.reconciler.begin([scan_job(1)])
    simulation.only.reporter.note([1])
    loops = (*simulation.only.request_loops, *simulation.only.job_loops)
    repairs = [loop for loop in loops if loop is not simulation.only.dispatcher.loop]
    with capture_logs() as logs:
        for loop in repairs:
            await loop.start()
        await until(lambda: {each.get("loop") for each in logs} >= {"jobs", "outbox", "progress", "sweep"})
    assert [(loop.alive, loop.ready) for loop in repairs] == [(True, True)] * len(repairs)
    for loop in repairs:
        await loop.stop()


class ForgetfulChunks(MemoryChunks):
    """Loses one insert of chunks: it fails, and nothing of it is stored."""

    def __init__(self, data: Data, lost: int) -> None:
        super().__init__(data)
        self.left = lost

    async def insert(self, chunks: Sequence[Chunk]) -> None:
        self.left -= 1
        if self.left == 0:
            raise DependencyError("the database is unavailable")
        await super().insert(chunks)


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_chunks_are_created_after_a_failed_insert(lost: int) -> None:
    """After failed inserts no chunk is missing."""
    store = MemoryStore()
    store.chunks = ForgetfulChunks(store.data, lost)
    simulation = Simulation(store)
    simulation.worker.slots = 100
    await simulation.start()
    await simulation.worker.announce()
    await simulation.submit("127.9.0.0/20", policy=scan_policy(ports="1-5000"))
    for _ in range(100):
        try:
            await simulation.wait(1)
        except DependencyError:
            continue
        if (await store.jobs.get([1]))[1].final:
            break
    job = (await store.jobs.get([1]))[1]
    assert (job.status, job.made) == (JobStatus.COMPLETED, job.plan.chunk_count)


class UnreadableChunks(MemoryChunks):
    """Cannot read the chunk 9-0, and counts the rounds in which jobs are reconciled."""

    rounds = 0

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]:
        return await super().get([id_ for id_ in ids if id_ != "9-0"])

    async def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        async for each in super().of_job(job_id, first, end):
            if each.id != "9-0":
                yield each

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        self.rounds += bool(job_ids)
        return await super().standings(job_ids)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_work_leaves_a_job_with_an_unreadable_chunk_to_the_sweep(*, cancelled: bool) -> None:
    """A job that makes no progress is not reconciled again at once, whether its chunk has ended or is to be cancelled."""
    store = MemoryStore()
    store.chunks = unreadable = UnreadableChunks(store.data)
    simulation = Simulation(store)
    await simulation.start()
    job = replace(scan_job(9, chunk_count=2, made=2), status=JobStatus.RUNNING, outbox=())
    await store.jobs.insert([change(job, JobTrigger.CANCEL, THEN) if cancelled else job])
    state = ChunkState.QUEUED if cancelled else ChunkState.STORED
    await store.chunks.insert([chunk(id="9-0", job_id=9, state=state), chunk(id="9-1", job_id=9, index=1, state=state)])
    await simulation.only.reconciler.reconcile([9])
    for _ in range(3):
        await simulation.only.reconciler.work()
    rounds = unreadable.rounds
    for _ in range(5):
        await simulation.only.reconciler.work()
    assert unreadable.rounds == rounds


class RejectingChunks(MemoryChunks):
    """Rejects every insert with a chunk of job 8, as the driver does with a number that BSON cannot hold."""

    async def insert(self, chunks: Sequence[Chunk]) -> None:
        if any(each.job_id == 8 for each in chunks):
            raise OverflowError("MongoDB can only handle up to 8-byte ints")
        await super().insert(chunks)


async def test_job_whose_chunks_cannot_be_stored_is_isolated() -> None:
    """Of jobs that are processed together, only the one that causes the error does not change, and all are returned as stored."""
    store = MemoryStore()
    store.chunks = RejectingChunks(store.data)
    simulation = Simulation(store)
    await simulation.start()
    await store.jobs.insert([replace(scan_job(id_, outbox=()), made=0) for id_ in (7, 8, 9)])
    updated = await simulation.only.reconciler.reconcile([7, 8, 9])
    jobs = await store.jobs.get([7, 8, 9])
    assert updated == jobs
    assert [jobs[id_].made > 0 for id_ in (7, 8, 9)] == [True, False, True]
    assert {each.job_id for each in (await store.chunks.get(["7-0", "8-0", "9-0"])).values()} == {7, 9}


async def test_job_with_all_chunks_stored_starts_and_ends_in_one_save(simulation: Simulation) -> None:
    """A job whose chunks are all stored starts and ends in one save, and publishes both events in order."""
    job = replace(scan_job(9, chunk_count=1, made=1), outbox=())
    await simulation.store.jobs.insert([job])
    await simulation.store.chunks.insert(
        [chunk(id="9-0", job_id=9, state=ChunkState.STORED, outcomes="a" * job.plan.addresses)]
    )
    await simulation.only.reconciler.reconcile([9])
    ended = (await simulation.store.jobs.get([9]))[9]
    assert (ended.status, ended.rev) == (JobStatus.COMPLETED, job.rev + 1)
    assert [(type(each), each.job.status) for each in simulation.events(9)] == [
        (JobStarted, JobStatus.RUNNING),
        (JobCompleted, JobStatus.COMPLETED),
    ]


async def test_published_event_is_not_published_again(simulation: Simulation) -> None:
    """An event that is still in the outbox after the bus has acknowledged it is not sent with the next one."""
    await simulation.submit()
    await simulation.deliver()
    assert [type(out.event) for out in (await simulation.store.jobs.get([1]))[1].outbox] == [JobCreated]
    await simulation.cancel(1)
    await simulation.deliver()
    assert [type(each) for each in simulation.events(1)] == [JobCreated, JobCancelled]


async def test_outboxes_are_emptied_together(simulation: Simulation) -> None:
    """One round takes what was published out of the outboxes of many jobs, and the next has nothing to do."""
    jobs = [scan_job(id_) for id_ in (7, 8, 9)]
    await simulation.store.jobs.insert(jobs)
    await simulation.only.outbox.publish(jobs)
    await simulation.only.outbox.empty()
    assert [(job.outbox, job.rev) for job in (await simulation.store.jobs.get([7, 8, 9])).values()] == 3 * [((), 1)]
    await simulation.only.outbox.empty()
    assert {job.rev for job in (await simulation.store.jobs.get([7, 8, 9])).values()} == {1}


async def test_outboxes_of_restored_jobs_are_emptied(simulation: Simulation) -> None:
    """After a restore, which raises the `seq` of jobs above that of their events, a sweep publishes these events once."""
    await simulation.store.jobs.insert([restored_from_backup(scan_job(9), 1_000)])
    for _ in range(2):
        await simulation.only.outbox.relay([9])
        await simulation.only.outbox.empty()
        await simulation.restart()
    assert [event.seq for event in simulation.events(9)] == [1]


async def test_outbox_with_a_later_event_is_emptied_once_that_is_published(simulation: Simulation) -> None:
    """The cleanup after the first event keeps the outbox of a job that has changed since."""
    await simulation.store.jobs.insert([scan_job(9)])
    await simulation.only.outbox.publish([scan_job(9)])
    cancelled = change(scan_job(9), JobTrigger.CANCEL, THEN)
    await simulation.store.jobs.save([cancelled])
    await simulation.only.outbox.empty()
    assert len((await simulation.store.jobs.get([9]))[9].outbox) == 2
    await simulation.only.outbox.publish([cancelled])
    await simulation.only.outbox.empty()
    assert (await simulation.store.jobs.get([9]))[9].outbox == ()
    assert {event.seq for event in simulation.events(9)} == {1, 2}


async def test_repeated_check_request_contains_the_reported_facts(simulation: Simulation) -> None:
    """After a loss of the worker's report result-store gets the facts of the scan, with which it closes the chunk."""
    simulation.worker.hold, simulation.results = True, None
    await simulation.submit("127.9.8.0/30", policy=scan_policy(ports="top:3"))
    await simulation.settle()
    [task] = simulation.worker.tasks
    run = Run(nmap="7.93", arguments="a" * 64, source="127.0.0.1", rules="b" * 64, began=1.5)
    facts: dict[str, Any] = {
        "nmap": run.nmap,
        "arguments": run.arguments,
        "scripts": ("banner",),
        "common_ports": "22,80,443",
        "detection": "sV7/O/banner",
        "discovery": "default",
        "run": run,
    }
    await simulation.worker.scanned(task, **facts)
    await simulation.settle()
    simulation.now += 61.0
    await simulation.only.sweeper.sweep()
    reported, repeated = simulation.bus.messages(SCAN_RESULTS)
    assert isinstance(repeated, ChunkScanned)
    assert repeated.model_dump(exclude={"slot_seconds", "traceparent"}) == reported.model_dump(
        exclude={"slot_seconds", "traceparent"}
    )
    assert {name: getattr(repeated, name) for name in facts} == facts
