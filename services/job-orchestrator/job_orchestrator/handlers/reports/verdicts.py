"""Handle result-store's verdicts on checked chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from job_orchestrator.domain.chunk import HELD, Chunk, ChunkState, incomplete, store
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.changer import STOPPED_LATER, Changed, ChunkChanger, stops
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.metrics import UNKNOWN_CHUNKS
from scanfleet.contracts.messages import ChunkIncomplete, ChunkStored
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import Publisher, Record

Verdict = ChunkStored | ChunkIncomplete


class Verdicts:
    """Handles scan-stored.

    Args:
        publisher: publishes stops.
        wake: called when a chunk is requeued or a slot is free.
    """

    def __init__(
        self,
        *,
        changer: ChunkChanger,
        publisher: Publisher,
        reconciler: Reconciler,
        wake: Callable[[], None],
        clock: PlatformTime,
    ) -> None:
        self._changer = changer
        self._publisher = publisher
        self._reconciler = reconciler
        self._wake = wake
        self._clock = clock

    async def handle(self, records: Sequence[Record[Verdict]]) -> None:
        by_chunk: dict[str, list[Verdict]] = defaultdict(list)
        for record in records:
            by_chunk[record.message.chunk_id].append(record.message)

        now = self._clock.now()

        def decide(chunk: Chunk) -> Chunk:
            for verdict in by_chunk[chunk.id]:
                if verdict.job_id != chunk.job_id:
                    continue
                if isinstance(verdict, ChunkStored):
                    chunk = store(chunk, verdict.outcomes, now)
                else:
                    chunk = incomplete(chunk, verdict.attempt, verdict.addresses, now)
            return chunk

        changed = await self._changer.change(by_chunk, decide, now, prepare=self._reconciler.reopen)
        unknown = by_chunk.keys() - {each.after.id for each in changed}
        UNKNOWN_CHUNKS.inc(sum(len(by_chunk[id_]) for id_ in unknown))
        if any(each.moved and (each.before.state in HELD or each.after.state is ChunkState.QUEUED) for each in changed):
            self._wake()
        await self._reconciler.follow(changed)
        replaced = stops((each.before.token, "its results are complete") for each in changed if _may_scan(each))
        await try_publish(self._publisher, SCAN_TASKS, replaced, STOPPED_LATER)


def _may_scan(changed: Changed) -> bool:
    """Return whether the worker may still scan the chunk: the results may be of an attempt before its own."""
    held = changed.before.state in HELD and changed.after.state is ChunkState.STORED
    return held and changed.before.attempt > 1
