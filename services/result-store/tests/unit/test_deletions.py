"""Deletions: the results of a deleted job leave the store, whenever they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from result_store.domain.results import Removed, Scanned
from result_store.handlers import DeletionsHandler
from result_store_testing import Log, MemoryStore, handler, host, scanned
from scanfleet.contracts.messages import DeleteResults, ResultsDeleted
from scanfleet.contracts.messages.topics import SCAN_DELETIONS
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Record
from scanfleet_testing.bus import MemoryBus

ASKED = [Record(DeleteResults(job_id=1), SCAN_DELETIONS.name, 0, 0, Log().append(scanned("a"))[0].timestamp)]


class FailingStore(MemoryStore):
    """Fails in the middle of an erasure, once."""

    failed = False

    async def erase(self, job_id: int, limit: int) -> Removed:
        if not self.failed:
            self.failed = True
            await super().erase(job_id, 3)
            raise DependencyError("MongoDB is unavailable")
        return await super().erase(job_id, limit)


def bus_and_handler(store: MemoryStore, per_second: int = 2_000) -> tuple[MemoryBus, DeletionsHandler]:
    bus = MemoryBus()
    return bus, DeletionsHandler(store, bus, per_second)


def answers(bus: MemoryBus) -> list[int]:
    return [each.job_id for each in bus.messages(SCAN_DELETIONS) if isinstance(each, ResultsDeleted)]


def batch() -> Sequence[Record[Scanned]]:
    return Log().append(*(host(f"127.9.8.{n}", 22) for n in range(5)), scanned("aaaaa"))


@pytest.mark.proves("G24")
async def test_delete_removes_hosts_and_closed_chunks_and_is_answered() -> None:
    """After the answer nothing of the job is stored; a repeated request is answered again."""
    store = MemoryStore()
    bus, deletions = bus_and_handler(store)
    await handler(store, bus).handle(batch())
    assert store.hosts
    assert store.chunks
    await deletions.handle(ASKED)
    await deletions.step()
    assert (store.hosts, store.chunks, answers(bus)) == ({}, {}, [1])
    await deletions.handle(ASKED)
    await deletions.step()
    await deletions.step()
    assert answers(bus) == [1, 1]


@pytest.mark.proves("G24")
async def test_results_of_a_deleted_job_are_deleted_again() -> None:
    """Records that are redelivered, replayed or in flight when the job is deleted leave no document."""
    store = MemoryStore()
    bus, deletions = bus_and_handler(store)
    await deletions.handle(ASKED)
    await deletions.step()
    await handler(store, bus).handle(batch())
    await deletions.step()
    assert (store.hosts, store.chunks) == ({}, {})


async def test_delete_continues_after_a_failure() -> None:
    """A step that fails halfway is not answered; another process finishes the deletion."""
    store = FailingStore()
    bus, deletions = bus_and_handler(store)
    await handler(store, bus).handle(batch())
    await deletions.handle(ASKED)
    with pytest.raises(DependencyError):
        await deletions.step()
    assert answers(bus) == []
    await DeletionsHandler(store, bus, 2_000).step()
    assert (store.hosts, store.chunks, answers(bus)) == ({}, {}, [1])


async def test_answer_to_a_partition_without_a_leader_delays_no_other_deletion() -> None:
    """A job's deletion that cannot be answered ends, as do those of other jobs; the next request is answered."""
    store = MemoryStore()
    bus, deletions = bus_and_handler(store)
    await handler(store, bus).handle(batch())
    await store.begin_deletions([1, 2])
    bus.broker.leaderless = {(SCAN_DELETIONS.name, SCAN_DELETIONS.partition_of("1"))}
    await deletions.step()
    assert (store.hosts, answers(bus), await store.open_deletions(9)) == ({}, [2], {})
    bus.broker.leaderless.clear()
    await deletions.handle(ASKED)
    await deletions.step()
    assert answers(bus) == [2, 1]


class DamagedStore(MemoryStore):
    """Cannot erase job 1."""

    async def erase(self, job_id: int, limit: int) -> Removed:
        if job_id == 1:
            raise TypeError("a damaged document")
        return await super().erase(job_id, limit)


async def test_delete_of_a_job_that_fails_does_not_stop_the_others() -> None:
    """An unexpected error of one job is logged, and the results of the next one are deleted in the same step."""
    store = DamagedStore()
    bus, deletions = bus_and_handler(store)
    await store.begin_deletions([1, 2])
    with capture_logs() as logs:
        await deletions.step()
    assert answers(bus) == [2]
    assert [(line["event"], line["job_id"]) for line in logs] == [("deletion_failed", 1)]
    assert (store.postponed, await store.deleted([1])) == ({1}, {1})


async def test_deletion_steps_woken_often_keep_their_interval() -> None:
    """Steps that have more to delete do not follow one another without a pause."""
    _, deletions = bus_and_handler(MemoryStore())
    steps = 0

    async def step() -> None:
        nonlocal steps
        steps += 1
        deletions.loop.wake()

    deletions.loop._step = step
    await deletions.loop.start()
    await asyncio.sleep(0.2)
    await deletions.loop.stop()
    assert steps == 1


def deleted_documents() -> dict[str, float]:
    name = "scanfleet_results_deleted_documents_total"
    return {kind: REGISTRY.get_sample_value(name, {"kind": kind}) or 0.0 for kind in ("hosts", "chunks")}


async def test_delete_takes_bounded_steps() -> None:
    """A large job takes several steps of the set rate, is answered by the last, and its documents are counted by kind."""
    before = deleted_documents()
    store = MemoryStore()
    bus, deletions = bus_and_handler(store, per_second=2)
    await handler(store, bus).handle(batch())
    await deletions.handle(ASKED)
    left = []
    while not answers(bus):
        await deletions.step()
        left.append(len(store.hosts) + len(store.chunks))
    assert left == [4, 2, 0, 0]
    assert deleted_documents() == {"hosts": before["hosts"] + 5, "chunks": before["chunks"] + 1}
