"""Queued and held chunks, users' accounts and workers in memory."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from job_orchestrator.domain.chunk import HELD, MAX_DELAY, OPEN, Chunk, ChunkState
from job_orchestrator.domain.fairness import KEEP_IDLE, Account, Accounts, Candidate, Credit, Held
from job_orchestrator_testing.repository.data import MemoryRepository


class MemoryDispatch(MemoryRepository):
    """A `DispatchRepository`."""

    async def waiting_users(self, *, raw: bool) -> list[int]:
        return sorted({chunk.user_id for chunk in self._queued(raw=raw)})

    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        jobs: Collection[int] | None = None,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        mine = (
            chunk
            for chunk in self._queued(raw=raw)
            if chunk.user_id == user_id
            and (jobs is None or chunk.job_id in jobs)
            and chunk.job_id not in skip
            and not (chunk.not_before and now < chunk.not_before <= now + MAX_DELAY)
        )
        return [
            Candidate(
                chunk.id,
                user_id,
                chunk.job_id,
                chunk.estimate,
                chunk.needs_raw,
                chunk.failed_by,
                chunk.no_route,
                chunk.first_address,
                len(chunk.outcomes),
                chunk.port_count,
            )
            for chunk in sorted(mine, key=lambda chunk: chunk.turn)[:limit]
        ]

    async def first_turns(self, users: Collection[int]) -> dict[int, int]:
        def lowest(states: Collection[ChunkState]) -> dict[int, int]:
            turns: dict[int, int] = {}
            for chunk in self._data.chunks.values():
                if chunk.state in states and chunk.user_id in users:
                    turns[chunk.user_id] = min(chunk.turn, turns.get(chunk.user_id, chunk.turn))
            return turns

        return lowest(OPEN - {ChunkState.QUEUED}) | lowest({ChunkState.QUEUED})

    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        held = (chunk for chunk in self._data.chunks.values() if chunk.state in HELD)
        mine = (chunk for chunk in held if partitions is None or chunk.partition in partitions)
        attempts = {id_: each.token.attempt for id_, each in (known or {}).items()}
        return [known[each.id] if known and attempts.get(each.id) == each.attempt else Held.of(each) for each in mine]

    async def accounts(self, users: Collection[int]) -> Accounts:
        known = {user: account for user, account in self._data.accounts.items() if account.active or user in users}
        return Accounts(known, self._data.virtual)

    async def deactivate_accounts(self, left_out: Collection[int] = ()) -> None:
        busy = {
            chunk.user_id
            for chunk in self._data.chunks.values()
            if chunk.state in HELD or (chunk.state is ChunkState.QUEUED and chunk.user_id not in left_out)
        }
        now = time.monotonic()
        idle = {user for user, account in self._data.accounts.items() if account.active and user not in busy}
        self._data.idle |= dict.fromkeys(idle, now)
        self._data.accounts |= {user: replace(self._data.accounts[user], active=False) for user in idle}
        if idle:
            before = now - KEEP_IDLE.total_seconds()
            self._data.accounts = {
                user: account
                for user, account in self._data.accounts.items()
                if account.active
                or account.time > self._data.virtual
                or self._data.idle.get(user, float("-inf")) >= before
            }

    async def activate_accounts(self, accounts: Iterable[Account], virtual: float) -> None:
        self._data.virtual = max(self._data.virtual, virtual)
        for account in accounts:
            time_ = max(account.time, self._data.accounts.get(account.user_id, account).time)
            self._data.accounts[account.user_id] = Account(account.user_id, time_, active=True)

    async def charge(self, seconds: Mapping[int, float]) -> None:
        for user, more in seconds.items():
            account = self._data.accounts.get(user, Account(user))
            self._data.accounts[user] = replace(account, time=account.time + more)

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        self._data.workers |= {worker.instance: (worker, time.monotonic()) for worker in workers}

    async def live_workers(self, within: timedelta) -> list[Credit]:
        since = time.monotonic() - within.total_seconds()
        return [
            replace(worker, partition=-1)
            for worker, seen in self._data.workers.values()
            if worker.slots and seen > since
        ]

    def _queued(self, *, raw: bool) -> list[Chunk]:
        queued = (chunk for chunk in self._data.chunks.values() if chunk.state is ChunkState.QUEUED)
        return [chunk for chunk in queued if raw or not chunk.needs_raw]
