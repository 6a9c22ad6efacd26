r"""Parse an element that nmap wrote, and write it again.

The text came through a worker, the least trusted part of the platform. It is parsed and serialized again, and only if it conforms
to nmap's own document type. Every text is written in printable ASCII, with references for other characters, so that nothing acts
on a terminal; characters that XML does not allow are escapes (`\x00`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

MAX_DEPTH: Final = 64  # as in the worker's reader; nmap's own output is about ten levels deep

_SPECIAL: Final = re.compile(r"[^ !#-%'-;=?-~]")
_NO_CHARACTER: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_CHILDREN: Final = {
    "host": (
        *("status", "address", "hostnames", "smurf", "ports", "os", "uptime", "distance"),
        *("tcpsequence", "ipidsequence", "tcptssequence", "hostscript", "trace", "times"),
    ),
    "hostnames": ("hostname",),
    "ports": ("extraports", "port"),
    "extraports": ("extrareasons",),
    "port": ("state", "owner", "service", "script"),
    "service": ("cpe",),
    "script": ("table", "elem"),
    "table": ("table", "elem"),
    "os": ("portused", "osmatch", "osfingerprint"),
    "osmatch": ("osclass",),
    "osclass": ("cpe",),
    "hostscript": ("script",),
    "trace": ("hop",),
}
_IN_PARTS: Final = ("host", "ports", "hostscript")
"""Elements whose children are read one by one, in any order."""

_IN_ORDER: Final = ("port", "os")
_ONCE: Final = ("state", "owner", "service")

_NO_ATTRIBUTES: Final = (frozenset[str](), frozenset[str]())
_ATTRIBUTES: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "status": (frozenset({"state", "reason", "reason_ttl"}), frozenset()),
    "address": (frozenset({"addr", "addrtype"}), frozenset({"vendor"})),
    "hostname": (frozenset(), frozenset({"name", "type"})),
    "smurf": (frozenset({"responses"}), frozenset()),
    "extraports": (frozenset({"state", "count"}), frozenset()),
    "extrareasons": (frozenset({"reason", "count"}), frozenset({"proto", "ports"})),
    "port": (frozenset({"protocol", "portid"}), frozenset()),
    "state": (frozenset({"state", "reason", "reason_ttl"}), frozenset({"reason_ip"})),
    "owner": (frozenset({"name"}), frozenset()),
    "service": (
        frozenset({"name", "conf", "method"}),
        frozenset({"version", "product", "extrainfo", "tunnel", "proto", "rpcnum", "lowver", "highver"})
        | {"hostname", "ostype", "devicetype", "servicefp"},
    ),
    "script": (frozenset({"id", "output"}), frozenset()),
    "table": (frozenset(), frozenset({"key"})),
    "elem": (frozenset(), frozenset({"key"})),
    "portused": (frozenset({"state", "proto", "portid"}), frozenset()),
    "osmatch": (frozenset({"name", "accuracy", "line"}), frozenset()),
    "osclass": (frozenset({"vendor", "osfamily", "accuracy"}), frozenset({"type", "osgen"})),
    "osfingerprint": (frozenset({"fingerprint"}), frozenset()),
    "uptime": (frozenset({"seconds"}), frozenset({"lastboot"})),
    "distance": (frozenset({"value"}), frozenset()),
    "tcpsequence": (frozenset({"index", "difficulty", "values"}), frozenset()),
    "ipidsequence": (frozenset({"class", "values"}), frozenset()),
    "tcptssequence": (frozenset({"class"}), frozenset({"values"})),
    "trace": (frozenset(), frozenset({"proto", "port"})),
    "hop": (frozenset({"ttl"}), frozenset({"rtt", "ipaddr", "host"})),
    "times": (frozenset({"srtt", "rttvar", "to"}), frozenset()),
}
"""The required and the optional attributes of each element; others have none."""

_NUMBER: Final = re.compile(r"[0-9]{1,10}")
_SIGNED: Final = re.compile(r"-?[0-9]{1,10}")
_PROTOCOL: Final = re.compile(r"ip|tcp|udp|sctp")
_VALUES: Final = {
    ("status", "state"): re.compile(r"up"),  # no other host is described
    ("status", "reason_ttl"): re.compile(r"[0-9]{1,3}"),
    ("address", "addrtype"): re.compile(r"ipv4|ipv6|mac"),
    ("hostname", "type"): re.compile(r"user|PTR"),
    ("smurf", "responses"): _NUMBER,
    ("extraports", "count"): _NUMBER,
    ("extrareasons", "count"): _NUMBER,
    ("extrareasons", "proto"): _PROTOCOL,
    ("port", "protocol"): re.compile(r"tcp|udp"),
    ("port", "portid"): _NUMBER,
    ("state", "reason_ttl"): re.compile(r"[0-9]{1,3}"),
    ("service", "conf"): re.compile(r"[0-9]|10"),
    ("service", "method"): re.compile(r"table|probed"),
    ("service", "tunnel"): re.compile(r"ssl"),
    ("service", "proto"): re.compile(r"rpc"),
    ("portused", "proto"): _PROTOCOL,
    ("portused", "portid"): _NUMBER,
    ("osmatch", "accuracy"): _NUMBER,
    ("osmatch", "line"): _NUMBER,
    ("osclass", "accuracy"): _NUMBER,
    ("uptime", "seconds"): _NUMBER,
    ("distance", "value"): _SIGNED,
    ("tcpsequence", "index"): _NUMBER,
    ("hop", "ttl"): _NUMBER,
    ("times", "srtt"): _SIGNED,
    ("times", "rttvar"): _SIGNED,
    ("times", "to"): _SIGNED,
}
_WITH_TEXT: Final = frozenset({"cpe", "script", "elem"})


class MalformedError(Exception):
    """The text is not one that nmap writes."""


@dataclass(slots=True)
class Element:
    """An element that nmap wrote."""

    name: str
    attributes: dict[str, str]
    children: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Names and attributes of its own children."""

    written: str = ""


def text(value: str) -> str:
    """Return `value` as text of an element or an attribute."""
    return _SPECIAL.sub(_reference, value)


def attribute(name: str, value: object) -> str:
    """Return the attribute with a space before it."""
    return f' {name}="{text(str(value))}"'


def _reference(match: re.Match[str]) -> str:
    character = match[0]
    if _NO_CHARACTER.match(character):
        return character.encode("unicode_escape", "surrogatepass").decode()
    return f"&#{ord(character)};"


def read_port(written: str) -> Element:
    """Return a port.

    Raises:
        MalformedError: it is not one that nmap writes.
    """
    if not written.startswith("<port "):  # so no document type, and no entity of one, can precede it
        raise MalformedError
    (port,) = _Reader(written, "port").elements
    return port


def read_host(content: str) -> list[Element]:
    """Return the elements in the content of a host, those of its ports and of its scripts one by one.

    Raises:
        MalformedError: they are not what nmap writes.
    """
    return _Reader(f"<host>{content}</host>", "host").elements


class _Reader:
    """Writes elements while they are parsed, without a tree of them."""

    def __init__(self, written: str, root: str) -> None:
        self.elements: list[Element] = []
        self._root = root
        self._open: list[str] = []
        self._parts: list[str] = []
        self._begun = 0
        """Depth at which the current element began; 0 between two of them."""

        self._rank = 0
        parser = expat.ParserCreate("UTF-8")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        try:
            parser.Parse(written.encode("utf-8", "surrogatepass"), True)
        except expat.ExpatError as error:
            raise MalformedError from error

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        parent = self._open[-1] if self._open else ""
        allowed = _CHILDREN.get(parent, ()) if parent else (self._root,)
        if name not in allowed or len(self._open) == MAX_DEPTH:
            raise MalformedError
        required, optional = _ATTRIBUTES.get(name, _NO_ATTRIBUTES)
        if not required <= attributes.keys() <= required | optional:
            raise MalformedError
        for attribute_, value in attributes.items():
            values = _VALUES.get((name, attribute_))
            if values and not values.fullmatch(value):
                raise MalformedError
        self._open.append(name)
        depth = len(self._open)
        if self._begun:
            if depth == self._begun + 1:
                self._check_order(name)
                self.elements[-1].children.append((name, attributes))
        elif name in _IN_PARTS:
            return
        else:
            self._begun, self._rank = depth, 0
            self.elements.append(Element(name, attributes))
        self._parts.append(f"<{name}{''.join(attribute(*each) for each in attributes.items())}>")

    def _check_order(self, name: str) -> None:
        """Check the place of a child: a port has one state, then at most one owner and service, then scripts."""
        parent = self._open[-2]
        if parent in _IN_ORDER:
            rank = _CHILDREN[parent].index(name) + 1
            first = parent == "port" and self._rank == 0
            if (first and name != "state") or rank < self._rank or (rank == self._rank and name in _ONCE):
                raise MalformedError
            self._rank = rank

    def _end(self, name: str) -> None:
        if self._begun:
            self._parts.append(f"</{name}>")
            if len(self._open) == self._begun:
                if name == "port" and self._rank == 0:
                    raise MalformedError  # without a state
                self.elements[-1].written = "".join(self._parts)
                self._parts, self._begun = [], 0
        self._open.pop()

    def _text(self, data: str) -> None:
        if self._open[-1] in _WITH_TEXT:
            self._parts.append(text(data))
        elif data.strip():
            raise MalformedError
