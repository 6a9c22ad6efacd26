"""Dispatch queued chunks to workers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Final

from job_orchestrator.domain import fairness
from job_orchestrator.domain.fairness import Candidate, Credit, Held
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.account_cache import AccountCache
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.handlers.dispatch.attempt_sender import AttemptSender, Pick
from job_orchestrator.handlers.dispatch.fleet import Fleet
from job_orchestrator.handlers.dispatch.skips import Skips
from scanfleet.runtime.loop import Loop

_LOOK_SECONDS: Final = 0.2  # maximum wait of an idle worker for a chunk that another replica queued
# Minimum interval of rounds: workers have prefetched work, and finished chunks are batched.
_LEAST_SECONDS: Final = 0.025
# Time for a round that has stored its dispatches to publish their assignments before the process stops.
_STOP_SECONDS: Final = 3.0
_EXTRA: Final = 20  # approximate number of prefetched chunks for 2 seconds; more are picked in the next round
_JOINED: Final = 50  # approximate number of one-host chunks that share the nmap of a free slot
_USERS: Final = 64  # users whose chunks are queried at once, those with the lowest virtual time first
_PAGES: Final = 4  # maximum number of pages of users per round
_LATER_SECONDS: Final = 1.0  # interval of queries for users whose chunks cannot start yet
_LATER_PER_SECOND: Final = 1_000  # with more such users the interval is longer, so that rounds reach all of them
_REST_SECONDS: Final = 1.0  # interval of checks for idle users and live workers
_AHEAD_SECONDS: Final = 1.0  # interval of checks for small chunks while every slot is taken, unless chunks were created
_PICKS: Final = 256  # maximum chunks per round
_QUEUED: Final = 128  # maximum chunks read of each of many users, so that a round reads some thousands at most


class Dispatcher:
    """Dispatches chunks to the workers whose partitions this replica owns.

    Args:
        fleet: the workers of this replica and their capacity.
        skips: the jobs and users that are left out.
        sender: stores and publishes the picks of a round.
    """

    def __init__(
        self,
        *,
        dispatch: DispatchRepository,
        accounts: AccountCache,
        held: HeldChunks,
        fleet: Fleet,
        skips: Skips,
        sender: AttemptSender,
        clock: PlatformTime,
    ) -> None:
        self._dispatch = dispatch
        self._accounts = accounts
        self._held = held
        self._fleet = fleet
        self._skips = skips
        self._sender = sender
        self._clock = clock
        self._live: dict[str, Credit] = {}
        self._idle = False
        self._woken = False
        self._live_due = float("-inf")
        self._rest_due = float("-inf")
        self._ahead_due = float("-inf")
        self.loop = Loop("dispatch", _LOOK_SECONDS, self.fill, least=_LEAST_SECONDS, grace=_STOP_SECONDS)

    def wake(self, *, made: Collection[int] = ()) -> None:
        """Run a round immediately: there may be a free slot, or new work of the users whose chunks were `made`."""
        self._woken = True
        if made:
            self._ahead_due = float("-inf")
            self._skips.wake(made)
        self.loop.wake()

    def wake_if_full(self) -> None:
        """Run a round immediately, unless a worker is idle: then the next look finds what can be dispatched."""
        if not self._idle:
            self.wake()

    async def fill(self) -> None:
        """Dispatch queued chunks until there is no chunk or no capacity.

        Unless woken, look only for chunks of other replicas, and only while a worker is or may be idle: a full one announces
        itself when it has capacity again.

        Raises:
            DependencyError: chunks may be dispatched whose assignment was not sent; their leases expire and they are requeued.
        """
        self._held.watch()
        if not self._woken and not await self._is_work_waiting():
            return
        self._woken = False
        while await self._round() and not self.loop.stopping:
            pass

    async def _is_work_waiting(self) -> bool:
        """Return whether chunks wait while a worker is or may be idle."""
        mine = self._fleet.credits()
        self._idle = self._idle and any(credit.slots for credit in mine)
        if not self._idle:
            return False
        if await self._dispatch.waiting_users(raw=any(credit.raw for credit in mine)):
            return True
        await self._deactivate(self._clock.monotonic())
        return False

    async def _round(self) -> bool:
        """Dispatch one round of chunks; return whether another round may dispatch more."""
        now = self._clock.monotonic()
        self._skips.expire()
        mine = self._fleet.credits()
        self._idle = any(credit.slots for credit in mine)
        if not self._idle:
            return False
        held, _ = await asyncio.gather(self._held.known(), self._read_live(now))
        by_worker: defaultdict[str, list[Held]] = defaultdict(list)
        for each in held:
            by_worker[each.token.worker_id].append(each)
        time = self._clock.now()
        credits_ = [fairness.fill(credit, by_worker[credit.worker_id], time) for credit in mine]
        free_slot = any(credit.held < credit.slots for credit in credits_)
        self._idle = free_slot or not self._held.certain
        free = [credit for credit in credits_ if fairness.has_room(credit)]
        if not free_slot and now < self._ahead_due:
            return False  # a moment ago no chunk was small enough to be prefetched
        # Workers with raw packets are served first, from all chunks; the others get only chunks that need no raw
        # packets.
        more = False
        for raw in (True, False):
            # Again, since the first kind's assignments may not be acknowledged yet.
            if workers := [each for each in free if each.raw is raw and self._sender.can_reach(each.worker_id)]:
                more = await self._give(workers, raw=raw) or more
        kinds = {credit.raw for credit in (*mine, *self._live.values())}
        await self._deactivate(now, self._skips.resting(kinds))
        self._ahead_due = float("-inf") if more else now + _AHEAD_SECONDS
        return more

    async def _read_live(self, now: float) -> None:
        """Read the live workers once a second."""
        if now >= self._live_due:
            live = await self._dispatch.live_workers(fairness.LIVE)
            self._live = {credit.instance: credit for credit in live}
            self._live_due = now + _REST_SECONDS

    async def _deactivate(self, now: float, resting: Collection[int] = ()) -> None:
        """Deactivate the accounts of idle users once a second, after a look, which finds those whose chunks start later."""
        if now >= self._rest_due:
            await self._dispatch.deactivate_accounts(resting)
            self._rest_due = now + _REST_SECONDS

    async def _give(self, workers: Sequence[Credit], *, raw: bool) -> bool:
        now = self._clock.now()
        users = [user for user in await self._dispatch.waiting_users(raw=raw) if not self._skips.rests(user, raw=raw)]
        if not users:
            return False
        free = sum(max(0, credit.slots - credit.held) for credit in workers)
        room = min(_PICKS, free * _JOINED + len(workers) * _EXTRA)
        least = min(_QUEUED, free + len(workers) * _EXTRA)
        held = await self._held.known()  # with the chunks that the workers with raw packets just got
        known = await self._accounts.known(users, self._held.read_at)
        accounts = fairness.wake(known, users)
        times = fairness.tags(accounts, held, now)
        waiting = await self._queues(sorted(times, key=times.__getitem__), room, least, now, raw=raw)
        fleet = self._live | {credit.instance: credit for credit in workers}
        of_waiting = {user: times[user] for user in waiting}
        round_ = fairness.Round(workers, of_waiting, fairness.occupied(held), fleet.values())
        picks: list[Pick] = []
        for pick in round_.picks(waiting):
            picks.append(pick)
            if len(picks) == room:
                break
        woken = [account for account in accounts.values() if account != known.users.get(account.user_id)]
        await self._accounts.advance(woken, round_.virtual)
        if not picks:
            return False
        return await self._sender.send(picks) or len(picks) == room

    async def _queues(
        self, users: Sequence[int], room: int, least: int, now: datetime, *, raw: bool
    ) -> Mapping[int, Sequence[Candidate]]:
        """Return the first chunks that may start of the first `users`, which are sorted by virtual time.

        Args:
            users: ids of the users.
            room: number of chunks that all workers can get.
            least: number of chunks that one user can get from this round also beside many others.
            now: the current time.
            raw: whether the workers can send raw packets.
        """
        found: dict[int, Sequence[Candidate]] = {}
        later = self._skips.later
        until = self._clock.monotonic() + max(_LATER_SECONDS, len(users) / _LATER_PER_SECOND)
        for first in range(0, min(len(users), _PAGES * _USERS), _USERS):
            neediest = users[first : first + _USERS]
            limit = max(least, room // len(neediest))
            queues = await asyncio.gather(*(self._queue(user, limit, now, raw=raw) for user in neediest))
            found |= {user: queue for user, queue in zip(neediest, queues, strict=True) if queue}
            without = [user for user in neediest if user not in found]
            # Otherwise these users would fill the next pages.
            later.update(dict.fromkeys(((user, raw) for user in without), until))
            # A user without candidates may only have chunks that start later; other users' chunks can use the slots.
            if not without or sum(map(len, found.values())) >= room:
                break
        return found

    async def _queue(self, user: int, limit: int, now: datetime, *, raw: bool) -> Sequence[Candidate]:
        jobs, skip = await self._skips.jobs(user)
        if jobs is None or jobs:
            queue = await self._dispatch.queue(user, limit, now, raw=raw, jobs=jobs, skip=skip)
            return [self._sender.expect(candidate) for candidate in queue]
        return []
