"""The source address of packets."""

from __future__ import annotations

import pytest

from scanner_worker.scanner.process import Limits, Nmap

NMAP = Nmap("nmap", Limits(1, 1, 1.0))


@pytest.mark.parametrize(("target", "source"), [("127.9.8.1", "127.0.0.1"), ("::1", "::1")])
def test_source_of_packets_is_the_address_of_their_route(target: str, source: str) -> None:
    """The kernel chooses the address by its routes, without a packet."""
    assert NMAP.source(target) == source


def test_source_of_an_address_that_the_kernel_refuses_is_unknown() -> None:
    """A target that no packet can be sent to, here a broadcast, has no source, and does not fail the report."""
    assert NMAP.source("255.255.255.255") is None
