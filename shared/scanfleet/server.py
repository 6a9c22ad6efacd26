"""The process of a service: `python -m scanfleet.server job-orchestrator`.

Two servers share its event loop. One serves the routes of the service, if it has any. The other serves probes and metrics on a
separate port, from before the service's dependencies are opened until they are closed, so that readiness is answered while the
process drains.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from importlib import import_module
from types import FrameType
from typing import Any, Final, cast

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.server import ServerState

from scanfleet.front import BoundedProtocol, Front
from scanfleet.service import Probes, create_probes
from scanfleet.settings import ApiSettings, InternalApiSettings, ServerSettings
from scanfleet.tls import server_context

DRAIN_SECONDS: Final = 5  # for responses in progress; the rest of the supervisor's grace period is for work in progress
PROBE_CONNECTIONS: Final = 64  # enough for a kubelet, Prometheus and an autoscaler with one each

_SHARED: Final[dict[str, Any]] = {
    "http": BoundedProtocol,
    "ws": "none",
    "log_config": None,
    "access_log": False,  # `scanfleet.service` logs each request with its route and request id
    "server_header": False,
    "proxy_headers": False,
}

_log = structlog.stdlib.get_logger(__name__)


class Server(uvicorn.Server):
    """Both servers of one service.

    Args:
        app: of `scanfleet.service.create_app`, with `ServerSettings`.

    Raises:
        ConfigurationError: a file for TLS cannot be read, or has invalid content.
    """

    def __init__(self, app: FastAPI) -> None:
        settings = cast(ServerSettings, app.state.settings)
        super().__init__(
            uvicorn.Config(app, host=settings.host, lifespan="on", timeout_graceful_shutdown=DRAIN_SECONDS, **_SHARED)
        )
        self._api = settings if isinstance(settings, ApiSettings) else None
        self._tls = server_context(settings) if isinstance(settings, InternalApiSettings) else None
        self._handshake_seconds = settings.header_seconds
        self._probes = cast(Probes, app.state.probes)
        self._probes.stage = "starting"
        self._probe_server = _ProbeServer(create_probes(app), settings)

    @property
    def probe_port(self) -> int:
        """The port that serves probes and metrics."""
        return self._probe_server.port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 # uvicorn's signature
        """Listen for probes, open the service's dependencies, then listen for requests."""
        await self._probe_server.start()
        await super().startup([])  # no listener: uvicorn's has no setting for the timeout of TLS handshakes, a minute
        if self._api:
            self.started = False
            self.servers = [await self._listen(self._api.api_port)]
            self.started = True
        if not self.should_exit:
            self._probes.stage = ""

    async def _listen(self, port: int) -> asyncio.Server:
        config = self.config
        try:
            return await asyncio.get_running_loop().create_server(
                lambda: BoundedProtocol(config, self.server_state, self.lifespan.state),
                config.host,
                port,
                backlog=config.backlog,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_seconds if self._tls else None,
            )
        except OSError as error:
            _log.critical("cannot listen for requests: set SCANFLEET_API_PORT to a free port", error=str(error))
            await self.lifespan.shutdown()
            self._probe_server.stop()
            sys.exit(STARTUP_FAILURE)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Report unready from the first signal on."""
        super().handle_exit(sig, frame)
        self._probes.stage = "ending"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish requests and close the service's dependencies, while probes are still answered."""
        self._probes.stage = "ending"
        await super().shutdown(sockets)
        self._probe_server.stop()


class _ProbeServer:
    """Serves probes and metrics with the same protocol and limits, except the maximum number of connections."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        self._config = uvicorn.Config(app, host=settings.host, port=settings.probe_port, lifespan="off", **_SHARED)
        limits = {"max_connections": PROBE_CONNECTIONS, "max_connections_per_address": PROBE_CONNECTIONS}
        self._front = Front(settings.model_copy(update=limits))
        self._state = ServerState()
        self._listener: asyncio.Server

    @property
    def port(self) -> int:
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        config = self._config
        config.load()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: BoundedProtocol(config, self._state, {"front": self._front}), config.host, config.port
            )
        except OSError as error:
            _log.critical("cannot listen for probes: set SCANFLEET_PROBE_PORT to a free port", error=str(error))
            sys.exit(STARTUP_FAILURE)

    def stop(self) -> None:
        self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()


def main() -> None:
    """Run a service until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m scanfleet.server", description=__doc__)
    parser.add_argument("service", help="its name, as in the architecture")
    package = parser.parse_args().service.replace("-", "_")
    with contextlib.suppress(KeyboardInterrupt):
        Server(import_module(f"{package}.main").create_app()).run()


if __name__ == "__main__":
    main()
