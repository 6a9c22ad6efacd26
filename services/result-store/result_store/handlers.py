"""scan-results in, hosts and closed chunks to the store, scan-stored out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, Protocol

import structlog
from prometheus_client import Counter

from result_store.domain import ClosedChunk, Host, Round, close, firsts, rounds
from scanfleet.bus import Publisher, Record
from scanfleet.messages import ChunkIncomplete, ChunkScanned, ChunkStored
from scanfleet.messages.topics import SCAN_STORED
from scanfleet.outcomes import Outcome

GROUP: Final = "result-store"

_hosts = Counter("scanfleet_results_hosts_stored", "Hosts stored.")
_duplicates = Counter("scanfleet_results_duplicates", "Hosts that were stored already.")
_dropped = Counter("scanfleet_results_dropped_after_close", "Hosts that came after their chunk was closed.")
_closed = Counter("scanfleet_results_chunks_closed", "Chunks closed.")
_incomplete = Counter("scanfleet_results_chunks_incomplete", "ChunkScanned whose hosts were not all stored.")

_log = structlog.stdlib.get_logger(__name__)


class Store(Protocol):
    """Hosts and closed chunks; what is there never changes, so every call may be repeated.

    Raises:
        DependencyError: from every method, when the store is away.
    """

    async def add(self, hosts: Sequence[Host]) -> int:
        """Store each host whose (chunk, address) is not there yet, the first of equal ones; answer how many were new."""

    async def outcomes(self, chunk_ids: Iterable[str]) -> dict[str, dict[str, Outcome]]:
        """The outcome of every stored host by address, for each of these chunks."""

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        """Close these chunks; answer those that were closed before, as they were."""

    async def closed(self, chunk_ids: Iterable[str]) -> dict[str, ClosedChunk]:
        """Those of these chunks that are closed."""


class ResultsHandler:
    """Makes hosts results, and answers a ChunkScanned by what is truly stored."""

    def __init__(self, store: Store, publisher: Publisher) -> None:
        self._store = store
        self._publisher = publisher

    async def handle(self, records: Sequence[Record]) -> None:
        answers = [answer for each in rounds(records) for answer in await self._answers(each)]
        if answers:
            await self._publisher.publish(SCAN_STORED, answers)

    async def assigned(self, partitions: Collection[int]) -> None:
        """Nothing is kept for a partition."""

    async def revoked(self, partitions: Collection[int]) -> None:
        """Nothing is kept for a partition."""

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Nothing waits for the end of the log."""

    async def _answers(self, batch: Round) -> list[ChunkStored | ChunkIncomplete]:
        closed = await self._store.closed(batch.chunk_ids)
        await self._add([host for host in batch.hosts if host.scanned.chunk_id not in closed])
        _dropped.inc(sum(host.scanned.chunk_id in closed for host in batch.hosts))
        closed_now, incomplete = await self._close([each for each in batch.scanned if each.chunk_id not in closed])
        closed |= closed_now
        return [
            closed[each.chunk_id].announcement(each) if each.chunk_id in closed else incomplete[each.chunk_id]
            for each in batch.scanned
        ]

    async def _add(self, hosts: Sequence[Host]) -> None:
        new = await self._store.add(firsts(hosts))
        _hosts.inc(new)
        _duplicates.inc(len(hosts) - new)

    async def _close(
        self, scanned: Sequence[ChunkScanned]
    ) -> tuple[dict[str, ClosedChunk], dict[str, ChunkIncomplete]]:
        stored = await self._store.outcomes(each.chunk_id for each in scanned)
        verdicts = [close(each, stored[each.chunk_id]) for each in scanned]
        closing = {each.chunk_id: each for each in verdicts if isinstance(each, ClosedChunk)}
        incomplete = {each.chunk_id: each for each in verdicts if isinstance(each, ChunkIncomplete)}
        before = await self._store.close(list(closing.values()))
        _closed.inc(len(closing) - len(before))
        for each in incomplete.values():
            _incomplete.inc()
            _log.warning(
                "hosts missing",
                job_id=each.job_id,
                chunk_id=each.chunk_id,
                attempt=each.attempt,
                worker_id=each.worker_id,
                addresses=len(each.addresses),
            )
        return closing | before, incomplete
