"""A TCP proxy that stands between a service and what it depends on, and has bad days on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_PIECE: Final = 1 << 16  # bytes moved at once


class Proxy:
    """Passes bytes to `host:port` and back until told otherwise.

    Attributes:
        port: where it listens, on 127.0.0.1.
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
        """Cut every connection and refuse new ones, as a machine whose process has died."""
        self._refusing = True
        server, self._server = self._server, None
        if server is not None:
            # A server that closes between accepting a connection and beginning it loses the socket: accept no more first.
            for listening in server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            await asyncio.sleep(0)
            server.close()
        await self.cut()
        if server is not None:
            await server.wait_closed()

    def swallow(self) -> None:
        """Take connections and bytes and answer nothing, as a machine that hangs."""
        self._open.clear()

    def delay(self, seconds: float) -> None:
        """Keep every piece that goes either way for so long, as a network or a machine that has become slow."""
        self._delay = seconds

    async def cut(self) -> None:
        """Break the connections there are; new ones are taken."""
        links = dict(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        await asyncio.gather(*map(_abort, links.values()))

    async def heal(self) -> None:
        """Pass everything on again, on the same port."""
        self._refusing = False
        self._delay = 0.0
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:  # it came while we closed
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
            return  # nobody behind us: the caller sees its connection end
        ways = [asyncio.create_task(self._pass(*way)) for way in ((reader, up_writer), (up_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await _abort(up_writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                await asyncio.sleep(self._delay)
                await self._open.wait()
                writer.write(piece)
                await writer.drain()


async def _abort(writer: asyncio.StreamWriter) -> None:
    """Return when the connection is gone: a loop that ends earlier would leave its socket open."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    """A healthy proxy to `host:port`."""
    made = Proxy(host, port)
    await made.heal()
    try:
        yield made
    finally:
        await made.refuse()
