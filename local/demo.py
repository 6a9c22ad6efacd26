"""The main job, shown: scan a /24 with a few real servers in it through the public API, and compare with plain nmap."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from local import ports
from local.client import FINAL, Client
from local.stack import Stack
from local.wait import until

SUBNET: Final = "127.9.8.0/24"
USER: Final = 7
SCAN_LIMIT: Final = 120.0  # seconds for the job; it takes about ten
IDLE: Final = 30.0  # seconds after which a server gives up on a silent client

console = Console()

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Row = tuple[str, int, str, str, str, str]
"""Address, port, protocol, state, service, version."""


def greeter(greeting: str, answer: str = "") -> Talk:
    """A server that speaks first and gives every line the same answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting.encode())
        while await reader.readline():
            writer.write(answer.encode())
            await writer.drain()

    return talk


def responder(answer: str) -> Talk:
    """A server that waits to be spoken to, answers once, and hangs up."""

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
    # Ports above 1023, so that the demo needs no rights. Servers that wait to be spoken to cost nmap six seconds in each
    # group of hosts that has one, so theirs are the first 64 addresses: one group.
    (2121, FTP, ("127.9.8.21",)),
    (2222, SSH, ("127.9.8.1", "127.9.8.10", "127.9.8.200", "127.9.8.255")),
    (2525, SMTP, ("127.9.8.125",)),
    (6379, REDIS, ("127.9.8.10", "127.9.8.63")),
    (8000, HTTP, ("127.9.8.0", "127.9.8.10", "127.9.8.42")),
)


def run(stack: Stack) -> int:
    """Show it, and leave the stack as it was found: running or not.

    Returns:
        The exit code: 0 when the job completed and plain nmap agrees.
    """
    with console.status("starting the local stack"):
        started = stack.up()
    try:
        with real_servers() as numbers:
            return _show(Client(stack.url, stack.token(USER)), ",".join(map(str, numbers)))
    finally:
        if started:
            with console.status("stopping the local stack"):
                stack.down()


def _show(user: Client, port_list: str) -> int:
    console.print(f"scanning {SUBNET} on the ports {port_list} through {user.http.base_url}")
    job_id = user.scan(SUBNET, ports=port_list, technique="connect", service_detection=True, timing=4)
    status = _watch(user, job_id)
    if status["error"]:
        console.print(f"the job failed: {status['error']}")
    results = user.results(job_id)
    found = sorted(
        (result["ip_address"], *(result[name] for name in ("port", "protocol", "status", "service", "version")))
        for result in results
    )
    _print_table(found)

    plain, plain_up = _plain_nmap(port_list)
    matches = found == plain and status["machines_found"] == plain_up
    if matches:
        console.print(f"plain nmap found the same: {plain_up} machines up, {len(plain)} open ports")
    else:
        console.print(f"plain nmap differs: it found {plain_up} machines up; only one of the two found:")
        _print_table(sorted(set(found) ^ set(plain)))
    # Scripts read it, so it is one line whatever the terminal's width.
    summary = {
        "job_id": job_id,
        "status": status["status"],
        "machines_found": status["machines_found"],
        "results": len(results),
        "matches_plain_nmap": matches,
    }
    print(json.dumps(summary))
    return 0 if matches and status["status"] == "completed" else 1


def _watch(user: Client, job_id: int) -> dict[str, Any]:
    """Show the job's progress until it is final, and return its last status."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"job {job_id}", total=100)

        def final() -> bool:
            status = user.task(job_id)["status"]
            text = f"job {job_id} {status['status']}, {status['machines_found']} machines found"
            progress.update(bar, completed=status["progress"], description=text)
            return status["status"] in FINAL

        until(final, SCAN_LIMIT, f"job {job_id} to be final")
    last: dict[str, Any] = user.task(job_id)["status"]
    return last


@contextmanager
def real_servers() -> Iterator[list[int]]:
    """The servers, listening, in a thread of their own; yields their ports."""
    numbers = [
        usual if all(ports.is_free(usual, host) for host in hosts) else ports.choose(host="0.0.0.0")  # on every address
        for usual, _, hosts in SERVERS
    ]
    with asyncio.Runner() as runner:
        running = runner.run(_listen(numbers))
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield numbers
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            for server in running:
                server.close()


async def _listen(numbers: list[int]) -> list[asyncio.Server]:
    return [
        await asyncio.start_server(_polite(talk), host, number)
        for number, (_, talk, hosts) in zip(numbers, SERVERS, strict=True)
        for host in hosts
    ]


def _polite(talk: Talk) -> Talk:
    """As `talk`, for clients that hang up as they like: scanners do."""

    async def talk_to_anyone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                async with asyncio.timeout(IDLE):
                    await talk(reader, writer)
            except (ConnectionError, TimeoutError, ValueError):  # a line too long is a ValueError
                return

    return talk_to_anyone


def _plain_nmap(port_list: str) -> tuple[list[Row], int]:
    """The same arguments given to nmap itself: what is open, and how many machines are up."""
    argv = ["nmap", "-n", "-sT", "-sV", "--version-intensity", "7", "-T4", "-p", port_list, "-oX", "-", SUBNET]
    with console.status("comparing with plain nmap"):
        done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    console.print(f"[bold]{' '.join(argv)}[/bold]")
    hosts = ET.fromstring(done.stdout).findall("host")  # noqa: S314 - our own nmap on our own servers
    return sorted(row for host in hosts for row in _rows(host)), len(hosts)


def _rows(host: ET.Element) -> list[Row]:
    rows = []
    address = _attribute(host, "address", "addr")
    for port in host.iterfind("ports/port"):
        state = _attribute(port, "state", "state")
        if state not in ("open", "open|filtered"):
            continue
        extra = _attribute(port, "service", "extrainfo")
        words = [_attribute(port, "service", "product"), _attribute(port, "service", "version"), extra and f"({extra})"]
        version = " ".join(word for word in words if word)
        number, protocol = int(port.attrib["portid"]), port.attrib["protocol"]
        rows.append((address, number, protocol, state, _attribute(port, "service", "name"), version))
    return rows


def _attribute(element: ET.Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _print_table(rows: list[Row]) -> None:
    table = Table("address", "port", "state", "service", "version")
    for address, port, protocol, state, service, version in rows:
        table.add_row(address, f"{port}/{protocol}", state, service, version)
    console.print(table)
