"""Record a process's refusals: in its own log at once, in the audit log within a second or two.

Changes are not recorded here: job-orchestrator makes all of them and writes an audit entry before each one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from uuid import uuid4

import structlog
from prometheus_client import Counter as Metric

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import Audited, AuditEntry, ScanChunk
from scanfleet.contracts.messages.audit import MAX_TARGET_CHARS
from scanfleet.contracts.messages.envelope import RawRecord
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_TASKS
from scanfleet.errors import DependencyError, Rule
from scanfleet.runtime.bus import Bus, Publisher, Record
from scanfleet.runtime.loop import Loop

PUBLISH_INTERVAL_SECONDS: Final = 1.0
WINDOW_SECONDS: Final = 60.0  # window in which equal refusals are aggregated
SINGLES: Final = 100  # individual entries per subject and window; all anonymous callers are one subject
MERGED: Final = 1_000  # kinds of further refusals per window; above that only the rule is recorded
WAITING: Final = 10_000  # entries kept while the bus is unavailable: a few megabytes


_Kind = tuple[str, str, str, str]

_lost = Metric(
    "scanfleet_audit_lost_total", "Refusals that were written to this process's log but not to the audit log."
)
_log = structlog.stdlib.get_logger(__name__)


def write_line(entry: AuditEntry) -> None:
    """Write the entry to this process's log."""
    _log.info("audit_entry_created", **entry.model_dump(mode="json", exclude={"service"}))


class Refusals:
    """Collects refusals and publishes them; memory and output are bounded whatever the number of refusals.

    The first `SINGLES` refusals of a subject in a window are individual entries. Further ones are counted by subject,
    source, action and rule, and published when the window ends.
    """

    def __init__(self, service: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.service = service
        self._monotonic = monotonic
        self._window_end = monotonic() + WINDOW_SECONDS
        self._singles: Counter[str] = Counter()
        self._merged: dict[_Kind, AuditEntry] = {}
        self._waiting: list[AuditEntry] = []

    def add(self, entry: AuditEntry) -> None:
        self._turn_window()
        self._singles[entry.subject] += 1
        if self._singles[entry.subject] <= SINGLES:
            self._put(entry)
            return
        kind = (entry.subject, entry.source, entry.action, entry.rule)
        if kind not in self._merged and len(self._merged) >= MERGED:
            kind = ("", "", "", entry.rule)
            entry = entry.model_copy(update={"subject": "", "source": "", "action": ""})
        before = self._merged.get(kind)
        self._merged[kind] = entry.model_copy(update={"count": before.count + 1}) if before else entry

    def add_dead_letter(self, record: RawRecord, reason: str) -> None:
        """Record a message that can never be handled: malformed, forged, or of an unknown version."""
        claimed = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
        source = f"{record.topic}/{record.partition}/{record.offset}"
        self._add_message(record.topic, source, "", f"{claimed.get('ce_subject', '')}: {reason}", Rule.MESSAGE)

    def add_denied_chunk(self, chunk: ScanChunk, reason: str, rule: Rule) -> None:
        """Record a chunk with forbidden targets: the rules have changed since its acceptance, or it is forged."""
        topic = SCAN_TASKS.name
        self._add_message(topic, topic, str(chunk.user_id), f"{chunk.subject}: {reason}", rule)

    def add_uncovered(self, record: Record, reason: str) -> None:
        """Record a result without a valid grant: its sender is forged, compromised or of an older release."""
        self._add_message(record.topic, record.topic, "", f"{record.message.subject}: {reason}", Rule.SIGNATURE)

    async def flush(self, publisher: Publisher) -> None:
        """Publish the pending entries.

        Raises:
            DependencyError: the entries stay pending. Some may have been published; they keep their ids, so readers
                deduplicate.
        """
        self._turn_window()
        entries = self._waiting[:]
        await publisher.publish(SCAN_AUDIT[self.service], [Audited(entry=entry) for entry in entries])
        del self._waiting[: len(entries)]

    @asynccontextmanager
    async def publishing_to(self, bus: Bus) -> AsyncIterator[Loop]:
        """Publish refusals, including the bus's dead letters, in the background; publish the remaining ones at exit."""
        bus.on_dead_letter(self.add_dead_letter)
        loop = Loop("audit", PUBLISH_INTERVAL_SECONDS, lambda: self.flush(bus))
        await loop.start()
        try:
            yield loop
        finally:
            await loop.stop()
            self._window_end = float("-inf")
            try:
                await self.flush(bus)
            except DependencyError as error:
                _lost.inc(len(self._waiting))
                _log.error("refusals_unpublished", entries=len(self._waiting), error=str(error))

    def _add_message(self, topic: str, source: str, subject: str, target: str, rule: Rule) -> None:
        self.add(
            AuditEntry(
                id=uuid4().hex,
                time=utc_now(),
                service=self.service,
                subject=subject,
                source=source,
                action=f"consume {topic}",
                target=target[:MAX_TARGET_CHARS],
                decision="refused",
                rule=rule,
                request_id="",
            ),
        )

    def _turn_window(self) -> None:
        if (now := self._monotonic()) < self._window_end:
            return
        for entry in self._merged.values():
            self._put(entry)
        self._merged.clear()
        self._singles.clear()
        self._window_end = now + WINDOW_SECONDS

    def _put(self, entry: AuditEntry) -> None:
        write_line(entry)
        if len(self._waiting) < WAITING:
            self._waiting.append(entry)
        else:
            _lost.inc(entry.count)
