"""Which worker gets which chunk, and when."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from job_orchestrator.domain import fairness
from job_orchestrator.domain.chunk import Chunk, ChunkState, dispatch, give_back
from job_orchestrator.domain.fairness import Credit
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.store import Store
from job_orchestrator.domain.watch import Watch
from job_orchestrator.handlers.chunks import change
from scanfleet.bus import Publisher, Record
from scanfleet.errors import MessageError
from scanfleet.loop import Loop
from scanfleet.messages import ScanChunk, WorkerReady
from scanfleet.messages.topics import SCAN_TASKS

_UNCLAIMED_SECONDS: Final = 10.0  # a worker gives back after 2 what it cannot start; so long is silence
_SILENT_SECONDS: Final = 7.0  # a worker announces itself every 2; three missed, and it is given no more
_LOOK_SECONDS: Final = 0.1  # an idle worker's longest wait for a chunk that another replica queued
_RAW_WORKER: Final = timedelta(
    seconds=30
)  # how long a raw worker is waited for before a chunk goes to one that must refuse
_EXTRA: Final = 16  # chunks that 2 seconds of work beyond the slots can hold, about; more are picked next time
_USERS: Final = 64  # looked at in one round: the neediest


@dataclass(frozen=True, slots=True)
class _Announced:
    credit: Credit
    heard: float


class Dispatcher:
    """Handles scan-workers, and fills the workers whose partitions this replica holds."""

    def __init__(self, store: Store, publisher: Publisher, lease_seconds: float) -> None:
        self._store = store
        self._publisher = publisher
        self._lease_seconds = lease_seconds
        self._workers: dict[str, _Announced] = {}
        self._caught_up: set[int] = set()
        self._unclaimed: dict[int, Watch] = {}
        self.loop = Loop("dispatch", _LOOK_SECONDS, self.fill)

    def wake(self) -> None:
        """There may be new work or a free slot."""
        self.loop.wake()

    async def handle(self, records: Sequence[Record]) -> None:
        now = time.monotonic()
        heard: dict[str, Credit] = {}
        for record in records:
            ready = record.message
            if not isinstance(ready, WorkerReady):
                raise MessageError(f"{type(ready).__name__} is no word of a worker")
            heard[ready.worker_id] = Credit(ready.worker_id, ready.slots, ready.raw, record.partition)
        self._workers |= {worker_id: _Announced(credit, now) for worker_id, credit in heard.items()}
        await self._store.seen_workers(heard.values())
        self.wake()

    async def assigned(self, partitions: Collection[int]) -> None:
        self._unclaimed |= {partition: Watch(_UNCLAIMED_SECONDS) for partition in partitions}

    async def revoked(self, partitions: Collection[int]) -> None:
        self._caught_up -= set(partitions)
        for partition in partitions:
            self._unclaimed.pop(partition, None)

    async def caught_up(self, partitions: Collection[int]) -> None:
        """From now on the credits in these partitions are current; and queue again what nobody claimed."""
        self._caught_up |= set(partitions)
        waiting: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in await self._store.watched_chunks(ChunkState.DISPATCHED, partitions):
            waiting[chunk.partition].append(chunk)
        late = {
            chunk.id: chunk.attempt
            for partition in partitions
            if partition in self._unclaimed
            for chunk in self._unclaimed[partition].overdue(waiting[partition], time.monotonic())
        }

        def take_back(chunk: Chunk) -> Chunk:
            if chunk.state is not ChunkState.DISPATCHED or chunk.attempt != late[chunk.id]:
                return chunk
            return give_back(chunk, chunk.reason)

        if late:
            await change(self._store, late, take_back)
            self.wake()

    async def fill(self) -> None:
        """Give queued chunks to workers until there is no chunk or no room.

        Raises:
            DependencyError: chunks may be dispatched whose message was not sent; they time out and go again.
        """
        while await self._round():
            pass

    async def _round(self) -> bool:
        silent = time.monotonic() - _SILENT_SECONDS
        self._workers = {id_: each for id_, each in self._workers.items() if each.heard > silent}
        mine = [each.credit for each in self._workers.values() if each.credit.partition in self._caught_up]
        if not any(credit.slots for credit in mine) or not await self._store.waiting_users(raw=True):
            return False
        credits_ = await self._store.held(mine)
        raw_elsewhere = await self._store.raw_worker_seen(_RAW_WORKER)
        # While a raw worker lives, what needs one waits for it; when none does, the others may say no.
        given = await self._give([each for each in credits_ if each.raw or not raw_elsewhere], raw=True)
        given += await self._give([each for each in credits_ if not each.raw and raw_elsewhere], raw=False)
        return bool(given)

    async def _give(self, credits_: Iterable[Credit], *, raw: bool) -> int:
        workers = {credit.worker_id: credit for credit in credits_}
        room = sum(max(0, credit.slots - credit.held) + _EXTRA for credit in workers.values() if credit.slots)
        if not room:
            return 0
        clocks = fairness.wake(await self._store.clocks(), await self._store.waiting_users(raw=raw))
        neediest = sorted(clocks.values(), key=lambda clock: clock.time)[:_USERS]
        queues = await asyncio.gather(*(self._store.queue(clock.user_id, room, raw=raw) for clock in neediest))
        picked: list[Chunk] = []
        for chunk in fairness.order(clocks, dict(zip((clock.user_id for clock in neediest), queues, strict=True))):
            free = [credit for credit in workers.values() if fairness.room(credit, chunk)]
            if not free:
                break
            worker = min(free, key=lambda credit: credit.held / credit.slots)
            workers[worker.worker_id] = fairness.give(worker, chunk)
            picked.append(dispatch(chunk, worker.worker_id, worker.partition))
        return await self._send(picked, clocks.values())

    async def _send(self, picked: Sequence[Chunk], clocks: Iterable[fairness.Clock]) -> int:
        if not picked:
            return 0
        losers = await self._store.save_chunks(picked)
        sent = [chunk for chunk in picked if chunk.id not in losers]
        jobs = await self._store.jobs({chunk.job_id for chunk in sent})
        tasks = [self._task(chunk, jobs[chunk.job_id]) for chunk in sent]
        await self._publisher.publish(SCAN_TASKS, tasks)
        charges: dict[int, float] = defaultdict(float)
        for chunk in sent:
            charges[chunk.user_id] += chunk.charged
        await self._store.wake_clocks(clocks)
        await self._store.charge(charges)
        return len(sent)

    def _task(self, chunk: Chunk, job: ScanJob) -> ScanChunk:
        return ScanChunk(
            job_id=chunk.job_id,
            chunk_id=chunk.id,
            attempt=chunk.attempt,
            worker_id=chunk.worker_id,
            user_id=chunk.user_id,
            first_address=chunk.first_address,
            outcomes=chunk.outcomes,
            policy=job.policy,
            ports=chunk.ports,
            lease_seconds=self._lease_seconds,
            estimate_seconds=chunk.estimate,
            traceparent=job.traceparent,
        )
