"""Unit tests of nmap's data folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from scanfleet.scanning.ports import PortSet
from scanner_worker.scanner.datadir import ServiceTable, write

TABLE = """# a comment of 80/tcp
ssh\t22/tcp\t0.182286\t# Secure Shell Login
ssh\t22/sctp\t0.000000
http\t80/tcp\t0.484143\t# World Wide Web HTTP
http\t80/udp\t0.035767
unknown\t1024/tcp\t0.000227
damaged
ours 9999/tcp # without a frequency
3com 9998/tcp 0.001
  indented 9997/tcp 0.002
first 9996/tcp 0.003
second 9996/tcp 0.004
"""


@pytest.fixture
def table(tmp_path: Path) -> ServiceTable:
    (tmp_path / "nmap-services").write_text(TABLE)
    return ServiceTable.read(tmp_path)


@pytest.mark.parametrize(
    ("ports", "lines"),
    [
        ("22-80", ["ssh\t22/tcp\t0.182286", "http\t80/tcp\t0.484143"]),
        ("T:1000-2000,U:80", ["unknown\t1024/tcp\t0.000227", "http\t80/udp\t0.035767"]),
        ("9", []),
        (
            "9996-9999",
            ["first 9996/tcp 0.003", "indented 9997/tcp 0.002", "3com 9998/tcp 0.001", "ours 9999/tcp"],
        ),
    ],
)
def test_service_table_has_the_lines_of_the_ports(table: ServiceTable, ports: str, lines: list[str]) -> None:
    """A run gets the lines of its ports and protocols, in nmap's format, without comments."""
    assert table.of(PortSet.parse(ports)).splitlines() == lines


@pytest.mark.parametrize("lines", ["", "ssh\t22/tcp\t0.182286\n", None])
def test_write_table_is_the_given_one_or_none(tmp_path: Path, lines: str | None) -> None:
    """An empty table names no port, and without one nmap reads that of its installation."""
    write(tmp_path / "data", set(), lines)
    file = tmp_path / "data/nmap-services"
    assert (file.read_text() if file.exists() else None) == lines
