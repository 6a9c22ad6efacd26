"""Handle result-store's verdicts on checked chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from job_orchestrator.domain.chunk import HELD, Chunk, ChunkState, incomplete, store
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks import ChunkChanger
from job_orchestrator.handlers.reconciler import Reconciler
from job_orchestrator.metrics import UNKNOWN_CHUNKS
from scanfleet.bus import Record
from scanfleet.errors import MessageError
from scanfleet.messages import ChunkIncomplete, ChunkStored

Verdict = ChunkStored | ChunkIncomplete


class Stored:
    """Handles scan-stored. `wake` is called when a chunk is requeued or a slot is free."""

    def __init__(
        self, changer: ChunkChanger, reconciler: Reconciler, wake: Callable[[], None], clock: PlatformTime
    ) -> None:
        self._changer = changer
        self._reconciler = reconciler
        self._wake = wake
        self._clock = clock

    async def handle(self, records: Sequence[Record]) -> None:
        by_chunk: dict[str, list[Verdict]] = defaultdict(list)
        for record in records:
            verdict = _verdict(record)
            by_chunk[verdict.chunk_id].append(verdict)

        now = self._clock.now()

        def decide(chunk: Chunk) -> Chunk:
            for verdict in by_chunk[chunk.id]:
                if verdict.job_id != chunk.job_id:
                    continue
                if isinstance(verdict, ChunkStored):
                    chunk = store(chunk, verdict.outcomes)
                else:
                    chunk = incomplete(chunk, verdict.attempt, verdict.addresses, now)
            return chunk

        changed = await self._changer.change(by_chunk, decide, now)
        unknown = by_chunk.keys() - {each.after.id for each in changed}
        UNKNOWN_CHUNKS.inc(sum(len(by_chunk[id_]) for id_ in unknown))
        if any(each.moved and (each.before.state in HELD or each.after.state is ChunkState.QUEUED) for each in changed):
            self._wake()
        await self._reconciler.follow(changed)

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...


def _verdict(record: Record) -> Verdict:
    if not isinstance(record.message, ChunkStored | ChunkIncomplete):
        raise MessageError(f"unexpected message type {type(record.message).__name__} on scan-stored")
    return record.message
