"""Chunks that wait for the slot of a busy worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from job_orchestrator.domain import plan
from job_orchestrator_testing import MemoryStore, Simulation, Worker, scan_policy
from scanfleet.contracts.messages import ScanChunk
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet.scanning.ports import PortSet

START_SECONDS = 2.0  # after which a worker releases a chunk that waits for a slot

Seconds = Callable[[ScanChunk], float]


class BusyWorker(Worker):
    """A worker whose scans take time: it scans in order of arrival, and releases what waits too long for a slot.

    Attributes:
        outcomes: the map of a scanned task.
        begun: each begun task, with the seconds that it takes.
        released: number of chunks that it released.
    """

    def __init__(self, publisher: Publisher, seconds: Seconds, slots: int) -> None:
        super().__init__(publisher, slots=slots, raw=True)
        self.hold = True
        self.outcomes: Callable[[ScanChunk], str] = lambda task: task.outcomes.replace(".", "s")
        self.released = 0
        self.begun: list[tuple[ScanChunk, float]] = []
        self._seconds = seconds
        self._waiting: list[tuple[float, ScanChunk]] = []
        self._running: list[tuple[float, float, ScanChunk]] = []
        self._now = 0.0

    async def handle(self, records: Sequence[Record]) -> None:
        before = len(self.tasks)
        await super().handle(records)
        self._waiting += [(self._now, task) for task in self.tasks[before:]]
        await self.pass_time(0.0)

    async def pass_time(self, seconds: float) -> None:
        self._now += seconds
        for begin, end, task in list(self._running):
            if end <= self._now:
                self._running.remove((begin, end, task))
                await self.scanned(task, self.outcomes(task), slot_seconds=end - begin)
            elif seconds:
                await self.progress(task, task.outcomes)
        for since, task in list(self._waiting):
            if len(self._running) < self.slots:
                self._waiting.remove((since, task))
                self._running.append((self._now, self._now + self._seconds(task), task))
                self.begun.append((task, self._seconds(task)))
            elif self._now - since >= START_SECONDS:
                self._waiting.remove((since, task))
                self.released += 1
                await self.release(task)


class BusySimulation(Simulation):
    """A simulation with one busy worker."""

    def __init__(self, seconds: Seconds, *, slots: int = 2) -> None:
        store = MemoryStore()
        super().__init__(store)
        self.data = store.data
        self.busy = BusyWorker(self.bus, seconds, slots=slots)
        self.workers = [self.busy]

    async def begin(self) -> None:
        await self.start()
        await self.busy.announce()

    async def pass_time(self, seconds: int) -> None:
        """Pass time, one second at a time."""
        for _ in range(seconds):
            await self.busy.pass_time(1.0)
            await self.wait(1)

    def lost(self) -> list[str]:
        """The chunks with lost addresses."""
        return [chunk.id for chunk in self.data.chunks.values() if "l" in chunk.outcomes]


def of_udp(task: ScanChunk) -> bool:
    return task.ports.startswith("U:")


async def test_small_job_behind_slow_chunks_of_another_user_loses_no_address() -> None:
    """A one-port job waits at no cost while a /28 at timing 0 holds every slot, and is not sent to wait at the worker."""
    simulation = BusySimulation(lambda task: 900.0 if task.policy.timing == 0 else 0.2)
    await simulation.begin()
    await simulation.submit("127.9.0.0/28", user_id=7, policy=scan_policy(timing=0, ports="22"))
    await simulation.settle()
    await simulation.submit("127.9.9.1/32", user_id=8)
    await simulation.pass_time(200)
    assert simulation.lost() == []
    assert simulation.busy.released <= 2


async def test_udp_blocks_far_beyond_their_estimate_lose_no_address() -> None:
    """UDP chunks that take 600 s, whatever was measured of the job's TCP chunks, lose no address that waits behind them."""
    simulation = BusySimulation(lambda task: 600.0 if of_udp(task) else 0.5)
    await simulation.begin()
    await simulation.submit("127.9.9.0/29", policy=scan_policy(ports="T:1-1000,U:1-600", timing=3, discovery="none"))
    await simulation.pass_time(200)
    task = next(task for task, _ in simulation.busy.begun if of_udp(task))
    assert task.estimate_seconds == pytest.approx(plan.estimate(task.policy, PortSet.parse(task.ports), 1))
    assert simulation.lost() == []
    assert simulation.busy.released <= 8


async def test_dense_chunks_after_empty_ones_lose_no_address() -> None:
    """Chunks that take 60 s after a window of those that took 1 s lose no address, in a job that is alone on the platform."""

    def empty(task: ScanChunk) -> bool:
        return int(task.chunk_id.split("-")[1]) < plan.WINDOW + 16

    simulation = BusySimulation(lambda task: 1.0 if empty(task) else 60.0, slots=16)
    simulation.busy.outcomes = lambda task: task.outcomes.replace(".", "d" if empty(task) else "a")
    await simulation.begin()
    await simulation.submit("127.8.0.0/16", policy=fill_in(Preset.STANDARD, {}))
    await simulation.pass_time(100)
    task = next(task for task, _ in simulation.busy.begun if not empty(task))
    assert task.estimate_seconds >= plan.estimate(task.policy, PortSet.parse(task.ports), len(task.outcomes)) / 10
    assert simulation.lost() == []
    assert simulation.busy.released <= 8


async def test_chunks_with_few_hosts_are_attempted_whole() -> None:
    """Discovery of 512 addresses of which two are up takes most of the 2 s, and does not count as the pace of these two."""
    simulation = BusySimulation(lambda _: 2.0, slots=1)
    simulation.busy.outcomes = lambda task: task.outcomes.replace(".", "a", 2).replace(".", "d")
    await simulation.begin()
    await simulation.submit("127.8.0.0/19", policy=fill_in(Preset.QUICK, {}))
    await simulation.pass_time(40)
    assert [task.limit for task, _ in simulation.busy.begun] == [None] * 16
