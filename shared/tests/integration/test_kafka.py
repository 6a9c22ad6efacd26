"""The bus against Kafka's own ways to fail: restarts, freezes, rebalances, records that the client cannot read."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError, MessageSizeTooLargeError
from aiokafka.partitioner import DefaultPartitioner
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from local import kafka as native_kafka
from local import ports
from scanfleet.contracts.messages import JobDeleted, WorkerReady
from scanfleet.contracts.messages.envelope import Outgoing, encode
from scanfleet.contracts.messages.topics import SCAN_CHANGES, SCAN_WORKERS
from scanfleet.errors import DependencyError
from scanfleet.kafka import KafkaBus, sources
from scanfleet.kafka import broker as broker_module
from scanfleet.kafka.broker import access
from scanfleet.kafka.bus import NO_LEADER, SEND_SECONDS
from scanfleet.kafka.sources import Member
from scanfleet.kafka.topics import DEAD_LETTER_BYTES, TopicSettings, create_topics
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import Record
from scanfleet.runtime.consumer import ConsumerLoop
from scanfleet.runtime.source import BatchDroppedError
from scanfleet_testing.batches import compressed, counted, damaged, encoded, expanding, sealed, unreadable
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

GROUP = "test"


class Broker:
    """A separate broker, which tests may kill and freeze."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = ports.choose(), ports.choose()
        self.bootstrap = f"127.0.0.1:{self.ports[0]}"
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *self._command()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Lose all that it holds, while it is not running."""
        shutil.rmtree(self.folder / "data")

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def _command(self) -> list[str]:
        return native_kafka.command(self.folder, *self.ports)


class SecondBroker(Broker):
    """Another broker, with number 2, in the cluster of the first one, which has the controller."""

    def __init__(self, folder: Path, first: Broker) -> None:
        super().__init__(folder)
        self._first = first

    def _command(self) -> list[str]:
        properties = self.folder / "server.properties"
        text = native_kafka.PROPERTIES.format(
            port=self.ports[0], controller_port=self._first.ports[1], protocol="PLAINTEXT", data=self.folder / "data"
        )
        # The last value of a key counts.
        properties.write_text(f"{text}process.roles=broker\nnode.id=2\nlisteners=BROKER://{self.bootstrap}\n")
        (cluster,) = re.findall(r"(?m)^cluster\.id=(.+)$", (self._first.folder / "data/meta.properties").read_text())
        tool = [*native_kafka._java(), "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        subprocess.run([*tool, "--cluster-id", cluster, "--config", properties], check=True, capture_output=True)
        return [*native_kafka._java(), "kafka.Kafka", str(properties)]


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    broker.start()
    native_kafka.wait_until_up(broker.bootstrap)
    yield broker
    broker.kill()


class Bench:
    """One topic with a separate prefix, and buses that end with the test."""

    def __init__(self, bootstrap: str, stack: AsyncExitStack) -> None:
        self.settings = TopicSettings(kafka=bootstrap, topic_prefix=f"{uuid4().hex}-")
        self.name = self.settings.topic_prefix + SCAN_WORKERS.name
        self._stack = stack

    async def bus(self, instance: str = "one") -> KafkaBus:
        settings = self.settings
        bus = KafkaBus(settings, source="test", instance=instance)
        await bus.start()
        self._stack.push_async_callback(bus.stop)
        return bus


@pytest.fixture
async def bench(kafka: str) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        made = Bench(kafka, stack)
        await create_topics(made.settings, [SCAN_WORKERS])
        yield made


@pytest.fixture
async def own_bench(own_broker: Broker) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        made = Bench(own_broker.bootstrap, stack)
        await create_topics(made.settings, [SCAN_WORKERS])
        yield made


def workers(numbers: Sequence[int]) -> list[WorkerReady]:
    return [WorkerReady(worker_id=f"w{number}", slots=number, raw=False) for number in numbers]


def one_worker(numbers: Sequence[int]) -> list[WorkerReady]:
    """Messages of one key."""
    return [WorkerReady(worker_id="w", slots=number, raw=False) for number in numbers]


def numbers(recorder: Recorder) -> list[int]:
    return [cast(WorkerReady, message).slots for message in recorder.messages]


async def publish_through(bus: KafkaBus, number: int) -> int:
    """Send one message until the broker is there to take it; answers how many times it was sent."""
    tries = 0
    async with asyncio.timeout(120):
        while True:
            tries += 1
            try:
                await bus.publish(SCAN_WORKERS, workers([number]))
            except DependencyError:
                continue
            return tries


async def test_tail_after_start_reads_every_record(bench: Bench) -> None:
    """Every message sent after `start` returned is read, in two hundred of two hundred trials."""
    bus = await bench.bus()
    for number in range(200):
        recorder = Recorder()
        async with Running(bus.tail(SCAN_WORKERS, recorder)):
            await bus.publish(SCAN_WORKERS, workers([number]))
            await until(lambda: recorder.handled)  # noqa: B023 # called before the next turn
        assert numbers(recorder) == [number]


async def test_member_reads_a_recreated_topic_from_its_beginning(bench: Bench) -> None:
    """A group whose topic was deleted reads the new topic from its beginning."""
    bus, recorder = await bench.bus(), Recorder()
    admin = AIOKafkaAdminClient(bootstrap_servers=bench.settings.kafka)
    await admin.start()
    try:
        async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
            await until(lambda: recorder.partitions)
            await admin.delete_topics([bench.name])
            await until(lambda: not recorder.partitions)
            await create_topics(bench.settings, [SCAN_WORKERS])
            await publish_through(bus, 1)
            await until(lambda: numbers(recorder) == [1])
    finally:
        await admin.close()


async def test_bus_with_a_killed_broker_delivers_every_message_after_its_restart(
    own_broker: Broker, own_bench: Bench
) -> None:
    """After the restart of a killed broker, group and tail have read every message and were unready, not dead."""
    bus = await own_bench.bus()
    member, tail = Recorder(), Recorder()
    group, groupless = bus.consume(SCAN_WORKERS, GROUP, member), bus.tail(SCAN_WORKERS, tail)
    async with Running(group, groupless):
        await bus.publish(SCAN_WORKERS, workers(range(50)))
        await until(lambda: len(member.handled) == len(tail.handled) == 50)
        own_broker.kill()
        await until(lambda: not group.ready and not groupless.ready)
        meanwhile = asyncio.create_task(publish_through(bus, 50))
        own_broker.start()
        await meanwhile
        await bus.publish(SCAN_WORKERS, workers(range(51, 100)))
        for recorder in (member, tail):
            await until(lambda: set(numbers(recorder)) == set(range(100)))  # noqa: B023 # called before the next turn
        await until(lambda: group.ready and groupless.ready and bus.ready)
        assert group.alive
        assert groupless.alive
        assert bus.alive


@pytest.mark.proves("F18", "G7")
async def test_bus_after_the_loss_of_all_data_is_dead(own_broker: Broker, own_bench: Bench) -> None:
    """A broker without its data assigns producer ids again, so all existing producers, even idle ones, have ended."""
    bus = await own_bench.bus()
    await bus.publish(SCAN_WORKERS, workers([1]))
    own_broker.kill()
    own_broker.forget()
    own_broker.start()
    await until(lambda: not bus.alive)
    with pytest.raises(DependencyError, match="restart the process"):
        await bus.publish(SCAN_WORKERS, workers([2]))


@pytest.mark.proves("F15", "G7")
async def test_publish_timeout_delivers_once_and_in_order(own_broker: Broker, own_bench: Bench) -> None:
    """While the broker hangs a publish times out and the next one waits; afterwards the log has each message once."""
    bus, recorder = await own_bench.bus(), Recorder()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, one_worker([1]))
        own_broker.freeze()
        try:
            with pytest.raises(DependencyError, match="did not acknowledge"):
                await bus.publish(SCAN_WORKERS, one_worker([2]))
            await until(lambda: not bus.ready)
            assert bus.alive
            waiting = asyncio.create_task(bus.publish(SCAN_WORKERS, one_worker([3])))
            assert not (await asyncio.wait([waiting], timeout=0.1))[0]
            assert bus._producer is not None
            assert not bus._producer._message_accumulator._batches  # where it would be, with all that come after it
        finally:
            own_broker.thaw()
        await waiting
        await until(lambda: set(numbers(recorder)) == {1, 2, 3})
        await until(lambda: bus.ready)
        await bus.publish(SCAN_WORKERS, one_worker([4]))
        await until(lambda: 4 in numbers(recorder))
    sent = Counter(numbers(recorder))
    assert sent == {1: 1, 2: 1, 3: 1, 4: 1}


@pytest.fixture
async def two_brokers(tmp_path: Path) -> AsyncIterator[tuple[Bench, SecondBroker]]:
    """The topic on two brokers, of which the second one leads partition 0 and no other, and its groups on the first one."""
    folders = tmp_path / "1", tmp_path / "2"
    for folder in folders:
        folder.mkdir()
    first = Broker(folders[0])
    second = SecondBroker(folders[1], first)
    async with AsyncExitStack() as stack:
        first.start()
        stack.callback(first.kill)
        await asyncio.to_thread(native_kafka.wait_until_up, first.bootstrap)
        alone, recorder = Bench(first.bootstrap, stack), Recorder()
        await create_topics(alone.settings, [SCAN_WORKERS])
        async with Running((await alone.bus()).consume(SCAN_WORKERS, GROUP, recorder)):
            await until(lambda: recorder.partitions)
        second.start()
        stack.callback(second.kill)
        await asyncio.to_thread(native_kafka.wait_until_up, second.bootstrap)
        made = Bench(first.bootstrap, stack)
        replicas = {partition: [1 if partition else 2] for partition in range(SCAN_WORKERS.partitions)}
        admin = AIOKafkaAdminClient(bootstrap_servers=first.bootstrap)
        await admin.start()
        stack.push_async_callback(admin.close)
        await admin.create_topics([NewTopic(made.name, -1, -1, replicas)])
        await create_topics(made.settings, [SCAN_WORKERS])  # its dead-letter topic
        yield made, second


@pytest.mark.proves("F33")
async def test_publish_to_a_partition_without_a_leader_blocks_only_that_partition(
    two_brokers: tuple[Bench, SecondBroker],
) -> None:
    """Sends to a partition whose broker is killed fail, the later ones at once; others arrive, and in the end each accepted one."""
    bench, second = two_brokers
    bus, recorder = await bench.bus(), Recorder()
    held_up, other = ready_of(bench, 0), ready_of(bench, 1)
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, [held_up(1), other(2)])
        await until(lambda: set(numbers(recorder)) == {1, 2})
        assert not bus.leaderless(SCAN_WORKERS)
        second.kill()
        await until(lambda: bus.leaderless(SCAN_WORKERS) == {0})
        with pytest.raises(DependencyError, match="did not acknowledge"):
            await bus.publish(SCAN_WORKERS, [held_up(3)])
        assert (bus.alive, bus.ready) == (True, True)
        before, began = len(recorder.caught_up_after), time.monotonic()
        await bus.publish(SCAN_WORKERS, [other(4)])
        await until(lambda: 4 in numbers(recorder))
        assert time.monotonic() - began < 4.5  # the query for the ends would wait 5 seconds for the leader
        await until(lambda: len(recorder.caught_up_after) > before + 1)
        reported = set.union(*(partitions for partitions, _ in recorder.caught_up_after[before + 1 :]))
        assert reported == set(range(1, SCAN_WORKERS.partitions))
        began = time.monotonic()
        with pytest.raises(DependencyError, match="has no leader"):
            await bus.publish(SCAN_WORKERS, [held_up(7), other(6)])
        assert time.monotonic() - began < SEND_SECONDS - 1
        await until(lambda: 6 in numbers(recorder))
        second.start()
        await until(lambda: not bus.leaderless(SCAN_WORKERS))
        await bus.publish(SCAN_WORKERS, [held_up(5)])
        await until(lambda: 5 in numbers(recorder))
        assert (bus.alive, bus.ready) == (True, True)
    assert Counter(numbers(recorder)) == Counter([1, 2, 3, 4, 5, 6])
    assert [number for number in numbers(recorder) if number % 2] == [1, 3, 5]


async def test_end_offsets_without_any_leader_raise_dependency_error(bench: Bench) -> None:
    """A query of end offsets fails if none of the partitions has a leader, so that their reader is unready."""
    bus = await bench.bus()
    assert bus._ends is not None
    bus._ends._client.cluster.leader_for_partition = lambda _: NO_LEADER
    with pytest.raises(DependencyError, match="none of 2 partitions has a leader"):
        await bus._end_offsets([TopicPartition(bench.name, number) for number in range(2)])
    assert await bus._end_offsets([]) == {}


@pytest.mark.proves("G9")
async def test_invalid_records_in_one_partition_delay_no_other(bench: Bench) -> None:
    """While one partition has 100,000 invalid records, a message in another one is handled at once."""
    bus, recorder = await bench.bus(), Recorder()
    junk, before = encoded([(b"", b"x", ())] * 50_000), dead_lettered()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await put(bench, 0, junk)
        await put(bench, 0, junk)
        await until(lambda: dead_lettered() > before)
        await bus.publish(SCAN_WORKERS, [ready_of(bench, 1)(1)])
        await until(lambda: recorder.handled)
        assert dead_lettered() - before < 50_000


def dead_lettered() -> float:
    labels = {"topic": SCAN_WORKERS.name, "group": GROUP}
    return REGISTRY.get_sample_value("scanfleet_bus_dead_lettered_total", labels) or 0


def ready_of(bench: Bench, partition: int) -> Callable[[int], WorkerReady]:
    """Makes messages whose key belongs to this partition."""
    names = (f"worker{number}-x" for number in itertools.count())
    places = list(range(SCAN_WORKERS.partitions))
    makers = (partial(WorkerReady, worker_id=name, raw=False) for name in names)
    for make in makers:
        if DefaultPartitioner()(SCAN_WORKERS.key_of(make(slots=1)).encode(), places, places) == partition:
            return lambda number: make(slots=number)
    raise AssertionError(bench)


async def test_publish_cancelled_still_delivers_in_order(own_broker: Broker, own_bench: Bench) -> None:
    """Cancelling a publish withdraws nothing, and the next message arrives after it."""
    bus, recorder = await own_bench.bus(), Recorder()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await bus.publish(SCAN_WORKERS, workers([1]))
        own_broker.freeze()
        try:
            publishing = asyncio.create_task(bus.publish(SCAN_WORKERS, workers([2])))
            await until(lambda: bus._producer is not None and bus._producer._message_accumulator._pending_batches)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            assert bus.ready  # the broker has as long as if the caller had waited
            await until(lambda: not bus.ready)
        finally:
            own_broker.thaw()
        await bus.publish(SCAN_WORKERS, workers([3]))
        await until(lambda: bus.ready)
        await until(lambda: sorted(numbers(recorder)) == [1, 2, 3])


async def test_publish_permanently_refused_makes_the_bus_dead(bench: Bench) -> None:
    """When the producer gives up a send the bus is dead, reports it, and accepts no more."""
    bus = await bench.bus()
    await configure(bench, **{"max.message.bytes": "100"})

    async def publish_for_ever() -> None:  # a setting takes a moment to reach the log
        while True:
            await bus.publish(SCAN_WORKERS, workers([1]))

    with pytest.raises(DependencyError, match="did not acknowledge"):
        await publish_for_ever()
    assert not bus.alive
    await configure(bench, **{"max.message.bytes": "1000000"})
    with pytest.raises(DependencyError, match="restart the process"):
        await bus.publish(SCAN_WORKERS, workers([2]))


async def test_publish_to_a_missing_topic_affects_no_other(bench: Bench) -> None:
    """The bus names the topic, stays ready and publishes to other topics; once the topic exists it publishes to it too."""
    bus = await bench.bus()
    event = JobDeleted(job_id=1, user_id=7, subnet_id=1, reason="request", requested_at=datetime.now(UTC))
    with capture_logs() as logs:
        await try_publish(bus, SCAN_CHANGES, [event], "")
    assert [each["error"] for each in logs] == [
        "no acknowledgement within 1 s; is the broker available, and does scan-changes exist?"
    ]
    await bus.publish(SCAN_WORKERS, workers([1]))
    assert (bus.alive, bus.ready) == (True, True)
    await create_topics(bench.settings, [SCAN_CHANGES])
    await bus.publish(SCAN_CHANGES, [event])


async def configure(bench: Bench, **configs: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bench.settings.kafka)
    try:
        await admin.start()
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, bench.name, configs)])
    finally:
        await admin.close()


async def test_commit_after_revocation_drops_the_batch(bench: Bench) -> None:
    """A slow member whose partitions were reassigned commits nothing: the other member has the records."""
    one, two = await bench.bus("one"), await bench.bus("two")
    freed = asyncio.Event()

    async def hang(_: Sequence[Record]) -> None:
        try:
            await asyncio.Event().wait()  # until the rebalance has no more patience
        finally:
            freed.set()

    slow, quick = Recorder(hang), Recorder()
    async with Running(one.consume(SCAN_WORKERS, GROUP, slow)):
        await one.publish(SCAN_WORKERS, workers(range(50)))
        await until(lambda: slow.tries)
        slow._does = lambda _: None
        async with Running(two.consume(SCAN_WORKERS, GROUP, quick)):
            assert freed.is_set()
            await until(lambda: set(numbers(slow) + numbers(quick)) == set(range(50)))
            assert quick.handled


async def test_offsets_of_foreign_partitions_cannot_be_committed(bench: Bench) -> None:
    """A commit for partitions that another member has raises the error of a dropped batch."""
    bus, other = await bench.bus("one"), await bench.bus("two")

    def member(instance: str) -> Member:
        return Member(
            SCAN_WORKERS,
            name=bench.name,
            group=bench.settings.topic_prefix + GROUP,
            instance=instance,
            access=access(bench.settings),
            end_offsets=bus._end_offsets,
        )

    source, listener = member("one"), Listening()
    await source.open(listener)
    try:
        await source.commit({0: 0, 11: 0})
        async with Running(other.consume(SCAN_WORKERS, GROUP, Recorder())):
            await until(lambda: 0 < len(listener.partitions) < SCAN_WORKERS.partitions)
            lost = set(range(SCAN_WORKERS.partitions)) - listener.partitions
            with pytest.raises(BatchDroppedError):
                await source.commit(dict.fromkeys(lost, 0))
    finally:
        await source.close()


class Listening:
    def __init__(self) -> None:
        self.partitions: set[int] = set()

    async def assigned(self, partitions: Collection[int]) -> None:
        self.partitions = set(partitions)

    async def revoked(self, partitions: Collection[int]) -> None:
        self.partitions -= set(partitions)


async def test_member_restarted_after_a_kill_keeps_its_partitions(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that restarts after a kill has its partitions at once, without waiting for its session to end."""
    monkeypatch.setattr(sources, "SESSION_MS", 60_000)
    one, again = await bench.bus("one"), await bench.bus("one")
    a, b = Recorder(), Recorder()
    killed = cast(ConsumerLoop, one.consume(SCAN_WORKERS, GROUP, a))
    await killed.start()
    await until(lambda: a.caught_up_after)
    # The effect of a kill: no request to leave the group (a member without a generation sends none), and no more heartbeats.
    client = cast(Member, killed._source)._client
    client._coordinator.generation = -1
    await client.stop()
    async with asyncio.timeout(30), Running(again.consume(SCAN_WORKERS, GROUP, b)):  # less than a session
        await one.publish(SCAN_WORKERS, workers([1]))
        await until(lambda: b.handled)
    await killed.stop()


@pytest.mark.parametrize("error", [KafkaError("REBALANCE_IN_PROGRESS"), GroupCoordinatorNotAvailableError()])
async def test_member_with_a_failed_rebalance_retries_or_dies(
    bench: Bench, error: KafkaError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A join that fails after the poll has timed out does not leave a consumer that is alive and reads nothing."""
    bus, recorder = await bench.bus(), Recorder()
    consumer = cast(ConsumerLoop, bus.consume(SCAN_WORKERS, GROUP, recorder))
    await consumer.start()
    client = cast(Member, consumer._source)._client
    join, errors = client._coordinator._do_rejoin_group, [error]

    async def fail_once(*args: Any) -> Any:
        if not errors:
            return await join(*args)
        await asyncio.sleep(3)  # longer than a poll
        raise errors.pop()

    monkeypatch.setattr(client._coordinator, "_do_rejoin_group", fail_once)
    client._coordinator.request_rejoin()
    await until(lambda: not errors)
    await bus.publish(SCAN_WORKERS, workers([1]))
    await until(lambda: recorder.handled or not consumer.alive)
    assert consumer.alive == error.retriable
    if consumer.alive:
        await consumer.stop()
    else:
        await client.stop()


@pytest.mark.proves("F12", "G9")
@pytest.mark.parametrize("kind", ["group", "tail"])
async def test_member_with_unreadable_batches_dead_letters_their_origin(bench: Bench, kind: str) -> None:
    """Each batch that cannot or must not be parsed is one dead letter, and all other records are handled, once."""
    bus, recorder = await bench.bus(), Recorder()
    consumer = bus.consume(SCAN_WORKERS, GROUP, recorder) if kind == "group" else bus.tail(SCAN_WORKERS, recorder)
    good = outgoing(*workers([1]))
    key, value, headers = good
    many = encoded([(key, value, [*headers, ("name", b"")]), *[good] * 999])
    many[many.index(b"name")] = 0xFF
    bad = [unreadable(good), sealed(many), compressed([good]), damaged([good]), expanding(100_000_000)]
    forged = encoded([good], offsets=[1000])
    async with Running(consumer):
        await put(bench, 4, encoded([good]))
        for batch in (encoded([good]), *bad, counted(forged, 1), encoded([good])):
            await put(bench, 3, batch)
        await put(bench, 4, encoded([good]))
        await until(lambda: len(recorder.handled) == 4)
    assert {(record.partition, record.offset) for record in recorder.handled} == {(3, 0), (3, 1006), (4, 0), (4, 1)}
    if kind == "tail":
        return
    found = [dict(letter.headers) for letter in await letters(bench)]
    assert [each["dlq_offset"] for each in found] == [b"1", b"1001", b"1002", b"1003", b"1004", b"1005"]
    assert b"utf-8" in found[0]["unreadable"]
    assert found[1]["unreadable"].startswith(b"offsets 2 to 1001: ")
    assert all(b"compressed" in each["unreadable"] for each in found[2:5])
    assert b"record 2005 in a batch that ends at 1006" in found[5]["unreadable"]


def outgoing(*messages: WorkerReady) -> Outgoing:
    envelope = encode(SCAN_WORKERS, *messages, source="test")
    return envelope.key, envelope.value, envelope.headers


async def put(bench: Bench, partition: int, batch: bytearray) -> None:
    """Send a batch as it is."""
    async with AIOKafkaProducer(bootstrap_servers=bench.settings.kafka) as producer:
        builder = producer.create_batch()
        builder.append(key=b"", value=None, timestamp=None)
        builder._build()
        builder._buffer = batch
        await (await producer.send_batch(builder, bench.name, partition=partition))


async def accepted(bench: Bench, batch: bytearray) -> bool:
    """Return whether the broker accepts the batch, which it does only once it applies a raised limit."""
    try:
        await put(bench, 0, batch)
    except MessageSizeTooLargeError:
        return False
    return True


async def test_busy_partition_does_not_wait_for_the_long_poll_of_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record for a partition whose last batch took long is read at once, not after a fetch from idle partitions."""
    monkeypatch.setattr(sources, "POLL_MS", 20_000)
    bus, go_on = await bench.bus(), asyncio.Event()
    recorder = Recorder(lambda _: go_on.wait())
    consumer = cast(ConsumerLoop, bus.consume(SCAN_WORKERS, GROUP, recorder))
    async with Running(consumer):
        fetcher = cast(Member, consumer._source)._client._fetcher
        await bus.publish(SCAN_WORKERS, one_worker([1]))
        await until(lambda: recorder.tries)
        await bus.publish(SCAN_WORKERS, one_worker([2]))
        await until(lambda: fetcher._records)
        await asyncio.sleep(0.2)  # more than the client would wait for the batch by default
        go_on.set()
        await until(lambda: len(recorder.handled) == 2)
        began = time.monotonic()
        await bus.publish(SCAN_WORKERS, one_worker([3]))
        await until(lambda: len(recorder.handled) == 3)
        assert time.monotonic() - began < 10


async def letters(bench: Bench) -> list[Any]:
    """Return the records of the dead-letter topic."""
    name = bench.settings.topic_prefix + SCAN_WORKERS.dead_letter
    async with AIOKafkaConsumer(
        name,
        bootstrap_servers=bench.settings.kafka,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=2 * DEAD_LETTER_BYTES,
    ) as consumer:
        partition = TopicPartition(name, 0)
        end = (await consumer.end_offsets([partition]))[partition]
        return [await consumer.getone() for _ in range(end)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(0, DEAD_LETTER_BYTES + 1, id="value"),
        pytest.param(DEAD_LETTER_BYTES + 1, 0, id="key"),
        pytest.param(200_000, DEAD_LETTER_BYTES - 100_000, id="both"),
    ],
)
async def test_member_with_an_oversized_record_dead_letters_its_origin(bench: Bench, key: int, value: int) -> None:
    """A record that exceeds the dead-letter topic's limit is dead-lettered without its content."""
    await configure(bench, **{"max.message.bytes": str(2 * DEAD_LETTER_BYTES)})
    bus, recorder = await bench.bus(), Recorder()
    async with Running(bus.consume(SCAN_WORKERS, GROUP, recorder)):
        await until(partial(accepted, bench, encoded([(bytes(key), bytes(value), [])])))
        await put(bench, 0, encoded([outgoing(*workers([1]))]))
        await until(lambda: recorder.handled)
    (letter,) = await letters(bench)
    assert (letter.key, letter.value) == (b"", None)
    assert dict(letter.headers)["dlq_offset"] == b"0"


async def test_create_topics_is_idempotent_and_restores_settings(bench: Bench) -> None:
    """Creating topics twice changes nothing, changed settings are restored, other partition counts are refused."""
    wanted = {
        "cleanup.policy": "delete",
        "message.timestamp.type": "LogAppendTime",
        "compression.type": "producer",
        "min.insync.replicas": "1",
        "retention.ms": str(60 * 60 * 1000),
        "retention.bytes": str(SCAN_WORKERS.retention_bytes),
    }
    await create_topics(bench.settings)
    assert (await settings_of(bench, bench.name)).items() >= wanted.items()
    letters = await settings_of(bench, bench.settings.topic_prefix + SCAN_WORKERS.dead_letter)
    assert letters["max.message.bytes"] == str(DEAD_LETTER_BYTES)
    await configure(bench, **{"retention.ms": "1"})
    await create_topics(bench.settings)
    assert (await settings_of(bench, bench.name)).items() >= wanted.items()
    with pytest.raises(RuntimeError, match="has 12 partitions, not 13"):
        await create_topics(bench.settings, [replace(SCAN_WORKERS, partitions=13)])


async def settings_of(bench: Bench, topic: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bench.settings.kafka)
    try:
        await admin.start()
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        await admin.close()
    (found,) = response.resources
    return {name: value for name, value, *_ in found[4]}


async def test_create_topics_without_a_broker_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating topics waits for a broker, with a timeout."""
    nowhere = TopicSettings(kafka=f"127.0.0.1:{ports.choose()}")
    monkeypatch.setattr(broker_module, "ADMIN_SECONDS", 1)
    with pytest.raises(DependencyError, match="cannot create topics"):
        await create_topics(nowhere)
