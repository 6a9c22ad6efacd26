"""Invariants of jobs and chunks under random sequences of events and faults."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from job_orchestrator.domain import chunk as chunks_
from job_orchestrator.domain import job as jobs_
from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import HELD, MAX_FAILURES, Chunk, ChunkState, WorkerReport
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.ports import ChunkRepository, JobRepository, Store
from job_orchestrator.domain.totals import EMPTY
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import KEYS, MemoryStore, Simulation, Worker, scan_policy
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    ChunkClaimed,
    ChunkIncomplete,
    ChunkProgressed,
    ChunkScanned,
    ChunkStored,
    CommandAccepted,
    FencingToken,
    JobEvent,
    JobProgressed,
    JobStatus,
    ScanChunk,
    StopChunk,
)
from scanfleet.contracts.messages.topics import (
    SCAN_COMMANDS,
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_REPLIES,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_TASKS,
    SCAN_WORKERS,
)
from scanfleet.runtime import mongo
from scanfleet.runtime.bus import Record

_T = TypeVar("_T")

TOPICS = (SCAN_COMMANDS, SCAN_WORKERS, SCAN_PROGRESS, SCAN_STORED, SCAN_TASKS, SCAN_RESULTS)
REPLICAS = 2
MOST_JOBS = 3  # few jobs with much life in them
LOOKS = 100  # after the last fault: three leases and what is between them


class Inspector:
    """A store that lets no save pass that breaks a rule."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.jobs = InspectedJobs(store.jobs)
        self.chunks = InspectedChunks(store.chunks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class InspectedJobs:
    """Every event is old."""

    def __init__(self, jobs: JobRepository) -> None:
        self._jobs = jobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def with_old_events(self, before: datetime, limit: int, partitions: Collection[int]) -> list[ScanJob]:
        return await self._jobs.with_old_events(before + timedelta(days=1), limit, partitions)

    async def save(self, jobs: Sequence[ScanJob]) -> set[int]:
        before = await self._jobs.get([job.id for job in jobs])
        losers = await self._jobs.save(jobs)
        for after in jobs:
            if after.id not in losers:
                self._check_job(before[after.id], after)
        return losers

    @staticmethod
    def _check_job(before: ScanJob, after: ScanJob) -> None:
        if before.status is not after.status:
            ways = set(jobs_.TABLE[before.status].values())
            if before.status is JobStatus.PENDING:  # a short job starts and ends in one save
                ways |= set(jobs_.TABLE[JobStatus.RUNNING].values())
            assert after.status in ways
        internal: dict[str, Any] = {"outbox": (), "rev": 0, "settled": False, "totals": EMPTY, "seconds_left": 0.0}
        if before.final:
            assert replace(before, **internal) == replace(after, **internal), "a final job changed"
        internal |= {"made": 0, "turn": 0}
        if replace(before, **internal) != replace(after, **internal):
            assert after.seq > before.seq
        assert after.progress >= before.progress
        assert after.machines_found >= before.machines_found
        assert after.end_time is None or after.end_time >= (after.start_time or after.created_at)
        assert (after.progress == 100) is (after.status is JobStatus.COMPLETED)
        assert bool(after.error) is (after.status is JobStatus.FAILED)


class InspectedChunks:
    """No chunk was asked for lately."""

    def __init__(self, chunks: ChunkRepository) -> None:
        self._chunks = chunks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chunks, name)

    async def overdue(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        return await self._chunks.overdue(now + timedelta(days=1), limit, partitions)

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        before = await self._chunks.get([chunk.id for chunk in chunks])
        losers = await self._chunks.save(chunks)
        for after in chunks:
            if after.id not in losers:
                self._check_chunk(before[after.id], after)
        return losers

    @staticmethod
    def _check_chunk(before: Chunk, after: Chunk) -> None:
        if before.state is not after.state:
            assert any(after.state in ends for ends in chunks_.TABLE[before.state].values())
        if before.state is ChunkState.STORED:
            assert _without_ends(before, rev=0) == _without_ends(after, rev=0), "a final chunk changed"
        assert after.attempt >= before.attempt
        assert after.failures <= MAX_FAILURES
        if after.state in {ChunkState.SCANNED, ChunkState.STORED}:
            assert after.blank == 0


def _without_ends(chunk: Chunk, **free: Any) -> Chunk:
    """Return the chunk without the ends of its attempts, which their records take however late."""
    attempts = tuple(replace(each, ended=None, how="", run=None) for each in chunk.attempts)
    return replace(chunk, attempts=attempts, **free)


class Life(RuleBasedStateMachine):
    """Users, workers, result-store, broker and replicas act at random; messages are lost, duplicated and reordered."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.pending: list[Record] = []
        self.past: list[Record] = []
        self.tasks: list[ScanChunk] = []
        self.scanned: list[ChunkScanned] = []
        self.asked: list[tuple[str, int]] = []
        self.expired: set[str] = set()
        self.simulation: Simulation

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(coroutine)

    async def make_store(self) -> Store:
        return MemoryStore()

    async def drop_store(self) -> None: ...

    @initialize()
    def begin(self) -> None:
        async def begin() -> None:
            store = cast(Store, Inspector(await self.make_store()))
            self.simulation = Simulation(store, replicas=REPLICAS)
            self.simulation.workers = [Worker(self.simulation.bus, f"w-{n}", slots=2) for n in range(2)]
            await self.simulation.start()

        self.run(begin())
        self.submit(7, 2, "22")
        self.announce(0)
        self.announce(1)
        self.go_on()

    # Users

    @rule(user=st.sampled_from([7, 8]), subnets=st.integers(1, 2), ports=st.sampled_from(["22", "1-4000"]))
    def submit(self, user: int, subnets: int, ports: str) -> None:
        if len(self.run(self.jobs())) > MOST_JOBS:
            return
        cidrs = ["127.9.8.0/31", "127.9.9.4/32"][:subnets]
        command = self.run(self.simulation.submit(*cidrs, user_id=user, policy=scan_policy(ports=ports)))
        self.asked.append((command, user))

    @rule(data=st.data(), really=st.sampled_from([False, False, True]))
    def cancel(self, data: st.DataObject, really: bool) -> None:
        if really and (jobs := self.run(self.jobs())):
            job = data.draw(st.sampled_from(jobs))
            self.asked.append((self.run(self.simulation.cancel(job.id, job.user_id)), job.user_id))

    @rule(data=st.data(), number=st.integers(0, REPLICAS - 1))
    def give_up(self, data: st.DataObject, number: int) -> None:
        """The gateway received no reply in time; most likely to the last command."""
        command, user = data.draw(st.sampled_from(self.asked[-1:]) | st.sampled_from(self.asked))
        if self.run(self.simulation.replicas[number].commands.expire(command, user)) is None:
            self.expired.add(command)

    # Broker

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any of what is under way, in any order, some of it again."""
        self.collect()
        if not (records := self.pending + self.past):
            return
        chosen = data.draw(st.lists(st.sampled_from(range(len(records))), min_size=1, max_size=8))
        self.hand([records[index] for index in chosen])

    @rule()
    def go_on(self) -> None:
        """All that is under way arrives, and what comes of it."""
        for _ in range(3):
            self.collect()
            self.hand(list(self.pending))
            for number in range(REPLICAS):
                self.act(number)
        self.collect()

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Anything but a command."""
        self.collect()
        lost = [record for record in self.pending if record.topic != SCAN_COMMANDS.name]
        if lost:
            self.pending.remove(data.draw(st.sampled_from(lost)))

    # Workers and result-store

    @rule(number=st.integers(0, 1))
    def announce(self, number: int) -> None:
        self.run(self.simulation.workers[number].announce())

    @rule(
        data=st.data(),
        what=st.sampled_from(["claim", "progress", "scanned", "release", "unacknowledged", "fail"]),
        codes=st.text("asdtr.", min_size=2, max_size=2),
        delivered=st.sampled_from([True, True, False]),
    )
    def work(self, data: st.DataObject, what: str, codes: str, delivered: bool) -> None:
        """A worker reports on any task that it has received, most likely on one of the last."""
        if not self.tasks:
            return
        task = data.draw(st.sampled_from(self.tasks[-4:]) | st.sampled_from(self.tasks))
        worker = self.simulation.workers[int(task.worker_id[-1])]
        outcomes = "".join(news if known == "." else known for known, news in zip(task.outcomes, codes, strict=False))
        actions: dict[str, Callable[[], Awaitable[None]]] = {
            "claim": lambda: worker.claim(task),
            "progress": lambda: worker.progress(task, outcomes),
            "scanned": lambda: worker.scanned(task, outcomes.replace(".", "s")),
            "release": lambda: worker.release(task, outcomes),
            "unacknowledged": lambda: worker.release(task, outcomes, unacknowledged=True),
            "fail": lambda: worker.fail(task, outcomes=outcomes),
        }

        async def act() -> None:
            await actions[what]()

        self.run(act())
        if delivered:
            self.go_on()

    @rule(data=st.data(), complete=st.booleans(), delivered=st.booleans())
    def store_results(self, data: st.DataObject, complete: bool, delivered: bool) -> None:
        if not self.scanned:
            return
        scanned = data.draw(st.sampled_from(self.scanned))
        answer: ChunkStored | ChunkIncomplete
        if complete:
            answer = ChunkStored(job_id=scanned.job_id, chunk_id=scanned.chunk_id, outcomes=scanned.outcomes)
        else:
            answer = ChunkIncomplete(
                job_id=scanned.job_id,
                chunk_id=scanned.chunk_id,
                attempt=scanned.attempt,
                worker_id=scanned.worker_id,
                addresses=(scanned.first_address,),
            )
        self.run(self.simulation.bus.publish(SCAN_STORED, [answer]))
        if delivered:
            self.go_on()

    # Time and replicas

    @rule(looks=st.integers(1, 12))
    def wait(self, looks: int) -> None:
        async def wait() -> None:
            for _ in range(looks):
                self.simulation.now += 3.0
                await self.simulation.catch_up()

        self.run(wait())

    @rule(hours=st.sampled_from([-3, -1, 2, 4]))
    def step_clock(self, hours: int) -> None:
        """The database's clock steps; neither a lease, nor an order, nor a delay follows it."""
        self.simulation.step_clock(timedelta(hours=hours))

    @rule(number=st.integers(0, REPLICAS - 1))
    def sweep(self, number: int) -> None:
        self.run(self.simulation.replicas[number].sweeper.sweep())

    @rule(number=st.integers(0, REPLICAS - 1))
    def act(self, number: int) -> None:
        """Run the periodic steps of a replica."""

        async def act() -> None:
            replica = self.simulation.replicas[number]
            await replica.reconciler.work()
            await replica.dispatcher.fill()

        self.run(act())

    @rule(number=st.integers(0, REPLICAS - 1))
    def restart(self, number: int) -> None:
        self.run(self.simulation.restart(number))

    # Invariants

    @invariant()
    def the_ledger_adds_up(self) -> None:
        async def check() -> None:
            for job in await self.jobs():
                stored = {each.id: each async for each in self.simulation.store.chunks.of_job(job.id)}
                planned = [each.id for each in plan.chunks(job, 0, job.plan.chunk_count)]
                assert list(stored) == planned[: len(stored)]
                whole, ended = Tally(job, EMPTY), Tally(job, EMPTY)
                for each in stored.values():
                    whole.add(each)
                    if each.index < job.totals.done:
                        ended.end(each)
                assert sum(whole.counts.values()) == job.plan.addresses * job.plan.ports
                assert min(whole.counts.values()) >= 0
                if job.status is not JobStatus.CANCELLED or job.settled:
                    assert ended.totals == job.totals
                if job.status is JobStatus.COMPLETED:
                    assert whole.accounted
                    assert {each.state for each in stored.values()} == {ChunkState.STORED}
                    assert len(stored) == job.plan.chunk_count

        if hasattr(self, "simulation"):
            self.run(check())

    @invariant()
    def events_come_in_order(self) -> None:
        if not hasattr(self, "simulation"):
            return
        seen: dict[int, dict[int, JobEvent]] = {}
        for event in self.simulation.bus.messages(SCAN_EVENTS):
            assert isinstance(event, JobEvent)
            first = seen.setdefault(event.job.id, {}).setdefault(event.seq, event)
            assert first == event
        for by_seq in seen.values():
            lives = [event for event in by_seq.values() if not isinstance(event, JobProgressed)]
            assert [event.seq for event in lives] == sorted(event.seq for event in lives)
            statuses = [event.job.status for event in lives]
            assert statuses[0] is JobStatus.PENDING
            for before, after in pairwise(statuses):
                assert after in jobs_.TABLE[before].values(), "an event is missing"

    @invariant()
    def no_token_is_given_twice(self) -> None:
        if hasattr(self, "simulation"):
            tasks = [each for each in self.simulation.bus.messages(SCAN_TASKS) if isinstance(each, ScanChunk)]
            tokens = [(task.chunk_id, task.attempt) for task in tasks]
            assert len(tokens) == len(set(tokens))

    @invariant()
    def nothing_comes_of_what_expired(self) -> None:
        if hasattr(self, "simulation"):
            jobs = self.run(self.jobs())
            assert not self.expired & ({job.command_id for job in jobs} | {job.cancel_command for job in jobs})
            replies = self.simulation.bus.messages(SCAN_REPLIES)
            assert not self.expired & {each.command_id for each in replies if isinstance(each, CommandAccepted)}

    def teardown(self) -> None:
        """After all dependencies have recovered, every job ends, even if the clock was set back."""

        async def heal() -> None:
            self.simulation.step_clock(-timedelta(hours=5))
            await self.simulation.start()
            await self.simulation.settle()
            await self.simulation.wait(LOOKS, seconds=3.0)
            for job in await self.jobs():
                assert (job.final, job.settled, job.outbox) == (True, True, ())

        try:
            if hasattr(self, "simulation"):
                self.collect()
                self.hand(list(self.pending))
                self.run(heal())
                self.the_ledger_adds_up()
                self.events_come_in_order()
                self.nothing_comes_of_what_expired()
                self.run(self.drop_store())
        finally:
            self.runner.close()

    async def jobs(self) -> list[ScanJob]:
        listed = [job.id for user in (7, 8) for job in (await self.simulation.store.jobs.page(user, set(), 0, 100))[0]]
        found = await self.simulation.store.jobs.get(listed)
        return [found[id_] for id_ in sorted(listed)]

    def collect(self) -> None:
        """Note what was sent, as what is under way."""
        for topic in TOPICS:
            self.pending += self.simulation.take(topic)

    def hand(self, records: Sequence[Record]) -> None:
        for topic in TOPICS:
            batch = [record for record in records if record.topic == topic.name]
            if topic is SCAN_TASKS:
                self.tasks += [each.message for each in batch if isinstance(each.message, ScanChunk)]
            elif topic is SCAN_RESULTS:
                self.scanned += [each.message for each in batch if isinstance(each.message, ChunkScanned)]
            elif topic is SCAN_PROGRESS:
                self.run(self.deliver_reports(batch))
            else:
                self.run(self.simulation.hand(topic, batch))
        for record in records:
            if record in self.pending:
                self.pending.remove(record)
                self.past.append(record)

    async def deliver_reports(self, batch: Sequence[Record]) -> None:
        """Deliver reports: one that is not of a chunk's holder changes no state, and its scan is stopped."""
        reports = [each.message for each in batch if isinstance(each.message, WorkerReport)]
        before = await self.simulation.store.chunks.get({report.chunk_id for report in reports})
        tasks = len(self.simulation.bus.messages(SCAN_TASKS))
        await self.simulation.hand(SCAN_PROGRESS, batch)
        for after in (await self.simulation.store.chunks.get(before)).values():
            chunk = before[after.id]
            current = chunk.token in {report.token for report in reports}
            if current and chunk.state in HELD:
                continue
            free: dict[str, Any] = {"rev": 0}
            if current and chunk.state is ChunkState.CANCELLED:  # it takes the map of what was done before
                free["outcomes"] = ""
            cancelled = replace(chunk, state=ChunkState.CANCELLED)  # because of its job
            assert _without_ends(after, **free) in [_without_ends(each, **free) for each in (chunk, cancelled)], (
                "it counts"
            )
        held = {chunk.token for chunk in before.values() if chunk.state in HELD}
        scanning = {each.token for each in reports if isinstance(each, ChunkClaimed | ChunkProgressed)}
        if unstopped := scanning - held - self.stopped(tasks):
            # Another replica has ended these attempts since the last check of the leases: their next heartbeats are answered.
            await self.simulation.catch_up()
            await self.simulation.hand(
                SCAN_PROGRESS, [each for each in batch if isinstance(each.message, ChunkProgressed)]
            )
            assert unstopped <= self.stopped(tasks)

    def stopped(self, first: int) -> set[FencingToken]:
        """The attempts that were stopped since so many tasks were sent."""
        return {each.token for each in self.simulation.bus.messages(SCAN_TASKS)[first:] if isinstance(each, StopChunk)}


@pytest.mark.proves("G1", "G2", "G4", "G5", "G6", "G7")
def test_any_history_in_memory_keeps_the_invariants() -> None:
    """Any sequence of submits, reports, losses, restarts and cancels keeps every invariant, and all jobs end."""
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=60,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),  # a history is as long as it is
        ),
    )


@pytest.mark.proves("G1", "G2", "G4", "G5", "G6", "G7")
@pytest.mark.integration
def test_any_history_on_mongodb_keeps_the_invariants(mongodb: str) -> None:
    """The same rules hold on real documents."""

    class LifeOnMongo(Life):
        async def make_store(self) -> Store:
            self.database = mongo.connect(mongodb, f"life-{uuid4().hex[:12]}")
            store = MongoStore(self.database, KEYS, now=utc_now)
            await store.prepare()
            return store

        async def drop_store(self) -> None:
            await self.database.client.drop_database(self.database.name)
            self.database.client.close()

    run_state_machine_as_test(
        LifeOnMongo,
        settings=settings(
            max_examples=5,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),  # as above
        ),
    )
