"""Limit what a client may send and hold open before a service has examined its request.

uvicorn and its parser limit neither the size of a request line or of headers, nor the time in which they arrive, nor the number
of connections. `scanfleet.runtime.server` therefore runs every service with this protocol; `service.create_app` provides its
`ConnectionLimits` in the lifespan's state.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import resource
import socket
import struct
from collections.abc import Callable
from itertools import chain
from typing import Any, Final

import httptools
import structlog
from prometheus_client import Counter
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from scanfleet.runtime.http.proxies import Proxies, client_network
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.runtime.tls import names
from scanfleet.services import GATEWAY

MAX_URL_BYTES: Final = 8_192  # a list filter with a hundred ids takes a tenth of it
MAX_HEADER_BYTES: Final = 16_384  # the largest tokens have 8 kB, and proxies add a few headers
MAX_HEADER_LINES: Final = 100
MAX_PIPELINED: Final = 4  # requests of one connection waiting behind an earlier one; common clients do not pipeline
MAX_WAITING_BYTES: Final = 32_768  # maximum total size of these requests
MAX_UNREAD: Final = 128  # connections whose clients do not read their answers at the moment; each takes up to 300 kB
UNREAD_BYTES: Final = 4_096  # beyond the kernel's buffer after which an answer counts as unread
UNSENT_BYTES: Final = 32_768  # in the kernel's buffer behind those in flight; without a limit it grows to 4 MB
LINGER_SECONDS: Final = 3.0  # time to read on after an early answer, so that a client that still sends can read it
LINGER_BYTES: Final = 16 << 20  # maximum discarded in that time, which takes about 10 ms
# Not for clients: both services behind a gateway, brokers, the database, files, nmap's pipes.
OWN_DESCRIPTORS: Final = 2_048

_SLICE: Final = 16_384  # passed to the parser at once, so that it buffers at most twice that of a header

_REFUSED: Final = Counter(
    "scanfleet_front_refused_total", "Requests and connections refused before any route.", ["status"]
)

_log = structlog.stdlib.get_logger(__name__)


class ConnectionLimits:
    """The limits of one server, and its connections by client.

    Args:
        settings: maximum number of connections, and their timeouts.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.header_seconds = settings.header_seconds
        self.stalled_seconds = settings.stalled_seconds
        self._most = _with_descriptors(settings.max_connections)
        self._most_per_address = settings.max_connections_per_address
        self._proxies = Proxies(settings.trusted_proxies)
        self._count = 0
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._unread: dict[Connection, None] = {}  # longest first

    def admit(self, connection: Connection) -> bool:
        """Count a new connection.

        At a limit, close the oldest idle connection of the client with the most connections, or of this client if it
        has reached its own limit; if none is idle, the one whose answer is unread for longest. So neither keeps a new one out.
        A trusted proxy has no limit of its own: its connections are those of many clients.

        Returns:
            False when the limit is reached: every connection that could be closed has a request in progress.
        """
        same = self._by_address.get(connection.address, {})
        if len(same) >= self._most_per_address and connection.host not in self._proxies:
            admitted = self._close_one(same)
        else:
            admitted = self._count < self._most or self._close_one(max(self._by_address.values(), key=len))
        if admitted:
            self._by_address.setdefault(connection.address, {})[connection] = None
            self._count += 1
        return admitted

    def release(self, connection: Connection) -> None:
        """Stop counting a connection, if it is counted."""
        self.resume(connection)
        same = self._by_address.get(connection.address, {})
        if connection in same:
            del same[connection]
            self._count -= 1
            if not same:
                del self._by_address[connection.address]

    def pause(self, connection: Connection) -> None:
        """Count a connection whose client does not read its answer at the moment.

        Beyond the maximum, abort the connection whose answer is unread for longest, of the client with the most of them.
        A client that reads slowly is counted again with each piece that it has read, so it outlasts one that reads nothing.
        """
        self._unread[connection] = None
        if len(self._unread) > MAX_UNREAD:
            count = collections.Counter(each.address for each in self._unread)
            longest = max(self._unread, key=lambda each: count[each.address])  # the first one of that client
            cause = f"more than {MAX_UNREAD} connections have unread answers, and this client has most of them"
            _log.info("connection_aborted", cause=cause, client=longest.address)
            self._close(longest)

    def resume(self, connection: Connection) -> None:
        """Stop counting a connection as one with an unread answer."""
        self._unread.pop(connection, None)

    def _close_one(self, connections: dict[Connection, None]) -> bool:
        idle = (each for each in connections if each.idle)
        unread = (each for each in self._unread if each in connections)
        closable = next(chain(idle, unread), None)
        if closable is None:
            return False
        self._close(closable)
        return True

    def _close(self, connection: Connection) -> None:
        self.release(connection)
        connection.abort()


class Handshake:
    """An accepted connection until its TLS handshake is complete.

    Args:
        accepted: its socket.
        host: the client's IP address.
    """

    idle: Final = True

    def __init__(self, accepted: socket.socket, host: str) -> None:
        self._socket = accepted
        self.host = host
        self.address = client_network(host)
        """See `BoundedProtocol.address`."""

    def abort(self) -> None:
        """End the connection: its handshake fails, which closes the socket."""
        with contextlib.suppress(OSError):  # the client has closed it
            self._socket.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Close a connection that was not admitted; without TLS it cannot be answered."""
        _REFUSED.labels(_UNAVAILABLE).inc()
        _log.info("connection_refused", cause="too many connections", client=self.address)
        self._socket.close()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits; its own refusals also have the form `{"error": ...}`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits: ConnectionLimits = app_state["connection_limits"]
        self.host = ""
        self.address = ""
        """The client's IPv4 address, or the /64 network of its IPv6 address."""

        self.handshake: Handshake | None = None
        """The connection as it was counted until now, if it uses TLS."""

        self._closing: _Transport
        self._socket: socket.socket
        self._in_head = False  # between the first byte of a request and the end of its headers
        self._receiving = False  # between the first byte of a request and its last
        self._header_bytes = 0
        self._header_lines = 0
        self._upgrading = False  # the parser skips the body of the current request
        self._running: RequestResponseCycle | None = None
        self._postponed: tuple[RequestResponseCycle, ASGI3Application] | None = None
        self._waiting_bytes = 0  # of requests behind the current one
        self._silent_bytes = 0  # since the parser's last callback, which it buffers
        self._refusal: tuple[int, str] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._linger_bytes = LINGER_BYTES

    @property
    def idle(self) -> bool:
        """Whether every completely received request has been answered, and the client has read the answers."""
        return not self._owes and not self.flow.write_paused

    @property
    def _owes(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def abort(self) -> None:
        """Close the connection at once and discard unsent data; the kernel's too, if the client does not read."""
        if self.flow.write_paused:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._closing.raw.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn declares it
        super().connection_made(transport)
        self.transport = self._closing = _Transport(transport, self._close)
        transport.set_write_buffer_limits(UNREAD_BYTES)
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.host = self.client[0] if self.client else ""
        self.address = client_network(self.host)
        if self.handshake is not None:
            self._limits.release(self.handshake)
        if not _accepted(transport):
            self._refuse(403, "the client's certificate is not that of a service which may send requests here")
        elif self._limits.admit(self):
            self._await_head()
        else:
            self._refuse(503, "too many connections; try again")

    def _should_upgrade(self) -> bool:
        return False  # no service supports upgrades; the request is answered as HTTP

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn notifies only the request that was received last
            self._running.message_event.set()
        self._limits.release(self)
        for timer in (self._head_timer, self._stall_timer, self._linger_timer):
            _cancel(timer)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._linger_timer is not None:
            self._linger_bytes -= len(data)
            if self._linger_bytes < 0:
                self.abort()
        if self.transport.is_closing():
            return
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the second one after a CONNECT request
            self._receiving = True  # everything that follows belongs to it
            self._refuse(*(self._refusal or (400, "the request is not valid HTTP/1.1")))
        if not self._owes and (self._in_head or not self._receiving):
            self._await_head()

    def _feed(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(data), _SLICE):
            piece = view[start : start + _SLICE]
            self._silent_bytes += len(piece)
            self._waiting_bytes = self._waiting_bytes + len(piece) if self.pipeline or self._postponed else 0
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._over(400, f"more than {MAX_WAITING_BYTES} bytes behind an unanswered request")
            while piece:
                try:
                    self.parser.feed_data(piece)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    self._parse_without_upgrade()
                    piece = piece[upgrade.args[0] :]
            if self._silent_bytes > MAX_HEADER_BYTES:
                self._over(431, _TOO_LARGE)

    def _parse_without_upgrade(self) -> None:
        """Parse the head of the request again without its Upgrade header, with which the parser would skip the body.

        Raises:
            httptools.HttpParserUpgrade: the request is a CONNECT.
        """
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        version = self.parser.get_http_version().encode()
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.parser.feed_data(head)

    def _over(self, status: int, error: str) -> None:
        """Stop the parser, from within one of its callbacks or outside."""
        self._refusal = (status, error)
        raise httptools.HttpParserError(error)

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self._in_head = self._receiving = True
        self._header_bytes = self._header_lines = self._silent_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._silent_bytes = 0
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._over(414, f"the request line has more than {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent_bytes = 0
        self._header_lines += 1
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES or self._header_lines > MAX_HEADER_LINES:
            self._over(431, _TOO_LARGE)
        if self._in_head:  # trailers after the body are ignored: the request has been checked by then
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        self._in_head = False
        _cancel(self._head_timer)
        self._head_timer = None
        if len(self.pipeline) >= MAX_PIPELINED:
            self._over(400, f"more than {MAX_PIPELINED} pipelined requests")
        self._upgrading = self.parser.should_upgrade()
        if not self._upgrading:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        self._receiving = False
        _cancel(self._linger_timer)
        self._linger_timer = None
        if not self._upgrading:
            super().on_message_complete()

    # Callbacks of the server

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self.flow.write_paused:
            self._postponed = cycle, app  # a second answer would wait in memory until the client has read the first one
        else:
            self._running = cycle
            self._waiting_bytes -= self._waiting_bytes // (len(self.pipeline) + 1)  # approximately its share
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._receiving and not self._owes:
            self._linger()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_if_stalled()
        self._limits.pause(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._limits.resume(self)
        if self._closing.is_closing():
            self._abort_if_stalled()  # it is not paused again for the data that is left
            return
        _cancel(self._stall_timer)
        self._stall_timer = None
        if self._postponed is not None:
            postponed, self._postponed = self._postponed, None
            self._start_asgi_task(*postponed)

    # End of a connection

    def _await_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._limits.header_seconds, self._late)

    def _late(self) -> None:
        if self._in_head:
            seconds = self._limits.header_seconds
            self._refuse(408, f"the request line and headers did not arrive within {seconds:g} seconds")
        else:
            self.transport.close()

    def _refuse(self, status: int, error: str) -> None:
        _REFUSED.labels(status).inc()
        _log.info("request_refused", status=status, error=error, client=self.address)
        if self._owes:
            if self._in_head or self.pipeline or self.cycle.response_started:
                self.abort()  # the answer to an earlier request is still pending
                return
            self.cycle.disconnected = True  # the handler that waits for the body stops without an answer
            self.cycle.message_event.set()
        body = json.dumps({"error": error}).encode()
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%b\r\n%b"
            % (STATUS_LINE[status], len(body), b"retry-after: 1\r\n" if status == _UNAVAILABLE else b"", body)
        )
        self.transport.close()

    def _close(self) -> None:
        """Close once the written data is sent; if the client is still sending, read on for a while first.

        Closing a connection with unread bytes resets it, and a reset makes the client discard an unread answer.
        """
        raw = self._closing.raw
        if self._receiving and raw.can_write_eof() and not raw.is_closing():
            raw.write_eof()
            self._linger()
        else:
            raw.close()
            if self._stall_timer is None:
                self._abort_if_stalled()

    def _abort_if_stalled(self) -> None:
        _cancel(self._stall_timer)
        self._stall_timer = self.loop.call_later(self._limits.stalled_seconds, self.abort)

    def _linger(self) -> None:
        self.flow.resume_reading()
        self._linger_timer = self._linger_timer or self.loop.call_later(LINGER_SECONDS, self.abort)


Connection = BoundedProtocol | Handshake


class _Transport(asyncio.Transport):
    """A transport with a replaced `close`."""

    def __init__(self, raw: asyncio.Transport, close: Callable[[], None]) -> None:
        super().__init__()
        self.raw = raw
        self._close = close
        self._closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.raw.write(data)

    def is_closing(self) -> bool:
        return self._closed or self.raw.is_closing()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._close()


_TOO_LARGE: Final = f"the headers have more than {MAX_HEADER_BYTES} bytes or {MAX_HEADER_LINES} lines"
_UNAVAILABLE: Final = 503
_RESET: Final = struct.pack("ii", 1, 0)  # wait for unsent data: yes, 0 seconds


def _accepted(transport: asyncio.Transport) -> bool:
    """Return whether the client may send requests: over TLS only the gateway, whose certificate the authority has signed."""
    if transport.get_extra_info("ssl_object") is None:
        return True
    return GATEWAY in names(transport.get_extra_info("peercert") or {})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _with_descriptors(connections: int) -> int:
    """Raise the process's limit of open files for so many connections, and return how many of them it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            connections = max(1, min(connections, soft // 2))
            _log.warning(
                "connection_limit_reduced",
                cause="the limit of open files is too low",
                files=soft,
                connections=connections,
            )
    return connections
