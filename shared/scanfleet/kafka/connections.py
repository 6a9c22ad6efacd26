"""Connections on which a request fails if the broker has just closed them."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from aiokafka import conn
from aiokafka.errors import KafkaConnectionError


def install() -> None:
    """Make all clients of this process use `Connection`: they have no parameter for it."""
    conn.AIOKafkaConnection = Connection


class Connection(conn.AIOKafkaConnection):  # type: ignore[misc] # the client ships no types
    """The client's connection to one broker.

    A write to a transport that has just been closed raises RuntimeError in uvloop, where asyncio raises nothing and the client
    expects OSError. The error would end the client's task that updates the metadata, so that it would send nothing until the
    process restarts.
    """

    def send(self, request: Any, expect_response: bool = True) -> Awaitable[Any]:  # as in the client
        with self._closed():
            answer: Awaitable[Any] = super().send(request, expect_response)
            return answer

    def _send_sasl_token(self, payload: bytes, expect_response: bool = True) -> Awaitable[Any]:  # as in the client
        with self._closed():
            answer: Awaitable[Any] = super()._send_sasl_token(payload, expect_response)
            return answer

    @contextmanager
    def _closed(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close(conn.CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"the connection to {self.host}:{self.port} is closed: {error}") from error
