"""Open ports as the public results word them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scanfleet.messages import PortFound
from scanner_worker.domain import Host
from scanner_worker.scanner.view import ports
from scanner_worker.scanner.xml import BadXmlError, Reader

Recording = Callable[[str], bytes]


def found(document: bytes) -> dict[str, tuple[PortFound, ...]]:
    return {host.address: ports(host) for host in Reader(max_host_bytes=1 << 20).feed(document)}


def test_services_versions_and_banners(recording: Recording) -> None:
    """Service, version, system and banner of open ports are worded as promised; closed ports are not listed."""
    ftp, ssh, smtp = found(recording("versions"))["127.9.1.1"]
    assert [(port.port, port.protocol, port.status) for port in (ftp, ssh, smtp)] == [
        (21, "tcp", "open"),
        (22, "tcp", "open"),
        (25, "tcp", "open"),
    ]
    assert (ssh.service, ssh.version) == ("ssh", "OpenSSH 9.2p1 Debian 2+deb12u3 (protocol 2.0)")
    assert ssh.os_info == "Linux"
    assert ssh.banner == "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3"
    assert ssh.raw_data.startswith('<port protocol="tcp" portid="22"><state state="open"')
    assert ssh.raw_data.endswith("</port>")
    assert (smtp.service, smtp.version) == ("smtp", "Postfix smtpd")


def test_hostile_banners_are_text(recording: Recording) -> None:
    """Markup stays as text; terminal escapes, direction marks and broken UTF-8 stay as escapes."""
    ftp = found(recording("versions"))["127.9.1.1"][0]
    assert "<script>" in ftp.banner
    assert r"\x1B[31m" in ftp.banner
    assert r"\xE2\x80\xAE" in ftp.banner
    assert all(character.isprintable() or character in "\n\t" for character in ftp.banner + ftp.raw_data)


def test_best_system_match_is_every_ports_system(recording: Recording) -> None:
    """With OS detection the most accurate match stands at every open port."""
    assert {port.os_info for port in found(recording("os"))["127.9.1.1"]} == {"Linux 5.0 - 5.2"}


def test_many_ports(recording: Recording) -> None:
    """Every open port is listed, in order, and a host with none has none."""
    by_address = found(recording("many_open"))
    assert [port.port for port in by_address["127.9.1.2"]] == list(range(8000, 8060))
    assert by_address["127.9.1.3"] == ()


def test_ports_that_nmap_sums_up_are_listed_too(recording: Recording) -> None:
    """open|filtered ports are results even where nmap writes only their numbers."""
    summed_up = found(recording("udp"))["127.9.5.1"]
    assert [port.port for port in summed_up] == list(range(1, 61))
    assert {(port.protocol, port.status) for port in summed_up} == {("udp", "open|filtered")}
    listed = found(recording("udp_listed"))["127.9.5.1"]
    assert [(port.port, port.status, port.service) for port in listed[:2]] == [
        (1, "open|filtered", "tcpmux"),
        (2, "open|filtered", "compressnet"),
    ]


def test_numbers_with_gaps() -> None:
    """Summed-up ports are read as single numbers and ranges."""
    element = (
        b'<extraports state="open|filtered" count="4">\n'
        b'<extrareasons reason="no-response" count="4" proto="udp" ports="5,7-8,20"/>\n</extraports>'
    )
    assert [port.port for port in ports(Host("::1", True, False, 4, set(), element))] == [5, 7, 8, 20]


def test_a_host_that_cannot_be_read_is_said_not_quoted() -> None:
    """What python-nmap cannot read becomes a short error without the document in it."""
    element = b'<port protocol="tcp" portid="1"><state state="open"/><service name="x"></port>'
    with pytest.raises(BadXmlError) as raised:
        ports(Host("127.9.1.1", True, False, 1, set(), element))
    assert "service" not in str(raised.value)
