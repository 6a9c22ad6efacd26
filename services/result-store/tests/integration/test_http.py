"""Stream results over a real HTTP server: interrupted responses and slow readers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from uuid import uuid4

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from structlog.testing import capture_logs

from result_store.api import hosts
from result_store.api.formats import PIECE
from result_store.api.results import router
from result_store.domain.results import fold
from result_store.repository import MongoStore
from result_store_testing import FIRST, Log, MemoryStore, host
from scanfleet.contracts.messages import HostDetails, PortFound
from scanfleet.contracts.rest import Result
from scanfleet.errors import DependencyError
from scanfleet.runtime import mongo, service
from scanfleet.runtime.front import BoundedProtocol
from scanfleet.runtime.settings import FrontSettings
from scanfleet.runtime.turns import AT_ONCE, Turns
from scanfleet.scanning.outcomes import address_at
from scanfleet.scanning.targets import Network
from scanfleet.security.audit import Refusals
from scanfleet_testing import memory
from scanfleet_testing.tokens import Issuer
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

ISSUER = Issuer()
PATH = "/api/v1/task/{}/results"
LARGE = 100_000  # hosts of about a kilobyte: far more than all buffers between server and client hold


class EndlessStore(MemoryStore):
    """Job 1 is large, job 2 fails after two pieces, job 3 is small, job 4 takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    async def results(
        self,
        job_id: int,
        user_id: int | None,  # noqa: ARG002 # the port's signature
        *,
        after: int | None = None,  # noqa: ARG002 # likewise
        raw: bool = True,  # noqa: ARG002 # likewise
        within: Network | None = None,  # noqa: ARG002 # likewise
    ) -> AsyncIterator[Iterable[Result]]:
        [one] = fold(Log().append(host("127.9.8.1", PortFound(port=80, raw_data="x" * 1000)))).hosts.values()
        for number in range({1: LARGE, 2: 2 * PIECE // 1000, 3: 1, 4: 100 * LARGE}[job_id]):
            self.given += 1
            yield one.results(number)
        if job_id == 2:
            raise DependencyError("MongoDB is unavailable")


@asynccontextmanager
async def served(store: MemoryStore | MongoStore) -> AsyncIterator[httpx2.AsyncClient]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.store = store
        app.state.turns = Turns(wait_seconds=0.1)
        app.state.verifier = ISSUER.verifier
        yield

    app = service.create_app(
        name="result-store",
        refusals=Refusals("result-store"),
        settings=FrontSettings(),
        lifespan=lifespan,
        routers=[router, hosts.router],
    )
    config = uvicorn.Config(
        app, http=BoundedProtocol, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    # Render nothing: structlog's default logger would print every local of every frame.
    with capture_logs():
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=ISSUER.bearer()) as http:
            yield http
        server.should_exit = True
        await serving


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson", "text/csv"])
async def test_stream_store_failure_breaks_the_connection(accept: str) -> None:
    """If the store fails in mid-stream, the connection closes before the end of the body, in every format."""
    async with served(EndlessStore()) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get(PATH.format(2), headers={"Accept": accept})
        assert (await http.get(PATH.format(3))).status_code == 200


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson", "text/csv"])
async def test_stream_without_matches_begins_in_time_and_ends_with_its_client(accept: str) -> None:
    """A search without matches is answered before its end, in every format, and no longer reads after its client has left."""
    store = EndlessStore()
    async with served(store) as http:
        async with http.stream("GET", PATH.format(4), params={"port": "9"}, headers={"Accept": accept}) as response:
            assert response.status_code == 200
        async with asyncio.timeout(30):
            read = -1
            while store.given != read:
                read = store.given + 1  # of the small job
                assert (await http.get(PATH.format(3))).status_code == 200


@pytest.mark.proves("F16", "G11")
async def test_stream_stalled_readers_do_not_block_others() -> None:
    """For clients that do not read, the server fetches only what the buffers hold, and serves others meanwhile."""
    store = EndlessStore()
    async with served(store) as http:
        stalled = [http.stream("GET", PATH.format(1)) for _ in range(2)]
        for each in stalled:
            await each.__aenter__()
        async with asyncio.timeout(30):
            asked = -1
            while store.given != asked:  # until the stalled clients receive no more
                asked = store.given + 10
                for _ in range(10):
                    assert (await http.get(PATH.format(3))).status_code == 200
        assert store.given < LARGE
        for each in stalled:
            await each.__aexit__(None, None, None)


@pytest.mark.proves("G20", "A22")
async def test_stream_readers_above_the_limit_of_a_user_get_503() -> None:
    """While a user's stalled clients hold all turns, further requests of that user get 503, and those of others pass."""
    store = EndlessStore()
    async with served(store) as http:
        stalled = [http.stream("GET", PATH.format(1)) for _ in range(AT_ONCE)]
        for each in stalled:
            assert (await each.__aenter__()).status_code == 200
        refused = await http.get(PATH.format(3))
        assert (refused.status_code, set(refused.json()), "Retry-After" in refused.headers) == (503, {"error"}, True)
        assert (await http.get(PATH.format(3), headers=ISSUER.bearer(8))).status_code == 200
        for each in stalled:
            await each.__aexit__(None, None, None)
        async with asyncio.timeout(30):
            while (await http.get(PATH.format(3))).status_code == 503:
                pass


@pytest.mark.proves("G20", "A22")
@pytest.mark.parametrize("path", ["results", "hosts"])
async def test_parallel_readers_of_large_hosts_use_bounded_memory(mongodb: str, path: str) -> None:
    """A user's 64 readers of hosts with 4,096 open ports take at most 120 MB; those without a turn get 503."""
    database = mongo.connect(mongodb, f"results-{uuid4().hex[:12]}")
    store = MongoStore(database)
    await store.prepare()
    ports = [PortFound(port=port, service="http", raw_data="x" * 60) for port in range(1, 4_097)]
    for n in range(32):
        found = host(str(address_at(FIRST, n)), *ports, details=HostDetails(reason="syn-ack"))
        await store.add(list(fold(Log().append(found)).hosts.values()))
    async with served(store) as http:

        async def read() -> int:
            async with http.stream("GET", f"/api/v1/task/1/{path}") as response:
                async for _ in response.aiter_raw():
                    pass
            return response.status_code

        before = memory.begin_peak()
        statuses = Counter(await asyncio.gather(*(read() for _ in range(64))))
        assert memory.peak() - before < 120_000_000
        assert set(statuses) == {200, 503}
        assert statuses[200] >= AT_ONCE
    await database.client.drop_database(database.name)
    database.client.close()
