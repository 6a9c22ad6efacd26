"""The cache of user accounts: its content, reads and writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pytest

from job_orchestrator.domain import fairness
from job_orchestrator.domain.fairness import Account, Accounts
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.account_cache import AccountCache
from job_orchestrator_testing import MemoryStore
from job_orchestrator_testing.repository import MemoryDispatch
from scanfleet.errors import DependencyError


class Counting(MemoryDispatch):
    """Counts its calls, and raises `error` after a charge."""

    calls = 0
    error: Exception | None = None

    async def accounts(self, users: Collection[int]) -> Accounts:
        self.calls += 1
        return await super().accounts(users)

    async def activate_accounts(self, accounts: Iterable[Account], virtual: float) -> None:
        self.calls += 1
        await super().activate_accounts(accounts, virtual)

    async def charge(self, seconds: Mapping[int, float]) -> None:
        self.calls += bool(seconds)
        await super().charge(seconds)
        if self.error:
            raise self.error


class AccountsFixture:
    """The accounts of users 7 and 8, of whom 8 is idle."""

    def __init__(self, *, alone: bool = True) -> None:
        store = MemoryStore()
        store.data.accounts = {7: Account(7, 5.0, active=True), 8: Account(8, 1.0)}
        store.data.virtual = 4.0
        self.dispatch = Counting(store.data)
        self.accounts = AccountCache(self.dispatch, PlatformTime(store.time, lambda: 1.0), lambda: alone)

    async def times(self, *users: int, since: float = 1.0) -> dict[int, float]:
        return {user: account.time for user, account in (await self.accounts.known(users, since)).users.items()}

    async def stored(self) -> dict[int, float]:
        return {
            user: account.time for user, account in (await MemoryDispatch.accounts(self.dispatch, (7, 8))).users.items()
        }


async def test_charges_of_a_second_are_stored_in_one_write() -> None:
    """Forty rounds with a report each cost one read and two writes, and each round sees all charges before it."""
    simulation = AccountsFixture()
    for number in range(1, 41):
        await simulation.accounts.charge({7: 0.1})
        await simulation.accounts.advance((), 4.0 + number)
        assert await simulation.times(7) == {7: pytest.approx(5.0 + number / 10)}
    assert simulation.dispatch.calls == 1
    for _ in range(2):
        await simulation.accounts.store()
    assert simulation.dispatch.calls == 3
    assert (await simulation.stored())[7] == pytest.approx(9.0)
    assert await simulation.times(7) == {7: pytest.approx(9.0)}
    assert (await simulation.dispatch.accounts([])).virtual == 44.0


async def test_accounts_are_read_with_the_held_chunks_or_for_a_new_user() -> None:
    """Charges by other replicas are visible after a read of the held chunks, and for a user whose account was not read."""
    simulation = AccountsFixture()
    await simulation.times(7)
    await MemoryDispatch.charge(simulation.dispatch, {7: 1.0})
    assert await simulation.times(7) == {7: 5.0}
    assert await simulation.times(7, since=1.1) == {7: 6.0}
    await MemoryDispatch.charge(simulation.dispatch, {8: 1.0})
    assert await simulation.times(7, 8) == {7: 6.0, 8: 2.0}


async def test_charges_beside_other_replicas_are_stored_at_once() -> None:
    """Another replica sees a charge before it can miss the ended attempt among the held chunks."""
    simulation = AccountsFixture(alone=False)
    await simulation.times(7)
    await simulation.accounts.charge({7: 1.0})
    assert ((await simulation.stored())[7], await simulation.times(7)) == (6.0, {7: 6.0})
    await simulation.accounts.charge({})
    assert simulation.dispatch.calls == 2


async def test_woken_user_is_charged_once() -> None:
    """Seconds that are not stored yet are part of the time with which a user becomes active, and are not added again."""
    simulation = AccountsFixture()
    await simulation.accounts.charge({8: 9.0})
    known = await simulation.accounts.known([8], 1.0)
    woken = fairness.wake(known, [8])
    await simulation.accounts.advance(woken.values(), 4.0)
    await simulation.accounts.store()
    assert woken[8] == Account(8, 10.0, active=True)
    assert (await simulation.times(8), (await simulation.stored())[8]) == ({8: 10.0}, 10.0)


@pytest.mark.parametrize("stored", [False, True])
async def test_charge_while_a_user_is_woken_is_kept(*, stored: bool) -> None:
    """Seconds that are added after the account was read, stored or not, are added to the time with which a user becomes active."""
    simulation = AccountsFixture()
    await simulation.accounts.charge({8: 9.0})
    woken = fairness.wake(await simulation.accounts.known([8], 1.0), [8])
    await simulation.accounts.charge({8: 1.0})
    if stored:
        await simulation.accounts.store()
    await simulation.accounts.advance(woken.values(), 4.0)
    await simulation.accounts.store()
    assert (await simulation.times(8), (await simulation.stored())[8]) == ({8: 11.0}, 11.0)


async def test_seconds_are_never_stored_twice() -> None:
    """After a failed write, which may have been done, the same seconds are not added again; a stop does not wait for it."""
    simulation = AccountsFixture()
    simulation.dispatch.error = DependencyError("unavailable")
    await simulation.accounts.charge({7: 1.0})
    with pytest.raises(DependencyError):
        await simulation.accounts.store()
    await simulation.accounts.charge({7: 1.0})
    await simulation.accounts.close()
    simulation.dispatch.error = None
    await simulation.accounts.charge({7: 1.0})
    await simulation.accounts.close()
    assert (await simulation.stored())[7] == 8.0
