"""The process of a service: `python -m scanfleet.runtime.server job-orchestrator`.

Two servers share its event loop. One serves the routes of the service, if it has any. The other serves probes and metrics on a
separate port, from before the service's dependencies are opened until they are closed, so that readiness is answered while the
process drains.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import socket
import ssl
import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any, Final, cast

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.server import ServerState

from scanfleet.runtime.http.connection_limits import BoundedProtocol, ConnectionLimits, Handshake
from scanfleet.runtime.http.probes import Probes
from scanfleet.runtime.service import create_probes
from scanfleet.runtime.settings import ApiSettings, InternalApiSettings, ServerSettings
from scanfleet.runtime.tls import server_context

DRAIN_SECONDS: Final = 5  # timeout for responses in progress; the rest of the grace period is for work in progress
ACCEPT_RETRY_SECONDS: Final = 1.0  # delay while no descriptor is free
PROBE_CONNECTIONS: Final = 64  # enough for a kubelet, Prometheus and an autoscaler with one each

_SHARED: Final[dict[str, Any]] = {
    "http": BoundedProtocol,
    "ws": "none",
    "log_config": None,
    "access_log": False,  # `scanfleet.runtime.http.middleware` logs each request with its route and request id
    "server_header": False,
    "proxy_headers": False,
    "reset_contextvars": True,  # a pipelined request would log the context of the one before it
}

_log = structlog.stdlib.get_logger(__name__)


class Server(uvicorn.Server):
    """Both servers of one service.

    Args:
        app: of `scanfleet.runtime.service.create_app`, with `ServerSettings`.

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
        await super().startup([])  # no listener: uvicorn's does not bound TLS handshakes
        if self._api:
            self.started = False
            self.servers = [await self._listen(self._api.api_port)]
            self.started = True
        if not self.should_exit:
            # What exists now stays until the end: examining it would take up to 80 ms of each full garbage collection.
            gc.collect()
            gc.freeze()
            self._probes.stage = ""

    async def _listen(self, port: int) -> asyncio.AbstractServer:
        config = self.config

        def protocol() -> BoundedProtocol:
            return BoundedProtocol(config, self.server_state, self.lifespan.state)

        try:
            if self._tls is not None:
                listener = _listen(config.host, port, config.backlog)
                return _TlsServer(listener, protocol, self._tls, self.lifespan.state["connection_limits"])
            return await asyncio.get_running_loop().create_server(protocol, config.host, port, backlog=config.backlog)
        except OSError as error:
            _log.critical(
                "api_port_unavailable", port=port, error=str(error), next_step="set SCANFLEET_API_PORT to a free port"
            )
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


class _TlsServer(asyncio.AbstractServer):
    """Accepts connections and completes their TLS handshakes.

    asyncio's own server calls the protocol only after the handshake, so handshakes in progress would not count against any limit.

    Args:
        listener: the listening socket, which this server closes.
        protocol: returns the protocol of a connection.
        context: of TLS.
        limits: those of all connections.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], BoundedProtocol],
        context: ssl.SSLContext,
        limits: ConnectionLimits,
    ) -> None:
        self.sockets = (listener,)
        self._listener = listener
        self._protocol = protocol
        self._context = context
        self._limits = limits
        self._handshakes: dict[Handshake, asyncio.Task[None]] = {}
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Stop accepting, and end the handshakes in progress."""
        self._accepting.cancel()
        for handshake in self._handshakes:
            handshake.abort()

    async def wait_closed(self) -> None:
        await asyncio.wait([self._accepting, *self._handshakes.values()])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, (host, *_) = await loop.sock_accept(self._listener)
                except ConnectionError:
                    continue  # the client has closed it already
                except OSError as error:
                    _log.error("accept_failed", error=str(error), retry_seconds=ACCEPT_RETRY_SECONDS)
                    await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                    continue
                handshake = Handshake(accepted, host)
                if self._limits.admit(handshake):
                    self._handshakes[handshake] = asyncio.create_task(self._secure(accepted, handshake))
                else:
                    handshake.refuse()
        finally:
            self._listener.close()

    async def _secure(self, accepted: socket.socket, handshake: Handshake) -> None:
        def protocol() -> BoundedProtocol:
            made = self._protocol()
            made.handshake = handshake
            return made

        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, accepted, ssl=self._context, ssl_handshake_timeout=self._limits.header_seconds
            )
        except OSError as error:
            _log.info("tls_handshake_failed", client=handshake.address, error=str(error))
        finally:
            self._limits.release(handshake)
            del self._handshakes[handshake]


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.create_server((host, port), family=family, backlog=backlog)
    listener.setblocking(False)
    return listener


class _ProbeServer:
    """Serves probes and metrics with the same protocol and limits, except the maximum number of connections."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        self._config = uvicorn.Config(app, host=settings.host, port=settings.probe_port, lifespan="off", **_SHARED)
        limits = {"max_connections": PROBE_CONNECTIONS, "max_connections_per_address": PROBE_CONNECTIONS}
        self._limits = ConnectionLimits(settings.model_copy(update=limits))
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
                lambda: BoundedProtocol(config, self._state, {"connection_limits": self._limits}),
                config.host,
                config.port,
            )
        except OSError as error:
            _log.critical(
                "probe_port_unavailable",
                port=config.port,
                error=str(error),
                next_step="set SCANFLEET_PROBE_PORT to a free port",
            )
            sys.exit(STARTUP_FAILURE)

    def stop(self) -> None:
        self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()


def main() -> None:
    """Run a service until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m scanfleet.runtime.server", description=__doc__)
    parser.add_argument("service", help="its name, as in the architecture")
    package = parser.parse_args().service.replace("-", "_")
    with contextlib.suppress(KeyboardInterrupt):
        Server(import_module(f"{package}.main").create_app()).run()


if __name__ == "__main__":
    main()
