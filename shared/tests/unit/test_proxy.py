"""The proxy of the tests: what it leaves behind would be another test's failure."""

from __future__ import annotations

import asyncio
import socket

from scanfleet.testing.proxy import Proxy


async def test_a_connection_that_is_cut_before_it_was_taken_up_is_closed() -> None:
    """A cut ends every connection, one whose other end was not yet looked for too."""
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        proxy = Proxy("127.0.0.1", 1)
        proxy._accept(reader, writer)
        await proxy.cut()
        assert writer.transport.is_closing()
