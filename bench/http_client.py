"""The gateway's connections to the services against the clients they could be made of, by CPU time per request."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from multiprocessing.connection import Connection

import aiohttp
import httpx2

from api_gateway.connections import KEEPALIVE_SECONDS, Connections
from bench.figures import Figure

REQUESTS = 1_600  # per client and round
AT_ONCE = 8
ROUNDS = 5  # the best of so many, in turns: other processes affect all sides equally
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 512\r\n\r\n" + b"x" * 512

Get = Callable[[], Awaitable[None]]


def measure() -> Iterator[Figure]:
    """Yield the figures."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        best = asyncio.run(_best(f"http://127.0.0.1:{ours.recv()}/"))
    finally:
        server.kill()
        server.join()
    for name, seconds in best.items():
        yield Figure(f"http_{name}_cpu_us", 1e6 * seconds, f"CPU of a GET with {name}, {AT_ONCE} at once")
    ratio = best["connections"] / best["httpx2"]
    yield Figure("http_connections_cpu", ratio, "CPU of a GET of the gateway / with httpx2's client", at_most=0.5)


async def _best(url: str) -> dict[str, float]:
    best: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        gets = {
            "connections": await stack.enter_async_context(_connections(url)),
            "aiohttp": await stack.enter_async_context(_aiohttp(url)),
            "httpx2": await stack.enter_async_context(_httpx2(url)),
        }
        for _ in range(ROUNDS):
            for name, get in gets.items():
                seconds = await _cpu_seconds(get)
                best[name] = min(seconds, best.get(name, seconds))
    return best


async def _cpu_seconds(get: Get) -> float:
    """Return the CPU time of this process per request."""

    async def several() -> None:
        for _ in range(REQUESTS // AT_ONCE):
            await get()

    began = time.process_time()
    await asyncio.gather(*(several() for _ in range(AT_ONCE)))
    return (time.process_time() - began) / REQUESTS


@asynccontextmanager
async def _connections(url: str) -> AsyncIterator[Get]:
    async with _session() as session:
        transport = Connections(session, head_seconds=10)

        async def get() -> None:
            answer = await transport.handle_async_request(httpx2.Request("GET", url))
            await answer.aread()
            await answer.aclose()

        yield get


@asynccontextmanager
async def _aiohttp(url: str) -> AsyncIterator[Get]:
    async with _session() as session:

        async def get() -> None:
            async with session.get(url) as answer:
                await answer.read()

        yield get


@asynccontextmanager
async def _httpx2(url: str) -> AsyncIterator[Get]:
    async with httpx2.AsyncClient(trust_env=False) as client:

        async def get() -> None:
            await client.get(url)

        yield get


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)


def _serve(pipe: Connection) -> None:
    """Answer every request on a free port, which is sent through the pipe."""
    asyncio.run(_answer(pipe))


async def _answer(pipe: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client has closed the connection
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
