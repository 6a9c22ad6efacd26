"""An in-memory bus: partitions, groups, tails, rebalances and dead letters, without a broker.

It runs the same loop as Kafka's consumers; only the source of records differs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.envelope import Headers, RawRecord, dead_letter_headers, decode, encode
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Consumer, DeadLetterCallback, Handler, M
from scanfleet.runtime.consumer import ConsumerLoop, Rejected
from scanfleet.runtime.source import BatchDroppedError, Listener

BATCH: Final = 500  # records per poll, as in Kafka's consumers


class MemoryBroker:
    """The logs and groups shared by any number of `MemoryBus`, each of which represents one process."""

    def __init__(self) -> None:
        self.unavailable = False
        """Set it to make every call fail as if the broker were unavailable."""

        self.leaderless: set[tuple[str, int]] = set()
        """Topics and partitions without a leader: they store no message, and a batch with one of theirs fails."""

        self._records: defaultdict[str, list[RawRecord]] = defaultdict(list)
        self._partitions: defaultdict[tuple[str, int], list[RawRecord]] = defaultdict(list)
        self._groups: defaultdict[tuple[str, str], _Group] = defaultdict(_Group)
        self._news = asyncio.Event()

    def check(self) -> None:
        """Raise DependencyError while the broker is unavailable."""
        if self.unavailable:
            raise DependencyError("the broker is unavailable")

    def records(self, name: str) -> list[RawRecord]:
        """Return all records of the topic `name`, which may be a dead-letter topic, in order of arrival."""
        return list(self._records[name])

    def partition(self, topic: Topic, number: int) -> Sequence[RawRecord]:
        return self._partitions[topic.name, number]

    def append(
        self,
        name: str,
        partition: int,
        *,
        key: bytes | None = None,
        value: bytes | None = None,
        headers: Headers = (),
    ) -> None:
        """Append arbitrary bytes to a partition, as any client with access could."""
        log = self._partitions[name, partition]
        record = RawRecord(name, partition, len(log), utc_now(), key, value, tuple(headers))
        log.append(record)
        self._records[name].append(record)
        self.notify()

    def group(self, topic: Topic, name: str) -> _Group:
        return self._groups[topic.name, name]

    def committed(self, topic: Topic, group: str) -> dict[int, int]:
        """Return the committed offset of the group by partition."""
        return dict(self.group(topic, group).offsets)

    def notify(self) -> None:
        """Wake all waiters of `news`."""
        self._news.set()
        self._news = asyncio.Event()

    async def news(self, seconds: float) -> None:
        """Wait until a record is appended or a partition assigned, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()


class MemoryBus:
    """A `scanfleet.runtime.bus.Bus`."""

    def __init__(self, broker: MemoryBroker | None = None, *, source: str = "test") -> None:
        self.broker = broker or MemoryBroker()
        self._source = source
        self._dead_letter_callbacks: list[DeadLetterCallback] = []

    async def start(self) -> None:
        self.broker.check()

    async def stop(self) -> None:
        """Do nothing: every send is acknowledged at once."""

    @property
    def alive(self) -> bool:
        return True

    @property
    def ready(self) -> bool:
        return not self.broker.unavailable

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        envelopes = [encode(topic, message, source=self._source, traceparent=tracing.current()) for message in messages]
        self.broker.check()
        refused = 0
        for envelope in envelopes:
            partition = topic.partition_of(envelope.key.decode())
            if (topic.name, partition) in self.broker.leaderless:
                refused += 1
                continue
            self.broker.append(topic.name, partition, key=envelope.key, value=envelope.value, headers=envelope.headers)
        if refused:
            raise DependencyError(f"{refused} of {len(envelopes)} messages are for partitions without a leader")

    def leaderless(self, topic: Topic) -> Collection[int]:
        return {partition for name, partition in self.broker.leaderless if name == topic.name}

    def on_dead_letter(self, callback: DeadLetterCallback) -> None:
        self._dead_letter_callbacks.append(callback)

    def consume(self, topic: Topic[M], group: str, handler: Handler[M]) -> Consumer:
        return self._member(topic, group, handler, _Member(self.broker, topic, group))

    def tail(
        self,
        topic: Topic[M],
        handler: Handler[M],
        *,
        wants: Callable[[str], bool] | None = None,
        partition: int | None = None,
    ) -> Consumer:
        return ConsumerLoop(
            topic, f"{self._source}-tail", handler, _Tail(self.broker, topic, partition), None, wants=wants
        )

    def messages(self, topic: Topic[M]) -> list[M]:
        """Return all messages sent to `topic`, in order of arrival."""
        return [decode(topic, record) for record in self.broker.records(topic.name)]

    def _member(self, topic: Topic[M], group: str, handler: Handler[M], source: _Tail) -> ConsumerLoop[M]:
        async def dead_letter(rejected: Rejected) -> None:
            self.broker.check()
            for record, reason in rejected:
                headers = dead_letter_headers(record, group=group, reason=reason)
                self.broker.append(topic.dead_letter, 0, key=record.key, value=record.value, headers=headers)
                for callback in self._dead_letter_callbacks:
                    callback(record, reason)

        return ConsumerLoop(topic, group, handler, source, dead_letter)


class _Tail:
    """A `scanfleet.runtime.source.Source` of every partition, or of one, from the end."""

    def __init__(self, broker: MemoryBroker, topic: Topic, partition: int | None = None) -> None:
        self._broker = broker
        self._topic = topic
        self._numbers = range(topic.partitions) if partition is None else (partition,)
        self._positions: dict[int, int] = {}

    async def open(self, listener: Listener) -> None:
        self._broker.check()
        self._positions = self._ends(self._numbers)
        await listener.assigned(set(self._positions))

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        self._broker.check()
        if not (records := self._take()):
            await self._broker.news(seconds)
            self._broker.check()
            records = self._take()
        return records

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Do nothing: a tail stores no offsets."""

    async def positions(self) -> Mapping[int, int]:
        return dict(self._positions)

    async def ends(self) -> Mapping[int, int]:
        self._broker.check()
        return self._ends(self._positions)

    async def close(self) -> None:
        self._positions = {}

    def _ends(self, partitions: Iterable[int]) -> dict[int, int]:
        return {number: len(self._broker.partition(self._topic, number)) for number in partitions}

    def _take(self) -> list[RawRecord]:
        records: list[RawRecord] = []
        for number, position in self._positions.items():
            records += self._broker.partition(self._topic, number)[position : position + BATCH - len(records)]
        for record in records:
            self._positions[record.partition] = record.offset + 1
        return records


class _Member(_Tail):
    """A `scanfleet.runtime.source.Source`: a group member's share of the partitions, from the committed offsets."""

    def __init__(self, broker: MemoryBroker, topic: Topic, group: str) -> None:
        super().__init__(broker, topic)
        self._group = broker.group(topic, group)
        self._generation = 0
        self.listener: Listener

    async def open(self, listener: Listener) -> None:
        self._broker.check()
        self.listener = listener
        await self._group.change(self._topic.partitions, joins=self)

    async def commit(self, offsets: Mapping[int, int]) -> None:
        self._broker.check()
        if self._generation != self._group.generation:
            raise BatchDroppedError("the group has rebalanced")
        self._group.offsets.update(offsets)

    async def close(self) -> None:
        await super().close()
        await self._group.change(self._topic.partitions, leaves=self)

    async def revoke(self) -> None:
        partitions, self._positions = set(self._positions), {}
        await self.listener.revoked(partitions)

    async def assign(self, partitions: Collection[int]) -> None:
        self._generation = self._group.generation
        self._positions = {number: self._group.offsets.get(number, 0) for number in partitions}
        self._broker.notify()
        await self.listener.assigned(set(partitions))


class _Group:
    """Members and committed offsets; rebalances eagerly, by ranges, as Kafka's groups do."""

    def __init__(self) -> None:
        self.generation = 0
        self.offsets: dict[int, int] = {}
        self._members: list[_Member] = []
        self._changing = asyncio.Lock()

    async def change(self, partitions: int, *, joins: _Member | None = None, leaves: _Member | None = None) -> None:
        async with self._changing:
            if leaves in self._members:
                self._members.remove(leaves)
            await asyncio.gather(*(member.revoke() for member in self._members))
            if joins is not None:
                self._members.append(joins)
            self.generation += 1
            members = len(self._members)
            for index, member in enumerate(self._members):
                await member.assign(range(partitions * index // members, partitions * (index + 1) // members))
