"""Connections to the services, against a server that records the bytes it receives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx2
import pytest

from api_gateway.connections import connect
from api_gateway_testing.gateway import Gateway

pytestmark = pytest.mark.integration

LIMIT_SECONDS = 10.0  # until any of this has happened
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=1\r\n\r\nok"


class Server:
    """Answers the requests of all connections with these bytes, one after another; None closes the connection."""

    def __init__(self, answers: Sequence[bytes | None]) -> None:
        self.url = ""
        self.requests: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.closed = asyncio.Event()
        self._answers = iter(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head)
                if length := re.search(rb"content-length: (\d+)", head.lower()):
                    self.bodies.append(await reader.readexactly(int(length[1])))
                if (answer := next(self._answers)) is None:
                    break
                writer.write(answer)
                if b"connection: close" in answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            writer.close()


@asynccontextmanager
async def serving(*answers: bytes | None) -> AsyncIterator[Server]:
    server = Server(answers)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            yield server
    finally:
        listener.close()


async def read(connections: httpx2.AsyncBaseTransport, url: str) -> httpx2.Response:
    answer = await connections.handle_async_request(httpx2.Request("GET", url))
    try:
        await answer.aread()
    finally:
        await answer.aclose()
    return answer


async def test_request_line_is_sent_unchanged() -> None:
    """The path and the query keep their escapes, and no cookie of an earlier answer is sent."""
    async with serving(WHOLE, WHOLE) as server, connect(Gateway().settings()) as connections:
        target = "/api/v1/task?status%5B%5D=a,b&q=%41%2b+c"
        for _ in range(2):
            answer = await read(connections, server.url + target)
        assert (answer.status_code, answer.content) == (200, b"ok")
        assert [head.partition(b"\r\n")[0].decode() for head in server.requests] == [f"GET {target} HTTP/1.1"] * 2
        assert not any(b"cookie" in head.lower() for head in server.requests)
        assert server.connections == 1


async def test_body_cut_in_the_middle_is_an_error() -> None:
    """A connection that ends before the length of the answer is reached is not the end of the answer."""
    cut = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\nconnection: close\r\n\r\nhalf"
    async with serving(cut) as server, connect(Gateway().settings()) as connections:
        with pytest.raises(httpx2.TransportError):
            await read(connections, server.url)


async def test_service_that_stalls_is_an_error() -> None:
    """A service that sends neither an answer nor the rest of one within the timeout is unavailable."""
    begun = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"
    async with serving(b"", begun) as server, connect(Gateway().settings(upstream_seconds=0.2)) as connections:
        for _ in range(2):
            with pytest.raises(httpx2.TransportError, match="imeout"):
                await read(connections, server.url)


async def test_answer_that_is_not_http_is_an_error() -> None:
    """Bytes that are no HTTP answer, and a connection closed without one, are errors of the transport."""
    async with serving(b"SSH-2.0\r\n\r\n", None, None) as server, connect(Gateway().settings()) as connections:
        for _ in range(2):
            with pytest.raises(httpx2.TransportError):
                await read(connections, server.url)
        assert len(server.requests) == 3  # a GET is sent again


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
async def test_change_after_a_closed_connection_is_not_repeated(method: str) -> None:
    """A change may have been executed before the connection ended; a second one would be answered 404 or 412."""
    async with serving(None, WHOLE) as server, connect(Gateway().settings()) as connections:
        with pytest.raises(httpx2.TransportError):
            await connections.handle_async_request(httpx2.Request(method, server.url, content=b"{}"))
        assert len(server.requests) == 1


async def test_headers_and_body_are_sent_unchanged() -> None:
    """Each header arrives once, in UTF-8, and the body after it."""
    sent = {"if-match": '"é"', "content-type": "application/json", "accept-encoding": "identity"}
    async with serving(WHOLE) as server, connect(Gateway().settings()) as connections:
        request = httpx2.Request("PUT", server.url, headers=httpx2.Headers(sent, encoding="utf-8"), content=b'{"a": 1}')
        await (await connections.handle_async_request(request)).aclose()
        lines = server.requests[0].decode().lower().splitlines()
        assert all(lines.count(f"{name}: {value}") == 1 for name, value in sent.items())
        assert sum(line.startswith(tuple(sent)) for line in lines) == len(sent)
        assert server.bodies == [b'{"a": 1}']


async def test_answer_that_is_closed_early_closes_its_connection() -> None:
    """A client that disconnects ends the answer of the service too, and its connection is not used again."""
    long = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\npart"
    async with serving(long, WHOLE) as server, connect(Gateway().settings()) as connections:
        answer = await connections.handle_async_request(httpx2.Request("GET", server.url))
        await answer.aclose()
        await server.closed.wait()
        assert (await read(connections, server.url)).content == b"ok"
        assert server.connections == 2
