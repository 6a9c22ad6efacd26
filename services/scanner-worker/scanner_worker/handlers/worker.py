"""Announce the worker's slots, fill them with chunks, and shut down gracefully."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping, Sequence
from typing import Final

import structlog

from scanfleet.contracts.messages import FencingToken, ScanChunk, StopChunk, WorkerReady
from scanfleet.contracts.messages.topics import SCAN_WORKERS
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.runtime.loop import Loop
from scanner_worker.domain.ports import Scanner
from scanner_worker.domain.scan import CannotStartError, together
from scanner_worker.handlers.batch import Abilities, Batch
from scanner_worker.handlers.chunk import FENCE, ChunkScan, Denied
from scanner_worker.handlers.exclusion import Exclusion
from scanner_worker.metrics import SLOTS

# Interval of announcements: an orchestrator discovers its workers within this time of its start.
READY_SECONDS: Final = 2.0
# Minimum interval. Runs that end within it share an announcement; their reports already free the slots.
LEAST_SECONDS: Final = 0.1
# Timeout for a chunk to get a slot; then it is released, since another worker may have a free one.
START_SECONDS: Final = 2.0
LATE_SECONDS: Final = 1.0  # time for chunks that were dispatched before the orchestrators handled the last announcement
FLUSH_SECONDS: Final = 5.0  # timeout for the final reports of a worker that shuts down
SEEN: Final = 4_096  # cached attempts for deduplication: minutes of the shortest chunks

_LEAVING: Final = "the worker is shutting down"

_log = structlog.stdlib.get_logger(__name__)


class Worker:
    """Handles scan-tasks, and announces itself on scan-workers.

    Attributes:
        exclusion: whether nmap can run here; while it cannot, the worker announces no slots and releases every chunk.
    """

    def __init__(
        self,
        worker_id: str,
        abilities: Abilities,
        scanner: Scanner,
        publisher: Publisher,
        denied: Denied,
    ) -> None:
        self._id = worker_id
        self._abilities = abilities
        self._scanner = scanner
        self._publisher = publisher
        self._denied = denied
        self._leaving = False
        self._waiting: dict[FencingToken, ChunkScan] = {}
        self._running: dict[FencingToken, ChunkScan] = {}
        self._busy = 0  # slots
        self._seen: dict[str, int] = {}  # the newest attempt by chunk id, the oldest chunk first
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive = True
        self._announcing = Loop("announce", READY_SECONDS, self._announce, least=LEAST_SECONDS)
        self.exclusion = Exclusion(scanner.check, self._announcing.wake)

    async def start(self) -> None:
        """Check nmap and announce the worker; the consumer of scan-tasks must already run."""
        await self.exclusion.start()
        await self._announcing.start()

    async def stop(self, grace: float) -> None:
        """Shut down: release waiting and late chunks, let running ones finish within `grace` seconds, and release the rest."""
        self._leaving = True
        await self.exclusion.stop()
        await self._announcing.stop()
        self._fill()
        try:
            await self._announce()
        except DependencyError as error:
            _log.warning("shutdown_announcement_failed", error=str(error))
        await asyncio.gather(self._finished(grace), asyncio.sleep(min(LATE_SECONDS, grace)))
        for scan in self._running.values():
            scan.stop(_LEAVING)
        await self._finished(FLUSH_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """False if an internal error dropped a chunk: the process must be replaced."""
        return self._alive and self._announcing.alive and self.exclusion.alive

    @property
    def ready(self) -> bool:
        return self._announcing.ready

    async def handle(self, records: Sequence[Record[ScanChunk | StopChunk]]) -> None:
        for record in records:
            message = record.message
            if message.worker_id != self._id:
                continue
            if isinstance(message, ScanChunk):
                self._take(message)
            else:
                # A StopChunk for an unknown chunk gets no reply: each reply would cause another StopChunk.
                self._end(message.token, message.reason)
        self._fill()  # after all records, so that chunks of one batch can share an nmap

    def _take(self, chunk: ScanChunk) -> None:
        # An older attempt may arrive late, from the producer of another orchestrator replica; it must not replace a newer one.
        seen = self._seen.pop(chunk.chunk_id, 0)
        self._seen[chunk.chunk_id] = max(seen, chunk.attempt)
        if chunk.attempt <= seen:
            return
        if len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]
        for older in [each for each in (*self._waiting, *self._running) if each.chunk_id == chunk.chunk_id]:
            self._end(older, f"superseded by attempt {chunk.attempt}")
        self._waiting[chunk.token] = ChunkScan(chunk, self._abilities, self._publisher, self._denied)
        asyncio.get_running_loop().call_later(
            START_SECONDS, self._release, chunk.token, f"no slot was free within {START_SECONDS:g} s"
        )

    def _end(self, token: FencingToken, reason: str) -> None:
        if scan := self._running.get(token):
            scan.stop(reason)
        else:
            self._release(token, reason)

    def _release(self, token: FencingToken, reason: str) -> None:
        if scan := self._waiting.pop(token, None):
            self._spawn(scan.release(reason))

    @property
    def _closed(self) -> str:
        """Return why no chunk may start on this worker; empty if chunks may."""
        if self._leaving:
            return _LEAVING
        return self.exclusion.reason and f"the worker is excluded: {self.exclusion.reason}"

    def _fill(self) -> None:
        if reason := self._closed:
            for token in list(self._waiting):
                self._release(token, reason)
        while self._waiting and (free := self._abilities.slots - self._busy) > 0:
            chosen = together([scan.chunk for scan in self._waiting.values()], free)
            scans = {chunk.token: self._waiting.pop(chunk.token) for chunk in chosen}
            self._running |= scans
            self._busy += 1
            self._hold()
            self._spawn(self._run(scans))

    def _hold(self) -> None:
        # The same limit as each chunk's fence, for the case that the event loop is blocked and no fence can act.
        if self._running:
            self._scanner.hold(FENCE * min(scan.chunk.lease_seconds for scan in self._running.values()))

    async def _run(self, scans: Mapping[FencingToken, ChunkScan]) -> None:
        """Scan these chunks in one slot."""
        batch = Batch([scan.chunk for scan in scans.values()], self._abilities, self._scanner)
        members = (scan.run(share) for scan, share in zip(scans.values(), batch.shares, strict=True))
        try:
            # An error of one chunk does not end the others.
            ends = await asyncio.gather(self._occupy(batch), *members, return_exceptions=True)
        finally:
            for token in scans:
                del self._running[token]
            self._hold()
            self._announcing.wake()
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _occupy(self, batch: Batch) -> None:
        """Run nmap in a slot, which does not wait for the chunks' final reports: their partition may have no leader."""
        try:
            await batch.run()
            self._judge(batch)  # before the slot is filled again, so that an excluded worker starts no chunk
        finally:
            self._busy -= 1
            self._fill()

    def _judge(self, batch: Batch) -> None:
        """Record whether the run of nmap succeeded or failed on this machine."""
        if isinstance(batch.fault, CannotStartError):
            self.exclusion.exclude(str(batch.fault))
        elif batch.failed:
            self.exclusion.failed(batch.shares[0].chunk, str(batch.fault))
        elif batch.finished:
            self.exclusion.succeeded()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()):
            self._alive = False
            _log.error("chunk_dropped", cause="unexpected error", exc_info=fault)

    async def _finished(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._tasks:  # others may begin meanwhile
                    await asyncio.wait(self._tasks)

    async def _announce(self) -> None:
        slots = 0 if self._closed else self._abilities.slots
        SLOTS.set(slots)
        ready = WorkerReady(worker_id=self._id, slots=slots, raw=self._abilities.raw)
        await self._publisher.publish(SCAN_WORKERS, [ready])
