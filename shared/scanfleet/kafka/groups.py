"""Offsets of consumer groups."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError

from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.kafka.broker import BACKOFF_MS, access, connect, depending
from scanfleet.runtime.settings import KafkaSettings

MOVE_SECONDS: Final = 60.0  # includes the start of a broker


async def move_group(settings: KafkaSettings, group: str, topic: Topic, to: Literal["beginning", "end"]) -> None:
    """Reset the offsets of a group without members to the beginning or the end of a topic.

    Raises:
        DependencyError: the broker is unavailable, or the group still has members.
        OSError: a file that the settings name cannot be read.
    """
    partitions = [TopicPartition(settings.topic_prefix + topic.name, number) for number in range(topic.partitions)]
    consumer = AIOKafkaConsumer(
        **access(settings),
        group_id=settings.topic_prefix + group,
        enable_auto_commit=False,
        retry_backoff_ms=BACKOFF_MS,
    )
    try:
        with depending(f"cannot reset the offsets of {group}"):
            async with asyncio.timeout(MOVE_SECONDS):
                await connect(consumer.start)
                consumer.assign(partitions)
                places = consumer.beginning_offsets if to == "beginning" else consumer.end_offsets
                await _commit(consumer, await places(partitions))
    finally:
        await consumer.stop()


async def _commit(consumer: AIOKafkaConsumer, offsets: Mapping[TopicPartition, int]) -> None:
    try:
        await consumer.commit(offsets)
    except CommitFailedError as error:
        raise DependencyError("the group has members: stop them, and wait ten seconds after a kill") from error
