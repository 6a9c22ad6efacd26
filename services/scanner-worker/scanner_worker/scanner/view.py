"""The open ports of a finished host, as python-nmap reads them and as the public results word them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from typing import Any, Final

import nmap

from scanfleet.messages import PortFound
from scanner_worker.domain import Host, printable
from scanner_worker.scanner.xml import BadXmlError

_PORT: Final = re.compile(
    rb'<port protocol="(tcp|udp)" portid="([0-9]+)"><state state="open(?:\|filtered)?".*?</port>',
    re.DOTALL,
)
_OS: Final = re.compile(rb"<os>.*</os>", re.DOTALL)
_OS_TYPE: Final = re.compile(rb'<service [^>]*ostype="([^"]*)"')
_SUMMED_UP: Final = re.compile(rb'<extraports state="open\|filtered" [^>]*>(.*?)</extraports>', re.DOTALL)
_NUMBERS: Final = re.compile(rb'proto="(tcp|udp)" ports="([0-9,-]+)"')

_LINES: Final = "\n\t"  # plain text in what may have several lines


def ports(host: Host) -> tuple[PortFound, ...]:
    """The ports of `host` that are `open` or `open|filtered`.

    Raises:
        BadXmlError: python-nmap cannot read the host.
    """
    if b'state="open' not in host.element:
        return ()
    listed = {(match[1].decode(), int(match[2])): match[0] for match in _PORT.finditer(host.element)}
    viewed = _view(host, b"".join(listed.values())) if listed else {}
    system = _best_match(viewed)
    found = [
        _port(viewed[protocol][number], protocol, number, system, raw) for (protocol, number), raw in listed.items()
    ]
    found += [
        PortFound(port=number, protocol=protocol, status="open|filtered", os_info=system)
        for protocol, number in _summed_up(host.element)
    ]
    return tuple(sorted(found, key=lambda port: (port.protocol, port.port)))


def _view(host: Host, listed: bytes) -> dict[str, Any]:
    # The constructor runs `nmap -V` in the worker's own environment; reading needs nothing of what it finds out.
    reader = object.__new__(nmap.PortScanner)
    system = _OS.search(host.element)
    document = b"".join(
        (
            b'<nmaprun><host><address addr="',
            host.address.encode(),
            b'" addrtype="ip"/><ports>',
            listed,
            b"</ports>",
            system[0] if system else b"",
            b"</host><runstats><finished/><hosts/></runstats></nmaprun>",
        ),
    )
    try:
        scan: dict[str, Any] = reader.analyse_nmap_xml_scan(document.decode())["scan"]
    except (nmap.PortScannerError, AttributeError, ValueError):  # its error quotes the whole document
        raise BadXmlError(f"python-nmap cannot read the host {host.address}") from None
    return scan[host.address]  # type: ignore[no-any-return] # a dict of its own making


def _best_match(viewed: dict[str, Any]) -> str:
    matches = viewed.get("osmatch", [])
    return printable(max(matches, key=lambda match: int(match["accuracy"] or 0))["name"] or "") if matches else ""


def _port(viewed: dict[str, Any], protocol: str, number: int, system: str, raw: bytes) -> PortFound:
    version = " ".join(part for part in (viewed["product"], viewed["version"]) if part)
    if viewed["extrainfo"]:
        version = f"{version} ({viewed['extrainfo']})".lstrip()
    if not system and (own := _OS_TYPE.search(raw)):
        system = printable(unescape(own[1].decode()))
    return PortFound.model_validate(
        {
            "port": number,
            "protocol": protocol,
            "status": viewed["state"],
            "service": printable(viewed["name"] or ""),
            "version": printable(version),
            "os_info": system,
            "banner": printable(viewed.get("script", {}).get("banner") or "", keep=_LINES),
            "raw_data": printable(raw.decode(), keep=_LINES),
        },
    )


def _summed_up(element: bytes) -> Iterator[tuple[Any, int]]:
    # Of more than 25 ports in one state nmap writes only the numbers; python-nmap does not read those.
    for group in _SUMMED_UP.finditer(element):
        for match in _NUMBERS.finditer(group[1]):
            for part in match[2].decode().split(","):
                first, _, last = part.partition("-")
                for number in range(int(first), int(last or first) + 1):
                    yield match[1].decode(), number
