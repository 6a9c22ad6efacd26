"""A job's rate limits hold for any number of slots, measured by captured packets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, Final

import pytest

from local.networks import Network, Packet, ahead, busiest_second, by_address, gaps, most_at_once
from tests.client import Client

pytestmark = pytest.mark.e2e

PLAIN: Final[dict[str, Any]] = {"service_detection": False, "discovery": "none"}
RATE: Final = 100
FAST: Final = 1_200  # a rate for two nmaps
# By how many seconds nmap may seem to be ahead of its schedule: it begins that before its first packet, which a busy machine
# delays.
START_SECONDS: Final = 0.3
CATCH_UP: Final = 3  # times its rate in a second, after a busy machine did not run nmap for two
LIMIT_SECONDS: Final = 240.0  # for scans that take up to a minute on an idle machine


def by_nmap(packets: Sequence[Packet], addresses: int) -> list[list[Packet]]:
    """Return the packets of each nmap: a chunk has so many addresses, a power of two."""
    groups: defaultdict[int, list[Packet]] = defaultdict(list)
    for packet in packets:
        groups[int(ip_address(packet.address)) // addresses].append(packet)
    return list(groups.values())


@pytest.mark.proves("F30", "G18")
def test_job_never_sends_faster_than_its_max_rate(user: Client, network: Network) -> None:
    """A job with eight free slots has one nmap at a time, which is never ahead of a schedule of `max_rate` probes per second."""
    with network.capture() as packets:
        job_id = user.scan("10.77.40.0/24", **PLAIN, ports="1-5", max_rate=RATE)
        assert user.finished(job_id, LIMIT_SECONDS)["status"]["status"] == "completed"
    sent = [packet for packet in packets if packet.address.startswith("10.77.40.")]
    assert set(by_address(sent)) == {f"10.77.40.{host}" for host in range(255)}  # not the broadcast address
    nmaps = by_nmap(sent, 64)
    assert most_at_once(nmaps) == 1
    assert max(ahead(each, RATE) for each in nmaps) <= RATE * START_SECONDS
    assert busiest_second(sent) <= RATE * CATCH_UP


@pytest.mark.proves("F30", "G18")
@pytest.mark.parametrize(
    ("technique", "net", "surplus"),
    [
        ("syn", "10.77.43", 1.0),
        ("connect", "10.77.44", 1.1),  # the kernel repeats the packets of silent addresses
    ],
)
def test_nmaps_of_a_job_together_keep_to_its_max_rate(
    user: Client, network: Network, technique: str, net: str, surplus: float
) -> None:
    """A job whose rate allows two nmaps has two at once, each never ahead of a schedule of half of it, where no port is open."""
    network.filter_input(f"ip daddr {{ {net}.16/28, {net}.48/28 }} drop")
    with network.capture() as packets:
        job_id = user.scan(f"{net}.0/26", **PLAIN, ports="1-100", technique=technique, max_rate=FAST)
        assert user.finished(job_id, LIMIT_SECONDS)["status"]["status"] == "completed"
    sent = [packet for packet in packets if packet.address.startswith(f"{net}.")]
    assert len({(packet.address, packet.port) for packet in sent}) == 63 * 100  # not the broadcast address
    nmaps = by_nmap(sent, 16)
    assert most_at_once(nmaps) == 2
    assert max(ahead(each, FAST / 2 * surplus) for each in nmaps) <= FAST / 2 * START_SECONDS
    assert FAST * 0.6 < busiest_second(sent) <= FAST * CATCH_UP  # more than one nmap sends


@pytest.mark.proves("F30")
def test_polite_job_probes_an_address_once_at_a_time(user: Client, network: Network) -> None:
    """At timing 2 no two probes reach an address within 0.4 seconds, for any number of chunks."""
    with network.capture() as packets:
        # So short a timeout cuts the ports into several chunks.
        job_id = user.scan("10.77.41.1/32", **PLAIN, ports="1-50", timing=2, host_timeout=60)
        assert user.finished(job_id, LIMIT_SECONDS)["status"]["status"] == "completed"
    sent = [packet for packet in packets if packet.address == "10.77.41.1"]
    assert {packet.port for packet in sent} == set(range(1, 51))
    assert min(gaps(sent)) >= 0.35


@pytest.mark.networks
@pytest.mark.proves("F30")
def test_paranoid_job_probes_an_address_once_in_five_minutes(user: Client, network: Network) -> None:
    """At timing 0 an address gets a probe every five minutes, also from successive chunks, while seven slots are free."""
    with network.capture() as packets:
        job_id = user.scan("10.77.45.1/32", **PLAIN, ports="1-3", timing=0)
        assert user.finished(job_id, 1_800)["status"]["status"] == "completed"
    sent = [packet for packet in packets if packet.address == "10.77.45.1"]
    assert sorted(packet.port for packet in sent) == [1, 2, 3]
    assert min(gaps(sent)) >= 299


@pytest.mark.networks
@pytest.mark.proves("F30")
def test_sneaky_job_probes_an_address_once_at_a_time(user: Client, network: Network) -> None:
    """At timing 1 an address gets a probe every 15 seconds, and an earlier one only at the start of its next chunk."""
    with network.capture() as packets:
        job_id = user.scan("10.77.42.0/30", **PLAIN, ports="1-40", timing=1)
        assert user.finished(job_id, 1_800)["status"]["status"] == "completed"
    sent = [packet for packet in packets if packet.address.startswith("10.77.42.")]
    assert {(packet.address, packet.port) for packet in sent} == {
        (address, port) for address in by_address(sent) for port in range(1, 41)
    }
    # nmap repeats one of twenty probes to measure its timing, if the last answer is older than 1.25 seconds.
    assert max(by_address(sent).values()) <= 42
    assert sum(gap < 14 for gap in gaps(sent)) <= len(by_address(sent))  # each has two chunks
