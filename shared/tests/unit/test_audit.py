"""Refusals are published to the audit log, within limits."""

from __future__ import annotations

from typing import Any

import pytest

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import Audited, AuditEntry
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_WORKERS
from scanfleet.errors import DependencyError
from scanfleet.security import audit
from scanfleet.security.audit import MERGED, SINGLES, WINDOW_SECONDS, Refusals
from scanfleet.services import GATEWAY
from scanfleet_testing.audit import refusal
from scanfleet_testing.bus import MemoryBus


class Time:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def refusals(time: Time) -> Refusals:
    return Refusals("api-gateway", monotonic=time)


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus()


def entry(number: int, **changed: Any) -> AuditEntry:
    return refusal(**{"id": f"id-{number}", "request_id": f"r-{number}", "time": utc_now()} | changed)


def published(bus: MemoryBus) -> list[AuditEntry]:
    return [each.entry for each in bus.messages(SCAN_AUDIT[GATEWAY]) if isinstance(each, Audited)]


async def test_flush_publishes_each_refusal_once(refusals: Refusals, bus: MemoryBus) -> None:
    """Each refusal is one entry, published once."""
    entries = [entry(number) for number in range(3)]
    for each in entries:
        refusals.add(each)
    await refusals.flush(bus)
    await refusals.flush(bus)
    assert published(bus) == entries


async def test_refusals_above_the_limit_of_a_subject_are_counted(
    refusals: Refusals, time: Time, bus: MemoryBus
) -> None:
    """Above the limit, equal refusals of a subject become one entry with their number when the window ends."""
    for number in range(SINGLES + 500):
        refusals.add(entry(number))
    refusals.add(entry(9_999, subject="7"))
    await refusals.flush(bus)
    assert len(published(bus)) == SINGLES + 1
    time.now += WINDOW_SECONDS
    await refusals.flush(bus)
    last = published(bus)[-1]
    assert (last.count, last.request_id, last.source) == (500, f"r-{SINGLES + 499}", "192.0.2.17")
    assert sum(each.count for each in published(bus)) == SINGLES + 501
    refusals.add(entry(10_000))
    await refusals.flush(bus)
    assert published(bus)[-1] == entry(10_000, time=published(bus)[-1].time)


async def test_refusals_from_many_addresses_are_bounded_and_counted(
    refusals: Refusals, time: Time, bus: MemoryBus
) -> None:
    """With refusals from any number of addresses, a window has a bounded number of entries, and all are counted."""
    flood = SINGLES + 3 * MERGED
    for number in range(flood):
        refusals.add(entry(number, source=f"2001:db8::{number:x}"))
    time.now += WINDOW_SECONDS
    await refusals.flush(bus)
    assert len(published(bus)) == SINGLES + MERGED + 1
    assert sum(each.count for each in published(bus)) == flood


async def test_flush_without_the_bus_keeps_refusals_pending(
    refusals: Refusals, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the bus is unavailable refusals stay pending, up to a limit, and are published after its recovery."""
    monkeypatch.setattr(audit, "WAITING", 3)
    bus.broker.unavailable = True
    for number in range(5):
        refusals.add(entry(number, subject=str(number)))
    with pytest.raises(DependencyError):
        await refusals.flush(bus)
    bus.broker.unavailable = False
    await refusals.flush(bus)
    assert [each.id for each in published(bus)] == ["id-0", "id-1", "id-2"]


async def test_publishing_to_publishes_the_rest_at_exit(refusals: Refusals, bus: MemoryBus) -> None:
    """A process that shuts down gracefully publishes the refusals that it has counted."""
    async with refusals.publishing_to(bus):
        for number in range(SINGLES + 2):
            refusals.add(entry(number))
    assert sum(each.count for each in published(bus)) == SINGLES + 2


@pytest.mark.proves("G15", "A13")
async def test_dead_letter_is_recorded_as_a_refusal(refusals: Refusals, bus: MemoryBus) -> None:
    """A malformed message gets an entry with its position."""

    class Reader:
        async def handle(self, records: object) -> None: ...

    consumer = bus.consume(SCAN_WORKERS, "group", Reader())
    async with refusals.publishing_to(bus):
        await consumer.start()
        bus.broker.append("scan-workers", 3, value=b"junk", headers=[("ce_subject", b"worker/w-1")])
        while not bus.broker.records("scan-workers-dlq"):
            await bus.broker.news(1)
        await consumer.stop()
    (entry,) = published(bus)
    assert (entry.rule, entry.source, entry.action) == ("message", "scan-workers/3/0", "consume scan-workers")
    assert entry.target.startswith("worker/w-1: not a CloudEvents")
