"""Which worker gets what, and when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import MAX_FAILURES, Chunk, ChunkState
from job_orchestrator.domain.fairness import Account, Candidate, Credit, Held
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator_testing import MemoryStore, Simulation, Worker, chunk, scan_job, scan_policy
from job_orchestrator_testing.repository import Data, MemoryChunks, MemoryDispatch
from job_orchestrator_testing.simulation import listeners
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import ChunkScanned, JobStatus, Message, ScanChunk, WorkerReady
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_TASKS, SCAN_WORKERS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, Preset, fill_in
from scanfleet.scanning.ports import PortSet
from scanfleet_testing.chunk_grants import grants


async def chunk_of(simulation: Simulation, chunk_id: str = "1-0") -> Chunk:
    return (await simulation.store.chunks.get([chunk_id]))[chunk_id]


def tasks(simulation: Simulation) -> list[ScanChunk]:
    return [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, ScanChunk)]


async def queue(
    simulation: Simulation,
    user: int,
    count: int,
    *,
    estimate: float = 5.0,
    needs_raw: bool = False,
    outcomes: str = "....",
) -> None:
    """A job of a user with so many chunks."""
    await simulation.store.jobs.insert([scan_job(user, user_id=user, chunk_count=count, made=count)])
    await simulation.store.chunks.insert(
        [
            chunk(
                id=f"{user}-{n}",
                job_id=user,
                user_id=user,
                partition=SCAN_PROGRESS.partition_of(str(user)),
                index=n,
                turn=n,
                first_address=f"127.9.{8 + n // 64}.{4 * (n % 64)}",
                estimate=estimate,
                needs_raw=needs_raw,
                outcomes=outcomes,
            )
            for n in range(count)
        ],
    )


@pytest.fixture
def simulation() -> Simulation:
    """One replica whose worker only records its tasks; the test starts it."""
    simulation = Simulation(MemoryStore())
    simulation.worker.hold = True
    return simulation


async def test_task_contains_chunk_token_lease_and_policy(simulation: Simulation) -> None:
    """A ScanChunk contains the chunk's addresses, map, ports, token and lease, and the job's policy."""
    await simulation.start_scan("127.9.8.0/30", policy=scan_policy(ports="22,80", max_rate=100))
    (task,) = simulation.worker.tasks
    stored = await chunk_of(simulation)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (task.job_id, task.chunk_id, task.user_id) == (1, "1-0", 7)
    assert (task.attempt, task.worker_id) == (stored.attempt, stored.worker_id) == (1, "w-1")
    assert (task.first_address, task.outcomes, task.ports) == ("127.9.8.0", "....", "22,80")
    assert (task.policy.max_rate, task.lease_seconds, task.estimate_seconds) == (
        100,
        30.0,
        plan.expected(job, PortSet.parse("22,80"), 4),
    )


async def test_dispatch_of_a_job_whose_script_was_withdrawn_fails_it() -> None:
    """No chunk of the job goes to a worker, its error names the field, and another job of the user is dispatched."""
    simulation = Simulation(MemoryStore(), scripts=ADMITTED_SCRIPTS | {"http-grep"})
    policy = fill_in(Preset.QUICK, {"ports": "80", "scripts": ("http-grep",)}, simulation.scripts)
    commands = [await simulation.submit("127.9.8.0/24", policy=policy), await simulation.submit("127.9.8.0/30")]
    await simulation.settle()
    withdrawn, other = (simulation.accepted(command)[0].id for command in commands)
    simulation.scripts = ADMITTED_SCRIPTS
    await simulation.restart()
    await simulation.worker.announce()
    await simulation.settle()
    jobs = await simulation.store.jobs.get([withdrawn, other])
    assert (jobs[withdrawn].status, jobs[other].status) == (JobStatus.FAILED, JobStatus.COMPLETED)
    assert jobs[withdrawn].error.startswith(
        "the job's policy is no longer allowed: scripts.0: http-grep is not one of "
    )
    assert {task.job_id for task in tasks(simulation)} == {other}


@pytest.mark.proves("G19")
async def test_fill_dispatched_chunk_carries_a_valid_grant(simulation: Simulation) -> None:
    """The grant of a dispatched chunk covers the end that its worker may report, and no other chunk's."""
    await simulation.start_scan("127.9.8.0/30")
    (task,) = simulation.worker.tasks
    token = {**task.token._asdict(), "first_address": task.first_address}
    end = ChunkScanned(**token, outcomes="asdt", slot_seconds=1, technique="connect", grant=task.grant)
    assert grants().fault(end) == ""
    assert grants().fault(end.model_copy(update={"chunk_id": "1-1"})) != ""


async def test_worker_holds_at_most_one_chunk_per_slot(simulation: Simulation) -> None:
    """For any number of queued chunks and announcements, a worker holds one chunk per slot."""
    await simulation.start()
    await queue(simulation, 7, 20)
    for _ in range(3):
        await simulation.worker.announce()
        await simulation.settle()
    assert len(tasks(simulation)) == 4


async def test_tiny_chunks_are_prefetched(simulation: Simulation) -> None:
    """A worker without a free slot gets up to two seconds of tiny chunks."""
    await simulation.start()
    await queue(simulation, 7, 4, estimate=0.3)
    await simulation.worker.announce()
    await simulation.settle()
    await queue(simulation, 8, 40, estimate=0.2)
    simulation.now += 1.5
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 4 + 10


async def test_tiny_chunks_that_share_an_nmap_are_dispatched_at_once(simulation: Simulation) -> None:
    """A worker with free slots gets all of 90 chunks of one host in one round, and no more while it holds them."""
    await simulation.start()
    await queue(simulation, 7, 90, estimate=0.10025, outcomes=".")
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 90
    await queue(simulation, 8, 90, estimate=0.10025, outcomes=".")
    simulation.now += 1.5
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 90


@pytest.mark.parametrize(
    ("cidr", "ports", "estimate", "held", "seconds", "held_later"),
    [
        # One second of sixteen: one chunk for each of four slots, and one beyond, which is prefetched for at most two seconds.
        ("127.9.0.0/20", "1-1000", 16.1, 4, 1, 5),
        # Five seconds of less than one: three chunks beyond the four slots, and later none.
        ("127.9.0.0/17", "1-2", 0.612, 7, 5, 4),
    ],
)
async def test_chunks_are_prefetched_by_the_time_of_finished_ones(
    simulation: Simulation, *, cidr: str, ports: str, estimate: float, held: int, seconds: int, held_later: int
) -> None:
    """Once chunks of a job have finished, their time decides about its other chunks, and the estimate no longer."""
    await simulation.start_scan(cidr, policy=scan_policy(ports=ports, timing=4))
    assert [task.estimate_seconds for task in simulation.worker.tasks] == [estimate] * held
    for _ in range(3):
        ended = len(simulation.worker.tasks)
        await simulation.wait(seconds)
        for task in simulation.worker.tasks[-held:]:
            await simulation.worker.scanned(task, slot_seconds=seconds)
        await simulation.settle()
        held = len(simulation.worker.tasks) - ended
    assert held == held_later


async def test_worker_without_slots_gets_no_chunk(simulation: Simulation) -> None:
    """A worker that announces no slots is not given a chunk."""
    simulation.worker.slots = 0
    await simulation.start()
    await queue(simulation, 7, 3)
    await simulation.worker.announce()
    await simulation.settle()
    assert tasks(simulation) == []


@pytest.mark.parametrize(("lease_seconds", "silent"), [(30.0, 8.0), (4.0, 5.0)])
async def test_silent_worker_gets_no_chunk(lease_seconds: float, silent: float) -> None:
    """A worker silent for seven seconds, or for a lease, gets no chunk until it announces itself again."""
    simulation = Simulation(MemoryStore(), lease_seconds=lease_seconds)
    simulation.worker.hold = True
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    simulation.now += silent
    await queue(simulation, 7, 1)
    simulation.only.dispatcher.wake()
    await simulation.settle()
    assert tasks(simulation) == []
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 1


async def test_replica_dispatches_only_after_reading_all_announcements(simulation: Simulation) -> None:
    """A replica that has not read its partitions to their end dispatches no chunk: the announcements may be outdated."""
    replica = simulation.only
    for listener in listeners(replica):
        await listener.assigned(range(12))
    await queue(simulation, 7, 1)
    await simulation.worker.announce()
    await simulation.settle()
    assert tasks(simulation) == []
    await simulation.catch_up()
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 1


async def test_replica_dispatches_no_chunk_to_workers_of_revoked_partitions(simulation: Simulation) -> None:
    """After a revocation another replica dispatches to the workers of that partition."""
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.only.fleet.revoked(range(12))
    await queue(simulation, 7, 1)
    simulation.only.dispatcher.wake()
    await simulation.settle()
    assert tasks(simulation) == []


async def test_unclaimed_task_is_requeued_after_a_lease(simulation: Simulation) -> None:
    """One lease covers a chunk from its dispatch on, and a lost one is not charged to its user."""
    await simulation.start()
    await queue(simulation, 7, 1)
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.wait(29)
    assert len(simulation.worker.tasks) == 1
    await simulation.wait(3)
    assert [task.attempt for task in simulation.worker.tasks] == [1, 2]
    assert (await chunk_of(simulation, "7-0")).failures == 0
    assert (await simulation.store.dispatch.accounts([7])).users[7].time == 0.0


async def test_late_claim_of_a_requeued_chunk_is_stopped(simulation: Simulation) -> None:
    """A worker that claims late, with the old token, gets a StopChunk."""
    await simulation.start()
    await queue(simulation, 7, 1)
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.wait(32)
    simulation.worker.stops.clear()
    await simulation.worker.claim(simulation.worker.tasks[0])
    await simulation.settle()
    assert [stop.attempt for stop in simulation.worker.stops] == [1]


@pytest.mark.proves("F25", "G17")
async def test_failed_chunk_is_dispatched_to_another_instance(simulation: Simulation) -> None:
    """While another live worker can run it, a failed chunk is not dispatched to the instance that failed it."""
    other = Worker(simulation.bus, "w-2", slots=1)
    other.hold = True
    simulation.workers.append(other)
    await simulation.start()
    for worker in simulation.workers:
        await worker.announce()
    await simulation.settle()
    await simulation.submit("127.9.8.1/32")
    await simulation.settle()
    (first,) = simulation.worker.tasks or other.tasks
    holder = simulation.worker if simulation.worker.tasks else other
    rest = other if holder is simulation.worker else simulation.worker
    await holder.claim(first)
    await holder.fail(first)
    await simulation.wait(4)
    assert [task.attempt for task in rest.tasks] == [2]
    await rest.fail(rest.tasks[0])
    await simulation.wait(8)
    assert len(simulation.worker.tasks) + len(other.tasks) == 3  # no other worker is left


@pytest.mark.proves("F25", "G17")
async def test_failing_worker_among_others_loses_no_chunk() -> None:
    """One of ten workers fails every chunk at once, and a /20 still completes."""
    simulation = Simulation(MemoryStore())
    simulation.workers = [Worker(simulation.bus, f"w-{n}", slots=2) for n in range(9)]
    broken = Worker(simulation.bus, "w-broken", slots=2)
    broken.hold = True
    simulation.workers.append(broken)
    await simulation.start()
    await simulation.submit("127.9.0.0/20", policy=scan_policy(ports="1-1000"))
    failed = 0
    for _ in range(200):
        for task in broken.tasks[failed:]:
            failed += 1
            await broken.fail(task, "exited with 1")
        await simulation.wait(1)
        if (await simulation.store.jobs.get([1]))[1].final:
            break
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED
    assert failed


@pytest.mark.proves("G17")
@pytest.mark.parametrize("route", [True, False])
async def test_chunk_without_a_route_is_dispatched_to_each_instance(*, route: bool) -> None:
    """The one worker that has a route scans the chunk; if none has, the addresses are lost in half a minute, with the reason."""
    simulation = Simulation(MemoryStore())
    simulation.workers = [Worker(simulation.bus, f"w-{number}", slots=1) for number in range(4)]
    for worker in simulation.workers:
        worker.hold = worker.worker_id != "w-3" or not route
    await simulation.start()
    await simulation.submit("127.9.8.0/24")
    done = 0
    for _ in range(30):
        await simulation.wait(1)
        tasks = [(worker, task) for worker in simulation.workers if worker.hold for task in worker.tasks]
        for worker, task in sorted(tasks, key=lambda each: each[1].attempt)[done:]:
            done += 1
            assert task.limit is None
            await worker.fail(task, "failed to determine route to 127.9.8.0", no_route=True)
    job = (await simulation.store.jobs.get([1]))[1]
    if route:
        assert (job.status, len(simulation.workers[3].tasks)) == (JobStatus.COMPLETED, 1)
    else:
        assert (job.status, done) == (JobStatus.FAILED, len(simulation.workers) + MAX_FAILURES)
        assert job.error.startswith("256 addresses lost: worker w-")
        assert job.error.endswith("failed to determine route to 127.9.8.0")


@pytest.mark.proves("F30", "G18")
@pytest.mark.parametrize(("max_rate", "width"), [(100, 1), (1_000, 2), (1_700, 3)])
async def test_rates_of_a_job_add_up_to_its_max_rate(simulation: Simulation, max_rate: int, width: int) -> None:
    """The concurrent nmap processes of a job share its `max_rate`, whatever the number of free slots."""
    simulation.worker.slots = 20
    await simulation.start_scan("127.9.0.0/20", policy=scan_policy(ports="1-1000", max_rate=max_rate))
    assert len(tasks(simulation)) == width
    assert sum(task.max_rate or 0 for task in tasks(simulation)) <= max_rate
    for number in range(1, 4):
        done = tasks(simulation)[-1]
        await simulation.worker.claim(done)
        await simulation.worker.scanned(done)
        await simulation.worker.announce()
        await simulation.settle()
        assert len(tasks(simulation)) == width + number


@pytest.mark.proves("G18")
@pytest.mark.parametrize(
    ("cidr", "ports", "rates"), [("127.9.8.0/32", "1-20000", [5_000]), ("127.9.8.0/30", "1-1000", [2_500] * 2)]
)
async def test_job_of_few_chunks_at_once_uses_its_max_rate(
    simulation: Simulation, cidr: str, ports: str, rates: list[int]
) -> None:
    """A job that has fewer chunks at once than its `max_rate` allows shares it among these."""
    simulation.worker.slots = 20
    await simulation.start_scan(cidr, policy=scan_policy(ports=ports, max_rate=5_000))
    assert [task.max_rate for task in tasks(simulation)] == rates


@pytest.mark.proves("F30")
async def test_port_blocks_of_an_address_are_scanned_one_at_a_time(simulation: Simulation) -> None:
    """All ports of a host are scanned block after block, whatever the number of free slots."""
    simulation.worker.slots = 20
    await simulation.start_scan("127.9.8.1/32", policy=scan_policy(ports="1-65535"))
    for number in range(1, 9):
        assert len(tasks(simulation)) == number
        await simulation.worker.claim(tasks(simulation)[-1])
        await simulation.worker.scanned(tasks(simulation)[-1])
        await simulation.worker.announce()
        await simulation.settle()
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED


@pytest.mark.proves("F27", "G17")
async def test_unreadable_job_does_not_block_other_jobs(simulation: Simulation) -> None:
    """A chunk whose job cannot be read is skipped and logged; the user's other chunks are dispatched."""
    await simulation.start()
    await simulation.worker.announce()
    await queue(simulation, 7, 2)
    await simulation.store.chunks.insert([chunk(id="99-0", job_id=99, turn=-5)])
    simulation.only.dispatcher.wake()
    await simulation.settle()
    assert [task.chunk_id for task in tasks(simulation)] == ["7-0", "7-1"]


@pytest.mark.proves("F27", "G17")
async def test_refused_job_that_cannot_be_failed_blocks_no_other_job(simulation: Simulation) -> None:
    """A damaged job whose script was withdrawn is skipped; a round ends, and the user's other chunks are dispatched."""
    policy = scan_policy().model_copy(update={"scripts": ("http-grep",)})
    await simulation.store.jobs.insert([replace(scan_job(99, policy=policy, chunk_count=1, made=1), machines_found=-1)])
    await simulation.store.chunks.insert([chunk(id="99-0", job_id=99, turn=-5)])
    await queue(simulation, 7, 2)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.deliver()
    async with asyncio.timeout(30):
        await simulation.only.dispatcher.fill()
    assert [task.chunk_id for task in tasks(simulation)] == ["7-0", "7-1"]
    assert (await chunk_of(simulation, "99-0")).state is ChunkState.QUEUED


@pytest.mark.proves("F27", "G17")
async def test_chunk_with_an_error_at_dispatch_stays_queued(simulation: Simulation) -> None:
    """An error while the task is created is logged with its job, before the chunk is stored; other chunks are dispatched."""
    await simulation.start()
    await simulation.worker.announce()
    await queue(simulation, 7, 2)
    await simulation.store.jobs.insert([scan_job(99)])
    await simulation.store.chunks.insert([chunk(id="99-0", job_id=99, turn=-5, ports="foo")])
    simulation.only.dispatcher.wake()
    with capture_logs() as logs:
        await simulation.settle()
    assert [task.chunk_id for task in tasks(simulation)] == ["7-0", "7-1"]
    assert (await simulation.store.chunks.get(["99-0"]))["99-0"].state is ChunkState.QUEUED
    assert [each["job_id"] for each in logs if each["event"] == "job_skipped"] == [99]


async def test_round_reads_no_queue_while_no_worker_has_room(simulation: Simulation) -> None:
    """With every worker full, a look reads what workers hold and no queue, however many users wait."""
    await simulation.start()
    for user in range(1, 9):
        await queue(simulation, user, 5)
    await simulation.worker.announce()
    await simulation.settle()
    reads: list[int] = []
    store = simulation.store
    count = store.dispatch.queue

    async def counted(user_id: int, *arguments: Any, **named: Any) -> Any:
        reads.append(user_id)
        return await count(user_id, *arguments, **named)

    store.dispatch.queue = counted  # type: ignore[method-assign] # counts what is read
    await simulation.worker.announce()
    await simulation.settle()
    assert reads == []


async def test_work_is_spread_over_workers(simulation: Simulation) -> None:
    """Chunks go to the worker with the most of its slots free."""
    others = [Worker(simulation.bus, f"w-{n}", slots=4) for n in (2, 3)]
    await simulation.start()
    for worker in (simulation.worker, *others):
        await worker.announce()
    await simulation.settle()
    await queue(simulation, 7, 6)
    simulation.only.dispatcher.wake()
    await simulation.settle()
    assert Counter(task.worker_id for task in tasks(simulation)) == {"w-1": 2, "w-2": 2, "w-3": 2}


async def test_users_share_the_slots(simulation: Simulation) -> None:
    """With two users waiting each gets half of the slots, though one has queued a hundred times as much."""
    simulation.worker.slots = 10
    await simulation.start()
    await queue(simulation, 1, 500)
    await queue(simulation, 2, 5)
    await simulation.worker.announce()
    await simulation.settle()
    assert Counter(task.user_id for task in tasks(simulation)) == {1: 5, 2: 5}


async def test_user_with_less_slot_time_is_served_first(simulation: Simulation) -> None:
    """Among active users the one with less slot time is served first, until they are equal."""
    simulation.worker.slots = 3
    await simulation.start()
    await queue(simulation, 1, 10)
    await queue(simulation, 2, 10)
    await simulation.store.dispatch.activate_accounts([Account(1, 10.0), Account(2, 0.0)], 0.0)
    await simulation.worker.announce()
    await simulation.settle()
    assert [task.user_id for task in tasks(simulation)][:2] == [2, 2]


async def test_user_is_charged_the_measured_time_once(simulation: Simulation) -> None:
    """At the end of a chunk its user has paid the time since its dispatch, whatever the worker reports, and only once."""
    await simulation.start()
    await queue(simulation, 7, 1)
    simulation.worker.slots = 1
    await simulation.worker.announce()
    await simulation.settle()
    (task,) = simulation.worker.tasks
    await simulation.worker.claim(task)
    await simulation.settle()
    simulation.now += 7.0
    for _ in range(3):
        await simulation.worker.scanned(task)
    await simulation.settle()
    await simulation.only.accounts.store()
    assert (await simulation.store.dispatch.accounts([7])).users[7].time == pytest.approx(7.0)


async def test_user_is_charged_for_the_blanks_of_an_attempt(simulation: Simulation) -> None:
    """The next attempt on a chunk is expected to take as long as its blanks need, for its user and for the worker."""
    await simulation.start_scan("127.9.8.0/28")
    (first,) = simulation.worker.tasks
    await simulation.worker.release(first, "s" * 15 + ".")
    await simulation.settle()
    (_, second), job = simulation.worker.tasks, (await simulation.store.jobs.get([1]))[1]
    whole, rest = (plan.expected(job, PortSet.parse(second.ports), addresses) for addresses in (16, 1))
    (held,) = await simulation.store.dispatch.held()
    assert (first.estimate_seconds, second.estimate_seconds, held.estimate) == (whole, rest, rest)
    assert (await chunk_of(simulation)).estimate == whole > rest


async def test_jobs_of_one_user_alternate(simulation: Simulation) -> None:
    """A small job that follows a large one of the same user is not dispatched last."""
    simulation.worker.slots = 6
    await simulation.start()
    await simulation.submit("127.9.0.0/20", policy=scan_policy(ports="1-1000"))
    await simulation.settle()
    await simulation.submit("127.9.8.0/26", policy=scan_policy(ports="1-1000"))
    await simulation.settle()
    await simulation.worker.announce()
    await simulation.settle()
    assert {task.job_id for task in tasks(simulation)} == {1, 2}


async def test_new_job_does_not_overtake_one_without_queued_chunks(simulation: Simulation) -> None:
    """A job whose `max_rate` allows one open chunk alternates with a new job of its user, however many chunks have ended."""
    simulation.worker.slots = 1
    await simulation.start_scan("127.9.0.0/20", policy=scan_policy(ports="1-1000", max_rate=100))

    async def end_chunks(number: int) -> None:
        for _ in range(number):
            await simulation.worker.scanned(simulation.worker.tasks[-1])
            await simulation.worker.announce()
            await simulation.settle()

    await end_chunks(9)
    simulation.now += 2.0
    await simulation.submit("127.9.16.0/20", policy=scan_policy(ports="1-1000"))
    await simulation.settle()
    await end_chunks(8)
    assert Counter(task.job_id for task in simulation.worker.tasks[-8:])[1] >= 3


async def test_raw_chunks_wait_for_a_raw_worker(simulation: Simulation) -> None:
    """While a raw worker is live, chunks that need raw packets are dispatched only to it, the others to any worker."""
    raw = Worker(simulation.bus, "w-raw", slots=2, raw=True)
    raw.hold = True
    simulation.workers.append(raw)
    await simulation.start()
    await raw.announce()
    await simulation.worker.announce()
    await simulation.settle()
    await queue(simulation, 7, 6, needs_raw=True)
    await queue(simulation, 8, 2)
    simulation.only.dispatcher.wake()
    await simulation.settle()
    by_worker = {worker.worker_id: {task.user_id for task in worker.tasks} for worker in simulation.workers}
    assert by_worker["w-1"] <= {8}
    assert len(raw.tasks) == 2
    assert 7 not in by_worker["w-1"]


@pytest.mark.proves("F28")
async def test_raw_chunks_never_go_to_a_plain_worker(simulation: Simulation) -> None:
    """When the last raw worker leaves, its job's chunks wait for another one, and the job shows it until it comes."""
    raw = Worker(simulation.bus, "w-raw", slots=2, raw=True)
    raw.hold = True
    simulation.workers.append(raw)
    await simulation.start()
    await simulation.submit("127.9.0.0/24", policy=scan_policy(ports="1-1000", technique="syn"))
    await simulation.wait(1)
    assert len(raw.tasks) == 2
    raw.slots = 0
    for task in raw.tasks:
        await raw.release(task)
    await simulation.wait(15)
    assert simulation.worker.tasks == []
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.waiting, job.error, job.final) == ("no_raw_worker", "", False)
    assert simulation.events(1)[-1].waiting == "no_raw_worker"
    raw.slots = 4
    raw.hold = False
    await simulation.wait(15)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.waiting) == (JobStatus.COMPLETED, "")


async def test_job_without_a_raw_worker_fails_after_the_timeout(simulation: Simulation) -> None:
    """A job that waited for a raw worker for the configured time fails, and its error names the remedy."""
    await simulation.start()
    await simulation.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await simulation.wait(590)
    assert not (await simulation.store.jobs.get([1]))[1].final
    await simulation.wait(40)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.settled) == (JobStatus.FAILED, True)
    assert "no worker that may send raw packets was available for 600 s" in job.error


async def test_step_of_the_platforms_clock_fails_no_job_that_waits_for_a_raw_worker(simulation: Simulation) -> None:
    """A job waits for its timeout again from a step of the database's clock on."""
    await simulation.start()
    await simulation.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await simulation.wait(30)
    simulation.step_clock(timedelta(days=1))
    await simulation.wait(590)
    assert (await simulation.store.jobs.get([1]))[1].waiting == "no_raw_worker"
    await simulation.wait(30)
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.FAILED


async def test_restart_begins_the_timeout_of_a_job_that_waits_for_a_raw_worker_again(simulation: Simulation) -> None:
    """Workers may have come, and the clock may have been changed, while no orchestrator was running."""
    await simulation.start()
    await simulation.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await simulation.wait(30)
    await simulation.restart()
    simulation.step_clock(timedelta(days=1))
    simulation.only.sweeper._clock.stepped_at = None  # the new process has not seen the step
    await simulation.wait(590)
    assert (await simulation.store.jobs.get([1]))[1].waiting == "no_raw_worker"
    await simulation.wait(30)
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.FAILED


async def test_step_of_the_platforms_clock_is_not_charged(simulation: Simulation) -> None:
    """Neither the account of a user with held chunks nor the global virtual time rises by a step of ten hours."""
    simulation.worker.slots = 1
    await simulation.start()
    await queue(simulation, 7, 3)
    await simulation.worker.announce()
    await simulation.settle()
    simulation.now += 5.0
    simulation.step_clock(timedelta(hours=10))
    simulation.worker.slots = 2
    for _ in range(2):
        await simulation.worker.announce()
        await simulation.settle()
        simulation.now += 5.0
    first, second = simulation.worker.tasks
    assert first.attempt == second.attempt == 1
    for task in (first, second):
        await simulation.worker.scanned(task)
    await simulation.settle()
    await simulation.only.accounts.store()
    accounts = await simulation.store.dispatch.accounts([7])
    assert 10.0 <= accounts.users[7].time <= 25.0
    assert accounts.virtual <= 25.0


async def test_chunk_delayed_by_a_clock_that_was_set_back_is_dispatched(simulation: Simulation) -> None:
    """A chunk whose next attempt may start in an hour, because the clock was an hour ahead, does not wait for it."""
    await simulation.start()
    await queue(simulation, 7, 1)
    await simulation.wait(1)
    (task,) = simulation.worker.tasks
    await simulation.worker.fail(task)
    await simulation.deliver()
    simulation.step_clock(-timedelta(hours=1))
    await simulation.wait(2)
    assert [task.attempt for task in simulation.worker.tasks] == [1, 2]


async def test_chunks_of_an_ended_job_are_cancelled_and_not_sent(simulation: Simulation) -> None:
    """Chunks that a slow replica inserts after their job was cancelled and settled are never scanned, nor left queued."""
    ended = change(scan_job(1, chunk_count=30, made=30, settled=True), JobTrigger.CANCEL, utc_now())
    await simulation.store.jobs.insert([ended])
    await simulation.store.chunks.insert([chunk(id=f"1-{n}", index=n, turn=n) for n in range(30)])
    await queue(simulation, 8, 1)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    assert [task.job_id for task in simulation.worker.tasks] == [8]
    assert [each.state async for each in simulation.store.chunks.of_job(1)] == [ChunkState.CANCELLED] * 30


async def test_replicas_never_dispatch_a_chunk_twice() -> None:
    """With waiting workers of both replicas every chunk is dispatched to one of them."""
    simulation = Simulation(MemoryStore(), replicas=2)
    simulation.workers = [Worker(simulation.bus, f"w-{n}", slots=8) for n in range(6)]
    for worker in simulation.workers:
        worker.hold = True
    await queue(simulation, 7, 200, estimate=0.1)
    await simulation.start()
    for worker in simulation.workers:
        await worker.announce()
    await simulation.settle()
    given = [(task.chunk_id, task.attempt) for task in tasks(simulation)]
    assert len(given) == len(set(given)) > 100


async def test_last_announcement_of_a_batch_counts(simulation: Simulation) -> None:
    """Among several announcements of a worker in a batch the last one counts."""
    await simulation.start()
    await queue(simulation, 7, 9)
    await simulation.bus.publish(
        SCAN_WORKERS,
        [WorkerReady(worker_id="w-1", slots=slots, raw=False) for slots in (9, 5, 2)],
    )
    await simulation.settle()
    assert len(tasks(simulation)) == 2


_OLD, _NEW, _THIRD = (WorkerReady(worker_id=f"w-0000000{number}", slots=1, raw=False) for number in (1, 2, 3))
_LEAVING = _OLD.model_copy(update={"slots": 0})


@pytest.mark.parametrize(
    ("announced", "reports"),
    [
        ([_OLD, _OLD, _NEW, _NEW], 0),
        ([_OLD, _NEW, _LEAVING, _NEW], 0),
        ([_OLD, _NEW, _OLD], 1),
        ([_OLD, _NEW, _NEW, _OLD, _NEW, _OLD], 3),
        ([_OLD, _NEW, _THIRD] * 2, 3),
    ],
)
@pytest.mark.parametrize("size", [1, 6])
async def test_workers_with_the_same_name_are_reported(
    simulation: Simulation, announced: list[WorkerReady], reports: int, size: int
) -> None:
    """Two processes that announce slots by turns are reported; a restart is not, and neither are redelivered announcements."""

    def reported() -> float:
        return REGISTRY.get_sample_value("scanfleet_duplicate_workers_total") or 0.0

    await simulation.start()
    before = reported()
    records = [Record(each, SCAN_WORKERS.name, 0, offset, utc_now()) for offset, each in enumerate(announced)]
    handler = simulation.only.handlers[SCAN_WORKERS]
    with capture_logs() as logs:
        for first in range(0, len(records), size):
            await handler.handle(records[first : first + size])
    assert reported() - before == reports
    assert {log["instance"] for log in logs if log["event"] == "worker_name_duplicated"} <= {"w"}
    await handler.handle(records)
    assert reported() - before == reports


@pytest.mark.proves("G17", "A25")
async def test_invented_workers_neither_block_dispatch_nor_fill_the_database() -> None:
    """Among 100,000 invented workers no step takes long, at most 2,000 are stored, and a known worker gets its chunks."""
    store = MemoryStore()
    simulation = Simulation(store)
    simulation.worker.hold = True
    await queue(simulation, 7, 200)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    handler = simulation.only.handlers[SCAN_WORKERS]
    ignored = REGISTRY.get_sample_value("scanfleet_ignored_workers_total") or 0.0
    steps: list[float] = []
    with capture_logs() as logs:
        for first in range(0, 100_000, 500):
            records = [
                Record(
                    WorkerReady(worker_id=f"x-{number:08x}-{number:08x}", slots=256, raw=True), "", 0, number, utc_now()
                )
                for number in range(first, first + 500)
            ]
            began = time.thread_time()
            await handler.handle(records)
            steps.append(time.thread_time() - began)
    simulation.only.dispatcher.wake()
    began = time.thread_time()
    await simulation.only.dispatcher.fill()
    assert time.thread_time() - began < 0.2
    assert sorted(steps)[-10] < 0.2  # garbage collections and other processes add to some
    assert len(store.data.workers) == 2_000
    assert (REGISTRY.get_sample_value("scanfleet_ignored_workers_total") or 0.0) - ignored == 98_001
    assert [log["event"] for log in logs] == ["worker_ignored"] * 20
    assert "w-1" in {credit.instance for credit in simulation.only.fleet.credits()}
    simulation.now += 8.0
    await simulation.worker.announce()
    await simulation.settle()
    assert [credit.instance for credit in simulation.only.fleet.credits()] == ["w-1"]


async def test_processes_of_an_instance_are_one_worker() -> None:
    """A worker that announces a new process id each time takes one place and one document."""
    store = MemoryStore()
    simulation = Simulation(store, max_workers=1)
    await simulation.start()
    for number in range(100):
        await simulation.bus.publish(SCAN_WORKERS, [WorkerReady(worker_id=f"w-{number:08x}", slots=1, raw=False)])
        await simulation.settle()
    assert [credit.worker_id for credit in simulation.only.fleet.credits()] == ["w-00000063"]
    assert len(store.data.workers) == 1


class Noting(MemoryDispatch):
    """Notes which workers announced themselves, when it is asked who waits, and how many held chunks it returned."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.seen: list[str] = []
        self.rounds: list[float] = []
        self.read = self.looks = 0

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        seen = list(workers)
        self.seen += [worker.worker_id for worker in seen]
        await super().seen_workers(seen)

    async def waiting_users(self, *, raw: bool) -> list[int]:
        self.rounds.append(asyncio.get_running_loop().time())
        return await super().waiting_users(raw=raw)

    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        held = await super().held(partitions, known)
        self.read += len(held)
        self.looks += 1
        return held


class Recording(MemoryDispatch):
    """Records the names of its reads."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.reads: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in {"waiting_users", "queue", "held", "accounts", "deactivate_accounts", "live_workers"}:
            self.reads.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_idle_workers_cost_one_query_for_each_look(replicas: int) -> None:
    """Beside announcements of a hundred idle workers too; a chunk that another replica queues goes out with the next look."""
    store = MemoryStore()
    store.dispatch = recording = Recording(store.data)
    simulation = Simulation(store, replicas=replicas)
    simulation.worker.hold = True
    simulation.workers += [Worker(simulation.bus, f"w-{n}", raw=True) for n in range(2, 101)]
    await simulation.start()
    await simulation.wait(2)
    recording.reads.clear()
    for _ in range(10):
        simulation.now += 0.2
        for worker in simulation.workers:
            await worker.announce()
            await simulation.deliver()
        for replica in simulation.replicas:
            await replica.dispatcher.fill()
    each_second = 2 * replicas * ["deactivate_accounts"]
    assert sorted(recording.reads) == sorted([*each_second, *(10 * replicas * ["waiting_users"])])
    await queue(simulation, 7, 1)
    for replica in simulation.replicas:
        await replica.dispatcher.fill()
    assert len(tasks(simulation)) == 1


async def test_silent_workers_cost_no_query() -> None:
    """Once the only worker, which was idle, no longer announces itself, looks read nothing."""
    store = MemoryStore()
    store.dispatch = recording = Recording(store.data)
    simulation = Simulation(store)
    await simulation.start()
    await simulation.wait(2)
    simulation.now += 8.0
    recording.reads.clear()
    await simulation.only.dispatcher.fill()
    assert recording.reads == []


async def test_announcement_is_stored_every_five_seconds_or_when_changed() -> None:
    """Unchanged announcements of a worker are stored every five seconds, changed ones at once."""
    store = MemoryStore()
    store.dispatch = noting = Noting(store.data)
    simulation = Simulation(store)
    await simulation.start()
    for _ in range(12):
        await simulation.worker.announce()
        await simulation.settle()
        simulation.now += 1.0
    assert len(noting.seen) == 3
    simulation.worker.slots = 1
    await simulation.worker.announce()
    await simulation.settle()
    assert noting.seen == ["w-1"] * 4


async def test_rounds_keep_a_minimum_interval() -> None:
    """For any number of wake-ups two rounds are 25 ms apart, and the next round sees all changes since."""
    store = MemoryStore()
    store.dispatch = noting = Noting(store.data)
    simulation = Simulation(store)
    simulation.worker.hold = True
    await simulation.start()
    await queue(simulation, 7, 2)
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 2
    noting.rounds.clear()
    dispatcher = simulation.only.dispatcher
    await dispatcher.loop.start()
    try:
        async with asyncio.timeout(20):
            while len(noting.rounds) < 2:
                dispatcher.wake()
                await asyncio.sleep(0)
    finally:
        await dispatcher.loop.stop()
    assert noting.rounds[1] - noting.rounds[0] >= 0.025


async def test_rounds_do_not_read_the_held_chunks() -> None:
    """Forty rounds in a second beside a thousand chunks that other workers hold read none, and fill each slot that is freed."""
    store = MemoryStore()
    store.dispatch = noting = Noting(store.data)
    simulation = Simulation(store)
    simulation.worker.hold, simulation.worker.slots = True, 1
    await queue(simulation, 7, 41)
    others = {"job_id": 8, "user_id": 8, "state": ChunkState.DISPATCHED, "attempt": 1, "worker_id": "other"}
    await store.jobs.insert([scan_job(8, user_id=8, chunk_count=1_000, made=1_000)])
    await store.chunks.insert([chunk(id=f"8-{n}", index=n, turn=n, **others) for n in range(1_000)])
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    assert noting.read >= 1_000
    noting.read = 0
    for number in range(1, 41):
        await simulation.worker.scanned(simulation.worker.tasks[-1])
        simulation.now += 0.025
        await simulation.settle()
        assert len(simulation.worker.tasks) == 1 + number
    assert noting.read == 0


class Losing(MemoryChunks):
    """Its first save of a dispatched chunk ends with `error`, or else loses the race against another replica."""

    error: Exception | None = None
    saves = 0

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        self.saves += 1
        if self.saves > 1:
            return await super().save(chunks)
        if self.error:
            raise self.error
        return {each.id for each in chunks}


@pytest.mark.parametrize("error", [None, DependencyError("unavailable")])
async def test_held_chunks_are_read_again_after_a_dispatch_was_not_stored(error: Exception | None) -> None:
    """After a lost race, or a save that may be done, the next round reads what workers hold."""
    store = MemoryStore()
    store.dispatch = noting = Noting(store.data)
    store.chunks = losing = Losing(store.data)
    losing.error = error
    simulation = Simulation(store)
    simulation.worker.hold = True
    await queue(simulation, 7, 1)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.deliver()
    looks = noting.looks
    with contextlib.suppress(DependencyError):
        await simulation.only.dispatcher.fill()
    assert noting.looks == looks + (error is None)
    simulation.only.dispatcher.wake()
    await simulation.only.dispatcher.fill()
    assert (noting.looks, len(tasks(simulation))) == (looks + 1, 1)


async def test_slot_freed_by_another_replica_is_filled_soon() -> None:
    """A worker whose chunk ended on another replica gets the next one with the first look after a tenth of a second."""
    simulation = Simulation(MemoryStore(), replicas=2)
    simulation.worker.hold, simulation.worker.slots = True, 1
    await simulation.start()
    await simulation.worker.announce()
    (announcement,) = simulation.take(SCAN_WORKERS)
    user = next(user for user in range(1, 99) if (SCAN_PROGRESS.partition_of(str(user)) - announcement.partition) % 2)
    await queue(simulation, user, 2)
    await simulation.hand(SCAN_WORKERS, [announcement])
    await simulation.settle()
    (task,) = simulation.worker.tasks
    await simulation.worker.scanned(task)
    await simulation.worker.announce()
    await simulation.settle()
    assert len(tasks(simulation)) == 1
    simulation.now += 0.1
    await simulation.settle()
    assert len(tasks(simulation)) == 2


class SlowPublisher:
    """Publishes tasks only once it is allowed to.

    Attributes:
        others: the workers whose tasks it publishes immediately.
        begun: set while it waits.
        allowed: set by the test.
    """

    def __init__(self, publisher: Publisher, others: Collection[str] = ()) -> None:
        self._publisher = publisher
        self.others = others
        self.begun = asyncio.Event()
        self.allowed = asyncio.Event()

    async def publish(self, topic: Topic[Message], messages: Iterable[Message]) -> None:
        messages = list(messages)
        if topic is SCAN_TASKS and not {getattr(each, "worker_id", "") for each in messages} <= set(self.others):
            self.begun.set()
            await self.allowed.wait()
        await self._publisher.publish(topic, messages)


@pytest.mark.proves("G10")
async def test_stop_publishes_the_tasks_of_stored_dispatches(simulation: Simulation) -> None:
    """A replica that is stopped between storing its dispatches and publishing them publishes them first."""
    slow = SlowPublisher(simulation.bus)
    simulation.replicas = [simulation.replica(publisher=slow)]
    await simulation.start()
    await queue(simulation, 7, 3)
    await simulation.worker.announce()
    await simulation.deliver()
    loop = simulation.only.dispatcher.loop
    await loop.start()
    await slow.begun.wait()
    stopping = asyncio.create_task(loop.stop())
    await asyncio.sleep(0)
    slow.allowed.set()
    await stopping
    assert len(tasks(simulation)) == 3


@pytest.mark.proves("F33", "G17")
async def test_partition_without_a_leader_delays_only_its_own_workers(simulation: Simulation) -> None:
    """While the tasks of one partition are not acknowledged, other workers get chunks, and its own workers none."""
    simulation.workers.append(Worker(simulation.bus, "w-2"))
    for worker in simulation.workers:
        worker.slots, worker.hold = 2, True
    assert SCAN_TASKS.partition_of("w-1") != SCAN_TASKS.partition_of("w-2")
    slow = SlowPublisher(simulation.bus, others=["w-1"])
    simulation.replicas = [simulation.replica(publisher=slow)]
    await simulation.start()
    await queue(simulation, 7, 2)
    for worker in simulation.workers:
        await worker.announce()
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    await queue(simulation, 8, 4)
    simulation.only.dispatcher.wake(made=[8])
    await simulation.only.dispatcher.fill()
    assert [task.worker_id for task in tasks(simulation)] == ["w-1"] * 2
    held = await simulation.store.dispatch.held()
    assert Counter(each.token.worker_id for each in held) == {"w-1": 2, "w-2": 1}
    slow.others = ["w-1", "w-2"]
    slow.allowed.set()
    await simulation.settle()
    assert Counter(task.worker_id for task in tasks(simulation)) == {"w-1": 2, "w-2": 2}


@pytest.mark.proves("F33", "G17")
async def test_partition_of_both_kinds_of_workers_waits_for_its_tasks(simulation: Simulation) -> None:
    """While the task of a worker with raw packets is not acknowledged, a plain worker in the same partition gets none."""
    raw = Worker(simulation.bus, "w-12")
    raw.raw, simulation.worker.raw = True, False
    simulation.workers.append(raw)
    assert SCAN_TASKS.partition_of("w-1") == SCAN_TASKS.partition_of("w-12")
    for worker in simulation.workers:
        worker.slots, worker.hold = 1, True
    slow = SlowPublisher(simulation.bus)
    simulation.replicas = [simulation.replica(publisher=slow)]
    await simulation.start()
    await queue(simulation, 7, 2)
    for worker in simulation.workers:
        await worker.announce()
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    assert {each.token.worker_id for each in await simulation.store.dispatch.held()} == {"w-12"}
    slow.allowed.set()
    await simulation.settle()
    assert {task.worker_id for task in tasks(simulation)} == {"w-1", "w-12"}


@pytest.mark.proves("F33", "G17")
async def test_job_after_a_short_leader_outage_is_dispatched_within_seconds(simulation: Simulation) -> None:
    """A job waits for seconds after its partition had no leader, and does not count as damaged."""
    skipped = REGISTRY.get_sample_value("scanfleet_skipped_jobs_total")
    await simulation.start()
    await queue(simulation, 7, 1)
    await simulation.worker.announce()
    simulation.bus.broker.leaderless = {(SCAN_PROGRESS.name, SCAN_PROGRESS.partition_of("7"))}
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    simulation.bus.broker.leaderless = set()
    assert tasks(simulation) == []
    simulation.now += 3
    await simulation.only.dispatcher.fill()
    assert [task.chunk_id for task in tasks(simulation)] == ["7-0"]
    assert REGISTRY.get_sample_value("scanfleet_skipped_jobs_total") == skipped


@pytest.mark.proves("F33", "G17")
async def test_job_without_a_leader_of_its_reports_takes_the_slots_for_one_lease(simulation: Simulation) -> None:
    """After a lease without a leader another user's job gets a slot, and the job whose reports are not acknowledged gets none."""
    partition = SCAN_PROGRESS.partition_of("7")
    assert partition != SCAN_PROGRESS.partition_of("9")
    simulation.worker.slots = 2
    await simulation.start()
    await queue(simulation, 7, 4)
    await simulation.worker.announce()
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    simulation.bus.broker.leaderless = {(SCAN_PROGRESS.name, partition)}
    await queue(simulation, 9, 1)
    for after, begun in ((0.0, {7: 2}), (30.0, {7: 2}), (1.0, {7: 2, 9: 1})):
        simulation.now += after
        await simulation.worker.announce()
        await simulation.deliver()
        await simulation.only.dispatcher.fill()
        assert Counter(task.job_id for task in tasks(simulation)) == begun


@pytest.mark.proves("F33", "G17")
async def test_partition_without_a_leader_is_timed_while_no_worker_has_room(simulation: Simulation) -> None:
    """A worker that announces itself a lease after the leader was lost gets chunks at once: the held ones have ended."""
    partition = SCAN_PROGRESS.partition_of("7")
    simulation.worker.slots = 2
    await simulation.start()
    await queue(simulation, 7, 2)
    await simulation.worker.announce()
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    await simulation.only.dispatcher.fill()  # every slot is taken
    simulation.bus.broker.leaderless = {(SCAN_PROGRESS.name, partition)}
    await queue(simulation, 9, 1)
    for _ in range(4):  # no worker announces itself
        await simulation.only.dispatcher.fill()
        simulation.now += 8.0
    await simulation.worker.announce()
    await simulation.deliver()
    await simulation.only.dispatcher.fill()
    assert Counter(task.job_id for task in tasks(simulation)) == {7: 2, 9: 1}


async def test_users_with_delayed_chunks_leave_no_slot_idle(simulation: Simulation) -> None:
    """A chunk is dispatched although a whole page of needier users have only chunks that wait for their next attempt."""
    await simulation.start()
    await simulation.worker.announce()
    later = simulation.time + timedelta(seconds=60)
    waiting = [scan_job(n, user_id=100 + n, made=1) for n in range(1, 65)]
    ready = scan_job(65, user_id=99, made=1)
    await simulation.store.jobs.insert([*waiting, ready])
    await simulation.store.chunks.insert(
        [chunk(id=f"{job.id}-0", job_id=job.id, user_id=job.user_id, not_before=later) for job in waiting]
    )
    await simulation.store.chunks.insert([chunk(id="65-0", job_id=65, user_id=99)])
    await simulation.store.dispatch.charge({99: 100.0})
    await simulation.settle()
    assert [task.chunk_id for task in tasks(simulation)] == ["65-0"]


class CountingQueues(MemoryDispatch):
    """Counts the reads of queues, and of the users who wait."""

    queues = looks = 0

    async def queue(self, *arguments: Any, **named: Any) -> list[Candidate]:
        self.queues += 1
        return await super().queue(*arguments, **named)

    async def waiting_users(self, *, raw: bool) -> list[int]:
        self.looks += 1
        return await super().waiting_users(raw=raw)


async def test_rounds_with_delayed_users_query_a_bounded_number_of_queues() -> None:
    """Ten rounds beside a thousand such users query at most 257 queues each, and each queue about once a second."""
    store = MemoryStore()
    store.dispatch = counting = CountingQueues(store.data)
    simulation = Simulation(store)
    simulation.worker.hold = True
    await simulation.start()
    await simulation.worker.announce()
    later = simulation.time + timedelta(seconds=60)
    await store.jobs.insert([scan_job(n, user_id=n, made=1) for n in range(1, 1_002)])
    await store.chunks.insert(
        [chunk(id=f"{n}-0", job_id=n, user_id=n, not_before=later if n < 1_001 else None) for n in range(1, 1_002)]
    )
    await store.dispatch.charge({1_001: 100.0})
    await simulation.deliver()
    for _ in range(10):
        before = counting.queues
        await simulation.only.dispatcher.fill()
        assert counting.queues - before <= 257
        simulation.now += 0.05
    assert [task.chunk_id for task in tasks(simulation)] == ["1001-0"]
    assert counting.queues <= 1_010


async def test_full_workers_beside_other_replicas_cost_no_query_of_queues() -> None:
    """While all slots are taken, forty rounds in a second look about once for chunks to prefetch."""
    store = MemoryStore()
    store.dispatch = counting = CountingQueues(store.data)
    simulation = Simulation(store, replicas=2)
    simulation.worker.hold, simulation.worker.slots = True, 1
    await queue(simulation, 7, 1, estimate=1.0)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    await queue(simulation, 8, 3, estimate=30.0)
    await simulation.settle()
    assert len(tasks(simulation)) == 1
    counting.looks = 0
    for _ in range(40):
        simulation.now += 0.025
        for replica in simulation.replicas:
            replica.dispatcher.wake()
            await replica.dispatcher.fill()
    assert counting.looks <= 2


async def test_plain_workers_are_filled_with_regard_to_the_chunks_of_raw_ones() -> None:
    """While two users wait, none holds more than their share of the slots of both kinds of workers plus one."""
    simulation = Simulation(MemoryStore())
    simulation.workers = [Worker(simulation.bus, "w-raw", slots=10, raw=True), Worker(simulation.bus, "w-1", slots=10)]
    for worker in simulation.workers:
        worker.hold = True
    await simulation.start()
    for user in (1, 2):
        await queue(simulation, user, 30)
    await simulation.store.dispatch.activate_accounts([Account(1, 0.0), Account(2, 25.0)], 0.0)
    for worker in simulation.workers:
        await worker.announce()
    await simulation.settle()
    assert Counter(task.user_id for task in tasks(simulation)) == {1: 11, 2: 9}


class SlowAnnouncements(MemoryDispatch):
    """Takes the time in which a worker becomes silent to store an announcement."""

    simulation: Simulation

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        self.simulation.now += 4.0
        self.simulation.only.fleet.credits()
        await super().seen_workers(workers)


async def test_announcement_counts_although_its_worker_was_removed_while_it_was_stored() -> None:
    """A worker that has been silent until its announcement was stored gets chunks."""
    store = MemoryStore()
    store.dispatch = slow = SlowAnnouncements(store.data)
    simulation = slow.simulation = Simulation(store)
    await simulation.start()
    await simulation.worker.announce()
    await simulation.deliver()
    await simulation.worker.announce()
    await simulation.deliver()
    assert [credit.worker_id for credit in simulation.only.fleet.credits()] == ["w-1"]
