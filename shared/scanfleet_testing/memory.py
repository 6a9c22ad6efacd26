"""Measure the memory of a process, for tests that bound it."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path


def begin_peak(pid: int | None = None) -> int:
    """Reset the peak of the process's memory, by default this one's without what it has freed; return its size in bytes."""
    if pid is None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    Path(f"/proc/{pid or os.getpid()}/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return _status(pid, "VmRSS")


def peak(pid: int | None = None) -> int:
    """Return the largest size of the process's memory since `begin_peak`, in bytes."""
    return _status(pid, "VmHWM")


def _status(pid: int | None, name: str) -> int:
    text = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="ascii")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines[name].split()[0]) * 1_024
