"""Replicas that change the same job at the same moment, on real documents."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import OPEN, ChunkState
from job_orchestrator.domain.job import TABLE
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import Simulation, scan_policy
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    CancelJob,
    ChunkScanned,
    ChunkStored,
    CommandAccepted,
    CommandReply,
    JobEvent,
    JobStatus,
    Message,
)
from scanfleet.contracts.messages.chunks import MAX_SLOTS
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_EVENTS, SCAN_REPLIES, SCAN_RESULTS, SCAN_STORED
from scanfleet.runtime.bus import Handler, Record
from scanfleet.runtime.mongo import Database

pytestmark = pytest.mark.integration

RACES = 500
AT_ONCE = 20
MOMENT_SECONDS = 0.005  # within which both happen
STEP = 0.001  # by which the moment is sought: later when a cancel won, sooner when it lost


async def soon(handler: Handler, message: Message, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await handler.handle([Record(message, "", 0, 0, utc_now())])


async def scanned_jobs(store: MongoStore) -> tuple[Simulation, dict[int, ChunkScanned]]:
    """Return two replicas with jobs whose only chunk is scanned and not stored, and its report by job."""
    simulation = Simulation(store, replicas=2)
    await simulation.start()
    simulation.worker.slots, simulation.results = MAX_SLOTS, None
    await simulation.worker.announce()
    await simulation.submit(*["127.9.8.0/30"] * RACES)
    await simulation.settle()
    scanned = {each.job_id: each for each in simulation.bus.messages(SCAN_RESULTS) if isinstance(each, ChunkScanned)}
    assert len(scanned) == RACES
    return simulation, scanned


@pytest.mark.proves("F11", "G6", "G8")
async def test_cancel_against_completion_five_hundred_times(mongo_store: MongoStore) -> None:
    """Cancelled within five milliseconds of its completion a job ends once, and reply, events and document agree on how."""
    simulation, scanned = await scanned_jobs(mongo_store)
    chance = random.Random(5)  # noqa: S311 # moments, not secrets
    stores, commands = simulation.replicas[0].handlers[SCAN_STORED], simulation.replicas[1].handlers[SCAN_COMMANDS]

    lead = 0.0  # of the completion; of the cancel if it is negative

    async def race(each: ChunkScanned) -> None:
        nonlocal lead
        stored = ChunkStored(job_id=each.job_id, chunk_id=each.chunk_id, outcomes=each.outcomes)
        cancel = CancelJob(command_id=f"cancel-{each.job_id}", user_id=7, job_id=each.job_id)
        moment = lead + chance.uniform(-MOMENT_SECONDS / 2, MOMENT_SECONDS / 2)
        await asyncio.gather(soon(stores, stored, max(0.0, -moment)), soon(commands, cancel, max(0.0, moment)))
        (job,) = (await mongo_store.jobs.get([each.job_id])).values()
        lead += STEP if job.status is JobStatus.CANCELLED else -STEP

    left: Sequence[ChunkScanned] = list(scanned.values())
    while left:
        await asyncio.gather(*map(race, left[:AT_ONCE]))
        left = left[AT_ONCE:]
    await simulation.settle()

    replies = {
        each.command_id: each for each in simulation.bus.messages(SCAN_REPLIES) if isinstance(each, CommandReply)
    }
    last: dict[int, dict[int, JobStatus]] = defaultdict(dict)
    for event in simulation.bus.messages(SCAN_EVENTS):
        if isinstance(event, JobEvent) and not TABLE[event.job.status]:
            last[event.job.id][event.seq] = event.job.status
    states = {job_id: {chunk.state async for chunk in mongo_store.chunks.of_job(job_id)} for job_id in scanned}
    ends = Counter[JobStatus]()
    for job in (await mongo_store.jobs.get(scanned)).values():
        assert list(last[job.id].values()) == [job.status]
        accepted = isinstance(replies[f"cancel-{job.id}"], CommandAccepted)
        assert accepted == (job.status is JobStatus.CANCELLED)
        assert states[job.id] <= {ChunkState.STORED, ChunkState.CANCELLED}
        ends[job.status] += 1
    assert min(ends[status] for status in (JobStatus.COMPLETED, JobStatus.CANCELLED)) > RACES // 10, ends


@pytest.mark.proves("G24")
@pytest.mark.parametrize("end", [JobStatus.COMPLETED, JobStatus.CANCELLED])
async def test_delete_against_the_end_of_a_job_five_hundred_times(mongo_store: MongoStore, end: JobStatus) -> None:
    """Deleted within five milliseconds of its end a job is deleted only after it, and its last event is published."""
    simulation, scanned = await scanned_jobs(mongo_store)
    chance = random.Random(5)  # noqa: S311 # moments, not secrets
    stores, commands = (simulation.replicas[0].handlers[topic] for topic in (SCAN_STORED, SCAN_COMMANDS))
    deletions = simulation.replicas[1].deletions
    lead = 0.0  # of the end; of the delete if it is negative
    deleted: set[int] = set()

    async def delete(job_id: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        deleted.update(await deletions.delete([job_id], "request"))

    async def race(each: ChunkScanned) -> None:
        nonlocal lead
        stored = ChunkStored(job_id=each.job_id, chunk_id=each.chunk_id, outcomes=each.outcomes)
        cancel = CancelJob(command_id=f"cancel-{each.job_id}", user_id=7, job_id=each.job_id)
        moment = lead + chance.uniform(-MOMENT_SECONDS / 2, MOMENT_SECONDS / 2)
        handler, message = (stores, stored) if end is JobStatus.COMPLETED else (commands, cancel)
        await asyncio.gather(soon(handler, message, max(0.0, -moment)), delete(each.job_id, max(0.0, moment)))
        lead += -STEP if each.job_id in deleted else STEP

    left: Sequence[ChunkScanned] = list(scanned.values())
    while left:
        await asyncio.gather(*map(race, left[:AT_ONCE]))
        left = left[AT_ONCE:]
    await simulation.settle()
    assert min(len(deleted), RACES - len(deleted)) > RACES // 10, len(deleted)

    jobs = await mongo_store.jobs.get(scanned)
    assert jobs.keys() == scanned.keys() - deleted
    assert {job.status for job in jobs.values()} == {end}
    assert await deletions.delete(jobs, "request") == jobs.keys()
    last = {
        event.job.id: event.job.status for event in simulation.bus.messages(SCAN_EVENTS) if isinstance(event, JobEvent)
    }
    assert last == dict.fromkeys(scanned, end)


@pytest.mark.proves("F34", "G20")
@pytest.mark.parametrize(
    ("cidr", "ports", "chunk_count"),
    [
        ("127.8.0.0/19", "1-8192", 2_048),
        pytest.param("127.8.0.0/17", "1-65535", 65_536, marks=pytest.mark.long),  # takes four minutes
    ],
)
async def test_three_replicas_create_each_chunk_of_a_large_job_once(
    mongo_store: MongoStore, database: Database, cidr: str, ports: str, chunk_count: int
) -> None:
    """Of a large job beside small ones only a window exists at any time; each chunk is created, scanned and counted once."""
    simulation = Simulation(mongo_store, replicas=3)
    await simulation.start()
    simulation.worker.slots = plan.WINDOW
    await simulation.worker.announce()
    large, small = 1, range(2, 22)
    await simulation.submit(cidr, policy=scan_policy(ports=ports))
    await simulation.submit(*["127.9.8.0/30"] * len(small))
    await simulation.deliver()
    most = 0
    ended: list[int] = []
    async with asyncio.timeout(60 + chunk_count / 20):
        while large not in ended:
            # Every replica works on the jobs, although one owns them, while their owner handles the reports.
            await asyncio.gather(
                simulation.deliver(),
                *(replica.reconciler.reconcile([large, *small]) for replica in simulation.replicas),
                *(replica.dispatcher.fill() for replica in simulation.replicas),
            )
            await simulation.worker.announce()
            simulation.now += 0.1  # the dispatcher reads the free slots again after a second
            most = max(most, await database["chunks"].count_documents({"job_id": large, "state": {"$in": [*OPEN]}}))
            jobs = await mongo_store.jobs.get([large, *small])
            ended += [id_ for id_, job in jobs.items() if job.final and id_ not in ended]
    assert ended[-1] == large
    assert {job.status for job in jobs.values()} == {JobStatus.COMPLETED}
    assert most == plan.WINDOW
    job = jobs[large]
    assert job.totals.done == job.plan.chunk_count == chunk_count
    assert job.totals.probes == {"silent": job.plan.addresses * job.plan.ports}
    chunks = [chunk async for chunk in mongo_store.chunks.of_job(large)]
    assert [chunk.index for chunk in chunks] == [*range(chunk_count)]
    assert {(chunk.state, chunk.attempt) for chunk in chunks} == {(ChunkState.STORED, 1)}
    assert (
        len(simulation.worker.tasks)
        == len({task.chunk_id for task in simulation.worker.tasks})
        == chunk_count + len(small)
    )
