"""Whose chunk is next: start-time fair queueing between users, by slot time.

Every user has a virtual clock, charged with the estimate of each chunk at dispatch and corrected at its end. The user whose
clock is behind goes first, and one who comes back from idle starts no further behind than the most needy active one, so
nobody saves up time by waiting. After "Start-Time Fair Queuing" (Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from job_orchestrator.domain.chunk import Chunk


@dataclass(frozen=True, slots=True)
class Clock:
    """A user's virtual time in slot seconds; `active` while any chunk of theirs is queued or held."""

    user_id: int
    time: float = 0.0
    active: bool = False


def wake(clocks: Mapping[int, Clock], waiting: Iterable[int]) -> dict[int, Clock]:
    """The clocks of the users that wait, those back from idle raised to the lowest active one."""
    floor = min((clock.time for clock in clocks.values() if clock.active), default=0.0)
    awake: dict[int, Clock] = {}
    for user in waiting:
        clock = clocks.get(user, Clock(user))
        awake[user] = clock if clock.active else Clock(user, max(clock.time, floor), active=True)
    return awake


def order(clocks: Mapping[int, Clock], queues: Mapping[int, Sequence[Chunk]]) -> Iterable[Chunk]:
    """The queued chunks in the order in which slots are due to them; each queue is in its user's own order."""
    waiting = {user: deque(queue) for user, queue in queues.items() if queue}
    heap = [(clocks[user].time, user) for user in waiting]
    heapq.heapify(heap)
    while heap:
        time, user = heapq.heappop(heap)
        chunk = waiting[user].popleft()
        yield chunk
        if waiting[user]:
            heapq.heappush(heap, (time + chunk.estimate, user))


@dataclass(frozen=True, slots=True)
class Credit:
    """What one worker may be given: its slots, and what MongoDB says it holds already."""

    worker_id: str
    slots: int
    raw: bool
    partition: int
    held: int = 0
    extra_seconds: float = 0.0
    """Estimated work beyond one chunk for each slot."""


AHEAD_SECONDS = 2.0  # of work beyond a worker's slots, so that tiny chunks do not wait for the round trip


def room(credit: Credit, chunk: Chunk) -> bool:
    """Whether the worker should be given the chunk now."""
    if credit.held < credit.slots:
        return True
    return credit.slots > 0 and credit.extra_seconds + chunk.estimate <= AHEAD_SECONDS


def give(credit: Credit, chunk: Chunk) -> Credit:
    extra = chunk.estimate if credit.held >= credit.slots else 0.0
    return Credit(
        credit.worker_id,
        credit.slots,
        credit.raw,
        credit.partition,
        credit.held + 1,
        credit.extra_seconds + extra,
    )
