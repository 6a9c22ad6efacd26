"""The cost of jobs that wait for a worker, and of chunks whose workers report each second."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench.figures import Figure
from bench.kit import SCRIPTED, Meter, Workers, bus, cores, new_stack, pids
from job_orchestrator.domain.plan import WINDOW
from local.stack import Stack
from scanfleet.contracts.messages import ChunkClaimed, ChunkProgressed, ScanChunk
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_TASKS
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import mongo
from scanfleet.runtime.bus import Record
from scanfleet.scanning.outcomes import Outcome
from tests.client import Client

LARGE: Final = "127.1.0.0/16"
WAITING: Final[dict[str, tuple[str, dict[str, Any], int, int, int]]] = {
    "small": ("127.9.8.1/32", {"ports": "8080", "service_detection": False}, 10_000, 1_000, 1),
    "large": (LARGE, {"ports": "1-65535", "service_detection": False}, 500, 500, WINDOW),
}
"""Network, policy, jobs, jobs of each request, and chunks of each job."""
WAIT_SECONDS: Final = 60  # of each measurement of waiting jobs: each is checked once a minute
HELD: Final = 2 * WINDOW
SIXTEEN: Final = {"ports": "1-1000", "service_detection": False}  # addresses of each chunk
HEARTBEATS: Final = 15  # of each chunk in a measurement, one each second; fewer than its addresses
LOOK_SECONDS: Final = 15.0  # until the sweep has read new or cancelled jobs
LIMIT_SECONDS: Final = 300.0  # for any part
SETTINGS: Final = {  # more than the waiting jobs
    "SCANFLEET_QUEUED_SECONDS_PER_USER": "1e12",
    "SCANFLEET_UNFINISHED_JOBS_PER_USER": "1000000",
}
OPEN: Final = ["queued", "dispatched", "running"]
CHUNK_SIDE: Final = ("job-orchestrator", "mongod")


class Holding(Workers):
    """Workers that claim each chunk and do not finish it."""

    def __init__(self, bus: KafkaBus) -> None:
        super().__init__(bus)
        self.tasks: list[ScanChunk] = []

    async def handle(self, records: Sequence[Record]) -> None:
        tasks = [record.message for record in records if isinstance(record.message, ScanChunk)]
        self.tasks += tasks
        await self._bus.publish(SCAN_PROGRESS, [ChunkClaimed(**task.token._asdict()) for task in tasks])


def measure() -> Iterator[Figure]:
    with new_stack(replicas=SCRIPTED, settings=SETTINGS) as stack:
        user = Client(stack.url, stack.token(7))
        before = cores(stack, CHUNK_SIDE, WAIT_SECONDS)
        yield from asyncio.run(held(stack, user, before))
        chunks = 0
        for name, (cidr, policy, jobs, at_once, window) in WAITING.items():
            subnets = imported(user, cidr, at_once)
            policy_id = user.policy(**policy)
            for _ in range(jobs // at_once):
                user.submit(subnets, policy_id)
            chunks += jobs * window
            asyncio.run(queued(stack, chunks))
            after = cores(stack, CHUNK_SIDE, WAIT_SECONDS)
            meaning = f"cores of orchestrator and MongoDB more while {jobs} jobs of {cidr} wait for a worker"
            yield Figure(f"waiting_{name}_cores", after - before, meaning)
            before = after


async def held(stack: Stack, user: Client, idle: float) -> Sequence[Figure]:
    """Heartbeats of chunks that workers hold, without the cost of an idle platform."""
    figures = []
    async with bus(stack) as publisher:
        workers = Holding(publisher)
        tail = publisher.tail(SCAN_TASKS, workers)
        await tail.start()
        user.submit(imported(user, LARGE, HELD // WINDOW), user.policy(**SIXTEEN))
        async with asyncio.timeout(LIMIT_SECONDS):
            while len(workers.tasks) < HELD:
                await workers.announce()
                await asyncio.sleep(0.25)
        done = 0
        for name, new, outcomes in (("same", 0, "the same outcomes"), ("new", 1, "a new outcome each")):
            meter = Meter(pids(stack, CHUNK_SIDE))
            for number in range(HEARTBEATS):
                done += new
                await publisher.publish(SCAN_PROGRESS, [heartbeat(task, done) for task in workers.tasks])
                await asyncio.sleep(max(0.0, number + 1 - meter.wall()))
            seconds = sum(meter.cpu().values()) - idle * meter.wall()
            meaning = f"CPU of orchestrator and MongoDB for one of {HELD} heartbeats a second, with {outcomes}"
            figures.append(Figure(f"heartbeat_{name}_cpu_ms", 1_000 * seconds / HEARTBEATS / HELD, meaning))
        await tail.stop()
        user.http.post("/api/v1/task/cancel", json={"all": True}).raise_for_status()
    await queued(stack, 0)
    return figures


def heartbeat(task: ScanChunk, done: int) -> ChunkProgressed:
    """Report the first `done` addresses of the chunk as down."""
    return ChunkProgressed(**task.token._asdict(), outcomes=Outcome.DOWN * done + task.outcomes[done:])


def imported(user: Client, cidr: str, count: int) -> list[int]:
    lines = "\n".join(f"{cidr}-{number},{cidr}" for number in range(count))
    headers = {"Content-Type": "text/csv"}
    answer = user.http.post(
        "/api/v1/subnet/import", content=f"name,cidr\n{lines}", headers=headers, timeout=LIMIT_SECONDS
    )
    return [each["id"] for each in answer.raise_for_status().json()["subnets"]]


async def queued(stack: Stack, chunks: int) -> None:
    """Return when so many chunks are queued and none is held, and the sweep has read their jobs."""
    database = mongo.connect(stack.servers.mongodb, stack.servers.database("job-orchestrator"))
    async with asyncio.timeout(LIMIT_SECONDS):
        while await database["chunks"].count_documents({"state": {"$in": OPEN}}) != chunks:  # noqa: ASYNC110 # MongoDB sends no notice
            await asyncio.sleep(0.5)
    database.client.close()
    await asyncio.sleep(LOOK_SECONDS)
