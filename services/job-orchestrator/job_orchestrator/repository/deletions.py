"""Store receipts of deleted jobs in MongoDB, in the place of the jobs."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

from job_orchestrator.domain.deletion import KEEP_RECEIPTS, Deletion, Stage
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.repository import documents
from job_orchestrator.repository.compare_and_set import NO_RECEIPT
from scanfleet.runtime.mongo import Database, Document, dependency_errors

_UNREADABLE_PAUSE: Final = timedelta(hours=1)  # between two attempts to read a receipt, which an operator has to repair


class MongoDeletions:
    """`DeletionRepository` on MongoDB. The indexes are those of the jobs."""

    def __init__(self, database: Database) -> None:
        self._jobs = database["jobs"]

    @dependency_errors()
    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:
        document = documents.write_deletion(receipt) | {"due": receipt.requested_at}
        wanted = {"_id": job.id, "rev": job.rev} | NO_RECEIPT
        return (await self._jobs.replace_one(wanted, document)).matched_count == 1

    @dependency_errors()
    async def due(self, now: datetime, limit: int) -> list[Deletion]:
        found = await self._jobs.find({"due": {"$lte": now}}).sort("due", 1).limit(limit).to_list(limit)
        receipts = [documents.readable(documents.read_deletion, each, "jobs") for each in found]
        unreadable = [each["_id"] for each, receipt in zip(found, receipts, strict=True) if receipt is None]
        if unreadable:  # else they would be the longest waiting ones again and again, and could fill every answer
            # Unless another release, which can read them, has advanced them meanwhile.
            still_due = {"_id": {"$in": unreadable}, "due": {"$lte": now}}
            await self._jobs.update_many(still_due, {"$set": {"due": now + _UNREADABLE_PAUSE}})
        return [receipt for receipt in receipts if receipt is not None]

    @dependency_errors()
    async def advance(self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None) -> int:
        if not job_ids:
            return 0
        forget_at = {"$add": ["$$NOW", int(KEEP_RECEIPTS.total_seconds() * 1_000)]}
        at: Document = {"due": "$$REMOVE", "forget_at": forget_at} if due is None else {"due": due}
        moved = await self._jobs.update_many(
            {"_id": {"$in": list(job_ids)}, "deletion.stage": stage.value},
            [{"$set": {"deletion.stage": to.value} | at}],
        )
        return moved.matched_count
