r"""Write one port as nmap does, from the element that its worker reported or from the stored fields.

The reported text came through a worker, the least trusted part of the platform. It is parsed and serialized again, and only if
it conforms to nmap's own document type; any other port is written from its fields. Every text is written in printable ASCII,
with references for other characters, so that nothing acts on a terminal; characters that XML does not allow are escapes
(`\x00`).
"""

from __future__ import annotations

import re
from typing import Final
from xml.parsers import expat

from scanfleet.contracts.messages import PortFound

MAX_DEPTH: Final = 64  # as in the worker's reader; nmap's own output is about ten levels deep

_SPECIAL: Final = re.compile(r"[^ !#-%'-;=?-~]")
_NO_CHARACTER: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_CHILDREN: Final = {
    "port": ("state", "owner", "service", "script"),
    "service": ("cpe",),
    "script": ("table", "elem"),
    "table": ("table", "elem"),
}
_ATTRIBUTES: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "port": (frozenset({"protocol", "portid"}), frozenset()),
    "state": (frozenset({"state", "reason", "reason_ttl"}), frozenset({"reason_ip"})),
    "owner": (frozenset({"name"}), frozenset()),
    "service": (
        frozenset({"name", "conf", "method"}),
        frozenset({"version", "product", "extrainfo", "tunnel", "proto", "rpcnum", "lowver", "highver"})
        | {"hostname", "ostype", "devicetype", "servicefp"},
    ),
    "cpe": (frozenset(), frozenset()),
    "script": (frozenset({"id", "output"}), frozenset()),
    "table": (frozenset(), frozenset({"key"})),
    "elem": (frozenset(), frozenset({"key"})),
}
"""The required and the optional attributes of each element."""

_VALUES: Final = {
    ("state", "reason_ttl"): re.compile(r"[0-9]{1,3}"),
    ("service", "conf"): re.compile(r"[0-9]|10"),
    ("service", "method"): re.compile(r"table|probed"),
    ("service", "tunnel"): re.compile(r"ssl"),
    ("service", "proto"): re.compile(r"rpc"),
}
_WITH_TEXT: Final = frozenset({"cpe", "script", "elem"})


class _MalformedError(Exception):
    """The element is not one that nmap writes."""


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


def port(found: PortFound) -> str:
    """Return the port's element."""
    if found.raw_data.startswith("<port "):  # so no document type, and no entity of one, can precede it
        try:
            return _Copy(found).written
        except (expat.ExpatError, _MalformedError):
            pass
    return _from_fields(found)


def _from_fields(found: PortFound) -> str:
    parts = [f'<port protocol="{found.protocol}" portid="{found.port}">']
    parts.append(f'<state{attribute("state", found.status)} reason="unknown-response" reason_ttl="0"/>')
    if found.service:
        tls = found.service.startswith("ssl/")
        parts.append(f"<service{attribute('name', found.service.removeprefix('ssl/') or 'unknown')}")
        parts.append(attribute("product", found.version) if found.version else "")
        parts.append(attribute("tunnel", "ssl") if tls else "")
        parts.append(' method="probed" conf="10"/>' if found.version else ' method="table" conf="3"/>')
    if found.banner:
        parts.append(f'<script id="banner"{attribute("output", found.banner)}/>')
    return "".join((*parts, "</port>"))


class _Copy:
    """Writes an element while it is parsed, without a tree of it."""

    def __init__(self, found: PortFound) -> None:
        self._found = found
        self._parts: list[str] = []
        self._open: list[str] = []
        self._rank = 0
        parser = expat.ParserCreate("UTF-8")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.Parse(found.raw_data.encode("utf-8", "surrogatepass"), True)
        self.written = "".join(self._parts)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._open:
            self._check_port(name, attributes)
        elif name not in _CHILDREN.get(self._open[-1], ()) or len(self._open) == MAX_DEPTH:
            raise _MalformedError
        if len(self._open) == 1:
            self._check_order(name, attributes)
        required, optional = _ATTRIBUTES[name]
        if not required <= attributes.keys() <= required | optional:
            raise _MalformedError
        for attribute_, value in attributes.items():
            allowed = _VALUES.get((name, attribute_))
            if allowed and not allowed.fullmatch(value):
                raise _MalformedError
        self._open.append(name)
        self._parts.append(f"<{name}{''.join(attribute(*each) for each in attributes.items())}>")

    def _check_port(self, name: str, attributes: dict[str, str]) -> None:
        if name != "port" or attributes != {"protocol": self._found.protocol, "portid": str(self._found.port)}:
            raise _MalformedError

    def _check_order(self, name: str, attributes: dict[str, str]) -> None:
        """Check that a child of the port follows those before it: one state, then at most one owner and service, then scripts."""
        rank = _CHILDREN["port"].index(name) + 1
        first = self._rank == 0
        if first != (name == "state") or rank < self._rank or (rank == self._rank and name != "script"):
            raise _MalformedError
        if name == "state" and attributes.get("state") != self._found.status:
            raise _MalformedError
        self._rank = rank

    def _end(self, name: str) -> None:
        if len(self._open) == 1 and self._rank == 0:
            raise _MalformedError  # a port without a state
        self._open.pop()
        self._parts.append(f"</{name}>")

    def _text(self, data: str) -> None:
        if self._open[-1] in _WITH_TEXT:
            self._parts.append(text(data))
        elif data.strip():
            raise _MalformedError
