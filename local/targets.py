"""Servers on loopback addresses as scan targets; `python -m local.targets` runs them alone.

It uses the standard library only, so that the images, which do not contain it, can run its text.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from typing import Final

IDLE_TIMEOUT_SECONDS: Final = 30.0  # of a silent client

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def greeter(greeting: str, answer: str = "") -> Talk:
    """Return a server that sends a greeting and then answers every line with the same text."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting.encode())
        while await reader.readline():
            writer.write(answer.encode())
            await writer.drain()

    return talk


def responder(answer: str) -> Talk:
    """Return a server that waits for a request, answers once, and closes the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(answer.encode())

    return talk


HTTP: Final = responder(
    "HTTP/1.1 200 OK\r\nServer: nginx/1.26.2\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n"
    "Connection: close\r\n\r\nok\n"
)
REDIS: Final = responder("$40\r\n# Server\r\nredis_version:7.2.5\r\nos:Linux\r\n\r\n")
SSH: Final = greeter("SSH-2.0-OpenSSH_9.7p1 Debian-7\r\n")
SMTP: Final = greeter("220 mail.example.org ESMTP Postfix\r\n", "250 mail.example.org\r\n")
FTP: Final = greeter("220 (vsFTPd 3.0.5)\r\n", "530 Please login with USER and PASS.\r\n")

SERVERS: Final = (
    # Ports above 1023, so that the demo needs no privileges. Servers that wait for a request cost nmap six seconds per
    # group of hosts, so they are within the first 64 addresses: one group.
    (2121, FTP, ("127.9.8.21",)),
    (2222, SSH, ("127.9.8.1", "127.9.8.10", "127.9.8.200", "127.9.8.255")),
    (2525, SMTP, ("127.9.8.125",)),
    (6379, REDIS, ("127.9.8.10", "127.9.8.63")),
    (8000, HTTP, ("127.9.8.0", "127.9.8.10", "127.9.8.42")),
)
USUAL: Final = tuple(number for number, _, _ in SERVERS)


async def listen(numbers: Sequence[int] = USUAL) -> list[asyncio.Server]:
    """Start the servers; `numbers` replaces the default ports, in the order of `SERVERS`."""
    return [
        await asyncio.start_server(_polite(talk), host, number)
        for number, (_, talk, hosts) in zip(numbers, SERVERS, strict=True)
        for host in hosts
    ]


def _polite(talk: Talk) -> Talk:
    """Wrap `talk` for clients that disconnect at any time, as scanners do."""

    async def talk_to_anyone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_SECONDS):
                    await talk(reader, writer)
            except (ConnectionError, TimeoutError, ValueError):  # an overlong line is a ValueError
                return

    return talk_to_anyone


async def _serve() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await listen()
    print("listening", flush=True)  # the parent process waits for it
    await stopping.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
