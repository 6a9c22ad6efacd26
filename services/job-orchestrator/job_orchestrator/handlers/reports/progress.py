"""Handle workers' reports on chunks, and expire the leases of chunks without reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from job_orchestrator.domain.chunk import (
    HELD,
    OPEN,
    Chunk,
    ChunkState,
    WorkerReport,
    apply,
    expire,
    holds,
    late_report,
)
from job_orchestrator.domain.fairness import Held
from job_orchestrator.domain.leases import LeaseTimers
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.changer import STOPPED_LATER, Changed, ChunkChanger, stop, stops
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.metrics import LEASES_EXPIRED, STALE_REPORTS, UNKNOWN_CHUNKS
from scanfleet.contracts.messages import ChunkClaimed, ChunkProgressed, FencingToken, StopChunk
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import PartitionListener, Publisher, Record

_log = structlog.stdlib.get_logger(__name__)


@dataclass
class _Effects:
    """The side effects of the last decision on one chunk."""

    stops: list[StopChunk] = field(default_factory=list)
    alive: bool = False
    stale: int = 0


class Progress(PartitionListener):
    """Handles scan-progress: this replica manages the leases of the jobs in its partitions, from dispatch to the end.

    Args:
        publisher: publishes stops.
        wake: called when a chunk is requeued or a slot is free.
        lease_seconds: lease timeout: the maximum time without a report of the chunk's worker.
        stored_seconds: timeout for result-store to check a scanned chunk before it is asked again.

    Attributes:
        assignments: number of changes of `partitions` so far.
    """

    def __init__(
        self,
        *,
        dispatch: DispatchRepository,
        changer: ChunkChanger,
        publisher: Publisher,
        reconciler: Reconciler,
        wake: Callable[[], None],
        lease_seconds: float,
        stored_seconds: float,
        clock: PlatformTime,
    ) -> None:
        self._dispatch = dispatch
        self._changer = changer
        self._publisher = publisher
        self._reconciler = reconciler
        self._wake = wake
        self._lease_seconds = lease_seconds
        self._patience = timedelta(seconds=stored_seconds)
        self._clock = clock
        self._leases: dict[int, LeaseTimers] = {}
        self._revoked: dict[int, LeaseTimers] = {}
        """Kept until the next assignment: a partition that is reassigned to this replica keeps its leases."""
        self._held: dict[str, Held] = {}
        """The chunks that workers held at the last check of leases, which need not be read again."""
        self.assignments = 0

    @property
    def partitions(self) -> Collection[int]:
        """The partitions that this replica owns."""
        return self._leases.keys()

    async def handle(self, records: Sequence[Record[WorkerReport]]) -> None:
        by_chunk: dict[str, list[WorkerReport]] = defaultdict(list)
        for record in records:
            by_chunk[record.message.chunk_id].append(record.message)
        effects: dict[str, _Effects] = {}
        now = self._clock.now()

        def decide(chunk: Chunk) -> Chunk:
            effects[chunk.id] = _Effects()
            for report in by_chunk[chunk.id]:
                if holds(chunk, report):
                    effects[chunk.id].alive = True
                    chunk = apply(chunk, report, now, self._patience)
                else:
                    chunk = self._not_held(chunk, report, effects[chunk.id], now)
            return chunk

        # A heartbeat with an unchanged map needs no query; a report of an attempt that may have ended is judged by the document.
        changed = await self._changer.change(
            by_chunk,
            decide,
            now,
            enough=lambda chunk: all(holds(chunk, report) for report in by_chunk[chunk.id]),
            prepare=self._reconciler.reopen,
        )
        self._renew(changed, effects)
        for id_ in by_chunk.keys() - {each.after.id for each in changed}:
            effects[id_] = _Effects([stop(report.token, "no such chunk") for report in by_chunk[id_] if _scans(report)])
            UNKNOWN_CHUNKS.inc(len(by_chunk[id_]))
        STALE_REPORTS.inc(sum(each.stale for each in effects.values()))
        if any(each.moved and each.before.state in HELD for each in changed):
            self._wake()
        await self._reconciler.follow(changed)
        stale = [each for chunk in effects.values() for each in chunk.stops]
        await try_publish(self._publisher, SCAN_TASKS, stale, STOPPED_LATER)

    async def assigned(self, partitions: Collection[int]) -> None:
        self.assignments += 1
        for partition in partitions:
            if partition not in self._leases:
                self._leases[partition] = self._revoked.get(partition) or LeaseTimers(self._lease_seconds)
        self._revoked.clear()

    async def revoked(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            if timers := self._leases.pop(partition, None):
                self._revoked[partition] = timers
        self._changer.forget(partitions)

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Check the leases: all reports have been read, so a missing report is the worker's."""
        now = self._clock.monotonic()
        found = await self._dispatch.held(partitions, self._held)
        self._held = {each.token.chunk_id: each for each in found}
        held: dict[int, list[Held]] = defaultdict(list)
        for each in found:
            held[each.partition].append(each)
        self._changer.verify(partitions, {each.token for chunks in held.values() for each in chunks})
        late = {
            each.token
            for partition in partitions
            if partition in self._leases
            for each in self._leases[partition].overdue(held[partition], now)
        }
        await self.requeue_lost(late, "sent no report for a whole lease")

    async def requeue_lost(self, tokens: Collection[FencingToken], reason: str) -> None:
        """Requeue chunks whose workers are lost.

        Args:
            tokens: the attempts that end.
            reason: why the workers are considered lost.

        Raises:
            DependencyError: the next check requeues the rest.
        """
        if not tokens:
            return
        now = self._clock.now()

        def lose(chunk: Chunk) -> Chunk:
            if chunk.state not in HELD or chunk.token not in tokens:
                return chunk
            return expire(chunk, f"worker {chunk.worker_id} {reason}", now)

        ids = {token.chunk_id for token in tokens}
        changed = [each for each in await self._changer.change(ids, lose, now, charge=False) if each.moved]
        LEASES_EXPIRED.inc(len(changed))
        for each in changed:
            _log.warning("lease_expired", **each.before.token._asdict(), state=each.before.state, cause=reason)
        self._wake()
        await self._reconciler.follow(changed)
        lost = stops((each.before.token, "lease expired") for each in changed)
        await try_publish(self._publisher, SCAN_TASKS, lost, STOPPED_LATER)

    def _not_held(self, chunk: Chunk, report: WorkerReport, effects: _Effects, now: datetime) -> Chunk:
        if chunk.state in OPEN:
            effects.stale += 1
        if _scans(report):
            effects.stops.append(stop(report.token, f"the chunk is {chunk.state}, attempt {chunk.attempt}"))
        return late_report(chunk, report, now)

    def _renew(self, changed: Sequence[Changed], effects: dict[str, _Effects]) -> None:
        for each in changed:
            timers = self._leases.get(each.after.partition)
            if timers and effects[each.after.id].alive and each.after.state is ChunkState.RUNNING:
                timers.renew(each.after.token)


def _scans(report: WorkerReport) -> bool:
    """Return whether the worker continues to scan until it is stopped."""
    return isinstance(report, ChunkClaimed | ChunkProgressed)
