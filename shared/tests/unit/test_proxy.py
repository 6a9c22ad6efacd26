"""The proxy of the tests: what it leaves behind would be another test's failure."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from scanfleet_testing.proxy import Proxy, proxy

LIMIT_SECONDS = 10.0  # for what comes at once


async def test_cut_closes_a_connection_without_an_upstream() -> None:
    """A cut closes every connection, also one whose upstream connection is not open yet."""
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        between = Proxy("127.0.0.1", 1)
        between._accept(reader, writer)
        await between.cut()
        assert writer.transport.is_closing()


@pytest.mark.parametrize("steps", range(5))
async def test_proxy_closes_connections_accepted_while_it_begins_to_refuse(steps: int) -> None:
    """A connection that was accepted but not started is closed like any other."""
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    async with proxy("127.0.0.1", 1) as between:
        with socket.create_connection(("127.0.0.1", between.port), LIMIT_SECONDS) as caller:
            for _ in range(steps):
                await asyncio.sleep(0)
            await between.refuse()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(caller.recv, 1) == b""
    assert not faults
