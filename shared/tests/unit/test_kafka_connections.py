"""A request on a connection that the broker has just closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import conn
from aiokafka.errors import KafkaConnectionError

from scanfleet.kafka.connections import Connection, install


class Request:
    """A request without content."""

    def prepare(self, _versions: object) -> Request:
        return self

    def build_request_header(self, **_fields: Any) -> Request:
        return self

    def encode(self) -> bytes:
        return b""


class Closed:
    """A writer as uvloop's whose transport was closed."""

    def write(self, _data: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    def close(self) -> None:
        pass


async def test_request_on_a_closed_connection_is_a_connection_error() -> None:
    """The client retries it on a new connection; the error of its own class would end the client's tasks."""
    for make, raised in ((Connection, KafkaConnectionError), (Connection.__base__, RuntimeError)):
        for name in ("send", "_send_sasl_token"):
            connection = make("127.0.0.1", 9092)
            connection._reader, connection._writer = asyncio.StreamReader(), Closed()  # without a broker
            connection._read_task = asyncio.create_task(asyncio.sleep(0))
            with pytest.raises(raised, match="the handler is closed"):
                getattr(connection, name)(Request() if name == "send" else b"")
            assert connection.connected() is (make is not Connection)
            connection.close()


def test_all_clients_use_the_connections_after_their_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client makes its connections by the class that its module names."""
    monkeypatch.setattr(conn, "AIOKafkaConnection", Connection.__base__)
    install()
    assert conn.AIOKafkaConnection is Connection
    assert "AIOKafkaConnection" in conn.create_conn.__code__.co_names
