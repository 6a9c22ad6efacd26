"""Conversion of open ports to the public result format."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scanfleet.messages import PortFound
from scanner_worker.domain import Host
from scanner_worker.scanner.view import ports
from scanner_worker.scanner.xml import BadXmlError, Reader

Recording = Callable[[str], bytes]


def hosts(document: bytes) -> list[Host]:
    return list(Reader(max_host_bytes=1 << 20).feed(document))


def found(document: bytes) -> dict[str, tuple[PortFound, ...]]:
    return {host.address: ports(host) for host in hosts(document)}


def test_ports_have_service_version_and_banner(recording: Recording) -> None:
    """Service, version, system and banner of open ports have the documented form; closed ports are not listed."""
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


def test_ports_hostile_banners_are_escaped(recording: Recording) -> None:
    """Markup is kept as text; terminal escapes, direction marks and invalid UTF-8 are kept as escapes."""
    ftp = found(recording("versions"))["127.9.1.1"][0]
    assert "<script>" in ftp.banner
    assert r"\x1B[31m" in ftp.banner
    assert r"\xE2\x80\xAE" in ftp.banner
    assert all(character.isprintable() or character in "\n\t" for character in ftp.banner + ftp.raw_data)


def test_ports_have_the_best_os_match(recording: Recording) -> None:
    """With OS detection every open port has the most accurate match."""
    assert {port.os_info for port in found(recording("os"))["127.9.1.1"]} == {"Linux 5.0 - 5.2"}


def test_ports_are_listed_in_order(recording: Recording) -> None:
    """Every open port is listed in order, and a host without open ports has none."""
    by_address = found(recording("many_open"))
    assert [port.port for port in by_address["127.9.1.2"]] == list(range(8000, 8060))
    assert by_address["127.9.1.3"] == ()


def test_ports_summarized_silent_ports_are_ranges(recording: Recording) -> None:
    """Silent UDP ports that nmap summarizes are ranges, and listed ones are port objects."""
    (silent,) = (host for host in hosts(recording("udp")) if host.address == "127.9.5.1")
    assert (ports(silent), silent.open_filtered) == ((), "1-60")
    (listed,) = hosts(recording("udp_listed"))
    assert [(port.port, port.status, port.service) for port in ports(listed)[:2]] == [
        (1, "open|filtered", "tcpmux"),
        (2, "open|filtered", "compressnet"),
    ]
    assert listed.open_filtered == ""


def service(attributes: bytes) -> PortFound:
    """Return a port with this `<service>`."""
    element = b'<port protocol="tcp" portid="1"><state state="open" reason="syn-ack"/><service %s/></port>' % attributes
    (port,) = ports(Host("127.9.1.1", True, False, 1, set(), element))
    return port


def test_ports_service_inside_tls_has_ssl_prefix() -> None:
    """A service inside TLS is written as nmap prints it, so that it differs from the plain service."""
    assert service(b'name="http" product="nginx" tunnel="ssl" method="probed"').service == "ssl/http"
    assert service(b'name="http" product="nginx" method="probed"').service == "http"
    assert service(b'name="http" product=" tunnel=&quot;ssl&quot;" method="probed"').service == "http"


def test_ports_utf8_references_are_decoded() -> None:
    """nmap writes a reference per UTF-8 byte; valid sequences are decoded, other bytes are kept as escapes."""
    assert service(b'name="x" product="Gr&#xc3;&#xb6;&#xc3;&#x9f;e"').version == "Größe"
    assert service(b'name="x" product="&#xe2;&#x80;&#xae;evil"').version == r"\u202eevil"
    assert service(b'name="x" product="caf&#xe9; &#xc3;&#xb6;"').version == "café Ã¶"


def test_ports_unreadable_host_raises_without_document() -> None:
    """A host that python-nmap cannot read raises a short error without the document in it."""
    element = b'<port protocol="tcp" portid="1"><state state="open"/><service name="x"></port>'
    with pytest.raises(BadXmlError) as raised:
        ports(Host("127.9.1.1", True, False, 1, set(), element))
    assert "service" not in str(raised.value)
