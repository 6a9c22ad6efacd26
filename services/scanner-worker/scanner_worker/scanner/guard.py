"""A watchdog process that kills the nmap processes of a worker that has ended or is blocked.

The worker runs it as a script. The worker's event loop writes a limit in seconds to the guard's standard input every
second. If the next write does not arrive within that limit, because the worker is stopped, its event loop is blocked or
the machine swaps, the guard kills every process with the worker's mark in its environment or command line. When the worker
ends for any reason, the kernel closes the input; the guard then kills the same processes and exits. Before the first limit
it kills nothing.

Simpler mechanisms do not suffice. The kernel clears a parent-death signal when nmap gains capabilities from its file, which
is how an unprivileged worker gets raw sockets, and the signal does not reach processes that nmap forks. A list of process
groups misses a group that was created in the worker's last millisecond. A guard per nmap costs a third of a small scan.
The environment is inherited by every descendant. The environment of a process with capabilities cannot be read, but its
command line can.

The script imports only the standard library, so that it starts in 20 ms and uses 10 MB.
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

NUMBER = struct.Struct("d")  # read and written atomically: far smaller than a pipe's atomic write size

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they are for the worker, which may still need the guard
QUIET_SECONDS = 1.0  # without a marked process, after which none is left: longer than from fork to exec of nmap
LOOK_SECONDS = 0.05


def kill_marked(mark: str, unless: Callable[[], bool] = lambda: False) -> int:
    """Kill every process with `mark` except this one, while `unless` is false; return the number of killed processes."""
    needle, killed = mark.encode(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if pid != os.getpid() and any(needle in _read(folder / name) for name in ("cmdline", "environ")):
            if unless():
                break
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # it has ended, or belongs to another user
            killed += 1
    return killed


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended, or may not be read


def _input_within(seconds: float | None) -> bool:
    return bool(select.select([0], [], [], seconds)[0])


def _kill_all(mark: str, unless: Callable[[], bool] = lambda: False) -> None:
    last = time.monotonic()
    while time.monotonic() - last < QUIET_SECONDS and not unless():
        if kill_marked(mark, unless):
            last = time.monotonic()
        time.sleep(LOOK_SECONDS)


def _main(mark: str) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.write(1, NUMBER.pack(0))  # the worker starts no nmap before
    limit_seconds: float | None = None
    while True:
        if _input_within(limit_seconds):
            if not (data := os.read(0, NUMBER.size)):
                break
            (limit_seconds,) = NUMBER.unpack(data)
        else:
            # The worker reads this when it resumes: runs that started before were killed by the guard, not by an error of nmap.
            with contextlib.suppress(OSError):
                os.write(1, NUMBER.pack(time.monotonic()))
            # A worker that resumes writes before it starts a new nmap, which must not be killed.
            _kill_all(mark, unless=lambda: _input_within(0))
            limit_seconds = None
    _kill_all(mark)


if __name__ == "__main__":
    _main(sys.argv[1])
