"""The contract of the bus with services: one suite for Kafka and the in-memory bus."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, cast
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from prometheus_client import REGISTRY

from scanfleet.contracts.messages import CancelJob, CommandRejected, HostScanned, WorkerReady
from scanfleet.contracts.messages.chunks import MAX_SLOTS
from scanfleet.contracts.messages.envelope import Headers, RawRecord, encode
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.contracts.messages.results import PortFound
from scanfleet.contracts.messages.topics import SCAN_REPLIES, SCAN_RESULTS, SCAN_WORKERS, Topic
from scanfleet.errors import DependencyError, MessageError
from scanfleet.kafka import KafkaBus, sources
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Bus, Record
from scanfleet.runtime.consumer import ConsumerLoop
from scanfleet.runtime.end_offsets import STALE_SECONDS
from scanfleet.runtime.settings import KafkaSettings
from scanfleet_testing.bus import MemoryBroker, MemoryBus
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.kafka import read
from scanfleet_testing.waiting import until

GROUP = "test"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Backend(Protocol):
    """A broker, and what a test does to it behind the bus's back."""

    async def bus(self, instance: str) -> Bus:
        """A started bus, standing for another process."""

    def put(self, partition: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        """Append any bytes to SCAN_WORKERS; returns when they are in the log, the event loop frozen until then."""

    async def records(self, topic: Topic, *, dead_letters: bool = False) -> list[RawRecord]:
        """All that is in a topic."""

    async def committed(self) -> Mapping[int, int]:
        """What GROUP has committed in SCAN_WORKERS."""

    async def close(self) -> None: ...


class Memory:
    def __init__(self) -> None:
        self._broker = MemoryBroker()

    async def bus(self, instance: str) -> Bus:
        return MemoryBus(self._broker, source=instance)

    def put(self, partition: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        self._broker.append(SCAN_WORKERS.name, partition, key=key, value=value, headers=headers)

    async def records(self, topic: Topic, *, dead_letters: bool = False) -> list[RawRecord]:
        return self._broker.records(topic.dead_letter if dead_letters else topic.name)

    async def committed(self) -> Mapping[int, int]:
        return self._broker.committed(SCAN_WORKERS, GROUP)

    async def close(self) -> None: ...


class Kafka:
    def __init__(self, bootstrap: str, prefix: str) -> None:
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._buses: list[KafkaBus] = []

    async def bus(self, instance: str) -> Bus:
        bus = KafkaBus(
            KafkaSettings(kafka=self._bootstrap, topic_prefix=self._prefix), source="test", instance=instance
        )
        await bus.start()
        self._buses.append(bus)
        return bus

    def put(self, partition: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        thread = threading.Thread(target=lambda: asyncio.run(self._put(partition, key, value, headers)))
        thread.start()
        thread.join()

    async def _put(self, partition: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self._bootstrap) as producer:
            # The client itself refuses a record without key and value, the broker does not.
            await producer.send_and_wait(
                self._prefix + SCAN_WORKERS.name,
                partition=partition,
                key=key if key is not None or value is not None else b"",
                value=value,
                headers=list(headers),
            )

    async def records(self, topic: Topic, *, dead_letters: bool = False) -> list[RawRecord]:
        return await read(self._bootstrap, topic, prefix=self._prefix, dead_letters=dead_letters)

    async def committed(self) -> Mapping[int, int]:
        async with AIOKafkaConsumer(bootstrap_servers=self._bootstrap, group_id=self._prefix + GROUP) as consumer:
            offsets = {
                number: await consumer.committed(TopicPartition(self._prefix + SCAN_WORKERS.name, number))
                for number in range(SCAN_WORKERS.partitions)
            }
        return {number: offset for number, offset in offsets.items() if offset is not None}

    async def close(self) -> None:
        for bus in self._buses:
            await bus.stop()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def bootstrap(request: pytest.FixtureRequest) -> str:
    """Where Kafka is; empty for memory."""
    return "" if request.param == "memory" else str(request.getfixturevalue("kafka"))


@pytest.fixture
async def backend(bootstrap: str) -> AsyncIterator[Backend]:
    made: Backend
    if not bootstrap:
        made = Memory()
    else:
        prefix = f"{uuid4().hex}-"
        settings = TopicSettings(kafka=bootstrap, topic_prefix=prefix)
        await create_topics(settings, [SCAN_WORKERS, SCAN_REPLIES, SCAN_RESULTS])
        made = Kafka(bootstrap, prefix)
    yield made
    await made.close()


def numbers(recorder: Recorder) -> list[int]:
    """Return the contents of the handled messages."""
    return [cast(WorkerReady, message).slots for message in recorder.messages]


def ready(number: int, worker: str = "w") -> WorkerReady:
    return WorkerReady(worker_id=worker, slots=number, raw=False)


def workers(count: int) -> list[WorkerReady]:
    """Messages of as many workers: they spread over the partitions."""
    return [ready(number, worker=f"w{number}") for number in range(count)]


def failing(error: Exception, when: Callable[[Sequence[Record]], bool]) -> Callable[[Sequence[Record]], None]:
    def check(records: Sequence[Record]) -> None:
        if when(records):
            raise error

    return check


def names(records: Sequence[Record], number: int) -> bool:
    return any(cast(WorkerReady, record.message).slots == number for record in records)


def header(record: RawRecord, name: str) -> bytes | None:
    return dict(record.headers)[name]


async def test_member_handles_each_message_once_and_in_key_order(backend: Backend) -> None:
    """A group handles each message once, equal to the sent one, and those of one key in order."""
    bus, recorder = await backend.bus("one"), Recorder()
    sent = [ready(number % MAX_SLOTS, worker) for number in range(300) for worker in ("a", "b", "c")]
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        for start in range(0, len(sent), 90):
            await bus.publish(SCAN_WORKERS, sent[start : start + 90])
        await until(lambda: len(recorder.handled) >= len(sent))
    for worker in ("a", "b", "c"):
        mine = [m for record in recorder.handled if (m := cast(WorkerReady, record.message)).worker_id == worker]
        assert mine == [message for message in sent if message.worker_id == worker]


async def test_record_has_position_and_broker_time(backend: Backend) -> None:
    """A record has its topic without the prefix, its partition and offset, and the broker's timestamp in UTC."""
    bus, recorder = await backend.bus("one"), Recorder()
    before = datetime.now(UTC)
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, [ready(1)])
        await bus.publish(SCAN_WORKERS, [ready(2)])
        await until(lambda: numbers(recorder) == [1, 2])
    first, second = recorder.handled
    assert (first.topic, first.offset, second.offset) == ("scan-workers", 0, 1)
    assert first.partition == second.partition
    assert -1 < (first.timestamp - before).total_seconds() < 60
    assert first.timestamp.tzinfo is UTC


async def test_group_starts_at_the_earliest_record_and_resumes_after_the_last_commit(backend: Backend) -> None:
    """A new group starts with existing records, and its next member resumes after the last commit."""
    bus, first, second = await backend.bus("one"), Recorder(), Recorder()
    await bus.publish(SCAN_WORKERS, [ready(1)])
    async with Running(bus.consume(SCAN_WORKERS, GROUP, first)):
        await until(lambda: numbers(first) == [1])
    await bus.publish(SCAN_WORKERS, [ready(2)])
    async with Running(bus.consume(SCAN_WORKERS, GROUP, second)):
        await until(lambda: numbers(second))
    assert numbers(second) == [2]


async def test_members_share_partitions_without_loss_when_they_join_and_leave(backend: Backend) -> None:
    """Every record reaches a member, however the members change, and each partition has one member at a time."""
    one, two = await backend.bus("one"), await backend.bus("two")
    a, b = Recorder(), Recorder()
    consumer, other = one.consume(SCAN_WORKERS, GROUP, a), two.consume(SCAN_WORKERS, GROUP, b)

    def seen() -> set[int]:
        return set(numbers(a) + numbers(b))

    async with Running(consumer):
        await one.publish(SCAN_WORKERS, workers(50))
        async with Running(other):
            await one.publish(SCAN_WORKERS, workers(100)[50:])
            await until(lambda: a.partitions and b.partitions)
            assert not a.partitions & b.partitions
            assert len(a.partitions | b.partitions) == SCAN_WORKERS.partitions
            await one.publish(SCAN_WORKERS, workers(150)[100:])
            await until(lambda: seen() >= set(range(150)))
            assert numbers(b)
        await one.publish(SCAN_WORKERS, workers(200)[150:])
        await until(lambda: set(numbers(a)) >= set(range(150, 200)))
    assert seen() == set(range(200))


async def test_current_batch_at_a_rebalance_is_finished_and_committed(backend: Backend) -> None:
    """A member finishes and commits its batch before it releases its partitions, so that it is not redelivered."""
    one, two = await backend.bus("one"), await backend.bus("two")
    go_on = asyncio.Event()
    a, b = Recorder(lambda _: go_on.wait()), Recorder()
    consumer = cast(ConsumerLoop, one.consume(SCAN_WORKERS, GROUP, a))
    async with Running(consumer):
        await one.publish(SCAN_WORKERS, workers(50))
        await until(lambda: a.tries)
        joining = two.consume(SCAN_WORKERS, GROUP, b)
        started = asyncio.create_task(joining.start())
        await until(consumer._hurry.is_set)
        assert not started.done()
        go_on.set()
        await started
        await two.publish(SCAN_WORKERS, workers(100)[50:])
        await until(lambda: set(numbers(a) + numbers(b)) == set(range(100)))
        await joining.stop()
        assert set(Counter(numbers(a) + numbers(b)).values()) == {1}


async def test_blocked_batch_at_a_rebalance_is_dropped_and_redelivered(backend: Backend) -> None:
    """A member that waits for a dependency releases its partitions at once, and the records are redelivered."""
    one, two = await backend.bus("one"), await backend.bus("two")
    unavailable = [True]
    a = Recorder(failing(DependencyError("unavailable"), lambda _: unavailable[0]))
    b = Recorder()
    async with Running(one.consume(SCAN_WORKERS, GROUP, a)):
        await one.publish(SCAN_WORKERS, workers(50))
        await until(lambda: a.tries)
        async with Running(two.consume(SCAN_WORKERS, GROUP, b)):
            await until(lambda: b.partitions)
            unavailable[0] = False
            await until(lambda: set(numbers(a) + numbers(b)) == set(range(50)))
            assert numbers(b)


async def test_handle_dependency_error_is_retried_in_place(backend: Backend) -> None:
    """While a dependency is unavailable the batch is retried without a commit; then all records are handled."""
    bus = await backend.bus("one")
    unavailable: list[Exception] = [DependencyError("MongoDB is unavailable")]
    recorder = Recorder(lambda _: failing(unavailable[0], lambda _: True)(()) if unavailable else None)
    consumer = bus.consume(SCAN_WORKERS, GROUP, recorder)
    async with Running(consumer):
        await until(lambda: recorder.caught_up_after)
        assert consumer.ready
        await bus.publish(SCAN_WORKERS, [ready(1), ready(2)])
        await until(lambda: len(recorder.tries) >= 2)
        assert consumer.alive
        assert not consumer.ready
        assert await backend.committed() == {}
        unavailable[0] = TimeoutError()
        tries = len(recorder.tries)
        await until(lambda: len(recorder.tries) > tries)
        unavailable.clear()
        await until(lambda: numbers(recorder) == [1, 2] and consumer.ready)
    assert sum((await backend.committed()).values()) == 2
    assert not await backend.records(SCAN_WORKERS, dead_letters=True)


async def test_handle_error_dead_letters_only_the_failing_record(backend: Backend) -> None:
    """When a batch raises, its records are handled one by one; only the one that raises again is dead-lettered."""
    bus = await backend.bus("one")
    recorder = Recorder(failing(ZeroDivisionError("a bug"), lambda records: names(records, 2)))
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, [ready(number) for number in range(5)])
        await until(lambda: set(numbers(recorder)) == {0, 1, 3, 4})
    (letter,) = await backend.records(SCAN_WORKERS, dead_letters=True)
    assert letter.value == encode(SCAN_WORKERS, ready(2), source="test").value
    assert b"a bug" in (header(letter, "dlq_reason") or b"")
    assert sum((await backend.committed()).values()) == 5


GOOD = encode(SCAN_WORKERS, ready(7), source="test")


def without(name: str, **instead: bytes | None) -> Headers:
    return [*((n, v) for n, v in GOOD.headers if n != name), *instead.items()]


@pytest.mark.proves("F12", "G9")
@pytest.mark.parametrize(
    ("key", "value", "headers"),
    [
        pytest.param(GOOD.key, b"\x00\xff\xfe\x80random", GOOD.headers, id="random bytes"),
        pytest.param(GOOD.key, b'{"worker_id": "w"}', GOOD.headers, id="wrong schema"),
        pytest.param(GOOD.key, b"[" * 100_000, GOOD.headers, id="deep JSON"),
        pytest.param(GOOD.key, b" " * MAX_BYTES + GOOD.value, GOOD.headers, id="above the limit"),
        pytest.param(GOOD.key, GOOD.value, without("ce_type", ce_type=b"scanfleet.Nonsense.v1"), id="unknown type"),
        pytest.param(GOOD.key, GOOD.value, without("ce_type", ce_type=b"scanfleet.ScanChunk.v1"), id="another topic's"),
        pytest.param(GOOD.key, GOOD.value, without("ce_type", ce_type=b"\xff"), id="type that is no text"),
        pytest.param(GOOD.key, GOOD.value, without("ce_type", ce_type=None), id="null type"),
        pytest.param(GOOD.key, GOOD.value, without("ce_specversion", ce_specversion=b"0.3"), id="other specversion"),
        pytest.param(GOOD.key, GOOD.value, without("content-type"), id="no content type"),
        pytest.param(GOOD.key, GOOD.value, (), id="no headers"),
        pytest.param(GOOD.key, None, GOOD.headers, id="null value"),
        pytest.param(b"", None, (), id="nothing at all"),
        pytest.param(b"other", GOOD.value, GOOD.headers, id="wrong key"),
        pytest.param(None, GOOD.value, GOOD.headers, id="null key"),
    ],
)
async def test_malformed_record_is_dead_lettered_and_the_next_is_handled(
    backend: Backend,
    key: bytes | None,
    value: bytes | None,
    headers: Headers,
) -> None:
    """A malformed record is sent to the dead-letter topic unchanged, with origin and reason, and blocks nothing."""
    bus, recorder = await backend.bus("one"), Recorder()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        backend.put(3, GOOD.key, GOOD.value, GOOD.headers)
        backend.put(3, key, value, headers)
        backend.put(3, GOOD.key, GOOD.value, GOOD.headers)
        await until(lambda: len(recorder.handled) == 2)
    assert [record.offset for record in recorder.handled] == [0, 2]
    (letter,) = await backend.records(SCAN_WORKERS, dead_letters=True)
    assert letter.value == value
    assert (letter.key or b"") == (key or b"")
    assert [pair for pair in letter.headers if not pair[0].startswith("dlq_")] == list(headers)
    assert header(letter, "dlq_topic") == b"scan-workers"
    assert header(letter, "dlq_partition") == b"3"
    assert header(letter, "dlq_offset") == b"1"
    assert header(letter, "dlq_group") == GROUP.encode()
    assert header(letter, "dlq_reason")
    assert await backend.committed() == {3: 3}


def skipped() -> float:
    """How many records readers without a group have skipped in this process."""
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name == "scanfleet_bus_skipped_total")


@pytest.mark.proves("F12")
async def test_tail_skips_and_counts_unhandled_records(backend: Backend) -> None:
    """A reader without a group skips invalid records, unknown types and rejected records, and dead-letters none."""

    def reject(records: Sequence[Record]) -> None:
        if any(record.message == ready(2) for record in records):
            raise MessageError("no message for this reader")

    bus, recorder = await backend.bus("one"), Recorder(reject)
    before = skipped()
    async with Running(bus.tail(SCAN_WORKERS, recorder)):
        backend.put(0, None, b"junk", ())
        backend.put(0, GOOD.key, b"{}", without("ce_type", ce_type=b"scanfleet.WorkerRetired.v1"))
        await bus.publish(SCAN_WORKERS, [ready(2)])
        await bus.publish(SCAN_WORKERS, [ready(1)])
        await until(lambda: numbers(recorder) == [1])
        await until(lambda: skipped() == before + 3)
    assert not await backend.records(SCAN_WORKERS, dead_letters=True)


async def test_tail_of_some_keys_does_not_decode_other_records(backend: Backend) -> None:
    """A reader of some keys handles their records and does not count records with other keys, or without one."""
    bus, recorder = await backend.bus("one"), Recorder()
    wanted = SCAN_WORKERS.key_of(ready(1))
    before = skipped()
    async with Running(bus.tail(SCAN_WORKERS, recorder, wants=lambda key: key == wanted)):
        backend.put(0, b"another client", b"junk", ())
        backend.put(0, b"\xff", b"junk", ())
        backend.put(0, None, b"junk", ())
        await bus.publish(SCAN_WORKERS, [ready(2, worker="another-1"), ready(1)])
        await until(lambda: recorder.handled)
    assert numbers(recorder) == [1]
    assert skipped() == before


async def test_tail_of_a_partition_reads_no_other(backend: Backend) -> None:
    """A reader of one partition gets its records only, and all of those that are published for one of its keys."""
    bus, recorder = await backend.bus("one"), Recorder()
    partition = SCAN_WORKERS.partition_of(SCAN_WORKERS.key_of(ready(7)))
    sent = workers(40)
    mine = [each for each in sent if SCAN_WORKERS.partition_of(SCAN_WORKERS.key_of(each)) == partition]
    async with Running(bus.tail(SCAN_WORKERS, recorder, partition=partition)):
        assert recorder.partitions == {partition}
        await bus.publish(SCAN_WORKERS, [*sent, ready(7)])
        await until(lambda: 7 in numbers(recorder))
    assert numbers(recorder) == [*(each.slots for each in mine), 7]
    assert len(mine) < len(sent)


async def test_tail_receives_only_messages_after_its_start(backend: Backend) -> None:
    """Two tails both read every partition from its end; a restarted one starts at the end again."""
    bus, a, b, c = await backend.bus("one"), Recorder(), Recorder(), Recorder()
    await bus.publish(SCAN_WORKERS, workers(20))
    async with Running(bus.tail(SCAN_WORKERS, a), bus.tail(SCAN_WORKERS, b)):
        assert a.partitions == set(range(SCAN_WORKERS.partitions))
        await bus.publish(SCAN_WORKERS, workers(40)[20:])
        await until(lambda: sorted(numbers(a)) == sorted(numbers(b)) == list(range(20, 40)))
    async with Running(bus.tail(SCAN_WORKERS, c)):
        await bus.publish(SCAN_WORKERS, [ready(99)])
        await until(lambda: numbers(c))
    assert numbers(c) == [99]


async def test_caught_up_is_called_for_each_partition_after_its_records_were_handled(backend: Backend) -> None:
    """A partition is caught up only when all of its records were handled, and repeatedly while no record arrives."""
    bus, recorder = await backend.bus("one"), Recorder()
    await bus.publish(SCAN_WORKERS, workers(100))
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await until(
            lambda: set().union(*(p for p, _ in recorder.caught_up_after)) == set(range(SCAN_WORKERS.partitions))
        )
        filled = {record.partition for record in recorder.handled}
        for partition in filled:
            first = next(handled for partitions, handled in recorder.caught_up_after if partition in partitions)
            before = [record.partition for record in recorder.handled[:first]].count(partition)
            assert before == [record.partition for record in recorder.handled].count(partition)
        calls = len(recorder.caught_up_after)
        await until(lambda: len(recorder.caught_up_after) >= calls + 2)


async def test_caught_up_is_not_called_while_blocked(backend: Backend) -> None:
    """A partition with a record that waits for a dependency is not caught up."""
    bus = await backend.bus("one")
    unavailable = [True]
    recorder = Recorder(failing(DependencyError("unavailable"), lambda _: unavailable[0]))
    await bus.publish(SCAN_WORKERS, [ready(1)])
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await until(lambda: len(recorder.tries) >= 5)
        unavailable[0] = False
        await until(lambda: numbers(recorder) == [1])
        mine = recorder.handled[0].partition
        assert not [p for p, handled in recorder.caught_up_after if mine in p and handled == 0]
        await until(lambda: [p for p, _ in recorder.caught_up_after if mine in p])


async def test_caught_up_after_a_freeze_is_based_on_new_ends(backend: Backend) -> None:
    """A process that was frozen reads the records of the meantime before it is caught up."""
    bus = await backend.bus("one")

    def freeze(records: Sequence[Record]) -> None:
        if names(records, 7):
            backend.put(
                records[0].partition, *((e := encode(SCAN_WORKERS, ready(8), source="x")).key, e.value, e.headers)
            )
            time.sleep(STALE_SECONDS + 0.5)  # stops the whole event loop, as SIGSTOP would

    recorder = Recorder(freeze)
    await bus.publish(SCAN_WORKERS, [ready(7)])
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await until(lambda: numbers(recorder) == [7, 8])
        mine = recorder.handled[0].partition
        await until(lambda: [p for p, _ in recorder.caught_up_after if mine in p])
    assert not [p for p, handled in recorder.caught_up_after if mine in p and handled < 2]


async def test_stop_finishes_and_commits_the_current_batch(backend: Backend) -> None:
    """A graceful stop lets the handler finish, commits exactly that batch, and leaves the rest to the next member."""
    bus, go_on = await backend.bus("one"), asyncio.Event()
    recorder, successor = Recorder(lambda _: go_on.wait()), Recorder()
    consumer = bus.consume(SCAN_WORKERS, GROUP, recorder)
    await consumer.start()
    await bus.publish(SCAN_WORKERS, [ready(1)])
    await until(lambda: recorder.tries)
    stopping = asyncio.create_task(consumer.stop())
    await bus.publish(SCAN_WORKERS, [ready(2)])
    assert not stopping.done()
    go_on.set()
    await stopping
    assert numbers(recorder) == [1]
    assert list((await backend.committed()).values()) == [1]
    async with Running(bus.consume(SCAN_WORKERS, GROUP, successor)):
        await until(lambda: numbers(successor))
    assert numbers(successor) == [2]


async def test_stop_does_not_wait_for_a_dependency(backend: Backend) -> None:
    """A member that waits for a dependency stops at once and commits nothing."""
    bus = await backend.bus("one")
    recorder = Recorder(failing(DependencyError("unavailable"), lambda _: True))
    consumer = bus.consume(SCAN_WORKERS, GROUP, recorder)
    await consumer.start()
    await bus.publish(SCAN_WORKERS, [ready(1)])
    await until(lambda: len(recorder.tries) >= 3)
    await consumer.stop()
    assert await backend.committed() == {}


async def test_stopped_member_releases_its_partitions(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a clean stop the others have all partitions, without waiting for the session timeout."""
    monkeypatch.setattr(sources, "SESSION_MS", 60_000)
    one, two = await backend.bus("one"), await backend.bus("two")
    a, b = Recorder(), Recorder()
    leaving = two.consume(SCAN_WORKERS, GROUP, b)
    async with Running(one.consume(SCAN_WORKERS, GROUP, a)):
        await leaving.start()
        await until(lambda: len(a.partitions) < SCAN_WORKERS.partitions)
        async with asyncio.timeout(30):  # less than a session
            await leaving.stop()
            await until(lambda: len(a.partitions) == SCAN_WORKERS.partitions)


async def test_caught_up_error_ends_the_loop(backend: Backend) -> None:
    """An error of a handler outside of a batch is a fault of the process, which is then dead."""

    class Broken(Recorder):
        async def caught_up(self, partitions: Collection[int]) -> None:
            raise ZeroDivisionError(partitions)

    bus = await backend.bus("one")
    consumer = bus.consume(SCAN_WORKERS, GROUP, Broken())
    async with Running(consumer):
        await until(lambda: not consumer.alive)
        assert not consumer.ready


async def test_publish_invalid_message_sends_nothing(backend: Backend) -> None:
    """If a message is too large, or not of the topic, none of its batch is sent."""
    bus = await backend.bus("one")
    large = CommandRejected(command_id="c", status=400, error="x").model_copy(update={"error": "x" * MAX_BYTES})
    small = CommandRejected(command_id="c", status=400, error="x")
    with pytest.raises(MessageError, match="1000000 is the limit"):
        await bus.publish(SCAN_REPLIES, [small, large])
    with pytest.raises(MessageError, match="CancelJob is not a message of scan-replies"):
        await bus.publish(SCAN_REPLIES, [small, CancelJob(command_id="c", user_id=1, job_id=1)])
    assert not await backend.records(SCAN_REPLIES)


async def test_message_of_the_maximum_size_arrives(backend: Backend) -> None:
    """The size limit of a value leaves room for key and headers, and a reader gets such messages."""
    bus, got = await backend.bus("one"), Recorder()

    def host(raw_data: str) -> HostScanned:
        return HostScanned(
            job_id=1,
            chunk_id="c",
            attempt=1,
            worker_id="w",
            user_id=7,
            address="192.0.2.1",
            outcome="a",
            technique="connect",
            ports=(PortFound(port=80, raw_data=raw_data),),
        )

    value = encode(SCAN_RESULTS, host(""), source="test").value
    assert value is not None
    large = host("x" * (MAX_BYTES - len(value)))
    async with Running(bus.tail(SCAN_RESULTS, got)):
        await bus.publish(SCAN_RESULTS, [large] * 2)
        await until(lambda: len(got.handled) == 2)
    assert got.messages == [large, large]
    assert [len(record.value or b"") for record in await backend.records(SCAN_RESULTS)] == [MAX_BYTES] * 2


async def test_traceparent_is_propagated(backend: Backend) -> None:
    """A message's traceparent arrives with it, else that of its context; an invalid one is omitted."""
    bus, recorder = await backend.bus("one"), Recorder()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, [ready(1).model_copy(update={"traceparent": TRACEPARENT})])
        await bus.publish(SCAN_WORKERS, [ready(2)])
        backend.put(0, GOOD.key, GOOD.value, [*GOOD.headers, ("traceparent", b"00-junk")])
        with tracing.span("test", None):
            current = tracing.current()
            await bus.publish(SCAN_WORKERS, [ready(3)])
        await until(lambda: len(recorder.handled) == 4)
    traces = {cast(WorkerReady, record.message).slots: record.message.traceparent for record in recorder.handled}
    assert traces == {1: TRACEPARENT, 2: None, 7: None, 3: current}


async def test_metrics_count_handled_failed_and_dead_lettered_records(backend: Backend) -> None:
    """Handled, failed and dead-lettered records are counted by topic and group; the lag ends at zero."""
    bus, group = await backend.bus("one"), uuid4().hex
    recorder = Recorder(failing(ZeroDivisionError("a bug"), lambda records: names(records, 2)))

    def metric(name: str) -> float | None:
        return REGISTRY.get_sample_value(f"scanfleet_bus_{name}", {"topic": "scan-workers", "group": group})

    async with Running(bus.consume(SCAN_WORKERS, group, recorder)):
        await bus.publish(SCAN_WORKERS, [ready(number) for number in range(5)])
        await until(lambda: metric("dead_lettered_total") == 1)
        await until(lambda: metric("consumed_total") == 4)
        assert cast(float, metric("failed_total")) >= 1
        await until(lambda: metric("lag") == 0)
        await until(lambda: metric("handling_seconds_count"))
