"""Stream results over a real HTTP server: interrupted responses and slow readers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from structlog.testing import capture_logs

from result_store.api import hosts, nmap_xml
from result_store.api.formats import PIECE_BYTES
from result_store.api.results import router
from result_store.api.turns import DOWNLOADS, Limits
from result_store.domain.results import fold
from result_store.repository import MongoStore
from result_store_testing import FIRST, Log, MemoryStore, host
from scanfleet.contracts.messages import HostDetails, JobStatus, PortFound, ScriptOutput
from scanfleet.contracts.rest import ExportedJob, Result
from scanfleet.errors import DependencyError
from scanfleet.runtime import mongo, service
from scanfleet.runtime.http.connection_limits import BoundedProtocol
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.runtime.turns import Turns
from scanfleet.scanning.outcomes import address_at
from scanfleet.scanning.targets import Network
from scanfleet.security.audit import Refusals
from scanfleet_testing import memory
from scanfleet_testing.tokens import Issuer
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

ISSUER = Issuer()
PATH = "/api/v1/task/{}/results"
THEN = datetime(2026, 1, 1, tzinfo=UTC)
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
        for number in range({1: LARGE, 2: 2 * PIECE_BYTES // 1000, 3: 1, 4: 100 * LARGE}[job_id]):
            self.given += 1
            yield one.results(number)
        if job_id == 2:
            raise DependencyError("MongoDB is unavailable")


@asynccontextmanager
async def served(store: MemoryStore | MongoStore, limits: Limits | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.store = store
        app.state.limits = limits or Limits()
        app.state.verifier = ISSUER.verifier
        yield

    app = service.create_app(
        name="result-store",
        refusals=Refusals("result-store"),
        settings=ConnectionSettings(),
        lifespan=lifespan,
        routers=[router, hosts.router, nmap_xml.router],
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
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=ISSUER.bearer(), timeout=60) as http:
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
async def test_stalled_downloads_of_a_user_do_not_delay_short_answers() -> None:
    """While a user's stalled clients hold all downloads, one more gets a 503 at once, and short answers are sent as usual."""
    async with served(EndlessStore(), Limits(turns=Turns(wait_seconds=0.1))) as http:
        stalled = [http.stream("GET", PATH.format(1)) for _ in range(DOWNLOADS)]
        for each in stalled:
            assert (await each.__aenter__()).status_code == 200
        refused = await http.get(PATH.format(1))
        assert (refused.status_code, set(refused.json()), "Retry-After" in refused.headers) == (503, {"error"}, True)
        for _ in range(10):
            assert (await http.get(PATH.format(3))).status_code == 200
        async with http.stream("GET", PATH.format(1), headers=ISSUER.bearer(8)) as another:
            assert another.status_code == 200
        for each in stalled:
            await each.__aexit__(None, None, None)
        async with asyncio.timeout(30):
            status = 503
            while status == 503:
                async with http.stream("GET", PATH.format(1)) as again:
                    status = again.status_code


EXPORTED = ExportedJob(
    job_id=1, status=JobStatus.COMPLETED, error="", cidr="127.9.8.0/24", ports="T:1-4096", start=THEN, end=THEN
).model_dump(mode="json")


PATHS = ("/api/v1/task/1/results", "/api/v1/task/1/hosts", "/internal/jobs/1/nmap.xml")
READERS = 16
ENOUGH_BYTES = 250_000  # that each of them reads, of several hosts, before it stalls


@pytest.mark.proves("G20", "A22")
async def test_slow_readers_of_large_hosts_use_bounded_memory(mongodb: str) -> None:
    """A user's slow readers of hosts with 4,096 open ports take at most 100 MB; those above the limit get 503."""
    database = mongo.connect(mongodb, f"results-{uuid4().hex[:12]}")
    store = MongoStore(database)
    await store.prepare()
    ports = [PortFound(port=port, service="http", raw_data="x" * 60) for port in range(1, 4_097)]
    details = HostDetails(scripts=tuple(ScriptOutput(id=f"s{n}", output="y" * 1_000) for n in range(60)))
    for n in range(48):
        found = host(str(address_at(FIRST, n)), *ports, details=details)
        await store.add(list(fold(Log().append(found)).hosts.values()))
    async with served(store, Limits(turns=Turns(wait_seconds=30))) as http:

        async def read(path: str, statuses: Counter[int]) -> None:
            request = {"method": "POST", "json": EXPORTED} if path.startswith("/internal") else {"method": "GET"}
            async with http.stream(url=path, **request) as response:
                statuses[response.status_code] += 1
                size, received = 0, response.aiter_raw()
                while response.status_code == 200 and size < ENOUGH_BYTES:
                    size += len(await anext(received))
                await until(lambda: statuses.total() == READERS)

        before = memory.begin_peak()
        for path in PATHS:
            statuses = Counter[int]()
            await asyncio.gather(*(read(path, statuses) for _ in range(READERS)))
            assert statuses == {200: DOWNLOADS, 503: READERS - DOWNLOADS}, path
            assert memory.peak() - before < 100_000_000, path
    await database.client.drop_database(database.name)
    database.client.close()
