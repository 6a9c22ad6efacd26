"""Resources in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import Generic

from job_orchestrator.domain.resources import Content, Owned, ScanTarget, Subnet
from job_orchestrator_testing.repository.data import Data, MemoryRepository


class MemoryResources(MemoryRepository, Generic[Content]):
    """A `ResourceRepository`."""

    def __init__(self, data: Data, name: str) -> None:
        super().__init__(data)
        self._name = name
        self._resources: dict[int, Owned[Content]] = {}
        self._deleted: set[int] = set()

    async def take_ids(self, count: int = 1) -> range:
        return self._take_ids(self._name, count)

    async def exists(self, id_: int) -> bool:
        return id_ in self._resources

    async def count(self, user_id: int, limit: int) -> int:
        return min(limit, len(self._of(user_id)))

    async def add(self, *resources: Owned[Content]) -> None:
        for each in resources:
            if each.id not in self._deleted:
                self._resources.setdefault(each.id, each)

    async def get(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Owned[Content]]:
        return {key: each for each in self._resources.values() if (key := (each.user_id, each.id)) in keys}

    async def page(self, user_id: int, skip: int, limit: int) -> tuple[list[Owned[Content]], int]:
        mine = sorted(self._of(user_id), key=lambda each: -each.id)
        return mine[skip : skip + limit], len(mine)

    async def replace(self, resource: Owned[Content], *, unchanged_since: datetime | None = None) -> bool:
        before = (await self.get([(resource.user_id, resource.id)])).get((resource.user_id, resource.id))
        known = before is not None and unchanged_since in (None, before.updated_at)
        if known:
            self._resources[resource.id] = resource
        return known

    async def replace_all(self, resources: Collection[Owned[Content]]) -> bool:
        known = await self.get([(each.user_id, each.id) for each in resources])
        self._resources |= {each.id: each for each in resources if (each.user_id, each.id) in known}
        return len(known) == len(resources)

    async def delete(self, user_id: int, id_: int) -> bool:
        if not await self.get([(user_id, id_)]):
            return False
        del self._resources[id_]
        self._deleted.add(id_)
        return True

    def _of(self, user_id: int) -> list[Owned[Content]]:
        return [each for each in self._resources.values() if each.user_id == user_id]


class MemorySubnets(MemoryResources[ScanTarget]):
    async def equal_to(self, user_id: int, lines: Collection[tuple[str, ScanTarget]]) -> list[Subnet]:
        by_line = {(each.name, each.content): each for each in self._of(user_id)}
        return [each for line, each in by_line.items() if line in lines]

    async def named(self, user_id: int, names: Collection[str]) -> list[Subnet]:
        found = [each for each in self._of(user_id) if each.name in names]
        return [replace(each, content=replace(each.content, exclude=())) for each in found]

    async def count_excludes(self, user_id: int, ids: Collection[int]) -> int:
        return sum(len(each.content.exclude) for each in self._of(user_id) if each.id in ids)
