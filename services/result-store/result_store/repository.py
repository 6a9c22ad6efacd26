"""Hosts and closed chunks in MongoDB. Documents are inserted and never changed.

- `hosts`: `_id` is `<chunk_id>/<address>`, so the first insert of a host is the only one. `first_id` is the id of its first
  result and is there only if it has one.
- `chunks`: `_id` is the chunk's id; one that is here is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

from pymongo import ASCENDING

from result_store.domain import ClosedChunk, Host, Result
from scanfleet.messages import HostScanned
from scanfleet.mongo import Collection, Database, Document, Ids, bad_days, insert_missing
from scanfleet.outcomes import Outcome

# Hosts held for one reader of results. A tarpit's host, every port of its chunk open, takes 3 MB decoded; a usual one 3 kB,
# and asking more often than every 25 of them would be felt.
PAGE: Final = 25

_WITH_RESULTS: Final = {"first_id": {"$exists": True}}


class ResultRepository:
    def __init__(self, database: Database) -> None:
        self._hosts: Collection = database["hosts"]
        self._chunks: Collection = database["chunks"]
        # Each batch takes its own ids in one write, so that they grow from one replica to the next.
        self._ids = Ids(database, "results")

    @bad_days()
    async def create_indexes(self) -> None:
        """Make what the queries need; does nothing the second time."""
        await self._hosts.create_index(
            [("job_id", ASCENDING), ("created_at", ASCENDING), ("offset", ASCENDING)],
            partialFilterExpression=_WITH_RESULTS,
        )

    @bad_days()
    async def add(self, hosts: Sequence[Host]) -> int:
        """Store each host that is not there yet; answer how many were new."""
        ports = sum(len(host.scanned.ports) for host in hosts)
        next_id = (await self._ids.take(ports)).start if ports else 0
        documents: list[Document] = []
        for host in hosts:
            document = _host_document(host)
            if host.scanned.ports:
                document["first_id"] = next_id
                next_id += len(host.scanned.ports)
            documents.append(document)
        return len(documents) - len(await insert_missing(self._hosts, documents))

    @bad_days()
    async def outcomes(self, chunk_ids: Iterable[str]) -> dict[str, dict[str, Outcome]]:
        """The outcome of every stored host by address, for each of these chunks."""
        found: dict[str, dict[str, Outcome]] = {chunk_id: {} for chunk_id in chunk_ids}
        if found:
            # "0" follows "/": these ranges hold the keys that begin with "<chunk_id>/", and need no index of their own.
            ranges = [{"_id": {"$gte": f"{chunk_id}/", "$lt": f"{chunk_id}0"}} for chunk_id in found]
            query = {"$or": ranges, "chunk_id": {"$in": list(found)}}
            fields = {"_id": False, "chunk_id": True, "address": True, "outcome": True}
            for host in await self._hosts.find(query, fields).to_list(None):
                found[host["chunk_id"]][host["address"]] = Outcome(host["outcome"])
        return found

    @bad_days()
    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        """Close these chunks; answer those that were closed before, as they were."""
        before = await insert_missing(self._chunks, [_chunk_document(chunk) for chunk in chunks])
        return await self.closed(chunks[index].chunk_id for index in before)

    @bad_days()
    async def closed(self, chunk_ids: Iterable[str]) -> dict[str, ClosedChunk]:
        """Those of these chunks that are closed."""
        wanted = list(chunk_ids)
        if not wanted:
            return {}
        return {
            document["_id"]: _chunk(document)
            for document in await self._chunks.find({"_id": {"$in": wanted}}).to_list(None)
        }

    async def results(self, job_id: int, user_id: int | None) -> AsyncIterator[list[Result]]:
        """The job's results in order of creation, host by host; `user_id` limits them to that user's.

        Raises:
            DependencyError: the store is away, maybe halfway.
        """
        query: Document = {"job_id": job_id, **_WITH_RESULTS}
        if user_id is not None:
            query["user_id"] = user_id
        async with bad_days():
            cursor = self._hosts.find(query, sort=[("created_at", ASCENDING), ("offset", ASCENDING)], batch_size=PAGE)
            try:
                while page := await cursor.to_list(PAGE):
                    # Asked after the hosts: a host that a slow replica added behind the close is in no final map.
                    closed = await self.closed({document["chunk_id"] for document in page})
                    for document in page:
                        chunk = closed.get(document["chunk_id"])
                        if chunk is None or chunk.counts(document["address"]):
                            yield _host(document).results(document["first_id"])
            finally:
                await cursor.close()


def _host_document(host: Host) -> Document:
    return {
        "_id": host.scanned.event_id,
        "created_at": host.created_at,
        "offset": host.offset,
        **host.scanned.model_dump(exclude_defaults=True),
    }


def _host(document: Mapping[str, Any]) -> Host:
    return Host(HostScanned.model_validate(document), document["created_at"], document["offset"])


def _chunk_document(chunk: ClosedChunk) -> Document:
    return {
        "_id": chunk.chunk_id,
        "job_id": chunk.job_id,
        "first_address": chunk.first_address,
        "outcomes": chunk.outcomes,
    }


def _chunk(document: Mapping[str, Any]) -> ClosedChunk:
    return ClosedChunk(document["job_id"], document["_id"], document["first_address"], document["outcomes"])
