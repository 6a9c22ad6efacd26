"""The worker as it is deployed: a process under uvicorn, real Kafka, real nmap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from scanfleet.bus import Record
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.messages import (
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    Message,
    ScanChunk,
    StopChunk,
    WorkerReady,
)
from scanfleet.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, SCAN_TASKS, SCAN_WORKERS
from scanfleet.settings import KafkaSettings

pytestmark = pytest.mark.integration

MakeChunk = Callable[..., ScanChunk]
Until = Callable[..., Awaitable[None]]

SLOW = {"ports": "1-1000", "max_rate": 1}  # takes until it is stopped
STEADY = {"ports": "1-1000", "max_rate": 100}  # sends all the time, for longer than a test lasts


class Listener:
    """Notes every message of a topic."""

    def __init__(self) -> None:
        self.heard: list[Message] = []

    async def handle(self, records: Sequence[Record]) -> None:
        self.heard += [record.message for record in records]

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...


class Deployed:
    """A worker's process, and the bus around it."""

    def __init__(self, bus: KafkaBus, environment: dict[str, str], port: int) -> None:
        self.bus = bus
        self.workers, self.progress, self.results = Listener(), Listener(), Listener()
        self._environment = environment
        self._port = port
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "--factory", "scanner_worker.main:create_app"),
            *("--http", "scanfleet.front:BoundedProtocol", "--host", "127.0.0.1", "--port", str(self._port)),
            env=os.environ | self._environment,
        )

    async def probe(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(f"http://127.0.0.1:{self._port}{path}")

    @property
    def worker_id(self) -> str:
        """The id that it goes by now; empty before it is heard of."""
        return self.workers.heard[-1].worker_id if self.workers.heard else ""  # type: ignore[attr-defined] # the test knows the message's kind

    async def give(self, *tasks: Message) -> None:
        await self.bus.publish(SCAN_TASKS, [task.model_copy(update={"worker_id": self.worker_id}) for task in tasks])

    def said(self, *kinds: type[Message]) -> list[Message]:
        return [message for message in self.progress.heard if isinstance(message, kinds)]


@pytest.fixture
def nmap() -> str:
    """The worker's nmap; a test may replace it."""
    return "nmap"


@pytest.fixture
async def deployed(kafka: str, until: Until, nmap: str) -> AsyncIterator[Deployed]:
    """A worker that has announced itself; the loopback network may be scanned."""
    prefix = f"test-{uuid4().hex[:8]}-"
    await create_topics(TopicSettings(kafka=kafka, topic_prefix=prefix))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "SCANFLEET_KAFKA": kafka,
        "SCANFLEET_TOPIC_PREFIX": prefix,
        "SCANFLEET_INSTANCE": "scanner-worker-1",
        "SCANFLEET_ALLOWED_NETWORKS": "127.0.0.0/8",
        "SCANFLEET_SLOTS": "3",
        "SCANFLEET_NMAP": nmap,
        "SCANFLEET_STOP_GRACE_SECONDS": "6",
    }
    bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source="test", instance="test")
    worker = Deployed(bus, environment, port)
    async with contextlib.AsyncExitStack() as stack:
        await bus.start()
        stack.push_async_callback(bus.stop)
        listeners = {SCAN_WORKERS: worker.workers, SCAN_PROGRESS: worker.progress, SCAN_RESULTS: worker.results}
        for topic, listener in listeners.items():
            consumer = bus.tail(topic, listener)
            await consumer.start()
            stack.push_async_callback(consumer.stop)
        await worker.start()
        try:
            await until(lambda: worker.worker_id, 30)
            yield worker
        finally:
            if worker.process.returncode is None:
                worker.process.kill()
            await worker.process.wait()


async def test_a_chunk_over_real_kafka(deployed: Deployed, make_chunk: MakeChunk, until: Until) -> None:
    """The process is healthy, ready and measured; it scans a chunk, and results end before progress does."""
    assert (await deployed.probe("/healthz")).status_code == 200
    assert (await deployed.probe("/readyz")).status_code == 200
    await deployed.give(make_chunk())
    await until(lambda: deployed.said(ChunkScanned), 60)
    await until(lambda: len(deployed.results.heard) == 5)
    assert [type(message).__name__ for message in deployed.results.heard] == [*["HostScanned"] * 4, "ChunkScanned"]
    assert 'scanfleet_worker_addresses_total{outcome="answered"} 4.0' in (await deployed.probe("/metrics")).text


@pytest.mark.proves("F14", "G10")
async def test_sigterm_finishes_what_it_can_and_gives_back_the_rest(
    deployed: Deployed,
    make_chunk: MakeChunk,
    until: Until,
) -> None:
    """SIGTERM with chunks running: the one that can finish does, the others are given back, and the process ends with 0."""
    quick = make_chunk({"ports": "1-40", "max_rate": 80}, chunk_id="1-0", outcomes="....")
    await deployed.give(quick, make_chunk(SLOW, chunk_id="1-1"), make_chunk(SLOW, chunk_id="1-2"))
    await until(lambda: len({m.chunk_id for m in deployed.said(ChunkProgressed)}) == 3, 30)  # type: ignore[attr-defined] # the test knows the message's kind
    deployed.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(deployed.process.wait(), 20) == 0
    await until(lambda: len(deployed.said(ChunkScanned, ChunkReleased, ChunkFailed)) == 3)
    ends = {m.chunk_id: type(m) for m in deployed.said(ChunkScanned, ChunkReleased, ChunkFailed)}  # type: ignore[attr-defined] # the test knows the message's kind
    assert ends == {"1-0": ChunkScanned, "1-1": ChunkReleased, "1-2": ChunkReleased}
    goodbye = deployed.workers.heard[-1]
    assert isinstance(goodbye, WorkerReady)
    assert goodbye.slots == 0


async def test_a_restarted_worker_is_another_worker(deployed: Deployed, until: Until) -> None:
    """After a restart the instance announces itself under a new id, so nothing meant for the old one reaches it."""
    before = deployed.worker_id
    deployed.process.kill()
    await deployed.process.wait()
    await deployed.start()
    await until(lambda: deployed.worker_id != before, 30)
    assert before.startswith("scanner-worker-1-")
    assert deployed.worker_id.startswith("scanner-worker-1-")


@pytest.mark.proves("F8", "G5")
async def test_a_thawed_worker_ends_its_scan(deployed: Deployed, make_chunk: MakeChunk, until: Until) -> None:
    """Frozen past its lease and thawed, a worker kills its nmap by itself and gives the chunk back."""
    await deployed.give(make_chunk(SLOW, lease_seconds=3.0))
    await until(lambda: deployed.said(ChunkProgressed), 30)
    deployed.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3.5)  # the lease itself, which is the condition
    deployed.process.send_signal(signal.SIGCONT)
    await until(lambda: deployed.said(ChunkReleased), 2)


async def test_poison_does_not_stop_the_tasks(deployed: Deployed, make_chunk: MakeChunk, until: Until) -> None:
    """A task for an unknown chunk or worker changes nothing, and the next one is done."""
    stop = StopChunk(job_id=9, chunk_id="9-9", attempt=9, worker_id="x", reason="nothing")
    await deployed.bus.publish(SCAN_TASKS, [stop, make_chunk(worker_id="nobody")])
    await deployed.give(stop, make_chunk(chunk_id="1-7"))
    await until(lambda: deployed.said(ChunkScanned), 60)
    assert {m.chunk_id for m in deployed.progress.heard} == {"1-7"}  # type: ignore[attr-defined] # the test knows the message's kind


@contextlib.contextmanager
def namespace(program: Path) -> Iterator[Callable[[], int]]:
    """Make `program` an nmap in a network of its own, whose loopback is all it has; yield what counts the packets there."""
    name = f"scanfleet-{uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ip")} netns exec {name} /usr/bin/nmap "$@"\n')
        program.chmod(0o755)

        def packets() -> int:
            shown = subprocess.run(
                ["ip", "-n", name, "-s", "-j", "link", "show", "lo"], capture_output=True, check=True
            ).stdout
            return int(json.loads(shown)[0]["stats64"]["tx"]["packets"])

        yield packets
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
class TestStopped:
    """A worker stopped with SIGSTOP while its nmap sends packets."""

    @pytest.fixture
    def counted(self, tmp_path: Path) -> Iterator[tuple[str, Callable[[], int]]]:
        program = tmp_path / "nmap"
        with namespace(program) as packets:
            yield str(program), packets

    @pytest.fixture
    def nmap(self, counted: tuple[str, Callable[[], int]]) -> str:
        return counted[0]

    @pytest.mark.proves("F32", "F8", "G4", "G5")
    async def test_stopped_worker_sends_no_packet_after_two_thirds_of_its_lease(
        self,
        deployed: Deployed,
        counted: tuple[str, Callable[[], int]],
        make_chunk: MakeChunk,
        until: Until,
    ) -> None:
        """nmap goes on when its worker is stopped, until the guard kills it; the worker resumes and releases the chunk."""
        lease, packets, loop = 6.0, counted[1], asyncio.get_running_loop()
        await deployed.give(make_chunk(STEADY, lease_seconds=lease))
        await until(lambda: deployed.said(ChunkProgressed) and packets() > 100, 30)
        deployed.process.send_signal(signal.SIGSTOP)
        stopped = last = loop.time()
        try:
            seen = packets()
            while loop.time() < stopped + lease + 2:
                if (now := packets()) != seen:
                    seen, last = now, loop.time()
                await asyncio.sleep(0.02)
        finally:
            deployed.process.send_signal(signal.SIGCONT)
        assert 1 < last - stopped < lease * 2 / 3 + 1
        await until(lambda: deployed.said(ChunkReleased, ChunkFailed), 10)
        assert isinstance(deployed.said(ChunkReleased, ChunkFailed)[0], ChunkReleased)
        await deployed.give(make_chunk(chunk_id="1-8", lease_seconds=lease))
        await until(lambda: deployed.said(ChunkScanned), 60)
