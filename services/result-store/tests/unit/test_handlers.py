from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import timedelta
from typing import cast
from weakref import ref

import pytest
from prometheus_client import REGISTRY

from result_store.domain.results import ClosedChunk, Place, Scanned, StoredHost
from result_store.handlers import ResultsHandler
from result_store_testing import EPOCH, FIRST, Log, MemoryStore, host, scanned
from result_store_testing import handler as results_handler
from scanfleet.contracts.messages import Audited, ChunkIncomplete, ChunkStored, Message, PortFound
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_RESULTS, SCAN_STORED, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Record
from scanfleet.runtime.consumer import ConsumerLoop
from scanfleet.scanning.outcomes import MAX_ADDRESSES, Outcome, address_at
from scanfleet.scanning.ports import parse_ranges
from scanfleet.security.audit import SINGLES, Refusals
from scanfleet.services import RESULT_STORE
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.chunk_grants import grants, signed
from scanfleet_testing.consumers import Running
from scanfleet_testing.event_loop import counting_turns
from scanfleet_testing.tracing import ids, recording
from scanfleet_testing.waiting import until

GROUP = "result-store"


class Answers:
    """A publisher that keeps the published messages."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.unavailable = False

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        if self.unavailable:
            raise DependencyError("the broker is unavailable")
        assert topic is SCAN_STORED
        self.sent += messages


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def handler(store: MemoryStore, answers: Answers) -> ResultsHandler:
    return results_handler(store, answers)


def stored(outcomes: str, chunk_id: str = "1-0") -> ChunkStored:
    return ChunkStored(job_id=1, chunk_id=chunk_id, outcomes=outcomes)


def metric(name: str) -> float:
    return REGISTRY.get_sample_value(f"scanfleet_results_{name}_total") or 0.0


async def test_handle_hosts_and_end_in_one_batch_closes_the_chunk(
    handler: ResultsHandler,
    store: MemoryStore,
    answers: Answers,
) -> None:
    """A chunk whose hosts and ChunkScanned arrive in one batch is closed and announced with its map."""
    await handler.handle(Log().append(host("127.9.8.0", 22), host("127.9.8.1", outcome="s"), scanned("asd")))
    assert answers.sent == [stored("asd")]
    assert store.chunks["1-0"].outcomes == "asd"
    assert len(store.hosts) == 2


async def test_handle_hosts_without_end_publishes_nothing(handler: ResultsHandler, answers: Answers) -> None:
    """A batch without a ChunkScanned publishes no message."""
    await handler.handle(Log().append(host()))
    assert answers.sent == []


async def test_handle_missing_hosts_are_reported(handler: ResultsHandler, store: MemoryStore, answers: Answers) -> None:
    """A ChunkScanned that claims hosts that are not stored gets a ChunkIncomplete with their addresses and its own token."""
    await handler.handle(Log().append(host("127.9.8.0"), scanned("aa", attempt=2, worker_id="w-2")))
    assert answers.sent == [
        ChunkIncomplete(job_id=1, chunk_id="1-0", attempt=2, worker_id="w-2", addresses=("127.9.8.1",)),
    ]
    assert store.chunks == {}


async def test_handle_host_after_its_end_does_not_count(handler: ResultsHandler, answers: Answers) -> None:
    """A host that follows its ChunkScanned in the same batch does not complete that one but the next."""
    await handler.handle(Log().append(scanned("a"), host("127.9.8.0"), scanned("a", attempt=2)))
    assert [type(each) for each in answers.sent] == [ChunkIncomplete, ChunkStored]


@pytest.mark.parametrize("together", [True, False])
async def test_handle_repeated_end_is_answered_with_the_final_map(
    handler: ResultsHandler,
    answers: Answers,
    together: bool,
) -> None:
    """A ChunkScanned of a closed chunk is answered with the final map, whatever its own map and batch."""
    records = Log().append(host("127.9.8.0"), scanned("ad"), scanned("aa", attempt=2))
    for batch in [records] if together else [records[:2], records[2:]]:
        await handler.handle(batch)
    assert answers.sent == [stored("ad"), stored("ad")]


@pytest.mark.parametrize("together", [True, False])
async def test_handle_late_host_is_not_listed(handler: ResultsHandler, store: MemoryStore, together: bool) -> None:
    """A host that follows the ChunkScanned that closed its chunk is never listed, in the same batch or a later one."""
    records = Log().append(host("127.9.8.0", 22), scanned("ad"), host("127.9.8.1", 80), host("127.9.8.0", 23))
    for batch in [records] if together else [records[:2], records[2:]]:
        await handler.handle(batch)
    assert [result.port async for results in store.results(1, None) for result in results] == [22]


async def test_handle_late_host_of_another_replica_is_not_listed(handler: ResultsHandler, store: MemoryStore) -> None:
    """A host that a slow replica stores after the close is not listed."""
    records = Log().append(host("127.9.8.0", 22), scanned("ad"), host("127.9.8.1", 80))
    await handler.handle(records[:2])
    await results_handler(store, Answers()).handle(records[2:])
    assert [result.port async for results in store.results(1, None) for result in results] == [22]


class SlowStore(MemoryStore):
    """Closes chunks on behalf of another replica just before each close."""

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        await super().close([ClosedChunk(1, "1-0", "127.9.8.0", "as")])
        return await super().close(chunks)


async def test_handle_concurrent_close_announces_the_stored_map(answers: Answers) -> None:
    """If two replicas close one chunk, both announce the stored map."""
    await results_handler(SlowStore(), answers).handle(Log().append(host("127.9.8.0"), scanned("ad")))
    assert answers.sent == [stored("as")]


async def test_handle_redelivered_batch_is_idempotent(
    handler: ResultsHandler,
    store: MemoryStore,
    answers: Answers,
) -> None:
    """A redelivered batch does not change the store and publishes the same replies."""
    records = Log().append(host("127.9.8.0", 22), host("127.9.8.1", 80), scanned("aa"))
    await handler.handle(records)
    before = dict(store.hosts), dict(store.chunks)
    await handler.handle(records)
    assert (store.hosts, store.chunks) == before
    assert answers.sent == [stored("aa"), stored("aa")]


async def test_handle_publish_failure_is_repaired_by_the_next_report(
    handler: ResultsHandler,
    store: MemoryStore,
    answers: Answers,
) -> None:
    """A reply that cannot be published delays nothing: the orchestrator asks again, and that report is answered."""
    records = Log().append(host("127.9.8.0"), scanned("a"), scanned("a", attempt=2))
    answers.unavailable = True
    await handler.handle(records[:2])
    assert store.chunks
    answers.unavailable = False
    await handler.handle(records[2:])
    assert answers.sent == [stored("a")]


async def test_handle_outcomes_are_counted(handler: ResultsHandler) -> None:
    """Stored, duplicate and late hosts, closed and incomplete chunks each increment their counter."""
    names = ("hosts_stored", "duplicates", "late", "chunks_closed", "chunks_incomplete")
    before = [metric(name) for name in names]
    records = Log().append(
        host("127.9.8.0"), host("127.9.8.0", attempt=2), scanned("aa"), scanned("ad"), host("127.9.8.1")
    )
    await handler.handle(records[:4])
    await handler.handle(records[4:])
    assert [metric(name) - old for name, old in zip(names, before, strict=True)] == [2, 1, 1, 1, 1]


class Loaded(list[StoredHost]):
    """The hosts of a chunk; other than of a list, its end of life can be observed."""


class LargeStore(MemoryStore):
    """Each address of each chunk has a silent host; records whose hosts are read, and how many are held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.most = 0
        place = Place(EPOCH - timedelta(seconds=1), 0)
        addresses = [str(address_at(FIRST, index)) for index in range(MAX_ADDRESSES)]
        self._hosts = [StoredHost(address, Outcome.SILENT, place) for address in addresses]
        self._loaded: list[ref[list[StoredHost]]] = []

    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        self.read |= set(chunk_ids)
        found: dict[str, list[StoredHost]] = {id_: Loaded(self._hosts) for id_ in chunk_ids}
        self._loaded += map(ref, found.values())
        self.most = max(self.most, sum(len(each() or ()) for each in self._loaded))
        return found


def resent(chunks: int) -> Sequence[Record[Scanned]]:
    """Return the ChunkScanned of so many chunks, two of the last one."""
    numbers = [*range(chunks), chunks - 1]
    return Log().append(*(scanned("s" * MAX_ADDRESSES, chunk_id=f"1-{number}") for number in numbers))


async def test_handle_reports_of_many_chunks_holds_few_hosts_and_leaves_turns_to_others(answers: Answers) -> None:
    """Whatever the number of chunks in a batch, at most 4,096 stored hosts are in memory, and the event loop is never blocked."""
    store, records = LargeStore(), resent(40)
    async with counting_turns() as turns:
        await results_handler(store, answers).handle(records)
    assert answers.sent == [stored("s" * MAX_ADDRESSES, f"1-{number}") for number in [*range(40), 39]]
    assert store.most <= 4 * MAX_ADDRESSES
    assert turns.longest < 0.1


async def test_handle_reports_of_closed_chunks_reads_no_hosts(answers: Answers) -> None:
    """A ChunkScanned that is repeated is answered from the closed chunk; hosts are read for the other chunks alone."""
    store = LargeStore()
    handler = results_handler(store, answers)
    await handler.handle(resent(3))
    assert store.read == {"1-0", "1-1", "1-2"}
    store.read.clear()
    await handler.handle(resent(4))
    assert store.read == {"1-3"}
    assert answers.sent[4:] == [stored("s" * MAX_ADDRESSES, f"1-{number}") for number in [0, 1, 2, 3, 3]]


class UnavailableStore(MemoryStore):
    """Stores hosts and then fails, `failures` times: between the write and the commit."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        if self.failures:
            self.failures -= 1
            raise DependencyError("MongoDB is unavailable")
        return await super().stored(chunk_ids)


async def run(store: MemoryStore, then: Callable[[MemoryBus], Awaitable[None]]) -> MemoryBus:
    """Run the consumer on a bus until `then` returns."""
    bus = MemoryBus()
    consumer = bus.consume(SCAN_RESULTS, GROUP, results_handler(store, bus))
    await consumer.start()
    try:
        await then(bus)
    finally:
        await consumer.stop()
    return bus


async def test_consumer_store_outage_commits_and_loses_nothing() -> None:
    """While the store is unavailable nothing is committed; after it recovers the chunk is closed once."""
    store = UnavailableStore(2)

    async def story(bus: MemoryBus) -> None:
        await bus.publish(SCAN_RESULTS, [host("127.9.8.0"), scanned("a")])
        await until(lambda: store.failures < 2)
        assert not any(bus.broker.committed(SCAN_RESULTS, GROUP).values())
        await until(lambda: bool(bus.messages(SCAN_STORED)))

    bus = await run(store, story)
    assert bus.messages(SCAN_STORED) == [stored("a")]
    assert len(store.hosts) == 1


async def test_consumer_reply_to_a_partition_without_a_leader_delays_no_other_job() -> None:
    """Results of other jobs are stored and answered, and the consumer stays ready."""
    assert SCAN_STORED.partition_of("1") != SCAN_STORED.partition_of("2")
    store = MemoryStore()

    async def story(bus: MemoryBus) -> None:
        bus.broker.leaderless = {(SCAN_STORED.name, SCAN_STORED.partition_of("1"))}
        await bus.publish(SCAN_RESULTS, [host("127.9.8.0"), scanned("a")])
        await until(lambda: "1-0" in store.chunks)
        await bus.publish(SCAN_RESULTS, [scanned("d", job_id=2, chunk_id="2-0")])
        await until(lambda: bool(bus.messages(SCAN_STORED)))

    bus = await run(store, story)
    assert [each.job_id for each in bus.messages(SCAN_STORED)] == [2]


async def test_consumer_crash_before_its_commit_repeats_without_effect() -> None:
    """A batch that was handled but not committed is handled again after a crash: it stores nothing, and its reply is the same."""
    bus, store = MemoryBus(), MemoryStore()
    handler = results_handler(store, bus)

    class Crashing:
        async def handle(self, records: Sequence[Record[Scanned]]) -> None:
            await handler.handle(records)
            assert consumer._task is not None
            consumer._task.cancel()

    consumer = cast(ConsumerLoop, bus.consume(SCAN_RESULTS, GROUP, Crashing()))
    await consumer.start()
    await bus.publish(SCAN_RESULTS, [host("127.9.8.0", 22), scanned("ad")])
    await until(lambda: not consumer.alive)
    bus.broker.group(SCAN_RESULTS, GROUP)._members.clear()
    assert not bus.broker.committed(SCAN_RESULTS, GROUP)
    before = dict(store.hosts), dict(store.chunks)
    async with Running(bus.consume(SCAN_RESULTS, GROUP, handler)):
        await until(lambda: len(bus.messages(SCAN_STORED)) == 2)
    assert (store.hosts, store.chunks) == before
    assert bus.messages(SCAN_STORED) == [stored("ad"), stored("ad")]
    assert sum(bus.broker.committed(SCAN_RESULTS, GROUP).values()) == 2


async def test_consumer_invalid_message_affects_no_other() -> None:
    """A host with a duplicate port is dropped, its chunk is reported incomplete, and other chunks close."""

    async def story(bus: MemoryBus) -> None:
        bad = host("127.9.8.1", PortFound(port=53, protocol="udp"), open_filtered="53")
        messages = [
            bad,
            host("127.9.8.0"),
            scanned("aa"),
            host("127.9.8.0", chunk_id="1-1"),
            scanned("a", chunk_id="1-1"),
        ]
        await bus.publish(SCAN_RESULTS, messages)
        await until(lambda: len(bus.messages(SCAN_STORED)) == 2)

    before = metric("uncovered")
    bus = await run(MemoryStore(), story)
    assert metric("uncovered") - before == 1
    incomplete, whole = bus.messages(SCAN_STORED)
    assert isinstance(incomplete, ChunkIncomplete)
    assert incomplete.addresses == ("127.9.8.1",)
    assert whole == stored("a", "1-1")


async def test_handle_invalid_message_leaves_its_batch_whole(handler: ResultsHandler, store: MemoryStore) -> None:
    """One signed host with a duplicate port does not fail its batch, whose records would then be handled one by one."""
    await handler.handle(Log().append(host("127.9.8.1", 80, 80), *(host(f"127.9.8.{n}", 80) for n in range(2, 5))))
    assert [each.scanned.address for each, _ in store.hosts.values()] == ["127.9.8.2", "127.9.8.3", "127.9.8.4"]


async def test_handle_long_lists_of_ports_are_parsed_once_and_leave_turns_to_others(handler: ResultsHandler) -> None:
    """The hosts of a chunk with the longest list of ports cost one parse together, and do not block the event loop."""
    ports = ",".join(str(10_001 + 2 * number) for number in range(1_660))
    silent = [host(f"127.9.8.{number}", outcome="s", open_filtered=ports) for number in range(100)]
    records = Log().append(*(signed(each, ports=f"U:{ports}") for each in silent))
    before = parse_ranges.cache_info().misses
    async with counting_turns() as turns:
        await handler.handle(records)
    assert parse_ranges.cache_info().misses - before <= 2
    assert turns.longest < 0.1


async def test_handle_span_belongs_to_the_chunks_trace(handler: ResultsHandler) -> None:
    """Storing a batch is a span in the trace of each of its chunks."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with recording() as exporter:
        await handler.handle(Log().append(host("127.9.8.0", 22, traceparent=trace), scanned("a", traceparent=trace)))
    (span,) = exporter.get_finished_spans()
    assert (span.name, dict(span.attributes or {})) == ("store results", {"scanfleet.chunk.id": "1-0"})
    assert f"{ids(span).trace_id:032x}" == trace[3:35]


@pytest.mark.proves("A25", "G19")
async def test_handle_uncovered_results_are_dropped_counted_and_audited(store: MemoryStore, answers: Answers) -> None:
    """Results without a valid signature are dropped without a reply; one audit entry per kind has the reason."""
    refusals = Refusals("result-store")
    handler = ResultsHandler(store, answers, grants(), refusals)
    before = metric("uncovered")
    forged: list[Scanned] = [
        host("127.9.8.1", 4444).model_copy(update={"user_id": 8}),
        scanned("d").model_copy(update={"grant": None}),
    ]
    await handler.handle(Log().append(*forged * 500, host("127.9.8.0", 22), scanned("a")))
    assert metric("uncovered") - before == 1_000
    assert [each.scanned.address for each, _ in store.hosts.values()] == ["127.9.8.0"]
    assert answers.sent == [stored("a")]
    bus = MemoryBus()
    await refusals.flush(bus)
    entries = [each.entry for each in bus.messages(SCAN_AUDIT[RESULT_STORE]) if isinstance(each, Audited)]
    assert {(entry.decision, entry.rule, entry.source) for entry in entries} == {
        ("refused", "signature", "scan-results")
    }
    assert len(entries) <= SINGLES
