"""Scan a /24 with a few real servers with the `scanfleet` command, and compare the results with plain nmap."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from subprocess import PIPE
from typing import Final
from xml.etree import ElementTree as ET

from rich.console import Console

from local import ports, targets
from local.paths import SCANFLEET
from local.stack import Stack

SUBNET: Final = "127.9.8.0/24"
USER: Final = 7
SCAN_LIMIT: Final = "120s"  # for the job; it takes about ten seconds
_NO_JOB: Final = 1  # exit code of the demo if the scan has no final state

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
            return show(stack.url, stack.token(USER), numbers, nmap=["nmap"])
    finally:
        if started:
            with console.status("stopping the local stack"):
                stack.down()


def show(url: str, token: str, numbers: Iterable[int], nmap: Sequence[str]) -> int:
    """Scan the servers, which listen on the ports `numbers`, and compare with the results of the command `nmap`.

    Args:
        url: of the gateway.
        token: of the user.
        numbers: ports of the servers.
        nmap: command that runs nmap where the servers are.

    Returns:
        The exit code: 0 when the job completed and plain nmap agrees.
    """
    port_list = ",".join(map(str, numbers))
    environment = os.environ | {"SCANFLEET_URL": url, "SCANFLEET_TOKEN": token}
    policy = ["--ports", port_list, "--technique", "connect", "--service-detection", "--timing", "4"]
    document = _scanfleet(environment, "scan", SUBNET, *policy, "--timeout", SCAN_LIMIT, "-o", "json", stdout=PIPE)
    if not document:  # the command has printed the reason
        return _NO_JOB
    scanned = json.loads(document)
    job_id, status, results = scanned["job"]["job_id"], scanned["job"]["status"], scanned["results"]
    _scanfleet(environment, "job", "results", job_id)
    found = sorted(
        (result["ip_address"], *(result[name] for name in ("port", "protocol", "status", "service", "version")))
        for result in results
    )

    plain, plain_up = _plain_nmap(nmap, port_list)
    matches = found == plain and status["machines_found"] == plain_up
    if matches:
        console.print(f"plain nmap found the same: {plain_up} machines up, {len(plain)} open ports")
    else:
        console.print(f"plain nmap differs: it found {plain_up} machines up; only one of the two found:")
        for row in sorted(set(found) ^ set(plain)):
            print(*row)
    # One line for any width of the terminal, because scripts parse it.
    summary = {
        "job_id": int(job_id),
        "status": status["status"],
        "machines_found": status["machines_found"],
        "results": len(results),
        "matches_plain_nmap": matches,
    }
    print(json.dumps(summary))
    return 0 if matches and status["status"] == "completed" else 1


def _scanfleet(environment: Mapping[str, str], *arguments: str, stdout: int | None = None) -> str | None:
    """Run `scanfleet`, which shows progress on stderr, and return its output if `stdout` is a pipe."""
    console.print(f"[bold]scanfleet {' '.join(arguments)}[/bold]", soft_wrap=True)
    sys.stdout.flush()  # before the command prints
    done = subprocess.run([SCANFLEET, *arguments], env=environment, stdout=stdout, text=True, check=False)
    output: str | None = done.stdout
    return output


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
        done = subprocess.run(argv, stdout=PIPE, check=True)
    console.print(f"[bold]{' '.join(argv)}[/bold]", soft_wrap=True)
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
