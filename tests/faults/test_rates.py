"""A job's rate and timing hold on many slots, at each moment of the process table."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

import pytest

from local.wait import until
from tests.client import FINAL
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, Caller, Platform

pytestmark = pytest.mark.e2e

PLAIN: Final = {"service_detection": False, "discovery": "none"}
RATE: Final = 2_000
PORTS: Final = "1-50"
NMAPS: Final = 4  # at most, of a job with this rate


def listed(platform: Platform) -> list[list[str]]:
    """Return the arguments of this test's nmaps that ran at one moment: those that two lists of the processes have in common."""
    lines = [line.split() for _, line in platform.nmaps().items() & platform.nmaps().items()]
    return [line for line in lines if "-T2" in line or PORTS in line]


def addresses(nmap: Sequence[str]) -> list[IPv4Address]:
    return [address for target in nmap[nmap.index("--") + 1 :] for address in IPv4Network(target)]


def option(nmap: Sequence[str], name: str) -> str:
    return nmap[nmap.index(name) + 1]


@pytest.mark.proves("F30", "G18")
def test_nmaps_of_a_job_keep_to_its_rate_and_timing(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """At each moment the nmaps of a job have at most its `max_rate` together, and no two of a job at timing 2 share an address."""
    # At timing 2 and with this timeout, the ports are cut into two chunks.
    polite = user.scan(f"{platform.net}.9.0/31", **PLAIN, ports="1-33", timing=2, host_timeout=60)
    fast = user.scan(platform.network(24), **PLAIN, ports=PORTS, max_rate=RATE)
    samples: list[list[list[str]]] = []

    def ended() -> bool:
        samples.append(listed(platform))
        return {user.status(polite), user.status(fast)} <= FINAL

    until(ended, LIMIT_SECONDS, "both jobs to end")
    assert {user.status(polite), user.status(fast)} == {"completed"}
    rates: list[int] = []
    blocks: set[str] = set()
    for sample in samples:
        scanned = [address for nmap in sample for address in addresses(nmap)]
        assert len(set(scanned)) == len(scanned), sample
        polites = [nmap for nmap in sample if "-T2" in nmap]
        blocks |= {option(nmap, "-p") for nmap in polites}
        rates.append(sum(int(option(nmap, "--max-rate")) for nmap in sample if nmap not in polites))
    assert len(blocks) == 2
    assert RATE / NMAPS < max(rates) <= RATE
    invariants.check()
