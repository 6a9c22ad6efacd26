"""The networks of the other tests are closed, and their packets are counted right."""

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
def test_scanning_side_has_no_route_to_other_networks(network: Network, address: str) -> None:
    """No address but those of the scanned side can be reached from the scanning side."""
    asked = subprocess.run(network.command("ip", "route", "get", address), capture_output=True, check=False)
    assert asked.returncode != 0
    assert b"unreachable" in asked.stderr


def test_capture_sees_each_packet_that_leaves_once(network: Network) -> None:
    """What is sent is captured with its address, protocol and port; the answers are not."""
    with network.capture() as packets:
        subprocess.run(network.command(sys.executable, "-c", SEND), check=True)
    assert {(each.address, each.protocol, each.port) for each in packets} == {("10.77.60.1", socket.IPPROTO_UDP, 9)}
    assert by_address(packets) == {"10.77.60.1": 5}


def test_busiest_second_is_found_wherever_it_begins() -> None:
    """Windows of one second begin at any packet, not at whole seconds."""
    assert busiest_second([packet(at) for at in (0.0, 0.9, 1.0, 1.1, 1.89, 5.0)]) == 4


def test_gaps_are_those_of_each_address() -> None:
    """Packets to different addresses may leave together."""
    assert gaps([packet(0, "a"), packet(0, "b"), packet(3, "a"), packet(1, "b"), packet(9, "b")]) == [1, 3, 8]
