"""The guard as a watchdog: which processes it kills when the worker's event loop is blocked, and which it does not."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from scanfleet.scanning.ports import PortSet
from scanfleet_testing.waiting import until
from scanner_worker.domain.scan import CannotStartError, KilledByGuardError, ScanError
from scanner_worker.scanner import guard
from scanner_worker.scanner.process import Limits, Nmap

pytestmark = pytest.mark.integration


NMAP = "/usr/bin/nmap"
LIMITS = Limits(output=16 << 20, host=4 << 20, stall_seconds=60)
# A scan that does not end by itself: nmap waits a minute between two probes of the port.
SLOW = ("-n", "-sT", "-Pn", "-p", "1-9", "--scan-delay", "60s", "-oX", "-", "--", "127.9.40.1/32")


class Guard:
    """A guard, and the processes that carry its mark."""

    def __init__(self) -> None:
        self.mark = f"mark-{uuid4().hex}"
        self.process: asyncio.subprocess.Process
        self.marked: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__, self.mark),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self.killed_at() == 0  # it is ready

    async def start_marked(self) -> asyncio.subprocess.Process:
        self.marked.append(process := await asyncio.create_subprocess_exec("sleep", "600", env={"MARK": self.mark}))
        return process

    def write(self, limit_seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(guard.NUMBER.pack(limit_seconds))

    async def killed_at(self) -> float:
        """Return the time at which the guard reports that it started to kill, by the clock of the event loop."""
        assert self.process.stdout is not None
        data = await asyncio.wait_for(self.process.stdout.readexactly(guard.NUMBER.size), 20)
        return float(guard.NUMBER.unpack(data)[0])

    async def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), 20)


@pytest.fixture
async def guarding() -> AsyncIterator[Guard]:
    found = Guard()
    await found.start()
    yield found
    await found.stop()
    for process in found.marked:
        assert await process.wait() == -signal.SIGKILL


async def test_guard_before_the_first_limit_kills_nothing(guarding: Guard) -> None:
    """Before the first limit no timeout applies; the end of the worker still makes the guard kill."""
    process = await guarding.start_marked()
    await asyncio.sleep(2)  # longer than any limit of these tests
    assert process.returncode is None


@pytest.mark.proves("F32", "G4")
async def test_guard_late_limit_kills_marked_processes(guarding: Guard) -> None:
    """Marked processes live while limits arrive; after the last limit has passed, the guard kills them and reports when."""
    loop = asyncio.get_running_loop()
    process = await guarding.start_marked()
    for _ in range(12):
        guarding.write(3.0)
        last = loop.time()
        await asyncio.sleep(0.3)
    assert process.returncode is None
    killed_at = await guarding.killed_at()
    assert last + 2.9 < killed_at < last + 4.0
    assert await asyncio.wait_for(process.wait(), 5) == -signal.SIGKILL


async def test_guard_worker_resumed_spares_new_processes(guarding: Guard) -> None:
    """The first limit after a timeout stops the killing: a process started right after it survives."""
    for _ in range(3):
        guarding.write(0.2)
        await guarding.killed_at()
        guarding.write(60.0)
        process = await guarding.start_marked()
        await asyncio.sleep(0.5)  # several rounds of a guard that still kills
        assert process.returncode is None


async def test_guard_worker_resumed_stops_killing(guarding: Guard) -> None:
    """A search for processes that runs while the worker resumes kills none of those it finds afterwards."""
    process = await guarding.start_marked()
    assert guard.kill_marked(guarding.mark, unless=lambda: True) == 0
    assert process.returncode is None
    await asyncio.sleep(0.2)
    assert process.returncode is None


async def test_guard_applies_the_last_limit_written(guarding: Guard) -> None:
    """A shorter lease shortens the limit immediately."""
    loop = asyncio.get_running_loop()
    guarding.write(60.0)
    guarding.write(0.3)
    last = loop.time()
    assert await guarding.killed_at() < last + 2.0


async def scan(nmap: Nmap, *arguments: str) -> None:
    async with contextlib.aclosing(nmap.scan(arguments, PortSet.parse("1-9"))) as found:
        async for _ in found:
            pass


@pytest.fixture
async def nmap() -> AsyncIterator[Nmap]:
    made = Nmap(NMAP, LIMITS)
    await made.start()
    yield made
    await made.stop()


def running(nmap: Nmap) -> bool:
    """Return whether an nmap of this instance runs."""
    return subprocess.run(["pgrep", "-f", f"^nmap-{nmap._mark}"], capture_output=True, check=False).returncode == 0


def kill_from_outside(nmap: Nmap) -> None:
    subprocess.run(["pkill", "-KILL", "-f", f"^nmap-{nmap._mark}"], check=True)


@pytest.mark.proves("F32", "G17")
async def test_scan_blocked_event_loop_raises_killed_by_guard(nmap: Nmap) -> None:
    """After the event loop is blocked for the limit, nmap was killed by the guard, and the next scan runs."""
    nmap.hold(2.0)
    scanning = asyncio.create_task(scan(nmap, *SLOW))
    await until(lambda: running(nmap))
    end = time.monotonic() + 30
    while running(nmap) and time.monotonic() < end:
        time.sleep(0.1)  # noqa: ASYNC251 # the fault
    assert not running(nmap)
    with pytest.raises(KilledByGuardError):
        await scanning
    again = asyncio.create_task(scan(nmap, *SLOW))
    await asyncio.sleep(3)  # longer than the limit, with a responsive event loop
    assert running(nmap)
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again


async def test_scan_foreign_sigkill_is_not_attributed_to_the_guard(nmap: Nmap) -> None:
    """SIGKILL by the kernel or an operator is reported as such, even after the guard has killed earlier runs."""
    nmap.hold(0.5)
    time.sleep(1)  # noqa: ASYNC251 # the guard kills while no nmap runs
    nmap.hold(60.0)
    scanning = asyncio.create_task(scan(nmap, *SLOW))
    await until(lambda: running(nmap))
    kill_from_outside(nmap)
    with pytest.raises((ScanError, CannotStartError), match="SIGKILL"):  # the latter before nmap has started to scan
        await scanning
