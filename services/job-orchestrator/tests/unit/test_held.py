"""The cache of held chunks: its content and reads."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import timedelta

import pytest

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.fairness import Held
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator_testing import MemoryStore, chunk
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import MemoryDispatch
from scanfleet.errors import DependencyError


def dispatched(number: int, attempt: int = 1) -> Chunk:
    return chunk(id=f"1-{number}", index=number, state=ChunkState.DISPATCHED, attempt=attempt, worker_id="w-1")


class Slow(MemoryDispatch):
    """Its answers are taken at once, and returned while `allowed` is set, or raise `error`."""

    reads = 0
    error: Exception | None = None
    allowed: asyncio.Event

    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        self.reads += 1
        held = await super().held(partitions, known)
        await self.allowed.wait()
        if self.error:
            raise self.error
        return held


class HeldFixture:
    """Held chunks on a slow store, with a clock that the test sets."""

    def __init__(self, *, alone: bool = True) -> None:
        self.now = 0.0
        self.store = MemoryStore()
        self.dispatch = Slow(self.store.data)
        self.dispatch.allowed = asyncio.Event()
        self.dispatch.allowed.set()
        self.clock = PlatformTime(self.store.time, lambda: self.now)
        self.leaderless: set[int] = set()
        self.held = HeldChunks(self.dispatch, self.clock, lambda: alone, lambda: self.leaderless, 30.0)

    async def ids(self) -> set[str]:
        return {each.token.chunk_id for each in await self.held.known()}

    async def reading(self) -> asyncio.Task[set[str]]:
        """A read whose answer is taken and not returned yet."""
        self.held.expire()
        self.dispatch.allowed.clear()
        task = asyncio.create_task(self.ids())
        await asyncio.sleep(0)
        assert not task.done()
        return task


@pytest.mark.parametrize(
    ("alone", "count", "fresh", "stale"), [(True, 5, 1.9, 2.0), (False, 5, 0.09, 0.1), (False, 5_000, 0.4, 0.5)]
)
async def test_cached_chunks_above_their_maximum_age_are_read_again(
    *, alone: bool, count: int, fresh: float, stale: float
) -> None:
    """The only replica reads every two seconds, one of several ten times a second, but at most a tenth of the time."""
    fixture = HeldFixture(alone=alone)
    await fixture.store.chunks.insert([dispatched(number) for number in range(count)])
    assert len(await fixture.ids()) == count
    fixture.now = fresh
    await fixture.ids()
    assert fixture.dispatch.reads == 1
    fixture.now = stale
    await fixture.ids()
    assert fixture.dispatch.reads == 2


@pytest.mark.proves("F33", "G17")
async def test_chunk_without_a_leader_of_its_reports_is_not_held_after_a_lease() -> None:
    """A chunk whose partition has had no leader for a whole lease occupies no slot, and does again when a leader is back."""
    fixture = HeldFixture()
    await fixture.store.chunks.insert([dispatched(0), replace(dispatched(1), partition=dispatched(0).partition + 1)])
    fixture.leaderless = {dispatched(0).partition}
    fixture.held.watch()
    for now, held in ((0.0, {"1-0", "1-1"}), (30.0, {"1-0", "1-1"}), (30.1, {"1-1"})):
        fixture.now = now
        assert await fixture.ids() == held
    fixture.leaderless = set()
    assert await fixture.ids() == {"1-0", "1-1"}
    fixture.held.watch()
    fixture.leaderless = {dispatched(0).partition}
    assert await fixture.ids() == {"1-0", "1-1"}


async def test_own_changes_need_no_read() -> None:
    """Dispatched chunks are added and ended ones removed, but not those that were dispatched again."""
    fixture = HeldFixture()
    await fixture.ids()
    fixture.held.add([dispatched(0), dispatched(1), dispatched(2, attempt=2)])
    fixture.held.end(dispatched(1))
    fixture.held.end(dispatched(2))
    assert await fixture.ids() == {"1-0", "1-2"}
    assert fixture.dispatch.reads == 1


async def test_changes_during_a_read_are_kept() -> None:
    """A chunk that ends while the held ones are read does not return, and one that is dispatched is not lost."""
    fixture = HeldFixture()
    await fixture.store.chunks.insert([dispatched(0)])
    read = await fixture.reading()
    fixture.held.end(dispatched(0))
    fixture.held.add([dispatched(1)])
    fixture.dispatch.allowed.set()
    assert await read == {"1-1"}


async def test_step_of_the_platforms_clock_does_not_count_as_elapsed_time() -> None:
    """A chunk counts from the step on if it was dispatched before; later ones, and those without a time, do not change."""
    fixture = HeldFixture()
    times = [THEN - timedelta(hours=3), THEN + timedelta(seconds=1), None]
    await fixture.store.chunks.insert([replace(dispatched(n), dispatched_at=at) for n, at in enumerate(times)])
    assert [each.dispatched_at for each in await fixture.held.known()] == times
    fixture.clock.stepped_at = THEN
    assert [each.dispatched_at for each in await fixture.held.known()] == [THEN, *times[1:]]


async def test_expire_during_a_read_reads_again() -> None:
    """After a lost race the chunks are read again, even if a read was under way; so they are after a failed read."""
    fixture = HeldFixture()
    read = await fixture.reading()
    fixture.held.expire()
    fixture.dispatch.allowed.set()
    await read
    await fixture.ids()
    assert fixture.dispatch.reads == 2
    fixture.held.expire()
    fixture.dispatch.error = DependencyError("unavailable")
    with pytest.raises(DependencyError):
        await fixture.ids()
    fixture.dispatch.error = None
    await fixture.ids()
    assert fixture.dispatch.reads == 4
