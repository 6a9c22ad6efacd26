"""An in-memory store, which passes the same suite as the one in MongoDB, and builders of logs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any, Final

from result_store.domain.ports import Store
from result_store.domain.results import ClosedChunk, Erased, Host, Parts, Removed, Scanned, StoredHost
from result_store.handlers import ResultsHandler
from scanfleet.contracts.messages import ChunkScanned, HostScanned, PortFound
from scanfleet.contracts.messages.topics import SCAN_RESULTS
from scanfleet.contracts.rest import Result
from scanfleet.errors import NotFoundError
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.scanning.outcomes import Outcome, address_key
from scanfleet.scanning.targets import Network
from scanfleet.security.audit import Refusals
from scanfleet.services import RESULT_STORE
from scanfleet_testing.chunk_grants import grants, signed

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
FIRST: Final = "127.9.8.0"


class MemoryStore:
    """A `result_store.domain.ports.Store` and a `result_store.domain.ports.Results`."""

    def __init__(self) -> None:
        self.hosts: dict[str, tuple[Host, int]] = {}
        """Each host with the id of its first result, by event id."""

        self.chunks: dict[str, ClosedChunk] = {}
        self.marks: dict[int, tuple[int, bool]] = {}
        """By deleted job, how often its deletion began, and whether documents may be left."""

        self.postponed: set[int] = set()
        self.erasures: dict[int, Erased] = {}
        self.unsorted: set[int] = set()
        """Jobs with documents of a release without keys."""

        self._next_id = 1

    async def add(self, hosts: Sequence[Host]) -> int:
        before = len(self.hosts)
        for host in hosts:
            self.hosts.setdefault(host.scanned.event_id, (host, self._next_id))
            self._next_id += host.result_count
        return len(self.hosts) - before

    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        found: dict[str, list[StoredHost]] = {chunk_id: [] for chunk_id in chunk_ids}
        for host, _ in self.hosts.values():
            scanned = host.scanned
            if scanned.chunk_id in found:
                found[scanned.chunk_id].append(StoredHost(scanned.address, Outcome(scanned.outcome), host.place))
        return found

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        before = {chunk.chunk_id: self.chunks[chunk.chunk_id] for chunk in chunks if chunk.chunk_id in self.chunks}
        self.chunks |= {chunk.chunk_id: chunk for chunk in chunks} | before
        return before

    async def closed(self, chunk_ids: Collection[str]) -> dict[str, ClosedChunk]:
        return {chunk_id: self.chunks[chunk_id] for chunk_id in chunk_ids if chunk_id in self.chunks}

    async def results(
        self,
        job_id: int,
        user_id: int | None,
        *,
        after: int | None = None,
        raw: bool = True,
        within: Network | None = None,  # noqa: ARG002 # skips none
    ) -> AsyncIterator[Iterable[Result]]:
        def order(each: tuple[Host, int]) -> Any:
            return (each[0].place.created_at, each[0].place.offset) if after is None else each[1]

        for host, first_id in sorted(self.hosts.values(), key=order):
            self._check_kept(job_id)
            if (
                self._counts(host, job_id, user_id)
                and host.result_count
                and (after is None or first_id + host.result_count > after + 1)
            ):
                found = host.results(first_id)
                yield found if raw else [result.model_copy(update={"raw_data": ""}) for result in found]
        self._check_kept(job_id)

    async def hosts_by_address(
        self,
        job_id: int,
        user_id: int | None,
        parts: Parts,  # noqa: ARG002 # all of them
        *,
        after: str | None = None,
        within: Network | None = None,
    ) -> AsyncIterator[Host]:
        for host, _ in sorted(self.hosts.values(), key=lambda each: each[0].key):
            self._check_kept(job_id)
            address = host.scanned.address
            if (
                self._counts(host, job_id, user_id)
                and host.found
                and (after is None or address_key(address) > address_key(after))
                and (within is None or ip_address(address) in within)
            ):
                yield host
        self._check_kept(job_id)

    async def chunks_by_address(self, job_id: int, user_id: int | None) -> AsyncIterator[ClosedChunk]:
        for chunk in sorted(self.chunks.values(), key=lambda each: each.key):
            self._check_kept(job_id)
            if chunk.job_id == job_id and user_id in (None, chunk.user_id):
                yield chunk
        self._check_kept(job_id)

    def _counts(self, host: Host, job_id: int, user_id: int | None) -> bool:
        """Return whether the job is the user's, and the host counts in its chunk if that is closed."""
        scanned = host.scanned
        chunk = self.chunks.get(scanned.chunk_id)
        return (
            scanned.job_id == job_id
            and user_id in (None, scanned.user_id)
            and (chunk is None or chunk.counts(scanned.address))
        )

    def _check_kept(self, job_id: int) -> None:
        if job_id in self.marks:
            raise NotFoundError("Job not found")

    async def is_unsorted(self, job_id: int) -> bool:
        return job_id in self.unsorted

    async def begin_deletions(self, job_ids: Collection[int]) -> None:
        for job_id in job_ids:
            self.marks[job_id] = (self.marks.get(job_id, (0, False))[0] + 1, True)

    async def deleted(self, job_ids: Collection[int]) -> set[int]:
        return set(job_ids) & self.marks.keys()

    async def open_deletions(self, limit: int) -> dict[int, int]:
        open_ = {job_id: begun for job_id, (begun, open_) in self.marks.items() if open_}
        return dict([(job_id, begun) for job_id, begun in open_.items() if job_id not in self.postponed][:limit])

    async def postpone_deletion(self, job_id: int, seconds: float) -> None:
        if seconds > 0:
            self.postponed.add(job_id)

    async def erase(self, job_id: int, limit: int) -> Removed:
        hosts = [id_ for id_, (host, _) in self.hosts.items() if host.scanned.job_id == job_id][:limit]
        before = self.erasures.get(job_id, Erased())
        rows = sum(self.hosts.pop(id_)[0].result_count for id_ in hosts)
        self.erasures[job_id] = Erased(before.hosts + len(hosts), before.rows + rows)
        chunks = [id_ for id_, chunk in self.chunks.items() if chunk.job_id == job_id][: limit - len(hosts)]
        for id_ in chunks:
            del self.chunks[id_]
        return Removed(len(hosts), len(chunks))

    async def erased(self, job_id: int) -> Erased:
        return self.erasures.get(job_id, Erased())

    async def end_deletion(self, job_id: int, begun: int) -> None:
        if self.marks[job_id][0] == begun:
            self.marks[job_id] = (begun, False)


def handler(store: Store, publisher: Publisher) -> ResultsHandler:
    """Return a handler that accepts the messages of `host` and `scanned`."""
    return ResultsHandler(store, publisher, grants(), Refusals(RESULT_STORE))


class Log:
    """One partition of scan-results, stamped as a broker would: one record per millisecond."""

    def __init__(self) -> None:
        self.records: list[Record[Scanned]] = []

    def append(self, *messages: Scanned) -> list[Record[Scanned]]:
        """Append these messages and return their records."""
        start = len(self.records)
        for offset, message in enumerate(messages, start):
            timestamp = EPOCH + timedelta(milliseconds=offset)
            self.records.append(Record(message, SCAN_RESULTS.name, 0, offset, timestamp))
        return self.records[start:]


def host(address: str = "127.9.8.1", *ports: int | PortFound, chunk_id: str = "1-0", **fields: object) -> HostScanned:
    """Return a host of job 1 of user 7 that answered, with these open ports."""
    found = tuple(PortFound(port=port) if isinstance(port, int) else port for port in ports)
    defaults = {"job_id": 1, "user_id": 7, "attempt": 1, "worker_id": "w", "outcome": "a", "technique": "connect"}
    return signed(
        HostScanned.model_validate(
            {**defaults, "chunk_id": chunk_id, "address": address, "ports": found, **fields},
        )
    )


def scanned(outcomes: str, *, chunk_id: str = "1-0", **fields: object) -> ChunkScanned:
    """Return the ChunkScanned of a chunk of job 1 whose map begins at `FIRST`."""
    defaults = {"job_id": 1, "attempt": 1, "worker_id": "w", "slot_seconds": 1.0, "technique": "connect"}
    return signed(
        ChunkScanned.model_validate(
            {**defaults, "first_address": FIRST, "chunk_id": chunk_id, "outcomes": outcomes, **fields},
        )
    )
