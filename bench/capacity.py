"""What the parts between the user and nmap cost, on real Kafka and MongoDB: workers are scripted and scan nothing.

Prints one line of JSON:
  chunks_per_s      chunks of one job dispatched, claimed, scanned by nobody, stored and accounted for
  chunk_cpu_ms      what one chunk takes of a core, by process
  chunk_writes      documents that MongoDB writes for a chunk
  hosts_per_s       hosts in the log to their documents stored, over all partitions
  host_cpu_ms       what one host takes of a core, by process
  partition_ratio   the same through one partition / through all (1: a partition is not the limit, the process is)
  mongod_ratio      hosts stored / bare inserts of the same documents into the same MongoDB
  host_bytes        of a host with one open port, on MongoDB's disk with its indexes
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from local.client import FINAL, Client
from local.stack import Stack
from scanfleet import mongo
from scanfleet.bus import Record
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings
from scanfleet.messages import ChunkClaimed, ChunkScanned, HostScanned, PortFound, ScanChunk, WorkerReady
from scanfleet.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, SCAN_TASKS, SCAN_WORKERS
from scanfleet.outcomes import Outcome

REPLICAS: Final = {"api-gateway": 1, "job-orchestrator": 1, "scanner-worker": 0, "result-store": 1}
WORKERS: Final = 8
SLOTS: Final = 200  # of each: so many that nobody waits for one
LARGE: Final = ("127.0.0.0/21", {"ports": "1-65535", "service_detection": False})  # thousands of chunks
HOSTS: Final = 10_000
LIMIT: Final = 60.0  # seconds for any part
OURS: Final = ("job-orchestrator", "result-store", "kafka", "mongod")  # the workers' own cost is not the platform's


class Workers:
    """A handler of scan-tasks: every address of every chunk is down at once."""

    def __init__(self, bus: KafkaBus) -> None:
        self._bus = bus
        self._ready = [WorkerReady(worker_id=f"bench-{n}", slots=SLOTS, raw=False) for n in range(WORKERS)]
        self.chunks: set[str] = set()

    async def announce(self) -> None:
        await self._bus.publish(SCAN_WORKERS, self._ready)

    async def handle(self, records: Sequence[Record]) -> None:
        tasks = [record.message for record in records if isinstance(record.message, ScanChunk)]
        self.chunks |= {task.chunk_id for task in tasks}
        tokens = [
            {name: getattr(task, name) for name in ("job_id", "chunk_id", "attempt", "worker_id")} for task in tasks
        ]
        await self._bus.publish(SCAN_PROGRESS, [ChunkClaimed(**token) for token in tokens])
        scanned = [
            ChunkScanned(
                **token,
                outcomes=task.outcomes.replace(Outcome.BLANK, Outcome.DOWN),
                first_address=task.first_address,
                slot_seconds=0.01,
                technique="connect",
            )
            for task, token in zip(tasks, tokens, strict=True)
        ]
        await self._bus.publish(SCAN_RESULTS, scanned)
        await self._bus.publish(SCAN_PROGRESS, scanned)
        busy = {task.worker_id for task in tasks}
        await self._bus.publish(SCAN_WORKERS, [ready for ready in self._ready if ready.worker_id in busy])

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...


class Meter:
    """What a stretch of work took."""

    def __init__(self, stack: Stack) -> None:
        self._pids = {process.name: process.pid for process in stack.processes() if process.name in OURS}
        self._before = self._seconds()
        self._began = time.perf_counter()

    def read(self, count: int) -> tuple[float, dict[str, float]]:
        """So many a second, and milliseconds of a core for each, by process."""
        elapsed = time.perf_counter() - self._began
        after = self._seconds()
        return count / elapsed, {name: round(1_000 * (after[name] - self._before[name]) / count, 2) for name in after}

    def _seconds(self) -> dict[str, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        stats = {
            name: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for name, pid in self._pids.items()
        }
        return {name: (int(stat[11]) + int(stat[12])) / ticks for name, stat in stats.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), replicas=REPLICAS)
        stack.up()
        try:
            figures = asyncio.run(measure(stack))
        finally:
            stack.down()
    print(json.dumps(figures))


async def measure(stack: Stack) -> dict[str, Any]:
    jobs = mongo.connect(stack.mongodb, "scanfleet_job_orchestrator")
    results = mongo.connect(stack.mongodb, "scanfleet_result_store")
    async with bus(stack) as publisher:
        return await chunks(stack, publisher, jobs) | await hosts(stack, publisher, results)


@asynccontextmanager
async def bus(stack: Stack) -> AsyncIterator[KafkaBus]:
    publisher = KafkaBus(TopicSettings(kafka=stack.kafka), source="bench", instance="bench")
    await publisher.start()
    yield publisher
    await publisher.stop()


async def chunks(stack: Stack, publisher: KafkaBus, jobs: mongo.Database) -> dict[str, Any]:
    workers = Workers(publisher)
    tail = publisher.tail(SCAN_TASKS, workers)
    await tail.start()
    user = Client(stack.url, stack.token(7))
    cidr, policy = LARGE
    meter, written = Meter(stack), await writes(jobs)
    job_id = await asyncio.to_thread(lambda: user.scan(cidr, **policy))
    async with asyncio.timeout(LIMIT):
        while await asyncio.to_thread(user.status, job_id) not in FINAL:
            await workers.announce()
            await asyncio.sleep(0.25)
    rate, cpu = meter.read(len(workers.chunks))
    written = await writes(jobs) - written
    await tail.stop()
    return {
        "chunks": len(workers.chunks),
        "chunks_per_s": round(rate),
        "chunk_cpu_ms": cpu,
        "chunk_writes": round(written / len(workers.chunks), 1),
    }


async def hosts(stack: Stack, publisher: KafkaBus, results: mongo.Database) -> dict[str, Any]:
    """Hosts of jobs that nobody asked for, which result-store stores as any."""
    meter = Meter(stack)
    await store(publisher, results, dict.fromkeys(range(1000, 1024), HOSTS // 24))
    stored = await results["hosts"].count_documents({})
    rate, cpu = meter.read(stored)
    one = Meter(stack)
    await store(publisher, results, {2_000: HOSTS // 4})
    one_rate, _ = one.read(HOSTS // 4)
    await results.client.admin.command("fsync")  # what is not on the disk yet has no size there
    sizes = await results.command("collStats", "hosts")
    bare = await inserts(results)
    return {
        "hosts_per_s": round(rate),
        "host_cpu_ms": cpu,
        "partition_ratio": round(one_rate / rate, 2),
        "mongod_ratio": round(rate / bare, 2),
        "host_bytes": round((sizes["storageSize"] + sizes["totalIndexSize"]) / sizes["count"]),
    }


async def store(publisher: KafkaBus, results: mongo.Database, counts: Mapping[int, int]) -> None:
    """Publish so many hosts of each job, and return when all are stored."""
    before = await results["hosts"].count_documents({})
    for job_id, count in counts.items():
        await publisher.publish(SCAN_RESULTS, [host(job_id, number) for number in range(count)])
    async with asyncio.timeout(LIMIT):
        while await results["hosts"].count_documents({}) < before + sum(counts.values()):  # noqa: ASYNC110 # MongoDB tells nobody
            await asyncio.sleep(0.05)


def host(job_id: int, number: int) -> HostScanned:
    return HostScanned(
        job_id=job_id,
        chunk_id=f"{job_id}-0",
        attempt=1,
        worker_id="bench-0",
        user_id=7,
        address=str(ip_address("127.0.0.0") + number),
        outcome="a",
        technique="connect",
        ports=(PortFound(port=8080, service="http"),),
    )


async def inserts(results: mongo.Database) -> float:
    """Documents a second that MongoDB takes when nobody asks for more."""
    documents = [each async for each in results["hosts"].find(limit=HOSTS)]
    begin = time.perf_counter()
    for start in range(0, len(documents), 500):
        await results["bare"].insert_many(documents[start : start + 500], ordered=False)
    return len(documents) / (time.perf_counter() - begin)


async def writes(database: mongo.Database) -> int:
    counters = (await database.client.admin.command("serverStatus"))["metrics"]["document"]
    return int(counters["inserted"] + counters["updated"] + counters["deleted"])


if __name__ == "__main__":
    main()
