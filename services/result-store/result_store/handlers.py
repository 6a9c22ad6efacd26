"""Consume scan-results, store hosts and closed chunks, and publish to scan-stored."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Protocol

import structlog
from prometheus_client import Counter

from result_store.domain import Batch, ClosedChunk, Host, StoredHost, close, fold
from scanfleet import tracing
from scanfleet.audit import Refusals
from scanfleet.bus import Publisher, Record
from scanfleet.errors import MessageError
from scanfleet.grants import Grants
from scanfleet.messages import ChunkIncomplete, ChunkMessage, ChunkScanned, ChunkStored, HostScanned
from scanfleet.messages.topics import SCAN_STORED

_hosts = Counter("scanfleet_results_hosts_stored", "Hosts stored.")
_duplicates = Counter("scanfleet_results_duplicates", "Hosts that were already stored.")
_late = Counter("scanfleet_results_late", "Hosts received after their chunk was closed; new ones are not results.")
_closed = Counter("scanfleet_results_chunks_closed", "Chunks closed.")
_incomplete = Counter("scanfleet_results_chunks_incomplete", "ChunkScanned whose hosts were not all stored.")

_uncovered = Counter("scanfleet_results_uncovered", "Records dropped because no valid signature covers them.")

_log = structlog.stdlib.get_logger(__name__)


class Store(Protocol):
    """Store of hosts and closed chunks. Documents never change after insertion, so every call is idempotent.

    Raises:
        DependencyError: from every method, if the store is unavailable.
    """

    async def add(self, hosts: Sequence[Host]) -> int:
        """Store each host whose chunk and address are not stored yet; return the number of new hosts."""

    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        """Return the hosts of each of these chunks."""

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        """Close these chunks; return those that were already closed, as they are stored."""

    async def closed(self, chunk_ids: Collection[str]) -> dict[str, ClosedChunk]:
        """Return those of these chunks that are closed."""


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

    async def handle(self, records: Sequence[Record]) -> None:
        records = [record for record in records if self._covered(record)]
        if not records:
            return
        batch = fold(records)
        with tracing.spans("store results", _traces(records), "consumer", "scanfleet.chunk.id"):
            await self._store_and_answer(records, batch)

    async def _store_and_answer(self, records: Sequence[Record], batch: Batch) -> None:
        closed, new = await asyncio.gather(
            self._store.closed(batch.chunk_ids),
            self._store.add(list(batch.hosts.values())),
        )
        answers = await self._answers(batch, closed)
        if answers:
            await self._publisher.publish(SCAN_STORED, answers)
        _hosts.inc(new)
        _duplicates.inc(len(records) - len(batch.scanned) - new)
        _late.inc(sum(host.scanned.chunk_id in closed for host in batch.hosts.values()))

    def _covered(self, record: Record) -> bool:
        message = record.message
        if not isinstance(message, HostScanned | ChunkScanned):
            raise MessageError(f"unexpected message type {type(message).__name__} on scan-results")
        if fault := self._grants.fault(message):
            _uncovered.inc()
            self._refusals.add_uncovered(record, fault)
        return not fault

    async def assigned(self, partitions: Collection[int]) -> None:
        """Do nothing: the handler has no state per partition."""

    async def revoked(self, partitions: Collection[int]) -> None:
        """Do nothing: the handler has no state per partition."""

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Do nothing: the handler does not wait for the end of the log."""

    async def _answers(
        self,
        batch: Batch,
        closed: dict[str, ClosedChunk],
    ) -> list[ChunkIncomplete | ChunkStored]:
        """Close the chunks that are complete, and build a reply to every ChunkScanned."""
        stored = await self._store.stored({each.chunk_id for each, _ in batch.scanned} - closed.keys())
        closing: dict[str, ClosedChunk] = {}
        incomplete: list[ChunkIncomplete] = []
        complete: list[ChunkScanned] = []
        for scanned, place in batch.scanned:
            if scanned.chunk_id not in closed and scanned.chunk_id not in closing:
                verdict = close(scanned, place, stored[scanned.chunk_id])
                if isinstance(verdict, ChunkIncomplete):
                    incomplete.append(verdict)
                    continue
                closing[scanned.chunk_id] = verdict
            complete.append(scanned)
        before = await self._store.close(list(closing.values()))
        final = closed | closing | before
        _closed.inc(len(closing) - len(before))
        for each in incomplete:
            _incomplete.inc()
            _log.warning(
                "hosts missing",
                job_id=each.job_id,
                chunk_id=each.chunk_id,
                trace_id=each.traceparent and tracing.trace_id(each.traceparent),
                attempt=each.attempt,
                worker_id=each.worker_id,
                addresses=len(each.addresses),
            )
        return [*incomplete, *(final[each.chunk_id].announcement(each) for each in complete)]


def _traces(records: Sequence[Record]) -> dict[str, str | None]:
    """Map each chunk id to the traceparent of its last record."""
    messages = (record.message for record in records)
    return {each.chunk_id: each.traceparent for each in messages if isinstance(each, ChunkMessage)}
