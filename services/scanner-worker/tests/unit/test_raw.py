"""Permission to send raw packets."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from scanner_worker.scanner.raw import NET_RAW, Privileges, may_send_raw

UNPRIVILEGED = Privileges(root=False, effective=0, ambient=0, bounding=NET_RAW, no_new_privs=False, file=b"")
ROOT = replace(UNPRIVILEGED, root=True, effective=NET_RAW)
GRANTED = struct.pack("<IIIII", 0x02000001, NET_RAW, 0, 0, 0)  # as `setcap cap_net_raw+ep` writes it


@pytest.mark.parametrize(
    ("mine", "may"),
    [
        (ROOT, True),
        (replace(ROOT, effective=0), False),
        (replace(ROOT, bounding=0), False),
        (UNPRIVILEGED, False),
        (replace(UNPRIVILEGED, effective=NET_RAW), False),
        (replace(UNPRIVILEGED, ambient=NET_RAW), True),
        (replace(UNPRIVILEGED, file=GRANTED), True),
        (replace(UNPRIVILEGED, file=GRANTED, no_new_privs=True), False),
        (replace(UNPRIVILEGED, file=GRANTED, bounding=0), False),
        (replace(UNPRIVILEGED, file=struct.pack("<IIIII", 0x02000000, NET_RAW, 0, 0, 0)), False),
        (replace(UNPRIVILEGED, file=struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0)), False),
        (replace(UNPRIVILEGED, file=b"\x01"), False),
    ],
)
def test_may_send_raw_requires_effective_capability(mine: Privileges, may: bool) -> None:
    """The capability counts only if nmap has it after its start: root's own, ambient, or granted by its file."""
    assert may_send_raw(mine) is may
