"""The memory of parallel reads: a user may send 64 requests and open 64 streams at once, and a replica has 256 MiB."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import pytest
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from job_orchestrator.api.coverage import read_map
from job_orchestrator.api.internal import latest_of
from job_orchestrator.api.resource_rules import SUBNETS
from job_orchestrator.api.resources import ROUTERS
from job_orchestrator.api.state import Recorder, State
from job_orchestrator.api.tasks import read_ledger
from job_orchestrator.domain import plan
from job_orchestrator.domain.attempts import Attempt
from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator.domain.resources import Owned
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import Simulation, replanned, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts import queries, rest
from scanfleet.errors import UnavailableError
from scanfleet.scanning.outcomes import address_at
from scanfleet.security.auth import Principal
from scanfleet_testing import memory

pytestmark = [pytest.mark.integration, pytest.mark.proves("G20", "A22")]

READERS: Final = 64
PEAK: Final = 64_000_000  # beside the service itself, which has about 130 MB
PORTS: Final = ",".join(map(str, range(1, 3_900, 2)))  # 1,950 ports, in 9 kB


@pytest.fixture
def state(mongo_store: MongoStore) -> State:
    parts = Simulation(mongo_store).only
    return State(
        mongo_store, parts.commands, parts.cancels, parts.submits, parts.deletions, parts.checks, parts.backlog
    )


async def peak(read: Callable[..., Awaitable[BaseModel | Response]], state: State, **query: Any) -> int:
    """Return the peak of memory while all readers read at once, each of which sends its answer when it is complete."""
    request = Request({"type": "http", "headers": []})
    record = Recorder(request, state.store.audit)

    async def one() -> int:
        try:
            answer = await read(caller=Principal(7), state=state, record=record, **query)
        except UnavailableError:  # of a request that has waited for its turn for too long
            return 0
        return len(answer.model_dump_json() if isinstance(answer, BaseModel) else answer.body)

    assert await one() > 10_000
    before = memory.begin_peak()
    await asyncio.gather(*(one() for _ in range(READERS)))
    return memory.peak() - before


async def test_streams_of_large_jobs_use_bounded_memory(mongo_store: MongoStore, state: State) -> None:
    """The first page of jobs with a thousand exclusions and long lists of ports is read without these."""
    exclude = tuple(f"{address_at('127.9.0.0', 2 * n)}/32" for n in range(1_000))
    job = scan_job(1, cidr="127.9.0.0/20", exclude=exclude, policy=scan_policy(ports=PORTS))
    await mongo_store.jobs.insert([replace(job, id=n, outbox=()) for n in range(1, 201)])
    assert await peak(latest_of, state, query=queries.LatestJobs(user_id=None)) < PEAK


@pytest.mark.parametrize("after", [0, None])
async def test_ledgers_of_large_chunks_use_bounded_memory(
    mongo_store: MongoStore, state: State, after: int | None
) -> None:
    """Chunks with a long list of ports and many attempts are read in small pages, by a few readers at a time."""
    await _insert_large_chunks(mongo_store)
    query = queries.Ledger(page_size=1_000 if after == 0 else 100, after=after)
    assert await peak(read_ledger, state, job_id=1, query=query) < PEAK


async def test_maps_use_bounded_memory(mongo_store: MongoStore, state: State) -> None:
    """A few maps are built at a time."""
    await _insert_large_chunks(mongo_store)
    request = Request({"type": "http", "headers": []})
    assert await peak(read_map, state, job_id=1, request=request, query=queries.Map()) < PEAK


async def test_lists_of_large_subnets_use_bounded_memory(mongo_store: MongoStore, state: State) -> None:
    """A few pages of a hundred subnets with a thousand exclusions are built at a time."""
    exclude = [str(address_at("127.192.0.0", 2 * n)) for n in range(1_000)]
    content = SUBNETS.accept(rest.SubnetBody(name="x", cidr="127.192.0.0/16", exclude=exclude), state.checks)
    owned = (Owned(id=n, user_id=7, name="x", content=content, created_at=THEN, updated_at=THEN) for n in range(1, 101))
    await mongo_store.subnets.add(*owned)
    routes = (each for each in ROUTERS[0].routes if isinstance(each, APIRoute))
    [list_subnets] = [each.endpoint for each in routes if each.name == "list_subnets"]

    async def read(caller: Principal, state: State, query: queries.Page, **_: Any) -> BaseModel:
        listed: BaseModel = await list_subnets(caller=caller, state=state, query=query)
        return listed

    assert await peak(read, state, query=queries.Page(page_size=100)) < PEAK


async def _insert_large_chunks(store: MongoStore) -> None:
    job = scan_job(1, cidr="127.9.0.0/16", policy=scan_policy(ports=PORTS))
    job = replanned(job, chunk_addresses=256, chunk_count=256, chunk_ports=1_950, blocks=1)
    job = change(replace(job, made=256, outbox=()), JobTrigger.START, THEN)
    await store.jobs.insert([replace(job, outbox=())])
    attempts = tuple(Attempt(n=n, worker=f"w-{n}", at=THEN) for n in range(1, 21))
    chunks = plan.chunks(job, 0, 256)
    await store.chunks.insert(
        [replace(each, state=ChunkState.FAILED, attempts=attempts, reason="no route") for each in chunks]
    )
