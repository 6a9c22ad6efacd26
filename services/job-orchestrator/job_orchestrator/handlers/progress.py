"""What workers say about their chunks, and the leases of those that say nothing."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from job_orchestrator.domain.chunk import (
    HELD,
    OPEN,
    Chunk,
    ChunkState,
    WorkerReport,
    fault,
    hear,
    holds,
    last_words,
    settle_charge,
)
from job_orchestrator.domain.store import Store
from job_orchestrator.domain.watch import Watch
from job_orchestrator.handlers.chunks import Changed, change, stop
from job_orchestrator.handlers.jobs import Jobs
from job_orchestrator.metrics import LEASES_EXPIRED, STALE_REPORTS, UNKNOWN_CHUNKS
from scanfleet.bus import Publisher, Record
from scanfleet.clock import utc_now
from scanfleet.errors import MessageError
from scanfleet.messages import ChunkClaimed, ChunkProgressed, StopChunk
from scanfleet.messages.topics import SCAN_TASKS


@dataclass
class _Effects:
    """What the last decision on one chunk wants done beside storing it."""

    stops: list[StopChunk] = field(default_factory=list)
    charge: float = 0.0
    alive: bool = False
    stale: int = 0


class Progress:
    """Handles scan-progress: this replica holds the leases of the jobs in its partitions.

    Args:
        store: where chunks are.
        publisher: for stops.
        jobs: told of every job whose chunks changed.
        wake: called when a chunk is queued again or a slot is free.
        lease_seconds: how long a running chunk may be silent.
    """

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        jobs: Jobs,
        wake: Callable[[], None],
        lease_seconds: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._jobs = jobs
        self._wake = wake
        self._monotonic = monotonic
        self._leases: dict[int, Watch] = {}
        self._lease_seconds = lease_seconds

    async def handle(self, records: Sequence[Record]) -> None:
        by_chunk: dict[str, list[tuple[WorkerReport, int]]] = defaultdict(list)
        for record in records:
            report = _report(record)
            by_chunk[report.chunk_id].append((report, record.partition))
        effects: dict[str, _Effects] = {}

        def decide(chunk: Chunk) -> Chunk:
            effects[chunk.id] = _Effects()
            for report, partition in by_chunk[chunk.id]:
                chunk = self._hear(chunk, report, partition, effects[chunk.id])
            return chunk

        changed = await change(self._store, by_chunk, decide)
        self._renew(changed, effects)
        for id_ in by_chunk.keys() - effects.keys():
            effects[id_] = _Effects([_stop(report, "no such chunk") for report, _ in by_chunk[id_] if _scans(report)])
            UNKNOWN_CHUNKS.inc(len(by_chunk[id_]))
        STALE_REPORTS.inc(sum(each.stale for each in effects.values()))
        await self._publisher.publish(SCAN_TASKS, [stop for each in effects.values() for stop in each.stops])
        charges: dict[int, float] = defaultdict(float)
        for each in changed:
            charges[each.after.user_id] += effects[each.after.id].charge
        if any(each.moved and each.before.state in HELD for each in changed):
            self._wake()
        await asyncio.gather(
            self._store.charge({user: seconds for user, seconds in charges.items() if seconds}),
            self._jobs.follow(changed),
        )

    async def assigned(self, partitions: Collection[int]) -> None:
        self._leases |= {partition: Watch(self._lease_seconds) for partition in partitions}

    async def revoked(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            self._leases.pop(partition, None)

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Judge the leases: only now is silence known to be the workers', not ours."""
        now = self._monotonic()
        running: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in await self._store.watched_chunks(ChunkState.RUNNING, partitions):
            running[chunk.partition].append(chunk)
        late = {
            chunk.id: chunk.attempt
            for partition in partitions
            if partition in self._leases
            for chunk in self._leases[partition].overdue(running[partition], now)
        }
        if not late:
            return

        def expire(chunk: Chunk) -> Chunk:
            if chunk.state is not ChunkState.RUNNING or chunk.attempt != late[chunk.id]:
                return chunk
            return fault(chunk, f"worker {chunk.worker_id} fell silent")

        changed = [each for each in await change(self._store, late, expire) if each.moved]
        LEASES_EXPIRED.inc(len(changed))
        await self._publisher.publish(SCAN_TASKS, [stop(each.before, "lease expired") for each in changed])
        self._wake()
        await self._jobs.follow(changed)

    def _hear(self, chunk: Chunk, report: WorkerReport, partition: int, effects: _Effects) -> Chunk:
        chunk, correction = settle_charge(chunk, report)
        effects.charge += correction
        if holds(chunk, report):
            effects.alive = True
            return hear(chunk, report, partition, utc_now())
        if chunk.state in OPEN:
            effects.stale += 1
        if _scans(report):
            effects.stops.append(_stop(report, f"the chunk is {chunk.state}, attempt {chunk.attempt}"))
        return last_words(chunk, report)

    def _renew(self, changed: Sequence[Changed], effects: dict[str, _Effects]) -> None:
        for each in changed:
            watch = self._leases.get(each.after.partition)
            if watch and effects[each.after.id].alive and each.after.state is ChunkState.RUNNING:
                watch.renew(each.after)


def _scans(report: WorkerReport) -> bool:
    """Whether its worker goes on scanning until it is told otherwise."""
    return isinstance(report, ChunkClaimed | ChunkProgressed)


def _stop(report: WorkerReport, reason: str) -> StopChunk:
    return StopChunk(
        job_id=report.job_id,
        chunk_id=report.chunk_id,
        attempt=report.attempt,
        worker_id=report.worker_id,
        reason=reason,
    )


def _report(record: Record) -> WorkerReport:
    if not isinstance(record.message, WorkerReport):
        raise MessageError(f"{type(record.message).__name__} is no report of a worker")
    return record.message
