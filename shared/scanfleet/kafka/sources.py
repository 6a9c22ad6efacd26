"""Kafka implementations of `scanfleet.runtime.source.Source`: a tail and a member of a group."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from scanfleet.contracts.messages.envelope import RawRecord
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.kafka import batches
from scanfleet.kafka.broker import BACKOFF_MS, connect, depending
from scanfleet.runtime.consumer import REBALANCE_BATCH_SECONDS
from scanfleet.runtime.source import BatchDroppedError, Listener

EndOffsets = Callable[[Collection[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]

BATCH: Final = 500  # records per poll: enough to share a round of writes, few enough to finish within a second
BATCH_BYTES: Final = 16 * 1024 * 1024  # per fetch: held in memory by a consumer in addition to the current batch
POLL_MS: Final = 1_000  # maximum wait of a fetch for records: an idle consumer sends one a second
# The same during a batch: a fetch that is already waiting delays the first one after a rebalance by as much.
BUSY_POLL_MS: Final = 250
OPEN_SECONDS: Final = 30.0  # timeout for joining a group, whose members may finish their batches first
ASSIGN_SECONDS: Final = 1.0  # between two checks of a rebalance for an error
COMMIT_SECONDS: Final = 5.0  # timeout of a commit: the client looks for a lost coordinator indefinitely
SESSION_MS: Final = 10_000  # timeout after which a killed member's partitions are reassigned; a restart takes less
HEARTBEAT_MS: Final = 1_000  # maximum delay until a member notices a rebalance
REBALANCE_MS: Final = int(REBALANCE_BATCH_SECONDS * 1500)  # 1.5 times the limit of the current batch
REQUEST_MS: Final = REBALANCE_MS + 5_000  # a join is answered when the rebalance ends
METADATA_MS: Final = 5_000  # interval of metadata refreshes: a member without partitions sends no other request
MAX_POLL_MS: Final = (
    2**31 - 1
)  # a batch is retried indefinitely: leaving the group would only move the failure to another member


class Tail:
    """A `scanfleet.runtime.source.Source`: every partition, or one, from the end, no commits."""

    def __init__(
        self,
        topic: Topic,
        *,
        name: str,
        client_id: str,
        access: Mapping[str, Any],
        end_offsets: EndOffsets,
        partition: int | None = None,
    ) -> None:
        self._topic = topic
        self._numbers = range(topic.partitions) if partition is None else (partition,)
        self._name = name
        self._client_id = client_id
        self._access = access
        self._end_offsets = end_offsets
        self._consumer: AIOKafkaConsumer | None = None

    async def open(self, listener: Listener) -> None:
        await listener.assigned(_numbers(await self._assign(self._numbers, "latest")))

    async def _assign(self, numbers: Iterable[int], reset: str) -> list[TopicPartition]:
        consumer = self._make(auto_offset_reset=reset)
        partitions = [TopicPartition(self._name, number) for number in numbers]
        with depending(f"no position in {self._name}; does it exist?"):
            async with asyncio.timeout(OPEN_SECONDS):
                await connect(consumer.start)
                # Assigned manually: a subscription would restart from the end whenever metadata change.
                consumer.assign(partitions)
                for partition in partitions:
                    await consumer.position(partition)
        return partitions

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        fetcher = self._client._fetcher  # noqa: SLF001 # no setting for what follows
        fetcher._fetch_max_wait_ms = POLL_MS  # noqa: SLF001 # as above
        try:
            # The client has no timeout for a rebalancing group.
            with self._reading():
                async with asyncio.timeout(seconds + 1):
                    fetched = await self._client.getmany(timeout_ms=int(seconds * 1000), max_records=BATCH)
        except TimeoutError:
            return ()
        finally:
            fetcher._fetch_max_wait_ms = BUSY_POLL_MS  # noqa: SLF001 # as above
        waiting = fetcher._records  # noqa: SLF001 # as above
        for partition in waiting.keys() & fetched.keys():
            # Otherwise the client would return all records of one partition before any of the next one.
            waiting.move_to_end(partition)
        return [self._raw(record) for records in fetched.values() for record in records]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except KafkaError as error:
            if not error.retriable:
                raise
            raise DependencyError(f"cannot read {self._name}: {error!r}") from error

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Do nothing: a tail stores no offsets."""

    async def positions(self) -> Mapping[int, int]:
        return {partition.partition: position for partition, position in (await self._positions()).items()}

    async def ends(self) -> Mapping[int, int]:
        ends = await self._end_offsets(self._client.assignment())
        return {partition.partition: end for partition, end in ends.items()}

    async def close(self) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    @property
    def _client(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("the source is not open")
        return self._consumer

    def _make(self, **more: Any) -> AIOKafkaConsumer:
        batches.install()
        self._consumer = AIOKafkaConsumer(
            **self._access,
            client_id=self._client_id,
            enable_auto_commit=False,
            fetch_max_wait_ms=POLL_MS,
            fetch_max_bytes=BATCH_BYTES,
            consumer_timeout_ms=POLL_MS,
            request_timeout_ms=REQUEST_MS,
            retry_backoff_ms=BACKOFF_MS,
            metadata_max_age_ms=METADATA_MS,
            **more,
        )
        return self._consumer

    async def _positions(self) -> dict[TopicPartition, int]:
        found = {}
        for partition in self._client.assignment():
            # The client would wait for an unknown one.
            with contextlib.suppress(TimeoutError, IllegalStateError):
                async with asyncio.timeout(0):
                    found[partition] = await self._client.position(partition)
        return found

    def _raw(self, record: Any) -> RawRecord:
        return RawRecord(
            topic=self._topic.name,
            partition=record.partition,
            offset=record.offset,
            timestamp=datetime.fromtimestamp(record.timestamp / 1000, UTC),
            key=record.key,
            value=record.value,
            headers=record.headers,
        )


class Replay(Tail):
    """Reads some partitions from an offset until the reader stops."""

    async def ends(self) -> Mapping[int, int]:
        ends = await super().ends()
        if missing := _numbers(self._client.assignment()) - ends.keys():
            raise DependencyError(f"no leader for partitions {sorted(missing)} of {self._name}")
        return ends

    async def begin(self, first: int, partitions: Iterable[int]) -> None:
        for partition in await self._assign(partitions, "earliest"):
            if first > await self._client.position(partition):
                self._client.seek(partition, first)


class Member(Tail):
    """A `scanfleet.runtime.source.Source`: a group member's share of the partitions, from the committed offsets."""

    def __init__(self, topic: Topic, *, group: str, instance: str, **more: Any) -> None:
        super().__init__(topic, client_id=instance, **more)
        self._group = group
        self._instance = instance
        self._rebalance: _Rebalance

    async def open(self, listener: Listener) -> None:
        consumer = self._make(
            auto_offset_reset="earliest",
            group_id=self._group,
            group_instance_id=self._instance,
            partition_assignment_strategy=(RangePartitionAssignor,),
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            rebalance_timeout_ms=REBALANCE_MS,
            max_poll_interval_ms=MAX_POLL_MS,
        )
        self._rebalance = _Rebalance(listener)
        consumer.subscribe([self._name], listener=self._rebalance)
        with depending(f"cannot join {self._group}; does {self._name} exist?"):
            async with asyncio.timeout(OPEN_SECONDS):
                await connect(consumer.start)
                await self._rebalance.assigned.wait()
        self._rebalance.check()

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        self._rebalance.check()
        records = await super().poll(seconds)
        # The client assigns partitions before it calls the listener; a handler must be notified before it gets records.
        while not self._rebalance.assigned.is_set():
            with self._reading():  # a rebalance that failed assigns nothing until the client's error is consumed
                self._client._coordinator.check_errors()  # noqa: SLF001 # no public method
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASSIGN_SECONDS):
                    await self._rebalance.assigned.wait()
        return records

    async def commit(self, offsets: Mapping[int, int]) -> None:
        positions = {TopicPartition(self._name, number): offset for number, offset in offsets.items()}
        with depending(f"cannot commit to {self._group}"):
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._client.commit(positions)
            except (CommitFailedError, IllegalStateError) as error:
                raise BatchDroppedError("the group has rebalanced") from error

    async def close(self) -> None:
        if self._consumer is not None and self._consumer._coordinator is not None:  # noqa: SLF001 # no public method
            # A static member would keep its partitions until its session ends, which serves restarts after a kill. A
            # member that stops regularly leaves at once.
            self._consumer._coordinator._group_instance_id = None  # noqa: SLF001 # as above
        await super().close()


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc] # the client ships no types
    """Forwards the client's rebalance events, and keeps a listener's error, which the client would only log."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._fault: Exception | None = None
        self.assigned = asyncio.Event()

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self.assigned.clear()
        await self._call(self._listener.revoked(_numbers(revoked)))

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await self._call(self._listener.assigned(_numbers(assigned)))
        self.assigned.set()

    async def _call(self, call: Awaitable[None]) -> None:
        try:
            await call
        except Exception as error:  # noqa: BLE001 # raised in the loop by `check`
            self._fault = error


def _numbers(partitions: Iterable[TopicPartition]) -> set[int]:
    return {partition.partition for partition in partitions}
