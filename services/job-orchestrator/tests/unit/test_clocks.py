"""The cache of user clocks: its content, reads and writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pytest

from job_orchestrator.domain import fairness
from job_orchestrator.domain.fairness import Clock, Clocks
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.clocks import UserClocks
from job_orchestrator_testing import MemoryStore
from job_orchestrator_testing.repository import MemoryDispatch
from scanfleet.errors import DependencyError


class Counting(MemoryDispatch):
    """Counts its calls, and raises `error` after a charge."""

    calls = 0
    error: Exception | None = None

    async def clocks(self, users: Collection[int]) -> Clocks:
        self.calls += 1
        return await super().clocks(users)

    async def wake_clocks(self, clocks: Iterable[Clock], virtual: float) -> None:
        self.calls += 1
        await super().wake_clocks(clocks, virtual)

    async def charge(self, seconds: Mapping[int, float]) -> None:
        self.calls += bool(seconds)
        await super().charge(seconds)
        if self.error:
            raise self.error


class ClocksFixture:
    """The clocks of users 7 and 8, of whom 8 is idle."""

    def __init__(self, *, alone: bool = True) -> None:
        store = MemoryStore()
        store.data.clocks = {7: Clock(7, 5.0, active=True), 8: Clock(8, 1.0)}
        store.data.virtual = 4.0
        self.dispatch = Counting(store.data)
        self.clocks = UserClocks(self.dispatch, PlatformTime(store.time, lambda: 1.0), lambda: alone)

    async def times(self, *users: int, since: float = 1.0) -> dict[int, float]:
        return {user: clock.time for user, clock in (await self.clocks.known(users, since)).users.items()}

    async def stored(self) -> dict[int, float]:
        return {user: clock.time for user, clock in (await MemoryDispatch.clocks(self.dispatch, (7, 8))).users.items()}


async def test_charges_of_a_second_are_stored_in_one_write() -> None:
    """Forty rounds with a report each cost one read and two writes, and each round sees all charges before it."""
    simulation = ClocksFixture()
    for number in range(1, 41):
        await simulation.clocks.charge({7: 0.1})
        await simulation.clocks.advance((), 4.0 + number)
        assert await simulation.times(7) == {7: pytest.approx(5.0 + number / 10)}
    assert simulation.dispatch.calls == 1
    for _ in range(2):
        await simulation.clocks.store()
    assert simulation.dispatch.calls == 3
    assert (await simulation.stored())[7] == pytest.approx(9.0)
    assert await simulation.times(7) == {7: pytest.approx(9.0)}
    assert (await simulation.dispatch.clocks([])).virtual == 44.0


async def test_clocks_are_read_with_the_held_chunks_or_for_a_new_user() -> None:
    """Charges by other replicas are visible after a read of the held chunks, and for a user whose clock was not read."""
    simulation = ClocksFixture()
    await simulation.times(7)
    await MemoryDispatch.charge(simulation.dispatch, {7: 1.0})
    assert await simulation.times(7) == {7: 5.0}
    assert await simulation.times(7, since=1.1) == {7: 6.0}
    await MemoryDispatch.charge(simulation.dispatch, {8: 1.0})
    assert await simulation.times(7, 8) == {7: 6.0, 8: 2.0}


async def test_charges_beside_other_replicas_are_stored_at_once() -> None:
    """Another replica sees a charge before it can miss the ended attempt among the held chunks."""
    simulation = ClocksFixture(alone=False)
    await simulation.times(7)
    await simulation.clocks.charge({7: 1.0})
    assert ((await simulation.stored())[7], await simulation.times(7)) == (6.0, {7: 6.0})
    await simulation.clocks.charge({})
    assert simulation.dispatch.calls == 2


async def test_woken_user_is_charged_once() -> None:
    """Seconds that are not stored yet are part of the time with which a user becomes active, and are not added again."""
    simulation = ClocksFixture()
    await simulation.clocks.charge({8: 9.0})
    known = await simulation.clocks.known([8], 1.0)
    woken = fairness.wake(known, [8])
    await simulation.clocks.advance(woken.values(), 4.0)
    await simulation.clocks.store()
    assert woken[8] == Clock(8, 10.0, active=True)
    assert (await simulation.times(8), (await simulation.stored())[8]) == ({8: 10.0}, 10.0)


@pytest.mark.parametrize("stored", [False, True])
async def test_charge_while_a_user_is_woken_is_kept(*, stored: bool) -> None:
    """Seconds that are added after the clock was read, stored or not, are added to the time with which a user becomes active."""
    simulation = ClocksFixture()
    await simulation.clocks.charge({8: 9.0})
    woken = fairness.wake(await simulation.clocks.known([8], 1.0), [8])
    await simulation.clocks.charge({8: 1.0})
    if stored:
        await simulation.clocks.store()
    await simulation.clocks.advance(woken.values(), 4.0)
    await simulation.clocks.store()
    assert (await simulation.times(8), (await simulation.stored())[8]) == ({8: 11.0}, 11.0)


async def test_seconds_are_never_stored_twice() -> None:
    """After a failed write, which may have been done, the same seconds are not added again; a stop does not wait for it."""
    simulation = ClocksFixture()
    simulation.dispatch.error = DependencyError("unavailable")
    await simulation.clocks.charge({7: 1.0})
    with pytest.raises(DependencyError):
        await simulation.clocks.store()
    await simulation.clocks.charge({7: 1.0})
    await simulation.clocks.close()
    simulation.dispatch.error = None
    await simulation.clocks.charge({7: 1.0})
    await simulation.clocks.close()
    assert (await simulation.stored())[7] == 8.0
