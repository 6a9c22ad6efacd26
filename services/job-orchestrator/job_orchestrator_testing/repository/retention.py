"""Retention of subnets in memory."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from job_orchestrator.domain.ports import SubnetRepository
from job_orchestrator.domain.retention import PROTECTED, SubnetRetention
from job_orchestrator_testing.repository.data import Data, MemoryRepository
from scanfleet.contracts.messages import JobStatus


class MemoryRetention(MemoryRepository):
    """A `RetentionRepository`."""

    def __init__(self, data: Data, subnets: SubnetRepository) -> None:
        super().__init__(data)
        self._subnets = subnets
        self._days: dict[int, int] = {}
        self._halted: timedelta | None = None
        self._walk: datetime | None = None

    async def days(self, subnet_id: int) -> int | None:
        return self._days.get(subnet_id) if await self._subnets.exists(subnet_id) else None

    async def set_days(self, subnet_id: int, days: int | None) -> bool:
        if not await self._subnets.exists(subnet_id):
            return False
        self._days.pop(subnet_id, None)
        if days is not None:
            self._days[subnet_id] = days
        return True

    async def shortest(self) -> int | None:
        return min([days for id_, days in self._days.items() if await self._subnets.exists(id_)], default=None)

    async def begin_walk(self, now: datetime) -> datetime | None:
        before, self._walk = self._walk, now
        return before

    async def halt(self, jump: timedelta) -> None:
        self._halted = self._halted or jump

    async def halted(self) -> timedelta | None:
        return self._halted

    async def resume(self) -> bool:
        halted, self._halted, self._walk = self._halted, None, None
        return halted is not None

    async def of(self, subnet_ids: Collection[int]) -> dict[int, SubnetRetention]:
        return {
            id_: SubnetRetention(await self.days(id_), self._newest(id_))
            for id_ in subnet_ids
            if await self._subnets.exists(id_)
        }

    def _newest(self, subnet_id: int) -> frozenset[int]:
        completed: list[tuple[datetime, int]] = sorted(
            (job.end_time, job.id)
            for job in self._data.jobs.values()
            if job.subnet_id == subnet_id and job.status is JobStatus.COMPLETED and job.end_time
        )
        return frozenset(id_ for _, id_ in completed[-PROTECTED:])
