"""One process's connection to the bus: it publishes, and makes consumers.

A send that was not acknowledged in time cannot be taken back: it stays in the producer, which repeats it without doubling
it, and will arrive when the broker does. So `publish` stops waiting and raises, and nothing new is sent to a partition before
the old is acknowledged: memory stays bounded, and order stays. A partition without a leader holds up sends to itself alone.

Only when the producer itself gives a send up is there nothing left to wait for: its sequence is broken. Nor is there where the
brokers lost all that they held: they number producers from the start then, and take what one sends for another's. `alive` turns
False, and the process has to be replaced.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, cast

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from scanfleet.bus import Consumer, DeadLetterCallback, Handler
from scanfleet.consumer import ConsumerLoop, Source
from scanfleet.errors import DependencyError
from scanfleet.kafka.broker import BACKOFF_MS, access, connect, depending
from scanfleet.kafka.sources import Member, Past, Tail
from scanfleet.kafka.topics import DEAD_LETTER_BYTES
from scanfleet.messages import Message
from scanfleet.messages.envelope import Outgoing, RawRecord, dead_letter_headers, encode, weight
from scanfleet.messages.topics import Topic
from scanfleet.settings import KafkaSettings

START_SECONDS: Final = 30.0  # for a broker that starts with us; it takes 3 to 10
SEND_SECONDS: Final = 10.0  # until a caller hears that it was not acknowledged: a broker's restart fits in
POLL_SECONDS: Final = 1.0  # between two looks whether a broker that says nothing is still there
STOP_SECONDS: Final = 5.0  # to flush at the end: well within a supervisor's patience

# The producer drops a silent connection after this: a broker that restarts is back sooner.
PRODUCER_REQUEST_MS: Final = 60_000
CLUSTER_MS: Final = 1_000  # between two looks whether the brokers are still the same
ENDS_REQUEST_MS: Final = 5_000  # a broker that does not say in this time where its logs end counts as away
DEAD_LETTER_ROOM: Final = 64 * 1024  # for a dead letter's key and the headers that say where it is from
BATCH_BYTES: Final = 256 * 1024  # what one partition sends in one round trip; a second of a busy worker's hosts

log = logging.getLogger(__name__)

_Place = tuple[str, int]
"""A topic with its prefix, and a partition."""

_partition_of: Final = DefaultPartitioner()


class KafkaBus:
    """A `scanfleet.bus.Bus`.

    Args:
        settings: where the brokers are, and what is put before the name of every topic and group.
        source: the service that speaks, for `ce_source`.
        instance: this process, unique among the service's replicas and the same after a restart.

    Raises:
        OSError: a file that the settings name cannot be read.
    """

    def __init__(self, settings: KafkaSettings, *, source: str, instance: str) -> None:
        self._access = access(settings)
        self._prefix = settings.topic_prefix
        self._source = source
        self._instance = instance
        self._producer: AIOKafkaProducer | None = None
        self._ends: AIOKafkaConsumer | None = None
        self._overdue: defaultdict[_Place, set[asyncio.Future[object]]] = defaultdict(
            set
        )  # sends that `publish` gave up
        self._fault: BaseException | None = None
        self._dead_letter_callbacks: list[DeadLetterCallback] = []

    async def start(self) -> None:
        """Connect; waits for a broker that is still starting.

        Raises:
            DependencyError: there is none after `START_SECONDS`.
        """
        self._producer = AIOKafkaProducer(
            **self._access,
            client_id=self._instance,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=BATCH_BYTES,
            max_request_size=DEAD_LETTER_BYTES,  # the sooner limit of ordinary messages is the envelope's
            request_timeout_ms=PRODUCER_REQUEST_MS,
            metadata_max_age_ms=CLUSTER_MS,
            retry_backoff_ms=BACKOFF_MS,
        )
        # A partition without a leader must not cost the process: sends to it wait, one batch of them, for as long as it takes.
        self._producer._message_accumulator._batch_ttl = float("inf")  # noqa: SLF001 # the client ties it to the timeout of a request
        self._know_cluster(self._producer)
        # A connection of its own: behind a consumer's long poll the answer would wait for the poll to end.
        self._ends = AIOKafkaConsumer(
            **self._access,
            client_id=f"{self._instance}-ends",
            request_timeout_ms=ENDS_REQUEST_MS,
            retry_backoff_ms=BACKOFF_MS,
        )
        try:
            with depending(f"no broker at {self._access['bootstrap_servers']}"):
                async with asyncio.timeout(START_SECONDS):
                    await connect(self._ends.start)
                    await connect(self._producer.start)
        except DependencyError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Flush and disconnect; says in the log what could not be flushed."""
        for client in (self._producer, self._ends):
            if client is None:
                continue
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await client.stop()
            except TimeoutError:
                log.error("gave up flushing: %d sends or more stay unacknowledged", self._count_overdue())  # noqa: TRY400 # the trace says nothing more
        self._producer = self._ends = None

    @property
    def alive(self) -> bool:
        """False when a send was given up, or the brokers are others: the process must be replaced."""
        return self._fault is None

    @property
    def ready(self) -> bool:
        """False while sends are overdue."""
        return self.alive and not self._count_overdue()

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        envelopes = [encode(topic, message, source=self._source) for message in messages]
        await self.send(topic.name, [(envelope.key, envelope.value, envelope.headers) for envelope in envelopes])

    def on_dead_letter(self, callback: DeadLetterCallback) -> None:
        self._dead_letter_callbacks.append(callback)

    def consume(self, topic: Topic, group: str, handler: Handler) -> Consumer:
        source = Member(
            topic,
            name=self._prefix + topic.name,
            group=self._prefix + group,
            instance=f"{self._instance}-{topic.name}",
            access=self._access,
            end_offsets=self._end_offsets,
        )
        return self._member(topic, group, handler, source)

    def tail(self, topic: Topic, handler: Handler, *, key: str | None = None) -> Consumer:
        source = Tail(
            topic,
            name=self._prefix + topic.name,
            client_id=f"{self._instance}-{topic.name}",
            access=self._access,
            end_offsets=self._end_offsets,
        )
        return ConsumerLoop(topic, f"{self._source}-tail", handler, source, None, key=key)

    async def past(
        self, topic: Topic, first: int = 0, *, partition: int | None = None
    ) -> AsyncGenerator[RawRecord, None]:
        """Read what is in `topic` up to where it ends now, each partition from offset `first` on; hold a few fetches in memory.

        With `partition` it reads that one alone.

        Raises:
            DependencyError: the broker is away, maybe halfway.
        """
        source = Past(
            topic,
            name=self._prefix + topic.name,
            client_id=f"{self._instance}-{topic.name}",
            access=self._access,
            end_offsets=self._end_offsets,
        )
        try:
            await source.begin(first, range(topic.partitions) if partition is None else (partition,))
            ends = await source.ends()
            positions: Mapping[int, int] = {}
            while any(positions.get(partition, 0) < end for partition, end in ends.items()):
                records = await source.poll(POLL_SECONDS)
                for record in records:
                    if record.offset < ends[record.partition]:
                        yield record
                if not records:
                    await source.ends()  # the client itself would wait for a broker for ever
                positions = await source.positions()
        finally:
            await source.close()

    def _member(self, topic: Topic, group: str, handler: Handler, source: Source) -> ConsumerLoop:
        async def dead_letter(record: RawRecord, reason: str) -> None:
            if weight(record) > DEAD_LETTER_BYTES - DEAD_LETTER_ROOM:
                record = replace(record, value=None, headers=())  # unpacked it fits nowhere: its origin leads to it
            headers = dead_letter_headers(record, group=group, reason=reason)
            # The client takes no record without key and value; a hostile one may have neither.
            await self.send(topic.dead_letter, [(record.key or b"", record.value, headers)])
            for callback in self._dead_letter_callbacks:
                callback(record, reason)

        return ConsumerLoop(topic, group, handler, source, dead_letter)

    async def _end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        if self._ends is None:
            raise RuntimeError("the bus is not started")
        with depending("the broker does not say where its logs end"):
            return cast(Mapping[TopicPartition, int], await self._ends.end_offsets(partitions))

    async def send(self, topic: str, records: Iterable[Outgoing]) -> None:
        """Send any records to `topic`, named without its prefix, and wait for every acknowledgement.

        Raises:
            DependencyError: as `publish`.
        """
        if self._producer is None:
            raise RuntimeError("the bus is not started")
        self._check()
        producer, name = self._producer, self._prefix + topic
        acks: defaultdict[_Place, set[asyncio.Future[object]]] = defaultdict(set)
        try:
            async with asyncio.timeout(SEND_SECONDS):
                partitions = sorted(await producer.partitions_for(name))
                placed = [((name, _partition_of(record[0], partitions, partitions)), record) for record in records]
                for place in {place for place, _ in placed}:
                    while overdue := self._overdue[place]:
                        await asyncio.wait(overdue)
                self._check()
                for place, (key, value, headers) in placed:
                    ack = await producer.send(name, partition=place[1], key=key, value=value, headers=list(headers))
                    ack.add_done_callback(partial(self._settled, place))
                    acks[place].add(ack)
                for sent in acks.values():
                    await asyncio.wait(sent)
            for ack in itertools.chain.from_iterable(acks.values()):
                ack.result()
        except (TimeoutError, KafkaError) as error:
            raise DependencyError(f"the broker did not acknowledge a message of {topic}: {error!r}") from error
        finally:
            for place, sent in acks.items():
                self._overdue[place].update(ack for ack in sent if not ack.done())

    def _count_overdue(self) -> int:
        return sum(map(len, self._overdue.values()))

    def _settled(self, place: _Place, ack: asyncio.Future[object]) -> None:
        self._overdue[place].discard(ack)
        if not ack.cancelled() and (fault := ack.exception()) is not None:
            self._fail(fault, "the producer gave a send up")

    def _know_cluster(self, producer: AIOKafkaProducer) -> None:
        """Fail when the brokers' cluster is not the first one any more, which each of their answers about topics says."""
        cluster = producer.client.cluster
        update = cluster.update_metadata  # the client keeps no cluster's id, and has no other place to hear of it
        first: str | None = None

        def updated(answer: Any) -> None:
            nonlocal first
            first = first or answer.cluster_id
            if answer.cluster_id not in {None, first}:
                self._fail(RuntimeError(f"cluster {answer.cluster_id} where {first} was"), "the brokers are others")
            update(answer)

        cluster.update_metadata = updated

    def _fail(self, fault: BaseException, what: str) -> None:
        if self._fault is None:
            log.critical("%s; the process must be replaced", what, exc_info=fault)
            self._fault = fault

    def _check(self) -> None:
        if self._fault is not None:
            raise DependencyError(f"no order can be kept any more, the process must be replaced: {self._fault!r}")
