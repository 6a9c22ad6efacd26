"""Convert the open ports and the details of a finished host, read by python-nmap, to the public result format."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Final
from xml.etree import ElementTree as ET

import nmap

from scanfleet.contracts.messages import HostDetails, PortFound, ScriptOutput, SystemMatch
from scanfleet.contracts.messages.fields import MAX_NUMBER
from scanfleet.contracts.messages.results import (
    MAX_ELEMENT_CHARS,
    MAX_HOSTNAMES,
    MAX_LINE_CHARS,
    MAX_NAME_CHARS,
    MAX_OUTPUT_CHARS,
    MAX_OUTPUTS,
    MAX_SYSTEMS,
    MAX_TEXT_CHARS,
)
from scanner_worker.domain.scan import Host, printable
from scanner_worker.scanner.xml import BadXmlError

_PORT: Final = re.compile(
    rb'<port protocol="(tcp|udp)" portid="([0-9]+)"><state state="open(?:\|filtered)?".*?</port>',
    re.DOTALL,
)
_OPEN_PORT: Final = re.compile(_PORT.pattern + rb"\n?", re.DOTALL)
_START_TAG: Final = re.compile(rb"\A<host(?: [^>]*)?>")
_OS: Final = re.compile(rb"<os>.*</os>", re.DOTALL)
_HOST_SCRIPTS: Final = re.compile(rb"<hostscript>.*</hostscript>", re.DOTALL)
_TIMES: Final = re.compile(rb'<host starttime="([0-9]{1,12})" endtime="([0-9]{1,12})"')
_REASON: Final = re.compile(rb'<status state="up" reason="([^"]*)"')
_MAC: Final = re.compile(rb'<address addr="([0-9A-F:]{17})" addrtype="mac"(?: vendor="([^"]*)")?')
# Whole attributes, because a value may contain the name of another one.
_HOSTNAME: Final = re.compile(rb'<(?:hostname name|service (?:\w+="[^"]*" )*hostname)="([^"]*)"')
_NOT_OPEN: Final = re.compile(
    rb'<(?:state state="(closed|filtered)"|extraports state="(closed|filtered)" count="([0-9]+)")'
)
_OS_TYPE: Final = re.compile(rb'<service (?:\w+="[^"]*" )*ostype="([^"]*)"')
_TLS: Final = re.compile(rb'<service [^>]*tunnel="ssl"')

_LINES: Final = "\n\t"  # allowed in fields that may have several lines
_REASON_CHARS: Final = 100
_ID_CHARS: Final = 100


def read(host: Host) -> tuple[HostDetails | None, tuple[PortFound, ...]]:
    """Return the details of `host` as a whole, and its ports that are `open` or `open|filtered`.

    Summarized ports are not returned: see `host.open_filtered`. Details of silent hosts are omitted: there may be as many as
    addresses. Only those of a host that has answered have its `element`.

    Raises:
        BadXmlError: python-nmap cannot read the host.
    """
    listed: dict[tuple[str, int], bytes] = {}
    if b'state="open' in host.element:
        listed = {(match[1].decode(), int(match[2])): match[0] for match in _PORT.finditer(host.element)}
    if not (listed or host.answered or host.open_filtered):
        return None, ()
    system, scripts = _OS.search(host.element), _HOST_SCRIPTS.search(host.element)
    whole = b"".join(match[0] for match in (system, scripts) if match)
    viewed = _view(host.address, b"".join(listed.values()), whole) if listed or whole else {}
    best = _best_match(viewed)
    ports = (_port(viewed[protocol][number], protocol, number, best, raw) for (protocol, number), raw in listed.items())
    return _details(host, viewed), tuple(sorted(ports, key=lambda port: (port.protocol, port.port)))


def _details(host: Host, viewed: dict[str, Any]) -> HostDetails:
    element = host.element
    times, reason, mac = _TIMES.match(element), _REASON.search(element), _MAC.search(element)
    numbers = {b"closed": 0, b"filtered": 0}
    for listed, summed_up, count in _NOT_OPEN.findall(element):
        numbers[listed or summed_up] += int(count or 1)
    names = dict.fromkeys(_value(each)[:MAX_NAME_CHARS] for each in _HOSTNAME.findall(element))
    return HostDetails(
        reason=reason[1].decode()[:_REASON_CHARS] if reason else "",
        mac=mac[1].decode() if mac else "",
        vendor=_value(mac[2])[:MAX_LINE_CHARS] if mac and mac[2] else "",
        hostnames=tuple(name for name in names if name)[:MAX_HOSTNAMES],
        systems=_systems(viewed)[:MAX_SYSTEMS],
        scripts=_scripts(viewed),
        closed=numbers[b"closed"],
        filtered=numbers[b"filtered"],
        seconds=max(0.0, float(times[2]) - float(times[1])) if times else None,
        element=_without_open_ports(element) if host.answered else "",
    )


def _without_open_ports(element: bytes) -> str:
    """Return the content of a host's element without open ports, and if it is too long without host scripts, or empty."""
    whole = _OPEN_PORT.sub(b"", _START_TAG.sub(b"", element))
    for content in (whole, _HOST_SCRIPTS.sub(b"", whole)):
        text = printable(content.decode(), keep=_LINES)
        if len(text) <= MAX_ELEMENT_CHARS:
            return text
    return ""


def _systems(viewed: dict[str, Any]) -> tuple[SystemMatch, ...]:
    found = (
        SystemMatch(
            name=_text(match["name"])[:MAX_LINE_CHARS],
            accuracy=min(int(match["accuracy"] or 0), 100),
            line=min(int(match["line"] or 0), MAX_NUMBER),
        )
        for match in viewed.get("osmatch", ())
    )
    return tuple(sorted(found, key=lambda match: -match.accuracy))


def _scripts(viewed: dict[str, Any]) -> tuple[ScriptOutput, ...]:
    found: list[ScriptOutput] = []
    left = MAX_OUTPUT_CHARS
    for each in viewed.get("hostscript", ())[:MAX_OUTPUTS]:
        output = _text(each["output"], keep=_LINES)[:left]
        left -= len(output)
        found.append(ScriptOutput(id=_text(each["id"])[:_ID_CHARS], output=output))
    return tuple(found)


def _view(address: str, listed: bytes, whole: bytes) -> dict[str, Any]:
    """Return what python-nmap reads from these ports of a host, and from these elements about it as a whole."""
    # Bypass the constructor, which runs `nmap -V` in the worker's own environment; parsing does not need its result.
    reader = object.__new__(nmap.PortScanner)
    document = b"".join(
        (
            b'<nmaprun><host><address addr="',
            address.encode(),
            b'" addrtype="ip"/><ports>',
            listed,
            b"</ports>",
            whole,
            b"</host><runstats><finished/><hosts/></runstats></nmaprun>",
        ),
    )
    try:
        scan: dict[str, Any] = reader.analyse_nmap_xml_scan(document.decode())["scan"]
    except (nmap.PortScannerError, AttributeError, ValueError):  # the error message contains the whole document
        raise BadXmlError(f"python-nmap cannot read the host {address}") from None
    return scan[address]  # type: ignore[no-any-return] # python-nmap has no types


def _best_match(viewed: dict[str, Any]) -> str:
    matches = viewed.get("osmatch", [])
    return _text(max(matches, key=lambda match: int(match["accuracy"] or 0))["name"]) if matches else ""


def _port(viewed: dict[str, Any], protocol: str, number: int, system: str, raw: bytes) -> PortFound:
    version = " ".join(part for part in (viewed["product"], viewed["version"]) if part)
    if viewed["extrainfo"]:
        version = f"{version} ({viewed['extrainfo']})".lstrip()
    if not system and (own := _OS_TYPE.search(raw)):
        system = _value(own[1])
    # The service inside TLS, in nmap's own notation.
    service = "/".join(part for part in ("ssl", viewed["name"]) if part) if _TLS.search(raw) else viewed["name"]
    return PortFound.model_validate(
        {
            "port": number,
            "protocol": protocol,
            "status": viewed["state"],
            "service": _text(service)[:MAX_LINE_CHARS],
            "version": _text(version)[:MAX_LINE_CHARS],
            "os_info": system[:MAX_LINE_CHARS],
            "banner": _text(viewed.get("script", {}).get("banner"), keep=_LINES)[:MAX_TEXT_CHARS],
            "raw_data": printable(raw.decode(), keep=_LINES)[:MAX_TEXT_CHARS],
        },
    )


def _value(written: bytes) -> str:
    """Return the value of an attribute as plain text."""
    element = ET.fromstring(b'<a value="' + written + b'"/>')  # noqa: S314 # expat has checked these bytes
    return _text(element.get("value"))


def _text(written: str | None, *, keep: str = "") -> str:
    """Return `written` as plain text. nmap writes one character reference per UTF-8 byte; decode these bytes."""
    text = written or ""
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode()
    return printable(text, keep=keep)
