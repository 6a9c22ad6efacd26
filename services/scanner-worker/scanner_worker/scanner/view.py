"""Convert the open ports of a finished host, read by python-nmap, to the public result format."""

from __future__ import annotations

import contextlib
import re
from html import unescape
from typing import Any, Final

import nmap

from scanfleet.messages import PortFound
from scanfleet.messages.results import MAX_LINE_CHARS, MAX_TEXT_CHARS
from scanner_worker.domain import Host, printable
from scanner_worker.scanner.xml import BadXmlError

_PORT: Final = re.compile(
    rb'<port protocol="(tcp|udp)" portid="([0-9]+)"><state state="open(?:\|filtered)?".*?</port>',
    re.DOTALL,
)
_OS: Final = re.compile(rb"<os>.*</os>", re.DOTALL)
_OS_TYPE: Final = re.compile(rb'<service [^>]*ostype="([^"]*)"')
_TLS: Final = re.compile(rb'<service [^>]*tunnel="ssl"')

_LINES: Final = "\n\t"  # allowed in fields that may have several lines


def ports(host: Host) -> tuple[PortFound, ...]:
    """Return the ports of `host` that are `open` or `open|filtered`, without summarized ones: see `host.open_filtered`.

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
    return tuple(sorted(found, key=lambda port: (port.protocol, port.port)))


def _view(host: Host, listed: bytes) -> dict[str, Any]:
    # Bypass the constructor, which runs `nmap -V` in the worker's own environment; parsing does not need its result.
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
    except (nmap.PortScannerError, AttributeError, ValueError):  # the error message contains the whole document
        raise BadXmlError(f"python-nmap cannot read the host {host.address}") from None
    return scan[host.address]  # type: ignore[no-any-return] # python-nmap has no types


def _best_match(viewed: dict[str, Any]) -> str:
    matches = viewed.get("osmatch", [])
    return _text(max(matches, key=lambda match: int(match["accuracy"] or 0))["name"]) if matches else ""


def _port(viewed: dict[str, Any], protocol: str, number: int, system: str, raw: bytes) -> PortFound:
    version = " ".join(part for part in (viewed["product"], viewed["version"]) if part)
    if viewed["extrainfo"]:
        version = f"{version} ({viewed['extrainfo']})".lstrip()
    if not system and (own := _OS_TYPE.search(raw)):
        system = _text(unescape(own[1].decode()))
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


def _text(written: str | None, *, keep: str = "") -> str:
    """Return `written` as plain text. nmap writes one character reference per UTF-8 byte; decode these bytes."""
    text = written or ""
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode()
    return printable(text, keep=keep)
