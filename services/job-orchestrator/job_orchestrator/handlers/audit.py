"""Store audit entries: those of this service, the refusals of all services, and operators' commands."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.ports import AuditRepository
from job_orchestrator.metrics import AUDIT_EXCESS
from scanfleet.contracts.messages import Audited, AuditEntry, OperatorActed
from scanfleet.contracts.messages.audit import RESTORE
from scanfleet.contracts.messages.topics import OPERATOR, SCAN_AUDIT, SCAN_AUDIT_OPERATOR
from scanfleet.errors import MessageError, Rule
from scanfleet.runtime.bus import PartitionListener, Record
from scanfleet.security.audit import write_line

MAX_BYTES_PER_MINUTE: Final = 500_000  # 720 MB a day, and 550 to 800 entries a minute
MAX_BYTES_AT_ONCE: Final = 30_000_000  # each process sends up to 10,000 entries after an outage
_OVERHEAD_BYTES: Final = 300  # of an entry's signature, times and block


def stored_bytes(entry: AuditEntry) -> int:
    """Return about how many bytes the entry takes in the database."""
    return len(entry.model_dump_json().encode()) + _OVERHEAD_BYTES


async def record(audit: AuditRepository, entries: Sequence[AuditEntry]) -> None:
    """Store the entries in the audit log, and write them to this process's log.

    Raises:
        DependencyError: none or some of them are stored; a retry stores the others.
    """
    await audit.add(entries)
    for entry in entries:
        write_line(entry)


@dataclass(frozen=True, slots=True)
class _Minute:
    """The entries of a minute, by the broker's clock."""

    number: int = 0
    left: float = 0.0
    """How many more bytes are stored."""
    excess: int = 0
    """Refusals in the entries since the last counted one that are only counted."""
    offset: int = 0
    """Position of the last one."""


class Audit(PartitionListener):
    """Handles the audit topic of one service.

    An entry is attributed to this service regardless of its content, since the broker allows no other service to write to the
    topic. Its id is in the service's own namespace, so that it cannot suppress an entry of another service.

    Of a service `MAX_BYTES_PER_MINUTE` are stored, and up to `MAX_BYTES_AT_ONCE` after minutes with less, since the service may be
    compromised; further entries are counted in an entry of the orchestrator. A restart may lose this count. Entries without a
    subject have a limit of their own, so that a flood without tokens displaces no refusal of a user.
    """

    def __init__(self, audit: AuditRepository, service: str) -> None:
        self._audit = audit
        self._service = service
        self._topic = SCAN_AUDIT_OPERATOR if service == OPERATOR else SCAN_AUDIT[service]
        self._most = float("inf") if service == OPERATOR else MAX_BYTES_AT_ONCE
        self._minutes = dict.fromkeys((True, False), _Minute(left=self._most))
        """By whether the entries have a subject."""

    async def handle(self, records: Sequence[Record[Audited | OperatorActed]]) -> None:
        minutes = dict(self._minutes)
        entries: list[AuditEntry] = []
        excess = 0
        for record in records:
            entry = self._entry(record.message).model_copy(update={"service": self._service})
            minute = minutes[bool(entry.subject)]
            number = int(record.timestamp.timestamp() // 60)
            if number != minute.number:
                entries += self._counted(minute)
                more = MAX_BYTES_PER_MINUTE * max(0, number - minute.number)
                minute = _Minute(number, min(self._most, minute.left + more))
            if minute.left > 0:
                entries.append(entry)
                minute = replace(minute, left=minute.left - stored_bytes(entry))
            else:
                minute = replace(minute, excess=minute.excess + entry.count, offset=record.offset)
                excess += entry.count
            minutes[bool(entry.subject)] = minute
        await self._audit.add(entries)
        self._minutes = minutes
        AUDIT_EXCESS.labels(self._service).inc(excess)

    async def caught_up(self, partitions: Collection[int]) -> None:  # noqa: ARG002 # the topic has one
        await self._audit.add([entry for minute in self._minutes.values() for entry in self._counted(minute)])
        self._minutes = {each: replace(minute, excess=0) for each, minute in self._minutes.items()}

    def _counted(self, minute: _Minute) -> list[AuditEntry]:
        if not minute.excess:
            return []
        entry = own_entry(
            f"flood-{self._service}-{minute.offset}",
            f"consume {self._topic.name}",
            f"further refusals of {self._service} within a minute",
            "refused",
            Rule.FLOOD,
            source=self._topic.name,
            reason=f"{MAX_BYTES_PER_MINUTE} bytes a minute are stored, and up to {MAX_BYTES_AT_ONCE} after minutes with less",
        )
        return [entry.model_copy(update={"count": minute.excess})]

    def _entry(self, message: Audited | OperatorActed) -> AuditEntry:
        match message:
            case Audited(entry=entry):
                return entry
            case OperatorActed(entry=entry) if self._service == OPERATOR or entry.action == RESTORE:
                return entry
        raise MessageError(f"{type(message).__name__} is not a permitted message of {self._service}'s audit topic")
