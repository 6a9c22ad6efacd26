"""nmap as a process: started with nothing of ours, read within limits, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from scanfleet.messages import PortFound
from scanner_worker.domain import CannotStartError, Host, KilledByGuardError, ScanError, printable
from scanner_worker.scanner import guard, view
from scanner_worker.scanner.xml import BadXmlError, Reader

PIECE: Final = 1 << 16  # bytes read at once: what a pipe holds
LOOK_S: Final = 1.0  # between two looks whether a silent nmap still lives
BEAT_S: Final = 1.0  # between two writes to the guard
END_S: Final = 5.0  # for nmap to end after its output, and for a killed one to be gone
KILLS: Final = 20  # looks for what forks while it is being killed; a killed one may still be seen in a few
SAID: Final = 2_000  # bytes of standard error that are kept, the last ones: nmap says at the end why it gives up

Found = list[tuple[Host, tuple[PortFound, ...]]]

_starts = Counter("scanfleet_worker_nmap_starts", "nmap processes that were started; one scans several small chunks.")
_running = Gauge("scanfleet_worker_nmap_running", "nmap processes that run now")
_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one nmap may write, in bytes, and how long it may make no progress."""

    output: int
    host: int
    stall_seconds: float


class Nmap:
    """Starts nmaps, and the guard that kills them when this process ends or stands still."""

    def __init__(self, program: str, limits: Limits) -> None:
        self._program = program
        self._limits = limits
        self._mark = f"scanfleet-{token_hex(16)}"
        self._runs = 0
        self._guard: asyncio.subprocess.Process | None = None
        self._limit = 0.0
        self._beating: asyncio.Task[None] | None = None
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

    async def check(self) -> None:
        """Start nmap without anything to scan.

        Raises:
            CannotStartError: nmap cannot be used here; says why.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="scanfleet-", ignore_cleanup_errors=True) as folder:
                process = await asyncio.create_subprocess_exec(
                    *(self._program, "-V"),
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    cwd=folder,
                )
                code = await process.wait()
        except OSError as error:
            raise CannotStartError(f"nmap could not be started: {error}") from error
        if code != 0:
            raise CannotStartError(f"nmap -V {_ended(code)}")

    @property
    def alive(self) -> bool:
        """False when the guard has ended: the process must be replaced before an nmap can be orphaned."""
        beats = self._beating is not None and not self._beating.done()
        return beats and self._guard is not None and self._guard.returncode is None

    @property
    def ready(self) -> bool:
        return self.alive

    async def scan(
        self,
        arguments: Sequence[str],
        services: Mapping[str, int],
    ) -> AsyncGenerator[Found]:
        """Run nmap and yield finished hosts with their open ports, whatever is ready at once.

        When the generator is closed, nothing that it started is left.

        Args:
            arguments: without the program.
            services: how many ports of each protocol nmap must say that it probes.

        Raises:
            ScanError: the run does not count, hosts that were yielded before do; says why.
            CannotStartError: nmap cannot be started.
            KilledByGuardError: the guard killed nmap, because this process stood still.
        """
        self._runs += 1
        _starts.inc()
        mark = f"{self._mark}-{self._runs}."  # the dot: no mark begins another
        try:
            with tempfile.TemporaryDirectory(prefix="scanfleet-", ignore_cleanup_errors=True) as folder:
                starting = asyncio.create_task(self._start(arguments, mark, folder))
                with _running.track_inprogress():
                    try:
                        # Shielded: a start that is cancelled halfway would leave a nmap that nobody knows.
                        run = await asyncio.shield(starting)
                        async for hosts in self._read(run, services):
                            yield hosts
                    finally:
                        await (await starting).end()
        except OSError as error:
            raise CannotStartError(f"nmap could not be started: {error}") from error

    async def _start(self, arguments: Sequence[str], mark: str, folder: str) -> _Run:
        began = asyncio.get_running_loop().time()
        self._tell_guard()  # a guard that is killing for want of this spares what starts from here on
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
        return _Run(process, mark, began, self._limits.stall_seconds)

    async def _read(self, run: _Run, services: Mapping[str, int]) -> AsyncGenerator[Found]:
        reader = Reader(max_host_bytes=self._limits.host)
        size = 0
        while data := await run.read():
            size += len(data)
            if size > self._limits.output:
                raise ScanError(f"nmap wrote more than {self._limits.output} bytes")
            hosts, fault = _whole(reader, data)
            if hosts and reader.services != services:
                raise ScanError(f"nmap probes {reader.services} ports where {dict(services)} were asked for")
            if hosts:
                yield hosts
            if fault:
                raise ScanError(fault)
        code = await run.wait()
        if code == -signal.SIGKILL and self._killed_by_guard(run):
            raise KilledByGuardError("the guard killed nmap, because the worker's event loop stood still")
        if code != 0:
            raise ScanError(f"nmap {_ended(code)}: {run.said}")
        try:
            reader.close()
        except BadXmlError as error:
            raise ScanError(f"{error}: {run.said}") from error
        if reader.skipped:
            raise ScanError(f"nmap did not take {', '.join(reader.skipped)}: {run.said}")


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
    """A nmap that runs."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str, began: float, stall_seconds: float) -> None:
        assert process.stdout is not None  # noqa: S101 # asked for as pipes
        assert process.stderr is not None  # noqa: S101 # the same
        self._process = process
        self._out, self._err = process.stdout, process.stderr
        self._mark = mark
        self._stall_seconds = stall_seconds
        self.began = began
        self._said = b""
        self._listening = asyncio.create_task(self._listen())

    @property
    def said(self) -> str:
        """The end of nmap's standard error, in one line."""
        lines = self._said.decode(errors="backslashreplace").split("\n")
        return printable("; ".join(line.strip() for line in lines if line.strip())) or "it did not say why"

    async def read(self) -> bytes:
        """What nmap has written, empty at the end."""
        deadline = asyncio.get_running_loop().time() + self._stall_seconds
        while True:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise ScanError(f"nmap was stopped after {self._stall_seconds:.0f} seconds without output")
            try:
                async with asyncio.timeout(min(left, LOOK_S)):
                    return await self._out.read(PIECE)
            except TimeoutError:
                if self._process.returncode is not None:
                    self._kill()  # it is gone, and something that it forked holds on to its output

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
