"""The native Kafka and MongoDB servers that other integration tests depend on."""

from __future__ import annotations

import uuid

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pymongo import AsyncMongoClient

pytestmark = pytest.mark.integration


async def test_kafka_keeps_a_record(kafka: str) -> None:
    """A record sent to the broker can be read from it."""
    topic = f"servers-{uuid.uuid4()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=kafka, acks="all", enable_idempotence=True) as producer:
        await producer.send_and_wait(topic, b"value")
    async with AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        record = await consumer.getone()
    assert record.value == b"value"


async def test_mongodb_takes_majority_writes(mongodb: str) -> None:
    """A majority write is acknowledged, so the replica set has a primary."""
    async with AsyncMongoClient[dict[str, int]](mongodb, w="majority", journal=True) as client:
        collection = client[f"servers-{uuid.uuid4().hex[:8]}"].kept
        await collection.insert_one({"_id": 1})
        assert await collection.count_documents({}) == 1
