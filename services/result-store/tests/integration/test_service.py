"""Run the whole service as a separate process, with real Kafka and MongoDB."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from local import ports
from result_store_testing import FIRST, host, scanned
from scanfleet import mongo
from scanfleet.bus import Record
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.messages import ChunkStored, HostScanned
from scanfleet.messages.topics import RESULT_STORE, SCAN_RESULTS, SCAN_STORED
from scanfleet.outcomes import address_at
from scanfleet.settings import KafkaSettings
from scanfleet_testing.chunk_grants import write_chunk_keys
from scanfleet_testing.tokens import InternalKeys

pytestmark = pytest.mark.integration

CHUNKS = 4  # the service is killed once per chunk
HOSTS = 200  # per chunk


class Stored:
    """Keeps the messages that result-store publishes."""

    def __init__(self) -> None:
        self.maps: dict[str, set[str]] = {}

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            assert isinstance(record.message, ChunkStored)
            self.maps.setdefault(record.message.chunk_id, set()).add(record.message.outcomes)

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...


class Service:
    """A result-store process, as a supervisor runs it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self.port, self.probe_port = ports.choose(), ports.choose()
        self._process: Process | None = None

    async def start(self) -> None:
        command = (
            "setpriv",
            "--pdeathsig",
            "KILL",
            sys.executable,
            "-m",
            "scanfleet.server",
            "result-store",
        )
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env={
                **os.environ,
                **self._environment,
                "SCANFLEET_API_PORT": str(self.port),
                "SCANFLEET_PROBE_PORT": str(self.probe_port),
            },
            stdout=asyncio.subprocess.DEVNULL,
        )

    async def end(self, number: signal.Signals) -> int:
        """Send the signal; return the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        async with asyncio.timeout(60):
            return await self._process.wait()


@asynccontextmanager
async def running(environment: dict[str, str]) -> AsyncIterator[Service]:
    service = Service(environment)
    await service.start()
    try:
        yield service
    finally:
        if service._process is not None and service._process.returncode is None:
            service._process.kill()
            await service._process.wait()


def chunk(number: int) -> list[HostScanned]:
    return [host(str(address_at(FIRST, n)), 22, 80, chunk_id=f"1-{number}") for n in range(HOSTS)]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(180):
        while not await condition():  # noqa: ASYNC110 # the condition changes in other processes
            await asyncio.sleep(0.005)


@asynccontextmanager
async def bus_of_a_worker(kafka: str, prefix: str) -> AsyncIterator[tuple[KafkaBus, Stored]]:
    """Yield the bus that workers publish with, and the messages on scan-stored."""
    bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source="scanner-worker", instance="test")
    stored = Stored()
    reader = bus.consume(SCAN_STORED, "test", stored)
    await bus.start()
    try:
        await reader.start()
        yield bus, stored
    finally:
        await reader.stop()
        await bus.stop()


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
    environment = {
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
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}") as http,
    ):

        async def ready() -> bool:
            try:
                return (await http.get(f"http://127.0.0.1:{service.probe_port}/readyz")).is_success
            except httpx.TransportError:
                return False

        for number in range(CHUNKS):
            before = number * HOSTS

            async def begun(before: int = before) -> bool:
                return await database["hosts"].estimated_document_count() > before

            await bus.publish(SCAN_RESULTS, [*chunk(number), scanned("a" * HOSTS, chunk_id=f"1-{number}")])
            await until(begun)
            await service.end(signal.SIGKILL)
            await service.start()

        async def all_closed() -> bool:
            return len(stored.maps) == CHUNKS

        await until(all_closed)
        await until(ready)
        results = (await http.get("/api/v1/task/1/results", headers=keys.bearer(RESULT_STORE))).json()
        assert await service.end(signal.SIGTERM) in {
            0,
            -signal.SIGTERM,
        }  # uvicorn re-raises the signal after a graceful shutdown
        assert stored.maps == {f"1-{number}": {"a" * HOSTS} for number in range(CHUNKS)}
        assert await database["hosts"].count_documents({}) == CHUNKS * HOSTS
        assert len({result["id"] for result in results}) == len(results) == CHUNKS * HOSTS * 2
        times = [result["created_at"] for result in results]
        assert times == sorted(times)
