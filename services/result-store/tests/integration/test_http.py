"""Stream results over a real HTTP server: interrupted responses and slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from structlog.testing import capture_logs

from result_store.api.formats import PIECE
from result_store.api.results import router
from result_store.domain.results import fold
from result_store_testing import Log, MemoryStore, host
from scanfleet.contracts.messages import PortFound
from scanfleet.contracts.rest import Result
from scanfleet.errors import DependencyError
from scanfleet.runtime import service
from scanfleet.runtime.front import BoundedProtocol
from scanfleet.runtime.settings import FrontSettings
from scanfleet.scanning.targets import Network
from scanfleet.security.audit import Refusals
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
async def served(store: MemoryStore) -> AsyncIterator[httpx2.AsyncClient]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.store = store
        app.state.verifier = ISSUER.verifier
        yield

    app = service.create_app(
        name="result-store",
        refusals=Refusals("result-store"),
        settings=FrontSettings(),
        lifespan=lifespan,
        routers=[router],
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
