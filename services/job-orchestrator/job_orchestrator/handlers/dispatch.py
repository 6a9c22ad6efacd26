"""Which worker gets which chunk, and when."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from job_orchestrator.domain import fairness
from job_orchestrator.domain.chunk import Chunk, ChunkState, cancel, dispatch, give_back
from job_orchestrator.domain.fairness import Clock, Credit
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.store import Store
from job_orchestrator.domain.watch import Watch
from job_orchestrator.handlers.chunks import change
from job_orchestrator.metrics import CHUNK_TRANSITIONS
from scanfleet import tracing
from scanfleet.bus import Publisher, Record
from scanfleet.errors import MessageError
from scanfleet.loop import Loop
from scanfleet.messages import ScanChunk, WorkerReady
from scanfleet.messages.topics import SCAN_TASKS
from scanfleet.policy import ScanPolicy

_UNCLAIMED_SECONDS: Final = 10.0  # a worker gives back after 2 what it cannot start; so long is silence
_SILENT_SECONDS: Final = 7.0  # a worker announces itself every 2; three missed, and it is given no more
_LOOK_SECONDS: Final = 0.1  # an idle worker's longest wait for a chunk that another replica queued
_LEAST_SECONDS: Final = 0.025  # between two rounds: workers have as much in advance, and many small ends make one round
_NOTED_SECONDS: Final = 5.0  # between two notes in the database that a worker was heard of
_RAW_WORKER: Final = timedelta(seconds=30)  # unheard of: then a chunk that needs raw goes to one that must refuse it
_EXTRA: Final = 20  # chunks that 2 seconds of work beyond the slots can hold, about; more are picked next time
_USERS: Final = 64  # looked at in one round: the neediest
_REST_SECONDS: Final = 1.0  # between looks at who has become idle, and whether a raw worker lives
_PICKS: Final = 128  # chunks in one round, so that a round reads some thousands at most


@dataclass(frozen=True, slots=True)
class _Announced:
    credit: Credit
    heard: float
    noted: float


class Dispatcher:
    """Handles scan-workers, and fills the workers whose partitions this replica holds."""

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        lease_seconds: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._monotonic = monotonic
        self._lease_seconds = lease_seconds
        self._silent_seconds = min(_SILENT_SECONDS, lease_seconds)  # whose lease was lost is not given the chunk again
        self._workers: dict[str, _Announced] = {}
        self._caught_up: set[int] = set()
        self._unclaimed: dict[int, Watch] = {}
        self._idle = False
        self._woken = False
        self._rest_due = float("-inf")
        self._raw_elsewhere = False
        self.loop = Loop("dispatch", _LOOK_SECONDS, self.fill, least=_LEAST_SECONDS)

    def wake(self) -> None:
        """There may be new work or a free slot."""
        self._woken = True
        self.loop.wake()

    async def handle(self, records: Sequence[Record]) -> None:
        now = self._monotonic()
        heard: dict[str, Credit] = {}
        for record in records:
            ready = record.message
            if not isinstance(ready, WorkerReady):
                raise MessageError(f"{type(ready).__name__} is no word of a worker")
            heard[ready.worker_id] = Credit(ready.worker_id, ready.slots, ready.raw, record.partition)
        news = [credit for credit in heard.values() if not self._is_noted(credit, now)]
        await self._store.seen_workers(news)
        for credit in heard.values():
            noted = now if credit in news else self._workers[credit.worker_id].noted
            self._workers[credit.worker_id] = _Announced(credit, now, noted)
        self.wake()

    async def assigned(self, partitions: Collection[int]) -> None:
        self._unclaimed |= {partition: Watch(_UNCLAIMED_SECONDS) for partition in partitions}

    async def revoked(self, partitions: Collection[int]) -> None:
        self._caught_up -= set(partitions)
        for partition in partitions:
            self._unclaimed.pop(partition, None)

    async def caught_up(self, partitions: Collection[int]) -> None:
        """From now on the credits in these partitions are current; and queue again what nobody claimed."""
        now = self._monotonic()
        self._caught_up |= set(partitions)
        waiting: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in await self._store.watched_chunks(ChunkState.DISPATCHED, partitions):
            waiting[chunk.partition].append(chunk)
        late = {
            chunk.id: chunk.attempt
            for partition in partitions
            if partition in self._unclaimed
            for chunk in self._unclaimed[partition].overdue(waiting[partition], now)
        }

        def take_back(chunk: Chunk) -> Chunk:
            if chunk.state is not ChunkState.DISPATCHED or chunk.attempt != late[chunk.id]:
                return chunk
            return give_back(chunk, chunk.reason)

        if not late:
            return
        refunds: dict[int, float] = defaultdict(float)
        for each in await change(self._store, late, take_back):
            if each.moved:
                refunds[each.after.user_id] -= each.before.charged
        await self._store.charge(refunds)
        self.wake()

    async def fill(self) -> None:
        """Give queued chunks to workers until there is no chunk or no room.

        Without news only idle workers are worth a look: a full one announces itself when it has room again.

        Raises:
            DependencyError: chunks may be dispatched whose message was not sent; they time out and go again.
        """
        if not (self._woken or self._idle):
            return
        self._woken = False
        while await self._round():
            pass

    def _is_noted(self, credit: Credit, now: float) -> bool:
        known = self._workers.get(credit.worker_id)
        return known is not None and known.credit == credit and now - known.noted < _NOTED_SECONDS

    async def _round(self) -> bool:
        """Answer whether another look may find more to give."""
        now = self._monotonic()
        self._workers = {id_: each for id_, each in self._workers.items() if each.heard > now - self._silent_seconds}
        mine = [each.credit for each in self._workers.values() if each.credit.partition in self._caught_up]
        self._idle = any(credit.slots for credit in mine)
        if not self._idle or not (users := await self._store.waiting_users(raw=True)):
            return False
        credits_, known, _ = await asyncio.gather(
            self._store.held(mine),
            self._store.clocks(users),
            self._look_around(now),
        )
        self._idle = any(credit.held < credit.slots for credit in credits_)
        if not self._raw_elsewhere:  # then the others may say no
            return await self._give(credits_, users, known, raw=True)
        more = await self._give([each for each in credits_ if each.raw], users, known, raw=True)
        if not (others := [each for each in credits_ if not each.raw]):
            return more
        users = await self._store.waiting_users(raw=False)
        return await self._give(others, users, await self._store.clocks(users), raw=False) or more

    async def _look_around(self, now: float) -> None:
        """Once a second: who has become idle, and whether a raw worker lives."""
        if now < self._rest_due:
            return
        _, self._raw_elsewhere = await asyncio.gather(
            self._store.rest_clocks(),
            self._store.raw_worker_seen(_RAW_WORKER),
        )
        self._rest_due = now + _REST_SECONDS

    async def _give(
        self,
        credits_: Sequence[Credit],
        users: Collection[int],
        known: Mapping[int, Clock],
        *,
        raw: bool,
    ) -> bool:
        workers = {credit.worker_id: credit for credit in credits_ if credit.slots}
        if not workers or not users:
            return False
        room = min(_PICKS, sum(max(0, credit.slots - credit.held) + _EXTRA for credit in workers.values()))
        clocks = fairness.wake(known, users)
        neediest = sorted(clocks.values(), key=lambda clock: clock.time)[:_USERS]
        heads = await asyncio.gather(*(self._store.queue(clock.user_id, room, raw=raw) for clock in neediest))
        picked: list[Chunk] = []
        for chunk in fairness.order(clocks, dict(zip((clock.user_id for clock in neediest), heads, strict=True))):
            free = [credit for credit in workers.values() if fairness.room(credit, chunk)]
            if not free or len(picked) == room:
                break
            worker = min(free, key=lambda credit: credit.held / credit.slots)
            workers[worker.worker_id] = fairness.give(worker, chunk)
            picked.append(dispatch(chunk, worker.worker_id, worker.partition))
        waking = self._store.wake_clocks([clock for clock in clocks.values() if clock != known.get(clock.user_id)])
        if not picked:
            await waking
            return False
        jobs, _ = await asyncio.gather(self._store.jobs({chunk.job_id for chunk in picked}), waking)
        return await self._send(picked, jobs) or len(picked) == room

    async def _send(self, picked: Sequence[Chunk], jobs: Mapping[int, ScanJob]) -> bool:
        """Answer whether some were not sent, because of others or of a job that has ended."""
        over = [chunk.id for chunk in picked if jobs[chunk.job_id].final]
        due = [chunk for chunk in picked if not jobs[chunk.job_id].final]
        losers = await self._store.save_chunks(due)
        sent = [chunk for chunk in due if chunk.id not in losers]
        CHUNK_TRANSITIONS.labels(ChunkState.DISPATCHED).inc(len(sent))
        traces = {chunk.id: jobs[chunk.job_id].traceparent for chunk in sent}
        with tracing.spans("dispatch chunk", traces, "producer", "scanfleet.chunk.id") as onward:
            tasks = [self._task(chunk, jobs[chunk.job_id].policy, onward[chunk.id]) for chunk in sent]
            charges: dict[int, float] = defaultdict(float)
            for chunk in sent:
                charges[chunk.user_id] += chunk.charged
            await asyncio.gather(self._publisher.publish(SCAN_TASKS, tasks), self._store.charge(charges))
        await self._cancel(over)
        return len(sent) < len(picked)

    async def _cancel(self, over: Collection[str]) -> None:
        """Chunks of a job that has ended: somebody was still making them when it did."""
        await change(self._store, over, lambda chunk: cancel(chunk) if chunk.state is ChunkState.QUEUED else chunk)

    def _task(self, chunk: Chunk, policy: ScanPolicy, traceparent: str | None) -> ScanChunk:
        return ScanChunk(
            job_id=chunk.job_id,
            chunk_id=chunk.id,
            attempt=chunk.attempt,
            worker_id=chunk.worker_id,
            user_id=chunk.user_id,
            first_address=chunk.first_address,
            outcomes=chunk.outcomes,
            policy=policy,
            ports=chunk.ports,
            lease_seconds=self._lease_seconds,
            estimate_seconds=chunk.estimate,
            traceparent=traceparent,
        )
