"""Choose the next chunk: start-time fair queueing between users, by slot time.

Every user has a virtual time in slot seconds: the time of their finished attempts, plus the elapsed or expected time of the
held ones, whichever is longer. The user with the lowest virtual time is served first. A global virtual time follows the user
being served, and a user who becomes active starts at it, so that neither idle time nor past usage counts. The orchestrator
measures all times. See "Start-Time Fair Queuing" (Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from pydantic import AwareDatetime

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import Chunk
from scanfleet.contracts.messages import FencingToken, instance_of
from scanfleet.scanning.policy import BATCH_SECONDS, max_joined_addresses

LIVE: Final = timedelta(seconds=12)  # announcements are stored every 5 seconds: after this time a worker is not live
KEEP_IDLE: Final = timedelta(minutes=1)  # of accounts of idle users: time spent until then is charged within seconds
AHEAD_SECONDS: Final = 2.0  # work prefetched beyond a worker's slots, so that tiny chunks do not wait for a round trip


@dataclass(frozen=True, slots=True)
class Account:
    """A user's account in fair queueing: the virtual time without held chunks; `active` while the user has queued or held ones."""

    user_id: int
    time: float = 0.0
    active: bool = False


@dataclass(frozen=True, slots=True)
class Accounts:
    """The accounts of users, and the global virtual time."""

    users: Mapping[int, Account]
    virtual: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """The fields of a queued chunk that decide its turn."""

    chunk_id: str
    user_id: int
    job_id: int
    estimate: float
    needs_raw: bool
    failed_by: tuple[str, ...] = ()
    no_route: tuple[str, ...] = ()
    first_address: str = ""
    addresses: int = 1
    port_count: int = 1


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk that a worker holds."""

    token: FencingToken
    user_id: int
    partition: int
    estimate: float
    share: float
    dispatched_at: AwareDatetime | None

    @classmethod
    def of(cls, chunk: Chunk) -> Held:
        return cls(chunk.token, chunk.user_id, chunk.partition, chunk.expected, chunk.share, chunk.dispatched_at)

    @property
    def instance(self) -> str:
        return instance_of(self.token.worker_id)


@dataclass(frozen=True, slots=True)
class Credit:
    """The capacity of one worker: its slots, and the chunks that it already holds."""

    worker_id: str
    instance: str
    slots: int
    raw: bool
    partition: int
    held: int = 0
    ahead_seconds: float = 0.0
    """Estimated work beyond one chunk for each slot."""
    free_in: float = 0.0
    """Expected seconds until one of its taken slots is free."""


def wake(accounts: Accounts, waiting: Iterable[int]) -> dict[int, Account]:
    """Return the accounts of the waiting users; those of users who were idle are raised to the global virtual time."""
    awake: dict[int, Account] = {}
    for user in waiting:
        account = accounts.users.get(user, Account(user))
        awake[user] = account if account.active else Account(user, max(account.time, accounts.virtual), active=True)
    return awake


def tags(accounts: Mapping[int, Account], held: Iterable[Held], now: datetime) -> dict[int, float]:
    """Return the virtual time of each user with the held chunks, by elapsed or expected time, whichever is longer."""
    times = {user: account.time for user, account in accounts.items()}
    for each in held:
        if each.user_id in times:
            elapsed = (now - each.dispatched_at).total_seconds() if each.dispatched_at else 0.0
            times[each.user_id] += max(each.share * elapsed, each.share * each.estimate)
    return times


def fill(credit: Credit, held: Iterable[Held], now: datetime) -> Credit:
    """Return the credit with the chunks that its worker holds: those dispatched first occupy its slots."""
    ordered = sorted(held, key=lambda each: (each.dispatched_at or now, -each.estimate))
    return replace(
        credit,
        held=len(ordered),
        ahead_seconds=sum(each.estimate for each in ordered[credit.slots :]),
        free_in=min((_seconds_left(each, now) for each in ordered[: credit.slots]), default=0.0),
    )


def has_room(credit: Credit) -> bool:
    """Return whether the worker has a free slot, or one soon: it releases a chunk that waits for a slot for `AHEAD_SECONDS`."""
    if credit.held < credit.slots:
        return True
    return credit.slots > 0 and credit.ahead_seconds < AHEAD_SECONDS and credit.free_in <= AHEAD_SECONDS


def _seconds_left(held: Held, now: datetime) -> float:
    """Return how long the attempt is expected to take: one past its estimate is expected to take as long again past it."""
    elapsed = (now - held.dispatched_at).total_seconds() if held.dispatched_at else 0.0
    return abs(held.estimate - elapsed)


_Free = tuple[bool, float, int, Credit]
"""A worker with room: its load, and its place among the workers of the round."""


class Round:
    """Assigns queued chunks, one after the other, to the workers with capacity.

    Args:
        workers: those that may get chunks; all of them can run every queued chunk, so that a search passes only those that failed
            it.
        times: virtual times of the waiting users.
        occupied: slots that each user's chunks occupy on all workers.
        fleet: all live workers, including `workers`.
    """

    def __init__(
        self,
        workers: Iterable[Credit],
        times: Mapping[int, float],
        occupied: Mapping[int, float],
        fleet: Collection[Credit],
    ) -> None:
        self._free = [(*_load(worker), place, worker) for place, worker in enumerate(workers) if has_room(worker)]
        """A heap: first the workers with free slots, the least loaded one first, then those with the least prefetched work."""
        heapq.heapify(self._free)
        self._times = dict(times)
        self._occupied = defaultdict(float, occupied)
        self._raw = {worker.instance for worker in fleet if worker.raw}
        self._instances = {worker.instance for worker in fleet}
        slots = sum(worker.slots for worker in fleet)
        users = len(self._times.keys() | {user for user, share in occupied.items() if share})
        # While others wait, no user holds more than their share of the slots plus one.
        self._most = slots / users + 1 if users > 1 else float("inf")
        self._joins: defaultdict[tuple[object, ...], _Room] = defaultdict(_Room)
        """By worker and what chunks must have in common: what the nmaps that start in this round can still take."""
        self._targets: set[tuple[str, str]] = set()
        """Workers and the addresses that they got in this round: an nmap scans no address for two chunks."""
        self.virtual = 0.0
        """The highest virtual time of a user served in this round."""

    def picks(self, queues: Mapping[int, Sequence[Candidate]]) -> Iterable[tuple[Candidate, Credit, float]]:
        """Yield the chunks in dispatch order, each with its worker and its share of a slot.

        Each queue is in its user's own order. Slots that remain once every waiting user has their share go to users with more
        work.
        """
        left: defaultdict[int, deque[Candidate]] = defaultdict(deque)
        yield from self._pass({user: deque(queue) for user, queue in queues.items() if queue}, left, self._most)
        yield from self._pass(left, defaultdict(deque), float("inf"))

    def _pass(
        self,
        queues: Mapping[int, deque[Candidate]],
        left: defaultdict[int, deque[Candidate]],
        most: float,
    ) -> Iterable[tuple[Candidate, Credit, float]]:
        heap = [(self._times[user], user) for user in queues]
        heapq.heapify(heap)
        while heap and self._free:
            time, user = heapq.heappop(heap)
            candidate = queues[user].popleft()
            refused = self._refused(candidate)
            able = self._find(candidate, refused)
            within = self._occupied[user] + 1 <= most
            if able and within:
                worker, share = self._give(able, candidate)
                self.virtual = max(self.virtual, time)
                self._times[user] = time = time + candidate.estimate * share
                yield candidate, worker, share
            elif able:
                left[user].append(candidate)
                heapq.heappush(self._free, able)
            elif within:  # prefetched short chunks of others would take each slot as it becomes free
                self._free = [entry for entry in self._free if entry[-1].instance in refused]
                heapq.heapify(self._free)
            if queues[user]:
                heapq.heappush(heap, (time, user))

    def _find(self, candidate: Candidate, refused: AbstractSet[str]) -> _Free | None:
        """Remove and return the first worker that may get the chunk now."""
        passed: list[_Free] = []
        found = None
        while not found and self._free and self._in_time(self._free[0][-1], candidate):
            entry = heapq.heappop(self._free)
            if entry[-1].instance in refused:
                passed.append(entry)
            else:
                found = entry
        for entry in passed:
            heapq.heappush(self._free, entry)
        return found

    def _in_time(self, worker: Credit, candidate: Candidate) -> bool:
        """Return whether the worker has a free slot, or the chunk is short enough to be prefetched."""
        return (
            worker.held < worker.slots or worker.ahead_seconds + self._ahead_seconds(worker, candidate) <= AHEAD_SECONDS
        )

    def _ahead_seconds(self, worker: Credit, candidate: Candidate) -> float:
        """Return the work that the chunk adds to what waits for a slot of the worker."""
        if self._can_join(worker, candidate):
            return max(0.0, candidate.estimate - plan.START_SECONDS)
        return candidate.estimate

    def _can_join(self, worker: Credit, candidate: Candidate) -> bool:
        """Return whether the worker can scan the chunk with an nmap that starts in this round, as far as the candidate shows.

        Chunks of one user with equal estimates and as many ports rarely differ in ports and policy.
        """
        room = self._joins.get(_kind(worker, candidate), _Room())
        again = (worker.worker_id, candidate.first_address) in self._targets
        fits = room.seconds >= candidate.estimate and room.addresses >= candidate.addresses
        return fits and not candidate.failed_by and not again

    def _refused(self, candidate: Candidate) -> AbstractSet[str]:
        """Return the workers that must not get the chunk: those that failed it, while another live worker can run it.

        If there is no other, those without a route must not, while another live worker may have one.
        """
        able = self._raw if candidate.needs_raw else self._instances
        failed = frozenset(candidate.failed_by)
        if not able <= failed:
            return failed
        unrouted = failed & frozenset(candidate.no_route)
        return frozenset() if able <= unrouted else unrouted

    def _give(self, free: _Free, candidate: Candidate) -> tuple[Credit, float]:
        *_, place, worker = free
        share = min(1.0, worker.slots / (worker.held + 1))
        room = self._joins[_kind(worker, candidate)]
        if worker.held >= worker.slots:
            taken = replace(worker, ahead_seconds=worker.ahead_seconds + self._ahead_seconds(worker, candidate))
            if self._can_join(worker, candidate):
                room.seconds -= candidate.estimate
                room.addresses -= candidate.addresses
        else:
            taken = replace(
                worker, free_in=min(worker.free_in, candidate.estimate) if worker.held else candidate.estimate
            )
            if not candidate.failed_by:
                room.seconds += BATCH_SECONDS - candidate.estimate
                room.addresses += max(0, max_joined_addresses(candidate.port_count) - candidate.addresses)
        self._targets.add((worker.worker_id, candidate.first_address))
        taken = replace(taken, held=worker.held + 1)
        if has_room(taken):
            heapq.heappush(self._free, (*_load(taken), place, taken))
        self._occupied[candidate.user_id] += share
        return worker, share


@dataclass(slots=True)
class _Room:
    """What starting nmaps can still take: estimated seconds and addresses."""

    seconds: float = 0.0
    addresses: int = 0


def _kind(worker: Credit, candidate: Candidate) -> tuple[object, ...]:
    return worker.worker_id, candidate.user_id, candidate.estimate, candidate.port_count


def _load(worker: Credit) -> tuple[bool, float]:
    """Return the order in which workers get chunks.

    If one of the full workers is not in time for a chunk, none after it is, unless the chunk can share an nmap there.
    """
    full = worker.held >= worker.slots
    return full, worker.ahead_seconds if full else worker.held / worker.slots


def occupied(held: Iterable[Held]) -> Mapping[int, float]:
    """Return the slots that each user's chunks occupy."""
    slots: defaultdict[int, float] = defaultdict(float)
    for each in held:
        slots[each.user_id] += each.share
    return slots
