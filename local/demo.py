"""The main job, shown: scan a /24 with a few real servers in it through the public API, and compare with plain nmap."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any, Final
from xml.etree import ElementTree as ET

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from local import ports
from local.stack import Stack, StackError

SUBNET: Final = "127.9.8.0/24"
USER: Final = 7
SCAN_LIMIT: Final = 120.0  # seconds for the job; it takes about ten
LOOK: Final = 0.25  # seconds between two looks at its progress
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
        return asyncio.run(_show(stack))
    finally:
        if started:
            with console.status("stopping the local stack"):
                stack.down()


async def _show(stack: Stack) -> int:
    async with _servers() as (port_list, count):
        console.print(f"{count} servers are listening in {SUBNET}, on the ports {port_list}")
        headers = {"Authorization": f"Bearer {stack.token(USER)}"}
        async with httpx.AsyncClient(base_url=stack.url, headers=headers) as client:
            job_id = await _submit(client, port_list)
            status = await _watch(client, job_id)
            results = await _call(client, "GET", f"/api/v1/task/{job_id}/results")
        found = sorted(
            (result["ip_address"], *(result[name] for name in ("port", "protocol", "status", "service", "version")))
            for result in results
        )
        _print_table(found)
        plain, plain_up = await _plain_nmap(port_list)
    matches = found == plain and status["machines_found"] == plain_up
    if status["error"]:
        console.print(f"the job failed: {status['error']}")
    if matches:
        console.print(f"plain nmap found the same: {plain_up} machines up, {len(plain)} open ports")
    else:
        console.print(f"plain nmap differs: {plain_up} machines up; only in one of the two:")
        _print_table(sorted(set(found) ^ set(plain)))
    summary = {
        "job_id": job_id,
        "status": status["status"],
        "machines_found": status["machines_found"],
        "results": len(results),
        "matches_plain_nmap": matches,
    }
    # Last, and as it is: scripts read it.
    sys.stdout.flush()
    print(json.dumps(summary))
    return 0 if matches and status["status"] == "completed" else 1


@asynccontextmanager
async def _servers() -> AsyncIterator[tuple[str, int]]:
    """The servers, listening: yields all their ports as nmap writes them, and how many servers there are."""
    async with AsyncExitStack() as running:
        numbers, count = [], 0
        for usual, talk, hosts in SERVERS:
            number = usual if all(ports.is_free(usual, host) for host in hosts) else ports.choose(host="0.0.0.0")
            numbers.append(number)
            for host in hosts:
                await running.enter_async_context(await asyncio.start_server(_polite(talk), host, number))
                count += 1
        yield ",".join(map(str, sorted(numbers))), count


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


async def _submit(client: httpx.AsyncClient, port_list: str) -> int:
    subnet = await _call(client, "POST", "/api/v1/subnet", {"name": "demo", "cidr": SUBNET})
    policy = await _call(
        client,
        "POST",
        "/api/v1/policy",
        {"name": "demo", "ports": port_list, "technique": "connect", "service_detection": True, "timing": 4},
    )
    created = await _call(client, "POST", "/api/v1/task", {"subnet_ids": [subnet["id"]], "policy_id": policy["id"]})
    job_id: int = created["jobs"][0]["id"]
    return job_id


async def _watch(client: httpx.AsyncClient, job_id: int) -> dict[str, Any]:
    """Show the job's progress until it has ended, and return its last status."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    deadline = time.monotonic() + SCAN_LIMIT
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"job {job_id}", total=100)
        while True:
            status: dict[str, Any] = (await _call(client, "GET", f"/api/v1/task/{job_id}"))["status"]
            text = f"job {job_id} {status['status']}, {status['machines_found']} machines found"
            progress.update(bar, completed=status["progress"], description=text)
            if status["status"] in ("completed", "failed", "cancelled"):
                return status
            if time.monotonic() > deadline:
                raise StackError(f"job {job_id} has not ended within {SCAN_LIMIT:g} s: {status}")
            await asyncio.sleep(LOOK)


async def _call(client: httpx.AsyncClient, method: str, path: str, body: object = None) -> Any:
    answer = await client.request(method, path, json=body)
    if not answer.is_success:
        raise StackError(f"{method} {path} answered {answer.status_code}: {answer.text}")
    return answer.json()


async def _plain_nmap(port_list: str) -> tuple[list[Row], int]:
    """The same arguments given to nmap itself: what is open, and how many machines are up."""
    argv = ["nmap", "-n", "-sT", "-sV", "--version-intensity", "7", "-T4", "-p", port_list, "-oX", "-", SUBNET]
    console.print(f"comparing with [bold]{' '.join(argv)}[/bold]")
    nmap = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    output, _ = await nmap.communicate()
    if nmap.returncode != 0:
        raise StackError(f"nmap ended with exit code {nmap.returncode}")
    hosts = ET.fromstring(output).findall("host")  # noqa: S314 # our own nmap on our own servers
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
