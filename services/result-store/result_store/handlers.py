"""Consume scan-results, store hosts and closed chunks, and publish to scan-stored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from result_store.domain.ports import Store
from result_store.domain.results import Batch, ClosedChunk, Report, Scanned, close, fault_of, fold, parts
from result_store.metrics import (
    CHUNKS_CLOSED,
    CHUNKS_INCOMPLETE,
    DELETED_DOCUMENTS,
    DELETIONS_FAILED,
    DUPLICATES,
    HOSTS_STORED,
    LATE,
    OF_DELETED_JOBS,
    UNCOVERED,
)
from scanfleet.contracts.messages import (
    ChunkIncomplete,
    ChunkScanned,
    ChunkStored,
    DeleteResults,
    ResultsDeleted,
)
from scanfleet.contracts.messages.topics import SCAN_DELETIONS, SCAN_STORED
from scanfleet.errors import DependencyError
from scanfleet.runtime import tracing
from scanfleet.runtime.best_effort import best_effort, try_publish
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.runtime.loop import Loop
from scanfleet.scanning.outcomes import MAX_ADDRESSES
from scanfleet.security.audit import Refusals
from scanfleet.security.chunk_grants import Grants

_ADDRESSES: Final = 4 * MAX_ADDRESSES  # whose hosts are in memory at once, a kilobyte each
_RECORDS: Final = 20  # between two pauses; a host with long lists of ports takes a millisecond
_ANSWER_SECONDS: Final = 10.0  # as long as the bus waits: a lost answer delays its chunk by a minute or longer
_STEP_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 60.0  # delay before a failed deletion is retried
_AT_ONCE: Final = 100  # maximum number of deletions per step

_log = structlog.stdlib.get_logger(__name__)


class ResultsHandler:
    """Stores hosts, and replies to each ChunkScanned from what is stored.

    Args:
        store: stores hosts and closed chunks.
        publisher: publishes the replies.
        grants: verifies the orchestrator's signatures; records without a valid one are dropped.
        refusals: collects the audit entries of dropped records.
    """

    def __init__(self, store: Store, publisher: Publisher, grants: Grants, refusals: Refusals) -> None:
        self._store = store
        self._publisher = publisher
        self._grants = grants
        self._refusals = refusals

    async def handle(self, records: Sequence[Record[Scanned]]) -> None:
        covered: list[Record[Scanned]] = []
        for number, record in enumerate(records):
            if number % _RECORDS == 0:
                await asyncio.sleep(0)
            if self._is_covered(record):
                covered.append(record)
        if covered:
            await self._handle_covered(covered)

    async def _handle_covered(self, records: Sequence[Record[Scanned]]) -> None:
        batch = fold(records)
        with tracing.spans("store results", _traces(records), "consumer", "scanfleet.chunk.id"):
            await self._store_and_answer(records, batch)

    async def _store_and_answer(self, records: Sequence[Record[Scanned]], batch: Batch) -> None:
        new = await self._store.add(list(batch.hosts.values()))
        answers = await self._answers(batch)
        # Write first, then read the marks: either this batch sees the mark, or the deletion sees the batch's documents.
        if deleted := await self._store.deleted({message.job_id for message in batch.messages}):
            OF_DELETED_JOBS.inc()
            await self._store.begin_deletions(deleted)
        if answers:
            async with best_effort(
                SCAN_STORED, len(answers), "the orchestrator asks again within minutes", _ANSWER_SECONDS
            ):
                await self._publisher.publish(SCAN_STORED, answers)
        HOSTS_STORED.inc(new)
        DUPLICATES.inc(len(records) - len(batch.scanned) - new)

    def _is_covered(self, record: Record[Scanned]) -> bool:
        if fault := self._grants.fault(record.message) or fault_of(record.message):
            UNCOVERED.inc()
            self._refusals.add_uncovered(record, fault)
        return not fault

    async def _answers(self, batch: Batch) -> list[ChunkIncomplete | ChunkStored]:
        """Close the chunks that are complete, and build a reply to every ChunkScanned."""
        closed = await self._store.closed(batch.chunk_ids)
        LATE.inc(sum(host.scanned.chunk_id in closed for host in batch.hosts.values()))
        answers: list[ChunkIncomplete | ChunkStored] = []
        answers += (closed[each.chunk_id].announcement(each) for each, _ in batch.scanned if each.chunk_id in closed)
        for part in parts((each for each in batch.scanned if each[0].chunk_id not in closed), _ADDRESSES):
            answers += await self._close(part)
        return answers

    async def _close(self, reports: Sequence[Report]) -> list[ChunkIncomplete | ChunkStored]:
        """Close those of these open chunks that are complete, and build a reply to every report."""
        stored = await self._store.stored({scanned.chunk_id for scanned, _ in reports})
        closing: dict[str, ClosedChunk] = {}
        incomplete: list[ChunkIncomplete] = []
        complete: list[ChunkScanned] = []
        for scanned, place in reports:
            await asyncio.sleep(0)  # one map takes some milliseconds
            if scanned.chunk_id not in closing:
                verdict = close(scanned, place, stored[scanned.chunk_id])
                if isinstance(verdict, ChunkIncomplete):
                    _log_missing(verdict)
                    incomplete.append(verdict)
                    continue
                closing[scanned.chunk_id] = verdict
            complete.append(scanned)
        before = await self._store.close(list(closing.values()))
        CHUNKS_CLOSED.inc(len(closing) - len(before))
        final = closing | before
        return [*incomplete, *(final[each.chunk_id].announcement(each) for each in complete)]


class DeletionsHandler:
    """Deletes the results of deleted jobs, in steps.

    Args:
        store: stores hosts and closed chunks.
        publisher: publishes that a job's results are deleted.
        per_second: maximum number of documents that this replica deletes per second.
    """

    def __init__(self, store: Store, publisher: Publisher, per_second: int) -> None:
        self._store = store
        self._publisher = publisher
        self._per_step = round(per_second * _STEP_SECONDS)
        self.loop = Loop("deletions", _STEP_SECONDS, self.step, least=_STEP_SECONDS, vital=False)

    async def handle(self, records: Sequence[Record[DeleteResults | ResultsDeleted]]) -> None:
        asked = {record.message.job_id for record in records if isinstance(record.message, DeleteResults)}
        if asked:
            await self._store.begin_deletions(asked)
            self.loop.wake()

    async def step(self) -> None:
        """Delete some documents of deleted jobs, and publish which jobs have none left.

        Raises:
            DependencyError: the next step deletes what is left.
        """
        left = self._per_step
        for job_id, begun in (await self._store.open_deletions(_AT_ONCE)).items():
            try:
                left -= await self._delete(job_id, begun, left)
            except DependencyError:
                raise
            except Exception:  # noqa: BLE001 # an error of one job must not stop the others; the log has the traceback
                DELETIONS_FAILED.inc()
                _log.exception("deletion_failed", job_id=job_id, retry_seconds=_PAUSE_SECONDS)
                await self._store.postpone_deletion(job_id, _PAUSE_SECONDS)
            if left <= 0:
                self.loop.wake()
                return

    async def _delete(self, job_id: int, begun: int, limit: int) -> int:
        """Delete up to `limit` documents of the job, publish if none is left, and return how many were deleted."""
        erased = await self._store.erase(job_id, limit)
        for kind, number in erased._asdict().items():
            DELETED_DOCUMENTS.labels(kind).inc(number)
        if sum(erased) < limit:
            total = await self._store.erased(job_id)
            answer = ResultsDeleted(job_id=job_id, hosts=total.hosts, rows=total.rows)
            await try_publish(self._publisher, SCAN_DELETIONS, [answer], "the orchestrator asks again after a minute")
            await self._store.end_deletion(job_id, begun)
        return sum(erased)


def _log_missing(incomplete: ChunkIncomplete) -> None:
    CHUNKS_INCOMPLETE.inc()
    _log.warning(
        "hosts_missing",
        job_id=incomplete.job_id,
        chunk_id=incomplete.chunk_id,
        trace_id=incomplete.traceparent and tracing.trace_id(incomplete.traceparent),
        attempt=incomplete.attempt,
        worker_id=incomplete.worker_id,
        addresses=len(incomplete.addresses),
    )


def _traces(records: Sequence[Record[Scanned]]) -> dict[str, str | None]:
    """Map each chunk id to the traceparent of its last record."""
    return {record.message.chunk_id: record.message.traceparent for record in records}
