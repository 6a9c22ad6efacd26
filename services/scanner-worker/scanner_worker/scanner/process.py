"""nmap as a process: started with nothing of ours, read within limits, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from scanfleet.messages import PortFound
from scanfleet.policy import ADMITTED_SCRIPTS
from scanfleet.ports import PortSet, parse_ranges
from scanner_worker.domain import CannotStartError, Host, KilledByGuardError, ScanError, printable
from scanner_worker.scanner import datadir, guard, view
from scanner_worker.scanner.xml import BadXmlError, Reader

PIECE: Final = 1 << 16  # bytes read at once: what a pipe holds
LOOK_S: Final = 1.0  # between two looks whether a silent nmap still lives
BEAT_S: Final = 1.0  # between two writes to the guard
END_S: Final = 5.0  # for nmap to end after its output, and for a killed one to be gone
KILLS: Final = 20  # looks for what forks while it is being killed; a killed one may still be seen in a few
SAID: Final = 2_000  # bytes of standard error that are kept, the last ones: nmap ends with why it gives up
CHECK_S: Final = 30.0  # timeout of the trial run: nmap starts in a tenth of a second, and in some on a loaded machine

MIN_VERSION: Final = (7, 92)  # older ones spell reasons and timeouts differently, and leave ports out of the XML
_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")

# A run that touches nothing, but takes all that a scan takes: a process, a temporary folder, nmap and its libraries.
_TRIAL: Final = ("-n", "-sL", "-oX", "-", "127.0.0.1")

# A run that lists scripts: each that is installed has an element.
_HELP: Final = ("-oX", "-", "--script-help")
_SCRIPT: Final = re.compile(rb'<script filename="[^"]*?([a-z0-9-]+)\.nse"')

# A run without targets, in which nmap lists the ports that it would probe.
_NO_TARGETS: Final = ("-n", "-Pn", "-sT", "-oX", "-", "-iL", os.devnull)
_SERVICES: Final = re.compile(rb'<scaninfo [^>]*protocol="tcp"[^>]* services="([0-9,-]+)"')

# Seconds between two probes of a host by timing template, where nmap may show no progress for so long.
_PROBE_DELAYS: Final = {"-T0": 300.0, "-T1": 15.0}
# Phases whose percentage counts whole services or scripts: a port that stays silent takes 510 s at intensity 9. The host
# timeout ends these.
_COARSE_TASKS: Final = frozenset({"Service scan", "NSE"})

Found = list[tuple[Host, tuple[PortFound, ...]]]

_starts = Counter("scanfleet_worker_nmap_starts", "nmap processes that were started; one scans several small chunks.")
_running = Gauge("scanfleet_worker_nmap_running", "nmap processes that run now")
_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one nmap may take.

    Attributes:
        output: bytes that it may write, and
        host: about one host.
        stall_seconds: timeout of an nmap that shows no progress, beyond what its options explain.
    """

    output: int
    host: int
    stall_seconds: float


class Nmap:
    """Starts nmaps, and the guard that kills them when this process ends or stands still.

    Attributes:
        version: nmap's, as the newest run said; empty before the first one.
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
        self._kills = -1  # the guard writes here when it kills
        self._killed_at = 0.0

    async def start(self) -> None:
        """Start the guard; before it there must be no nmap."""
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
        self._beating = asyncio.create_task(self._beat(), name="beat")

    async def stop(self) -> None:
        """Let the guard look a last time and end."""
        if self._beating is not None:
            self._beating.cancel()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()
            os.close(self._kills)

    def hold(self, seconds: float) -> None:
        """Have the guard kill every nmap once the event loop has stood still for `seconds`; until the first call it kills none."""
        self._limit = seconds
        self._tell_guard()

    async def _beat(self) -> None:
        while True:
            self._tell_guard()
            await asyncio.sleep(BEAT_S)

    def _tell_guard(self) -> None:
        if self._limit and self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.write(guard.NUMBER.pack(self._limit))

    def _killed_by_guard(self, run: _Run) -> bool:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._kills, guard.NUMBER.size):
                (self._killed_at,) = guard.NUMBER.unpack(data)
        return self._killed_at >= run.began

    @property
    def alive(self) -> bool:
        """False when the guard has ended: the process must be replaced before an nmap can be orphaned."""
        beats = self._beating is not None and not self._beating.done()
        return beats and self._guard is not None and self._guard.returncode is None

    @property
    def ready(self) -> bool:
        return self.alive

    async def check(self) -> None:
        """Run nmap without sending a packet, to see that it starts here and is recent enough.

        Raises:
            CannotStartError: it cannot be used; the message says why and what to do.
        """
        reader = Reader(max_host_bytes=self._limits.host)
        try:
            async with asyncio.timeout(CHECK_S), self._started(_TRIAL) as run:
                while data := await run.read():
                    if fault := _whole(reader, data)[1]:
                        raise CannotStartError(f"a trial run of {self._program} failed: {fault}")
                if code := await run.wait():
                    raise CannotStartError(f"{self._program} {_ended(code)}: {run.said}")
                reader.close()
        except TimeoutError:
            raise CannotStartError(f"a trial run of {self._program} did not end in {CHECK_S:.0f} seconds") from None
        except (BadXmlError, ScanError) as error:
            raise CannotStartError(f"a trial run of {self._program} failed: {error}") from error
        found = _VERSION.match(reader.version)
        if not found or (int(found[1]), int(found[2])) < MIN_VERSION:
            raise CannotStartError(
                f"{self._program} is nmap {printable(reader.version) or 'of an unknown version'}, and "
                f"{'.'.join(map(str, MIN_VERSION))} is the oldest that works: install a newer one (Debian 12, Ubuntu 24.04 and "
                "later have it), and name it in SCANFLEET_NMAP if it is not the first in PATH"
            )
        self.version = reader.version
        await self._check_scripts()

    async def _check_scripts(self) -> None:
        try:
            async with asyncio.timeout(CHECK_S):
                code, output, said = await self._output((*_HELP, ",".join(sorted(self._scripts))))
        except TimeoutError:
            raise CannotStartError(f"{self._program} did not list its scripts in {CHECK_S:.0f} seconds") from None
        if code:
            raise CannotStartError(f"{self._program} does not list its scripts, it {_ended(code)}: {said}")
        if missing := self._scripts - {name.decode() for name in _SCRIPT.findall(output)}:
            raise CannotStartError(
                f"{self._program} does not have the scripts {', '.join(sorted(missing))}: install nmap's scripts, and name "
                "none in SCANFLEET_SCRIPTS that is not one of them"
            )

    async def ranked(self, ports: PortSet) -> PortSet:
        """The TCP ports that a part of a `top` set stands for, by nmap's own table. Sends nothing.

        Raises:
            CannotStartError: nmap does not start here.
            ScanError: nmap does not list them.
        """
        return (await self._common(ports.top)).without(await self._common(ports.above))

    async def _common(self, count: int) -> PortSet:
        if count not in self._most_common:
            _, output, said = await self._output((*_NO_TARGETS, "--top-ports", str(count)))
            listed = _SERVICES.search(output)
            if not listed:
                raise ScanError(f"nmap does not list its {count} most common ports: {said}")
            self._most_common[count] = PortSet(tcp=parse_ranges(listed[1].decode()))
        return self._most_common[count]

    async def _output(self, arguments: Sequence[str]) -> tuple[int, bytes, str]:
        """The exit code, output and end of standard error of a run that sends nothing."""
        output = b""
        async with self._started(arguments) as run:
            while data := await run.read():
                output += data
            return await run.wait(), output, run.said

    async def scan(self, arguments: Sequence[str], services: Mapping[str, int]) -> AsyncGenerator[Found]:
        """Run nmap and yield finished hosts with their open ports, whatever is ready at once.

        When the generator is closed, nothing that it started is left.

        Args:
            arguments: without the program.
            services: how many ports of each protocol nmap must announce that it probes.

        Raises:
            CannotStartError: nmap did not begin to scan, for a reason that lies in this worker.
            ScanError: the run does not count, hosts that were yielded before do; says why.
            KilledByGuardError: the guard killed nmap, because this process stood still.
        """
        async with self._started(arguments) as run, aclosing(self._read(run, arguments, services)) as found:
            async for hosts in found:
                yield hosts

    @asynccontextmanager
    async def _started(self, arguments: Sequence[str]) -> AsyncIterator[_Run]:
        """Run nmap, and leave nothing of it."""
        self._runs += 1
        _starts.inc()
        mark = f"{self._mark}-{self._runs}."  # the dot: no mark begins another
        try:
            folder = tempfile.TemporaryDirectory(prefix="scanfleet-", ignore_cleanup_errors=True)
        except OSError as error:
            raise CannotStartError(f"no temporary folder can be made for nmap: {error}") from error
        with folder:
            data = Path(folder.name, "data")  # of this run alone: nothing can change or remove it before
            try:
                datadir.write(data, self._scripts)
            except OSError as error:
                raise CannotStartError(f"nmap's data folder cannot be written: {error}") from error
            arguments = ("--datadir", str(data), *arguments)
            starting = asyncio.create_task(self._start(arguments, mark, folder.name))
            with _running.track_inprogress():
                try:
                    # Shielded: a start that is cancelled halfway would leave an nmap without an owner.
                    yield await asyncio.shield(starting)
                finally:
                    with contextlib.suppress(CannotStartError):
                        await (await starting).end()

    async def _start(self, arguments: Sequence[str], mark: str, folder: str) -> _Run:
        began = asyncio.get_running_loop().time()
        self._tell_guard()  # a guard that is killing for want of this spares what starts from here on
        try:
            process = await asyncio.create_subprocess_exec(
                f"nmap-{mark}",  # its own name for itself, by which the guard knows it when its environment is closed
                *arguments,
                executable=self._program,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                cwd=folder,
                # Nothing inherited: NMAPDIR and a .nmap in the home folder would bring other people's scripts and tables.
                env={"PATH": os.defpath, "LC_ALL": "C", "HOME": folder, "TMPDIR": folder, "SCANFLEET_MARK": mark},
            )
        except OSError as error:
            raise CannotStartError(f"{self._program} cannot be started: {error}") from error
        return _Run(process, mark, began)

    async def _read(
        self,
        run: _Run,
        arguments: Sequence[str],
        services: Mapping[str, int],
    ) -> AsyncGenerator[Found]:
        reader = Reader(max_host_bytes=self._limits.host)
        size = moves = 0
        while data := await run.read(self._limits.stall_seconds + _pause(arguments, reader.task)):
            size += len(data)
            if size > self._limits.output:
                raise ScanError(f"nmap wrote more than {self._limits.output} bytes")
            hosts, fault = _whole(reader, data)
            self.version = reader.version or self.version
            if reader.moves != moves:
                moves = reader.moves
                run.moved()
            if hosts and reader.services != services:
                raise ScanError(f"nmap probes {reader.services} ports where {dict(services)} were asked for")
            if hosts:
                yield hosts
            if fault:
                raise ScanError(fault)
        await self._finish(run, reader)

    async def _finish(self, run: _Run, reader: Reader) -> None:
        """Raise unless nmap ended well, after its output has ended."""
        code = await run.wait()
        if code == -signal.SIGKILL and self._killed_by_guard(run):
            raise KilledByGuardError("the guard killed nmap, because the worker's event loop stood still")
        # nmap announces its ports before it sends anything, so without them no target can be the cause.
        failure = ScanError if reader.services else CannotStartError
        if code != 0:
            raise failure(f"nmap {_ended(code)}: {run.said}")
        try:
            reader.close()
        except BadXmlError as error:
            raise failure(f"{error}: {run.said}") from error
        if reader.skipped:
            raise ScanError(f"nmap did not take {', '.join(reader.skipped)}: {run.said}")


def _pause(arguments: Sequence[str], task: str) -> float:
    """How many seconds a healthy nmap with these arguments may go without progress in a phase, beyond the limit."""
    # A silent host costs the wait for its answer and the delay before the next probe.
    pause = 2 * max(delay for timing, delay in {"": 0.0, **_PROBE_DELAYS}.items() if timing in {"", *arguments})
    if task in _COARSE_TASKS and "--host-timeout" in arguments:
        pause += float(arguments[arguments.index("--host-timeout") + 1].removesuffix("s"))
    return pause


def _whole(reader: Reader, data: bytes) -> tuple[Found, str]:
    """The hosts that `data` completes, and what is wrong after them."""
    hosts: Found = []
    try:
        for host in reader.feed(data):
            hosts.append((host, view.ports(host)))  # those before a fault stand
    except BadXmlError as error:
        return hosts, str(error)
    return hosts, ""


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class _Run:
    """An nmap that runs."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str, began: float) -> None:
        assert process.stdout is not None  # noqa: S101 # asked for as pipes
        assert process.stderr is not None  # noqa: S101 # the same
        self._process = process
        self._out, self._err = process.stdout, process.stderr
        self._mark = mark
        self.began = began
        self._waited = 0.0  # seconds of reading since nmap last moved; what the worker does in between is not nmap's
        self._said = b""
        self._listening = asyncio.create_task(self._listen())

    @property
    def said(self) -> str:
        """The end of nmap's standard error, in one line."""
        lines = self._said.decode(errors="backslashreplace").split("\n")
        return printable("; ".join(line.strip() for line in lines if line.strip())) or "it did not say why"

    async def read(self, patience: float = math.inf) -> bytes:
        """What nmap has written, empty at the end.

        Args:
            patience: seconds of waiting since nmap last moved after which it is given up.

        Raises:
            ScanError: nmap stands still.
        """
        now = asyncio.get_running_loop().time
        while True:
            if self._waited >= patience:
                raise ScanError(f"nmap made no progress for {patience:.0f} seconds and was stopped")
            began = now()
            try:
                async with asyncio.timeout(min(LOOK_S, patience)):
                    return await self._out.read(PIECE)
            except TimeoutError:
                if self._process.returncode is not None:
                    self._kill()  # it is gone, and something that it forked holds on to its output
            finally:
                self._waited += min(now() - began, LOOK_S)  # no more: the whole worker may have been frozen meanwhile

    def moved(self) -> None:
        """nmap has made progress."""
        self._waited = 0.0

    async def wait(self) -> int:
        """nmap's exit code, after its output has ended."""
        try:
            async with asyncio.timeout(END_S):
                code = await self._process.wait()
                await self._listening
        except TimeoutError:
            raise ScanError(f"nmap did not end {END_S:.0f} seconds after its output") from None
        return code

    async def end(self) -> None:
        """Return when nothing of it is left."""
        clean = self._process.returncode == 0 and self._out.at_eof()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if not clean:
            self._kill()
        try:
            async with asyncio.timeout(END_S):
                while await self._out.read(PIECE):
                    pass  # a pipe that is not read to its end is never closed
                await self._listening
                await self._process.wait()
        except TimeoutError:
            _log.error("nmap cannot be killed", pid=self._process.pid)
            self._listening.cancel()

    def _kill(self) -> None:
        """Kill also what has left nmap's process group."""
        for _ in range(KILLS):
            if not guard.kill_marked(self._mark):
                return

    async def _listen(self) -> None:
        while data := await self._err.read(PIECE):
            self._said = (self._said + data)[-SAID:]
