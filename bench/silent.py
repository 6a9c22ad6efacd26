"""A mostly silent network through the platform beside plain nmap, in network namespaces.

Three quarters of a /24 drop everything, and its first /26 has three open ports on each address. Plain nmap is stopped after ten
times the platform's time, so a ratio of 0.1 means "0.1 or less".
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.figures import Figure
from bench.kit import new_stack
from local.networks import NETWORK, Network
from tests.client import Client

SUBNET: Final = "10.77.1.0/24"
SERVERS: Final = {(f"10.77.1.{host}", port) for host in range(64) for port in (22, 80, 443)}
PLAIN: Final = ("nmap", "-n", "-Pn", "-T4", "--top-ports", "100", SUBNET)
TIMES: Final = 10
LIMIT_SECONDS: Final = 600.0  # for the platform


def measure() -> Sequence[Figure]:
    """Return no figures, and log the reason, on a machine that cannot make namespaces."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except (FileNotFoundError, PermissionError) as error:  # any other failure is a defect
            print(f"silent: not measured: {error}", file=sys.stderr)
            return []
        return scanned(network)


def scanned(network: Network) -> Sequence[Figure]:
    network.filter_input("ip daddr 10.77.1.64-10.77.1.255 drop")
    network.serve(SERVERS)
    with TemporaryDirectory(prefix="scanfleet-") as folder:
        settings = {"SCANFLEET_ALLOWED_NETWORKS": NETWORK, "SCANFLEET_NMAP": network.nmap(Path(folder))}
        with new_stack(settings=settings) as stack:
            user = Client(stack.url, stack.token(7))
            begin = time.perf_counter()
            job_id = user.scan(SUBNET, preset="sweep")
            status = user.finished(job_id, LIMIT_SECONDS)["status"]
            seconds = time.perf_counter() - begin
            if status["status"] != "completed":
                raise RuntimeError(f"job {job_id} is {status['status']}: {status['error']}")
            found = {(each["ip_address"], each["port"]) for each in user.results(job_id)}
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
