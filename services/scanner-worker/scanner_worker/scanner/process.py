"""Run nmap as a process: start it with a clean environment, read its output within limits, and leave no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex
from typing import Final

import structlog

from scanfleet.scanning.policy import ADMITTED_SCRIPTS
from scanfleet.scanning.ports import PortSet, parse_ranges
from scanner_worker.domain.ports import Found
from scanner_worker.domain.scan import (
    CannotStartError,
    KilledByGuardError,
    NoRouteError,
    ScanError,
    printable,
    services,
)
from scanner_worker.metrics import NMAP_RUNNING, NMAP_STARTS
from scanner_worker.scanner import datadir, guard, python_nmap
from scanner_worker.scanner.xml import BadXmlError, Reader

PIECE_BYTES: Final = 1 << 16  # per read: the capacity of a pipe
LOOK_SECONDS: Final = 1.0  # interval of checks whether a silent nmap is still running
BEAT_SECONDS: Final = 1.0  # interval of writes to the guard
END_SECONDS: Final = 5.0  # timeout for nmap to exit after its output has ended, and for a killed process to disappear
KILLS: Final = 20  # maximum kill rounds: processes may fork in between, and killed ones stay visible for a few
STDERR_BYTES: Final = 2_000  # of standard error that are kept, the last ones: nmap writes its fatal error last
_DISCARD: Final = 9  # any port: connecting a UDP socket sends nothing
# Timeout of a run without targets: nmap starts in 0.1 s, and in some seconds on a loaded machine.
CHECK_SECONDS: Final = 30.0

MIN_VERSION: Final = (7, 92)  # older versions spell reasons and timeouts differently, and omit ports from the XML
_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")

# A run that sends no packets but needs everything that a scan needs: a process, a temporary folder, nmap and its libraries.
_TRIAL: Final = ("-n", "-sL", "-oX", "-", "127.0.0.1")

# A run that lists scripts: its output has an element for each installed script.
_HELP: Final = ("-oX", "-", "--script-help")
_SCRIPT: Final = re.compile(rb'<script filename="[^"]*?([a-z0-9-]+)\.nse"')
# nmap's folder of script libraries, which is in that of its tables; the order of the attributes varies.
_LIBRARIES: Final = re.compile(rb'<directory (?=[^>]*name="nselib")[^>]*path="([^"]+)"')

# A run without targets, in which nmap lists the ports that it would probe.
_NO_TARGETS: Final = ("-n", "-Pn", "-sT", "-oX", "-", "-iL", os.devnull)
_SERVICES: Final = re.compile(rb'<scaninfo [^>]*protocol="tcp"[^>]* services="([0-9,-]+)"')

_NO_ROUTE: Final = re.compile("failed to determine route to [0-9a-fA-F.:]+")

# Seconds between two probes of a host, by timing template; nmap may show no progress for that long.
_PROBE_DELAYS: Final = {"-T0": 300.0, "-T1": 15.0}
# Phases whose percentage counts whole services or scripts: a silent port takes 510 s at intensity 9. The host timeout
# limits these phases.
_COARSE_TASKS: Final = frozenset({"Service scan", "NSE"})

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of one nmap.

    Attributes:
        output: maximum number of bytes that it may write.
        host: maximum number of bytes about one host.
        stall_seconds: timeout of an nmap without progress, in addition to the pauses that its options explain.
    """

    output: int
    host: int
    stall_seconds: float


class Nmap:
    """Starts nmap processes, and the guard that kills them if this process ends or is blocked.

    Attributes:
        version: nmap's version in the latest run; empty before the first one.
    """

    def __init__(self, program: str, limits: Limits, scripts: AbstractSet[str] = ADMITTED_SCRIPTS) -> None:
        self.version = ""
        self._program = program
        self._limits = limits
        self._scripts = scripts
        self._mark = f"scanfleet-{token_hex(16)}"
        self._runs = 0
        self._guard: asyncio.subprocess.Process | None = None
        self._limit = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._most_common: dict[int, PortSet] = {0: PortSet()}
        self._table: datadir.ServiceTable | None = None
        self._kills = -1  # file descriptor to which the guard writes when it kills
        self._killed_at = 0.0

    async def start(self) -> None:
        """Start the guard; no nmap may be started before.

        Raises:
            RuntimeError: the guard ended at its start.
        """
        self._kills, kills = os.pipe()
        os.set_blocking(self._kills, False)
        try:
            self._guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, self._mark),
                stdin=asyncio.subprocess.PIPE,
                stdout=kills,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(kills)
        await self._guard_writes()
        if not os.read(self._kills, guard.NUMBER.size):
            await self.stop()
            raise RuntimeError(
                "the guard of nmap processes ended at its start; check that the worker may start processes"
            )
        self._beating = asyncio.create_task(self._beat(), name="beat")

    async def _guard_writes(self) -> None:
        """Wait until the guard ignores signals, or has ended."""
        loop, written = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._kills, written.set)
        try:
            await written.wait()
        finally:
            loop.remove_reader(self._kills)

    async def stop(self) -> None:
        """Let the guard kill remaining processes and exit."""
        if self._beating is not None:
            self._beating.cancel()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()
            os.close(self._kills)

    def hold(self, seconds: float) -> None:
        """Have the guard kill every nmap if the event loop is blocked for `seconds`; before the first call it kills none."""
        self._limit = seconds
        self._write_limit()

    async def _beat(self) -> None:
        while True:
            self._write_limit()
            await asyncio.sleep(BEAT_SECONDS)

    def _write_limit(self) -> None:
        if self._limit and self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.write(guard.NUMBER.pack(self._limit))

    def _killed_by_guard(self, run: _Run) -> bool:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._kills, guard.NUMBER.size):
                (self._killed_at,) = guard.NUMBER.unpack(data)
        return self._killed_at >= run.began

    @property
    def alive(self) -> bool:
        """False if the guard has exited: the process must be replaced before an nmap can be orphaned."""
        beats = self._beating is not None and not self._beating.done()
        return beats and self._guard is not None and self._guard.returncode is None

    @property
    def ready(self) -> bool:
        return self.alive

    async def check(self) -> None:
        """Run nmap without sending packets, to check that it starts and is recent enough.

        Raises:
            CannotStartError: it cannot be used; the message has the cause and the remedy.
        """
        reader = Reader(max_host_bytes=self._limits.host)
        try:
            async with asyncio.timeout(CHECK_SECONDS), self._started(_TRIAL) as run:
                while data := await run.read():
                    if fault := _whole(reader, data)[1]:
                        raise CannotStartError(f"a trial run of {self._program} failed: {fault}")
                if code := await run.wait():
                    raise CannotStartError(f"{self._program} {_ended(code)}: {run.stderr_tail}")
                reader.close()
        except TimeoutError:
            raise CannotStartError(
                f"a trial run of {self._program} did not end within {CHECK_SECONDS:.0f} seconds"
            ) from None
        except (BadXmlError, ScanError) as error:
            raise CannotStartError(f"a trial run of {self._program} failed: {error}") from error
        found = _VERSION.match(reader.version)
        if not found or (int(found[1]), int(found[2])) < MIN_VERSION:
            raise CannotStartError(
                f"{self._program} is nmap {printable(reader.version) or 'of an unknown version'}, and "
                f"{'.'.join(map(str, MIN_VERSION))} is the oldest supported version: install a newer one (Debian 12, Ubuntu 24.04 "
                "and later have it), and set SCANFLEET_NMAP if it is not the first in PATH"
            )
        self.version = reader.version
        await self._check_installation()

    async def _check_installation(self) -> None:
        output = await self._list("scripts", (*_HELP, ",".join(sorted(self._scripts))))
        if missing := self._scripts - {name.decode() for name in _SCRIPT.findall(output)}:
            raise CannotStartError(
                f"{self._program} does not have the scripts {', '.join(sorted(missing))}: install nmap's scripts, or remove "
                "these names from SCANFLEET_SCRIPTS"
            )
        self._most_common = {0: PortSet()}
        self._table = _services_table(output)

    def source(self, address: str) -> str | None:
        """Return the address from which packets to `address` are sent; None without a route. Sends nothing."""
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET  # noqa: PLR2004 # IPv6
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as unsent:
                unsent.connect((address, _DISCARD))
                source: str = unsent.getsockname()[0]
        except OSError:
            return None
        return str(ip_address(source.partition("%")[0]))  # without the zone of a link-local address

    async def ranked(self, ports: PortSet) -> PortSet:
        """Return the TCP ports that a `top` set, or a part of one, stands for, by nmap's own table. Sends no packets.

        The ports are listed once per number of ports.

        Raises:
            CannotStartError: nmap does not list the ports.
        """
        return (await self._common(ports.top)).without(await self._common(ports.above))

    async def _common(self, count: int) -> PortSet:
        if count not in self._most_common:
            output = await self._list("most common ports", (*_NO_TARGETS, "--top-ports", str(count)))
            listed = _SERVICES.search(output)
            if not listed:
                raise CannotStartError(f"{self._program} did not list its {count} most common ports")
            self._most_common[count] = PortSet(tcp=parse_ranges(listed[1].decode()))
        return self._most_common[count]

    async def _list(self, what: str, arguments: Sequence[str]) -> bytes:
        """Return the output of a run without targets.

        Raises:
            CannotStartError: it failed, or did not end within its timeout.
        """
        output, cause = b"", ""
        try:
            async with asyncio.timeout(CHECK_SECONDS), self._started(arguments) as run:
                while data := await run.read():
                    output += data
                if code := await run.wait():
                    cause = f": it {_ended(code)}: {run.stderr_tail}"
        except TimeoutError:
            cause = f" within {CHECK_SECONDS:.0f} seconds"
        except ScanError as error:
            cause = f": {error}"
        if cause:
            raise CannotStartError(f"{self._program} did not list its {what}{cause}")
        return output

    async def scan(self, arguments: Sequence[str], ports: PortSet) -> AsyncGenerator[Found]:
        """Run nmap and yield finished hosts with their open ports, in lists of those that are ready.

        After the generator is closed, no process that it started is left.

        Args:
            arguments: the command line without the program.
            ports: the ports of these arguments; nmap must announce as many.

        Raises:
            CannotStartError: nmap did not start to scan, because of this worker.
            ScanError: the run failed; the hosts that were yielded are valid. The message has the cause.
            NoRouteError: the same, for lack of a route to the other targets.
            KilledByGuardError: the guard killed nmap because this process was blocked.
        """
        table = await self._services_of(ports)
        async with (
            self._started(arguments, table) as run,
            aclosing(self._read(run, arguments, services(ports))) as found,
        ):
            async for hosts in found:
                yield hosts

    async def _services_of(self, ports: PortSet) -> str | None:
        """Return the lines of these ports in nmap's table; None if nmap must read the whole one."""
        if self._table is None:
            return None
        lines = self._table.of(await self.ranked(ports) if ports.top else ports)
        # nmap chooses the ports of a `top` set from the table, which may have changed since the last trial run.
        return None if ports.top and lines.count("\n") < ports.count else lines

    @asynccontextmanager
    async def _started(self, arguments: Sequence[str], table: str | None = None) -> AsyncIterator[_Run]:
        """Run nmap in a temporary folder, and remove both on exit."""
        self._runs += 1
        NMAP_STARTS.inc()
        mark = f"{self._mark}-{self._runs}."  # the dot prevents one mark from being a prefix of another
        try:
            folder = tempfile.TemporaryDirectory(prefix="scanfleet-", ignore_cleanup_errors=True)
        except OSError as error:
            raise CannotStartError(f"cannot create a temporary folder for nmap: {error}") from error
        with folder:
            data = Path(folder.name, "data")  # one folder per run, so that no other run can change or remove it
            try:
                datadir.write(data, self._scripts, table)
            except OSError as error:
                raise CannotStartError(f"cannot write nmap's data folder: {error}") from error
            arguments = ("--datadir", str(data), *arguments)
            starting = asyncio.create_task(self._start(arguments, mark, folder.name))
            with NMAP_RUNNING.track_inprogress():
                try:
                    # Shielded: a start that is cancelled halfway would leave an orphaned nmap.
                    yield await asyncio.shield(starting)
                finally:
                    with contextlib.suppress(CannotStartError):
                        await (await starting).end()

    async def _start(self, arguments: Sequence[str], mark: str, folder: str) -> _Run:
        began = asyncio.get_running_loop().time()
        self._write_limit()  # a guard that is killing because a write was late does not kill processes started after it
        try:
            process = await asyncio.create_subprocess_exec(
                f"nmap-{mark}",  # argv[0], by which the guard identifies a process whose environment it may not read
                *arguments,
                executable=self._program,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                cwd=folder,
                # No inherited environment: NMAPDIR and a .nmap in the home folder would add foreign scripts and tables.
                env={"PATH": os.defpath, "LC_ALL": "C", "HOME": folder, "TMPDIR": folder, "SCANFLEET_MARK": mark},
            )
        except OSError as error:
            raise CannotStartError(f"cannot start {self._program}: {error}") from error
        return _Run(process, mark, began)

    async def _read(
        self,
        run: _Run,
        arguments: Sequence[str],
        expected: Mapping[str, int],
    ) -> AsyncGenerator[Found]:
        reader = Reader(max_host_bytes=self._limits.host)
        size = moves = 0
        while data := await run.read(self._limits.stall_seconds + _pause(arguments, reader.task)):
            size += len(data)
            if size > self._limits.output:
                raise ScanError(f"nmap wrote more than {self._limits.output} bytes (SCANFLEET_MAX_OUTPUT_BYTES)")
            hosts, fault = _whole(reader, data)
            self.version = reader.version or self.version
            if reader.moves != moves:
                moves = reader.moves
                run.moved()
            if hosts and reader.services != expected:
                raise ScanError(f"nmap probes {reader.services} ports instead of the requested {dict(expected)}")
            if hosts:
                yield hosts
            if fault:
                raise ScanError(fault)
        await self._finish(run, reader)

    async def _finish(self, run: _Run, reader: Reader) -> None:
        """Raise unless nmap succeeded; called after its output has ended."""
        code = await run.wait()
        if code == -signal.SIGKILL and self._killed_by_guard(run):
            raise KilledByGuardError("the guard killed nmap because the worker's event loop was blocked")
        # nmap announces its ports before it sends any packet; if it did not, no target can be the cause.
        failure = ScanError if reader.services else CannotStartError
        if code != 0:
            raise failure(f"nmap {_ended(code)}: {run.stderr_tail}")
        try:
            reader.close()
        except BadXmlError as error:
            raise failure(f"{error}: {run.stderr_tail}") from error
        if reader.skipped:
            skipped = f"nmap skipped the targets {', '.join(reader.skipped)}"
            if no_route := _NO_ROUTE.search(run.stderr_tail):
                raise NoRouteError(f"{skipped}: {no_route[0]}")
            raise ScanError(f"{skipped}: {run.stderr_tail}")


def _services_table(help_output: bytes) -> datadir.ServiceTable | None:
    """Return the table of the nmap that wrote this; None if it is not beside its libraries."""
    folder = _LIBRARIES.search(help_output)
    try:
        return datadir.ServiceTable.read(Path(os.fsdecode(folder[1])).parent) if folder else None
    except OSError as error:
        _log.warning("services_unreadable", cause=str(error), next_step="each nmap reads its whole table, in 20 ms")
        return None


def _pause(arguments: Sequence[str], task: str) -> float:
    """Return the seconds by which a healthy nmap with these arguments may exceed the stall timeout in a phase."""
    pause = 2 * max((delay for timing, delay in _PROBE_DELAYS.items() if timing in arguments), default=0.0)
    if task in _COARSE_TASKS and "--host-timeout" in arguments:
        pause += float(arguments[arguments.index("--host-timeout") + 1].removesuffix("s"))
    return pause


def _whole(reader: Reader, data: bytes) -> tuple[Found, str]:
    """Return the hosts that `data` completes, and the error after them."""
    hosts: Found = []
    try:
        for host in reader.feed(data):
            details, ports = python_nmap.read(host)
            hosts.append((host._replace(details=details), ports))  # hosts before an error are valid
    except BadXmlError as error:
        return hosts, str(error)
    return hosts, ""


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class _Run:
    """A running nmap."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str, began: float) -> None:
        assert process.stdout is not None  # noqa: S101 # requested as pipes
        assert process.stderr is not None  # noqa: S101 # the same
        self._process = process
        self._out, self._err = process.stdout, process.stderr
        self._mark = mark
        self.began = began
        self._waited_seconds = 0.0  # spent reading since the last progress, without the worker's own processing time
        self._said = b""
        self._listening = asyncio.create_task(self._listen())

    @property
    def stderr_tail(self) -> str:
        """The end of nmap's standard error, in one line."""
        lines = self._said.decode(errors="backslashreplace").split("\n")
        return printable("; ".join(line.strip() for line in lines if line.strip())) or "no error message"

    async def read(self, patience: float = math.inf) -> bytes:
        """Read what nmap has written; empty at the end of the output.

        Args:
            patience: timeout in seconds since nmap's last progress.

        Raises:
            ScanError: nmap made no progress within `patience`.
        """
        now = asyncio.get_running_loop().time
        while True:
            if self._waited_seconds >= patience:
                raise ScanError(f"nmap made no progress for {patience:.0f} seconds and was stopped")
            began = now()
            try:
                async with asyncio.timeout(min(LOOK_SECONDS, patience)):
                    return await self._out.read(PIECE_BYTES)
            except TimeoutError:
                if self._process.returncode is not None:
                    self._kill()  # it has exited, and a process that it forked keeps its output open
            finally:
                # Bounded, because the whole worker may have been stopped meanwhile.
                self._waited_seconds += min(now() - began, LOOK_SECONDS)

    def moved(self) -> None:
        """Record progress of nmap."""
        self._waited_seconds = 0.0

    async def wait(self) -> int:
        """Return nmap's exit code; called after its output has ended."""
        try:
            async with asyncio.timeout(END_SECONDS):
                code = await self._process.wait()
                await self._listening
        except TimeoutError:
            raise ScanError(f"nmap did not exit within {END_SECONDS:.0f} seconds after its output") from None
        return code

    async def end(self) -> None:
        """Kill every remaining process of this run and wait until none is left."""
        clean = self._process.returncode == 0 and self._out.at_eof()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if not clean:
            self._kill()
        try:
            async with asyncio.timeout(END_SECONDS):
                while await self._out.read(PIECE_BYTES):
                    pass  # drain the pipe: one that is not read to its end is never closed
                await self._listening
                await self._process.wait()
        except TimeoutError:
            _log.error(
                "nmap_kill_failed", pid=self._process.pid, cause=f"it did not end within {END_SECONDS:g} seconds"
            )
            self._listening.cancel()

    def _kill(self) -> None:
        """Kill all processes of this run, including those that have left nmap's process group."""
        for _ in range(KILLS):
            if not guard.kill_marked(self._mark):
                return

    async def _listen(self) -> None:
        while data := await self._err.read(PIECE_BYTES):
            self._said = (self._said + data)[-STDERR_BYTES:]
