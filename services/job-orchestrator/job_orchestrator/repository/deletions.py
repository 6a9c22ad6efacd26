"""Store receipts of deleted jobs in MongoDB, in the place of the jobs."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import IndexModel

from job_orchestrator.domain.census import DeletionCensus
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.repository import documents
from job_orchestrator.repository.compare_and_set import NO_RECEIPT, RECEIPT
from job_orchestrator.repository.jobs import age, date, from_now
from scanfleet.runtime.mongo import Cursor, Database, Document, count, dependency_errors

_NEWEST: Final = [("deletion.requested_at", -1), ("_id", -1)]

INDEXES: Final = {
    "jobs": [  # of receipts only, so that writes of jobs cost nothing more
        IndexModel([("deletion.user_id", 1), ("deletion.stage", 1), *_NEWEST], partialFilterExpression=RECEIPT),
        IndexModel([("deletion.stage", 1), *_NEWEST], partialFilterExpression=RECEIPT),
        IndexModel([("deletion.stage", 1), ("due", 1)], partialFilterExpression=RECEIPT, name="due_1_v2"),
    ],
}

_UNREADABLE_PAUSE: Final = timedelta(hours=1)  # interval of attempts to read a receipt, which an operator has to repair


class MongoDeletions:
    """`DeletionRepository` on MongoDB."""

    def __init__(self, database: Database, keep: timedelta) -> None:
        self._jobs = database["jobs"]
        self._keep = keep

    @dependency_errors()
    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:
        document = documents.write_deletion(receipt) | {"due": receipt.requested_at}
        wanted = {"_id": job.id, "rev": job.rev} | NO_RECEIPT
        return (await self._jobs.replace_one(wanted, document)).matched_count == 1

    @dependency_errors()
    async def due(self, now: datetime, limit: int, *, chunks: bool) -> list[Deletion]:
        stages = [Stage.CHUNKS] if chunks else [Stage.WAITING, Stage.RESULTS]
        found = await self._due({"$in": [stage.value for stage in stages]}, now, limit).sort("due", 1).to_list(limit)
        if not chunks:  # of another release, or damaged
            unknown = {"$exists": True, "$nin": [stage.value for stage in Stage]}
            found += await self._due(unknown, now, limit).to_list(limit)
        receipts = [documents.readable(documents.read_deletion, each, "deletions") for each in found]
        unreadable = [each["_id"] for each, receipt in zip(found, receipts, strict=True) if receipt is None]
        if unreadable:  # otherwise they would stay the longest waiting ones, and could fill every result
            # Unless another release, which can read them, has advanced them meanwhile.
            still_due = {"_id": {"$in": unreadable}, "due": {"$lte": now}}
            await self._jobs.update_many(still_due, {"$set": {"due": now + _UNREADABLE_PAUSE}})
        return [receipt for receipt in receipts if receipt is not None]

    def _due(self, stage: Document, now: datetime, limit: int) -> Cursor:
        return self._jobs.find({"deletion.stage": stage, "due": {"$lte": now}}).limit(limit)

    @dependency_errors()
    async def advance(
        self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None, counts: Counts | None = None
    ) -> int:
        if not job_ids:
            return 0
        changes: dict[str, Any] = {"deletion.stage": to.value}
        if due is None:
            changes |= {"due": "$$REMOVE", "forget_at": from_now(self._keep), "deletion.completed_at": "$$NOW"}
        else:
            changes |= {"due": due, "deletion.completed_at": None}
        if counts is not None:
            changes["deletion.counts"] = documents.write_counts(counts)
        moved = await self._jobs.update_many(
            {"_id": {"$in": list(job_ids)}, "deletion.stage": stage.value}, [{"$set": changes}]
        )
        return moved.matched_count

    @dependency_errors()
    async def page(
        self, user_id: int | None, stages: Collection[Stage], skip: int, limit: int
    ) -> tuple[list[Deletion], int]:
        wanted: Document = {"deletion.stage": {"$in": [stage.value for stage in stages]}}
        if user_id is not None:
            wanted["deletion.user_id"] = user_id
        page = self._jobs.find(wanted).sort(_NEWEST).skip(skip).limit(limit)
        receipts = await documents.read_all(documents.read_deletion, page, "deletions")
        return receipts, await count(self._jobs, wanted)

    @dependency_errors()
    async def census(self) -> DeletionCensus:
        groups = self._jobs.aggregate(
            [
                {"$match": {"deletion.stage": {"$in": [stage.value for stage in Stage if stage is not Stage.DONE]}}},
                {"$group": {"_id": None, "n": {"$sum": 1}, "oldest": {"$min": date("$deletion.requested_at")}}},
                {"$set": {"age": age("$oldest")}},
            ],
        )
        async for found in groups:
            return DeletionCensus(found["n"], found["age"])
        return DeletionCensus()
