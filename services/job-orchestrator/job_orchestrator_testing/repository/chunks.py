"""Chunks in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice

from job_orchestrator.domain.census import OpenChunks, Standing
from job_orchestrator.domain.chunk import HELD, MAX_PAUSE, OPEN, Chunk, ChunkState
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator_testing.repository.data import MemoryRepository


class MemoryChunks(MemoryRepository):
    """A `ChunkRepository`."""

    async def insert(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._data.chunks.setdefault(chunk.id, chunk)

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]:
        return {id_: self._data.chunks[id_] for id_ in ids if id_ in self._data.chunks}

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        losers = {
            chunk.id
            for chunk in chunks
            if chunk.id not in self._data.chunks or self._data.chunks[chunk.id].rev != chunk.rev
        }
        self._data.chunks |= {chunk.id: replace(chunk, rev=chunk.rev + 1) for chunk in chunks if chunk.id not in losers}
        return losers

    async def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        for chunk in sorted((c for c in self._data.chunks.values() if c.job_id == job_id), key=lambda c: c.index):
            if first <= chunk.index and (end is None or chunk.index < end):
                yield chunk

    async def map_parts(self, job_id: int, first: int, end: int) -> AsyncIterator[MapPart]:
        async for chunk in self.of_job(job_id, first, end):
            yield MapPart(chunk.index, chunk.first_address, chunk.state, chunk.outcomes, chunk.reach)

    async def queued(self, job_id: int, first: int, end: int) -> list[int]:
        chunks = self.of_job(job_id, first, end)
        return [chunk.index async for chunk in chunks if chunk.state is ChunkState.QUEUED]

    async def ids_in(self, job_ids: Collection[int], states: Collection[ChunkState], limit: int) -> list[str]:
        mine = (c.id for c in self._data.chunks.values() if c.job_id in job_ids and c.state in states)
        return list(islice(mine, limit))

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        chunks = self._data.chunks.values()
        return {job_id: Standing.of(chunk for chunk in chunks if chunk.job_id == job_id) for job_id in job_ids}

    async def overdue(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        overdue = (
            chunk
            for chunk in self._data.chunks.values()
            if chunk.state is ChunkState.SCANNED
            and chunk.partition in partitions
            and not (chunk.ask_at and now <= chunk.ask_at <= now + MAX_PAUSE)
        )
        return list(islice(overdue, limit))

    async def count_open(self, job_id: int) -> OpenChunks:
        mine = [chunk for chunk in self._data.chunks.values() if chunk.job_id == job_id]
        queued = [chunk for chunk in mine if chunk.state is ChunkState.QUEUED]
        return OpenChunks(
            queued=len(queued),
            queued_raw=sum(chunk.needs_raw for chunk in queued),
            held=sum(chunk.state in HELD for chunk in mine),
        )

    async def count(self, job_id: int) -> int:
        return sum(chunk.job_id == job_id for chunk in self._data.chunks.values())

    async def delete(self, job_id: int, limit: int) -> int:
        ids = [chunk.id for chunk in self._data.chunks.values() if chunk.job_id == job_id][:limit]
        for id_ in ids:
            del self._data.chunks[id_]
        return len(ids)

    async def census(self) -> Counter[ChunkState]:
        return Counter(chunk.state for chunk in self._data.chunks.values() if chunk.state in OPEN)
