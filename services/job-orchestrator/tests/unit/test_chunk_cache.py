"""Which chunks a replica caches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.account_cache import AccountCache
from job_orchestrator.handlers.chunks.changer import ChunkChanger
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator_testing import MemoryStore, chunk
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import MemoryChunks


class ReadChunks(MemoryChunks):
    """Notes the ids that are read."""

    read: Collection[str] = ()

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]:
        self.read = ids
        return await super().get(ids)


def changer_of(store: MemoryStore, chunks: MemoryChunks) -> ChunkChanger:
    """The changer of a replica that handles all reports."""
    time = PlatformTime(store.time, lambda: 1.0)
    accounts = AccountCache(store.dispatch, time, lambda: True)
    held = HeldChunks(store.dispatch, time, lambda: True, tuple, 30.0)
    return ChunkChanger(chunks, accounts, held, lambda: range(12), time)


async def test_cache_of_chunks_is_bounded() -> None:
    """Of more than ten thousand chunks whose verdicts other replicas handle, the oldest are no longer cached."""
    store = MemoryStore()
    chunks = ReadChunks(store.data)
    changer = changer_of(store, chunks)
    scanned = [chunk(id=f"1-{n}", index=n, state=ChunkState.SCANNED) for n in range(10_001)]
    changer.cache(scanned[:2])
    changer.cache(scanned[2:])
    await changer.change([each.id for each in scanned], lambda each: each, THEN, enough=lambda _: True)
    assert chunks.read == {"1-0"}


async def test_queued_chunk_is_cached_for_one_use() -> None:
    """A dispatch that loses against another replica's change of the chunk reads the chunk for its next attempt."""
    store = MemoryStore()
    chunks = ReadChunks(store.data)
    changer = changer_of(store, chunks)
    mine = chunk()
    theirs = replace(mine, rev=1, failures=1)
    await chunks.insert([theirs])
    changer.cache([mine])
    assert await changer.queued([mine.id]) == {mine.id: mine}
    assert not chunks.read
    assert await changer.queued([mine.id]) == {mine.id: theirs}
