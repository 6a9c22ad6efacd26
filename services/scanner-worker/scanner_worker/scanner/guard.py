"""A dead man's switch: the process that kills the nmaps of a worker that has ended or stands still.

The worker runs it as a script. Its event loop writes a limit in seconds to the guard's standard input, again each second.
When nothing follows within that limit, because the worker is stopped, its event loop is blocked or the machine swaps, the
guard kills everything that carries the worker's mark in its environment or its command line. When the worker has ended,
however it ended, the kernel closes the input, and the guard does the same and ends too. Before the first limit it kills
nothing.

Why not the simpler ways: a parent-death signal is forgotten when nmap gains capabilities from its file, which is how an
unprivileged worker gets raw sockets, and does not reach what nmap forks; a list of process groups misses one that began in
the worker's last millisecond; a guard for each nmap costs a third of a small scan. The environment reaches every
descendant, and of a process with capabilities, whose environment is closed to us, the command line can still be read.

It imports the standard library alone, so that it starts in 20 ms and holds 10 MB.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

NUMBER = struct.Struct("d")  # read and written whole: far less than what a pipe takes at once

QUIET_S = 1.0  # without a find, after which nothing is left: longer than a fork takes to become nmap
LOOK_S = 0.05


def kill_marked(mark: str, unless: Callable[[], bool] = lambda: False) -> int:
    """Kill every process but this one that carries `mark`, as long as `unless` is false; answers how many."""
    needle, killed = mark.encode(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if pid != os.getpid() and any(needle in _read(folder / name) for name in ("cmdline", "environ")):
            if unless():
                break
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # ended meanwhile, or another user's who knows our mark
            killed += 1
    return killed


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # ended meanwhile, or not ours to read


def _input_within(seconds: float | None) -> bool:
    return bool(select.select([0], [], [], seconds)[0])


def _kill_all(mark: str, unless: Callable[[], bool] = lambda: False) -> None:
    last = time.monotonic()
    while time.monotonic() - last < QUIET_S and not unless():
        if kill_marked(mark, unless):
            last = time.monotonic()
        time.sleep(LOOK_S)


def _main(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the worker, which may still need the guard
    limit: float | None = None
    while True:
        if _input_within(limit):
            if not (data := os.read(0, NUMBER.size)):
                break
            (limit,) = NUMBER.unpack(data)
        else:
            # The worker reads it when it runs again: what started before was killed by us, not by a fault of nmap's.
            with contextlib.suppress(OSError):
                os.write(1, NUMBER.pack(time.monotonic()))
            # A worker that runs again writes before it starts an nmap, which must live.
            _kill_all(mark, unless=lambda: _input_within(0))
            limit = None
    _kill_all(mark)


if __name__ == "__main__":
    _main(sys.argv[1])
