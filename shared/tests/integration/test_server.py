"""The process of a service: one port for requests, another for probes."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
import pytest
import structlog
from fastapi import APIRouter, FastAPI

from scanfleet.errors import DependencyError
from scanfleet.runtime import logging, service
from scanfleet.runtime.server import PROBE_CONNECTIONS, Server
from scanfleet.runtime.settings import ApiSettings, CommonSettings
from scanfleet.security.audit import Refusals
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

LIMIT_SECONDS = 30.0  # until any of this has happened

router = APIRouter()


@router.get("/thing")
async def thing() -> int:
    return 1


@router.get("/context")
async def context() -> list[str]:
    before = list(structlog.contextvars.get_contextvars())
    structlog.contextvars.bind_contextvars(of_this_request=1)
    return before


class Settings(CommonSettings, ApiSettings):
    """Of a service with an API."""


@dataclass
class Parts:
    """The service's dependency, and the time that it takes to close."""

    there: asyncio.Event
    closing: asyncio.Event
    may_close: asyncio.Event

    async def open(self) -> None:
        if not self.there.is_set():
            raise DependencyError("no broker")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await app.state.startup.until_available("kafka", self.open)
        yield
        self.closing.set()
        await self.may_close.wait()


@pytest.fixture
def parts() -> Parts:
    """Parts that open and close at once."""
    parts = Parts(asyncio.Event(), asyncio.Event(), asyncio.Event())
    parts.there.set()
    parts.may_close.set()
    return parts


@asynccontextmanager
async def running(parts: Parts, settings: CommonSettings, *, patience: float = 10.0) -> AsyncIterator[Server]:
    logging.configure("test", settings)
    app = service.create_app(
        name="test", refusals=Refusals("test"), settings=settings, lifespan=parts.lifespan, routers=[router]
    )
    app.state.startup.patience_seconds = patience
    server = Server(app)
    serving = asyncio.create_task(server._serve())  # `serve` would end this process by the signals that it took
    try:
        await until(lambda: server.started)
        yield server
    finally:
        parts.may_close.set()
        server.should_exit = True
        await serving


def with_api() -> Settings:
    return Settings(instance="test", probe_port=0, api_port=0)


def api(server: Server) -> httpx2.AsyncClient:
    port = server.servers[0].sockets[0].getsockname()[1]
    return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)


def probes(server: Server) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.probe_port}", trust_env=False)


async def test_ports_serve_only_their_own_paths(parts: Parts) -> None:
    """Probes and metrics are on the probe port, routes on the other; each port answers 404 to the rest."""
    async with running(parts, with_api()) as server, api(server) as requests, probes(server) as asking:
        assert (await requests.get("/thing")).json() == 1
        assert (await asking.get("/thing")).status_code == 404
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await asking.get(path)).status_code == 200
            answer = await requests.get(path)
            assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


async def test_pipelined_request_has_no_log_context_of_the_one_before(parts: Parts) -> None:
    """A request's log context is not applied to the next request on the same connection."""
    async with running(parts, with_api()) as server:
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        ask = b"GET /context HTTP/1.1\r\nHost: x\r\n"
        writer.write(ask + b"\r\n" + ask + b"Connection: close\r\n\r\n")
        async with asyncio.timeout(LIMIT_SECONDS):
            answers = await reader.read()
        writer.close()
    assert answers.count(b"request_id") == 2
    assert b"of_this_request" not in answers


async def test_garbage_collections_omit_what_exists_when_a_service_has_started(parts: Parts) -> None:
    """A full collection examines only what requests have made, so that it does not interrupt them for long."""
    gc.unfreeze()  # what pytest has collected
    async with running(parts, with_api()):
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10


async def test_service_without_an_api_listens_only_for_probes(parts: Parts) -> None:
    """A service whose settings name no API has one port."""
    async with running(parts, CommonSettings(instance="test", probe_port=0)) as server, probes(server) as asking:
        assert server.servers == []
        assert (await asking.get("/readyz")).status_code == 200


async def test_readiness_without_a_dependency_names_it_and_recovers(parts: Parts) -> None:
    """While a dependency is missing the probe port answers; once it is there the process is ready."""
    parts.there.clear()
    async with running(parts, with_api(), patience=0.05) as server, probes(server) as asking:
        answer = await asking.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"error": "starting, waiting for kafka"})
        assert (await asking.get("/healthz")).status_code == 200
        parts.there.set()

        async def ready() -> bool:
            return (await asking.get("/readyz")).is_success

        await until(ready)


async def test_probes_while_the_process_drains_are_answered(parts: Parts) -> None:
    """From the signal on the process is unready and alive, until its parts are closed."""
    parts.may_close.clear()
    async with running(parts, with_api()) as server, probes(server) as asking:
        server.handle_exit(signal.SIGTERM, None)
        async with asyncio.timeout(LIMIT_SECONDS):
            await parts.closing.wait()
        answer = await asking.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"error": "ending"})
        assert (await asking.get("/healthz")).status_code == 200


async def test_idle_connections_to_the_probe_port_keep_no_probe_out(parts: Parts) -> None:
    """The probe port holds a fixed number of connections; idle ones make room for another."""
    async with running(parts, with_api()) as server, probes(server) as asking:
        opened = [await asyncio.open_connection("127.0.0.1", server.probe_port) for _ in range(2 * PROBE_CONNECTIONS)]
        assert (await asking.get("/readyz")).status_code == 200
        ends = await asyncio.gather(*(ended(reader) for reader, _ in opened))
        assert sum(ends) >= PROBE_CONNECTIONS
        for _, writer in opened:
            writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server has closed the connection."""
    try:
        async with asyncio.timeout(0.5):
            return await reader.read() == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


async def test_taken_probe_port_ends_the_start(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that cannot listen for probes names the setting and ends before it opens anything."""
    async with running(parts, with_api()) as server:
        settings = Settings(instance="test", probe_port=server.probe_port, api_port=0)
        second = Server(
            service.create_app(name="test", refusals=Refusals("test"), settings=settings, lifespan=parts.lifespan)
        )
        with pytest.raises(SystemExit):
            await second.startup()
    assert "SCANFLEET_PROBE_PORT" in capsys.readouterr().out


async def test_taken_api_port_ends_the_start(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that cannot listen for requests closes its parts, names the setting and ends."""
    async with running(parts, with_api()) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        settings = Settings(instance="test", probe_port=0, api_port=port)
        second = Server(
            service.create_app(name="test", refusals=Refusals("test"), settings=settings, lifespan=parts.lifespan)
        )
        with pytest.raises(SystemExit):
            await second._serve()
        assert parts.closing.is_set()
    assert "SCANFLEET_API_PORT" in capsys.readouterr().out
