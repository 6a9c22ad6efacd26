"""The test networks are isolated, and their packets are counted correctly."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from local.networks import Network, Packet, ahead, busiest_second, by_address, gaps, most_at_once
from local.wait import until

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


def test_program_that_catches_up_is_never_ahead_of_its_schedule() -> None:
    """A pause and a burst after it keep to a schedule that begins with the first packet; more packets than it has do not."""
    paused = [packet(at) for at in (0.0, 0.1, *[0.7] * 5, 0.8)]
    assert busiest_second(paused) == 8
    assert ahead(paused, 10) == pytest.approx(0.0)
    assert ahead([packet(at) for at in (0.0, 0.1, 0.1, 0.2, 0.2)], 10) == pytest.approx(2.0)


def test_stopped_nmap_catches_up_and_is_not_ahead(network: Network) -> None:
    """An nmap that does not run for a moment exceeds its rate in the next second, but is never ahead of its schedule."""
    with network.capture() as packets:
        options = ("-n", "-Pn", "--max-rate", "100", "-p", "1-5")
        nmap = subprocess.Popen(network.command("nmap", *options, "10.77.61.0/25"), stdout=subprocess.DEVNULL)
        until(lambda: len(packets) > 100, 60, "the first packets")
        nmap.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: time.monotonic() > stopped + 0.7, 60, "packets to be due")
        nmap.send_signal(signal.SIGCONT)
        assert nmap.wait() == 0
    sent = [each for each in packets if each.address.startswith("10.77.61.")]
    assert busiest_second(sent) > 130
    assert ahead(sent, 100) < 15 < ahead(sent, 80)


def test_groups_count_from_their_first_to_their_last_packet() -> None:
    """Groups that overlap are in progress at once, also while one of them pauses; one that begins later is not."""
    first, second, third = ([packet(begin), packet(begin + 2)] for begin in (0.0, 1.0, 4.0))
    assert most_at_once([third, first]) == 1
    assert most_at_once([third, second, first]) == 2
