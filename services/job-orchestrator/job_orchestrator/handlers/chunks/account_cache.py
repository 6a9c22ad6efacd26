"""Keep the accounts of users in memory, and store what they advance once a second."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

from job_orchestrator.domain.fairness import Account, Accounts
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime
from scanfleet.errors import DependencyError
from scanfleet.runtime.loop import Loop

_SECONDS: Final = 1.0  # interval of writes, whose charges a killed replica loses; other replicas see a global virtual time of this age


class AccountCache:
    """The accounts as they were last read, with what this replica has added since; the loop stores it.

    Args:
        alone: whether this replica handles the reports on all chunks. Otherwise charges are stored at once: another replica could
            serve a user again whose attempt it no longer counts as held.
    """

    def __init__(self, dispatch: DispatchRepository, clock: PlatformTime, alone: Callable[[], bool]) -> None:
        self._dispatch = dispatch
        self._clock = clock
        self._alone = alone
        self._users: dict[int, Account] = {}
        self._virtual = 0.0
        self._stored_virtual = 0.0
        self._read_at = float("-inf")
        self._charged: defaultdict[int, float] = defaultdict(float)
        """Seconds by user that are not stored yet."""
        self._included: defaultdict[int, float] = defaultdict(float)
        """The part of them that the accounts returned by `known` contain."""
        self._lock = asyncio.Lock()
        self.loop = Loop("accounts", _SECONDS, self.store, vital=False)

    async def charge(self, seconds: Mapping[int, float]) -> None:
        """Add seconds to the accounts of these users.

        Raises:
            DependencyError: the database is unavailable; seconds may be lost.
        """
        for user, time in seconds.items():
            self._charged[user] += time
        if self._charged and not self._alone():
            async with self._lock:
                await self._store_charges()

    async def known(self, users: Collection[int], since: float) -> Accounts:
        """Return the existing accounts of these users; read them if they were last read before the monotonic time `since`.

        Raises:
            DependencyError: the database is unavailable.
        """
        async with self._lock:
            if self._read_at < since or not self._users.keys() >= set(users):
                self._read_at = self._clock.monotonic()
                read = await self._dispatch.accounts(users)
                self._users = dict(read.users)
                self._stored_virtual = read.virtual
                self._virtual = max(self._virtual, read.virtual)
            accounts = [self._users[user] for user in users if user in self._users]
            for user in self._charged.keys() & {each.user_id for each in accounts}:
                self._included[user] += self._charged.pop(user)
            return Accounts(
                {
                    each.user_id: replace(each, time=each.time + self._included.get(each.user_id, 0.0))
                    for each in accounts
                },
                self._virtual,
            )

    async def advance(self, woken: Collection[Account], virtual: float) -> None:
        """Raise the global virtual time, and activate these accounts, as computed from those that are `known`.

        Raises:
            DependencyError: the database is unavailable.
        """
        self._virtual = max(self._virtual, virtual)
        if not woken:
            return
        async with self._lock:
            await self._dispatch.activate_accounts(woken, self._virtual)
            for account in woken:
                self._included.pop(account.user_id, None)  # its time contains them
                stored = self._users.get(account.user_id, account)
                self._users[account.user_id] = replace(account, time=max(account.time, stored.time))

    async def store(self) -> None:
        """Store what was added.

        Raises:
            DependencyError: the database is unavailable; seconds may be lost.
        """
        async with self._lock:
            await self._store_charges()
            if self._virtual > self._stored_virtual:
                await self._dispatch.activate_accounts((), self._virtual)
                self._stored_virtual = self._virtual

    async def close(self) -> None:
        """Store what was added since the loop's last step, if the database is available."""
        with contextlib.suppress(DependencyError):
            await self.store()

    async def _store_charges(self) -> None:
        charged, self._charged = self._charged, defaultdict(float)
        for user, seconds in self._included.items():
            charged[user] += seconds
        self._included.clear()
        await self._dispatch.charge(charged)  # not repeated after an error: it could add the seconds twice
        for user in charged.keys() & self._users.keys():
            self._users[user] = replace(self._users[user], time=self._users[user].time + charged[user])
