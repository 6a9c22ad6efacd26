"""Run the whole service as a separate process, with real Kafka and MongoDB."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest

from local import ports
from result_store_testing import FIRST, host, scanned
from scanfleet.contracts.messages import ChunkStored, HostScanned
from scanfleet.contracts.messages.topics import SCAN_RESULTS, SCAN_STORED
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime import mongo
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.scanning.outcomes import address_at
from scanfleet.services import RESULT_STORE
from scanfleet_testing.chunk_grants import write_chunk_keys
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.process import ServiceProcess
from scanfleet_testing.tokens import InternalKeys
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

CHUNKS = 4  # the service is killed once per chunk
HOSTS = 200  # per chunk
LIMIT_SECONDS = 180  # for steps that usually take a few, on a loaded machine


def chunk(number: int) -> list[HostScanned]:
    return [host(str(address_at(FIRST, n)), 22, 80, chunk_id=f"1-{number}") for n in range(HOSTS)]


@asynccontextmanager
async def bus_of_a_worker(kafka: str, prefix: str) -> AsyncIterator[tuple[KafkaBus, Recorder]]:
    """Yield the bus that workers publish with, and the messages on scan-stored."""
    bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source="scanner-worker", instance="test")
    stored = Recorder()
    await bus.start()
    try:
        async with Running(bus.consume(SCAN_STORED, "test", stored)):
            yield bus, stored
    finally:
        await bus.stop()


@asynccontextmanager
async def running(environment: dict[str, str]) -> AsyncIterator[ServiceProcess]:
    process = ServiceProcess(RESULT_STORE, environment, ports.choose())
    await process.start()
    try:
        yield process
    finally:
        await process.discard()


def maps(stored: Recorder) -> dict[str, set[str]]:
    """Return the outcome maps of the ChunkStored messages, by chunk."""
    found: dict[str, set[str]] = {}
    for message in stored.messages:
        assert isinstance(message, ChunkStored)
        found.setdefault(message.chunk_id, set()).add(message.outcomes)
    return found


@asynccontextmanager
async def emptied(mongodb: str, name: str) -> AsyncIterator[mongo.Database]:
    database = mongo.connect(mongodb, name)
    try:
        yield database
    finally:
        await database.client.drop_database(name)
        database.client.close()


@pytest.mark.proves("F5", "G3")
async def test_service_killed_in_mid_batch_stores_each_host_once(kafka: str, mongodb: str, tmp_path: Path) -> None:
    """After repeated kills while storing, each host is stored once, each chunk is closed, and each ChunkScanned is answered."""
    name = f"rs-{uuid4().hex[:8]}"
    prefix = f"{name}."
    await create_topics(TopicSettings(kafka=kafka, topic_prefix=prefix))
    keys = InternalKeys(tmp_path)
    port = ports.choose()
    environment = {
        "SCANFLEET_API_PORT": str(port),
        "SCANFLEET_INSTANCE": "result-store-1",
        "SCANFLEET_KAFKA": kafka,
        "SCANFLEET_TOPIC_PREFIX": prefix,
        "SCANFLEET_MONGODB": mongodb,
        "SCANFLEET_DATABASE": name,
        "SCANFLEET_INTERNAL_PUBLIC_KEYS_FILE": str(keys.public_keys_file),
        "SCANFLEET_CHUNK_PUBLIC_KEYS_FILE": str(write_chunk_keys(tmp_path)[1]),
    }
    async with (
        emptied(mongodb, name) as database,
        bus_of_a_worker(kafka, prefix) as (bus, stored),
        running(environment) as service,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):

        async def ready() -> bool:
            try:
                return (await service.probe("/readyz")).is_success
            except httpx2.TransportError:
                return False

        for number in range(CHUNKS):
            before = number * HOSTS

            async def begun(before: int = before) -> bool:
                return await database["hosts"].estimated_document_count() > before

            await bus.publish(SCAN_RESULTS, [*chunk(number), scanned("a" * HOSTS, chunk_id=f"1-{number}")])
            await until(begun, LIMIT_SECONDS)
            await service.end(signal.SIGKILL)
            await service.start()

        await until(lambda: len(maps(stored)) == CHUNKS, LIMIT_SECONDS)
        await until(ready, LIMIT_SECONDS)
        results = (await http.get("/api/v1/task/1/results", headers=keys.bearer(RESULT_STORE))).json()
        assert await service.end(signal.SIGTERM) in {
            0,
            -signal.SIGTERM,
        }  # uvicorn re-raises the signal after a graceful shutdown
        assert maps(stored) == {f"1-{number}": {"a" * HOSTS} for number in range(CHUNKS)}
        assert await database["hosts"].count_documents({}) == CHUNKS * HOSTS
        assert len({result["id"] for result in results}) == len(results) == CHUNKS * HOSTS * 2
        times = [result["created_at"] for result in results]
        assert times == sorted(times)
