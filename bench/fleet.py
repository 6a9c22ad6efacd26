"""The cost of the assignments of all other workers: for a worker, which reads and discards a twelfth of them, and for Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Final

from bench.figures import Figure
from bench.kit import SCRIPTED, Meter, Workers, bus, new_stack, pids
from local.stack import Stack
from scanfleet.contracts.messages import ScanChunk
from scanfleet.contracts.messages.envelope import encode
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.kafka import KafkaBus
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet.security.auth import read_private_key
from scanfleet.security.chunk_grants import Signer
from scanfleet.services import WORKER

FLEETS: Final = {100: 50, 1_000: 500}
"""Assignments per second of so many workers, with 4 slots each and chunks of 8 s; an orchestrator dispatches 500 at most."""
SECONDS: Final = 20  # of each load
ROUNDS: Final = 10  # of dispatch in a second
MORE: Final = 96  # further readers, for the cost of one to Kafka: as many of each partition
ADDRESSES: Final = 64  # of a chunk


def measure() -> Iterator[Figure]:
    with new_stack(replicas=SCRIPTED | {WORKER: 1}) as stack:
        yield from asyncio.run(fan_out(stack))


async def fan_out(stack: Stack) -> Sequence[Figure]:
    signer = Signer(read_private_key(stack.folder / "chunk" / "private.pem"))
    figures = []
    async with bus(stack) as publisher, AsyncExitStack() as readers:
        idle = await cores(stack, publisher, [])
        chunks = {workers: assignments(workers, rate * SECONDS, signer) for workers, rate in FLEETS.items()}
        alone = {workers: await cores(stack, publisher, chunks[workers]) for workers in FLEETS}
        for number in range(MORE):
            partition = number % SCAN_TASKS.partitions  # each worker reads the one of its id
            reader = publisher.tail(SCAN_TASKS, Workers(publisher), wants=lambda _: False, partition=partition)
            await reader.start()
            readers.push_async_callback(reader.stop)
        for workers, rate in FLEETS.items():
            more = await cores(stack, publisher, chunks[workers])
            share = alone[workers][WORKER] - idle[WORKER]
            of_kafka = (more["kafka"] - alone[workers]["kafka"]) / MORE * workers
            fleet = f"for {rate} assignments/s of {workers} workers"
            figures += [
                Figure(f"tasks_of_{workers}_cores", share, f"cores that each worker needs {fleet}"),
                Figure(
                    f"tasks_of_{workers}_kafka_cores", of_kafka, "cores that Kafka needs to send these to all of them"
                ),
            ]
    record = encode(SCAN_TASKS, chunks[workers][0], source="bench", traceparent="")
    size = len(record.key) + len(record.value) + sum(len(name) + len(value) for name, value in record.headers)
    return [
        *figures,
        Figure(
            "tasks_cpu_s",
            1_000 * share / rate,
            "CPU of a worker for 1,000 assignments of others, of which it reads a twelfth",
        ),
        Figure("task_bytes", size, "of the standard policy, sent to a twelfth of the workers"),
    ]


async def cores(stack: Stack, publisher: KafkaBus, chunks: Sequence[ScanChunk]) -> Mapping[str, float]:
    """Return the average number of cores that a worker and Kafka use while these assignments are published, evenly in `SECONDS`."""
    meter = Meter(pids(stack, (WORKER, "kafka")))
    batch = len(chunks) // (SECONDS * ROUNDS)
    for number in range(SECONDS * ROUNDS):
        await publisher.publish(SCAN_TASKS, chunks[number * batch : (number + 1) * batch])
        await asyncio.sleep(max(0.0, (number + 1) / ROUNDS - meter.wall()))
    return {name: seconds / SECONDS for name, seconds in meter.cpu().items()}


def assignments(workers: int, count: int, signer: Signer) -> list[ScanChunk]:
    """Return chunks as the orchestrator dispatches them, to workers that do not exist."""
    policy = fill_in(Preset.STANDARD, {})
    scope = {"user_id": 7, "first_address": "127.0.0.0", "outcomes": Outcome.BLANK * ADDRESSES, "ports": policy.ports}
    made = []
    for number in range(count):
        chunk = {"job_id": 1, "chunk_id": f"1-{number}", "attempt": 1, "worker_id": f"bench-{number % workers}"} | scope
        grant = signer.grant(**chunk)  # type: ignore[arg-type] # the values are of two types
        made.append(ScanChunk(**chunk, policy=policy, lease_seconds=30.0, estimate_seconds=10.0, grant=grant))
    return made
