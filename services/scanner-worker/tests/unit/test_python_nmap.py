"""Conversion of open ports to the public result format."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scanfleet.contracts.messages import HostDetails, PortFound, ScriptOutput, SystemMatch
from scanfleet.contracts.messages.results import MAX_ELEMENT_CHARS, MAX_HOSTNAMES, MAX_OUTPUT_CHARS, MAX_OUTPUTS
from scanner_worker.domain.scan import Host
from scanner_worker.scanner.python_nmap import read
from scanner_worker.scanner.xml import BadXmlError, Reader

Recording = Callable[[str], bytes]


def hosts(document: bytes) -> list[Host]:
    return list(Reader(max_host_bytes=1 << 20).feed(document))


def ports(host: Host) -> tuple[PortFound, ...]:
    return read(host)[1]


def details(host: Host) -> HostDetails:
    found, _ = read(host)
    assert found is not None
    return found


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


def test_ports_system_is_not_read_from_other_values() -> None:
    """The system that a service reports is the value of its attribute, not a text that looks like one."""
    assert service(b'name="x" product="a ostype=" version="1" method="probed"').os_info == ""
    assert service(b'name="x" product="a ostype=" version="1" ostype="BSD" method="probed"').os_info == "BSD"


def test_ports_unreadable_host_raises_without_document() -> None:
    """A host that python-nmap cannot read raises a short error without the document in it."""
    element = b'<port protocol="tcp" portid="1"><state state="open"/><service name="x"></port>'
    with pytest.raises(BadXmlError) as raised:
        ports(Host("127.9.1.1", True, False, 1, set(), element))
    assert "service" not in str(raised.value)


def of_element(element: bytes) -> HostDetails:
    """Return the details of this element."""
    return details(Host("127.9.1.1", True, False, 1, {b"syn-ack"}, element))


def test_details_of_a_recorded_host(recording: Recording) -> None:
    """Details have nmap's reason, systems by accuracy, numbers of closed ports, and the duration."""
    (found,) = hosts(recording("os"))
    of_host = details(found)
    assert (of_host.reason, of_host.closed, of_host.seconds) == ("localhost-response", 22, 12.0)
    assert of_host.systems[:2] == (
        SystemMatch(name="Linux 5.0 - 5.2", accuracy=97, line=68062),
        SystemMatch(name="Linux 3.1", accuracy=95, line=62917),
    )
    by_address = {each.address: details(each) for each in hosts(recording("many_open"))}
    assert {address: each.closed for address, each in by_address.items()} == {"127.9.1.2": 40, "127.9.1.3": 100}
    ignored = b'<extraports state="filtered" count="97"/><port><state state="filtered"/></port>'
    assert of_element(ignored).filtered == 98


def test_details_of_silent_hosts_are_omitted(recording: Recording) -> None:
    """A host that neither answered nor has ports has no details, and one with silent UDP ports has."""
    assert {read(each) for each in hosts(recording("silent")) if each.address != "127.9.1.8"} == {(None, ())}
    assert details(next(host for host in hosts(recording("udp")) if host.open_filtered == "1-60")).reason


def test_details_have_the_element_without_open_ports(recording: Recording) -> None:
    """The element of a host that has answered is as nmap wrote it, without its open ports; hostile values are escaped."""
    (found,) = hosts(recording("os"))
    element = details(found).element
    assert element.startswith('<status state="up" reason="localhost-response" reason_ttl="0"/>\n<address ')
    assert element.endswith('<times srtt="56" rttvar="7" to="100000"/>\n')
    assert (element.count("<port "), element.count('state="open"'), element.count("<osclass ")) == (22, 1, 13)
    assert '<port protocol="tcp" portid="20">' in element
    (hostile,) = hosts(recording("versions"))
    assert "\n\n" not in details(hostile).element
    assert of_element('<hostscript><script output="\u202e"/></hostscript>'.encode()).element.count("\\u202e") == 1
    silent = next(host for host in hosts(recording("udp")) if host.open_filtered == "1-60")
    assert details(silent).element == ""


def test_details_element_that_is_too_long_has_no_scripts() -> None:
    """An element that is too long is kept without the output of scripts, or not at all."""
    script = b'<hostscript><script id="x" output="%s"/></hostscript>' % (b"x" * MAX_ELEMENT_CHARS)
    assert of_element(b"<host><times/>" + script).element == "<times/>"
    assert of_element(b"<times/>" * MAX_ELEMENT_CHARS).element == ""
    assert len(of_element(b"<times/>" * (MAX_ELEMENT_CHARS // 8)).element) == MAX_ELEMENT_CHARS


def test_details_names_are_those_of_services(recording: Recording) -> None:
    """Names that services report are listed once each, as plain text."""
    (found,) = hosts(recording("versions"))
    assert details(found).hostnames == (" ma.il..x",)
    quoted = b'<service name="a" product="a hostname=" version="1" extrainfo=" ostype=" method="probed"/>'
    assert of_element(quoted).hostnames == ()
    twice = b'<service name="a" hostname="&#xe2;&#x80;&#xae;b"/>' * 2
    assert of_element(twice).hostnames == (r"\u202eb",)


def test_details_have_the_hardware_address_and_its_vendor() -> None:
    """The hardware address of a neighbour is listed with its vendor, if nmap knows it."""
    element = b'<address addr="52:54:00:12:34:56" addrtype="mac"%s/>'
    known = of_element(element % b' vendor="Q&amp;A"')
    assert (known.mac, known.vendor) == ("52:54:00:12:34:56", "Q&A")
    unknown = of_element(element % b"")
    assert (unknown.mac, unknown.vendor) == ("52:54:00:12:34:56", "")


def test_details_output_of_host_scripts_is_plain_text() -> None:
    """The output of host scripts keeps its lines; markup is text, and control characters are escapes."""
    element = (
        b'<hostscript><script id="smb-os-discovery" output="&#xa;  OS: &lt;b&gt;&#x9b;[31m"><elem key="os">x</elem>'
    )
    assert of_element(element + b"</script></hostscript>").scripts == (
        ScriptOutput(id="smb-os-discovery", output="\n  OS: <b>\\x9b[31m"),
    )


def test_details_hostile_host_is_bounded() -> None:
    """A host with more names, scripts and output than a message may have is cut to the limits."""
    script = b'<script id="' + b"i" * 1_000 + b'" output="' + b"o" * 10_000 + b'"/>'
    names = b"".join(b'<service name="x" hostname="%d"/>' % number for number in range(1_000))
    cut = of_element(names + b"<hostscript>" + script * 1_000 + b"</hostscript>")
    assert sum(len(each.output) for each in cut.scripts) == MAX_OUTPUT_CHARS
    assert (len(cut.scripts), len(cut.hostnames)) == (MAX_OUTPUTS, MAX_HOSTNAMES)
