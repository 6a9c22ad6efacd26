"""The source address of packets."""

from __future__ import annotations

import socket

import pytest

from scanner_worker.scanner.process import Limits, Nmap

NMAP = Nmap("nmap", Limits(1, 1, 1.0))


@pytest.mark.parametrize(("target", "source"), [("127.9.8.1", "127.0.0.1"), ("::1", "::1")])
def test_source_of_packets_is_the_address_of_their_route(target: str, source: str) -> None:
    """The kernel chooses the address by its routes, without a packet."""
    assert NMAP.source(target) == source


def test_source_without_a_route_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target without a route has no source, and does not fail the report."""

    class Unreachable(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, f"Network is unreachable: {address}")

    monkeypatch.setattr("scanner_worker.scanner.process.socket.socket", Unreachable)
    assert NMAP.source("192.0.2.1") is None
