"""The application of a service: its routes with probes, metrics, request ids and one format for all errors.

A service's `main.py` calls `create_app` with its routers and a lifespan that opens adapters and consumers;
`scanfleet.runtime.server` runs it. The parts are in `scanfleet.runtime.http`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Final, cast

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware import Middleware

from scanfleet.runtime import tracing
from scanfleet.runtime.http import probes
from scanfleet.runtime.http.audit import RefusalLog
from scanfleet.runtime.http.connection_limits import ConnectionLimits
from scanfleet.runtime.http.errors import ERROR_HANDLERS
from scanfleet.runtime.http.middleware import Outermost, StartupGate
from scanfleet.runtime.http.probes import Probes
from scanfleet.runtime.http.proxies import Proxies
from scanfleet.runtime.http.responses import AsciiJSON
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.runtime.startup import Startup

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

HEALTH_PERIOD_SECONDS: Final = 1.0  # interval of checks of the loops; `/healthz` reports at once

# FastAPI's own telemetry stays off: a provider or environment variable set elsewhere would enable it, and it exports
# query strings and exception messages. Metrics are defined by `http.middleware` and spans by `tracing`.
_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}

# Common parts of both applications of a service.
_BASICS: Final[dict[str, Any]] = {
    "openapi_url": None,
    "default_response_class": AsciiJSON,
    "telemetry": _TELEMETRY,
    "redirect_slashes": False,  # a path with an extra slash is unknown; a redirect would drop the body
    "exception_handlers": ERROR_HANDLERS,
}

_log = structlog.stdlib.get_logger(__name__)


def create_app(
    *,
    name: str,
    settings: ConnectionSettings,
    lifespan: Lifespan,
    refusals: RefusalLog,
    routers: Sequence[APIRouter] = (),
    public: bool = False,
    **documents: Any,
) -> FastAPI:
    """Create the ASGI application of a service.

    Args:
        name: the service's name.
        settings: limits of connections and requests.
        lifespan: opens adapters and consumers and closes them in reverse. It registers them at `app.state.probes`
            and waits for dependencies with `app.state.startup`.
        refusals: the record of refused requests.
        routers: the service's own routes.
        public: the service is exposed to clients, so it assigns every request id itself. A service behind the gateway
            keeps the id that a trusted proxy, the gateway, sends.
        documents: FastAPI's arguments that describe the API (`title`, `openapi_url`, ...). Without it no document is
            served.
    """
    startup = Startup()
    app = FastAPI(
        **(_BASICS | {"title": name} | documents),
        lifespan=_watched(lifespan, settings),
        middleware=[
            Middleware(Outermost, proxies=Proxies(settings.trusted_proxies), public=public),
            Middleware(StartupGate, startup=startup),
        ],
    )
    app.state.settings = settings
    app.state.startup = startup
    app.state.probes = Probes()
    app.state.probes.watch(startup)
    app.state.refusals = refusals
    for router in routers:
        app.include_router(router)
    return app


def create_probes(app: FastAPI) -> FastAPI:
    """Create the application that serves a service's probes and metrics on a separate port.

    Args:
        app: the result of `create_app`.
    """
    served = FastAPI(
        **_BASICS,
        middleware=[Middleware(Outermost, proxies=Proxies(()), public=True)],
    )
    served.state = app.state
    served.include_router(probes.router)
    return served


def _watched(
    lifespan: Lifespan, settings: ConnectionSettings
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Add the server's limits to the lifespan, and end an unhealthy process so that it is restarted."""

    @asynccontextmanager
    async def watched(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with cast(Startup, app.state.startup).opening(lifespan(app)):
            watching = asyncio.create_task(_end_when_unhealthy(app.state.probes))
            try:
                yield {"connection_limits": ConnectionLimits(settings)}  # read by the server for every connection
            finally:
                watching.cancel()
                await tracing.stop()

    return watched


async def _end_when_unhealthy(conditions: Probes) -> None:
    while conditions.healthy:  # noqa: ASYNC110 # many parts are checked, and none of them signals its death
        await asyncio.sleep(HEALTH_PERIOD_SECONDS)
    _log.critical(
        "process_unhealthy",
        cause="a background loop died",
        next_step="the process shuts down, and the supervisor restarts it",
    )
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """Run `call` on SIGTERM as well, before the server waits for responses in progress."""
    loop = asyncio.get_running_loop()
    server = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        if callable(server):
            server(number, frame)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, server)
