"""Real nmap in networks that reject packets on behalf of hosts, rate-limit ICMP errors, or do not answer.

Each test creates two network namespaces: nmap runs in one, and the other is the only router and the only host that it can
reach. No packet leaves the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from scanfleet.contracts.messages import ChunkFailed, HostScanned, PortFound, ScanChunk
from scanfleet.scanning.outcomes import Outcome
from scanner_worker.domain.scan import Host, NoRouteError, arguments, fit, outcome
from scanner_worker.scanner.process import Limits, Nmap
from scanner_worker.scanner.raw import may_send_raw, privileges

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root: run the tests as root"),
]

MakeChunk = Callable[..., ScanChunk]
Scan = Callable[[ScanChunk], Awaitable[dict[str, tuple[Outcome, Host, tuple[PortFound, ...]]]]]

NMAP = "/usr/bin/nmap"
LIMITS = Limits(output=16 << 20, host=4 << 20, stall_seconds=30)
NETWORK = "10.88.0.0/24"  # behind the router
UDP_HOST = "10.88.0.9"


class Router:
    """The namespace at the other end of nmap's only link."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1")

    def run(self, *command: str) -> None:
        """Run a command in the router's namespace."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)


@pytest.fixture
def networks(tmp_path: Path) -> Iterator[tuple[Path, Router]]:
    """Yield an nmap in a namespace that routes every packet to the router, and the router."""
    id_ = uuid4().hex[:6]
    inside, outside = f"scanfleet-{id_}-nmap", f"scanfleet-{id_}-router"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with contextlib.ExitStack() as stack:
        for name in (inside, outside):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", inside, "link", "add", f"i{id_}", "type", "veth", "peer", "name", f"o{id_}", "netns", outside)
        for name, link, address in ((inside, f"i{id_}", "10.66.0.1/24"), (outside, f"o{id_}", "10.66.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", link)
            ip("-n", name, "link", "set", link, "up")
        ip("-n", inside, "route", "add", "default", "via", "10.66.0.2")
        program = tmp_path / "nmap"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ip")} netns exec {inside} {NMAP} "$@"\n')
        program.chmod(0o755)
        yield program, Router(outside)


@pytest.fixture
async def scan(networks: tuple[Path, Router]) -> AsyncIterator[Scan]:
    """Return a function that scans a chunk with nmap in its namespace: each host with its outcome and its ports."""
    nmap = Nmap(str(networks[0]), LIMITS)
    await nmap.start()

    async def run(chunk: ScanChunk) -> dict[str, tuple[Outcome, Host, tuple[PortFound, ...]]]:
        found: dict[str, tuple[Outcome, Host, tuple[PortFound, ...]]] = {}
        ports = chunk.policy.port_set
        targets = [ip_network(f"{chunk.first_address}/{32 - (len(chunk.outcomes) - 1).bit_length()}")]
        async for hosts in nmap.scan(arguments(chunk, ports, targets, raw=True), ports):
            found |= {host.address: (outcome(host, ports.count), host, open_) for host, open_ in hosts}
        return found

    yield run
    await nmap.stop()


def chunk_of(make_chunk: MakeChunk, policy: dict[str, Any], *, size: int = 4, first: str = "10.88.0.0") -> ScanChunk:
    asked = {"discovery": "none", "timing": 4} | policy
    return make_chunk(asked, first_address=first, outcomes="." * size, min_rate=2_000)


def codes(found: dict[str, tuple[Outcome, Host, tuple[PortFound, ...]]]) -> str:
    return "".join(code for code, _, _ in found.values())


@pytest.mark.parametrize("technique", ["syn", "connect"])
async def test_scan_silent_network_is_silent_or_timed_out(
    make_chunk: MakeChunk, networks: tuple[Path, Router], scan: Scan, technique: str
) -> None:
    """Addresses that do not answer are silent if every probe was sent in time, else timed out."""
    networks[1].run("ip", "route", "add", "blackhole", NETWORK)
    policy = {"ports": "1-50", "technique": technique}
    assert codes(await scan(chunk_of(make_chunk, policy, size=8))) == "s" * 8
    short = {"ports": "1-8000", "technique": technique, "host_timeout": 1}
    assert codes(await scan(chunk_of(make_chunk, short, size=2))) == "tt"


@pytest.mark.parametrize("policy", [{"technique": "syn"}, {"ports": "U:1-3"}, {"discovery": "default"}])
async def test_scan_without_a_route_raises_no_route(
    make_chunk: MakeChunk, tmp_path: Path, policy: dict[str, str]
) -> None:
    """Addresses for which the machine has no route are not silent or down, and the error quotes nmap."""
    program = tmp_path / "nmap"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("unshare")} --net {NMAP} "$@"\n')
    program.chmod(0o755)
    nmap = Nmap(str(program), LIMITS)
    await nmap.start()
    chunk = chunk_of(make_chunk, {"ports": "1-3"} | policy, size=256)
    line = arguments(chunk, chunk.policy.port_set, [ip_network(NETWORK)], raw=True)
    with pytest.raises(
        NoRouteError, match=r"^nmap skipped the targets 10\.88\..*: failed to determine route to 10\.88\.0\."
    ):
        assert [hosts async for hosts in nmap.scan(line, chunk.policy.port_set)] == []
    await nmap.stop()


@pytest.mark.parametrize("discovery", ["none", "default"])
@pytest.mark.parametrize(
    ("setup", "first"),
    [
        ("true", "10.88.0.0"),
        (f"ip route add prohibit {NETWORK}", "10.88.0.0"),
        (f"ip route add blackhole {NETWORK}", "10.88.0.0"),
        ("sysctl -qw net.ipv6.conf.all.disable_ipv6=1", "2001:db8::"),
    ],
    ids=["none", "prohibit", "blackhole", "disabled"],
)
async def test_connect_scan_without_a_route_fails_with_no_route(
    make_chunk: MakeChunk, setup: str, first: str, discovery: str
) -> None:
    """A worker without raw packets and without a route reports that, although nmap reports the addresses as down or silent."""
    chunk = chunk_of(make_chunk, {"ports": "1-3", "discovery": discovery}, first=first)
    code = f'{setup} && exec "$0" -c "$1" "$2"'
    command = ("unshare", "--net", "sh", "-c", code, sys.executable, CONNECTING, chunk.model_dump_json())
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    end = ChunkFailed.model_validate_json(out.splitlines()[-1])
    assert (end.no_route, end.outcomes) == (True, "....")
    assert re.fullmatch("nmap got no answer from [0-9a-f.:]+, and the worker has no route to it", end.reason)


CONNECTING = """
import asyncio, sys
from ipaddress import ip_network
from scanfleet.contracts.messages import ScanChunk
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.scanning.targets import TargetRules
from scanfleet_testing.bus import MemoryBus
from scanner_worker.handlers.batch import Abilities, Batch
from scanner_worker.handlers.chunk import ChunkScan
from scanner_worker.scanner.process import Limits, Nmap

async def main():
    chunk = ScanChunk.model_validate_json(sys.argv[1])
    nmap = Nmap("/usr/bin/nmap", Limits(1 << 20, 1 << 20, 60))
    await nmap.start()
    abilities = Abilities(1, False, TargetRules((ip_network("10.88.0.0/24"), ip_network("2001:db8::/64"))), attempt_seconds=60)
    batch = Batch([chunk], abilities, nmap)
    bus = MemoryBus()
    scan = ChunkScan(chunk, abilities, bus, lambda *_: None)
    await asyncio.gather(batch.run(), scan.run(batch.shares[0]))
    await nmap.stop()
    print(bus.messages(SCAN_PROGRESS)[-1].model_dump_json())

asyncio.run(main())
"""


@pytest.mark.proves("G16")
@pytest.mark.parametrize("policy", [{"technique": "syn"}, {"technique": "connect"}, {"ports": "U:1-3"}])
@pytest.mark.parametrize("ports", ["1-3", "1-60"])
async def test_outcome_prohibiting_router_is_silent(
    make_chunk: MakeChunk, networks: tuple[Path, Router], scan: Scan, policy: dict[str, str], ports: str
) -> None:
    """Addresses for which a router answers "administratively prohibited" are silent, with few ports or many."""
    networks[1].run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
    networks[1].run("ip", "route", "add", "prohibit", NETWORK)
    policy = {"ports": ports} | policy
    if "U:" in policy["ports"]:
        policy["ports"] = f"U:{ports}"
    found = await scan(chunk_of(make_chunk, policy))
    assert codes(found) == "ssss"


@pytest.mark.proves("G16")
@pytest.mark.parametrize("policy", [{"technique": "syn", "ports": "1-3"}, {"ports": "U:1-3"}, {"ports": "U:1-60"}])
async def test_outcome_rejecting_firewall_is_silent(
    make_chunk: MakeChunk, networks: tuple[Path, Router], scan: Scan, policy: dict[str, str]
) -> None:
    """Addresses behind a firewall that rejects with "port unreachable", the usual default, are not answered."""
    router = networks[1]
    router.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
    router.run("ip", "route", "add", NETWORK, "dev", "lo")
    router.run("nft", "add table ip filter; add chain ip filter forward { type filter hook forward priority 0; }")
    router.run("nft", f"add rule ip filter forward ip daddr {NETWORK} reject")
    assert codes(await scan(chunk_of(make_chunk, policy))) == "ssss"


@pytest.fixture
def udp_host(networks: tuple[Path, Router]) -> Iterator[str]:
    """Yield a Linux host with the default rate limit of ICMP errors, on which UDP port 1234 answers."""
    router = networks[1]
    router.run("ip", "addr", "add", f"{UDP_HOST}/32", "dev", "lo")
    answer = (
        "import socket\n"
        "server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"server.bind(({UDP_HOST!r}, 1234))\n"
        "print('bound', flush=True)\n"
        "while True:\n    server.sendto(b'hello', server.recvfrom(2048)[1])\n"
    )
    command = ["ip", "netns", "exec", router.name, sys.executable, "-c", answer]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bound\n"
        yield UDP_HOST
        process.kill()


@pytest.mark.long
@pytest.mark.parametrize("discovery", ["default", "none"])
async def test_scan_udp_with_icmp_rate_limit_is_bounded(
    make_chunk: MakeChunk, scan: Scan, udp_host: str, discovery: str
) -> None:
    """A UDP scan of ports 1-2000 of a Linux host takes bounded time and message size, and finds the port that answers."""
    policy = {"ports": "U:1-2000", "discovery": discovery}
    chunk = chunk_of(make_chunk, policy, size=1, first=udp_host)
    began = time.monotonic()
    [(code, host, open_)] = (await scan(chunk)).values()
    assert time.monotonic() - began < 150
    assert (code, host.ports) == (Outcome.ANSWERED, 2_000)
    assert [port.port for port in open_ if port.status == "open"] == [1234]
    assert "1234" not in host.open_filtered
    message = fit(
        HostScanned(
            job_id=1,
            chunk_id="1-0",
            attempt=1,
            worker_id="worker",
            user_id=7,
            address=host.address,
            outcome="a",
            technique="syn",
            ports=open_,
            open_filtered=host.open_filtered,
        ),
    )
    assert len(message.model_dump_json(exclude_defaults=True)) < 64 << 10


@contextlib.asynccontextmanager
async def web(folder: Path, address: str) -> AsyncIterator[None]:
    """Serve HTTPS on port 8443, on which nmap tries TLS early, and HTTP on port 8000."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.set_ciphers("DEFAULT:AES128-SHA")  # nmap's TLS probes offer only old ciphers

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if await reader.read(1024):
                writer.write(b"HTTP/1.1 200 OK\r\nServer: nginx/1.26.2\r\nContent-Length: 3\r\n\r\nok\n")
                await writer.drain()
            writer.close()

    async with (
        await asyncio.start_server(answer, address, 8443, ssl=context),
        await asyncio.start_server(answer, address, 8000),
    ):
        yield


async def test_scan_service_inside_tls_has_ssl_prefix(make_chunk: MakeChunk, tmp_path: Path) -> None:
    """The service of a web server is `ssl/http` with TLS, as nmap prints it, and `http` without."""
    address = "127.9.50.1"
    policy = {"ports": "8000,8443", "service_detection": True, "version_intensity": 5}
    chunk = make_chunk(policy, first_address=address, outcomes=".")
    raw = may_send_raw(privileges(NMAP))
    nmap = Nmap(NMAP, LIMITS)
    await nmap.start()
    async with web(tmp_path, address):
        line = arguments(chunk, chunk.policy.port_set, [ip_network(f"{address}/32")], raw=raw)
        found = [each async for hosts in nmap.scan(line, chunk.policy.port_set) for each in hosts]
    await nmap.stop()
    [(_, ports)] = found
    assert [(each.service, each.version) for each in ports] == [("http", "nginx 1.26.2"), ("ssl/http", "nginx 1.26.2")]
