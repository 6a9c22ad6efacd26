"""The limits of connections on real sockets, under uvicorn as it is deployed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import pytest
import uvicorn
import uvloop
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from scanfleet.runtime import service
from scanfleet.runtime.http import connection_limits
from scanfleet.runtime.http.connection_limits import BoundedProtocol
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.security.audit import Refusals
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

LIMIT_SECONDS: Final = 30.0  # until any of this has happened
HEAD: Final = b"GET /hello HTTP/1.1\r\nHost: x\r\n"
DOCUMENT_BYTES: Final = 160_000  # as of the gateway's description of its API
CHUNKED: Final = b"PUT /thing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

router = APIRouter()


@router.get("/hello")
async def hello(request: Request) -> int:
    return len(request.headers)


@router.put("/thing")
async def read_whole(request: Request) -> int:
    return len(await request.body())


@router.get("/wait")
async def wait(request: Request) -> None:
    request.app.state.asked += 1
    await request.app.state.answer.wait()


@router.get("/watch")
async def watch(request: Request) -> None:
    request.app.state.asked += 1
    while (await request.receive())["type"] != "http.disconnect":
        pass
    request.app.state.answer.set()


@router.get("/document")
async def document(request: Request) -> Response:
    request.app.state.asked += 1
    return Response(b"x" * DOCUMENT_BYTES)


@router.get("/buffered")
async def buffered() -> Response:
    return Response(b"x" * 32_000_000)


@router.get("/large")
async def large(request: Request) -> StreamingResponse:
    request.app.state.asked += 1

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1_000):
            yield b"x" * 65_536

    return StreamingResponse(body())


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection of a client, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> Answer:
        async with asyncio.timeout(LIMIT_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            line, *lines = head.rstrip().split("\r\n")
            headers = dict(each.split(": ", 1) for each in lines)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(line.split()[1]), headers, body)

    async def ask(self, data: bytes) -> Answer:
        self.send(data)
        return await self.answer()

    async def closed(self) -> bool:
        """Whether the server closes the connection without a further byte."""
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                return await self.reader.read() == b""
        except ConnectionError:
            return True

    async def flood(self, piece: bytes) -> int:
        """Send the same again and again until the server does not take it any more; answers the count of bytes."""
        sent = 0
        async with asyncio.timeout(LIMIT_SECONDS):
            try:
                while True:
                    self.send(piece)
                    await self.writer.drain()
                    sent += len(piece)
            except ConnectionError:
                return sent


class Served:
    """A server, and the connections that a test opens to it."""

    def __init__(self, app: FastAPI, server: uvicorn.Server, address: tuple[str, int]) -> None:
        self.app = app
        self._server = server
        self._address = address
        self.opened: list[Connection] = []
        self.unread: list[socket.socket] = []

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    @property
    def protocols(self) -> list[BoundedProtocol]:
        return [each for each in self._server.server_state.connections if isinstance(each, BoundedProtocol)]

    @property
    def paused(self) -> list[BoundedProtocol]:
        return [each for each in self.protocols if each.flow.write_paused]

    async def send_and_read_nothing(self, data: bytes, count: int) -> None:
        for _ in range(count):
            client = socket.socket()
            self.unread.append(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, self._address)
            await asyncio.get_running_loop().sock_sendall(client, data)

    async def connect(self, source: str = "127.0.0.1") -> Connection:
        connection = Connection(*await asyncio.open_connection(*self._address, local_addr=(source, 0)))
        self.opened.append(connection)
        return connection


@asynccontextmanager
async def serve(**settings: Any) -> AsyncIterator[Served]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield

    app = service.create_app(
        name="test",
        refusals=Refusals("test"),
        settings=ConnectionSettings(**settings),
        lifespan=lifespan,
        routers=[router],
    )
    app.state.asked = 0
    app.state.answer = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, http=BoundedProtocol, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        served = Served(app, server, listening.getsockname())
        try:
            await until(lambda: server.started)
            yield served
        finally:
            app.state.answer.set()
            for connection in served.opened:
                connection.writer.transport.abort()
            for client in served.unread:
                client.close()
            server.should_exit = True
            await serving


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


def lines(count: int, size: int = 1) -> bytes:
    return b"".join(b"X-%03d: %b\r\n" % (number, b"v" * size) for number in range(count))


@pytest.mark.proves("A19")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * connection_limits.MAX_URL_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (HEAD + b"X: " + b"v" * connection_limits.MAX_HEADER_BYTES + b"\r\n\r\n", 431),
        (HEAD + lines(connection_limits.MAX_HEADER_LINES) + b"\r\n", 431),
        (HEAD + lines(50, 400) + b"\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\r\n" * 20_000, 431),
        (CHUNKED + b"1;" + b"x" * 40_000, 431),
        (CHUNKED + b"0\r\n" + b"X: " + b"x" * 40_000, 431),
    ],
    ids=["url", "header", "lines", "headers", "nonsense", "length", "bytes", "line breaks", "chunk", "trailer"],
)
async def test_request_over_a_limit_is_refused_and_closed(served: Served, request_: bytes, status: int) -> None:
    """A request that exceeds a limit, or is not HTTP, is answered once in the common error format, and the connection ends."""
    connection = await served.connect()
    answer = await connection.ask(request_)
    assert (answer.status, list(answer.json)) == (status, ["error"])
    assert (answer.headers["content-type"], answer.headers["connection"]) == ("application/json", "close")
    assert await connection.closed()


async def test_request_at_every_limit_is_served(served: Served) -> None:
    """A request line, headers and a count of lines at their limits are served, and so is the next request."""
    connection = await served.connect()
    for _ in range(2):
        url = b"GET /" + b"x" * (connection_limits.MAX_URL_BYTES - 1) + b" HTTP/1.1\r\nHost: x\r\n"
        answer = await connection.ask(url + lines(connection_limits.MAX_HEADER_LINES - 1, 150) + b"\r\n")
        assert (answer.status, answer.json) == (404, {"error": "Not Found"})
    assert (
        await connection.ask(HEAD + lines(connection_limits.MAX_HEADER_LINES - 1) + b"\r\n")
    ).json == connection_limits.MAX_HEADER_LINES


@pytest.mark.proves("A19", "G11")
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"x" * 4_096),
        (HEAD + b"X: ", b"v" * 4_096),
        (HEAD, b"X: v\r\n" * 1_000),
        (CHUNKED + b"0\r\n", b"X: v\r\n" * 1_000),
    ],
    ids=["url", "header", "list", "trailers"],
)
async def test_endless_request_is_closed_after_a_bounded_number_of_bytes(
    served: Served, begin: bytes, piece: bytes
) -> None:
    """The server stops reading any endless part of a request after a bounded number of bytes."""
    connection = await served.connect()
    connection.send(begin)
    room = 16 << 20  # in the buffers of both sockets
    assert await connection.flood(piece) < connection_limits.LINGER_BYTES + room
    await until(lambda: served.connections == 0)


@pytest.mark.proves("A19")
async def test_headers_that_drip_are_answered_408() -> None:
    """A request whose headers are not complete in time is a 408, on a new connection and on one that was used before."""
    async with serve(header_seconds=0.3) as served:
        for before in (b"", HEAD + b"\r\n"):
            connection = await served.connect()
            if before:
                assert (await connection.ask(before)).status == 200
            answering = asyncio.create_task(connection.answer())
            for byte in HEAD * 1_000:
                connection.send(bytes([byte]))
                await asyncio.sleep(0.02)
                if answering.done():
                    break
            answer = await answering
            assert (answer.status, list(answer.json)) == (408, ["error"])
            assert await connection.closed()


@pytest.mark.proves("A19")
@pytest.mark.parametrize("before", [b"", b"\r\n"])
async def test_connection_without_a_request_is_closed(before: bytes) -> None:
    """A connection that sends nothing, or only line breaks, is closed without an answer."""
    async with serve(header_seconds=0.1) as served:
        connection = await served.connect()
        connection.send(before)
        assert await connection.closed()


@pytest.mark.proves("A16")
@pytest.mark.parametrize("announced", [True, False])
async def test_client_that_sends_on_reads_its_413(served: Served, announced: bool) -> None:
    """A client that sends all of a body that is too large before it reads still reads the 413, then the end."""
    connection = await served.connect()
    body = b"x" * (2 << 20)
    if announced:
        connection.send(b"PUT /thing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    else:
        connection.send(CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
    await connection.writer.drain()
    answer = await connection.answer()
    assert (answer.status, answer.json) == (413, {"error": "the body has more than 16384 bytes"})
    assert await connection.closed()


@pytest.mark.proves("A16")
async def test_client_that_sends_without_end_is_cut_off(served: Served) -> None:
    """A body without end is read for a bounded number of bytes after its 413, and then reset."""
    connection = await served.connect()
    connection.send(CHUNKED)
    room = 16 << 20  # in the buffers of both sockets
    assert await connection.flood(b"4000\r\n" + b"x" * 16_384 + b"\r\n") < connection_limits.LINGER_BYTES + room
    await until(lambda: served.connections == 0)


async def test_early_answer_keeps_the_connection(served: Served) -> None:
    """After an answer that came before the body was sent, the rest of the body is dropped and the next request is served."""
    connection = await served.connect()
    answer = await connection.ask(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 10)
    assert answer.status == 404
    connection.send(b"x" * 990)
    assert (await connection.ask(HEAD + b"\r\n")).status == 200


@pytest.mark.proves("A19")
async def test_early_answer_to_a_body_that_never_ends_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the rest of a body does not arrive after an early answer the connection is closed."""
    monkeypatch.setattr(connection_limits, "LINGER_SECONDS", 0.1)
    connection = await served.connect()
    assert (await connection.ask(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")).status == 404
    assert await connection.closed()


async def test_trailers_are_no_headers(served: Served) -> None:
    """A field after a chunked body is not added to the headers of the request."""
    connection = await served.connect()
    assert (await connection.ask(CHUNKED + b"1\r\nx\r\n0\r\nX-Forwarded-For: y\r\n\r\n")).json == 1
    assert (await connection.ask(HEAD + b"\r\n")).json == 1


UPGRADE: Final = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n"


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (HEAD + UPGRADE + b"\r\n", 3),
        (b"PUT /thing HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"Content-Length: 16350\r\n\r\n" + b"x" * 16_350, 16_350),
        (CHUNKED.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"\r\n") + b"4\r\nxxxx\r\n0\r\n\r\n", 4),
    ],
    ids=["no body", "length", "chunked"],
)
async def test_upgrade_is_ignored(served: Served, request_: bytes, found: int) -> None:
    """A request for another protocol is answered as HTTP, body included, and so are those behind it."""
    connection = await served.connect()
    assert (await connection.ask(request_)).json == found
    connection.send(request_ * 3 + HEAD + b"\r\n")
    for expected in (found, found, found, 1):
        assert (await connection.answer()).json == expected
    for byte in request_[:400]:
        connection.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await connection.ask(request_[400:])).json == found


async def test_connect_is_refused(served: Served) -> None:
    """A request for a tunnel is refused, and what follows is not parsed."""
    connection = await served.connect()
    answer = await connection.ask(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\nanything")
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert await connection.closed()


async def test_stream_with_a_request_behind_it_ends_with_its_client(served: Served) -> None:
    """A running request is notified when its client disconnects, also if another request is queued behind it."""
    connection = await served.connect()
    connection.send(b"GET /watch HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD + b"\r\n")
    await until(lambda: served.app.state.asked)
    connection.writer.transport.abort()
    await until(served.app.state.answer.is_set)


@pytest.mark.proves("A19")
async def test_pipelined_requests_are_answered_in_order_and_bounded(served: Served) -> None:
    """A few requests at once are answered in order; a thousand at once are not kept."""
    connection = await served.connect()
    connection.send((HEAD + b"\r\n" + HEAD + b"X: y\r\n\r\n") * (connection_limits.MAX_PIPELINED // 2))
    found = [(await connection.answer()).json for _ in range(connection_limits.MAX_PIPELINED)]
    assert found == [1, 2] * (connection_limits.MAX_PIPELINED // 2)
    connection.send((HEAD + b"\r\n") * 1_000)
    await until(lambda: served.connections == 0)


@pytest.mark.proves("A19")
async def test_bytes_of_waiting_requests_are_bounded(served: Served) -> None:
    """A connection with more bytes than the limit behind an unanswered request is closed."""
    connection = await served.connect()
    connection.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: served.app.state.asked)
    (protocol,) = served.protocols
    protocol.data_received(b"PUT /thing HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n" + b"x" * 30_000)
    assert not protocol.transport.is_closing()
    protocol.data_received(b"x" * 20_000)  # at once with the rest; later the kernel keeps it
    assert protocol.transport.is_closing()


async def test_steady_pipelining_is_not_limited_in_total(served: Served) -> None:
    """A client that always has requests outstanding may send more than the limit of waiting bytes."""
    connection = await served.connect()
    request = HEAD + b"X: " + b"y" * 500 + b"\r\n\r\n"
    connection.send(3 * request)
    for _ in range(2 * connection_limits.MAX_WAITING_BYTES // len(request)):
        assert (await connection.answer()).status == 200
        connection.send(request)


@pytest.mark.proves("A19")
async def test_connections_of_one_address_are_bounded() -> None:
    """At its limit an address loses its oldest idle connection to a new one; with none idle the new one is a 503."""
    async with serve(max_connections_per_address=3) as served:
        idle = await served.connect()
        busy = [await served.connect() for _ in range(2)]
        for connection in busy:
            connection.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.app.state.asked == 2)  # both
        newest = await served.connect()
        assert await idle.closed()
        newest.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.app.state.asked == 3)  # all three
        refused = await served.connect()
        answer = await refused.answer()
        assert (answer.status, answer.json) == (503, {"error": "too many connections; try again"})
        assert answer.headers["retry-after"] == "1"
        assert await refused.closed()
        other = await served.connect("127.0.0.2")
        assert (await other.ask(HEAD + b"\r\n")).status == 200
        served.app.state.answer.set()
        assert {(await connection.answer()).status for connection in (*busy, newest)} == {200}
        assert (await (await served.connect()).ask(HEAD + b"\r\n")).status == 200


@pytest.mark.proves("A19")
async def test_connections_of_trusted_proxy_have_no_limit_of_their_own() -> None:
    """A trusted proxy, whose connections are those of many clients, may have more than the limit of an address."""
    proxies = (ip_network("127.0.0.2"),)
    async with serve(max_connections_per_address=2, trusted_proxies=proxies) as served:
        for _ in range(4):
            connection = await served.connect("127.0.0.2")
            connection.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.app.state.asked == 4)
        served.app.state.answer.set()


@pytest.mark.proves("A19")
async def test_connections_of_all_addresses_are_bounded() -> None:
    """At the limit of all connections a new client takes the place of the oldest idle one of who has most."""
    async with serve(max_connections=10) as served:
        many = [await served.connect("127.0.0.3") for _ in range(8)]
        few = [await served.connect("127.0.0.2") for _ in range(2)]
        await until(lambda: served.connections == 10)  # all
        new = await served.connect()
        assert (await new.ask(HEAD + b"\r\n")).status == 200
        assert await many[0].closed()
        for connection in (*many[1:], *few):
            assert (await connection.ask(HEAD + b"\r\n")).status == 200


@pytest.mark.proves("A19")
async def test_client_that_reads_nothing_is_cut_off() -> None:
    """A client that reads nothing of an answer for the set time loses its connection, and the answer ends."""
    async with serve(stalled_seconds=0.3) as served:
        connection = await served.connect()
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is a read transport too
        connection.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.connections == 1)
        await until(lambda: served.connections == 0)


@pytest.mark.proves("A19")
async def test_client_that_reads_a_part_of_a_complete_answer_is_cut_off() -> None:
    """The timeout of a closing connection keeps running after the client has read part of the data."""
    async with serve(stalled_seconds=0.5) as served:
        connection = await served.connect()
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is a read transport too
        connection.send(b"GET /buffered HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await until(lambda: [each for each in served.protocols if each.flow.write_paused])
        (protocol,) = served.protocols
        assert protocol.transport.is_closing()
        protocol.resume_writing()  # as the transport does when little is left
        await until(lambda: served.connections == 0)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.proves("A19", "G11")
@pytest.mark.parametrize("path", [b"/document", b"/large"])
def test_unread_answers_have_bounded_memory(path: bytes) -> None:
    """600 connections that request two large answers each and read nothing take less than 48 MB."""

    async def growth() -> tuple[int, int]:
        async with serve() as served:
            before = resident()
            await served.send_and_read_nothing(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path * 2, 600)
            await until(lambda: served.app.state.asked >= 600)  # of every connection
            await until(lambda: len(served.paused) == served.connections <= connection_limits.MAX_UNREAD)
            transports = [each.transport.raw for each in served.paused]  # type: ignore[attr-defined] # of BoundedProtocol
            buffered = sum(transport.get_write_buffer_size() for transport in transports)
            return buffered, resident() - before

    assert max(uvloop.run(growth())) < 48 << 20  # as deployed; asyncio's own transports copy what they buffer


@pytest.mark.proves("A19")
async def test_request_behind_an_unread_answer_is_not_started(served: Served) -> None:
    """A request starts after its client has read the answer before it, whether it was sent at once or later."""
    connection = await served.connect()
    transport = connection.writer.transport
    transport.pause_reading()  # type: ignore[attr-defined] # it is a read transport too
    waiting = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.send(b"GET /buffered HTTP/1.1\r\nHost: x\r\n\r\n" + waiting)
    await until(lambda: served.paused)
    connection.send(waiting)
    await until(lambda: served.protocols[0].pipeline)
    assert served.app.state.asked == 0
    transport.resume_reading()  # type: ignore[attr-defined] # as above
    assert len((await connection.answer()).body) == 32_000_000
    await until(lambda: served.app.state.asked == 1)
    served.app.state.answer.set()
    assert [(await connection.answer()).status for _ in range(2)] == [200, 200]


@pytest.mark.proves("A19")
@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
async def test_unread_answers_keep_no_new_connection_out(limit: str) -> None:
    """At a limit of connections that are all unread answers, a new connection takes the place of the one unread for longest."""
    async with serve(**{limit: 10}) as served:
        await served.send_and_read_nothing(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", 10)
        await until(lambda: len(served.paused) == 10)  # all
        (longest,) = (each for each in served.protocols if each.client == served.unread[0].getsockname())
        new = await served.connect()
        assert (await new.ask(HEAD + b"\r\n")).status == 200
        assert longest not in served.protocols
        assert len(served.paused) == 9  # the others


@pytest.mark.proves("A19")
async def test_slow_reader_gets_all_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of unread answers, the client with most of them loses one, not a slow reader that was there before."""
    monkeypatch.setattr(connection_limits, "MAX_UNREAD", 4)
    async with serve() as served:
        slow = await served.connect("127.0.0.2")
        slow.send(b"GET /large HTTP/1.0\r\nHost: x\r\n\r\n")
        await until(lambda: served.paused)
        await served.send_and_read_nothing(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", 8)
        await until(lambda: len(served.paused) == served.connections == 4)
        assert len(await slow.reader.read()) > 65_536_000
