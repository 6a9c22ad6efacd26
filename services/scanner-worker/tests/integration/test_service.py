"""The worker as it is deployed: a separate process with real Kafka and nmap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from local import ports
from scanfleet.contracts.messages import (
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    Message,
    ScanChunk,
    StopChunk,
    WorkerReady,
)
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, SCAN_TASKS, SCAN_WORKERS
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import WORKER
from scanfleet_testing.consumers import Recorder
from scanfleet_testing.process import ServiceProcess
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

MakeChunk = Callable[..., ScanChunk]

SLOW = {"ports": "1-1000", "max_rate": 1}  # runs until it is stopped
STEADY = {"ports": "1-1000", "max_rate": 100}  # sends packets for longer than a test runs


class Deployed:
    """A worker process, and the bus that it is connected to."""

    def __init__(self, bus: KafkaBus, process: ServiceProcess) -> None:
        self.bus = bus
        self.process = process
        self.workers, self.progress, self.results = Recorder(), Recorder(), Recorder()

    @property
    def worker_id(self) -> str:
        """The worker's current id; empty before its first announcement."""
        return self.workers.messages[-1].worker_id if self.workers.messages else ""  # type: ignore[attr-defined] # another kind of message fails the test

    async def send(self, *tasks: Message) -> None:
        await self.bus.publish(SCAN_TASKS, [task.model_copy(update={"worker_id": self.worker_id}) for task in tasks])

    def messages(self, *kinds: type[Message]) -> list[Message]:
        return [message for message in self.progress.messages if isinstance(message, kinds)]


@pytest.fixture
def nmap() -> str:
    """The program of the worker's nmap; a test may override it."""
    return "nmap"


@pytest.fixture
async def deployed(kafka: str, nmap: str) -> AsyncIterator[Deployed]:
    """Yield a worker that has announced itself; the loopback network may be scanned."""
    prefix = f"test-{uuid4().hex[:8]}-"
    await create_topics(TopicSettings(kafka=kafka, topic_prefix=prefix))
    environment = {
        "SCANFLEET_KAFKA": kafka,
        "SCANFLEET_TOPIC_PREFIX": prefix,
        "SCANFLEET_INSTANCE": "scanner-worker-1",
        "SCANFLEET_ALLOWED_NETWORKS": "127.0.0.0/8",
        "SCANFLEET_EGRESS_ADDRESS": "192.0.2.1",
        "SCANFLEET_SLOTS": "3",
        "SCANFLEET_NMAP": nmap,
        "SCANFLEET_STOP_GRACE_SECONDS": "6",
    }
    bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source="test", instance="test")
    worker = Deployed(bus, ServiceProcess(WORKER, environment, ports.choose()))
    async with contextlib.AsyncExitStack() as stack:
        await bus.start()
        stack.push_async_callback(bus.stop)
        listeners = {SCAN_WORKERS: worker.workers, SCAN_PROGRESS: worker.progress, SCAN_RESULTS: worker.results}
        for topic, listener in listeners.items():
            consumer = bus.tail(topic, listener)
            await consumer.start()
            stack.push_async_callback(consumer.stop)
        stack.push_async_callback(worker.process.discard)
        await worker.process.start()
        await until(lambda: worker.worker_id)
        yield worker


async def test_service_scans_a_chunk_over_kafka(deployed: Deployed, make_chunk: MakeChunk) -> None:
    """The process is healthy, ready and exports metrics; it reports the results of a chunk before progress, with the nmap run."""
    assert (await deployed.process.probe("/healthz")).status_code == 200
    assert (await deployed.process.probe("/readyz")).status_code == 200
    await deployed.send(make_chunk())
    await until(lambda: deployed.messages(ChunkScanned), 60)
    await until(lambda: len(deployed.results.messages) == 5)
    assert [type(message).__name__ for message in deployed.results.messages] == [*["HostScanned"] * 4, "ChunkScanned"]
    reported = deployed.results.messages[-1]
    assert isinstance(reported, ChunkScanned)
    run = reported.run
    assert run is not None
    assert (run.nmap, run.arguments, run.source) == (reported.nmap, reported.arguments, "127.0.0.1")
    assert run.egress == "192.0.2.1"
    assert run.rules
    assert run.began
    assert 'scanfleet_worker_addresses_total{outcome="answered"} 4.0' in (await deployed.process.probe("/metrics")).text


@pytest.mark.proves("F14", "G10")
async def test_service_sigterm_finishes_or_releases_chunks(
    deployed: Deployed,
    make_chunk: MakeChunk,
) -> None:
    """On SIGTERM a chunk that can finish is finished, the others are released, and the process exits with 0."""
    quick = make_chunk({"ports": "1-40", "max_rate": 80}, chunk_id="1-0", outcomes="....")
    await deployed.send(quick, make_chunk(SLOW, chunk_id="1-1"), make_chunk(SLOW, chunk_id="1-2"))
    await until(lambda: len({m.chunk_id for m in deployed.messages(ChunkProgressed)}) == 3, 30)  # type: ignore[attr-defined] # another kind of message fails the test
    async with asyncio.timeout(20):
        assert await deployed.process.end(signal.SIGTERM) == 0
    await until(lambda: len(deployed.messages(ChunkScanned, ChunkReleased, ChunkFailed)) == 3)
    ends = {m.chunk_id: type(m) for m in deployed.messages(ChunkScanned, ChunkReleased, ChunkFailed)}  # type: ignore[attr-defined] # another kind of message fails the test
    assert ends == {"1-0": ChunkScanned, "1-1": ChunkReleased, "1-2": ChunkReleased}
    goodbye = deployed.workers.messages[-1]
    assert isinstance(goodbye, WorkerReady)
    assert goodbye.slots == 0


async def test_service_restart_changes_the_worker_id(deployed: Deployed) -> None:
    """After a restart the instance announces itself with a new id, so that no task for the old one reaches it."""
    before = deployed.worker_id
    await deployed.process.end(signal.SIGKILL)
    await deployed.process.start()
    await until(lambda: deployed.worker_id != before, 30)
    assert before.startswith("scanner-worker-1-")
    assert deployed.worker_id.startswith("scanner-worker-1-")


@pytest.mark.proves("F8", "G5")
async def test_service_resumed_after_lease_releases_the_chunk(deployed: Deployed, make_chunk: MakeChunk) -> None:
    """A worker that is stopped for longer than its lease and resumed kills its nmap by itself and releases the chunk."""
    await deployed.send(make_chunk(SLOW, lease_seconds=3.0))
    await until(lambda: deployed.messages(ChunkProgressed), 30)
    deployed.process.send(signal.SIGSTOP)
    await asyncio.sleep(3.5)  # the lease itself is the condition
    deployed.process.send(signal.SIGCONT)
    await until(lambda: deployed.messages(ChunkReleased), 30)


async def test_service_unknown_tasks_are_ignored(deployed: Deployed, make_chunk: MakeChunk) -> None:
    """A task for an unknown chunk or worker is ignored, and the next task is processed."""
    stop = StopChunk(job_id=9, chunk_id="9-9", attempt=9, worker_id="x", reason="nothing")
    await deployed.bus.publish(SCAN_TASKS, [stop, make_chunk(worker_id="another")])
    await deployed.send(stop, make_chunk(chunk_id="1-7"))
    await until(lambda: deployed.messages(ChunkScanned), 60)
    assert {m.chunk_id for m in deployed.progress.messages} == {"1-7"}  # type: ignore[attr-defined] # another kind of message fails the test


@contextlib.contextmanager
def namespace(program: Path) -> Iterator[Callable[[], int]]:
    """Make `program` an nmap in a network namespace with only loopback; yield a function that counts the packets there."""
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


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root: run the tests as root")
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
    ) -> None:
        """nmap continues while its worker is stopped, until the guard kills it; the resumed worker releases the chunk."""
        lease, packets, loop = 6.0, counted[1], asyncio.get_running_loop()
        await deployed.send(make_chunk(STEADY, lease_seconds=lease))
        await until(lambda: deployed.messages(ChunkProgressed) and packets() > 100, 30)
        deployed.process.send(signal.SIGSTOP)
        stopped = last = loop.time()
        try:
            seen = packets()
            while loop.time() < stopped + lease + 2:
                if (now := packets()) != seen:
                    seen, last = now, loop.time()
                await asyncio.sleep(0.02)
        finally:
            deployed.process.send(signal.SIGCONT)
        assert 1 < last - stopped < lease * 2 / 3 + 1
        await until(lambda: deployed.messages(ChunkReleased, ChunkFailed), 10)
        assert isinstance(deployed.messages(ChunkReleased, ChunkFailed)[0], ChunkReleased)
        await deployed.send(make_chunk(chunk_id="1-8", lease_seconds=lease))
        await until(lambda: deployed.messages(ChunkScanned), 60)
