"""Store chunks in MongoDB."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime, timedelta
from functools import reduce
from typing import Any, Final, cast

from pymongo import IndexModel
from pymongo.read_concern import ReadConcern

from job_orchestrator.domain.census import MAX_COUNTED, OpenChunks, Standing
from job_orchestrator.domain.chunk import HELD, MAX_PAUSE, OPEN, Chunk, ChunkState
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator.repository import documents
from job_orchestrator.repository.compare_and_set import save
from job_orchestrator.repository.jobs import from_now
from scanfleet.runtime.mongo import Database, Document, dependency_errors, insert_missing
from scanfleet.scanning.outcomes import Outcome

_BATCH: Final = 1_000  # documents per deletion, or per read of short parts: at most 5 MB, and 20 ms of conversion
_WHOLE: Final = 100  # whole documents per read: at most 25 kB each, with a long list of ports and many attempts

INDEXES: Final = {
    "chunks": [
        IndexModel([("job_id", 1), ("index", 1)]),
        IndexModel([("job_id", 1), ("state", 1), ("index", 1)]),
        # With job and time, the chunks of other jobs and those that are not due yet are passed over without reading them.
        IndexModel(
            [("state", 1), ("user_id", 1), ("needs_raw", 1), ("turn", 1), ("job_id", 1), ("not_before", 1)],
            name="state_1_user_id_1_needs_raw_1_turn_1_v2",
        ),
        # With id and attempt, held chunks that are known are found without reading them.
        IndexModel(
            [("held", 1), ("partition", 1), ("_id", 1), ("attempt", 1)],
            partialFilterExpression={"held": True},
            name="held_1_partition_1_v2",
        ),
        IndexModel([("partition", 1), ("ask_at", 1)], partialFilterExpression={"state": ChunkState.SCANNED.value}),
    ],
    "attempts": [IndexModel([("forget_at", 1)], expireAfterSeconds=0)],
}


def _replaced(letters: Any, outcome: Outcome) -> Document:
    return {"$replaceAll": {"input": letters, "find": outcome.value, "replacement": "p"}}


_PROBED: Final[Any] = reduce(
    _replaced, (Outcome.ANSWERED, Outcome.SILENT, Outcome.DOWN, Outcome.TIMED_OUT, Outcome.LOST), cast(Any, "$outcomes")
)
"""The map of a chunk with one letter for every probed address; a blank of an attempted chunk may have been probed too."""


class MongoChunks:
    """`ChunkRepository` on MongoDB.

    The collection `attempts` keeps the attempts of deleted chunks, under the ids of the chunks.
    """

    def __init__(self, database: Database, keep: timedelta) -> None:
        self._chunks = database["chunks"]
        self._keep = keep

    async def insert(self, chunks: Sequence[Chunk]) -> None:
        await insert_missing(self._chunks, [documents.write_chunk(chunk) for chunk in chunks])

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]:
        if not ids:
            return {}
        return {chunk.id: chunk for chunk in await self._find({"_id": {"$in": list(ids)}})}

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        return await save(self._chunks, chunks, documents.update_chunk, documents.read_chunk)

    async def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        async for document in self._of_job(job_id, first, end, _WHOLE):
            if (chunk := documents.readable(documents.read_chunk, document, "chunks")) is not None:
                yield chunk

    async def map_parts(self, job_id: int, first: int, end: int) -> AsyncIterator[MapPart]:
        async for document in self._of_job(job_id, first, end, _BATCH, documents.MAP_FIELDS):
            if (part := documents.readable(documents.read_map_part, document, "chunks")) is not None:
                yield part

    async def _of_job(
        self, job_id: int, first: int, end: int | None, limit: int, fields: Document | None = None
    ) -> AsyncIterator[Document]:
        # Page by page, so that each page has its own timeout, in the order of an index whose keys never change: no chunk is
        # returned twice or missed because it changes its state meanwhile.
        while end is None or first < end:
            index = {"$gte": first} if end is None else {"$gte": first, "$lt": end}
            page = await self._job_page({"job_id": job_id, "index": index}, limit, fields)
            for document in page:
                yield document
            if len(page) < limit:
                return
            first = page[-1]["index"] + 1

    @dependency_errors()
    async def _job_page(self, wanted: Document, limit: int, fields: Document | None) -> list[Document]:
        return await self._chunks.find(wanted, fields).sort("index", 1).limit(limit).to_list(limit)

    @dependency_errors()
    async def queued(self, job_id: int, first: int, end: int) -> list[int]:
        wanted = {"job_id": job_id, "state": ChunkState.QUEUED.value, "index": {"$gte": first, "$lt": end}}
        return [each["index"] async for each in self._chunks.find(wanted, {"_id": 0, "index": 1})]

    @dependency_errors()
    async def ids_in(self, job_ids: Collection[int], states: Collection[ChunkState], limit: int) -> list[str]:
        wanted = {"job_id": {"$in": list(job_ids)}, "state": {"$in": [state.value for state in states]}}
        return [each["_id"] async for each in self._chunks.find(wanted, {"_id": 1}).limit(limit)]

    @dependency_errors()
    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        # In one snapshot: a chunk that changes between two states could otherwise be missed in both.
        at_one_moment = self._chunks.with_options(read_concern=ReadConcern("snapshot"))
        begun = {"$in": ["$state", [ChunkState.RUNNING.value, ChunkState.SCANNED.value]]}
        groups = at_one_moment.aggregate(
            [
                {"$match": {"job_id": {"$in": list(job_ids)}, "state": {"$in": [state.value for state in OPEN]}}},
                {
                    "$group": {
                        "_id": "$job_id",
                        "open": {"$sum": 1},
                        "begun": {"$max": begun},
                        "lowest": {"$min": "$index"},
                    },
                },
            ],
        )
        found = {each["_id"]: Standing(each["open"], each["begun"], each["lowest"]) async for each in groups}
        return {job_id: found.get(job_id, Standing()) for job_id in job_ids}

    async def overdue(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        due = {"$or": [{"ask_at": None}, {"ask_at": {"$lt": now}}, {"ask_at": {"$gt": now + MAX_PAUSE}}]}
        mine = {"partition": {"$in": list(partitions)}}
        return await self._find({"state": ChunkState.SCANNED.value} | mine | due, limit)

    @dependency_errors()
    async def count_open(self, job_id: int) -> OpenChunks:
        states = [ChunkState.QUEUED.value, *(state.value for state in HELD)]
        groups = self._chunks.aggregate(
            [
                {"$match": {"job_id": job_id, "state": {"$in": states}}},
                {
                    "$group": {
                        "_id": {"$eq": ["$state", ChunkState.QUEUED.value]},
                        "n": {"$sum": 1},
                        "raw": {"$sum": {"$cond": ["$needs_raw", 1, 0]}},
                    },
                },
            ],
        )
        found = {each["_id"]: each async for each in groups}
        queued = found.get(True, {"n": 0, "raw": 0})
        return OpenChunks(
            queued=queued["n"],
            queued_raw=queued["raw"],
            held=found[False]["n"] if False in found else 0,
        )

    @dependency_errors()
    async def count(self, job_id: int) -> int:
        return await self._chunks.count_documents({"job_id": job_id})

    @dependency_errors()
    async def delete(self, job_id: int, limit: int) -> int:
        deleted = 0
        while deleted < limit:
            page = self._chunks.find({"job_id": job_id}, {"_id": 1}).limit(min(_BATCH, limit - deleted))
            ids = [each["_id"] async for each in page]
            if not ids:
                break
            await self._archive(ids)
            await self._chunks.delete_many({"_id": {"$in": ids}})
            deleted += len(ids)
        return deleted

    async def _archive(self, ids: Collection[str]) -> None:
        """Keep the attempts of these chunks, and which addresses and ports they may have probed, but no outcome."""
        kept: Document = dict.fromkeys(
            ("zone", "key", "job_id", "user_id", "first_address", "ports", "attempts", "dropped"), 1
        )
        kept["common_ports"] = "$probed.common_ports"  # of a `top` set; nmap's list differs by version
        # A damaged map must not stop the deletion.
        attempted = {"_id": {"$in": list(ids)}, "attempts.0": {"$exists": True}, "outcomes": {"$type": "string"}}
        await self._chunks.aggregate(
            [
                {"$match": attempted},
                {"$project": kept | {"probed": _PROBED, "forget_at": from_now(self._keep)}},
                # A chunk may have changed after an archive whose deletion failed.
                {"$merge": {"into": "attempts", "whenMatched": "replace"}},
            ],
        ).to_list(None)

    @dependency_errors()
    async def census(self) -> Counter[ChunkState]:
        numbers = await asyncio.gather(*map(self._count_up_to_limit, OPEN))
        return +Counter(dict(zip(OPEN, numbers, strict=True)))

    async def _count_up_to_limit(self, state: ChunkState) -> int:
        return await self._chunks.count_documents({"state": state.value}, limit=MAX_COUNTED)

    @dependency_errors()
    async def _find(self, wanted: Document, limit: int = 0) -> list[Chunk]:
        return await documents.read_all(documents.read_chunk, self._chunks.find(wanted).limit(limit), "chunks")
