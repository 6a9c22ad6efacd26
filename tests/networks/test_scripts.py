"""Scripts and presets against servers that refer to other machines: packets go only to the target.

nmap runs where it can reach only the test network. All outgoing packets are captured, including queries to the name server
of that network.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import pytest

from local.networks import Network, Packet
from scanfleet.contracts.messages import ScanChunk
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, Preset, fill_in
from scanner_worker.domain.scan import Host, arguments
from scanner_worker.scanner.process import Limits, Nmap
from tests.networks import hostile

pytestmark = pytest.mark.integration

TARGET: Final = "10.77.80.1"
ELSEWHERE: Final = "10.77.81.1"
NAMESERVER: Final = "10.77.81.53"
PORTS: Final = f"T:{hostile.TCP_PORTS},U:{hostile.UDP_PORTS}"
SILENT: Final = frozenset({"https-redirect"})
"""Scripts without output: their findings become part of the service."""

Scan = Callable[..., Awaitable[tuple[Host, list[Packet]]]]


@pytest.fixture
def program(network: Network, tmp_path: Path) -> str:
    """nmap on the scanning side, with a name server."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(f"nameserver {NAMESERVER}\noptions timeout:1 attempts:1\n")
    command = f'mount --bind {resolver} /etc/resolv.conf && exec nmap "$@"'
    path = tmp_path / "nmap"
    path.write_text(
        f'#!/bin/sh\nexec {shlex.join(network.command("unshare", "--mount", "sh", "-c", command, "nmap"))} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
async def scan(network: Network, program: str, tmp_path: Path) -> AsyncIterator[Scan]:
    """Return a function that scans the target as a worker does: the host, and the packets sent."""

    async def run(
        preset: Preset, given: dict[str, Any], scripts: AbstractSet[str] = ADMITTED_SCRIPTS
    ) -> tuple[Host, list[Packet]]:
        policy = fill_in(preset, {"ports": PORTS} | given, scripts)
        chunk = ScanChunk(
            job_id=1,
            chunk_id="1-0",
            attempt=1,
            worker_id="worker",
            user_id=1,
            first_address=TARGET,
            outcomes=".",
            policy=policy,
            ports=policy.ports,
            lease_seconds=10,
            estimate_seconds=1,
        )
        line = arguments(chunk, policy.port_set, [ip_network(TARGET)], raw=True, scripts=scripts)
        async with started(Nmap(program, Limits(16 << 20, 4 << 20, 60), scripts)) as nmap:
            with network.capture() as packets:
                found = [host async for hosts in nmap.scan(line, policy.port_set) for host, _ in hosts]
        (host,) = found
        assert packets
        return host, packets

    async with hostile.serving(network, TARGET, ELSEWHERE, tmp_path):
        yield run


@asynccontextmanager
async def started(nmap: Nmap) -> AsyncIterator[Nmap]:
    await nmap.start()
    try:
        yield nmap
    finally:
        await nmap.stop()


def others(packets: list[Packet]) -> set[Packet]:
    """Return the packets to addresses other than the target's."""
    return {packet for packet in packets if packet.address != TARGET}


@pytest.mark.proves("A23", "G12")
@pytest.mark.parametrize("script", sorted(ADMITTED_SCRIPTS))
async def test_admitted_script_sends_packets_to_its_target_alone(scan: Scan, script: str) -> None:
    """An admitted script produces its output, follows no link or redirect, and sends no DNS query."""
    # These two use the result of service detection, which takes minutes on all ports.
    detected = {"fingerprint-strings": "22", "http-server-header": "80,8000"}
    given = {"ports": detected[script], "service_detection": True} if script in detected else {}
    host, packets = await scan(Preset.QUICK, {"scripts": [script]} | given)
    assert (f'<script id="{script}"'.encode() in host.element) == (script not in SILENT)
    assert others(packets) == set()


@pytest.mark.proves("A23", "G12")
@pytest.mark.parametrize(
    ("preset", "ports"),
    [
        *(pytest.param(preset, PORTS, id=preset) for preset in Preset if preset is not Preset.FULL),
        pytest.param(Preset.FULL, "22,80", id="full on two ports"),
        pytest.param(Preset.FULL, PORTS, id="full", marks=pytest.mark.networks),  # takes a minute
    ],
)
async def test_preset_sends_packets_to_its_target_alone(scan: Scan, preset: Preset, ports: str) -> None:
    """Service and OS detection and the scripts of each preset send no packet to another address."""
    host, packets = await scan(preset, {"os_detection": True, "version_intensity": 2, "ports": ports})
    assert host.up
    assert others(packets) == set()


@pytest.mark.proves("A23", "G12")
@pytest.mark.parametrize("script", ["http-referer-checker", "fcrdns"])
async def test_script_that_leaves_its_target_is_confined(
    scan: Scan, network: Network, program: str, script: str
) -> None:
    """A script that fetches from other hosts or resolves names sends packets only to the target."""
    with network.capture() as unconfined:
        line = ("-n", "-sT", "-p", "80", "--script", script, TARGET)
        await (await asyncio.create_subprocess_exec(program, *line, stdout=asyncio.subprocess.DEVNULL)).wait()
    assert others(unconfined)
    _, packets = await scan(Preset.QUICK, {"scripts": [script]}, ADMITTED_SCRIPTS | {script})
    assert others(packets) == set()
