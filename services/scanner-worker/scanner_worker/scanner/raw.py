"""Determine whether nmap, started by this process, may send raw packets."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NET_RAW: Final = 1 << 13  # CAP_NET_RAW

_REVISIONS: Final = (0x02000000, 0x03000000)  # of the attribute; both start with flags and the lower permitted set
_EFFECTIVE: Final = 0x000001


@dataclass(frozen=True, slots=True)
class Privileges:
    """The inputs that determine a program's capabilities when it is started; sets are bit masks."""

    root: bool
    effective: int
    ambient: int
    bounding: int
    no_new_privs: bool
    file: bytes
    """The program's `security.capability` attribute; empty if it has none."""


def may_send_raw(mine: Privileges) -> bool:
    """Return whether a program started with these privileges may send raw packets.

    Root passes on its effective set, other users their ambient set; the file itself may also grant the capability
    (capabilities(7)).
    """
    if not mine.bounding & NET_RAW:
        return False
    if mine.root:
        return bool(mine.effective & NET_RAW)
    return bool(mine.ambient & NET_RAW) or (not mine.no_new_privs and _granted(mine.file))


def _granted(attribute: bytes) -> bool:
    if len(attribute) < 2 * 4:
        return False
    flags, permitted = struct.unpack_from("<II", attribute)
    return flags & ~_EFFECTIVE in _REVISIONS and bool(flags & _EFFECTIVE and permitted & NET_RAW)


def privileges(program: str) -> Privileges:
    """Return the privileges with which this process would start `program`."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    try:
        file = os.getxattr(program, "security.capability")
    except OSError:
        file = b""
    return Privileges(
        root=os.geteuid() == 0,
        effective=int(status["CapEff"], 16),
        ambient=int(status["CapAmb"], 16),
        bounding=int(status["CapBnd"], 16),
        no_new_privs=status["NoNewPrivs"] == "1",
        file=file,
    )
