"""The true source of a request."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from scanfleet.runtime.http.proxies import Proxies, client_network

TRUSTED = Proxies([ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")])
FORGED = "198.51.100.9"


@pytest.mark.proves("A30")
@pytest.mark.parametrize(
    ("peer", "forwarded", "source"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", [FORGED], "192.0.2.7"),
        ("192.0.2.7", ["10.0.0.1"], "192.0.2.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", [f"{FORGED}, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", [FORGED, "192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", [f"{FORGED}, 10.9.9.9, 192.0.2.7,10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["192.0.2.7, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.7, "], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.7:4711"], "192.0.2.7"),
        ("10.0.0.1", ["[2001:db9::1]:4711"], "2001:db9::1"),
        ("2001:db8::1", ["::ffff:192.0.2.7"], "192.0.2.7"),
        ("::ffff:10.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", ["fe80::1%\x1b[31m" + "x" * 300], "fe80::1"),
        ("", ["192.0.2.7"], ""),
    ],
)
def test_source_is_the_last_address_that_is_no_trusted_proxy(peer: str, forwarded: list[str], source: str) -> None:
    """Through no, one and two trusted proxies the source is the true one, whatever the caller adds to the header."""
    assert TRUSTED.source(peer, forwarded) == source


@pytest.mark.proves("A30")
def test_source_without_trusted_proxies_is_the_peer() -> None:
    """Without a trusted proxy the header has no effect."""
    assert Proxies([]).source("127.0.0.1", [FORGED]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_client_network_is_an_address_or_a_site(host: str, client: str) -> None:
    """Clients are counted by IPv4 address, in either spelling, and by the /64 network of an IPv6 address."""
    assert client_network(host) == client
