"""Read topics and groups directly from Kafka, as an observer of any service."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from scanfleet.contracts.messages.envelope import RawRecord
from scanfleet.contracts.messages.topics import Topic


async def read(bootstrap: str, topic: Topic, *, prefix: str = "", dead_letters: bool = False) -> list[RawRecord]:
    """Return the records of a topic, or of its dead-letter topic, up to its current end, partition by partition."""
    name = topic.dead_letter if dead_letters else topic.name
    places = [TopicPartition(prefix + name, number) for number in range(1 if dead_letters else topic.partitions)]
    found: list[RawRecord] = []
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    try:  # not the client's own context manager, which leaves its connections open if the start fails
        await consumer.start()
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        ends = await consumer.end_offsets(places)
        while any([await consumer.position(place) < ends[place] for place in places]):
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                found += [
                    RawRecord(
                        name,
                        each.partition,
                        each.offset,
                        datetime.fromtimestamp(each.timestamp / 1000, UTC),
                        each.key,
                        each.value,
                        each.headers,
                    )
                    for each in batch
                ]
    finally:
        await consumer.stop()
    return sorted(found, key=lambda record: (record.partition, record.offset))


async def behind(bootstrap: str, group: str, topic: Topic, *, prefix: str = "") -> int:
    """Return the number of records of the topic that the group has not committed."""
    places = [TopicPartition(prefix + topic.name, number) for number in range(topic.partitions)]
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await consumer.start()
        await admin.start()
        ends = await consumer.end_offsets(places)
        committed = await admin.list_consumer_group_offsets(prefix + group)
        return sum(
            max(0, end - max(0, committed[place].offset)) if place in committed else end for place, end in ends.items()
        )
    finally:
        await asyncio.gather(consumer.stop(), admin.close())
