"""Store the retention of subnets in MongoDB, in their documents; the repository of subnets keeps the field."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import IndexModel

from job_orchestrator.domain.retention import PROTECTED, SubnetRetention
from job_orchestrator.repository.documents import NOT_DELETED
from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.runtime.mongo import Database, Document, dependency_errors

_HALTED: Final = {"_id": "halted"}
_WALK: Final = {"_id": "walk"}
_COMPLETED: Final = {"status": JobStatus.COMPLETED.value}

INDEXES: Final = {
    rest.SUBNETS.plural: [IndexModel([("keep_results_days", 1)], sparse=True)],
    "jobs": [IndexModel([("subnet_id", 1), ("end_time", -1), ("_id", -1)], partialFilterExpression=_COMPLETED)],
}


class MongoRetention:
    """`RetentionRepository` on MongoDB."""

    def __init__(self, database: Database) -> None:
        self._subnets = database[rest.SUBNETS.plural]
        self._retention = database["retention"]

    @dependency_errors()
    async def days(self, subnet_id: int) -> int | None:
        return _days(await self._subnets.find_one({"_id": subnet_id}, {"keep_results_days": 1}))

    @dependency_errors()
    async def set_days(self, subnet_id: int, days: int | None) -> bool:
        update: Document = {"$unset": {"keep_results_days": ""}}
        if days is not None:
            update = {"$set": {"keep_results_days": days}}
        return (await self._subnets.update_one({"_id": subnet_id} | NOT_DELETED, update)).matched_count == 1

    @dependency_errors()
    async def shortest(self) -> int | None:
        # Without damaged values, of which the first could hide the others.
        has_own = {"keep_results_days": {"$gte": 1, "$lte": rest.MAX_DAYS, "$type": ["int", "long"]}}
        return _days(await self._subnets.find_one(has_own, {"keep_results_days": 1}, sort=[("keep_results_days", 1)]))

    @dependency_errors()
    async def begin_walk(self, now: datetime) -> datetime | None:
        before = await self._retention.find_one_and_update(_WALK, {"$set": {"at": now}}, upsert=True)
        at: Any = (before or {}).get("at")
        return at if isinstance(at, datetime) else None

    @dependency_errors()
    async def halt(self, jump: timedelta) -> None:
        halted = {"jump_seconds": jump.total_seconds()}
        await self._retention.update_one(_HALTED, {"$setOnInsert": halted}, upsert=True)

    @dependency_errors()
    async def halted(self) -> timedelta | None:
        found = await self._retention.find_one(_HALTED)
        if found is None:
            return None
        seconds: Any = found.get("jump_seconds")
        return timedelta(seconds=seconds if isinstance(seconds, int | float) else 0)  # also a damaged halt is one

    @dependency_errors()
    async def resume(self) -> bool:
        await self._retention.delete_one(_WALK)  # recorded before the halt, so that the next walk would halt again
        return (await self._retention.delete_one(_HALTED)).deleted_count == 1

    @dependency_errors()
    async def of(self, subnet_ids: Collection[int]) -> dict[int, SubnetRetention]:
        newest = {
            "from": "jobs",
            "localField": "_id",
            "foreignField": "subnet_id",
            "pipeline": [
                {"$match": _COMPLETED},
                {"$sort": {"end_time": -1, "_id": -1}},
                {"$limit": PROTECTED},
                {"$project": {"_id": 1}},
            ],
            "as": "newest",
        }
        found = self._subnets.aggregate(
            [
                {"$match": {"_id": {"$in": list(subnet_ids)}} | NOT_DELETED},
                {"$project": {"keep_results_days": 1}},
                {"$lookup": newest},
            ]
        )
        return {
            each["_id"]: SubnetRetention(_days(each), frozenset(job["_id"] for job in each["newest"]))
            async for each in found
        }


def _days(document: Document | None) -> int | None:
    days: Any = (document or {}).get("keep_results_days")
    is_valid = isinstance(days, int) and not isinstance(days, bool) and 1 <= days <= rest.MAX_DAYS
    return days if is_valid else None  # a damaged value counts as none
