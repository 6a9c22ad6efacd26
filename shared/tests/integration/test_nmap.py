"""The vocabulary of policies against nmap itself, which is asked without a target and so sends nothing."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanfleet.scanning.ports import MAX_PORT, MAX_TOP, PortSet, Range

pytestmark = pytest.mark.integration

PORT = st.integers(0, MAX_PORT)
LOW_OR_HIGH = st.tuples(PORT, PORT).map(sorted)
ITEM = st.one_of(
    PORT.map(str),
    LOW_OR_HIGH.map(lambda ends: f"{ends[0]}-{ends[1]}"),
    st.integers(1, MAX_PORT).map(lambda port: f"-{port}"),
    PORT.map(lambda port: f"{port}-"),
    st.just("-"),
)
PREFIXED = st.tuples(st.sampled_from(["T:", "U:", ""]), ITEM).map("".join)
MIXED = st.tuples(st.sampled_from(["T:", "U:"]), ITEM, st.lists(PREFIXED, max_size=8)).map(
    lambda parts: ",".join([parts[0] + parts[1], *parts[2]]),
)
TEXT = MIXED | st.lists(ITEM, min_size=1, max_size=8).map(",".join)


def nmap(*arguments: str) -> str:
    # `--privileged` skips the check of rights that UDP would fail at without root.
    command = ["nmap", "--privileged", "-n", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def as_nmap_reads(*arguments: str) -> tuple[str, str]:
    found = re.search(r"Ports scanned: TCP\(\d+;(.*?)\) UDP\(\d+;(.*?)\)", nmap("-v", "-oG", "-", *arguments))
    assert found
    return found[1], found[2]


def written(ranges: tuple[Range, ...]) -> str:
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


@settings(max_examples=30, deadline=None)  # each example starts nmap twice
@given(TEXT)
def test_ports_are_those_that_nmap_parses(text: str) -> None:
    """For the user's text and the canonical text, nmap parses exactly the ports that we count."""
    ports = PortSet.parse(text)
    techniques = [option for option, wanted in (("-sS", ports.tcp), ("-sU", ports.udp)) if wanted]
    expected = written(ports.tcp), written(ports.udp)
    assert as_nmap_reads(*techniques, "-p", text) == expected
    assert as_nmap_reads(*techniques, "-p", str(ports)) == expected


def test_nmap_has_the_maximum_number_of_common_ports() -> None:
    """nmap scans all ports of the largest `top:N`."""
    header = nmap("-v", "-oG", "-", "-sS", "--top-ports", str(MAX_TOP))
    assert f"TCP({MAX_TOP};" in header
