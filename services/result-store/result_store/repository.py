"""Store hosts and closed chunks in MongoDB. Documents are inserted and never changed, so every call is idempotent.

- `hosts`: `_id` is `<chunk_id>/<address>`, so only the first insert of a host succeeds. `first_id` is the id of its first
  result; hosts without results do not have the field. `key` sorts the hosts that are listed by address; silent ones do not have it.
- `deleted`: `_id` is the id of a job whose results are deleted, including late ones; `begun` is the number of times that its
  deletion began, and `open` is set while documents may be left, with `retry_at` after an error. `hosts` and `rows` count deleted
  documents and results, and `slice` is the first and last id of the hosts that were counted last: they may not be deleted yet.
- `chunks`: `_id` is the chunk's id. The collection holds closed chunks only; `key` sorts them by address.
- `port_sets`: long lists of ports of closed chunks, each once for its job; `_id` is `<job_id>-<ports_id of the chunks>`. They are
  deleted with their job.

`zone` is where a host or chunk was scanned. Documents of release 0.1 have no `key`, those of release 0.2 no `zone`, and their
chunks all of their ports.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final

from bson import decode
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from motor.motor_asyncio import AsyncIOMotorCollection
from pymongo import ASCENDING, DESCENDING, IndexModel, UpdateOne
from pymongo.read_concern import ReadConcern

from result_store.domain.results import ClosedChunk, Erased, Host, Parts, Place, Removed, StoredHost
from scanfleet.contracts.messages import HostScanned
from scanfleet.contracts.rest import Result
from scanfleet.errors import NotFoundError
from scanfleet.runtime import mongo
from scanfleet.runtime.mongo import Database, Document, Ids, dependency_errors, insert_missing, make_indexes
from scanfleet.scanning.outcomes import Outcome, address_key
from scanfleet.scanning.ports import parse_ranges, port_count
from scanfleet.scanning.targets import Network

# Hosts fetched at once for one reader of results. They are held undecoded, usually a kilobyte each and at most 1.6 MB together:
# larger ones, of up to a megabyte, are fetched one by one.
PAGE: Final = 100
_LARGE_BYTES: Final = 16_384

_FEW: Final = 256  # maximum number of addresses queried by key: each page sorts their hosts, which is slow for more
_RECORDS: Final = 20  # hosts between two pauses, as in the handler
_SLICE: Final = 1_000  # documents deleted at once
_KEEP_MARKS: Final = timedelta(days=30)  # longer than a dead letter can be replayed: 14 days

_LONG: Final = 64  # characters of ports from which on a chunk has only their id

SEQUENCE: Final = "results"

_ZONE: Final = ""  # zone of every host and chunk: the default one, which has no name

_SNAPSHOT: Final = ReadConcern("snapshot")
_WITH_RESULTS: Final = {"first_id": {"$exists": True}}
_WITH_KEY: Final = {"key": {"$exists": True}}
_INDEXES: Final = {
    "deleted": [
        IndexModel([("open", 1)], partialFilterExpression={"open": True}),
        IndexModel([("forget_at", 1)], expireAfterSeconds=0),
    ],
    "hosts": [
        IndexModel([("job_id", 1), ("created_at", 1), ("offset", 1)], partialFilterExpression=_WITH_RESULTS),
        IndexModel([("job_id", 1), ("first_id", 1)], partialFilterExpression=_WITH_RESULTS),
        IndexModel([("job_id", 1), ("key", 1)], partialFilterExpression=_WITH_KEY),
    ],
    "chunks": [IndexModel([("job_id", 1), ("key", 1)])],  # complete, so that it finds the chunks without a key
}
_Keys = list[tuple[str, int]]
_BY_PLACE: Final = [("created_at", ASCENDING), ("offset", ASCENDING)]
_BY_ID: Final = [("first_id", ASCENDING)]
_BY_KEY: Final = [("key", ASCENDING)]
_WITHOUT: Final[dict[Parts, Document]] = {
    Parts.SUMMARY: {"ports.raw_data": False, "ports.banner": False, "details.element": False},
    Parts.DETAILS: {"ports": False},
    Parts.PORTS: {"details.scripts": False, "open_filtered": False},
}
_SIZE: Final = {"ports": {"$cond": [{"$isArray": "$ports"}, {"$size": "$ports"}, 0]}, "open_filtered": True}
_HEAD: Final = {"_id": "$_id", "chunk_id": "$chunk_id", "large": True}
_OF_CLOSED: Final = dict.fromkeys(("job_id", "first_address", "outcomes"), True)
_OF_STORED: Final = dict.fromkeys(("chunk_id", "address", "outcome", "created_at", "offset"), True)


class MongoStore:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._hosts = database["hosts"]
        self._raw_hosts: AsyncIOMotorCollection[Any] = self._hosts.with_options(
            codec_options=CodecOptions(RawBSONDocument)
        )
        self._chunks = database["chunks"]
        self._port_sets = database["port_sets"]
        self._deleted = database["deleted"]
        # Each batch allocates its ids in one write, so that ids increase across replicas.
        self._ids = Ids(database, SEQUENCE)

    async def prepare(self) -> None:
        """Create the indexes, and replace older versions of them."""
        await make_indexes(self._database, _INDEXES)

    @dependency_errors()
    async def add(self, hosts: Sequence[Host]) -> int:
        """Store each host that is not stored yet; return the number of new hosts."""
        results = sum(host.result_count for host in hosts)
        next_id = (await self._ids.take(results)).start if results else 0
        documents: list[Document] = []
        for number, host in enumerate(hosts):
            if number % _RECORDS == 0:
                await asyncio.sleep(0)
            document = _host_document(host)
            if host.result_count:
                document["first_id"] = next_id
                next_id += host.result_count
            documents.append(document)
        return len(documents) - len(await insert_missing(self._hosts, documents))

    @dependency_errors()
    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        """Return the hosts of each of these chunks."""
        found: dict[str, list[StoredHost]] = {chunk_id: [] for chunk_id in chunk_ids}
        if found:
            # "0" follows "/": these ranges select the keys that begin with "<chunk_id>/", and need no additional index.
            ranges = [{"_id": {"$gte": f"{chunk_id}/", "$lt": f"{chunk_id}0"}} for chunk_id in found]
            query = {"$or": ranges, "chunk_id": {"$in": list(found)}}
            for host in await self._hosts.find(query, _OF_STORED).to_list(None):
                place = Place(host["created_at"], host["offset"])
                found[host["chunk_id"]].append(StoredHost(host["address"], Outcome(host["outcome"]), place))
        return found

    @dependency_errors()
    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        """Close these chunks; return those that were already closed, as `closed` does."""
        sets = {each["_id"]: each for each in map(_port_set_document, filter(_shares_ports, chunks))}
        await insert_missing(self._port_sets, list(sets.values()))  # first, so that no chunk lacks its set
        before = await insert_missing(self._chunks, [_chunk_document(chunk) for chunk in chunks])
        return await self.closed([chunks[index].chunk_id for index in before])

    @dependency_errors()
    async def closed(self, chunk_ids: Collection[str]) -> dict[str, ClosedChunk]:
        """Return those of these chunks that are closed, with what decides about their hosts; other fields are empty."""
        if not chunk_ids:
            return {}
        documents = await self._chunks.find({"_id": {"$in": list(chunk_ids)}}, _OF_CLOSED).to_list(None)
        return {document["_id"]: _chunk(document) for document in documents}

    async def results(
        self,
        job_id: int,
        user_id: int | None,
        *,
        after: int | None = None,
        raw: bool = True,
        within: Network | None = None,
    ) -> AsyncIterator[Iterator[Result]]:
        """See `result_store.domain.ports.Results`."""
        wanted: Document = {"job_id": job_id, **_WITH_RESULTS}
        if user_id is not None:
            wanted["user_id"] = user_id
        fields = {"details": False} if raw else {"details": False, "ports.raw_data": False}
        index = order = _BY_PLACE if after is None else _BY_ID
        if within is not None and within.num_addresses <= _FEW and not await self.is_unsorted(job_id):
            wanted["key"] = _keys_of(within)
            index = _BY_KEY
        rest = {} if after is None else await self._with_results_after(job_id, after)
        # Each page is an operation with its own timeout, and begins in the index where the last one ended.
        count = PAGE
        while count == PAGE:
            page = await self._page({"$and": [wanted, rest]}, fields, order, index)
            count = len(page)
            # Decoded twice, so that at most one host is decoded at a time, and a page needs one query for closed chunks.
            closed = await self._closed_of(job_id, page)
            async for document in self._read(page, fields):
                rest = _behind(document) if after is None else {"first_id": {"$gt": document["first_id"]}}
                chunk = closed.get(document["chunk_id"])
                # A host that arrived after its chunk was closed is stored too; only the final map distinguishes them.
                if chunk is None or chunk.counts(document["address"]):
                    yield _host(document).results(document["first_id"])

    async def hosts_by_address(
        self,
        job_id: int,
        user_id: int | None,
        parts: Parts,
        *,
        after: str | None = None,
        within: Network | None = None,
    ) -> AsyncIterator[Host]:
        """See `result_store.domain.ports.Hosts`."""
        keys = {"$gte": "", "$lt": ":"} if within is None else _keys_of(within)  # ":" follows every digit
        if after:
            keys["$gte"] = max(keys["$gte"], _behind_address(after))
        wanted = {"job_id": job_id, **({} if user_id is None else {"user_id": user_id})}
        count = PAGE
        while count == PAGE:
            page = await self._page({**wanted, "key": keys}, _WITHOUT[parts], _BY_KEY, _BY_KEY)
            count = len(page)
            closed = await self._closed_of(job_id, page)
            async for document in self._read(page, _WITHOUT[parts]):
                keys = {"$gt": document["key"], "$lt": keys["$lt"]}
                chunk = closed.get(document["chunk_id"])
                if chunk is None or chunk.counts(document["address"]):
                    yield _host(document)

    async def chunks_by_address(self, job_id: int, user_id: int | None) -> AsyncIterator[ClosedChunk]:
        """See `result_store.domain.ports.Hosts`."""
        wanted = {"job_id": job_id, **({} if user_id is None else {"user_id": user_id})}
        above: Document = {"$gte": ""}
        count = PAGE
        while count == PAGE:
            page = await self._chunk_page({**wanted, "key": above})
            count = len(page)
            port_sets = await self._port_sets_of(page)
            if await self.deleted([job_id]):  # as in _closed_of
                raise NotFoundError("Job not found")
            for document in page:
                yield _chunk(document, port_sets)
                above = {"$gt": document["key"]}

    @dependency_errors()
    async def _closed_of(self, job_id: int, page: Iterable[RawBSONDocument]) -> dict[str, ClosedChunk]:
        """Return the closed chunks of the hosts of a page, and check that the page was complete: a deletion marks the job first.

        A reader that stops after some pages must not take a shorter list for all, so each page is checked before it is used.

        Raises:
            NotFoundError: the job is deleted.
        """
        ids = list({document["chunk_id"] for document in map(self._decode, page)})
        mark = {"coll": self._deleted.name, "pipeline": [{"$match": {"_id": job_id}}, {"$project": {"_id": True}}]}
        pipeline: list[Document] = [{"$match": {"_id": {"$in": ids}}}, {"$project": _OF_CLOSED}, {"$unionWith": mark}]
        # In one snapshot: between two queries, a deletion could begin and delete closed chunks, but the mark would not be seen.
        found = await self._chunks.with_options(read_concern=_SNAPSHOT).aggregate(pipeline).to_list(None)
        if any(document["_id"] == job_id for document in found):
            raise NotFoundError("Job not found")
        return {document["_id"]: _chunk(document) for document in found}

    @dependency_errors()
    async def is_unsorted(self, job_id: int) -> bool:
        """See `result_store.domain.ports.Hosts`."""
        # A job's records are in one partition, so the earliest ones are those that an older release has stored.
        earliest, chunk = await asyncio.gather(
            self._hosts.find_one(
                {"job_id": job_id, **_WITH_RESULTS}, {"key": True}, sort=[("job_id", ASCENDING), *_BY_PLACE]
            ),
            self._chunks.find_one({"job_id": job_id, "key": None}, {"_id": True}),
        )
        return (earliest is not None and "key" not in earliest) or chunk is not None

    @dependency_errors()
    async def _chunk_page(self, wanted: Document) -> list[Document]:
        index = [("job_id", ASCENDING), *_BY_KEY]
        return await self._chunks.find(wanted, sort=_BY_KEY, limit=PAGE, hint=index).to_list(None)

    @dependency_errors()
    async def _port_sets_of(self, chunks: Iterable[Document]) -> dict[str, str]:
        ids = {_port_set_id(each["job_id"], each["ports_id"]) for each in chunks if "ports_id" in each}
        found = await self._port_sets.find({"_id": {"$in": list(ids)}}).to_list(None) if ids else []
        return {document["_id"]: document["text"] for document in found}

    async def begin_deletions(self, job_ids: Collection[int]) -> None:
        """Mark these jobs as deleted, so that `erase` is called for them, even if it was called before."""
        async with dependency_errors():
            forget_at = {"$add": ["$$NOW", int(_KEEP_MARKS.total_seconds() * 1_000)]}
            begun = {"$add": [{"$ifNull": ["$begun", 0]}, 1]}
            mark = [{"$set": {"open": True, "begun": begun, "forget_at": forget_at}}]
            writes = [UpdateOne({"_id": job_id}, mark, upsert=True) for job_id in job_ids]
            await self._deleted.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def deleted(self, job_ids: Collection[int]) -> set[int]:
        """Return those of these jobs that are marked as deleted."""
        found = self._deleted.find({"_id": {"$in": list(job_ids)}}, {"_id": True})
        return {mark["_id"] async for mark in found}

    @dependency_errors()
    async def open_deletions(self, limit: int) -> dict[int, int]:
        """Return the jobs to erase, each with the number of times that its deletion began."""
        due = {"$lte": ["$retry_at", "$$NOW"]}  # true without that field too
        found = self._deleted.find({"open": True, "$expr": due}, {"begun": True}).limit(limit)
        return {mark["_id"]: mark["begun"] async for mark in found}

    @dependency_errors()
    async def postpone_deletion(self, job_id: int, seconds: float) -> None:
        """See `result_store.domain.ports.Store`."""
        retry_at = {"$add": ["$$NOW", int(seconds * 1_000)]}
        await self._deleted.update_one({"_id": job_id}, [{"$set": {"retry_at": retry_at}}])

    @dependency_errors()
    async def erase(self, job_id: int, limit: int) -> Removed:
        """See `result_store.domain.ports.Store`.

        Without its closed chunk a late host would be a result.
        """
        hosts = 0
        while hosts < limit and (some := await self._erase_hosts(job_id, min(_SLICE, limit - hosts))):
            hosts += some
        chunks = await _delete(self._chunks, _ids_of(job_id), limit - hosts)
        return Removed(hosts, chunks, await _delete(self._port_sets, _ids_of(job_id), limit - hosts - chunks))

    async def _erase_hosts(self, job_id: int, limit: int) -> int:
        """Count some hosts of the job in its mark, then delete them; return how many were deleted.

        The mark contains the slice that was counted last, so that a crash in between or another replica counts no host twice.
        """
        mark = await self._deleted.find_one({"_id": job_id}, {"slice": True}) or {}
        if counted := mark.get("slice"):
            left = await _delete(self._hosts, {"$gte": counted[0], "$lte": counted[1]}, limit)
            if left:
                return left
        page = await self._hosts.find({"_id": _ids_of(job_id)}, _SIZE).sort("_id", 1).limit(limit).to_list(None)
        if not page:
            return 0
        first, last = page[0]["_id"], page[-1]["_id"]
        total = {"hosts": len(page), "rows": sum(map(_rows, page))}
        update = {"$set": {"slice": [first, last]}, "$inc": total}
        if (await self._deleted.update_one({"_id": job_id, "slice": counted}, update)).matched_count:
            await self._hosts.delete_many({"_id": {"$gte": first, "$lte": last}})
        return len(page)

    @dependency_errors()
    async def erased(self, job_id: int) -> Erased:
        """See `result_store.domain.ports.Store`."""
        mark = await self._deleted.find_one({"_id": job_id}, {"hosts": True, "rows": True}) or {}
        return Erased(mark.get("hosts", 0), mark.get("rows", 0))

    @dependency_errors()
    async def end_deletion(self, job_id: int, begun: int) -> None:
        """Record that no document of the job is left, unless its deletion has begun again since."""
        await self._deleted.update_one({"_id": job_id, "begun": begun}, {"$unset": {"open": ""}})

    @dependency_errors()
    async def _page(self, wanted: Document, fields: Document, order: _Keys, index: _Keys) -> list[RawBSONDocument]:
        """Return the next hosts, undecoded, large ones with the fields `_HEAD` only; fewer than `PAGE` at the end."""
        shown = {"$cond": [{"$lte": [{"$bsonSize": "$$ROOT"}, _LARGE_BYTES]}, "$$ROOT", _HEAD]}
        pipeline: list[Document] = [
            {"$match": wanted},
            {"$sort": dict(order)},
            {"$limit": PAGE},
            {"$project": fields},
            {"$replaceWith": shown},
        ]
        # With a hint MongoDB does not try another index first, which reads as much again.
        hint = {"job_id": ASCENDING, **dict(index)}
        cursor = self._raw_hosts.aggregate(pipeline, hint=hint, batchSize=PAGE + 1)
        page: list[RawBSONDocument] = await cursor.to_list(None)
        return page

    @dependency_errors()
    async def _with_results_after(self, job_id: int, result_id: int) -> Document:
        """Return the filter for the hosts that have results with higher ids."""
        query = {"job_id": job_id, "first_id": {"$exists": True, "$lte": result_id}}
        last = await self._hosts.find_one(query, {"first_id": True, **_SIZE}, sort=[("first_id", DESCENDING)])
        if last is None:
            return {}
        ended = last["first_id"] + _rows(last) <= result_id + 1
        return {"first_id": {"$gt" if ended else "$gte": last["first_id"]}}

    async def _read(self, page: Iterable[RawBSONDocument], fields: Document) -> AsyncIterator[Document]:
        """Yield the hosts of a page, each of the large ones fetched when it is read."""
        for document in map(self._decode, page):
            yield await self._whole(document["_id"], fields) if "large" in document else document

    @dependency_errors()
    async def _whole(self, id_: str, fields: Document) -> Document:
        document = await self._hosts.find_one({"_id": id_}, fields)
        if document is None:  # its job has been deleted meanwhile
            raise NotFoundError("Job not found")
        return document

    def _decode(self, document: RawBSONDocument) -> Document:
        return decode(document.raw, self._hosts.codec_options)


async def _delete(collection: mongo.Collection, ids: Document, limit: int) -> int:
    """Delete up to so many documents whose ids meet the condition; return how many were deleted."""
    deleted = 0
    while deleted < limit:
        found = collection.find({"_id": ids}, {"_id": True}).limit(min(_SLICE, limit - deleted))
        page = [document["_id"] async for document in found]
        if not page:
            break
        await collection.delete_many({"_id": {"$in": page}})
        deleted += len(page)
    return deleted


def _behind(document: Mapping[str, Any]) -> Document:
    """Build the filter for the hosts after this one, in the order of `_BY_PLACE`.

    One range of the index, which begins with the hosts of the same millisecond: MongoDB would answer an $or of two ranges by
    reading a page of each.
    """
    created_at = document["created_at"]
    before = {"created_at": created_at, "offset": {"$lte": document["offset"]}}
    return {"created_at": {"$gte": created_at}, "$nor": [before]}


def _behind_address(address: str) -> str:
    """Return the lowest key after those of an address: "0" follows "/"."""
    return f"{address_key(address)}0"


def _keys_of(network: Network) -> dict[str, str]:
    """Build the condition for the keys of a network's addresses."""
    return {"$gte": address_key(str(network.network_address)), "$lt": _behind_address(str(network.broadcast_address))}


def _ids_of(job_id: int) -> Document:
    """Build the condition for the ids of a job's documents: "." follows "-"."""
    return {"$gte": f"{job_id}-", "$lt": f"{job_id}."}


def _host_document(host: Host) -> Document:
    return {
        "_id": host.scanned.event_id,
        **({"key": host.key} if host.found else {}),
        "created_at": host.place.created_at,
        "offset": host.place.offset,
        "zone": _ZONE,
        **host.scanned.model_dump(exclude_defaults=True, exclude={"grant"}),
    }


def _host(document: Mapping[str, Any]) -> Host:
    return Host(HostScanned.model_validate(document), Place(document["created_at"], document["offset"]))


def _rows(document: Document) -> int:
    listed: int = document["ports"]
    silent = document.get("open_filtered")
    try:
        return listed + port_count(parse_ranges(silent if isinstance(silent, str) else ""))
    except ValueError:  # of a damaged host
        return listed


def _chunk_document(chunk: ClosedChunk) -> Document:
    return {
        "_id": chunk.chunk_id,
        "job_id": chunk.job_id,
        "key": chunk.key,
        "user_id": chunk.user_id,
        "first_address": chunk.first_address,
        "outcomes": chunk.outcomes,
        "technique": chunk.technique,
        "nmap": chunk.nmap,
        **({"ports_id": _ports_id(chunk)} if _shares_ports(chunk) else {"ports": chunk.ports}),
        "arguments": chunk.arguments,
        "detection": chunk.detection,
        "discovery": chunk.discovery,
        "zone": _ZONE,
        "at": chunk.at,
    }


def _shares_ports(chunk: ClosedChunk) -> bool:
    """Return whether the chunk has the id of its ports; the first chunk of a job has the text, since it may be the only one."""
    return len(chunk.ports) > _LONG and chunk.chunk_id != f"{chunk.job_id}-0"


def _port_set_document(chunk: ClosedChunk) -> Document:
    return {"_id": _port_set_id(chunk.job_id, _ports_id(chunk)), "text": chunk.ports}


def _ports_id(chunk: ClosedChunk) -> str:
    return sha256(chunk.ports.encode()).hexdigest()[:16]


def _port_set_id(job_id: int, ports_id: str) -> str:
    return f"{job_id}-{ports_id}"


def _chunk(document: Mapping[str, Any], port_sets: Mapping[str, str] = MappingProxyType({})) -> ClosedChunk:
    """Read a closed chunk; `port_sets` are texts of `port_sets` by id, without which long lists of ports are empty."""
    ports_id = document.get("ports_id")
    return ClosedChunk(
        document["job_id"],
        document["_id"],
        document["first_address"],
        document["outcomes"],
        document.get("user_id"),
        document.get("technique", ""),
        document.get("nmap", ""),
        document.get("ports", "")
        if ports_id is None
        else port_sets.get(_port_set_id(document["job_id"], ports_id), ""),
        document.get("arguments", ""),
        document.get("detection", ""),
        document.get("discovery", ""),
        document.get("at"),
    )
