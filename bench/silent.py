"""A mostly silent network through the platform beside plain nmap, in network namespaces.

Three quarters of a /24 drop everything, and its first /26 has three open ports on each address. Plain nmap is stopped after ten
times the platform's time, so a ratio of 0.1 means "0.1 or less".
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.figures import Figure
from local.client import Client
from local.networks import NETWORK, Network
from local.stack import Stack

SUBNET: Final = "10.77.1.0/24"
SERVERS: Final = {(f"10.77.1.{host}", port) for host in range(64) for port in (22, 80, 443)}
PLAIN: Final = ("nmap", "-n", "-Pn", "-T4", "--top-ports", "100", SUBNET)
TIMES: Final = 10
LIMIT: Final = 600.0  # seconds for the platform


def measure() -> Sequence[Figure]:
    """Nothing without the right to make namespaces, and says so."""
    try:
        with Network() as network, tempfile.TemporaryDirectory(prefix="scanfleet-") as folder:
            return scanned(network, Path(folder))
    except OSError as error:
        print(f"silent: not measured: {error}", file=sys.stderr)
        return []


def scanned(network: Network, folder: Path) -> Sequence[Figure]:
    network.filter_input("ip daddr 10.77.1.64-10.77.1.255 drop")
    network.serve(SERVERS)
    settings = {"SCANFLEET_ALLOWED_NETWORKS": NETWORK, "SCANFLEET_NMAP": network.nmap(folder)}
    stack = Stack(folder / "stack", settings=settings)
    stack.folder.mkdir()
    stack.up()
    try:
        user = Client(stack.url, stack.token(7))
        begin = time.perf_counter()
        job_id = user.scan(SUBNET, preset="sweep")
        status = user.finished(job_id, LIMIT)["status"]
        seconds = time.perf_counter() - begin
        if status["status"] != "completed":
            raise RuntimeError(f"job {job_id} is {status['status']}: {status['error']}")
        found = {(each["ip_address"], each["port"]) for each in user.results(job_id)}
    finally:
        stack.down()
    begin = time.perf_counter()
    plain = subprocess.Popen(network.command(*PLAIN), stdout=subprocess.DEVNULL)
    try:
        plain.wait(TIMES * seconds)
    except subprocess.TimeoutExpired:
        plain.kill()
        plain.wait()
    return [
        Figure("silent_ratio", seconds / (time.perf_counter() - begin), "preset sweep / plain nmap -T4", at_most=0.1),
        Figure("silent_recall", len(found & SERVERS) / len(SERVERS), "of the open ports", at_least=0.99),
    ]
