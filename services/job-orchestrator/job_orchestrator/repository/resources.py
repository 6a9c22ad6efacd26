"""Store the objects of resources in MongoDB."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterable, Callable, Collection
from datetime import datetime, timedelta
from typing import Final, Generic

from pymongo import IndexModel, UpdateOne

from job_orchestrator.domain.resources import Content, Owned, ScanTarget, Subnet
from job_orchestrator.repository import documents
from scanfleet.contracts import rest
from scanfleet.runtime.mongo import Database, Document, Ids, count, dependency_errors, insert_missing

_KEYS: Final = 1_000  # per query
_LINES: Final = 100  # per query

_NEWEST: Final = IndexModel([("user_id", 1), ("_id", -1)])
# A deleted object leaves its id for longer than the Idempotency-Key of its creation is kept.
_FORGOTTEN: Final = IndexModel([("deleted_at", 1)], expireAfterSeconds=int(timedelta(days=8).total_seconds()))
INDEXES: Final = {each.plural: [_NEWEST, _FORGOTTEN] for each in rest.RESOURCES} | {
    rest.SUBNETS.plural: [
        _NEWEST,
        _FORGOTTEN,
        IndexModel([("user_id", 1), ("cidr", 1)]),
        IndexModel([("user_id", 1), ("name", 1)]),
    ]
}


class MongoResources(Generic[Content]):
    """`ResourceRepository` on MongoDB.

    Args:
        database: the orchestrator's database.
        name: of the collection and of the sequence of ids.
        write: converts to a document.
        read: converts from a document.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        write: Callable[[Owned[Content]], Document],
        read: Callable[[Document], Owned[Content]],
    ) -> None:
        self._collection = database[name]
        self._ids = Ids(database, name)
        self._write = write
        self._read = read

    async def take_ids(self, count: int = 1) -> range:
        return await self._ids.take(count)

    @dependency_errors()
    async def exists(self, id_: int) -> bool:
        return await self._collection.find_one({"_id": id_} | documents.NOT_DELETED, {"_id": 1}) is not None

    @dependency_errors()
    async def count(self, user_id: int, limit: int) -> int:
        return await self._collection.count_documents({"user_id": user_id}, limit=limit)

    async def add(self, *resources: Owned[Content]) -> None:
        await insert_missing(self._collection, [self._write(each) for each in resources])

    async def get(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Owned[Content]]:
        found: dict[tuple[int, int], Owned[Content]] = {}
        ordered = sorted(set(keys))
        for start in range(0, len(ordered), _KEYS):
            by_user: defaultdict[int, list[int]] = defaultdict(list)
            for user_id, id_ in ordered[start : start + _KEYS]:
                by_user[user_id].append(id_)
            wanted = {"$or": [{"user_id": user_id, "_id": {"$in": ids}} for user_id, ids in by_user.items()]}
            async with dependency_errors():
                found |= {(each.user_id, each.id): each for each in await self._readable(self._collection.find(wanted))}
        return found

    @dependency_errors()
    async def page(self, user_id: int, skip: int, limit: int) -> tuple[list[Owned[Content]], int]:
        wanted = {"user_id": user_id}
        newest = self._collection.find(wanted).sort("_id", -1).skip(skip).limit(limit)
        page, total = await asyncio.gather(self._readable(newest), count(self._collection, wanted))
        return page, total

    @dependency_errors()
    async def replace(self, resource: Owned[Content], *, unchanged_since: datetime | None = None) -> bool:
        wanted, update = self._update(resource)
        if unchanged_since is not None:
            wanted["updated_at"] = unchanged_since
        return (await self._collection.update_one(wanted, update)).matched_count == 1

    @dependency_errors()
    async def replace_all(self, resources: Collection[Owned[Content]]) -> bool:
        writes = [UpdateOne(*self._update(each)) for each in resources]
        if not writes:
            return True
        return (await self._collection.bulk_write(writes, ordered=False)).matched_count == len(writes)

    @dependency_errors()
    async def delete(self, user_id: int, id_: int) -> bool:
        deleted = [{"$replaceWith": {"_id": "$_id", "deleted_at": "$$NOW"}}]
        return (await self._collection.update_one({"_id": id_, "user_id": user_id}, deleted)).matched_count == 1

    def _update(self, resource: Owned[Content]) -> tuple[Document, Document]:
        """Return the filter and the update that replace the object; fields of other releases are kept."""
        document = self._write(resource)
        return {"_id": document.pop("_id"), "user_id": document["user_id"]}, {"$set": document}

    async def _readable(self, found: AsyncIterable[Document]) -> list[Owned[Content]]:
        return await documents.read_all(self._read, found, self._collection.name)


class MongoSubnets(MongoResources[ScanTarget]):
    def __init__(self, database: Database) -> None:
        super().__init__(database, rest.SUBNETS.plural, documents.write_subnet, documents.read_subnet)

    async def equal_to(self, user_id: int, lines: Collection[tuple[str, ScanTarget]]) -> list[Subnet]:
        # The server compares and groups: a user may have thousands of equal subnets with a thousand exclusions each.
        found: list[Subnet] = []
        wanted = [{"name": name, "cidr": target.cidr, "exclude": list(target.exclude)} for name, target in lines]
        for start in range(0, len(wanted), _LINES):
            some = wanted[start : start + _LINES]
            steps: list[Document] = [
                {"$match": {"user_id": user_id, "cidr": {"$in": [each["cidr"] for each in some]}, "$or": some}},
                {"$group": {"_id": {name: f"${name}" for name in some[0]}, "first": {"$first": "$$ROOT"}}},
                {"$replaceRoot": {"newRoot": "$first"}},
            ]
            async with dependency_errors():
                found += await self._readable(self._collection.aggregate(steps))
        return found

    @dependency_errors()
    async def named(self, user_id: int, names: Collection[str]) -> list[Subnet]:
        found = self._collection.find({"user_id": user_id, "name": {"$in": list(names)}}, {"exclude": 0})
        return await documents.read_all(_read_without_exclusions, found, self._collection.name)

    @dependency_errors()
    async def count_excludes(self, user_id: int, ids: Collection[int]) -> int:
        number = {"$cond": [{"$isArray": "$exclude"}, {"$size": "$exclude"}, 0]}
        total = self._collection.aggregate(
            [
                {"$match": {"_id": {"$in": list(ids)}, "user_id": user_id}},
                {"$group": {"_id": None, "excludes": {"$sum": number}}},
            ]
        )
        return sum([each["excludes"] async for each in total])


def _read_without_exclusions(document: Document) -> Subnet:
    return documents.read_subnet(document | {"exclude": ()})
