"""Changing chunks: read, decide, compare-and-set, and again for those that somebody else changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.store import Store
from job_orchestrator.metrics import CHUNK_TRANSITIONS
from scanfleet.errors import DependencyError
from scanfleet.messages import ChunkScanned, StopChunk

_ROUNDS: Final = 20  # each lost race is somebody else's progress; so many in a row is a database that lies


@dataclass(frozen=True, slots=True)
class Changed:
    """A chunk as it was read and as it is stored now; equal when there was nothing to change."""

    before: Chunk
    after: Chunk

    @property
    def moved(self) -> bool:
        return self.before.state is not self.after.state


async def change(store: Store, ids: Collection[str], decide: Callable[[Chunk], Chunk]) -> list[Changed]:
    """Apply `decide` to each chunk and store what it changed; `decide` runs again for a chunk that lost a race.

    Raises:
        DependencyError: the database is away.
    """
    done: list[Changed] = []
    left = set(ids)
    for _ in range(_ROUNDS):
        if not left:
            return done
        changes = [Changed(chunk, decide(chunk)) for chunk in (await store.chunks(left)).values()]
        left = await store.save_chunks([each.after for each in changes if each.after != each.before])
        stored = [each for each in changes if each.before.id not in left]
        for each in stored:
            if each.moved:
                CHUNK_TRANSITIONS.labels(each.after.state).inc()
        done += stored
    raise DependencyError(f"chunks kept changing under us: {sorted(left)[:5]}")


def stop(chunk: Chunk, reason: str) -> StopChunk:
    """Tell the holder of this token to end its nmap."""
    return StopChunk(
        job_id=chunk.job_id,
        chunk_id=chunk.id,
        attempt=chunk.attempt,
        worker_id=chunk.worker_id,
        reason=reason,
    )


def scanned_again(chunks: Iterable[Chunk]) -> list[ChunkScanned]:
    """Ask result-store once more to check these chunks."""
    return [
        ChunkScanned(
            job_id=chunk.job_id,
            chunk_id=chunk.id,
            attempt=chunk.attempt,
            worker_id=chunk.worker_id,
            first_address=chunk.first_address,
            outcomes=chunk.outcomes,
            slot_seconds=0.0,  # the time was told once already, and a second telling charges nobody
            technique=chunk.technique or "connect",
        )
        for chunk in chunks
    ]
