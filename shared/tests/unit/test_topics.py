"""The partition of a key."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import DefaultPartitioner, murmur2
from hypothesis import given
from hypothesis import strategies as st

from scanfleet.contracts.messages import topics
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, TOPICS, Topic
from scanfleet.kafka.topics import TopicSettings, plans


@given(st.text())
def test_partition_of_a_key_is_the_producers(key: str) -> None:
    """For any key the partition is the one to which Kafka's client sends the record."""
    partitions = list(range(SCAN_PROGRESS.partitions))
    assert SCAN_PROGRESS.partition_of(key) == DefaultPartitioner()(key.encode(), partitions, partitions)


@given(st.binary(max_size=70))
def test_hash_is_kafkas(data: bytes) -> None:
    """The hash is the one of Kafka's clients, for keys of any length."""
    assert topics._murmur2(data) & 0xFFFF_FFFF == murmur2(data) & 0xFFFF_FFFF


def test_jobs_are_spread_over_all_partitions() -> None:
    """Consecutive job ids use each partition about equally often."""
    counts = [0] * SCAN_PROGRESS.partitions
    for job_id in range(1, 12_001):
        counts[SCAN_PROGRESS.partition_of(str(job_id))] += 1
    assert min(counts) > 800


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_partition_is_within_the_topics_number(topic: Topic) -> None:
    """All keys of a topic with one partition are in it, and no partition is beyond the last."""
    assert {topic.partition_of(str(number)) for number in range(200)} == set(range(topic.partitions))


def test_records_of_a_quiet_topic_outlive_its_retention_by_a_seventh() -> None:
    """The broker deletes a segment once its last record is too old, so each has records of a seventh of the retention at most."""
    for plan in plans(TopicSettings(kafka="localhost:9092"), TOPICS):
        retention, segment = (int(plan.configs[name]) for name in ("retention.ms", "segment.ms"))
        assert 0 < segment <= retention / 7, plan.name
