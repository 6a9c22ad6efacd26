"""A process's connection to Kafka: it publishes, and creates consumers.

A send that was not acknowledged in time cannot be withdrawn: the idempotent producer keeps retrying it until the broker
recovers. So `publish` stops waiting and raises, and nothing new is sent to a partition before the old send is
acknowledged, which bounds memory and preserves order. A partition without a leader blocks only its own sends; those
after the first one fail at once.

Two conditions are permanent: the producer gives up a send, so its sequence is broken; or the brokers have lost their
data and assign producer ids again from the start, so they would attribute records to another producer. Then `alive`
becomes False, and the process must be restarted.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, cast

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.envelope import Outgoing, RawRecord, dead_letter_headers, encode, weight
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.kafka import connections
from scanfleet.kafka.batches import MOST_HEADERS
from scanfleet.kafka.broker import BACKOFF_MS, access, connect, connection_error, depending
from scanfleet.kafka.sources import Member, Replay, Tail
from scanfleet.kafka.topics import DEAD_LETTER_BYTES
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Consumer, DeadLetterCallback, Handler, M
from scanfleet.runtime.consumer import ConsumerLoop, Rejected
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.runtime.source import Source

START_SECONDS: Final = 30.0  # timeout for a broker that starts at the same time; it takes 3 to 10 s
SEND_SECONDS: Final = 10.0  # timeout of an acknowledgement; long enough for a broker's restart
POLL_SECONDS: Final = 1.0  # interval of checks while the broker does not respond
STOP_SECONDS: Final = 5.0  # for flushing at shutdown: well below a supervisor's stop timeout

# The producer drops a silent connection after this; the restart of a broker takes less.
PRODUCER_REQUEST_MS: Final = 60_000
CLUSTER_MS: Final = 1_000  # interval of checks of the cluster id and of the partitions' leaders
ENDS_REQUEST_MS: Final = 5_000  # timeout of a query for end offsets, after which the broker counts as unavailable
DEAD_LETTER_OVERHEAD_BYTES: Final = 64 * 1024  # for a dead letter's origin headers and framing
NO_LEADER: Final = -1  # in the client's metadata
BATCH_BYTES: Final = 256 * 1024  # sent per partition and round trip; one second of a busy worker's hosts

_log = structlog.stdlib.get_logger(__name__)

_Place = tuple[str, int]
"""A topic with its prefix, and a partition."""

_partition_of: Final = DefaultPartitioner()


class KafkaBus:
    """A `scanfleet.runtime.bus.Bus`.

    Args:
        settings: the brokers, and the prefix of every topic and group.
        source: the publishing service, for `ce_source`.
        instance: name of this process, unique among the service's replicas and stable across restarts.

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
        self._overdue: defaultdict[_Place, dict[asyncio.Future[object], float]] = defaultdict(dict)
        """Sends that `publish` stopped waiting for, with the monotonic times when they began."""
        self._fault: BaseException | None = None
        self._dead_letter_callbacks: list[DeadLetterCallback] = []

    async def start(self) -> None:
        """Connect, waiting for a broker that is still starting.

        Raises:
            DependencyError: no broker answered within `START_SECONDS`.
        """
        connections.install()
        self._producer = AIOKafkaProducer(
            **self._access,
            client_id=self._instance,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=BATCH_BYTES,
            max_request_size=DEAD_LETTER_BYTES,  # for ordinary messages the lower limit of the envelope applies
            request_timeout_ms=PRODUCER_REQUEST_MS,
            metadata_max_age_ms=CLUSTER_MS,
            retry_backoff_ms=BACKOFF_MS,
        )
        # A partition without a leader must not fail the process: one batch of sends to it waits indefinitely.
        self._producer._message_accumulator._batch_ttl = float("inf")  # noqa: SLF001 # no setting
        self._watch_cluster_id(self._producer)
        # A separate connection: on a consumer's connection the response would wait for its long poll to end.
        self._ends = AIOKafkaConsumer(
            **self._access,
            client_id=f"{self._instance}-ends",
            request_timeout_ms=ENDS_REQUEST_MS,
            metadata_max_age_ms=CLUSTER_MS,
            retry_backoff_ms=BACKOFF_MS,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                await connect(self._ends.start)
                await connect(self._producer.start)
        except (KafkaError, TimeoutError) as error:
            await self.stop()
            cause = await connection_error(self._access) or error
            raise DependencyError(f"no broker at {self._access['bootstrap_servers']}: {cause!r}") from error

    async def stop(self) -> None:
        """Flush and disconnect; log what could not be flushed."""
        for client in (self._producer, self._ends):
            if client is None:
                continue
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await client.stop()
            except TimeoutError:
                _log.error("flush_timed_out", pending_at_least=self._count_overdue(), limit_seconds=STOP_SECONDS)
        self._producer = self._ends = None

    @property
    def alive(self) -> bool:
        """False when the producer gave up a send, or the cluster is another one: the process must be restarted."""
        return self._fault is None

    @property
    def ready(self) -> bool:
        """False while sends wait for longer than `SEND_SECONDS`, except to partitions that have no leader: all others work."""
        late = time.monotonic() - SEND_SECONDS
        return self.alive and all(
            self._has_no_leader(place)
            for place, sends in self._overdue.items()
            if any(began <= late for began in sends.values())
        )

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        envelopes = [encode(topic, message, source=self._source, traceparent=tracing.current()) for message in messages]
        await self.send(topic.name, [(envelope.key, envelope.value, envelope.headers) for envelope in envelopes])

    def leaderless(self, topic: Topic) -> Collection[int]:
        places = [TopicPartition(self._prefix + topic.name, partition) for partition in range(topic.partitions)]
        return {place.partition for place in places if self._ends and _leader(self._ends, place) == NO_LEADER}

    def on_dead_letter(self, callback: DeadLetterCallback) -> None:
        self._dead_letter_callbacks.append(callback)

    def consume(self, topic: Topic[M], group: str, handler: Handler[M]) -> Consumer:
        source = Member(
            topic,
            name=self._prefix + topic.name,
            group=self._prefix + group,
            instance=f"{self._instance}-{topic.name}",
            access=self._access,
            end_offsets=self._end_offsets,
        )
        return self._member(topic, group, handler, source)

    def tail(
        self,
        topic: Topic[M],
        handler: Handler[M],
        *,
        wants: Callable[[str], bool] | None = None,
        partition: int | None = None,
    ) -> Consumer:
        source = Tail(
            topic,
            name=self._prefix + topic.name,
            client_id=f"{self._instance}-{topic.name}",
            access=self._access,
            end_offsets=self._end_offsets,
            partition=partition,
        )
        return ConsumerLoop(topic, f"{self._source}-tail", handler, source, None, wants=wants)

    async def past(
        self, topic: Topic, first: int = 0, *, partition: int | None = None
    ) -> AsyncGenerator[RawRecord, None]:
        """Yield the records in `topic` up to its current end, each partition from offset `first` on.

        Only a few fetches are held in memory. With `partition` only that one is read.

        Raises:
            DependencyError: the broker is unavailable; some records may have been yielded.
        """
        source = Replay(
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
                    await source.ends()  # the client itself would wait for a broker indefinitely
                positions = await source.positions()
        finally:
            await source.close()

    def _member(self, topic: Topic[M], group: str, handler: Handler[M], source: Source) -> ConsumerLoop[M]:
        async def dead_letter(rejected: Rejected) -> None:
            letters: list[Outgoing] = []
            size = 0
            for record, reason in rejected:
                kept, headers = record, dead_letter_headers(record, group=group, reason=reason)
                if weight(record) > DEAD_LETTER_BYTES - DEAD_LETTER_OVERHEAD_BYTES or len(headers) > MOST_HEADERS:
                    kept = replace(record, key=None, value=None, headers=())  # too large; see its origin
                    headers = dead_letter_headers(kept, group=group, reason=reason)
                if letters and size + weight(kept) > DEAD_LETTER_BYTES:  # also the limit of a single dead letter
                    await self.send(topic.dead_letter, letters)
                    letters, size = [], 0
                # The client sends no record without key and value; a hostile one may have neither.
                letters.append((kept.key or b"", kept.value, headers))
                size += weight(kept)
            await self.send(topic.dead_letter, letters)
            for record, reason in rejected:
                for callback in self._dead_letter_callbacks:
                    callback(record, reason)

        return ConsumerLoop(topic, group, handler, source, dead_letter)

    async def _end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        if self._ends is None:
            raise RuntimeError("the bus has not been started")
        # The query would wait for a leader, and fail for all partitions.
        led = [place for place in partitions if _leader(self._ends, place) != NO_LEADER]
        if partitions and not led:
            raise DependencyError(f"cannot query the end offsets: none of {len(partitions)} partitions has a leader")
        with depending("cannot query the end offsets"):
            return cast(Mapping[TopicPartition, int], await self._ends.end_offsets(led))

    async def send(self, topic: str, records: Iterable[Outgoing]) -> None:
        """Send raw records to `topic`, named without its prefix, and wait for every acknowledgement.

        Raises:
            DependencyError: see `publish`.
        """
        if self._producer is None:
            raise RuntimeError("the bus has not been started")
        self._check()
        producer, name = self._producer, self._prefix + topic
        placed: defaultdict[_Place, list[Outgoing]] = defaultdict(list)
        try:
            async with asyncio.timeout(SEND_SECONDS):
                partitions = sorted(await producer.partitions_for(name))
                for record in records:
                    placed[name, _partition_of(record[0], partitions, partitions)].append(record)
                # Concurrently, and all to completion: a partition without a leader must not delay the others.
                sends = (self._send_to(place, sent, producer) for place, sent in placed.items())
                results = await asyncio.gather(*sends, return_exceptions=True)
            for error in filter(None, results):
                raise error
        except (TimeoutError, KafkaError) as error:
            raise DependencyError(f"the broker did not acknowledge a message of {topic}: {error!r}") from error

    async def _send_to(self, place: _Place, records: Iterable[Outgoing], producer: AIOKafkaProducer) -> None:
        """Send records to one partition, in order and after all earlier ones, and wait for the acknowledgements."""
        while overdue := self._overdue[place]:
            if self._has_no_leader(place):
                raise DependencyError(
                    f"{place[0]} partition {place[1]} has no leader, and {len(overdue)} sends are overdue"
                )
            await asyncio.wait(overdue)
        self._check()
        acks: set[asyncio.Future[object]] = set()
        began = time.monotonic()
        try:
            for key, value, headers in records:
                ack = await producer.send(place[0], value, key, place[1], headers=list(headers))
                ack.add_done_callback(partial(self._settled, place))
                acks.add(ack)
            await asyncio.wait(acks)
        finally:
            self._overdue[place].update((ack, began) for ack in acks if not ack.done())
        for ack in acks:
            ack.result()

    def _has_no_leader(self, place: _Place) -> bool:
        return (
            self._producer is not None
            and self._producer.client.cluster.leader_for_partition(TopicPartition(*place)) == NO_LEADER
        )

    def _count_overdue(self) -> int:
        return sum(map(len, self._overdue.values()))

    def _settled(self, place: _Place, ack: asyncio.Future[object]) -> None:
        self._overdue[place].pop(ack, None)
        if not ack.cancelled() and (fault := ack.exception()) is not None:
            self._fail(fault, "the producer abandoned a send")

    def _watch_cluster_id(self, producer: AIOKafkaProducer) -> None:
        """Fail when the cluster id in the brokers' metadata differs from the first one."""
        cluster = producer.client.cluster
        update = cluster.update_metadata  # the client does not store the cluster id and has no other hook for it
        first: str | None = None

        def updated(answer: Any) -> None:
            nonlocal first
            first = first or answer.cluster_id
            if answer.cluster_id not in {None, first}:
                error = RuntimeError(f"cluster {answer.cluster_id} instead of {first}")
                self._fail(error, "connected to a different Kafka cluster")
            update(answer)

        cluster.update_metadata = updated

    def _fail(self, fault: BaseException, cause: str) -> None:
        if self._fault is None:
            _log.critical("bus_failed", cause=cause, next_step="restart the process", exc_info=fault)
            self._fault = fault

    def _check(self) -> None:
        if self._fault is not None:
            raise DependencyError(f"the bus has failed, restart the process: {self._fault!r}")


def _leader(consumer: AIOKafkaConsumer, place: TopicPartition) -> int | None:
    """Return the id of the partition's leader in the client's metadata; None if the partition is unknown."""
    leader: int | None = consumer._client.cluster.leader_for_partition(place)  # noqa: SLF001 # no public method
    return leader
