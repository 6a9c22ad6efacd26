"""Creation of the topics of the registry, with their settings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NoError, TopicAlreadyExistsError, for_code
from pydantic import Field

from scanfleet.contracts.messages.topics import DEAD_LETTER_RETENTION, DEAD_LETTER_RETENTION_BYTES, TOPICS, Topic
from scanfleet.kafka.broker import administering
from scanfleet.runtime.settings import KafkaSettings

# A record may exceed the platform's own limit: other clients can write too, and a broker may accept larger ones.
DEAD_LETTER_BYTES: Final = 16 * 1024 * 1024
SEGMENT_BYTES: Final = (
    64 * 1024 * 1024
)  # a partition may exceed its limit by this much: only whole segments are deleted
SEGMENTS: Final = 7  # minimum number in which a partition keeps the records of its retention
LOOK_SECONDS: Final = 0.1  # interval of checks while a broker catches up


class TopicSettings(KafkaSettings):
    """Replication of the topics."""

    replication: int = Field(
        1,
        ge=1,
        le=32_767,
        description="Replication factor of new topics. With three or more, one replica may be unavailable.",
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """One topic on the broker; its name includes the prefix."""

    name: str
    partitions: int
    configs: Mapping[str, str]


def plans(settings: TopicSettings, topics: Iterable[Topic]) -> list[Plan]:
    """Return the topics and their dead-letter topics."""
    made = []
    for topic in topics:
        name = settings.topic_prefix + topic.name
        made.append(
            Plan(name, topic.partitions, _configs(topic.retention, topic.retention_bytes, settings.replication))
        )
        letters = _configs(DEAD_LETTER_RETENTION, DEAD_LETTER_RETENTION_BYTES, settings.replication)
        letters["max.message.bytes"] = str(DEAD_LETTER_BYTES)
        made.append(Plan(settings.topic_prefix + topic.dead_letter, 1, letters))
    return made


async def create_topics(settings: TopicSettings, topics: Iterable[Topic] = TOPICS) -> None:
    """Create missing topics and apply the settings to existing ones.

    Args:
        settings: broker, prefix and replication.
        topics: topics to create with their dead-letter topics.

    Raises:
        DependencyError: no broker answered in time.
        RuntimeError: the broker refused; the message has the reason.
        OSError: a file that the settings name cannot be read.
    """
    async with administering(settings, f"cannot create topics at {settings.kafka}") as admin:
        await _create(admin, plans(settings, topics), settings.replication)


async def _create(admin: AIOKafkaAdminClient, wanted: list[Plan], replication: int) -> None:
    response = await admin.create_topics(
        [NewTopic(plan.name, plan.partitions, replication, topic_configs=dict(plan.configs)) for plan in wanted],
    )
    there = set()
    for name, code, *message in response.topic_errors:
        error = for_code(code)
        if error is TopicAlreadyExistsError:
            there.add(name)
        elif error is not NoError:
            raise RuntimeError(f"the broker did not create {name}: {error.__name__} {message}")
    known = [plan for plan in wanted if plan.name in there]
    if known:
        await _conform(admin, known)


async def _counts(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, int]:
    return {found["topic"]: len(found["partitions"]) for found in await admin.describe_topics(names)}


async def _conform(admin: AIOKafkaAdminClient, plans: list[Plan]) -> None:
    """Apply the settings to existing topics; their number of partitions cannot change."""
    names = [plan.name for plan in plans]
    counts = await _counts(admin, names)
    while not all(counts.values()):  # the controller has these topics; a broker may not have received them yet
        await asyncio.sleep(LOOK_SECONDS)
        counts = await _counts(admin, names)
    for plan in plans:
        if counts[plan.name] != plan.partitions:
            raise RuntimeError(
                f"{plan.name} has {counts[plan.name]} partitions, not {plan.partitions}: keys would lose their order. "
                "Use a new name for the topic with more partitions.",
            )
    responses = await admin.alter_configs(
        [ConfigResource(ConfigResourceType.TOPIC, plan.name, dict(plan.configs)) for plan in plans],
    )
    for response in responses:
        for code, message, _, name in response.resources:
            if for_code(code) is not NoError:
                raise RuntimeError(f"the broker rejected the settings of {name}: {message}")


def _configs(retention: timedelta, retention_bytes: int, replication: int) -> dict[str, str]:
    retention_ms = int(retention.total_seconds() * 1000)
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        "retention.bytes": str(retention_bytes),  # per partition: a client with write access cannot fill the disk
        "segment.bytes": str(SEGMENT_BYTES),
        # Only whole segments are deleted, so a record lives longer than the retention by up to this time.
        "segment.ms": str(retention_ms // SEGMENTS),
        "message.timestamp.type": "LogAppendTime",  # the only clock that all readers share
        "compression.type": "producer",  # consumers reject batches that the broker has compressed
        "min.insync.replicas": str(max(1, replication - 1)),
    }
