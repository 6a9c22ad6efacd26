"""Load, scripted workers and CPU meters for the measurements."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, Final, NamedTuple

from pymongo import MongoClient

from local.stack import Stack
from scanfleet.contracts.messages import ChunkScanned, ScanChunk, WorkerReady
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, SCAN_WORKERS
from scanfleet.kafka import KafkaBus
from scanfleet.runtime.bus import Record
from scanfleet.scanning.outcomes import Outcome
from scanfleet.services import SERVICES, WORKER

SCRIPTED: Final = dict.fromkeys(SERVICES, 1) | {WORKER: 0}
"""Replicas of a stack whose workers are scripted."""
_WORKERS: Final = 8
_SLOTS: Final = 200  # of each: no chunk waits for a slot
_MS: Final = {"us": 0.001, "ms": 1.0, "s": 1_000.0}
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Workers:
    """A handler of scan-tasks that reports every address of every chunk as down, at once.

    Like a scanner-worker, it publishes no claim for a scan that is shorter than a quarter of a second.
    """

    def __init__(self, bus: KafkaBus) -> None:
        self._bus = bus
        self._ready = [WorkerReady(worker_id=f"bench-{n}", slots=_SLOTS, raw=False) for n in range(_WORKERS)]
        self.chunks: set[str] = set()

    async def announce(self) -> None:
        await self._bus.publish(SCAN_WORKERS, self._ready)

    async def handle(self, records: Sequence[Record]) -> None:
        tasks = [record.message for record in records if isinstance(record.message, ScanChunk)]
        self.chunks |= {task.chunk_id for task in tasks}
        tokens = [
            {name: getattr(task, name) for name in ("job_id", "chunk_id", "attempt", "worker_id")} for task in tasks
        ]
        scanned = [
            ChunkScanned(
                **token,
                outcomes=task.outcomes.replace(Outcome.BLANK, Outcome.DOWN),
                first_address=task.first_address,
                slot_seconds=0.01,
                technique="connect",
                grant=task.grant,
            )
            for task, token in zip(tasks, tokens, strict=True)
        ]
        await self._bus.publish(SCAN_RESULTS, scanned)
        await self._bus.publish(SCAN_PROGRESS, scanned)
        busy = {task.worker_id for task in tasks}
        await self._bus.publish(SCAN_WORKERS, [ready for ready in self._ready if ready.worker_id in busy])


@contextmanager
def new_stack(**options: Any) -> Iterator[Stack]:
    """Run a stack without data for the duration of the block; `options` are those of `Stack`."""
    with TemporaryDirectory(prefix="scanfleet-") as folder:
        stack = Stack(Path(folder), **options)
        stack.up()
        try:
            yield stack
        finally:
            stack.down()


@asynccontextmanager
async def bus(stack: Stack) -> AsyncIterator[KafkaBus]:
    publisher = KafkaBus(stack.servers.kafka_settings(), source="bench", instance="bench")
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


class Meter:
    """CPU and wall time from its construction on.

    Args:
        pids: by name; the processes' children count too.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before = self._seconds()
        self._began = time.perf_counter()

    def wall(self) -> float:
        """Return the seconds since the construction."""
        return time.perf_counter() - self._began

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds of each process since then."""
        after = self._seconds()
        return {name: after[name] - self._before[name] for name in after}

    def _seconds(self) -> dict[str, float]:
        processes = dict(_processes())
        return {name: _family_seconds(pid, processes) for name, pid in self._pids.items()}


def _family_seconds(pid: int, processes: Mapping[int, tuple[int, float]]) -> float:
    """Return the CPU seconds of a process and its living descendants."""
    children = (child for child, (parent, _) in processes.items() if parent == pid)
    return processes[pid][1] + sum(_family_seconds(child, processes) for child in children)


def _processes() -> Iterator[tuple[int, tuple[int, float]]]:
    """Return each process of this machine with its parent and CPU seconds."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            yield int(folder.name), (int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS)


class Documents(NamedTuple):
    """MongoDB's counters of documents since its start."""

    read: int
    written: int

    @classmethod
    def now(cls, stack: Stack) -> Documents:
        with MongoClient[dict[str, Any]](stack.servers.mongodb) as client:
            counters = client.admin.command("serverStatus")["metrics"]["document"]
        return cls(counters["returned"], counters["inserted"] + counters["updated"] + counters["deleted"])


def pids(stack: Stack, names: Collection[str]) -> dict[str, int]:
    return {process.name: process.pid for process in stack.processes() if process.name in names}


def cores(stack: Stack, names: Collection[str], seconds: float) -> float:
    """Measure the average number of cores that these processes use during the next seconds."""
    meter = Meter(pids(stack, names))
    time.sleep(seconds)
    return sum(meter.cpu().values()) / meter.wall()


class Load(NamedTuple):
    """The answers to a load: their rate per second, and percentiles of the time to an answer in milliseconds."""

    rate: float
    p50: float
    p99: float

    @classmethod
    def of(cls, report: str) -> Load:
        """Read a report of wrk."""
        (rate,) = re.findall(r"Requests/sec:\s+([\d.]+)", report)
        times = {
            share: float(time) * _MS[unit] for share, time, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s)", report)
        }
        return cls(float(rate), times["50"], times["99"])


def load(url: str, *, clients: int, seconds: int, token: str = "", body: str = "") -> Load:
    """Return the rate and the latencies that wrk measures with `clients` connections in `seconds`.

    Args:
        url: requested with GET, or with POST if there is a body.
        clients: connections, each with one request at a time.
        seconds: duration.
        token: bearer token, or none.
        body: JSON to post.

    Raises:
        RuntimeError: a response was an error, so there is no valid rate.
    """
    lines = [f'wrk.headers["Authorization"] = "Bearer {token}"'] if token else []
    if body:
        lines += ['wrk.method = "POST"', f"wrk.body = [[{body}]]", 'wrk.headers["Content-Type"] = "application/json"']
    with NamedTemporaryFile("w", suffix=".lua") as script:
        script.write("\n".join(lines))
        script.flush()
        options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "20s", "--latency", "-s", script.name]
        command = ["wrk", *options, url]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        raise RuntimeError(f"not every request to {url} succeeded: {report}")
    return Load.of(report)
