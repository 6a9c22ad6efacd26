"""Distribute job events to subscriptions: each state once, in order, and in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from api_gateway.metrics import STREAMS
from scanfleet.contracts.messages import JobEvent, JobStatus
from scanfleet.contracts.rest import Snapshot, TaskStatus
from scanfleet.errors import UnavailableError
from scanfleet.runtime.bus import Record

# Of each subscription, of which a user may have 64; together they take up to 60 MB for states and 40 MB for numbers.
MAX_WAITING: Final = 5_000  # states not sent to the client yet
KEPT_JOBS: Final = 10_000  # jobs whose numbers are kept at least: the unfinished jobs that a user may have

Subscribed = tuple[Literal["job", "user", "all"], int]
"""Which jobs: one, those of a user, or all."""

ALL_JOBS: Final[Subscribed] = ("all", 0)


class Subscription:
    """A subscription of one job or many. It keeps at most one unsent state per job and status: the latest."""

    def __init__(self) -> None:
        self.ended = False
        self._seqs: dict[int, int] = {}
        """The highest `seq` received of the jobs that changed last."""

        self._older_seqs: dict[int, int] = {}
        """The same of those before them; a duplicate of an even older job's state is sent again."""

        self._waiting: dict[tuple[int, JobStatus], Snapshot] = {}
        self._news = asyncio.Event()

    def begin(self, now: Snapshot) -> None:
        """Send this state next, then later states of its job; drop older ones."""
        job_id = now.task.job.id
        newer = [self._waiting.pop(key) for key in list(self._waiting) if key[0] == job_id]
        for snapshot in (now, *(later for later in newer if later.seq > now.seq)):
            self._waiting[job_id, snapshot.task.status.status] = snapshot
        self._keep(job_id, max(self._seq(job_id), now.seq))
        self._news.set()

    def add(self, snapshot: Snapshot) -> None:
        """Queue this state, unless it is old or a duplicate."""
        job_id = snapshot.task.job.id
        if self.ended or snapshot.seq <= self._seq(job_id):
            return
        self._keep(job_id, snapshot.seq)
        self._waiting[job_id, snapshot.task.status.status] = snapshot
        if len(self._waiting) > MAX_WAITING:
            self.end()  # the client reconnects and gets the current state
        self._news.set()

    def _seq(self, job_id: int) -> int:
        return self._seqs.get(job_id) or self._older_seqs.get(job_id, 0)

    def _keep(self, job_id: int, seq: int) -> None:
        self._seqs[job_id] = seq
        if len(self._seqs) == KEPT_JOBS:
            self._seqs, self._older_seqs = {}, self._seqs

    def end(self) -> None:
        self.ended = True
        self._waiting.clear()
        self._news.set()

    def take(self) -> Snapshot | None:
        """Remove and return the next state; None if none is queued."""
        return self._waiting.pop(next(iter(self._waiting))) if self._waiting else None

    def take_waiting(self) -> Iterator[Snapshot]:
        """Remove and yield the states that are queued now; those that arrive meanwhile stay for later calls."""
        for _ in range(len(self._waiting)):
            if (snapshot := self.take()) is not None:  # None once the subscription has ended
                yield snapshot

    async def next(self, until: float) -> Snapshot | None:
        """Wait for the next state; None after `until` on the loop's clock, or when the subscription has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not (self._waiting or self.ended):
                    self._news.clear()
                    await self._news.wait()
        return self.take()


class Subscriptions:
    """All subscriptions of this process. It handles all partitions of scan-events, since a job may be in any of them."""

    def __init__(self) -> None:
        self._subscriptions: defaultdict[Subscribed, set[Subscription]] = defaultdict(set)
        self._ended = False

    def wants(self, _: str) -> bool:
        """Return whether there is a subscription that may receive an event, whatever its job."""
        return bool(self._subscriptions)

    async def handle(self, records: Sequence[Record[JobEvent]]) -> None:
        for record in records:
            event = record.message
            of: tuple[Subscribed, ...] = (("job", event.job.id), ("user", event.user_id), ALL_JOBS)
            subscriptions = [subscription for each in of for subscription in self._subscriptions.get(each, ())]
            if subscriptions:
                snapshot = _snapshot(event)
                for subscription in subscriptions:
                    subscription.add(snapshot)

    @contextmanager
    def open(self, subscribed: Subscribed) -> Iterator[Subscription]:
        """Receive every event of these jobs that is read from now on.

        Raises:
            UnavailableError: this process is shutting down.
        """
        if self._ended:
            raise UnavailableError("this replica is shutting down; try again")
        subscription = Subscription()
        self._subscriptions[subscribed].add(subscription)
        STREAMS.inc()
        try:
            yield subscription
        finally:
            STREAMS.dec()
            self._subscriptions[subscribed].remove(subscription)
            if not self._subscriptions[subscribed]:
                del self._subscriptions[subscribed]

    def end(self) -> None:
        """End every subscription, and refuse new ones."""
        self._ended = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.end()


def _snapshot(event: JobEvent) -> Snapshot:
    task = TaskStatus.of(event.job, progress=event.progress, machines_found=event.machines_found, error=event.error)
    return Snapshot(seq=event.seq, task=task)
