"""Receipts of deleted jobs in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime

from job_orchestrator.domain.census import DeletionCensus
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.job import ScanJob
from job_orchestrator_testing.repository.data import MemoryRepository
from scanfleet.clock import utc_now


class MemoryDeletions(MemoryRepository):
    """A `DeletionRepository`."""

    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:
        if self._data.jobs.get(job.id) != job:
            return False
        del self._data.jobs[job.id]
        self._data.receipts[job.id] = (receipt, receipt.requested_at)
        return True

    async def due(self, now: datetime, limit: int, *, chunks: bool) -> list[Deletion]:
        due = sorted(
            (at, id_)
            for id_, (receipt, at) in self._data.receipts.items()
            if at is not None and at <= now and (receipt.stage is Stage.CHUNKS) is chunks
        )
        return [self._data.receipts[id_][0] for _, id_ in due[:limit]]

    async def advance(
        self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None, counts: Counts | None = None
    ) -> int:
        found = {id_: self._data.receipts[id_][0] for id_ in job_ids if id_ in self._data.receipts}
        completed_at = utc_now() if due is None else None
        moved = {
            id_: (replace(each, stage=to, counts=counts or each.counts, completed_at=completed_at), due)
            for id_, each in found.items()
            if each.stage is stage
        }
        self._data.receipts |= moved
        return len(moved)

    async def page(
        self, user_id: int | None, stages: Collection[Stage], skip: int, limit: int
    ) -> tuple[list[Deletion], int]:
        receipts = [each for each, _ in self._data.receipts.values()]
        found = [each for each in receipts if user_id in (None, each.user_id) and each.stage in stages]
        found.sort(key=lambda each: (each.requested_at, each.job_id), reverse=True)
        return found[skip : skip + limit], len(found)

    async def census(self) -> DeletionCensus:
        open_ = [each.requested_at for each, _ in self._data.receipts.values() if each.stage is not Stage.DONE]
        return DeletionCensus(len(open_), max(((utc_now() - at).total_seconds() for at in open_), default=0.0))
