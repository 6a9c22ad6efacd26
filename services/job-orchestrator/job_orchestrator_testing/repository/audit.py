"""The audit log in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from job_orchestrator_testing.repository.data import Data, MemoryRepository
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry


class MemoryAudit(MemoryRepository):
    """An `AuditRepository`; `now` is the time of what it receives."""

    def __init__(self, data: Data, now: Callable[[], datetime] = utc_now) -> None:
        super().__init__(data)
        self._now = now

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        now = self._now()
        for entry in entries:
            id_ = f"{entry.service}/{entry.id}"
            kept = rest.AuditEntry(**entry.model_dump() | {"id": id_, "received_at": now})
            self._data.audit.setdefault(id_, kept)

    async def page(
        self,
        skip: int,
        limit: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        **words: str | None,
    ) -> tuple[list[rest.AuditEntry], int]:
        found = [
            entry
            for entry in self._data.audit.values()
            if all(value in (None, getattr(entry, name)) for name, value in words.items())
            and (since is None or entry.received_at >= since)
            and (until is None or entry.received_at < until)
        ]
        found.sort(key=lambda entry: (entry.received_at, entry.id), reverse=True)
        return found[skip : skip + limit], len(found)
