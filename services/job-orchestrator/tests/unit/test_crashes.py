"""A replica that dies, or loses its database or broker, at any one moment: the outcome is the same.

Every scenario is run once to count the calls on store and bus, then once for each of these calls and each way in which it
can go wrong.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

import pytest

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.ports import Store
from job_orchestrator.domain.totals import EMPTY
from job_orchestrator.main import Orchestrator
from job_orchestrator_testing import MemoryStore, Simulation, scan_policy
from job_orchestrator_testing.repository import MemoryChunks, MemoryJobs
from scanfleet.contracts.messages import CommandAccepted, JobEvent, JobProgressed, JobStatus, Message, ScanChunk
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_EVENTS, SCAN_TASKS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher, Record
from scanfleet_testing.bus import MemoryBus


class Killed(BaseException):
    """The process is gone: no handler can catch this."""


class Moment(enum.Enum):
    """When a call goes wrong: after a part of its effect, or after all of it."""

    HALF = "half"
    AFTER = "after"


class CrashPoint:
    """Lets so many calls through, and breaks one."""

    def __init__(
        self, calls: float = float("inf"), moment: Moment = Moment.AFTER, error: type[BaseException] = Killed
    ) -> None:
        self.left = calls
        self.calls = 0
        self.moment = moment
        self.error = error

    @property
    def is_used(self) -> bool:
        return self.left <= 0

    async def call(self, method: Callable[..., Awaitable[Any]], arguments: list[Any], named: dict[str, Any]) -> Any:
        self.calls += 1
        self.left -= 1
        if self.left != 0:
            return await method(*arguments, **named)
        if self.moment is Moment.HALF and arguments and isinstance(arguments[-1], Sequence):
            arguments[-1] = arguments[-1][: len(arguments[-1]) // 2]
        await method(*arguments, **named)
        raise self.error(f"{getattr(method, '__name__', method)} broke")


class FragileStore:
    """A store whose repositories are behind a crash_point."""

    def __init__(self, store: MemoryStore, crash_point: CrashPoint) -> None:
        self._store = store
        self._crash_point = crash_point

    def __getattr__(self, name: str) -> FragileRepository:
        return FragileRepository(getattr(self._store, name), self._crash_point)


class FragileRepository:
    def __init__(self, repository: Any, crash_point: CrashPoint) -> None:
        self._repository = repository
        self._crash_point = crash_point

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._repository, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            return await self._crash_point.call(method, list(arguments), named)

        return call

    async def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        await self._crash_point.call(self._repository.get, [[]], {})  # stands for the first read
        async for chunk in self._repository.of_job(job_id, first, end):
            yield chunk


class FragileBus:
    """A publisher behind the same crash_point."""

    def __init__(self, bus: MemoryBus, crash_point: CrashPoint) -> None:
        self._bus = bus
        self._crash_point = crash_point

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        await self._crash_point.call(self._bus.publish, [topic, list(messages)], {})


class ImpatientJobs(MemoryJobs):
    """Every event is old."""

    async def with_old_events(self, before: datetime, limit: int, partitions: Collection[int]) -> list[ScanJob]:
        return await super().with_old_events(before + timedelta(days=1), limit, partitions)


class ImpatientChunks(MemoryChunks):
    """Every scanned chunk was asked for long ago."""

    async def overdue(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        return await super().overdue(now + timedelta(days=1), limit, partitions)


class CrashingSimulation(Simulation):
    """A simulation on test doubles that fail; failed work is repeated, by another process if the first one died."""

    def __init__(self, crash_point: CrashPoint) -> None:
        store = MemoryStore()
        store.jobs, store.chunks = ImpatientJobs(store.data), ImpatientChunks(store.data)
        super().__init__(store)
        self.crash_point = crash_point
        self.replicas = [
            self.replica(
                cast(Store, FragileStore(store, crash_point)), cast(Publisher, FragileBus(self.bus, crash_point))
            ),
        ]

    async def hand(self, topic: Topic, records: Sequence[Record]) -> None:
        await self._again(lambda: super(CrashingSimulation, self).hand(topic, records))

    async def step(self, action: Callable[[Orchestrator], Awaitable[object]]) -> None:
        await self._again(lambda: action(self.only))

    async def settle(self) -> None:
        for _ in range(1_000):
            delivered = await self.deliver()
            await self.step(lambda replica: replica.reconciler.work())
            await self.step(lambda replica: replica.dispatcher.fill())
            if not delivered and not self._waiting():
                return
        raise AssertionError("the simulation did not reach a stable state")

    async def start(self) -> None:
        await self._again(super().start)

    async def jobs(self) -> list[ScanJob]:
        """All jobs; their ids may have gaps."""
        listed, _ = await self.store.jobs.page(7, set(), 0, 10)
        found = await self.store.jobs.get([job.id for job in listed])
        return [found[job.id] for job in listed]

    async def mend(self) -> None:
        """After a failure, advance the time until leases, dispatches and sweeps have repaired it."""
        if not self.crash_point.is_used:
            return
        for _ in range(12):
            await self.wait(1, seconds=3.0)
            if not await self.store.jobs.unsettled(0, 1) and await self.jobs():
                return

    async def wait(self, looks: int, *, seconds: float = 1.0) -> None:
        for _ in range(looks):
            self.now += seconds
            for worker in self.workers:
                await worker.announce()
            await self.settle()
            await self._again(self.catch_up)
            await self.step(lambda replica: replica.sweeper.sweep())
            await self.settle()

    async def _again(self, action: Callable[[], Awaitable[object]]) -> None:
        try:
            await action()
        except Killed:
            await self.restart()
            await action()
        except DependencyError:
            await action()


Scenario = Callable[[CrashingSimulation], Awaitable[None]]


async def scan(simulation: CrashingSimulation) -> None:
    """Two jobs are submitted, scanned and completed."""
    await simulation.start_scan("127.9.8.0/30", "127.9.9.0/31", policy=scan_policy(ports="1-3000"))
    await simulation.mend()
    jobs = await simulation.jobs()
    assert [job.status for job in jobs] == [JobStatus.COMPLETED] * 2
    for job in jobs:
        tally = Tally(job, EMPTY)
        async for chunk in simulation.store.chunks.of_job(job.id):
            tally.end(chunk)
        assert tally.accounted
        assert tally.totals == job.totals
        assert (tally.counts["silent"], job.settled) == (job.plan.addresses * job.plan.ports, True)


async def lose(simulation: CrashingSimulation) -> None:
    """A worker fails a chunk, releases it, loses results of it, and gets it done at last."""
    simulation.worker.hold = True
    await simulation.start_scan()
    await simulation.mend()
    await simulation.worker.claim(simulation.worker.tasks[-1])
    await simulation.worker.fail(simulation.worker.tasks[-1], outcomes="a...")
    await simulation.wait(2, seconds=3.0)
    await simulation.mend()
    await simulation.worker.release(simulation.worker.tasks[-1], "a.s.")
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.mend()
    assert simulation.results is not None
    simulation.results.missing[simulation.worker.tasks[-1].chunk_id] = ("127.9.8.1",)
    await simulation.worker.scanned(simulation.worker.tasks[-1])
    simulation.worker.hold = False
    await simulation.worker.announce()
    await simulation.settle()
    await simulation.wait(1, seconds=3.0)
    await simulation.mend()
    (job,) = await simulation.jobs()
    assert (job.status, job.machines_found) == (JobStatus.COMPLETED, 1)


async def cancel(simulation: CrashingSimulation) -> None:
    """A running job of several chunks is cancelled, and its worker is stopped."""
    simulation.worker.hold = True
    await simulation.start_scan("127.9.8.0/24", policy=scan_policy(ports="1-3000"))
    await simulation.mend()
    running = simulation.worker.tasks[-1]
    await simulation.worker.claim(running)
    await simulation.settle()
    await simulation.cancel(running.job_id)
    await simulation.settle()
    await simulation.worker.progress(running, running.outcomes)
    await simulation.settle()
    await simulation.mend()
    (job,) = await simulation.jobs()
    states = [chunk.state async for chunk in simulation.store.chunks.of_job(job.id)]
    assert (job.status, job.settled, job.error) == (JobStatus.CANCELLED, True, "")
    assert states == [ChunkState.CANCELLED] * job.made
    assert (running.chunk_id, running.attempt) in {(stop.chunk_id, stop.attempt) for stop in simulation.worker.stops}


async def fail(simulation: CrashingSimulation) -> None:
    """A job fails because three attempts on its address fail."""
    simulation.worker.hold = True
    await simulation.start_scan("127.9.8.1/32")
    for _ in range(3):
        await simulation.mend()
        await simulation.worker.claim(simulation.worker.tasks[-1])
        await simulation.worker.fail(simulation.worker.tasks[-1])
        await simulation.wait(4, seconds=3.0)
    await simulation.mend()
    (job,) = await simulation.jobs()
    assert (job.status, job.error) == (JobStatus.FAILED, "1 address lost: worker w-1: nmap died")


def check(simulation: CrashingSimulation) -> None:
    """Check the invariants that hold for every observer after any fault."""
    events = [event for event in simulation.bus.messages(SCAN_EVENTS) if isinstance(event, JobEvent)]
    for job_id in {event.job.id for event in events}:
        mine = [event for event in events if event.job.id == job_id]
        by_seq: dict[int, JobEvent] = {}
        for event in mine:
            first = by_seq.setdefault(event.seq, event)
            assert first == event, "two events under one seq"
        first_seen = [event for event in by_seq.values() if not isinstance(event, JobProgressed)]
        assert [event.seq for event in first_seen] == sorted(event.seq for event in first_seen)
        kinds = [type(event).__name__.removeprefix("Job") for event in first_seen]
        assert kinds[0] == "Created"
        assert kinds[1:-1] in (["Started"], [] if kinds[-1] == "Cancelled" else ["Started"])
        assert kinds[-1].lower() == max(by_seq.values(), key=lambda event: event.seq).job.status
        missing = set(range(1, max(by_seq) + 1)) - set(by_seq)
        assert len(missing) <= 3, "only progress may be missing"
    tasks = [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, ScanChunk)]
    tokens = [(task.chunk_id, task.attempt) for task in tasks]
    assert len(tokens) == len(set(tokens)), "one token was sent twice"


# A kill before a call is a kill after the one before it.
@pytest.mark.parametrize(("error", "moment"), [(Killed, Moment.AFTER), (DependencyError, Moment.HALF)])
@pytest.mark.parametrize("scenario", [scan, lose, cancel, fail])
async def test_single_failed_call_changes_no_outcome(
    scenario: Scenario,
    error: type[BaseException],
    moment: Moment,
) -> None:
    """Whichever call of a repository or the bus fails, the jobs end the same, with every event in order."""
    whole = CrashingSimulation(CrashPoint())
    await scenario(whole)
    check(whole)
    for number in range(1, whole.crash_point.calls + 1):
        simulation = CrashingSimulation(CrashPoint(number, moment, error))
        await scenario(simulation)
        check(simulation)


async def test_replies_of_a_repeated_submit_name_the_same_jobs() -> None:
    """After any number of repetitions of a submit, all its replies name the same jobs, and there are no others."""
    count = 40  # more calls than one submit takes
    for moment in Moment:
        for number in range(1, count):
            simulation = CrashingSimulation(CrashPoint(number, moment))
            command = await simulation.submit("127.9.8.0/30", "127.9.9.0/30")
            await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
            replies = simulation.replies(command)
            assert replies
            assert all(isinstance(reply, CommandAccepted) for reply in replies)
            assert len({tuple(job.id for job in reply.jobs) for reply in replies}) == 1
            assert sorted(job.id for job in await simulation.jobs()) == [job.id for job in replies[0].jobs]
