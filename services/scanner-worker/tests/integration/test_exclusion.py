"""A worker on a machine where nmap cannot run, with real faults: a full disk, a process limit, a missing nmap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from scanfleet.contracts.messages import ChunkFailed, ChunkReleased, ChunkScanned, ScanChunk, WorkerReady
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_TASKS, SCAN_WORKERS
from scanfleet.scanning.targets import TargetRules
from scanfleet.security.audit import Refusals
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.waiting import until
from scanner_worker.handlers.batch import Abilities
from scanner_worker.handlers.worker import Worker
from scanner_worker.scanner.process import Limits, Nmap

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and resource limits need root: run the tests as root"),
]

MakeChunk = Callable[..., ScanChunk]

NMAP = "/usr/bin/nmap"
# The output of nmap before it sends any packet.
HEAD = """<?xml version="1.0"?>
<!DOCTYPE nmaprun>
<nmaprun scanner="nmap"><scaninfo type="connect" protocol="tcp" numservices="2" services="22,80"/>"""
LIMITS = Limits(output=16 << 20, host=4 << 20, stall_seconds=60)


class Rig:
    """A worker with real nmap on an in-memory bus."""

    def __init__(self, program: str) -> None:
        self.bus = MemoryBus()
        self.nmap = Nmap(program, LIMITS)
        abilities = Abilities(2, False, TargetRules((ip_network("127.0.0.0/8"),)), attempt_seconds=60)
        self.worker = Worker("worker", abilities, self.nmap, self.bus, Refusals("scanner-worker").add_denied_chunk)
        self.tasks = self.bus.tail(SCAN_TASKS, self.worker)

    @property
    def slots(self) -> int:
        """Return the slots of the worker's latest announcement."""
        ready = self.bus.messages(SCAN_WORKERS)
        return ready[-1].slots if ready and isinstance(ready[-1], WorkerReady) else -1

    def ends(self) -> list[ChunkScanned | ChunkFailed | ChunkReleased]:
        kinds = ChunkScanned | ChunkFailed | ChunkReleased
        return [message for message in self.bus.messages(SCAN_PROGRESS) if isinstance(message, kinds)]


@contextlib.asynccontextmanager
async def rigged(program: str | Path = NMAP) -> AsyncIterator[Rig]:
    rig = Rig(str(program))
    await rig.nmap.start()
    await rig.tasks.start()
    await rig.worker.start()
    try:
        yield rig
    finally:
        await rig.worker.stop(0)
        await rig.tasks.stop()
        await rig.nmap.stop()


async def released_and_recovers(
    rig: Rig, make_chunk: MakeChunk, fault: contextlib.AbstractContextManager[object], reason: str
) -> None:
    """Check that no chunk fails and no slot is announced during the fault, and that the worker then recovers by itself."""
    await until(lambda: rig.slots == 2)
    with fault:
        await rig.bus.publish(SCAN_TASKS, [make_chunk()])
        await until(rig.ends)
        (end,) = rig.ends()
        assert isinstance(end, ChunkReleased)
        assert (end.outcomes, reason in end.reason) == ("....", True), end.reason
        await until(lambda: rig.slots == 0)
        await asyncio.sleep(2.5)  # two trial runs, both of which must fail
        assert rig.slots == 0
        assert rig.worker.alive
    await until(lambda: rig.slots == 2, 30)
    await rig.bus.publish(SCAN_TASKS, [make_chunk(attempt=2)])
    await until(lambda: isinstance(rig.ends()[-1], ChunkScanned), 60)
    assert not any(isinstance(end, ChunkFailed) for end in rig.ends())


@pytest.fixture
def disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Mount the temporary folder on a small disk and return a context manager that fills it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=16", "tmpfs", tmp_path], check=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        files: list[Path] = []
        with contextlib.suppress(OSError):
            while True:
                file = tmp_path / str(len(files))
                file.touch()
                files.append(file)
        yield
        for file in files:
            file.unlink()

    try:
        yield full
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.proves("F21", "F25", "G17")
async def test_worker_with_full_disk_releases_its_chunks(
    make_chunk: MakeChunk,
    disk: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """A disk without space for a temporary folder is the worker's failure, and does not count against the chunk."""
    async with rigged() as rig:
        await released_and_recovers(rig, make_chunk, disk(), "No space left on device")


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """Prevent this process from opening files and pipes, so that it cannot start a process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.proves("F25", "G17")
async def test_worker_without_descriptors_releases_its_chunks(make_chunk: MakeChunk) -> None:
    """Too many open files are a failure of the worker."""
    async with rigged() as rig:
        await released_and_recovers(rig, make_chunk, no_descriptor(), "Too many open files")


FORKLESS = """
import asyncio, os, resource, sys
from scanfleet.scanning.ports import PortSet
from scanner_worker.domain.scan import CannotStartError
from scanner_worker.scanner.process import Limits, Nmap

async def main():
    nmap = Nmap(sys.argv[1], Limits(1 << 20, 1 << 20, 60))
    await nmap.start()
    os.setuid(65534)  # process limits do not apply to root
    await nmap.check()
    resource.setrlimit(resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    for how in (nmap.check, lambda: anext(nmap.scan(["-V"], PortSet()))):
        try:
            await how()
        except CannotStartError as error:
            print(error, flush=True)
    resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
    await nmap.check()
    await nmap.stop()

asyncio.run(main())
"""


@pytest.mark.proves("F25")
async def test_nmap_fork_failure_raises_cannot_start() -> None:
    """EAGAIN at fork, from a real process limit, is a CannotStartError in a scan and in a trial run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FORKLESS, NMAP), stdout=asyncio.subprocess.PIPE, cwd="/"
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    lines = out.decode().splitlines()
    assert process.returncode == 0
    assert len(lines) == 2
    assert all("Resource temporarily unavailable" in line for line in lines)


@pytest.mark.proves("F25")
async def test_worker_without_nmap_recovers_after_installation(make_chunk: MakeChunk, tmp_path: Path) -> None:
    """Without nmap the worker starts, announces no slots and reports the cause; after the installation it scans without restart."""
    program = tmp_path / "nmap"
    async with rigged(program) as rig:
        await until(lambda: rig.slots == 0)
        assert "nmap" in rig.worker.exclusion.reason
        assert rig.worker.alive
        program.symlink_to(NMAP)
        await until(lambda: rig.slots == 2, 30)
        await rig.bus.publish(SCAN_TASKS, [make_chunk()])
        await until(lambda: any(isinstance(end, ChunkScanned) for end in rig.ends()), 60)


@pytest.mark.proves("F25", "G17")
async def test_worker_with_failing_nmap_takes_no_fourth_chunk(make_chunk: MakeChunk, tmp_path: Path) -> None:
    """After three consecutive failed chunks the worker announces no slots until nmap works again."""
    program = tmp_path / "nmap"
    program.symlink_to(NMAP)
    async with rigged(program) as rig:
        await until(lambda: rig.slots == 2)
        program.unlink()
        program.write_text(f"#!/bin/sh\necho '{HEAD}'\nexit 1\n")
        program.chmod(0o755)
        for number in range(3):
            await rig.bus.publish(SCAN_TASKS, [make_chunk(chunk_id=f"1-{number}")])
            await until(lambda: len(rig.ends()) == number + 1)  # noqa: B023 # called before the next turn
        assert {type(end) for end in rig.ends()} == {ChunkFailed}
        await until(lambda: rig.slots == 0)
        await rig.bus.publish(SCAN_TASKS, [make_chunk(chunk_id="1-3")])
        await until(lambda: len(rig.ends()) == 4)
        assert isinstance(rig.ends()[-1], ChunkReleased)
        program.unlink()
        program.symlink_to(NMAP)
        await until(lambda: rig.slots == 2, 30)
        await rig.bus.publish(SCAN_TASKS, [make_chunk(chunk_id="1-3", attempt=2)])
        await until(lambda: isinstance(rig.ends()[-1], ChunkScanned), 60)
