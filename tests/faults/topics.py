"""The topics of a platform and the groups that read them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from local.wait import until
from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.envelope import RawRecord, decode
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_REPLIES, SCAN_RESULTS, TOPICS, Topic
from scanfleet.errors import MessageError
from scanfleet.services import WITH_DATABASE
from scanfleet_testing.kafka import behind, read

READ_TIMEOUT_SECONDS: Final = 90.0  # until the services have read all records; usually a few, on a busy machine more


@dataclass(frozen=True, slots=True)
class Published:
    """A message and its position in its topic."""

    message: Message
    record: RawRecord

    @property
    def headers(self) -> dict[str, str]:
        return {name: (value or b"").decode() for name, value in self.record.headers}


class Topics:
    """Reads and writes topics, and disturbs the groups that read them.

    Args:
        kafka: bootstrap address of the broker.
    """

    def __init__(self, kafka: str) -> None:
        self._kafka = kafka

    def records(self, topic: Topic, *, letters: bool = False) -> list[RawRecord]:
        """Return all records of a topic, or of its dead-letter topic, partition by partition."""
        return asyncio.run(read(self._kafka, topic, dead_letters=letters))

    def messages(self, topic: Topic, *kinds: type[Message]) -> list[Published]:
        """Return the valid messages of a topic."""
        found = []
        for record in self.records(topic):
            with suppress(MessageError):
                message = decode(topic, record)
                if isinstance(message, kinds or Message):
                    found.append(Published(message, record))
        return found

    def send(self, records: Sequence[tuple[str, int | None, bytes | None, bytes | None, Any]]) -> None:
        """Write raw records: topic, partition or None, key, value, headers."""
        asyncio.run(self._write(records))

    def behind(self, group: str, topic: Topic) -> int:
        """Return the number of records of the topic that the group has not committed."""
        return asyncio.run(behind(self._kafka, group, topic))

    def until_read(self) -> None:
        """Wait until the services have committed all records of the topics."""
        for topic in TOPICS:
            for service in topic.consumers:
                # The orchestrator reads its own topics only after a restore.
                if service in WITH_DATABASE and topic is not SCAN_EVENTS:
                    group = service if topic is SCAN_RESULTS else f"{service}-{topic.name}"
                    self._until_read_by(group, topic)

    def _until_read_by(self, group: str, topic: Topic) -> None:
        until(lambda: self.behind(group, topic) == 0, READ_TIMEOUT_SECONDS, f"{group} to have read all", 0.2)

    @contextmanager
    def rebalances(self, group: str, pause: float) -> Iterator[None]:
        """Rebalance a group every `pause` seconds for the duration of the block; its members keep their partitions."""
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(pause):
                asyncio.run(self._join(group))

        with ThreadPoolExecutor(1) as threads:
            repeated = threads.submit(repeat)
            try:
                yield
            finally:
                over.set()
                repeated.result()

    @contextmanager
    def stalled(self, group: str, seconds: float) -> Iterator[Future[None]]:
        """Have no member of a group read for `seconds`: a rebalance waits for a member that is frozen, until its session ends.

        Yields:
            the rebalance, which is done when the group reads again.
        """
        with asyncio.Runner() as frozen, ThreadPoolExecutor(1) as threads:
            member = frozen.run(self._member(group, session_timeout_ms=int(1_000 * seconds)))
            try:
                stall = threads.submit(lambda: asyncio.run(self._join(group)))
                yield stall
                stall.result()
            finally:
                frozen.run(member.stop())

    async def _join(self, group: str) -> None:
        member = await self._member(group)
        await member.stop()

    async def _member(self, group: str, **settings: Any) -> AIOKafkaConsumer:
        """Join a group for a topic that its other members do not read."""
        member = AIOKafkaConsumer(
            SCAN_REPLIES.name,
            bootstrap_servers=self._kafka,
            group_id=group,
            enable_auto_commit=False,
            partition_assignment_strategy=(RangePartitionAssignor,),
            **settings,
        )
        await member.start()
        return member

    async def _write(self, records: Sequence[tuple[str, int | None, bytes | None, bytes | None, Any]]) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._kafka,
            max_request_size=1 << 24,
        )
        await producer.start()
        try:
            acks = [
                await producer.send(topic, value=value, key=key, partition=partition, headers=list(headers))
                for topic, partition, key, value, headers in records
            ]
            await asyncio.gather(*acks)
        finally:
            await producer.stop()
