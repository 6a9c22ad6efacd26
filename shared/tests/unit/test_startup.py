"""Services that start while a dependency is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2
import pytest
from fastapi import APIRouter, FastAPI

from scanfleet.errors import DependencyError
from scanfleet.runtime import logging
from scanfleet.runtime.service import create_app, create_probes
from scanfleet.runtime.settings import CommonSettings
from scanfleet.runtime.startup import Startup
from scanfleet.security.audit import Refusals
from scanfleet_testing.waiting import until

router = APIRouter()


@router.get("/thing")
async def read_thing() -> int:
    return 1


class Part:
    """A part that opens once its dependency is there."""

    def __init__(self) -> None:
        self.there = asyncio.Event()
        self.tries = 0
        self.open = False

    async def start(self) -> None:
        self.tries += 1
        if not self.there.is_set():
            raise DependencyError("no broker at 127.0.0.1:1")
        self.open = True

    def stop(self) -> None:
        self.open = False


@asynccontextmanager
async def running(first: Part, second: Part, *, fault: Exception | None = None) -> AsyncIterator[FastAPI]:
    """A service of two parts, given no time to open them before it serves."""
    logging.configure("test", CommonSettings(instance="test"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await app.state.startup.until_available("mongodb", first.start)
            stack.callback(first.stop)
            await app.state.startup.until_available("kafka", second.start)
            stack.callback(second.stop)
            if fault is not None:
                raise fault
            yield

    app = create_app(
        name="test",
        refusals=Refusals("test"),
        settings=CommonSettings(instance="test"),
        lifespan=lifespan,
        routers=[router],
    )
    app.state.startup.patience_seconds = 0.05
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def asking(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.proves("F33")
async def test_startup_without_a_dependency_serves_probes_and_answers_503() -> None:
    """The unready process reports the missing dependency, answers requests with 503, and recovers automatically."""
    first, second = Part(), Part()
    first.there.set()
    async with running(first, second) as app, asking(app) as client, asking(create_probes(app)) as probes:
        assert (await probes.get("/healthz")).status_code == 200
        answer = await probes.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"error": "starting, waiting for kafka"})
        answer = await client.get("/thing")
        assert (answer.status_code, set(answer.json()), answer.headers["Retry-After"]) == (503, {"error"}, "1")
        assert answer.headers["X-Request-ID"]
        second.there.set()
        await until(lambda: app.state.startup.ready)
        assert (await probes.get("/readyz")).status_code == 200
        assert (await client.get("/thing")).status_code == 200
        assert (first.tries, second.tries) == (1, 2)
    assert not (first.open)
    assert not (second.open)


async def test_startup_with_available_dependencies_is_ready_at_once() -> None:
    """A service with available dependencies serves only once it is ready."""
    first, second = Part(), Part()
    first.there.set()
    second.there.set()
    async with running(first, second) as app:
        assert app.state.startup.ready


async def test_startup_stopped_while_waiting_closes_its_open_parts() -> None:
    """A process that is stopped before all dependencies are available closes its parts at once."""
    first, second = Part(), Part()
    first.there.set()
    async with running(first, second):
        assert first.open
    assert not first.open


async def test_startup_with_a_permanent_error_fails_at_once() -> None:
    """An error that a retry cannot fix ends the start, and closes all open parts."""
    first, second = Part(), Part()
    first.there.set()
    second.there.set()
    service = running(first, second, fault=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await service.__aenter__()
    assert not (first.open)
    assert not (second.open)


async def test_startup_with_a_late_fault_is_dead() -> None:
    """An error after the service began to serve turns liveness red, so that the process is replaced."""
    startup, late = Startup(patience_seconds=0.05), asyncio.Event()

    @asynccontextmanager
    async def parts() -> AsyncIterator[None]:
        await late.wait()
        raise ZeroDivisionError
        yield

    async def serve() -> None:
        async with startup.opening(parts()):
            assert (startup.alive, startup.ready) == (True, False)
            late.set()
            await until(lambda: not startup.alive)
            assert not startup.ready

    with pytest.raises(ZeroDivisionError):
        await serve()
