"""Store audit entries: those of this service, the refusals of all services, and operators' commands."""

from __future__ import annotations

from collections.abc import Sequence

from job_orchestrator.domain.ports import AuditRepository
from scanfleet.contracts.messages import Audited, AuditEntry, OperatorActed
from scanfleet.contracts.messages.audit import RESTORE
from scanfleet.contracts.messages.topics import OPERATOR
from scanfleet.errors import MessageError
from scanfleet.runtime.bus import Record
from scanfleet.security.audit import write_line


async def record(audit: AuditRepository, entries: Sequence[AuditEntry]) -> None:
    """Store the entries in the audit log, and write them to this process's log.

    Raises:
        DependencyError: none or some of them are stored; a retry stores the others.
    """
    await audit.add(entries)
    for entry in entries:
        write_line(entry)


class Audit:
    """Handles the audit topic of one service.

    An entry is attributed to this service regardless of its content, since the broker allows no other service to write to the
    topic. Its id is in the service's own namespace, so that it cannot suppress an entry of another service.
    """

    def __init__(self, audit: AuditRepository, service: str) -> None:
        self._audit = audit
        self._service = service

    async def handle(self, records: Sequence[Record[Audited | OperatorActed]]) -> None:
        entries = [self._entry(record.message) for record in records]
        await self._audit.add([entry.model_copy(update={"service": self._service}) for entry in entries])

    def _entry(self, message: Audited | OperatorActed) -> AuditEntry:
        match message:
            case Audited(entry=entry):
                return entry
            case OperatorActed(entry=entry) if self._service == OPERATOR or entry.action == RESTORE:
                return entry
        raise MessageError(f"{type(message).__name__} is not a permitted message of {self._service}'s audit topic")
