"""What services have refused, into the audit log."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from job_orchestrator.domain.store import Store
from scanfleet.bus import Record
from scanfleet.errors import MessageError
from scanfleet.messages import Audited


class Audit:
    """Handles scan-audit."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def handle(self, records: Sequence[Record]) -> None:
        await self._store.add_audit([_audited(record).entry for record in records])

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...


def _audited(record: Record) -> Audited:
    if not isinstance(record.message, Audited):
        raise MessageError(f"{type(record.message).__name__} is no entry of the audit log")
    return record.message
