"""Reports of workers, leases, and messages of result-store: which of them count, and their effects."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import MAX_FAILURES, Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.totals import Effort, Totals
from job_orchestrator_testing import MemoryStore, Simulation, Worker, chunk, scan_job, scan_policy
from job_orchestrator_testing.repository import MemoryChunks
from scanfleet.contracts.messages import (
    ChunkClaimed,
    ChunkIncomplete,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    ChunkStored,
    FencingToken,
    JobProgressed,
    JobStatus,
    ScanChunk,
    StopChunk,
)
from scanfleet.contracts.messages.topics import (
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_TASKS,
    SCAN_WORKERS,
)
from scanfleet.errors import DependencyError

SILENCE_SECONDS = 31  # in which silence is found out: the lease and the look after it


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"scanfleet_{name}_total") or 0.0


async def chunk_of(simulation: Simulation, chunk_id: str = "1-0") -> Chunk:
    return (await simulation.store.chunks.get([chunk_id]))[chunk_id]


async def status_of(simulation: Simulation, job_id: int = 1) -> JobStatus:
    return (await simulation.store.jobs.get([job_id]))[job_id].status


@pytest.fixture
async def task(simulation: Simulation) -> ScanChunk:
    """The only chunk of job 1, dispatched to a worker that does nothing by itself."""
    simulation.worker.hold = True
    await simulation.submit()
    await simulation.settle()
    return simulation.worker.tasks[0]


async def claimed(simulation: Simulation, task: ScanChunk) -> ScanChunk:
    await simulation.worker.claim(task)
    await simulation.settle()
    return task


async def test_claim_starts_the_job(simulation: Simulation, task: ScanChunk) -> None:
    """A job is pending while its chunks wait, and runs from the first claim."""
    assert (await status_of(simulation), (await chunk_of(simulation)).state) == (
        JobStatus.PENDING,
        ChunkState.DISPATCHED,
    )
    await claimed(simulation, task)
    assert (await status_of(simulation), (await chunk_of(simulation)).state) == (JobStatus.RUNNING, ChunkState.RUNNING)


async def test_later_claim_starts_a_job_whose_start_was_not_stored(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that the database did not take is not regarded as done."""
    simulation.worker.hold = True
    await simulation.submit("127.9.0.0/20", policy=scan_policy(ports="1-1000"))
    await simulation.settle()
    first, second = simulation.worker.tasks[:2]
    assert first.job_id == second.job_id
    with monkeypatch.context() as failing:
        failing.setattr(simulation.store.jobs, "save", Broken().save)
        with pytest.raises(DependencyError):
            await claimed(simulation, first)
    await claimed(simulation, second)
    assert await status_of(simulation, second.job_id) is JobStatus.RUNNING


async def test_job_completes_only_when_all_chunks_are_stored(simulation: Simulation, task: ScanChunk) -> None:
    """A scanned job stays running until result-store has published that every result is readable."""
    simulation.results = None
    await claimed(simulation, task)
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert (await status_of(simulation), (await chunk_of(simulation)).state) == (JobStatus.RUNNING, ChunkState.SCANNED)
    await simulation.bus.publish(SCAN_STORED, [ChunkStored(job_id=1, chunk_id="1-0", outcomes="ssss")])
    await simulation.settle()
    assert await status_of(simulation) is JobStatus.COMPLETED


async def test_stored_before_scanned_completes_the_job(simulation: Simulation, task: ScanChunk) -> None:
    """When the message of result-store arrives before the worker's report, the job completes; the report ends the attempt."""
    await claimed(simulation, task)
    await simulation.bus.publish(SCAN_STORED, [ChunkStored(job_id=1, chunk_id="1-0", outcomes="asds")])
    await simulation.settle()
    assert await status_of(simulation) is JobStatus.COMPLETED
    assert simulation.worker.stops == []  # the worker has ended its only attempt itself
    before = await chunk_of(simulation)
    await simulation.worker.scanned(task, "asds")
    await simulation.settle()
    after = await chunk_of(simulation)
    assert replace(after, rev=before.rev, attempts=before.attempts) == before
    assert [(each.how, each.ended is not None) for each in after.attempts] == [("stored", True)]


@pytest.mark.proves("F26", "G17")
async def test_failing_address_is_isolated_and_lost(simulation: Simulation, task: ScanChunk) -> None:
    """Failed attempts are halved; after three failures of a single address it is lost, and all others are scanned."""
    poison = 2  # the place of the address that nmap cannot bear
    done = 0
    while not (await status_of(simulation)).final:
        for again in simulation.worker.tasks[done:]:
            done += 1
            await claimed(simulation, again)
            blanks = [place for place, code in enumerate(again.outcomes) if code == "."]
            wanted = blanks[: again.limit or len(blanks)]
            if poison in wanted:
                await simulation.worker.fail(again)
            elif len(wanted) == len(blanks):
                await simulation.worker.scanned(again)
            else:
                scanned = (("s" if place in wanted else code) for place, code in enumerate(again.outcomes))
                await simulation.worker.release(again, "".join(scanned))
        await simulation.wait(1)
        assert done < 20
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.error) == (JobStatus.FAILED, "1 address lost: worker w-1: nmap died")
    assert (await chunk_of(simulation)).outcomes == "ssls"
    assert (job.progress, job.settled) == (75, True)
    assert task.attempt == 1


async def test_failed_attempt_is_retried_after_a_delay(simulation: Simulation, task: ScanChunk) -> None:
    """After a failure of nmap the next attempt starts two seconds later, on half of the addresses."""
    await claimed(simulation, task)
    await simulation.worker.fail(task)
    await simulation.wait(1)
    assert len(simulation.worker.tasks) == 1
    await simulation.wait(2)
    assert [(each.attempt, each.limit) for each in simulation.worker.tasks] == [(1, None), (2, 2)]


async def test_too_slow_attempt_is_halved_without_a_failure(simulation: Simulation, task: ScanChunk) -> None:
    """After an attempt that timed out the next one has half of the addresses, at once and without a failure."""
    await claimed(simulation, task)
    slow = ChunkReleased(
        job_id=1, chunk_id="1-0", attempt=1, worker_id="w-1", outcomes="....", reason="slow", too_slow=True
    )
    await simulation.bus.publish(SCAN_PROGRESS, [slow])
    await simulation.worker.announce()
    await simulation.settle()
    assert [(each.attempt, each.limit, each.failures) for each in simulation.worker.tasks] == [(1, None, 0), (2, 2, 0)]


async def test_retry_scans_only_blanks(simulation: Simulation, task: ScanChunk) -> None:
    """The next attempt gets the map of the previous one, whatever ended it."""
    await claimed(simulation, task)
    await simulation.worker.progress(task, "ad..")
    await simulation.settle()
    await simulation.worker.release(task, "adt.")
    await simulation.worker.announce()
    await simulation.settle()
    assert [each.outcomes for each in simulation.worker.tasks] == ["....", "adt."]


@pytest.mark.parametrize("replicas", [1, 2])
async def test_chunk_of_a_silent_worker_is_dispatched_to_another(replicas: int) -> None:
    """After a lease without a heartbeat another worker gets the chunk, and the silent one is stopped."""
    simulation = Simulation(MemoryStore(), replicas=replicas)
    dead, other = simulation.worker, Worker(simulation.bus, "w-2")
    dead.hold = True
    await simulation.start()
    await dead.announce()
    await simulation.submit()
    await simulation.settle()
    (task,) = dead.tasks
    await claimed(simulation, task)
    before = counted("leases_expired")
    simulation.workers = [other]
    await simulation.wait(SILENCE_SECONDS - 3)
    assert other.tasks == []
    await simulation.wait(6)
    simulation.workers = [dead, other]
    await simulation.settle()
    assert [(each.chunk_id, each.attempt) for each in other.tasks] == [(task.chunk_id, 2)]
    assert counted("leases_expired") == before + 1
    assert await status_of(simulation) is JobStatus.COMPLETED
    assert (await chunk_of(simulation)).reason == "worker w-1 sent no report for a whole lease"


async def test_heartbeat_renews_the_lease(simulation: Simulation, task: ScanChunk) -> None:
    """A worker that reports the same map each second keeps its lease."""
    await claimed(simulation, task)
    for _ in range(2 * SILENCE_SECONDS):
        await simulation.worker.progress(task, "s...")
        await simulation.wait(1)
    assert ((await chunk_of(simulation)).state, (await chunk_of(simulation)).attempt) == (ChunkState.RUNNING, 1)


class CountingChunks(MemoryChunks):
    """Counts the chunks that were read by id, and those saved."""

    read = saved = 0

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]:
        self.read += len(ids)
        return await super().get(ids)

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        self.saved += len(chunks)
        return await super().save(chunks)


@pytest.fixture
async def counting() -> tuple[Simulation, CountingChunks, ScanChunk]:
    """A simulation with a running chunk, whose reads and writes are counted from now on."""
    store = MemoryStore()
    store.chunks = chunks = CountingChunks(store.data)
    simulation = Simulation(store)
    simulation.worker.hold = True
    await simulation.start_scan()
    task = await claimed(simulation, simulation.worker.tasks[0])
    chunks.read = chunks.saved = 0
    return simulation, chunks, task


async def test_heartbeats_of_a_running_chunk_read_no_chunk(
    counting: tuple[Simulation, CountingChunks, ScanChunk],
) -> None:
    """Ten heartbeats read no chunk, even after a check of the leases, and only those with a new map write one."""
    simulation, chunks, task = counting
    for outcomes in ("....", "s...", "s...", "s...", "ss..", "ss..", "ss..", "ss..", "ss..", "sss."):
        await simulation.worker.progress(task, outcomes)
        await simulation.settle()
        await simulation.catch_up()
    assert (chunks.read, chunks.saved) == (0, 3)
    assert (await chunk_of(simulation)).outcomes == "sss."


async def test_heartbeat_after_a_rebalance_reads_the_chunk(
    counting: tuple[Simulation, CountingChunks, ScanChunk],
) -> None:
    """A replica that gets a partition back reads its chunks again: another one may have changed them meanwhile."""
    simulation, chunks, task = counting
    await simulation.start()
    for _ in range(2):
        await simulation.worker.progress(task, "....")
        await simulation.settle()
    assert chunks.read == 1


@pytest.mark.parametrize(("outcomes", "checked"), [("s...", False), ("....", True)])
async def test_heartbeat_of_a_chunk_that_another_replica_took_is_stopped(
    counting: tuple[Simulation, CountingChunks, ScanChunk], outcomes: str, checked: bool
) -> None:
    """A new map loses its compare-and-set and stops the worker at once, an unchanged one after the next check of the leases."""
    simulation, _, task = counting
    taken = replace(await chunk_of(simulation), state=ChunkState.CANCELLED)
    await simulation.store.chunks.save([taken])
    await simulation.worker.progress(task, outcomes)
    await simulation.settle()
    assert bool(simulation.worker.stops) is not checked
    await simulation.catch_up()
    await simulation.worker.progress(task, outcomes)
    await simulation.settle()
    assert {stop.attempt for stop in simulation.worker.stops} == {task.attempt}
    assert (await chunk_of(simulation)).state is ChunkState.CANCELLED


async def test_verdict_after_a_change_by_another_replica_is_decided_on_the_document(
    counting: tuple[Simulation, CountingChunks, ScanChunk],
) -> None:
    """A verdict on a chunk as this replica stored it last loses the race, and keeps what the other replica has stored."""
    simulation, chunks, task = counting
    simulation.results = None
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert chunks.read == 0
    await simulation.store.chunks.save([replace(await chunk_of(simulation), reason="of another replica")])
    await simulation.bus.publish(SCAN_STORED, [ChunkStored(job_id=1, chunk_id="1-0", outcomes="ssss")])
    await simulation.settle()
    assert ((await chunk_of(simulation)).state, (await chunk_of(simulation)).reason) == (
        ChunkState.STORED,
        "of another replica",
    )


async def test_verdict_that_the_cached_chunk_would_ignore_is_decided_on_the_document(
    counting: tuple[Simulation, CountingChunks, ScanChunk],
) -> None:
    """A verdict on an attempt that another replica has dispatched counts, although this one has not read it."""
    simulation, _, task = counting
    await simulation.store.chunks.save([replace(await chunk_of(simulation), attempt=2, outcomes="ssss")])
    token = {"job_id": 1, "chunk_id": "1-0", "worker_id": task.worker_id}
    missing = ChunkIncomplete(**token, attempt=2, addresses=("127.9.8.1",))
    await simulation.bus.publish(SCAN_STORED, [missing])
    await simulation.deliver()
    assert ((await chunk_of(simulation)).state, (await chunk_of(simulation)).outcomes) == (ChunkState.QUEUED, "s.ss")


async def test_new_or_frozen_replica_expires_no_lease(simulation: Simulation, task: ScanChunk) -> None:
    """After a restart, or an hour of being frozen, a lease restarts."""
    await claimed(simulation, task)
    await simulation.wait(SILENCE_SECONDS - 5)
    await simulation.restart()
    await simulation.wait(SILENCE_SECONDS - 5)
    simulation.now += 3_600.0
    await simulation.catch_up()
    assert (await chunk_of(simulation)).state is ChunkState.RUNNING


async def test_lost_lease_is_logged_with_its_attempt(simulation: Simulation, task: ScanChunk) -> None:
    """An operator finds the worker, the job and the attempt of a lost lease in the log."""
    await claimed(simulation, task)
    with capture_logs() as logs:
        await simulation.wait(SILENCE_SECONDS + 2)
    (lost,) = [each for each in logs if each["event"] == "lease_expired"]
    expected = FencingToken(1, "1-0", 1, task.worker_id)._asdict()
    assert {key: lost[key] for key in expected} == expected
    assert lost["cause"] == "sent no report for a whole lease"


@pytest.mark.proves("F29", "G4")
async def test_rebalance_keeps_the_leases(simulation: Simulation, task: ScanChunk) -> None:
    """Rebalances that return the same partitions do not extend the lease of a dead worker."""
    await claimed(simulation, task)
    for _ in range(SILENCE_SECONDS):
        await simulation.wait(1)
        await simulation.start()
    await simulation.wait(2)
    assert (await chunk_of(simulation)).attempt == 2


@pytest.mark.proves("F29")
async def test_unread_claim_expires_no_lease(simulation: Simulation, task: ScanChunk) -> None:
    """While scan-progress lags and scan-workers does not, no chunk is dispatched a second time."""
    await simulation.worker.claim(task)
    unread = simulation.take(SCAN_PROGRESS)
    for _ in range(2 * SILENCE_SECONDS):
        simulation.now += 1.0
        await simulation.worker.announce()
        await simulation.hand(SCAN_WORKERS, simulation.take(SCAN_WORKERS))
        await simulation.only.fleet.caught_up(range(12))
        await simulation.only.dispatcher.fill()
    await simulation.hand(SCAN_PROGRESS, unread)
    await simulation.catch_up()
    assert ((await chunk_of(simulation)).state, (await chunk_of(simulation)).attempt) == (ChunkState.RUNNING, 1)


async def test_three_lost_leases_of_three_workers_lose_the_addresses(simulation: Simulation, task: ScanChunk) -> None:
    """Workers that die of a chunk, each after its claim, do not die of it indefinitely."""
    await claimed(simulation, task)
    for number in range(2, 2 + MAX_FAILURES):
        simulation.workers = [Worker(simulation.bus, f"w-{number}")]
        simulation.workers[0].hold = True
        await simulation.wait(SILENCE_SECONDS + 2)
        for again in simulation.workers[0].tasks:
            await simulation.workers[0].claim(again)
        await simulation.settle()
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.error) == (
        JobStatus.FAILED,
        "4 addresses lost: worker w-3 sent no report for a whole lease",
    )


@pytest.mark.parametrize("others", [0, 1])
async def test_new_process_of_an_instance_ends_the_leases_of_the_old(
    simulation: Simulation, task: ScanChunk, others: int
) -> None:
    """The chunk of a restarted worker's previous process is requeued at once, as one failure."""
    old = Worker(simulation.bus, "w-00000001")
    simulation.workers = [old]
    old.hold = True
    await simulation.worker.release(task)
    await old.announce()
    simulation.worker.slots = 0
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.wait(1)
    (again,) = old.tasks
    await old.claim(again)
    await simulation.settle()
    new = Worker(simulation.bus, "w-00000002")
    simulation.workers = [new, *[Worker(simulation.bus, f"x-{n}") for n in range(others)]]
    await simulation.wait(2)
    assert await status_of(simulation) is JobStatus.COMPLETED
    assert (await chunk_of(simulation)).attempt == 3


async def test_verdict_before_its_report_counts(simulation: Simulation, task: ScanChunk) -> None:
    """ChunkIncomplete of the current attempt counts before its ChunkScanned is read, which then only ends the attempt."""
    await claimed(simulation, task)
    missing = ChunkIncomplete(job_id=1, chunk_id="1-0", attempt=1, worker_id="w-1", addresses=("127.9.8.2",))
    await simulation.bus.publish(SCAN_STORED, [missing])
    await simulation.wait(3)
    again = await chunk_of(simulation)
    assert (again.state, again.attempt, again.failures) == (ChunkState.DISPATCHED, 2, 1)
    simulation.results = None
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert without_end(await chunk_of(simulation)) == again


def without_end(chunk: Chunk) -> Chunk:
    """The chunk before the write that ended its first attempt."""
    first, *others = chunk.attempts
    assert first.ended is not None
    return replace(chunk, rev=chunk.rev - 1, attempts=(replace(first, ended=None), *others))


async def test_reports_of_an_old_token_are_ignored_and_stopped(simulation: Simulation, task: ScanChunk) -> None:
    """Every claim and progress of an old token is answered with a StopChunk; only the end of the attempt is kept."""
    await claimed(simulation, task)
    await simulation.wait(SILENCE_SECONDS + 2)
    assert simulation.worker.tasks[-1].attempt == 2
    await claimed(simulation, simulation.worker.tasks[-1])
    simulation.worker.stops.clear()
    before, stale = await chunk_of(simulation), counted("stale_reports")
    await simulation.worker.progress(task, "aaaa")
    await simulation.worker.claim(task)
    await simulation.worker.fail(task, outcomes="aaaa")
    await simulation.worker.release(task, "aaaa")
    await simulation.settle()
    assert without_end(await chunk_of(simulation)) == before
    assert [stop.attempt for stop in simulation.worker.stops] == [1, 1]
    assert counted("stale_reports") == stale + 4


async def test_stop_that_cannot_be_sent_blocks_no_other_report(simulation: Simulation, task: ScanChunk) -> None:
    """The end of a chunk counts although a stop in the same batch is not acknowledged; the next heartbeat is answered."""
    stale = Worker(simulation.bus, "w-2")
    simulation.workers.append(stale)
    simulation.bus.broker.leaderless = {(SCAN_TASKS.name, SCAN_TASKS.partition_of("w-2"))}
    token = {"job_id": 1, "chunk_id": "1-0", "attempt": 1, "worker_id": "w-2"}
    await simulation.bus.publish(SCAN_PROGRESS, [ChunkProgressed(**token, outcomes="....")])
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert await status_of(simulation) is JobStatus.COMPLETED
    assert stale.stops == []
    simulation.bus.broker.leaderless.clear()
    await simulation.bus.publish(SCAN_PROGRESS, [ChunkProgressed(**token, outcomes="....")])
    await simulation.settle()
    assert [stop.chunk_id for stop in stale.stops] == ["1-0"]


@pytest.mark.proves("F27", "G17")
async def test_expired_lease_with_an_invalid_worker_id_does_not_end_the_check(simulation: Simulation) -> None:
    """A lease that expires in a damaged document is requeued like the others, although its worker cannot be stopped."""
    held: dict[str, Any] = {"state": ChunkState.RUNNING, "attempt": 1, "reach": 4}
    for id_, worker in ((8, "not/valid"), (9, "w-9")):
        await simulation.store.jobs.insert([replace(scan_job(id_, made=1), status=JobStatus.RUNNING, outbox=())])
        partition = scan_job(id_).partition
        await simulation.store.chunks.insert(
            [chunk(id=f"{id_}-0", job_id=id_, partition=partition, worker_id=worker, **held)]
        )
    await simulation.wait(SILENCE_SECONDS + 2)
    assert [await status_of(simulation, id_) for id_ in (8, 9)] == [JobStatus.COMPLETED] * 2
    assert [each.worker_id for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)] == ["w-9"]


async def test_expired_lease_requeues_its_chunk_although_the_stop_cannot_be_sent(
    simulation: Simulation, task: ScanChunk
) -> None:
    """A lost worker whose partition has no leader keeps no chunk."""
    await claimed(simulation, task)
    simulation.bus.broker.leaderless = {(SCAN_TASKS.name, SCAN_TASKS.partition_of("w-1"))}
    simulation.workers = [other := Worker(simulation.bus, "w-2")]
    await simulation.wait(SILENCE_SECONDS + 2)
    assert [each.attempt for each in other.tasks] == [2]
    assert await status_of(simulation) is JobStatus.COMPLETED


async def test_stored_of_an_old_attempt_ends_the_chunk(simulation: Simulation, task: ScanChunk) -> None:
    """ChunkStored of the old attempt ends the chunk; the new attempt is stopped at once."""
    await claimed(simulation, task)
    await simulation.wait(SILENCE_SECONDS + 2)
    new = simulation.worker.tasks[-1]
    simulation.worker.stops.clear()
    await simulation.worker.scanned(task, "asdt")
    await simulation.settle()
    assert await status_of(simulation) is JobStatus.COMPLETED
    assert new.token in {stop.token for stop in simulation.worker.stops}


async def test_messages_about_unknown_chunks_are_dropped_and_counted(simulation: Simulation) -> None:
    """A forged or ancient message stops no partition: it is counted, and a worker without a valid attempt is stopped."""
    before = counted("unknown_chunks")
    token = {"job_id": 9, "chunk_id": "9-9", "attempt": 1, "worker_id": "w-1"}
    await simulation.bus.publish(
        SCAN_PROGRESS,
        [
            ChunkClaimed(**token),
            ChunkProgressed(**token, outcomes="aa"),
            ChunkScanned(**token, outcomes="aa", first_address="127.0.0.1", slot_seconds=1, technique="syn"),
        ],
    )
    await simulation.bus.publish(
        SCAN_STORED,
        [ChunkStored(job_id=9, chunk_id="9-9", outcomes="aa"), ChunkIncomplete(**token, addresses=("127.0.0.1",))],
    )
    await simulation.settle()
    assert counted("unknown_chunks") == before + 5
    assert [stop.chunk_id for stop in simulation.worker.stops] == ["9-9", "9-9"]


async def test_message_with_another_job_id_is_ignored(simulation: Simulation, task: ScanChunk) -> None:
    """A chunk is changed only under its own job's id: with another id it would be in another partition, out of order."""
    before = await chunk_of(simulation)
    forged = {"job_id": 2, "chunk_id": "1-0", "attempt": task.attempt, "worker_id": task.worker_id}
    await simulation.bus.publish(SCAN_PROGRESS, [ChunkProgressed(**forged, outcomes="aaaa")])
    await simulation.bus.publish(SCAN_STORED, [ChunkStored(job_id=2, chunk_id="1-0", outcomes="aaaa")])
    await simulation.settle()
    assert await chunk_of(simulation) == before


async def test_lost_results_are_scanned_again(simulation: Simulation, task: ScanChunk) -> None:
    """The next attempt scans exactly the addresses that result-store misses; then the job completes."""
    assert simulation.results is not None
    simulation.results.missing["1-0"] = ("127.9.8.2",)
    simulation.worker.hold = False
    await claimed(simulation, task)
    await simulation.worker.scanned(task, "aaaa")
    await simulation.wait(3)
    assert [each.outcomes for each in simulation.worker.tasks] == ["....", "aa.a"]
    assert await status_of(simulation) is JobStatus.COMPLETED


async def test_address_that_is_never_stored_is_lost(simulation: Simulation, task: ScanChunk) -> None:
    """An address is lost after three checks that missed its result, with a delay before each new attempt; all others count."""
    assert simulation.results is not None
    simulation.results.never = {"127.9.8.2"}
    simulation.worker.hold = False
    await claimed(simulation, task)
    await simulation.worker.scanned(task, "aaaa")
    seconds = 0
    while not (await status_of(simulation)).final:
        await simulation.wait(1)
        seconds += 1
        assert seconds < 60
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.error) == (
        JobStatus.FAILED,
        "1 address lost: results were lost before they were stored",
    )
    assert [each.outcomes for each in simulation.worker.tasks] == ["....", "aa.a", "aa.a"]
    assert seconds >= 6


async def test_redelivered_batch_changes_nothing(simulation: Simulation, task: ScanChunk) -> None:
    """Handling every report three times has the same result as once, for chunk, events and failures."""
    await simulation.worker.claim(task)
    await simulation.worker.progress(task, "a...")
    await simulation.worker.fail(task, outcomes="as..")
    records = simulation.take(SCAN_PROGRESS)
    await simulation.hand(SCAN_PROGRESS, records)
    chunk, events = await chunk_of(simulation), simulation.bus.messages(SCAN_EVENTS)
    for _ in range(2):
        await simulation.hand(SCAN_PROGRESS, records)
    again = await chunk_of(simulation)
    assert (again.state, again.outcomes, again.failures) == (chunk.state, chunk.outcomes, chunk.failures)
    assert (chunk.state, chunk.outcomes, chunk.limit) == (ChunkState.QUEUED, "as..", 1)
    assert simulation.bus.messages(SCAN_EVENTS) == events


async def test_progress_event_contains_all_progress_since_the_last(simulation: Simulation) -> None:
    """Many reports between two looks make one JobProgressed, and a look without news makes none."""
    simulation.worker.hold = True
    await simulation.submit("127.9.8.0/24", policy=scan_policy(ports="1-1000"))
    await simulation.settle()
    task = simulation.worker.tasks[0]
    size = len(task.outcomes)
    await simulation.worker.claim(task)
    for done in range(1, 6):
        await simulation.worker.progress(task, "a" * done + "." * (size - done))
        await simulation.settle()
    await simulation.only.reporter.report()
    job = (await simulation.store.jobs.get([1]))[1]
    progressed = [each for each in simulation.events(1) if isinstance(each, JobProgressed)]
    assert [each.machines_found for each in progressed] == [5]
    assert job.machines_found == 5
    simulation.now += 1.1
    await simulation.only.reporter.report()
    await simulation.worker.progress(task, "a" * 6 + "." * (size - 6))
    await simulation.settle()
    await simulation.only.reporter.report()
    assert [each.machines_found for each in simulation.events(1) if isinstance(each, JobProgressed)] == [5, 6]


async def test_progress_counts_chunks_of_other_and_crashed_replicas(simulation: Simulation) -> None:
    """A chunk that ended counts once, also if its replica crashed before it saved the job, and if another one reports."""
    simulation.worker.hold = True
    job = replace(scan_job(1, cidr="127.9.8.0/27", chunk_addresses=4, chunk_count=8, made=8), outbox=())
    await simulation.store.jobs.insert([replace(job, status=JobStatus.RUNNING)])
    chunks = list(plan.chunks(job, 0, 8))
    await simulation.store.chunks.insert(chunks)
    replicas = [simulation.only, simulation.replica()]
    for ended, replica in ((7, 0), (6, 1), (5, 0), (0, 0), (4, 1)):
        stored = replace(chunks[ended], state=ChunkState.STORED, outcomes="aass")
        assert await simulation.store.chunks.save([stored]) == set()  # and not the job
        simulation.now += 2.0
        replicas[replica].reporter.note([1])
        await replicas[replica].reporter.report()
    await simulation.only.reconciler.reconcile([1])
    replicas[1] = simulation.replica()
    found: list[int] = []
    for ended, replica in ((1, 0), (2, 1)):
        simulation.now += 2.0
        await simulation.store.chunks.save([replace(chunks[ended], state=ChunkState.STORED, outcomes="aass")])
        replicas[replica].reporter.note([1])
        await replicas[replica].reporter.report()
        after = (await simulation.store.jobs.get([1]))[1]
        found.append(after.machines_found)
    assert (after.totals.done, found, after.progress) == (1, [12, 14], 87)


async def test_progress_is_published_after_a_failed_attempt(task: ScanChunk, simulation: Simulation) -> None:
    """A round that fails because the database is unavailable loses no progress: the next one publishes it."""
    await claimed(simulation, task)
    await simulation.worker.progress(task, "as..")
    await simulation.settle()
    reporter = simulation.only.reporter
    reporter._jobs, jobs = Broken(), reporter._jobs  # type: ignore[assignment] # only has to be unavailable
    with pytest.raises(DependencyError):
        await reporter.report()
    reporter._jobs = jobs
    await reporter.report()
    assert (await simulation.store.jobs.get([1]))[1].progress == 50


async def test_progress_noted_during_a_report_is_reported_next(simulation: Simulation, task: ScanChunk) -> None:
    """Progress of a job that arrives while its progress is read is published by a later report."""
    await claimed(simulation, task)
    reporter, jobs = simulation.only.reporter, simulation.store.jobs

    class Noting:
        """Notes the job while its progress is saved."""

        async def get(self, ids: set[int]) -> dict[int, ScanJob]:
            return await jobs.get(ids)

        async def save(self, saved: list[ScanJob]) -> set[int]:
            await simulation.worker.progress(task, "aaa.")
            await simulation.settle()
            return await jobs.save(saved)

    await simulation.worker.progress(task, "a...")
    await simulation.settle()
    reporter._jobs = Noting()  # type: ignore[assignment] # as much of a repository as the report needs
    await reporter.report()
    reporter._jobs = jobs
    simulation.now += 2.0
    await reporter.report()
    assert (await jobs.get([1]))[1].progress == 75


class Broken:
    """An unavailable repository."""

    async def get(self, _ids: object) -> None:
        raise DependencyError("unavailable")

    async def save(self, _jobs: object) -> None:
        raise DependencyError("unavailable")


async def test_ended_job_is_not_read_for_a_report(simulation: Simulation, task: ScanChunk) -> None:
    """A job that has ended since the last report costs the next one no query."""
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert await status_of(simulation) is JobStatus.COMPLETED
    simulation.only.reporter._jobs = Broken()  # type: ignore[assignment] # as above
    await simulation.only.reporter.report()


async def test_progress_has_the_expected_end(simulation: Simulation, task: ScanChunk) -> None:
    """The remaining probes take their measured time, in as many slots as the job holds."""
    job = (await simulation.store.jobs.get([1]))[1]
    await simulation.store.jobs.save([replace(job, totals=Totals(tcp=Effort(probes=1_000, seconds=2_000.0)))])
    await claimed(simulation, task)
    await simulation.worker.progress(task, "as..")
    await simulation.settle()
    await simulation.only.reporter.report()
    job = (await simulation.store.jobs.get([1]))[1]
    assert job.eta_seconds == 2.0 * job.plan.probes / 2


async def test_progress_stops_with_the_job(simulation: Simulation, task: ScanChunk) -> None:
    """After the end of a job no progress is stored or published, whatever its workers still report."""
    await claimed(simulation, task)
    await simulation.cancel(1)
    await simulation.settle()
    job, events = (await simulation.store.jobs.get([1]))[1], simulation.events(1)
    simulation.now += 10.0
    await simulation.worker.progress(task, "aaa.")
    await simulation.settle()
    await simulation.only.reporter.report()
    after = (await simulation.store.jobs.get([1]))[1]
    assert replace(after, rev=job.rev, totals=job.totals) == job
    assert after.totals.probes == {"answered": 6}
    assert simulation.events(1) == events


async def test_progress_is_stored_in_the_job(simulation: Simulation, task: ScanChunk) -> None:
    """The job has the same percentage and machines as its events, while it runs and after it has failed."""
    await claimed(simulation, task)
    await simulation.worker.progress(task, "as..")
    await simulation.settle()
    await simulation.only.reporter.report()
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.progress, job.machines_found) == (50, 1)


async def test_refused_addresses_fail_the_job_with_the_reason(simulation: Simulation, task: ScanChunk) -> None:
    """The error of the job contains the reason why a worker refused the policy."""
    await claimed(simulation, task)
    refused = ChunkScanned(
        job_id=1,
        chunk_id="1-0",
        attempt=1,
        worker_id="w-1",
        outcomes="rrrr",
        first_address="127.9.8.0",
        slot_seconds=0.0,
        technique="connect",
        reason="OS detection needs raw packets",
    )
    await simulation.bus.publish(SCAN_RESULTS, [refused])
    await simulation.bus.publish(SCAN_PROGRESS, [refused])
    await simulation.settle()
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.error) == (JobStatus.FAILED, "4 addresses refused: OS detection needs raw packets")
