"""The start of the `scanfleet` command: the time to its help."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator

from bench.figures import Figure
from local.paths import SCANFLEET

ROUNDS = 7  # number of runs, of which the fastest counts: other processes only slow it down


def measure() -> Iterator[Figure]:
    """Yield the figures."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    best = min(_seconds() for _ in range(ROUNDS))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / ROUNDS
    yield Figure("help_ms", 1_000 * best, "scanfleet --help", at_most=300)
    yield Figure("help_cpu_ms", 1_000 * cpu, "CPU of the same")


def _seconds() -> float:
    started = time.perf_counter()
    subprocess.run([SCANFLEET, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
