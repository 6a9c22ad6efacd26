"""Parse nmap's XML incrementally.

nmap writes the document, but its content depends on the scanned hosts, so it is untrusted input. expat checks every byte,
without callbacks for elements, which would be slow. Hosts are then cut out of the same bytes by their tags. This is
exact because in well-formed XML without comments, CDATA sections and processing instructions every `<` begins a tag.

The parser keeps one unfinished host and one unfinished token in memory, both bounded.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from ipaddress import ip_address
from typing import Final, NoReturn
from xml.parsers import expat

from scanfleet.scanning.ports import parse_ranges, port_count, ranges_text
from scanner_worker.domain.scan import FROM_HOST, Host

# Maximum size of one tag with its attributes; the longest real ones contain a script's output, some kilobytes. Two pieces
# below a power of two: expat keeps an unfinished token in a buffer that doubles, and must not double it for a rejected token.
MAX_TOKEN: Final = (1 << 20) - (1 << 17)
MAX_DEPTH: Final = 64  # nmap's own documents are about ten levels deep
MAX_SKIPPED: Final = 3  # targets that nmap skipped and that the error message lists

_HOST_START: Final = re.compile(rb"<host[ >]")
_HOST_END: Final = b"</host>"
_HOST: Final = re.compile(
    rb'<host(| [^>]*)>\s*<status state="(\w+)" reason="([^"]*)"[^>]*>\s*<address addr="([^"]*)" addrtype="ipv[46]"',
)
_PORT: Final = re.compile(
    rb'<port protocol="(\w+)" portid="\d+"><state state="[^"]*" reason="([^"]*)"[^>]*?(?: reason_ip="([^"]*)")?/>',
)
_SUMMED_UP: Final = re.compile(rb'<extraports state="([^"]*)" count="(\d+)"')
_SILENT: Final = re.compile(rb'<extraports state="open\|filtered" [^>]*>(.*?)</extraports>', re.DOTALL)
_SUMMED_UP_REASON: Final = re.compile(rb'<extrareasons reason="([^"]*)"')
_NUMBERS: Final = re.compile(rb'proto="udp" ports="([0-9,-]+)"')
_SCAN_INFO: Final = re.compile(rb'<scaninfo type="\w+" protocol="(\w+)" numservices="(\d+)"')
_FINISHED: Final = re.compile(rb'<finished [^>]*exit="(\w+)"')
_SKIPPED: Final = re.compile(rb'<target specification="([^"]*)" status="skipped"')
_TASK: Final = re.compile(rb'<task(begin|progress|end) task="([^"]*)" [^>]*?(?:percent="([^"]*)"[^>]*)?/>')

_PORT_UNREACH: Final = b"port-unreach"

_CONTROLS: Final = bytes(n for n in range(0x20) if n not in b"\t\n\r")
# References that nmap writes to code points that XML 1.0 forbids: control characters, surrogates, non-characters.
_NO_CHARACTER: Final = re.compile(
    rb"&#x0*([0-8b-cBCe-fE-F]|1[0-9a-fA-F]|[dD][89a-fA-F][0-9a-fA-F]{2}|[fF]{3}[e-fE-F]);"
)
_UNFINISHED_REFERENCE: Final = re.compile(rb"&[#0-9a-zA-Z]{0,12}\Z")


class BadXmlError(Exception):
    """nmap's output is malformed; hosts that were read before are valid."""


class Reader:
    """Converts nmap's output, fed in pieces of any size, to finished hosts.

    Attributes:
        version: nmap's version as written; empty until the root element was read.
        services: number of ports by protocol, which nmap announces before the first host.
        skipped: the first few targets that nmap skipped; complete after `close`.
        task: nmap's name of its current phase ("Connect Scan", "NSE").
        moves: counter of progress: increases when a task begins or ends, its percentage changes, or a host is finished.
    """

    def __init__(self, *, max_host_bytes: int) -> None:
        self.version = ""
        self.services: dict[str, int] = {}
        self.skipped: list[str] = []
        self.task = ""
        self.moves = 0
        self._percent = b""
        self._max_host_bytes = max_host_bytes
        self._text = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = b""  # the beginning of a character reference
        self._fed = 0
        self._root_at: int | None = None
        self._refused_at: int | None = None
        self._tags = _Tags()
        self._rest = bytearray()  # the bytes after the last complete host
        self._searched = 0  # length of the prefix of `_rest` without an end of a host
        self._finished = b""
        self._parser = expat.ParserCreate("UTF-8")  # overrides the encoding that the document declares
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.EntityDeclHandler = self._refuser("an entity declaration")
        self._parser.StartElementHandler = self._root
        if hasattr(self._parser, "SetReparseDeferralEnabled"):
            # Parse every byte before hosts are cut out of it; MAX_TOKEN bounds the cost of a long token.
            self._parser.SetReparseDeferralEnabled(False)

    def feed(self, data: bytes) -> Iterator[Host]:
        """Yield the hosts that `data` completes.

        Raises:
            BadXmlError: the output is malformed; raised after the hosts that were complete before the error.
        """
        data = self._valid(data)
        before = self._fed
        self._fed += len(data)
        fault = self._check(data)
        if fault:
            # After a handler has raised, expat continues to the end of the piece.
            at = self._parser.CurrentByteIndex if self._refused_at is None else self._refused_at
            data = data[: max(at - before, 0)]
        else:
            fault = self._excess(data, before)
        self._rest += data
        for piece in self._take():
            if head := _HOST.search(piece):
                if head.start() > 1:  # more than the line break between two hosts
                    self._between(piece[: head.start()])
                self.moves += 1
                yield _host(head, piece[head.start() :])
        self._drop_between()
        if not fault and len(self._rest) > self._max_host_bytes:
            fault = f"a host of more than {self._max_host_bytes} bytes"
        if fault:
            raise BadXmlError(f"malformed nmap output: {fault}")

    def close(self) -> None:
        """End the input.

        Raises:
            BadXmlError: the document is truncated, or nmap reports that it failed.
        """
        try:
            self._parser.Parse(self._held, True)
        except expat.ExpatError as error:
            raise BadXmlError(f"nmap's output is truncated: {error}") from error
        self._between(bytes(self._rest))
        if self._finished != b"success":
            raise BadXmlError("nmap did not report that it finished successfully")

    def _valid(self, data: bytes) -> bytes:
        # expat rejects a document with invalid bytes and references; as escaped text they are harmless.
        if self._held:
            data, self._held = self._held + data, b""
        if match := _UNFINISHED_REFERENCE.search(data, max(len(data) - 16, 0)):
            data, self._held = data[: match.start()], match[0]
        if not data.isascii() or self._text.getstate()[0]:
            text = self._text.decode(data)
            data = text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff").encode()
        if len(data.translate(None, _CONTROLS)) != len(data):
            for control in _CONTROLS:
                data = data.replace(bytes((control,)), b"\\x%02x" % control)
        return _NO_CHARACTER.sub(_escape, data)

    def _check(self, data: bytes) -> str:
        try:
            self._parser.Parse(data, False)
        except (expat.ExpatError, BadXmlError) as error:
            return str(error)
        return ""

    def _excess(self, data: bytes, before: int) -> str:
        if self._fed - self._parser.CurrentByteIndex > MAX_TOKEN:
            return f"a tag or text of more than {MAX_TOKEN} bytes"
        if self._root_at is None:
            return ""
        if not self._tags.opened:
            # The root's own tag has just ended, and may have begun in an earlier piece.
            data = b"<>" + data[data.index(b">", max(self._root_at - before, 0)) + 1 :]
        self._tags.count(data)
        if self._tags.stray:
            return "a bare > in a value"
        if self._tags.depth > MAX_DEPTH:
            return f"elements nested deeper than {MAX_DEPTH}"
        return ""

    def _take(self) -> list[bytes]:
        """Cut off and return the bytes up to each end tag of a host, without the tag."""
        if self._rest.find(_HOST_END, self._searched) < 0:
            self._searched = max(len(self._rest) - len(_HOST_END), 0)
            return []
        *pieces, rest = bytes(self._rest).split(_HOST_END)
        self._rest, self._searched = bytearray(rest), 0
        return pieces

    def _drop_between(self) -> None:
        """Process and drop the bytes outside hosts, so that progress is recorded and does not accumulate until a host ends."""
        start = _HOST_START.search(self._rest)
        end = start.start() if start else self._rest.rfind(b">") + 1
        if end:
            self._between(bytes(self._rest[:end]))
            del self._rest[:end]
            self._searched = max(self._searched - end, 0)

    def _between(self, data: bytes) -> None:
        for match in _SCAN_INFO.finditer(data):
            self.services[match[1].decode()] = int(match[2])
        for match in _SKIPPED.finditer(data):
            if len(self.skipped) < MAX_SKIPPED:
                self.skipped.append(match[1].decode())
        for kind, task, percent in _TASK.findall(data):
            if kind != b"progress" or percent != self._percent:
                self.moves += 1
            self.task, self._percent = task.decode(), percent
        if finished := _FINISHED.search(data):
            self._finished = finished[1]

    def _doctype(self, name: str, system: str | None, _public: str | None, internal: int) -> None:
        if name != "nmaprun" or system or internal:
            self._refuse("a custom document type")

    def _root(self, name: str, attributes: dict[str, str]) -> None:
        if name != "nmaprun":
            self._refuse(f"<{name[:20]}> where <nmaprun> belongs")
        self.version = attributes.get("version", "")
        self._root_at = self._parser.CurrentByteIndex
        self._parser.StartElementHandler = None
        self._parser.CommentHandler = self._refuser("a comment")
        self._parser.ProcessingInstructionHandler = self._refuser("a processing instruction")
        self._parser.StartCdataSectionHandler = self._refuser("a CDATA section")

    def _refuser(self, what: str) -> Callable[..., None]:
        return lambda *_: self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        self._refused_at = self._parser.CurrentByteIndex
        raise BadXmlError(what)


class _Tags:
    """Tracks the nesting depth by counting tags with a byte search."""

    def __init__(self) -> None:
        self.opened = 0
        self._closed = self._ends = self._empty = 0
        self._last = b""

    def count(self, data: bytes) -> None:
        # `</` and `/>` may be split between two pieces.
        seam = self._last + data[:1]
        self._last = data[-1:] or self._last
        self.opened += data.count(b"<")
        self._closed += data.count(b">")
        self._ends += data.count(b"</") + (seam == b"</")
        self._empty += data.count(b"/>") + (seam == b"/>")

    @property
    def depth(self) -> int:
        return self.opened - 2 * self._ends - self._empty

    @property
    def stray(self) -> bool:
        """Whether a `>` occurs outside a tag's end: nmap writes `&gt;`, and `/>` in a value would be counted as a tag."""
        return self._closed > self.opened


def _escape(reference: re.Match[bytes]) -> bytes:
    number = int(reference[1], 16)
    return b"\\x%02x" % number if number <= 0xFF else b"\\u%04x" % number  # noqa: PLR2004 # as Python escapes them


def _host(head: re.Match[bytes], piece: bytes) -> Host:
    attributes, state, reason, written = head.groups()
    address = _canonical(written.decode())
    if state == b"down":
        return Host(address, False, False, 0, {reason}, piece)
    ports, silent = piece.count(b"<port "), ""
    for group, count in _SUMMED_UP.findall(piece):
        if group == b"open|filtered":
            # Each of these ports is a result. A port without a number cannot be one, so it is not counted.
            silent, numbers = _silent(piece)
            ports += numbers
        else:
            ports += int(count)
    reasons = {reason} if reason in FROM_HOST else _reasons(written, piece)
    return Host(address, True, b' timedout="true"' in attributes, ports, reasons, piece, silent)


def _canonical(address: str) -> str:
    # nmap and Python format an IPv4 address inside an IPv6 one differently. Other IPv4 addresses have one spelling.
    if ":" not in address:
        return address
    try:
        return str(ip_address(address))
    except ValueError:
        raise BadXmlError(f"{address[:50]!r} is not an address") from None


def _silent(piece: bytes) -> tuple[str, int]:
    """Return the UDP ports that nmap summarizes as open|filtered, in canonical form, and their number."""
    numbers = [each for group in _SILENT.findall(piece) for each in _NUMBERS.findall(group)]
    try:
        ranges = parse_ranges(b",".join(numbers).decode())
    except ValueError as error:
        raise BadXmlError(str(error)) from error
    return ranges_text(ranges), port_count(ranges)


def _reasons(address: bytes, piece: bytes) -> AbstractSet[bytes]:
    """Return the reasons for the states of ports, without those that another machine may have caused.

    A firewall on the path answers for a host with its own ICMP errors. nmap reports the sender of these errors, but not for
    summarized ports. A host sends "port unreachable" for its closed UDP ports, and many firewalls send it for every port.
    """
    reasons = set(_SUMMED_UP_REASON.findall(piece)) - {_PORT_UNREACH}
    reasons |= {
        reason
        for protocol, reason, sender in _PORT.findall(piece)
        if sender in {b"", address} and (reason != _PORT_UNREACH or protocol == b"udp")
    }
    return reasons
