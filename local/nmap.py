"""Plain nmap for comparisons: its open ports, and the nmap processes of a stack."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

OpenPorts = set[tuple[str, int]]


def open_ports(*arguments: str) -> OpenPorts:
    """Return address and number of each TCP port that `nmap ARGUMENTS` finds open.

    Raises:
        subprocess.CalledProcessError: nmap failed.
    """
    done = subprocess.run(["nmap", "-n", "-oX", "-", *arguments], capture_output=True, check=True)
    document = ET.fromstring(done.stdout)  # noqa: S314 # output of the local nmap on local servers
    return {
        (host.find("address").attrib["addr"], int(port.attrib["portid"]))  # type: ignore[union-attr] # every host has one
        for host in document.iter("host")
        for port in host.iter("port")
        if port.find("state[@state='open']") is not None
    }


def running_under(pids: Collection[int]) -> list[int]:
    """Return the pids of the nmap processes that descend from any of these processes."""
    return [pid for pid in _named("nmap") if not set(pids).isdisjoint(_ancestors(pid))]


def _named(name: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == name:
                yield int(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return
        yield pid
