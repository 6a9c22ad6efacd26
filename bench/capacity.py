"""The cost of results from Kafka to MongoDB, beside bare inserts into the same MongoDB."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from bench.figures import Figure
from bench.kit import SCRIPTED, Meter, bus, load, new_stack, pids
from local.stack import Stack
from scanfleet.contracts.messages import HostScanned, PortFound
from scanfleet.contracts.messages.topics import SCAN_RESULTS
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import mongo
from scanfleet.scanning.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.security.auth import read_private_key
from scanfleet.security.chunk_grants import Signer
from tests.client import Client

HOSTS: Final = 10_000
ROWS: Final = 40_000
PAGE: Final = 100
ROUNDS: Final = 5
LIMIT_SECONDS: Final = 60.0  # for any part
OURS: Final = ("result-store", "kafka", "mongod")


def measure() -> Iterator[Figure]:
    with new_stack(replicas=SCRIPTED) as stack:
        yield from asyncio.run(hosts(stack))
        yield last_page(stack)


async def hosts(stack: Stack) -> Sequence[Figure]:
    """Measure hosts with grants of the stack's own key; result-store does not check that their jobs exist."""
    results = mongo.connect(stack.servers.mongodb, stack.servers.database("result-store"))
    signer = Signer(read_private_key(stack.folder / "chunk" / "private.pem"))
    async with bus(stack) as publisher:
        meter = Meter(pids(stack, OURS))
        await store(publisher, results, signer, dict.fromkeys(range(1000, 1024), HOSTS // 24))
        stored = await results["hosts"].count_documents({})
        rate, cpu = stored / meter.wall(), sum(meter.cpu().values()) / stored
        one = Meter({})
        await store(publisher, results, signer, {2_000: HOSTS // 4})
        one_rate = HOSTS / 4 / one.wall()
    await results.client.admin.command("fsync")  # sizes count only what is on the disk
    sizes = await results.command("collStats", "hosts")
    return [
        Figure("hosts_per_s", rate, "hosts in the log to their documents, all partitions"),
        Figure("host_cpu_ms", 1_000 * cpu, "CPU of result-store, Kafka and MongoDB for a host"),
        Figure("partition_ratio", one_rate / rate, "one partition / all: near 1, the process is the limit"),
        Figure("insert_ratio", rate / await inserts(results), "hosts / bare insert_many of the same documents"),
        Figure(
            "host_bytes", (sizes["storageSize"] + sizes["totalIndexSize"]) / sizes["count"], "on disk, with indexes"
        ),
    ]


def last_page(stack: Stack) -> Figure:
    """Return the median of the ratios of pairs, run in turn; no worker scans the job."""
    token = stack.token(7)
    user = Client(stack.url, token)
    job_id = user.scan("127.0.0.0/16", ports="8080")
    asyncio.run(rows(stack, job_id))
    ids = [each["id"] for each in user.results(job_id)]
    pages = f"{stack.url}/api/v1/task/{job_id}/results?limit={PAGE}&after="
    ratios = []
    for _ in range(ROUNDS):
        first, last = (load(f"{pages}{after}", clients=8, seconds=3, token=token).rate for after in (0, ids[-PAGE - 1]))
        ratios.append(first / last)
    meaning = f"time of the last page / of the first page of {len(ids)} results"
    return Figure("last_page_ratio", statistics.median(ratios), meaning, at_most=1.3)


async def rows(stack: Stack, job_id: int) -> None:
    results = mongo.connect(stack.servers.mongodb, stack.servers.database("result-store"))
    signer = Signer(read_private_key(stack.folder / "chunk" / "private.pem"))
    async with bus(stack) as publisher:
        await store(publisher, results, signer, {job_id: ROWS})
    results.client.close()


async def store(publisher: KafkaBus, results: mongo.Database, signer: Signer, counts: Mapping[int, int]) -> None:
    """Publish so many hosts of each job, and return when all are stored."""
    before = await results["hosts"].count_documents({})
    for job_id, count in counts.items():
        await publisher.publish(SCAN_RESULTS, list(made(job_id, count, signer)))
    async with asyncio.timeout(LIMIT_SECONDS):
        while await results["hosts"].count_documents({}) < before + sum(counts.values()):  # noqa: ASYNC110 # MongoDB sends no notice
            await asyncio.sleep(0.05)


def made(job_id: int, count: int, signer: Signer) -> Iterator[HostScanned]:
    """Return hosts of a job, each with one open port, in chunks of the largest size."""
    for index, start in enumerate(range(0, count, MAX_ADDRESSES)):
        addresses = [
            str(ip_address("127.0.0.0") + number) for number in range(start, min(start + MAX_ADDRESSES, count))
        ]
        token = {"job_id": job_id, "chunk_id": f"{job_id}-{index}", "attempt": 1, "worker_id": "bench-0", "user_id": 7}
        outcomes = Outcome.BLANK * len(addresses)
        grant = signer.grant(**token, first_address=addresses[0], outcomes=outcomes, ports="8080")  # type: ignore[arg-type] # the token's values are of two types
        for address in addresses:
            yield HostScanned(
                **token,
                address=address,
                outcome="a",
                technique="connect",
                ports=(PortFound(port=8080, service="http"),),
                grant=grant,
            )


async def inserts(results: mongo.Database) -> float:
    """Measure the documents per second that one client inserts into MongoDB."""
    documents = [each async for each in results["hosts"].find(limit=HOSTS)]
    rates = []
    for name in ("bare1", "bare2", "bare3"):
        begin = time.perf_counter()
        for start in range(0, len(documents), 500):
            await results[name].insert_many(documents[start : start + 500], ordered=False)
        rates.append(len(documents) / (time.perf_counter() - begin))
    return statistics.median(rates)
