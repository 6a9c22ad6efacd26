"""Keep the chunks that workers hold in memory, so that a round of dispatch does not read them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.fairness import Held
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime

# Maximum age on the only replica with partitions; `Fleet` reads once a second. It misses only cancels that a replica carried out
# for a request; their slots are filled at the worker's next announcement.
_ALONE_SECONDS: Final = 2.0
_SHARED_SECONDS: Final = 0.1  # maximum age beside other replicas, which may have ended chunks and so freed slots
# For each chunk: reading one takes up to 10 µs, so that reads take at most a tenth of the time.
_READ_SECONDS: Final = 0.000_1


class HeldChunks:
    """The held chunks of all replicas: as they were last read, with this replica's own changes since.

    A chunk that another replica has dispatched or ended since is missing or remains, so that a worker may get too many chunks,
    which it releases, or too few. A dispatch is decided by the compare-and-set of its chunk.

    A chunk whose partition of scan-progress has had no leader for a whole lease does not count as held either: no report of its
    worker was acknowledged, so the worker has ended the scan, and its slot is free.

    Args:
        alone: whether this replica handles the reports on all chunks.
        leaderless: the partitions of scan-progress without a leader now.
        lease_seconds: lease timeout.

    Attributes:
        read_at: monotonic time of the last read.
        leaderless: the partitions of scan-progress without a leader now: no report on their chunks is acknowledged.
        certain: whether `known` last returned nothing that another replica may have ended since.
    """

    def __init__(
        self,
        dispatch: DispatchRepository,
        clock: PlatformTime,
        alone: Callable[[], bool],
        leaderless: Callable[[], Collection[int]],
        lease_seconds: float,
    ) -> None:
        self._dispatch = dispatch
        self._clock = clock
        self._alone = alone
        self.leaderless = leaderless
        self._lease_seconds = lease_seconds
        self._leaderless_since: dict[int, float] = {}
        """By partition of scan-progress."""
        self._held: dict[str, Held] = {}
        self._meanwhile: dict[str, Held | None] | None = None
        """Own changes during a read, which may be missing in its result; None for an end."""
        self.read_at = float("-inf")
        self._lock = asyncio.Lock()
        self.certain = True

    async def known(self) -> Collection[Held]:
        """Return the held chunks; read them only if too much time has passed, or after `expire`.

        A chunk that was dispatched before a step of the platform's clock is returned with the time of the step, so that the step
        does not count as elapsed time.

        Raises:
            DependencyError: the database is unavailable.
        """
        async with self._lock:
            alone = self._alone()
            most = _ALONE_SECONDS if alone else max(_SHARED_SECONDS, len(self._held) * _READ_SECONDS)
            old = self._clock.monotonic() - self.read_at >= most
            if old:
                await self._read()
            self.certain = alone or old
            ended = self._ended()
            held = [each for each in self._held.values() if each.partition not in ended]
            step = self._clock.stepped_at
            if step is None:
                return held
            return [
                replace(each, dispatched_at=step) if each.dispatched_at and each.dispatched_at < step else each
                for each in held
            ]

    def watch(self) -> None:
        """Record since when partitions have no leader; to be called several times a second, also while no worker has room."""
        now, since = self._clock.monotonic(), self._leaderless_since
        self._leaderless_since = {partition: since.get(partition, now) for partition in self.leaderless()}

    def _ended(self) -> Collection[int]:
        """Return the partitions that have had no leader for a whole lease, and have none now."""
        now, since = self._clock.monotonic(), self._leaderless_since
        return {each for each in self.leaderless() if now - since.get(each, now) > self._lease_seconds}

    async def read(self) -> Collection[Held]:
        """Read the held chunks and return them.

        Raises:
            DependencyError: the database is unavailable.
        """
        async with self._lock:
            await self._read()
            return list(self._held.values())

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Add these chunks, which were just stored as dispatched."""
        for chunk in chunks:
            self._set(chunk.id, Held.of(chunk))

    def end(self, chunk: Chunk) -> None:
        """Remove the chunk, which workers no longer hold, unless it was dispatched again meanwhile."""
        held = self._held.get(chunk.id)
        if held is None or held.token.attempt <= chunk.attempt:
            self._set(chunk.id, None)

    def expire(self) -> None:
        """Read again at the next use: another replica has changed chunks."""
        self.read_at = float("-inf")

    def _set(self, id_: str, held: Held | None) -> None:
        if self._meanwhile is not None:
            self._meanwhile[id_] = held
        if held is None:
            self._held.pop(id_, None)
        else:
            self._held[id_] = held

    async def _read(self) -> None:
        meanwhile: dict[str, Held | None] = {}
        self._meanwhile = meanwhile
        self.read_at = self._clock.monotonic()  # before the query, so that `expire` counts during it
        try:
            read = await self._dispatch.held(known=self._held)
        except BaseException:
            self.expire()
            raise
        finally:
            self._meanwhile = None
        held = {each.token.chunk_id: each for each in read} | meanwhile
        self._held = {id_: each for id_, each in held.items() if each is not None}
