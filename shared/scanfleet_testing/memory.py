"""Measure the memory of this process, for tests that bound it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def begin_peak() -> int:
    """Reset the peak of this process's memory, without what it has freed; return its size in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return _status("VmRSS")


def peak() -> int:
    """Return the largest size of this process's memory since `begin_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[name].split()[0]) * 1_024
