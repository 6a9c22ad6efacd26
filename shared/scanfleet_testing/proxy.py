"""A TCP proxy between a service and a dependency that injects faults."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_PIECE_BYTES: Final = 1 << 16  # moved at once


class Proxy:
    """Forwards bytes to and from `host:port` until a fault is injected.

    Attributes:
        port: the port on 127.0.0.1 on which it listens.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = host, port
        self._server: asyncio.Server | None = None
        self._refusing = False
        self._links: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._delay = 0.0
        self.port = 0

    async def refuse(self) -> None:
        """Cut every connection and refuse new ones, like a host whose process has died."""
        self._refusing = True
        server, self._server = self._server, None
        if server is not None:
            # Stop accepting first: a server that closes between accepting a connection and starting it loses the
            # socket.
            for listening in server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            await asyncio.sleep(0)
            server.close()
        await self.cut()
        if server is not None:
            await server.wait_closed()

    def swallow(self) -> None:
        """Accept connections and bytes but answer nothing, like a host that hangs."""
        self._open.clear()

    def delay(self, seconds: float) -> None:
        """Delay every piece in both directions, like a slow network or host."""
        self._delay = seconds

    async def cut(self) -> None:
        """Break the current connections; accept new ones."""
        links = dict(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        await asyncio.gather(*map(_abort, links.values()))

    async def heal(self) -> None:
        """Forward everything again, on the same port."""
        self._refusing = False
        self._delay = 0.0
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:  # accepted while closing
            writer.transport.abort()
            return
        link = asyncio.create_task(self._link(reader, writer))
        self._links[link] = writer

        def end(link: asyncio.Task[None]) -> None:  # also of one that was cancelled before its first step
            del self._links[link]
            writer.transport.abort()

        link.add_done_callback(end)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            return  # no upstream server: close the client's connection
        ways = [asyncio.create_task(self._pass(*way)) for way in ((reader, up_writer), (up_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await _abort(up_writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                await asyncio.sleep(self._delay)
                await self._open.wait()
                writer.write(piece)
                await writer.drain()


async def _abort(writer: asyncio.StreamWriter) -> None:
    """Abort the connection and wait until it is closed: a loop that ends earlier would leave its socket open."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    """Yield a proxy to `host:port` without a fault."""
    made = Proxy(host, port)
    await made.heal()
    try:
        yield made
    finally:
        await made.refuse()
