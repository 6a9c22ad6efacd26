"""Write what the chunks of a job report about one host as nmap does: from nmap's own elements, or from the stored fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from result_store.api.elements import Element, MalformedError, attribute, read_host
from result_store.domain.results import Host
from scanfleet.contracts.messages import HostDetails, HostScanned
from scanfleet.contracts.messages.results import MAX_OUTPUTS
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.ports import Range, parse_ranges, port_count, ranges_text

UNKNOWN: Final = "unknown-response"  # nmap's name for an unknown reason

_BEFORE_PORTS: Final = ("status", "address", "mac", "hostnames", "smurf")
_SUMMED_UP: Final = ("closed", "filtered", "open|filtered")
_BEHIND_PORTS: Final = (
    *("os", "uptime", "distance", "tcpsequence", "ipidsequence", "tcptssequence"),
    *("hostscript", "trace", "times"),
)
_MAX_SCRIPT_CHARS: Final = 1 << 20  # of a host, with the references that replace other characters
_MAX_REASONS: Final = 16  # per state; nmap has about as many
_ONES: Final = re.compile("1+")


def contents(host: HostScanned) -> list[Element]:
    """Return nmap's elements of a host; none if they are unknown, or not what nmap writes about this address."""
    if host.details is None or not host.details.element:
        return []
    try:
        elements = read_host(host.details.element)
        for each in elements:
            _check(each, host.address)
    except (MalformedError, ValueError):
        return []
    return elements


def _check(element: Element, of: str) -> None:
    """Check that an address is that of the host, and that ports are numbers.

    Raises:
        MalformedError: it is another address.
        ValueError: there is no address or port of this text.
    """
    if element.name == "extraports":
        for _, reason in element.children:
            parse_ranges(reason.get("ports", ""))
    of_network = element.name == "address" and element.attributes["addrtype"] != "mac"
    if of_network and str(ip_address(element.attributes["addr"])) != of:
        raise MalformedError


class Ports:
    """Ports by number. Its size does not depend on how often ports are added."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, ranges: Iterable[Range]) -> None:
        for first, last in ranges:
            self._bits |= ((1 << (last - first + 1)) - 1) << first

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __str__(self) -> str:
        bits = f"{self._bits:b}"[::-1]
        return ranges_text(tuple((each.start(), each.end() - 1) for each in _ONES.finditer(bits)))


@dataclass(slots=True)
class _Sum:
    """The ports in one state that nmap does not list one by one."""

    count: int = 0
    reasons: dict[tuple[str, str], Ports] = field(default_factory=dict)
    """By reason and protocol, as far as they are known."""

    def add(self, element: Element) -> None:
        self.count += int(element.attributes["count"])
        for _, each in element.children:
            reason = each["reason"], each.get("proto", "")
            if reason in self.reasons or len(self.reasons) < _MAX_REASONS:
                self.reasons.setdefault(reason, Ports()).add(parse_ranges(each.get("ports", "")))

    def written(self, state: str) -> str:
        reasons = "".join(
            f'<extrareasons{attribute("reason", reason)} count="{len(ports)}" proto="{protocol}" ports="{ports}"/>\n'
            for (reason, protocol), ports in self.reasons.items()
            if protocol and len(ports)
        )
        return extra_ports(state, self.count, reasons) if self.count else ""


class Reported:
    """The host at one address, merged from its chunks. Its size is bounded, however many chunks and ports there are.

    Attributes:
        address: its address.
        timed_out: whether it timed out in a chunk, whatever its outcome in others.
        seconds: how long nmap scanned it; None if that is unknown.
        updated_at: time of the last report about it.
    """

    def __init__(self, first: Host) -> None:
        self.address = first.scanned.address
        self.timed_out = False
        self.seconds: float | None = None
        self.updated_at: datetime = first.place.created_at
        self._first: dict[str, str] = {}
        self._sums: dict[str, _Sum] = {state: _Sum() for state in _SUMMED_UP}
        self._scripts: dict[str, None] = {}
        self._script_chars = 0

    def add(self, host: Host) -> None:
        """Add the report of one chunk about this address."""
        scanned = host.scanned
        self.updated_at = max(self.updated_at, host.place.created_at)
        self.timed_out = self.timed_out or scanned.outcome == Outcome.TIMED_OUT.value
        if scanned.details and scanned.details.seconds is not None:
            self.seconds = scanned.details.seconds + (self.seconds or 0.0)
        for each in _elements(scanned):
            self._add(each)

    def add_filtered(self, count: int) -> None:
        """Add the ports of chunks in which it was silent."""
        self._sums["filtered"].count += count

    def _add(self, element: Element) -> None:
        name = element.name
        if name == "extraports":
            if found := self._sums.get(element.attributes["state"]):
                found.add(element)
        elif name == "script":
            self._add_script(element.written)
        elif name == "os" and "<osmatch" not in self._first.get("os", ""):
            self._first["os"] = element.written
        elif name == "address":
            if element.attributes["addrtype"] == "mac":
                self._first.setdefault("mac", element.written)
        elif name != "port":
            self._first.setdefault(name, element.written)

    def _add_script(self, written: str) -> None:
        chars = self._script_chars + len(written)
        if written not in self._scripts and len(self._scripts) < MAX_OUTPUTS and chars <= _MAX_SCRIPT_CHARS:
            self._scripts[written] = None
            self._script_chars = chars

    @property
    def before_ports(self) -> str:
        """Its elements up to the first port that nmap lists."""
        first = {
            "status": status("up", UNKNOWN),
            "hostnames": NO_NAMES,
            **self._first,
            "address": address(ip_address(self.address)),
        }
        sums = (found.written(state) for state, found in self._sums.items())
        return "".join((*(first.get(name, "") for name in _BEFORE_PORTS), "<ports>", *sums))

    @property
    def behind_ports(self) -> str:
        """Its elements after the last port."""
        scripts = f"<hostscript>{''.join(self._scripts)}</hostscript>\n" if self._scripts else ""
        first = {**self._first, "hostscript": scripts}
        return "".join(("</ports>\n", *(first.get(name, "") for name in _BEHIND_PORTS)))


def _elements(host: HostScanned) -> Iterator[Element]:
    """Yield nmap's elements of a host, and from its fields what they lack."""
    found = contents(host)
    yield from (each for each in found if each.attributes.get("state") != "open|filtered")
    if host.open_filtered:  # those of a host that has not answered too
        count = str(port_count(parse_ranges(host.open_filtered)))
        silent = {"reason": "no-response", "count": count, "proto": "udp", "ports": host.open_filtered}
        yield Element("extraports", {"state": "open|filtered", "count": count}, [("extrareasons", silent)])
    if host.details:
        yield from _from_fields(host.details, {each.name for each in found})


def _from_fields(details: HostDetails, known: AbstractSet[str]) -> Iterator[Element]:
    if not known:
        for state, count in (("closed", details.closed), ("filtered", details.filtered)):
            yield Element("extraports", {"state": state, "count": str(count)})
        if details.reason:
            yield Element("status", {}, written=status("up", details.reason))
        if details.mac:
            vendor = attribute("vendor", details.vendor) if details.vendor else ""
            mac = f'<address addr="{details.mac}" addrtype="mac"{vendor}/>\n'
            yield Element("address", {"addrtype": "mac"}, written=mac)
    if "os" not in known and details.systems:
        matches = (
            f'<osmatch{attribute("name", each.name)} accuracy="{each.accuracy}" line="{each.line}"/>\n'
            for each in details.systems
        )
        yield Element("os", {}, written=f"<os>{''.join(matches)}</os>\n")
    if "script" not in known:
        for script in details.scripts:
            written = f"<script{attribute('id', script.id)}{attribute('output', script.output)}/>"
            yield Element("script", {}, written=written)


NO_NAMES: Final = "<hostnames>\n</hostnames>\n"


def status(state: str, reason: str) -> str:
    return f'<status state="{state}"{attribute("reason", reason)} reason_ttl="0"/>\n'


def address(of: IPv4Address | IPv6Address) -> str:
    return f'<address addr="{of}" addrtype="ipv{of.version}"/>\n'


def extra_ports(state: str, count: int, reasons: str = "") -> str:
    return f'<extraports state="{state}" count="{count}">\n{reasons}</extraports>\n'
