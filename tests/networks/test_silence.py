"""Networks with few or no answers are scanned completely in bounded time, without missing an open port."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest

from local.networks import Network
from local.nmap import OpenPorts
from local.wait import until
from tests.client import Client

pytestmark = pytest.mark.e2e

QUICK: Final[dict[str, Any]] = {"preset": "quick", "discovery": "none"}
SERVICES: Final = (22, 80, 443)
MANY_SERVICES: Final = (*SERVICES, 21, 23, 25, 53, 110, 139, 445, 3306, 8080)  # all of them among nmap's hundred
LIMIT_SECONDS: Final = 240.0  # for scans that take up to a minute on an idle machine
PLAIN: Final = ("nmap", "-n", "-Pn", "-T4", "--top-ports", "100")
FASTER: Final = 10  # minimum speed-up over plain nmap
RECALL: Final = 0.99


def places(net: str, hosts: range) -> OpenPorts:
    return {(f"{net}.{host}", port) for host in hosts for port in SERVICES}


def found(user: Client, job_id: int) -> OpenPorts:
    return {(each["ip_address"], each["port"]) for each in user.results(job_id)}


def completed(user: Client, job_id: int, limit_seconds: float = LIMIT_SECONDS) -> dict[str, int]:
    """Wait until the job completes; return its ledger's counts, which must account for each probe."""
    task = user.finished(job_id, limit_seconds)
    assert task["status"]["status"] == "completed", task["status"]["error"]
    ledger = user.ledger(job_id)
    assert ledger["accounted"]
    counts: dict[str, int] = ledger["counts"]
    assert counts["lost"] == counts["waiting"] == counts["cancelled"] == 0
    return counts


@pytest.mark.proves("F31")
def test_scan_of_mostly_silent_network_is_ten_times_faster_than_nmap(
    user: Client, network: Network, tmp_path: Path
) -> None:
    """A /24 in which three quarters drop all packets is scanned ten times faster than by nmap, with all open ports found."""
    network.filter_input("ip daddr 10.77.1.64-10.77.1.255 drop")
    servers = network.serve(places("10.77.1", range(64)))
    report = tmp_path / "plain.xml"
    plain = subprocess.Popen(
        network.command(*PLAIN, "--stats-every", "1s", "-oX", str(report), "10.77.1.0/24"),
        stdout=subprocess.DEVNULL,
    )
    try:
        begin = time.monotonic()
        counts = completed(user, job_id := user.scan("10.77.1.0/24", **QUICK))
        seconds = time.monotonic() - begin
        assert plain.poll() is None
        # nmap's estimate covers the 64 addresses that it is probing; three times as many are silent.
        remaining = int(re.findall(rb'<taskprogress .*remaining="(\d+)"', report.read_bytes())[-1])
    finally:
        plain.kill()
        plain.wait()
    assert seconds + remaining > FASTER * seconds
    assert len(found(user, job_id) & servers) >= RECALL * len(servers)
    assert found(user, job_id) <= servers
    assert (counts["answered"], counts["silent"]) == (64 * 100, 191 * 100)  # and the broadcast address excluded


@pytest.mark.proves("F31")
def test_sweep_of_mostly_silent_network_probes_every_address(user: Client, network: Network) -> None:
    """The preset `sweep` finds all open ports where three quarters of addresses drop all packets, and skips no address."""
    network.filter_input("ip daddr 10.77.9.16-10.77.9.63 drop")
    servers = network.serve(places("10.77.9", range(16)))
    job_id = user.scan("10.77.9.0/26", preset="sweep")
    counts = completed(user, job_id)
    assert found(user, job_id) == servers
    assert (counts["answered"], counts["silent"], counts["down"]) == (16 * 100, 47 * 100, 0)


@pytest.mark.proves("F31")
def test_scan_finds_all_open_ports_where_packets_are_lost(user: Client, network: Network) -> None:
    """With 2 % random packet loss in each direction at least 99 % of open ports are found."""
    network.filter_input("ip daddr 10.77.2.0/26 numgen random mod 100 < 2 drop")
    network.filter_output("ip saddr 10.77.2.0/26 numgen random mod 100 < 2 drop")
    servers = network.serve(places("10.77.2", range(63)))
    job_id = user.scan("10.77.2.0/26", **QUICK)
    assert completed(user, job_id)["answered"] == 63 * 100
    assert len(found(user, job_id) & servers) >= RECALL * len(servers)


@pytest.mark.proves("F31")
@pytest.mark.parametrize("limited", ["resets", "unreachable"])
def test_scan_finds_all_open_ports_where_answers_are_limited(user: Client, network: Network, limited: str) -> None:
    """Hosts that rate-limit RST or ICMP answers of closed ports hide no open port."""
    net = {"resets": "10.77.3", "unreachable": "10.77.4"}[limited]
    if limited == "resets":
        network.filter_output(f"ip saddr {net}.0/27 tcp flags & rst == rst limit rate over 200/second drop")
    else:  # the kernel limits ICMP errors by itself, to one a second for each destination
        network.filter_input(f"ip daddr {net}.0/27 tcp dport != {{ 22, 80, 443 }} reject with icmp port-unreachable")
    servers = network.serve(places(net, range(31)))
    job_id = user.scan(f"{net}.0/27", **QUICK)
    assert completed(user, job_id)["answered"] == 31 * 100
    assert len(found(user, job_id) & servers) >= RECALL * len(servers)


@pytest.mark.long
@pytest.mark.proves("F31")
@pytest.mark.parametrize("network_of", ["drop", "loss", "limit"])
@pytest.mark.parametrize("technique", ["syn", "connect"])
@pytest.mark.parametrize("timing", [3, 4, 5])
def test_scan_finds_all_open_ports_at_each_timing(
    user: Client, network: Network, timing: int, technique: str, network_of: str
) -> None:
    """Three quarters of hosts are silent, 2 % of packets are lost, or each host sends 100 answers a second at most."""
    net = f"10.77.{100 + 6 * timing + 3 * (technique == 'syn') + ['drop', 'loss', 'limit'].index(network_of)}"
    hosts = range(8 if network_of == "drop" else 31)
    if network_of == "drop":
        network.filter_input(f"ip daddr {net}.8-{net}.31 drop")
    elif network_of == "loss":
        network.filter_input(f"ip daddr {net}.0/27 numgen random mod 100 < 2 drop")
        network.filter_output(f"ip saddr {net}.0/27 numgen random mod 100 < 2 drop")
    else:
        for host in hosts:
            network.filter_output(f"ip saddr {net}.{host} limit rate over 100/second burst 5 packets drop")
    servers = network.serve({(f"{net}.{host}", port) for host in hosts for port in MANY_SERVICES})
    job_id = user.scan(f"{net}.0/27", **QUICK, timing=timing, technique=technique)
    counts = completed(user, job_id)
    assert counts["answered"] == len(hosts) * 100
    recall = 0.95 if network_of == "limit" and timing > 3 else RECALL  # ADR 41
    assert len(found(user, job_id) & servers) >= recall * len(servers)


@pytest.mark.long  # beside the other tests nmap's timing decides, and one port of thirty may be missed
@pytest.mark.proves("F31")
def test_scan_finds_all_open_ports_of_host_that_limits_connections(user: Client, network: Network) -> None:
    """A host that drops more than 100 SYNs a second hides no open port."""
    network.filter_input(
        "ip daddr 10.77.8.1 tcp flags & (syn | ack) == syn limit rate over 100/second burst 5 packets drop"
    )
    servers = network.serve({("10.77.8.1", port) for port in range(10, 301, 10)})
    job_id = user.scan("10.77.8.1/32", ports="1-300", timing=4, service_detection=False, discovery="none")
    completed(user, job_id)
    assert found(user, job_id) == servers


@pytest.mark.long
@pytest.mark.proves("F31")
def test_scan_of_host_that_answers_ping_only_completes(user: Client, network: Network) -> None:
    """A host that answers pings and drops all other packets is silent on every port."""
    network.filter_input("ip daddr 10.77.5.1 ip protocol tcp drop")
    job_id = user.scan("10.77.5.1/32", preset="full", ports="1-4096")
    counts = completed(user, job_id)
    assert counts["answered"] + counts["silent"] == 4096
    assert found(user, job_id) == set()


@pytest.mark.long
@pytest.mark.proves("F31")
def test_udp_scan_of_linux_host_completes(user: Client) -> None:
    """A Linux host refuses closed UDP ports once a second; nmap may give up on some, and reports none of them open."""
    job_id = user.scan("10.77.6.1/32", ports="U:1-40", service_detection=False)
    assert completed(user, job_id)["answered"] == 40
    assert {each["status"] for each in user.results(job_id)} <= {"open|filtered"}


@pytest.mark.proves("F31")
def test_tarpit_affects_only_itself(user: Client, network: Network) -> None:
    """A host that accepts every connection without sending data is timed out, and its neighbours are scanned completely."""
    network.serve({("10.77.7.1", port) for port in range(1000, 1040)})
    servers = network.serve({(f"10.77.7.{host}", 22) for host in (0, 2, 3)}, b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    job_id = user.scan("10.77.7.0/29", ports="22,1000-1039", host_timeout=20)
    counts = completed(user, job_id)
    assert (counts["answered"], counts["timed_out"], counts["excluded"]) == (6 * 41, 41, 41)
    results = user.results(job_id)
    assert {(each["ip_address"], each["port"]) for each in results if each["ip_address"] != "10.77.7.1"} == servers
    assert {each["service"] for each in results if each["port"] == 22} == {"ssh"}
    named = {(each["address"], each["outcome"]) for each in user.ledger(job_id)["not_probed"]["addresses"]}
    assert named == {("10.77.7.1", "timed_out"), ("10.77.7.7", "excluded")}


@pytest.mark.networks
@pytest.mark.proves("F31")
def test_standard_scan_of_silent_network_completes_in_fifteen_minutes(user: Client, network: Network) -> None:
    """A /27 without answers is scanned for a thousand ports within 15 minutes."""
    network.filter_input("ip daddr 10.77.20.0/27 drop")
    counts = completed(user, user.scan("10.77.20.0/27", preset="standard", discovery="none"), 900)
    assert (counts["silent"], counts["excluded"]) == (31_000, 1_000)  # the broadcast address is excluded


@pytest.mark.networks
@pytest.mark.proves("F31")
def test_full_scan_of_host_that_answers_ping_only_completes(user: Client, network: Network) -> None:
    """All ports of a host that answers pings and drops all other packets are silent."""
    network.filter_input("ip daddr 10.77.21.1 ip protocol tcp drop")
    counts = completed(user, user.scan("10.77.21.1/32", preset="full"), 1_800)
    assert counts["answered"] + counts["silent"] == 65_535


@pytest.mark.networks
@pytest.mark.proves("F31")
def test_udp_scan_of_two_thousand_ports_completes(user: Client) -> None:
    """A Linux host refuses 2,000 closed UDP ports at one a second, and none is missed or reported open."""
    job_id = user.scan("10.77.22.1/32", ports="U:1-2000", service_detection=False)
    assert completed(user, job_id, 3_600)["answered"] == 2_000
    assert {each["status"] for each in user.results(job_id)} <= {"open|filtered"}


@pytest.mark.networks
@pytest.mark.proves("F31")
def test_polite_scan_of_empty_network_makes_progress(user: Client, network: Network) -> None:
    """At timing 1 each address that does not exist takes two minutes, and the ledger counts it when it is done."""
    network.filter_input("ip daddr 10.77.23.0/24 drop")
    job_id = user.scan("10.77.23.0/24", ports="22,80,443", timing=1, service_detection=False)

    def down() -> int:
        counts: dict[str, Any] = user.ledger(job_id)["counts"]
        return int(counts["down"])

    until(lambda: down() >= 2 * 3, 600, "two addresses to be found down")
    until(lambda: down() >= 12 * 3, 600, "twelve addresses to be found down")
    user.cancel(job_id)
    assert user.finished(job_id)["status"]["status"] == "cancelled"
