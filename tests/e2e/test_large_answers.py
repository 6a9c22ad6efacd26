"""An answer of a million rows through all processes that pass it on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

import pytest

from local.stack import Stack
from result_store.domain.results import Host, Place
from result_store.repository import MongoStore
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import HostScanned, PortFound
from scanfleet.runtime import mongo
from scanfleet.scanning.outcomes import address_at
from scanfleet.services import GATEWAY, RESULT_STORE
from scanfleet_testing import memory
from tests.client import Client

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ROWS: Final = 1_000_000
PORTS: Final = 100  # of each host
BASE: Final = ROWS // 10  # rows until every buffer has been filled once
MORE_BYTES: Final = 16 << 20  # the sizes of buffered pages differ by 8 MB


def hosts(job_id: int) -> Iterator[Host]:
    """Hosts of a chunk that no worker scans, which is never closed."""
    ports = tuple(PortFound(port=port, service="http", banner="x" * 50) for port in range(1, PORTS + 1))
    at = utc_now()
    for number in range(ROWS // PORTS):
        scanned = HostScanned(
            job_id=job_id,
            chunk_id=f"{job_id}-{1_000_000 + number // 1_000}",
            attempt=1,
            worker_id="test",
            user_id=7,
            address=str(address_at("127.0.0.0", number)),
            outcome="a",
            technique="connect",
            ports=ports,
        )
        yield Host(scanned, Place(at, number))


async def insert(stack: Stack, job_id: int) -> None:
    database = mongo.connect(stack.servers.mongodb, stack.servers.database(RESULT_STORE))
    store, made = MongoStore(database), list(hosts(job_id))
    for start in range(0, len(made), 200):
        await store.add(made[start : start + 200])
    database.client.close()


@pytest.mark.proves("G20")
def test_stream_of_a_million_rows_uses_flat_memory(stack: Stack, user: Client) -> None:
    """After the first tenth of the rows neither process grows by more than 16 MB, while it sends 265 MB."""
    job_id = user.scan("127.9.8.9/32", ports="9", service_detection=False)
    user.finished(job_id)
    asyncio.run(insert(stack, job_id))
    pids = {name: stack.pid(f"{name}-1") for name in (GATEWAY, RESULT_STORE)}
    first: dict[str, int] = {}
    rows = 0
    for pid in pids.values():
        memory.begin_peak(pid)
    accept = {"Accept": "application/x-ndjson"}
    with user.http.stream("GET", f"/api/v1/task/{job_id}/results", headers=accept) as answer:
        answer.raise_for_status()
        for piece in answer.iter_raw():
            rows += piece.count(b"\n")
            if rows >= BASE and not first:
                first = {name: memory.peak(pid) for name, pid in pids.items()}
    assert rows == ROWS
    grown = {name: memory.peak(pid) - first[name] for name, pid in pids.items()}
    assert all(more <= MORE_BYTES for more in grown.values()), grown
