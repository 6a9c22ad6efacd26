"""Real nmap against listeners on the loopback network, and faulty stand-ins for nmap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from scanfleet.contracts.messages import (
    ChunkFailed,
    ChunkReleased,
    ChunkScanned,
    HostScanned,
    Message,
    ScanChunk,
    StopChunk,
)
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, SCAN_TASKS
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, VERSION_SCRIPTS
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import TargetRules
from scanfleet.security.audit import Refusals
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.waiting import until
from scanner_worker.domain.scan import CannotStartError, ScanError, arguments, scripts_of
from scanner_worker.handlers.batch import Abilities
from scanner_worker.handlers.worker import Worker
from scanner_worker.scanner import guard, process
from scanner_worker.scanner.datadir import ServiceTable
from scanner_worker.scanner.process import Limits, Nmap
from scanner_worker.scanner.raw import may_send_raw, privileges
from scanner_worker.settings import Settings

pytestmark = pytest.mark.integration

MakeChunk = Callable[..., ScanChunk]
MakeNmap = Callable[..., Awaitable[Nmap]]

NMAP = "/usr/bin/nmap"
RAW = may_send_raw(privileges(NMAP))
LIMITS = Limits(output=16 << 20, host=4 << 20, stall_seconds=60)
# A scan that does not end by itself: nmap waits a minute between two probes of the port.
SLOW = ("-n", "-sT", "-Pn", "-p", "1-9", "--scan-delay", "60s", "-oX", "-", "--", "127.9.40.1/32")

HEAD = """<?xml version="1.0"?>
<!DOCTYPE nmaprun>
<nmaprun scanner="nmap"><scaninfo type="syn" protocol="tcp" numservices="2" services="22,80"/>
"""
HOST = """<host><status state="up" reason="reset" reason_ttl="0"/>
<address addr="127.9.1.{last}" addrtype="ipv4"/>
<ports><extraports state="closed" count="2"><extrareasons reason="reset" count="2"/></extraports></ports></host>
"""
TAIL = '<runstats><finished exit="success"/></runstats></nmaprun>'


async def test_ranked_parts_add_up_to_the_top_ports(make_nmap: MakeNmap) -> None:
    """The ports of consecutive rank ranges are distinct, and together they are nmap's most common ports."""
    nmap = await make_nmap()
    whole = await nmap.ranked(PortSet.parse("top:1-100"))
    parts = [await nmap.ranked(part) for part in PortSet.parse("top:100").blocks(30)]
    assert [part.count for part in parts] == [30, 30, 30, 10]
    assert {port for part in parts for port in _ports(part)} == set(_ports(whole))
    assert {80, 443, 22} <= set(_ports(parts[0]))


def _ports(ports: PortSet) -> list[int]:
    return [port for low, high in ports.tcp for port in range(low, high + 1)]


@pytest.mark.parametrize("ports", ["22,80,443,8080,47808,60999", "top:9", *(["T:53,80,U:53,161"] if RAW else [])])
async def test_scan_restricted_table_gives_the_same_names(
    make_chunk: MakeChunk, make_nmap: MakeNmap, ports: str
) -> None:
    """With the lines of its own ports, nmap probes the same ports and gives them the same names as with its whole table."""
    nmap = await make_nmap()
    chunk = make_chunk({"ports": ports, "technique": "auto"}, outcomes=".", first_address="127.9.41.1")
    line = arguments(chunk, chunk.policy.port_set, [ip_network("127.9.41.1")], raw=RAW)

    async def named() -> list[tuple[bytes, ...]]:
        hosts = [host async for hosts in nmap.scan(line, chunk.policy.port_set) for host, _ in hosts]
        return re.findall(rb'protocol="(\w+)" portid="(\d+)".*?service name="([^"]*)"', hosts[0].element)

    whole = await named()
    await nmap.check()
    assert await named() == whole
    assert len(whole) >= 4
    assert len({name for _, _, name in whole}) >= 3


async def test_scan_with_a_table_of_another_installation_reads_the_whole_one(
    make_nmap: MakeNmap,
) -> None:
    """A `top` set of which the table lacks a port, and a table that is not where the libraries are, do not change a scan."""
    nmap = await make_nmap()
    await nmap.check()
    nmap._table = ServiceTable({("tcp", 80): "http\t80/tcp\t0.5"})
    assert await nmap._services_of(PortSet.parse("80-81")) == "http\t80/tcp\t0.5\n"
    assert await nmap._services_of(PortSet.parse("top:3")) is None
    assert process._services_table(b'<directory path="/nowhere/nselib/" name="nselib"></directory>') is None
    await nmap.check()
    assert (await nmap._services_of(PortSet.parse("top:3")) or "").count("\n") == 3


async def test_scan_restricted_table_needs_half_of_the_cpu_time(make_nmap: MakeNmap) -> None:
    """A scan of one port does not pay for all lines of nmap's table."""
    nmap = await make_nmap()

    async def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        for _ in range(10):
            async for _ in nmap.scan(["-n", "-sT", "-Pn", "-p", "8", "-oX", "-", "127.9.41.1"], PortSet.parse("8")):
                pass
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    whole = min([await cpu_seconds() for _ in range(3)])
    await nmap.check()
    assert min([await cpu_seconds() for _ in range(3)]) < whole / 2


def marked(nmap: Nmap) -> list[int]:
    """Return every process that `nmap` has started, directly or indirectly, except the guard."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ, line = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            if nmap._mark.encode() in environ or (nmap._mark.encode() in line and b"guard.py" not in line):
                found.append(int(folder.name))
    return found


@pytest.fixture
async def make_nmap() -> AsyncIterator[MakeNmap]:
    """Return a factory of started Nmap instances; a process that is left at the end fails the test."""
    made: list[Nmap] = []

    async def make(
        program: str | Path = NMAP, limits: Limits = LIMITS, scripts: AbstractSet[str] = ADMITTED_SCRIPTS
    ) -> Nmap:
        made.append(nmap := Nmap(str(program), limits, scripts))
        await nmap.start()
        return nmap

    yield make
    for nmap in made:
        left = marked(nmap)
        await nmap.stop()
        assert left == []


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], Path]:
    """Return a factory of stand-ins for nmap: programs made of Python lines that can use HEAD, TAIL and host(last)."""

    def make(body: str) -> Path:
        path = tmp_path / "nmap"
        lines = (
            f"#!{sys.executable} -I\n"
            "import os, signal, subprocess, sys, time\n"
            # A trial run, which has no targets, runs real nmap: these stand-ins only affect scans.
            f"if '--' not in sys.argv: os.execv({NMAP!r}, sys.argv)\n"
            f"HEAD, HOST, TAIL = {HEAD!r}, {HOST!r}, {TAIL!r}\n"
            "def write(*parts):\n    print(*parts, flush=True)\n"
            "def host(last):\n    return HOST.format(last=last)\n"
        )
        path.write_text(lines + textwrap.dedent(body))
        path.chmod(0o755)
        return path

    return make


class Rig:
    """A worker with real processes on an in-memory bus."""

    def __init__(self, nmap: Nmap, *, slots: int = 2, attempt_seconds: float = 60) -> None:
        self.bus = MemoryBus()
        self.nmap = nmap
        rules = TargetRules((ip_network("127.0.0.0/8"), ip_network("::1/128")))
        abilities = Abilities(slots, RAW, rules, attempt_seconds)
        self.worker = Worker("worker", abilities, nmap, self.bus, Refusals("scanner-worker").add_denied_chunk)
        self.tasks = self.bus.tail(SCAN_TASKS, self.worker)

    async def send(self, *tasks: Message) -> None:
        await self.bus.publish(SCAN_TASKS, tasks)

    def hosts(self) -> dict[str, HostScanned]:
        return {m.address: m for m in self.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)}

    def scanned(self) -> dict[str, str]:
        """The map of each scanned chunk, by chunk id."""
        return {m.chunk_id: m.outcomes for m in self.bus.messages(SCAN_PROGRESS) if isinstance(m, ChunkScanned)}

    def end(self) -> Message | None:
        """The final report of a chunk."""
        ends = (ChunkScanned, ChunkFailed, ChunkReleased)
        return next((m for m in self.bus.messages(SCAN_PROGRESS) if isinstance(m, ends)), None)


@contextlib.asynccontextmanager
async def rigged(nmap: Nmap, slots: int = 2, attempt_seconds: float = 60) -> AsyncIterator[Rig]:
    rig = Rig(nmap, slots=slots, attempt_seconds=attempt_seconds)
    await rig.tasks.start()
    await rig.worker.start()
    try:
        yield rig
    finally:
        await rig.worker.stop(0)
        await rig.tasks.stop()


@pytest.fixture
def listeners() -> Iterator[Callable[..., int]]:
    """Open the same port on each address and return its number."""
    with contextlib.ExitStack() as stack:

        def listen(*addresses: str) -> int:
            port = 0
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                port = stack.enter_context(socket.create_server((address, port), family=family)).getsockname()[1]
            return port

        yield listen


async def test_scan_real_hosts_have_outcomes_and_open_ports(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    listeners: Callable[..., int],
) -> None:
    """With real nmap and listeners every address has its outcome, and exactly the listening ports are open."""
    port = listeners("127.9.41.3", "127.9.41.17")
    chunk = make_chunk({"ports": f"{port},1-3"}, first_address="127.9.41.0", outcomes="." * 32)
    async with rigged(await make_nmap()) as rig:
        await rig.send(chunk)
        await until(rig.end, 60)
        scanned = rig.end()
        assert isinstance(scanned, ChunkScanned)
        assert (scanned.outcomes, scanned.technique) == ("a" * 32, "syn" if RAW else "connect")
        assert scanned.slot_seconds > 0
        found = {address: [each.port for each in host.ports] for address, host in rig.hosts().items() if host.ports}
        assert found == {"127.9.41.3": [port], "127.9.41.17": [port]}
        assert len(rig.hosts()) == 32


def has_ipv6() -> bool:
    """Return whether the kernel lets this process use ::1; many containers cannot."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="the machine has no ::1, the only IPv6 address that a test may scan")
async def test_scan_ipv6_chunk_is_scanned(
    make_chunk: MakeChunk, make_nmap: MakeNmap, listeners: Callable[..., int]
) -> None:
    """An IPv6 chunk is scanned like any other."""
    port = listeners("::1")
    async with rigged(await make_nmap()) as rig:
        await rig.send(make_chunk({"ports": str(port)}, first_address="::1", outcomes="."))
        await until(rig.end, 60)
        assert isinstance(rig.end(), ChunkScanned)
        assert [each.port for each in rig.hosts()["::1"].ports] == [port]


async def test_scan_finished_group_is_published_while_nmap_runs(make_chunk: MakeChunk, make_nmap: MakeNmap) -> None:
    """The hosts of a finished host group are published before the scan of the chunk ends."""
    chunk = make_chunk(
        {"ports": "1-20", "max_rate": 600},
        first_address="127.9.42.0",
        outcomes="." * 256,
    )
    async with rigged(await make_nmap()) as rig:
        await rig.send(chunk)
        await until(rig.hosts, 60)
        assert rig.end() is None
        await until(rig.end, 60)
        assert isinstance(rig.end(), ChunkScanned)


@pytest.mark.proves("F2", "G10")
async def test_scan_resumed_chunk_scans_only_blanks(make_chunk: MakeChunk, make_nmap: MakeNmap) -> None:
    """Addresses that the first attempt finished are neither scanned nor reported again by the second."""
    async with rigged(await make_nmap()) as rig:
        await rig.send(make_chunk(attempt=2, first_address="127.9.43.0", outcomes="aa.d.s.."))
        await until(rig.end, 60)
        end = rig.end()
        assert isinstance(end, ChunkScanned)
        assert end.outcomes == "aaadasaa"
        assert sorted(rig.hosts()) == ["127.9.43.2", "127.9.43.4", "127.9.43.6", "127.9.43.7"]


@pytest.mark.proves("G8")
async def test_stop_kills_nmap_within_two_seconds(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
) -> None:
    """StopChunk ends all processes of real nmap within two seconds."""
    chunk = make_chunk({"ports": "1-1000", "max_rate": 1}, first_address="127.9.44.0")
    async with rigged(await make_nmap()) as rig:
        await rig.send(chunk)
        await until(lambda: marked(rig.nmap))
        await rig.send(StopChunk(job_id=1, chunk_id="1-0", attempt=1, worker_id="worker", reason="cancelled"))
        await until(lambda: rig.end() and not marked(rig.nmap), 2)
        assert isinstance(rig.end(), ChunkReleased)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Callable[[], list[list[str]]]]:
    """Return a real nmap that records each of its starts, and a function that returns the targets of each start."""
    program, starts = tmp_path / "recorded", tmp_path / "starts"
    program.write_text(f'#!/bin/sh\necho "$@" >> {starts}\nexec {NMAP} "$@"\n')
    program.chmod(0o755)

    def targets() -> list[list[str]]:
        lines = starts.read_text().splitlines() if starts.exists() else []
        return [line.split(" -- ")[1].split() for line in lines if " -- " in line]  # trial runs have no targets

    return program, targets


@contextlib.asynccontextmanager
async def busy(rig: Rig, make_chunk: MakeChunk) -> AsyncIterator[None]:
    """Occupy the only slot, and free it on exit, so that the chunks sent meanwhile start together."""
    taking = make_chunk({"ports": "1-1000", "max_rate": 1}, chunk_id="9-0", first_address="127.9.45.0", outcomes=".")
    await rig.send(taking)
    await until(lambda: marked(rig.nmap))
    yield
    await rig.send(StopChunk(job_id=1, chunk_id="9-0", attempt=1, worker_id="worker", reason="over"))


async def test_batch_small_chunks_share_one_nmap(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    recorded: tuple[Path, Callable[[], list[list[str]]]],
    listeners: Callable[..., int],
) -> None:
    """Five waiting chunks of one host start one nmap, and each has the same results as alone."""
    port = listeners("127.9.46.1", "127.9.46.3")
    program, starts = recorded
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}

    def chunks(failures: int) -> list[ScanChunk]:
        fields = {"outcomes": ".", "failures": failures}
        return [
            make_chunk({"ports": f"{port},1"}, chunk_id=f"1-{last}", first_address=f"127.9.46.{last}", **fields)
            for last in range(5)
        ]

    for how, failures in (("together", 0), ("alone", 1)):
        async with rigged(await make_nmap(program), slots=1) as rig:
            before = len(starts())
            async with busy(rig, make_chunk):
                await rig.send(*chunks(failures))
            await until(lambda rig=rig: len(rig.scanned()) == 5, 60)  # type: ignore[misc] # mypy infers no type for a lambda with a default
            assert rig.scanned() == {f"1-{last}": "a" for last in range(5)}
            found[how] = {a: (h.chunk_id, [p.port for p in h.ports]) for a, h in rig.hosts().items()}
            assert len(starts()) - before == 1 + {"together": 1, "alone": 5}[how]
    assert found["together"] == found["alone"]
    assert found["together"]["127.9.46.1"] == ("1-1", [port])


@pytest.mark.proves("G8")
async def test_batch_cancel_stops_only_its_own_targets(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    recorded: tuple[Path, Callable[[], list[list[str]]]],
    listeners: Callable[..., int],
) -> None:
    """Two seconds after one chunk is cancelled no nmap has its targets; the others are finished, no address twice."""
    port = listeners("127.9.47.70", "127.9.48.5", "127.9.49.9")
    program, starts = recorded
    policy = {"ports": f"{port},1-19", "max_rate": 320}  # 960 probes in three seconds
    chunks = [
        make_chunk(policy, chunk_id=f"1-{net}", first_address=f"127.9.{net}.64", outcomes="." * 16)
        for net in (47, 48, 49)
    ]
    async with rigged(await make_nmap(program), slots=1) as rig:
        async with busy(rig, make_chunk):
            await rig.send(*chunks)
        await until(lambda: any(b"127.9.48.64/28" in line(pid) for pid in marked(rig.nmap)), 60)
        await rig.send(StopChunk(job_id=1, chunk_id="1-48", attempt=1, worker_id="worker", reason="cancelled"))
        await until(lambda: not any(b"127.9.48.64/28" in line(pid) for pid in marked(rig.nmap)), 2)
        await until(lambda: len(rig.scanned()) == 2, 60)
        assert rig.scanned() == {"1-47": "a" * 16, "1-49": "a" * 16}
        released = [m for m in rig.bus.messages(SCAN_PROGRESS) if isinstance(m, ChunkReleased) and m.chunk_id == "1-48"]
        assert [m.outcomes for m in released] == ["." * 16]
        reported = [m.address for m in rig.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)]
        assert len(set(reported)) == len(reported) == 32
        assert {a: [p.port for p in h.ports] for a, h in rig.hosts().items() if h.ports} == {"127.9.47.70": [port]}
    assert starts()[1:] == [
        ["127.9.47.64/28", "127.9.48.64/28", "127.9.49.64/28"],
        ["127.9.47.64/28", "127.9.49.64/28"],
    ]


def line(pid: int) -> bytes:
    """Return the command line of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.proves("F20")
async def test_batch_nmap_crash_fails_unfinished_chunks(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
) -> None:
    """Of three chunks in one nmap that crashes, the one with a complete result is scanned, and the others fail."""
    body = """
        if "127.9.1.1/32" not in sys.argv: time.sleep(600)
        write(HEAD, host(1)); os.kill(os.getpid(), signal.SIGSEGV)
    """
    async with rigged(await make_nmap(stand_in(body)), slots=1) as rig:
        async with busy(rig, make_chunk):
            await rig.send(
                *(make_chunk(chunk_id=f"1-{n}", first_address=f"127.9.1.{n}", outcomes=".") for n in (1, 2, 3)),
            )

        def failed() -> dict[str, str]:
            progress = rig.bus.messages(SCAN_PROGRESS)
            return {m.chunk_id: m.reason for m in progress if isinstance(m, ChunkFailed)}

        await until(lambda: rig.scanned() and len(failed()) == 2, 60)
        assert rig.scanned() == {"1-1": "a"}
        assert set(failed()) == {"1-2", "1-3"}
        assert all("SIGSEGV" in reason for reason in failed().values())
        await until(lambda: not marked(rig.nmap), 30)


FAILURES = {
    "exits with 1": ("write(HEAD, host(0)); sys.exit('out of luck')", "exited with 1: out of luck", "a..."),
    "is killed": ("write(HEAD, host(0)); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "a..."),
    "writes half": ("write(HEAD, host(0), host(1)[:60])", "truncated", "a..."),
    "writes no XML": ("write('Nmap done!')", "malformed nmap output", "...."),
    "omits hosts": ("write(HEAD, host(0), host(2), TAIL)", "2 addresses are missing", "a.a."),
    "reports failure": ("write(HEAD, host(0), TAIL.replace('success', 'error'))", "finished", "a..."),
    "scans other ports": ("write(HEAD.replace('\"2\"', '\"1\"'), host(0))", "probes", "...."),
    "hangs": ("write(HEAD, host(0)); time.sleep(600)", "no progress for 3 seconds", "a..."),
    "makes no progress": (
        'write(HEAD, host(0))\nwhile True: write(\'<taskprogress task="Connect Scan" time="1" percent="3.12"/>\'); time.sleep(0.2)',
        "no progress for 3 seconds",
        "a...",
    ),
    "ignores SIGTERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); write(HEAD, host(0)); time.sleep(600)",
        "no progress for 3 seconds",
        "a...",
    ),
    "forks and hangs": (
        "for own in (True, False): subprocess.Popen(['sleep', '600'], start_new_session=own)\nwrite(HEAD, host(0)); time.sleep(600)",
        "no progress for 3 seconds",
        "a...",
    ),
    "leaves a child with its output": (
        "write(HEAD, host(0)); subprocess.Popen(['sleep', '600'], start_new_session=True); sys.exit(3)",
        "exited with 3",
        "a...",
    ),
    "floods one host": (
        "write(HEAD, host(0), '<host>')\nwhile True: write('<elem>x</elem>' * 5000)",
        "host of more than",
        "a...",
    ),
    "floods": (
        "write(HEAD, host(0))\nwhile True: write('<taskprogress a=\"' + 'x' * 60000 + '\"/>', host(0))",
        "wrote more than",
        "a...",
    ),
    "floods its errors": (
        "write(HEAD, host(0))\nfor _ in range(5000): print('e' * 20000, file=sys.stderr)\nsys.exit(1)",
        "exited with 1: eee",
        "a...",
    ),
    "declares entities": (
        "write('<!DOCTYPE nmaprun [<!ENTITY a \"b\">]><nmaprun>', host(0))",
        "malformed nmap output",
        "....",
    ),
}


@pytest.mark.proves("F20", "G16")
@pytest.mark.parametrize(("body", "reason", "outcomes"), FAILURES.values(), ids=FAILURES.keys())
async def test_scan_faulty_nmap_fails_the_chunk_with_a_reason(  # noqa: PLR0917 # pytest passes fixtures by name
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
    body: str,
    reason: str,
    outcomes: str,
) -> None:
    """For any fault of nmap, complete hosts are kept, the reason is reported, no process is left, and the worker stays up."""
    async with rigged(await make_nmap(stand_in(body), replace(LIMITS, stall_seconds=3))) as rig:
        await rig.send(make_chunk())
        await until(rig.end, 60)
        failed = rig.end()
        assert isinstance(failed, ChunkFailed)
        assert (failed.outcomes, reason in failed.reason) == (outcomes, True), failed.reason
        assert len(failed.reason) <= 500
        await until(lambda: not marked(rig.nmap), 30)
        assert rig.worker.alive


@pytest.mark.proves("F20")
async def test_scan_standing_nmap_is_a_stall_with_the_default_timeouts(
    make_chunk: MakeChunk, make_nmap: MakeNmap, stand_in: Callable[[str], Path]
) -> None:
    """An nmap that hangs on several addresses fails before the timeout of the attempt, so the chunk goes to another worker."""
    scale = 10  # of the default timeouts, to save time
    stall, attempt = (Settings.model_fields[name].default / scale for name in ("stall_seconds", "attempt_seconds"))
    nmap = await make_nmap(stand_in("write(HEAD); time.sleep(600)"), replace(LIMITS, stall_seconds=stall))
    async with rigged(nmap, attempt_seconds=attempt) as rig:
        await rig.send(make_chunk())
        await until(rig.end, 60)
        assert isinstance(rig.end(), ChunkFailed)


PROGRESS = """
    write(HEAD)
    for tenth in range(40):
        write(f'<taskprogress task="Connect Scan" time="1" percent="{tenth / 10:.2f}" remaining="9" etc="1"/>')
        time.sleep(0.1)
    write(*map(host, range(4)), TAIL)
"""


async def test_scan_with_progress_is_not_stopped(
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
) -> None:
    """An nmap whose percentage grows may run for longer than the stall timeout."""
    nmap = await make_nmap(stand_in(PROGRESS), replace(LIMITS, stall_seconds=2))
    assert len([host async for hosts in nmap.scan(["--"], PortSet.parse("1-2")) for host in hosts]) == 4


@pytest.mark.parametrize(
    ("arguments", "task", "stopped"),
    [
        (["-T4", "--host-timeout", "30s"], "Connect Scan", True),
        (["-T4", "--host-timeout", "30s"], "NSE", False),
        (["-T4", "--host-timeout", "30s"], "Service scan", False),
        (["-T1", "--host-timeout", "30s"], "Connect Scan", False),
        (["-T0", "--host-timeout", "30s"], "Ping Scan", False),
    ],
)
async def test_scan_expected_pauses_extend_the_stall_timeout(
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
    arguments: list[str],
    task: str,
    stopped: bool,
) -> None:
    """Beyond the stall timeout, slow timings may wait for a probe, and services and scripts for the host timeout."""
    body = f'write(HEAD, \'<taskbegin task="{task}" time="1"/>\'); time.sleep(4); write(*map(host, range(4)), TAIL)'
    nmap = await make_nmap(stand_in(body), replace(LIMITS, stall_seconds=2))
    with pytest.raises(ScanError, match="no progress for 2 seconds") if stopped else contextlib.nullcontext():
        hosts = [host async for hosts in nmap.scan([*arguments, "--"], PortSet.parse("1-2")) for host in hosts]
        assert len(hosts) == 4


@pytest.mark.proves("F20")
async def test_scan_stopped_nmap_is_killed(make_nmap: MakeNmap) -> None:
    """Real nmap that receives SIGSTOP makes no progress, and is killed after the stall timeout."""
    nmap = await make_nmap(NMAP, replace(LIMITS, stall_seconds=2))
    line = ["-n", "-sT", "-Pn", "-p", "1-900", "--scan-delay", "100ms", "-oX", "-", "--stats-every", "1s", "127.9.40.1"]

    async def scan() -> None:
        async for _ in nmap.scan(line, PortSet.parse("1-900")):
            pass

    scanning = asyncio.create_task(scan())
    await until(lambda: marked(nmap))
    await asyncio.sleep(3)  # longer than the stall timeout: it makes progress
    assert not scanning.done()
    for pid in marked(nmap):
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ScanError, match="no progress for 2 seconds"):
        await asyncio.wait_for(scanning, 20)


@pytest.mark.proves("F25")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "truncated"),
        ("sys.exit('libpcap.so.0.8: cannot open shared object file')", "exited with 1: libpcap"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
async def test_scan_nmap_ends_before_scanning_raises_cannot_start(
    make_nmap: MakeNmap, stand_in: Callable[[str], Path], body: str, reason: str
) -> None:
    """An nmap that ends before it has announced its ports has sent no packet, so the chunk cannot be the cause."""
    nmap = await make_nmap(stand_in(body))
    with pytest.raises(CannotStartError, match=reason):
        await anext(nmap.scan(["--"], PortSet.parse("1-2")))


def trial(version: str, end: str = '<runstats><finished time="1" exit="success"/></runstats></nmaprun>') -> str:
    """Return a script with the output of a trial run of this version."""
    return f"""echo '<?xml version="1.0"?><!DOCTYPE nmaprun><nmaprun version="{version}">{end}'"""


@pytest.mark.proves("F25")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (trial("7.80"), r"nmap 7\.80.*7\.92 is the oldest.*Debian 12"),
        (trial("7.91"), r"nmap 7\.91.*SCANFLEET_NMAP"),
        (trial(""), "unknown version"),
        (
            trial("7.93", '<runstats><finished time="1" exit="error"/></runstats></nmaprun>'),
            "did not report that it finished",
        ),
        (trial("7.93", ""), "truncated"),
        ("echo Nmap 7.93", "malformed nmap output"),
        ("true", "truncated"),
        ("exit 1", "exited with 1"),
        ("echo no libpcap >&2; exit 127", "exited with 127: no libpcap"),
        ("exec sleep 60", "did not end within 1 seconds"),
    ],
)
async def test_check_unusable_nmap_raises_with_cause(
    make_nmap: MakeNmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    """An nmap that is too old, fails or hangs is rejected, and the message has the cause and the remedy."""
    monkeypatch.setattr(process, "CHECK_SECONDS", 1.0)
    program = tmp_path / "nmap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(CannotStartError, match=reason):
        await (await make_nmap(program)).check()


@pytest.mark.proves("F25")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec >&-; exec sleep 60", "did not exit within"),
        ("exec sleep 60", "within 1 seconds"),
        ("echo no table >&2; exit 3", "exited with 3: no table"),
        ("true", "did not list|does not have"),
    ],
)
@pytest.mark.parametrize("listing", ["--script-help", "--top-ports"])
async def test_nmap_that_does_not_list_scripts_or_ports_raises_cannot_start(  # noqa: PLR0917 # pytest passes fixtures by name
    make_nmap: MakeNmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, script: str, reason: str
) -> None:
    """A run without targets that fails or hangs is a failure of the worker, with the cause."""
    monkeypatch.setattr(process, "CHECK_SECONDS", 1.0)
    monkeypatch.setattr(process, "END_SECONDS", 0.5)
    program = tmp_path / "nmap"
    program.write_text(f'#!/bin/sh\ncase "$*" in *{listing}*) {script};; *) {trial("7.93")};; esac\n')
    program.chmod(0o755)
    nmap = await make_nmap(program)
    with pytest.raises(CannotStartError, match=reason):
        await (nmap.check() if listing == "--script-help" else nmap.ranked(PortSet(top=9)))


@pytest.mark.proves("F21", "F25")
async def test_check_missing_program_or_folder_raises(make_nmap: MakeNmap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real nmap passes; a missing program or temporary folder fails."""
    nmap = await make_nmap()
    await nmap.check()
    monkeypatch.setattr("tempfile.tempdir", "/proc/nothing")
    with pytest.raises(CannotStartError, match="temporary folder"):
        await nmap.check()
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(CannotStartError, match="cannot start /nowhere/nmap"):
        await (await make_nmap("/nowhere/nmap")).check()


@pytest.mark.parametrize("name", ["unheard-of", "default", "all"])
async def test_check_missing_script_is_named(make_nmap: MakeNmap, name: str) -> None:
    """A name that is not a script of the installed nmap, such as a category, is reported with its setting."""
    nmap = await make_nmap(scripts=ADMITTED_SCRIPTS | {name})
    with pytest.raises(CannotStartError, match=f"does not have the scripts {name}: .*SCANFLEET_SCRIPTS"):
        await nmap.check()


@pytest.mark.proves("A23", "G12")
async def test_scan_service_detection_runs_only_recorded_scripts(make_chunk: MakeChunk, make_nmap: MakeNmap) -> None:
    """Service detection runs only the scripts that ChunkScanned lists, whichever scripts the operator allows."""
    nmap = await make_nmap(scripts=ADMITTED_SCRIPTS | {"mqtt-subscribe"})
    recorded = scripts_of(make_chunk({"service_detection": True, "scripts": ["banner"]}).policy)
    assert recorded == ("banner", *sorted(VERSION_SCRIPTS))
    without_targets = ("-n", "-Pn", "-sT", "-iL", os.devnull)
    output = await nmap._list("scripts", (*without_targets, "-d2", "-sV", "--script", "banner"))
    assert sorted(re.findall(rb"NSE: Loaded '[^']*/([a-z-]+)\.nse'", output)) == [name.encode() for name in recorded]


@pytest.mark.proves("F20")
async def test_scan_leftover_child_is_killed(
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
) -> None:
    """A run that succeeds is valid, and processes left in its process group are killed."""
    body = """
        subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        write(HEAD, *map(host, range(4)), TAIL)
    """
    async with rigged(await make_nmap(stand_in(body))) as rig:
        await rig.send(make_chunk())
        await until(rig.end)
        assert isinstance(rig.end(), ChunkScanned)
        await until(lambda: not marked(rig.nmap), 30)


async def test_scan_nmap_inherits_nothing(  # pytest passes fixtures by name
    make_chunk: MakeChunk,
    make_nmap: MakeNmap,
    stand_in: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nmap gets a minimal environment, a private temporary home folder, and exactly the given arguments."""
    monkeypatch.setenv("NMAPDIR", "/elsewhere")
    monkeypatch.setenv("SCANFLEET_KAFKA", "secret:9092")
    body = f"""
        open({str(tmp_path / "seen")!r}, "w").write(repr((dict(os.environ), os.getcwd(), sys.argv[1:])))
        write(HEAD, *map(host, range(4)), TAIL)
    """
    async with rigged(await make_nmap(stand_in(body))) as rig:
        await rig.send(make_chunk())
        await until(rig.end)
    environment, folder, argv = eval((tmp_path / "seen").read_text())  # noqa: S307 # written by the stand-in above
    assert set(environment) <= {"PATH", "LC_ALL", "HOME", "TMPDIR", "SCANFLEET_MARK", "LC_CTYPE"}
    assert environment["HOME"] == environment["TMPDIR"] == folder
    assert not Path(folder).exists()  # noqa: ASYNC240 # a test may block
    assert argv[argv.index("--") + 1 :] == ["127.9.1.0/30"]


WORKER = """
import asyncio, sys
import uvloop
from scanfleet.scanning.ports import PortSet
from scanner_worker.domain.scan import CannotStartError, ScanError
from scanner_worker.scanner import guard, process
from scanner_worker.scanner.process import Limits, Nmap

async def main():
    nmap = Nmap(sys.argv[1], Limits(1 << 20, 1 << 20, 60))
    await nmap.start()
    print(nmap._mark, flush=True)
    async for _ in nmap.scan(sys.argv[2:], PortSet.parse("1-9")):
        pass

uvloop.run(main())  # as uvicorn does; it resets the child's signals, which asyncio does not
"""


async def start_scanning(program: str, *arguments: str, **options: object) -> tuple[asyncio.subprocess.Process, Nmap]:
    """Start a process that scans as a worker does; return it and an Nmap to find its nmap processes by."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, program, *arguments),
        stdout=asyncio.subprocess.PIPE,
        **options,  # type: ignore[arg-type] # as the policy has them
    )
    assert process.stdout is not None
    theirs = Nmap(program, LIMITS)
    theirs._mark = (await process.stdout.readline()).decode().strip()
    return process, theirs


def guards(nmap: Nmap) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            if nmap._mark.encode() in line and b"guard.py" in line:
                found.append(int(folder.name))
    return found


@pytest.mark.proves("F2", "G8")
async def test_guard_killed_worker_leaves_no_nmap() -> None:
    """After kill -9 of a scanning worker neither its nmap nor the guard is left."""
    process, theirs = await start_scanning(NMAP, *SLOW)
    await until(lambda: marked(theirs))
    process.kill()
    await process.wait()
    await until(lambda: not marked(theirs), 30)
    await until(lambda: not guards(theirs), 5)


async def test_guard_ignores_signals_of_the_process_group() -> None:
    """After SIGTERM to the worker's process group and kill -9 of the worker no nmap is left."""
    process, theirs = await start_scanning(NMAP, *SLOW, start_new_session=True)
    await until(lambda: marked(theirs))
    for pid in guards(theirs):
        os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    await until(lambda: not marked(theirs), 30)


async def test_guard_signalled_during_its_start_keeps_running() -> None:
    """Signals that stop a worker do not end its guard, even as soon as it has started."""
    nmap = Nmap(NMAP, LIMITS)
    await nmap.start()
    assert nmap._guard is not None
    for number in guard.IGNORED:
        nmap._guard.send_signal(number)
    await nmap.stop()
    assert nmap._guard.returncode == 0


@pytest.mark.proves("F2", "F20")
async def test_guard_killed_worker_leaves_no_forked_process(stand_in: Callable[[str], Path]) -> None:
    """Processes that nmap forked, even into new sessions, are killed with the worker."""
    program = stand_in("""
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    """)
    process, theirs = await start_scanning(str(program), *SLOW)
    await until(lambda: len(marked(theirs)) == 3)
    process.kill()
    await process.wait()
    await until(lambda: not marked(theirs), 30)


@pytest.mark.proves("F2")
async def test_guard_worker_killed_during_start_leaves_no_nmap(stand_in: Callable[[str], Path]) -> None:
    """A worker killed as soon as it has forked, before it has nmap's process id, leaves no process."""
    program = str(stand_in("time.sleep(600)"))  # nmap itself may end without its reader
    killed = []
    for _ in range(4):
        worker, theirs = await start_scanning(program, *SLOW)
        await asyncio.to_thread(_kill_after_fork, worker.pid)
        await worker.wait()
        killed.append(theirs)
    for theirs in killed:
        await until(lambda: not guards(theirs), 5)  # noqa: B023 # called before the next turn
        assert marked(theirs) == []


def _kill_after_fork(pid: int) -> None:
    """Kill a worker once it has a child besides its guard, with no pause between checks: a program starts in a millisecond."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while len(children.read_text().split()) < 2:
        pass
    os.kill(pid, signal.SIGKILL)


async def test_start_guard_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose guard cannot run does not start, so that no nmap runs without one."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the guard of nmap processes ended"):
        await Nmap(NMAP, LIMITS).start()


async def test_guard_identifies_processes_by_command_line() -> None:
    """A process whose environment cannot be read, as with capabilities, is killed by its command line."""
    mark = f"mark-{os.getpid()}"
    process = await asyncio.create_subprocess_exec(f"nmap-{mark}.", "600", executable="/bin/sleep", env={})
    other = await asyncio.create_subprocess_exec("sleep", "600", env={})
    try:
        assert guard.kill_marked(f"{mark}.") == 1
        assert await asyncio.wait_for(process.wait(), 5) == -signal.SIGKILL
        assert other.returncode is None
    finally:
        other.kill()
        await other.wait()


async def test_worker_without_guard_is_not_alive(make_nmap: MakeNmap) -> None:
    """A worker whose guard has died is not alive."""
    nmap = await make_nmap()
    assert nmap.alive
    await until(lambda: guards(nmap))  # until it runs its program
    for pid in guards(nmap):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not nmap.alive)
