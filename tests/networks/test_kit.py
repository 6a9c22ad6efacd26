"""The test networks are isolated, and their packets are counted correctly."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from local.networks import Network, Packet, busiest_second, by_address, gaps

pytestmark = pytest.mark.integration

SEND = """
import socket
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(5):
    sender.sendto(b"", ("10.77.60.1", 9))
"""


def packet(at: float, address: str = "10.77.60.1") -> Packet:
    return Packet(at, address, socket.IPPROTO_TCP, 80)


@pytest.mark.parametrize("address", ["192.0.2.1", "169.254.169.254", "2001:db8::1"])
def test_network_has_no_route_to_other_networks(network: Network, address: str) -> None:
    """The scanning side reaches only addresses of the scanned side."""
    asked = subprocess.run(network.command("ip", "route", "get", address), capture_output=True, check=False)
    assert asked.returncode != 0
    assert b"unreachable" in asked.stderr


def test_capture_records_each_sent_packet_once(network: Network) -> None:
    """Sent packets are captured with address, protocol and port; answers are not."""
    with network.capture() as packets:
        subprocess.run(network.command(sys.executable, "-c", SEND), check=True)
    assert {(each.address, each.protocol, each.port) for each in packets} == {("10.77.60.1", socket.IPPROTO_UDP, 9)}
    assert by_address(packets) == {"10.77.60.1": 5}


def test_busiest_second_starts_at_any_packet() -> None:
    """Windows of one second start at any packet, not at whole seconds."""
    assert busiest_second([packet(at) for at in (0.0, 0.9, 1.0, 1.1, 1.89, 5.0)]) == 4


def test_gaps_are_measured_per_address() -> None:
    """Gaps are measured per address, not between packets to different addresses."""
    assert gaps([packet(0, "a"), packet(0, "b"), packet(3, "a"), packet(1, "b"), packet(9, "b")]) == [1, 3, 8]
