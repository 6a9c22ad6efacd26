"""Receipts of deleted jobs in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime

from job_orchestrator.domain.deletion import Deletion, Stage
from job_orchestrator.domain.job import ScanJob
from job_orchestrator_testing.repository.data import MemoryRepository


class MemoryDeletions(MemoryRepository):
    """A `DeletionRepository`."""

    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:
        if self._data.jobs.get(job.id) != job:
            return False
        del self._data.jobs[job.id]
        self._data.receipts[job.id] = (receipt, receipt.requested_at)
        return True

    async def due(self, now: datetime, limit: int) -> list[Deletion]:
        due = sorted((at, id_) for id_, (_, at) in self._data.receipts.items() if at is not None and at <= now)
        return [self._data.receipts[id_][0] for _, id_ in due[:limit]]

    async def advance(self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None) -> int:
        found = {id_: self._data.receipts[id_][0] for id_ in job_ids if id_ in self._data.receipts}
        moved = {id_: (replace(each, stage=to), due) for id_, each in found.items() if each.stage is stage}
        self._data.receipts |= moved
        return len(moved)
