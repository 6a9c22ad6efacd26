"""The control plane beside its alternatives: jobs that scan nothing, queries, and a job of the largest size."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import httpx2
from redis import Redis

from bench.figures import Figure
from bench.kit import SCRIPTED, Documents, Load, Meter, Workers, bus, cores, load, new_stack, pids
from local import ports
from local.stack import Stack
from local.wait import listens, until
from scanfleet.contracts.messages import WorkerReady
from scanfleet.contracts.messages.topics import SCAN_TASKS, SCAN_WORKERS
from scanfleet.runtime.bus import Record
from tests.client import FINAL, Client

ONE_PORT: Final = {"ports": "8080", "service_detection": False, "timing": 4}
CLIENTS: Final = 64
SECONDS: Final = 10  # duration of a load
POSTS: Final = 50
HOPS: Final = 200
CALM_SECONDS: Final = 5  # after a change until the load is measured, and of that measurement
CHUNKS: Final = 2_000  # measured of a large job
SMALL: Final = [f"127.2.{number}.0/29" for number in range(30)]
WHOLE: Final = "127.3.0.0/20"  # 32,768 chunks: a job of 262,144 would take a quarter of an hour
LARGE: Final = "127.1.0.0/16"
ALL_PORTS: Final = {"ports": "1-65535", "service_detection": False, "discovery": "none"}
LIMIT_SECONDS: Final = 120.0  # for any part
WHOLE_LIMIT_SECONDS: Final = 600.0  # for the whole job; it takes about two minutes
SETTINGS: Final = {
    "SCANFLEET_UNFINISHED_JOBS_PER_USER": "1000000",  # more than a load posts
    # The requests that a load leaves unanswered when it ends are still under way when the next request comes.
    "SCANFLEET_REQUESTS_AT_ONCE_PER_USER": str(2 * CLIENTS),
}
OURS: Final = ("api-gateway", "job-orchestrator", "result-store", "kafka", "mongod")
CHUNK_SIDE: Final = ("job-orchestrator", "mongod")
BODY: Final = '{"subnet_ids": [%d], "policy_id": %d}'


def measure() -> Iterator[Figure]:
    with new_stack(replicas=SCRIPTED, settings=SETTINGS) as stack:
        user = Client(stack.url, stack.token(7))
        yield from idle(stack, user)
        yield from accepted(stack, user)
        yield from queries(stack, user)
        time.sleep(CALM_SECONDS)
        calm = cores(stack, OURS, CALM_SECONDS)
        yield from asyncio.run(chunks(stack, user))
        yield from largest(stack, user, calm)


def idle(stack: Stack, user: Client) -> Iterator[Figure]:
    """Measure the POST of one job at a time, in hops of one Kafka record from producer to consumer."""
    subnet_id, policy_id = user.subnet("127.9.8.1/32"), user.policy(**ONE_PORT)
    hop = asyncio.run(hop_seconds(stack))
    times = []
    for _ in range(POSTS):
        begin = time.perf_counter()
        user.submit([subnet_id], policy_id)
        times.append(time.perf_counter() - begin)
    post = statistics.median(times)
    yield Figure("post_p50_ms", 1_000 * post, "POST of one job to its 201, nothing else to do")
    yield Figure("post_hops", post / hop, "the same / one record from producer to consumer", at_most=3)


async def hop_seconds(stack: Stack) -> float:
    """Measure the median time of a record from producer to consumer."""
    arrived = asyncio.Event()

    class Listener(Workers):
        async def handle(self, records: Sequence[Record]) -> None:
            if any(isinstance(record.message, WorkerReady) for record in records):
                arrived.set()

    times = []
    async with bus(stack) as publisher:
        tail = publisher.tail(SCAN_WORKERS, Listener(publisher))
        await tail.start()
        ready = WorkerReady(worker_id="hop", slots=0, raw=False)
        for _ in range(HOPS):
            arrived.clear()
            begin = time.perf_counter()
            await publisher.publish(SCAN_WORKERS, [ready])
            async with asyncio.timeout(LIMIT_SECONDS):
                await arrived.wait()
            times.append(time.perf_counter() - begin)
        await tail.stop()
    return statistics.median(times)


def accepted(stack: Stack, user: Client) -> Iterator[Figure]:
    """Measure jobs posted singly, and the CPU time of a job that scans nothing, beside FastAPI with Celery and Redis.

    Jobs are only accepted: no worker runs. They are compared with the tasks that Celery accepts and executes, and with those that
    it accepts while no worker runs. The CPU time is that of all processes, workers included, from an empty queue to an empty queue.
    """
    body = BODY % (user.subnet("127.9.8.2/32"), user.policy(**ONE_PORT))
    tasks, token = f"{stack.url}/api/v1/task", stack.token(7)
    ours = load(tasks, clients=CLIENTS, seconds=SECONDS, token=token, body=body)
    cpu, read, written = asyncio.run(
        scripted(stack, user, lambda: load(tasks, clients=8, seconds=SECONDS, token=token, body=body))
    )
    queued, executed, other_cpu = celery(stack.folder, body)
    yield Figure("accepted_per_s", ours.rate, f"one-host jobs posted singly by {CLIENTS} clients, no worker")
    yield Figure("accepted_ratio", ours.rate / executed, "the same / Celery with Redis, executed too", at_least=1.5)
    yield Figure("accepted_queued_ratio", ours.rate / queued.rate, "the same / Celery with Redis, no worker")
    yield Figure("accepted_p50_ms", ours.p50, "their POST, median")
    yield Figure("accepted_p50_ratio", ours.p50 / queued.p50, "the same / Celery with Redis, no worker")
    yield Figure("accepted_p99_ms", ours.p99, "their POST, 99th percentile")
    yield Figure("accepted_p99_ratio", ours.p99 / queued.p99, "the same / Celery with Redis, no worker", at_most=1)
    total = sum(cpu.values())
    yield Figure("job_cpu_ms", 1_000 * total, "CPU of services, servers and workers for a job that scans nothing")
    yield Figure("job_cpu_ratio", other_cpu / total, "CPU of Celery's / of ours", at_least=1)
    for name, seconds in cpu.items():
        yield Figure(f"job_cpu_{name.replace('-', '_')}_ms", 1_000 * seconds, f"of these of {name}")
    yield Figure(
        "job_documents_read",
        read,
        "documents that MongoDB returned for the same job, without those that it only examined",
    )
    yield Figure("job_documents_written", written, "documents that it inserted, updated or deleted")


async def scripted(stack: Stack, user: Client, work: Callable[[], Load]) -> tuple[Mapping[str, float], float, float]:
    """Return CPU seconds by process, and documents read and written, of each job that `work` posts, until the last has ended."""
    async with scanning(stack) as workers:
        await ended(workers, lambda: user.unfinished() == 0)
        meter = Meter(pids(stack, OURS) | {"workers": os.getpid()})  # the workers are tasks of this process
        before = await asyncio.to_thread(Documents.now, stack)
        count = SECONDS * (await asyncio.to_thread(work)).rate
        await ended(workers, lambda: user.unfinished() == 0)
        after = await asyncio.to_thread(Documents.now, stack)
        cpu = {name: seconds / count for name, seconds in meter.cpu().items()}
        return cpu, (after.read - before.read) / count, (after.written - before.written) / count


@asynccontextmanager
async def scanning(stack: Stack) -> AsyncIterator[Workers]:
    """Run scripted workers that take tasks while the block runs."""
    async with bus(stack) as publisher:
        workers = Workers(publisher)
        tail = publisher.tail(SCAN_TASKS, workers)
        await tail.start()
        try:
            yield workers
        finally:
            await tail.stop()


async def ended(workers: Workers, condition: Callable[[], bool], limit_seconds: float = LIMIT_SECONDS) -> None:
    """Announce the workers until `condition` holds."""
    async with asyncio.timeout(limit_seconds):
        while not await asyncio.to_thread(condition):
            await workers.announce()
            await asyncio.sleep(0.25)


def celery(folder: Path, body: str) -> tuple[Load, float, float]:
    """Measure requests that FastAPI puts on Celery's queue in Redis, which syncs each write.

    Returns:
        The load without a worker; the tasks that two workers execute per second of the same load, until the queue is empty; the
        CPU seconds of each task of eight clients.
    """
    port, web = ports.choose(), ports.choose()
    python = [sys.executable, "-m"]
    options = ["--port", str(port), "--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder)]
    servers = {
        "redis": ["redis-server", "--bind", "127.0.0.1", *options],
        "web": [*python, "uvicorn", "--factory", "bench.alternatives:queue", "--port", str(web), "--no-access-log"],
    }
    worker = {"celery": [*python, "celery", "--app", "bench.alternatives:worker", "worker", "--concurrency", "2"]}
    environment = {"SCANFLEET_BENCH_REDIS": f"redis://127.0.0.1:{port}/0"}
    url = f"http://127.0.0.1:{web}/task"

    def idle() -> bool:
        return not (queue.llen("celery") or queue.hlen("unacked"))

    with running(servers, environment, folder) as processes, Redis(port=port) as queue:
        for each in (port, web):
            listens("127.0.0.1", each, LIMIT_SECONDS)
        queued = load(url, clients=CLIENTS, seconds=SECONDS, body=body)
        with running(worker, environment, folder) as workers:
            until(idle, LIMIT_SECONDS, "Celery to empty its queue")
            begin = time.perf_counter()
            count = SECONDS * load(url, clients=CLIENTS, seconds=SECONDS, body=body).rate
            until(idle, LIMIT_SECONDS, "Celery to empty its queue")
            executed = count / (time.perf_counter() - begin)
            meter = Meter({**processes, **workers})
            count = SECONDS * load(url, clients=8, seconds=SECONDS, body=body).rate
            until(idle, LIMIT_SECONDS, "Celery to empty its queue")
            return queued, executed, sum(meter.cpu().values()) / count


@contextmanager
def running(
    commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], folder: Path
) -> Iterator[Mapping[str, int]]:
    """Run processes for the length of the block, and yield their pids."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        yield {name: process.pid for name, process in started.items()}
    finally:
        for process in reversed(started.values()):
            process.terminate()
            process.wait(LIMIT_SECONDS)


def queries(stack: Stack, user: Client) -> Iterator[Figure]:
    """Measure the list of jobs beside the same query in one process, and beside an open route of the same gateway."""
    page = 20
    total = user.http.get("/api/v1/task", params={"page_size": page}).json()["total"]
    rate = load(f"{stack.url}/api/v1/task?page_size={page}", clients=8, seconds=SECONDS, token=stack.token(7)).rate
    open_rate = load(f"{stack.url}/api/v1/info", clients=8, seconds=SECONDS).rate
    port = ports.choose()
    command = [sys.executable, "-m", "uvicorn", "--factory", "bench.alternatives:documents", "--port", str(port)]
    environment = {
        "SCANFLEET_BENCH_MONGODB": stack.servers.mongodb,
        "SCANFLEET_BENCH_DATABASE": stack.servers.database("job-orchestrator"),
    }
    with running({"list": [*command, "--no-access-log"]}, environment, stack.folder):
        listens("127.0.0.1", port, LIMIT_SECONDS)
        other = load(f"http://127.0.0.1:{port}/task?user_id=7&page_size={page}", clients=8, seconds=SECONDS).rate
    yield Figure("list_per_s", rate, f"authenticated GET of {page} of {total} jobs")
    yield Figure("list_ratio", rate / other, "the same / one process with FastAPI and motor", at_least=0.6)
    yield Figure("list_open_ratio", rate / open_rate, "the same / the gateway's /api/v1/info", at_least=0.3)


async def chunks(stack: Stack, user: Client) -> list[Figure]:
    """Measure the CPU of orchestrator and MongoDB per chunk: jobs of 64, the start of one of 524,288, and a whole large one."""
    async with scanning(stack) as workers:
        policy_id = user.policy(**ALL_PORTS, timing=3)
        small = [user.subnet(cidr) for cidr in SMALL]
        costs = []
        for subnet_ids, enough in ((small, 0), ([user.subnet(LARGE)], CHUNKS), ([user.subnet(WHOLE)], 0)):
            workers.chunks.clear()
            meter = Meter(pids(stack, CHUNK_SIDE))
            jobs = [job["id"] for job in user.submit(subnet_ids, policy_id)]
            await ended(
                workers,
                lambda jobs=jobs, enough=enough: (
                    len(workers.chunks) > enough > 0  # type: ignore[misc] # mypy infers no type for a lambda with defaults
                    or all(user.status(job_id) in FINAL for job_id in jobs)
                ),
                WHOLE_LIMIT_SECONDS,
            )
            costs.append(1_000 * sum(meter.cpu().values()) / len(workers.chunks))
            rate = len(workers.chunks) / meter.wall()
            for job_id in jobs:
                user.http.post(f"/api/v1/task/{job_id}/cancel")
    one, many, whole = costs
    return [
        Figure("chunk_cpu_ms", many, "CPU of orchestrator and MongoDB for a chunk of a /16 with all ports", at_most=3),
        Figure("chunk_growth", many / one, "the same / for a chunk of a job of 64", at_most=1.3),
        Figure("whole_growth", whole / one, "for a chunk of a whole job of 32,768 / of 64", at_most=1.3),
        Figure("chunks_per_s", rate, "chunks of that job, with workers that report each at once"),
    ]


def largest(stack: Stack, user: Client, calm: float) -> Iterator[Figure]:
    """Measure a pending /16 of all ports: its POST, its ledger, the health of the orchestrator meanwhile, and its cancel.

    Args:
        stack: without workers.
        user: owns the job.
        calm: cores that the platform used before its first large job.
    """
    subnet_id, policy_id = user.subnet(LARGE), user.policy(**ALL_PORTS)
    begin = time.perf_counter()
    (job,) = user.submit([subnet_id], policy_id)
    yield Figure("largest_post_s", time.perf_counter() - begin, "POST of a /16 with all ports", at_most=1)
    with ThreadPoolExecutor(1) as pool:
        begin = time.perf_counter()
        ledger = pool.submit(user.ledger, job["id"])
        health: list[float] = []
        while not (health and ledger.done()):
            sent = time.perf_counter()
            httpx2.get(f"{stack.ports.probes('job-orchestrator')}/healthz").raise_for_status()
            health.append(time.perf_counter() - sent)
        ledger.result()
        yield Figure("largest_ledger_s", time.perf_counter() - begin, "its ledger", at_most=1)
    yield Figure("largest_healthz_s", max(health), "the longest /healthz of the orchestrator meanwhile", at_most=0.1)
    begin = time.perf_counter()
    user.cancel(job["id"])
    until(lambda: user.unfinished() == 0, LIMIT_SECONDS, "the job to be cancelled")
    took = time.perf_counter() - begin
    yield Figure("largest_cancel_s", took, "its cancel", at_most=5)
    time.sleep(max(0.0, CALM_SECONDS - took))
    after = cores(stack, OURS, CALM_SECONDS)
    yield Figure("cancelled_load_cores", after, f"cores in use {CALM_SECONDS} s after its cancel")
    yield Figure("cancelled_load_ratio", after / calm, "the same / before any large job", at_most=1.5)
