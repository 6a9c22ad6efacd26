"""Scan a /24 with a few real servers through the public API, and compare the results with plain nmap."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from local import ports, targets
from local.client import FINAL, Client
from local.stack import Stack
from local.wait import until

SUBNET: Final = "127.9.8.0/24"
USER: Final = 7
SCAN_LIMIT: Final = 120.0  # seconds for the job; it takes about ten
LOOK: Final = 0.2  # seconds between two queries of the progress

console = Console()

Row = tuple[str, int, str, str, str, str]
"""Address, port, protocol, state, service, version."""


def run(stack: Stack) -> int:
    """Run the demo, and leave the stack running or stopped as before.

    Returns:
        The exit code: 0 when the job completed and plain nmap agrees.
    """
    with console.status("starting the local stack"):
        started = stack.up()
    try:
        with real_servers() as numbers:
            return show(Client(stack.url, stack.token(USER)), numbers, nmap=["nmap"])
    finally:
        if started:
            with console.status("stopping the local stack"):
                stack.down()


def show(user: Client, numbers: Iterable[int], nmap: Sequence[str]) -> int:
    """Scan the servers, which listen on the ports `numbers`, and compare with the results of the command `nmap`.

    Returns:
        The exit code: 0 when the job completed and plain nmap agrees.
    """
    port_list = ",".join(map(str, numbers))
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

    plain, plain_up = _plain_nmap(nmap, port_list)
    matches = found == plain and status["machines_found"] == plain_up
    if matches:
        console.print(f"plain nmap found the same: {plain_up} machines up, {len(plain)} open ports")
    else:
        console.print(f"plain nmap differs: it found {plain_up} machines up; only one of the two found:")
        _print_table(sorted(set(found) ^ set(plain)))
    # One line for any width of the terminal, because scripts parse it.
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
    """Show the job's progress until it has ended, and return its last status."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"job {job_id}", total=100)

        def final() -> bool:
            status = user.task(job_id)["status"]
            text = f"job {job_id} {status['status']}, {status['machines_found']} machines found"
            progress.update(bar, completed=status["progress"], description=text)
            return status["status"] in FINAL

        until(final, SCAN_LIMIT, f"job {job_id} to end", LOOK)
    last: dict[str, Any] = user.task(job_id)["status"]
    return last


@contextmanager
def real_servers() -> Iterator[list[int]]:
    """Run the servers in a separate thread; yields their ports."""
    numbers = [
        usual if all(ports.is_free(usual, host) for host in hosts) else ports.choose(host="0.0.0.0")  # on every address
        for usual, _, hosts in targets.SERVERS
    ]
    with asyncio.Runner() as runner:
        running = runner.run(targets.listen(numbers))
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


def _plain_nmap(nmap: Sequence[str], port_list: str) -> tuple[list[Row], int]:
    """Run nmap with the same arguments; return the open ports and the number of hosts that are up."""
    argv = [*nmap, "-n", "-sT", "-sV", "--version-intensity", "7", "-T4", "-p", port_list, "-oX", "-", SUBNET]
    with console.status("comparing with plain nmap"):
        done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    console.print(f"[bold]{' '.join(argv)}[/bold]")
    hosts = ET.fromstring(done.stdout).findall("host")  # noqa: S314 # output of the local nmap on local servers
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
