"""Check documents against nmap's own document type definition."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET
from xml.parsers import expat
from xml.parsers.expat import model as kinds

PATH: Final = Path("/usr/share/nmap/nmap.dtd")

_REPEAT: Final = {
    kinds.XML_CQUANT_NONE: "",
    kinds.XML_CQUANT_OPT: "?",
    kinds.XML_CQUANT_REP: "*",
    kinds.XML_CQUANT_PLUS: "+",
}


class Dtd:
    """The elements that a definition declares, with their children and attributes."""

    def __init__(self) -> None:
        self._children: dict[str, re.Pattern[str]] = {}
        self._with_text: set[str] = set()
        self._values: dict[str, dict[str, re.Pattern[str]]] = {}
        self._required: dict[str, set[str]] = {}

        def read(context: str, *_: object) -> int:
            inner = parser.ExternalEntityParserCreate(context)
            inner.Parse(PATH.read_bytes(), True)
            return 1

        parser = expat.ParserCreate()
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_ALWAYS)
        parser.ExternalEntityRefHandler = read
        parser.ElementDeclHandler = self._element
        parser.AttlistDeclHandler = self._attribute
        parser.Parse(b'<!DOCTYPE nmaprun SYSTEM "nmap.dtd"><nmaprun/>', True)

    def faults(self, document: str) -> list[str]:
        """Return what is not valid in a document; it has no document type with declarations."""
        return [fault for element in ET.fromstring(document).iter() for fault in self._faults(element)]  # noqa: S314 # written by this service

    def _faults(self, element: ET.Element) -> Iterator[str]:
        name = element.tag
        if name not in self._children:
            yield f"{name} is not declared"
            return
        children = "".join(f"{child.tag}," for child in element)
        if not self._children[name].fullmatch(children):
            yield f"{name} has the children {children[:100]}"
        texts = [element.text, *(child.tail for child in element)]
        if name not in self._with_text and any(text and text.strip() for text in texts):
            yield f"{name} has text"
        if missing := self._required.get(name, set()) - element.attrib.keys():
            yield f"{name} lacks {missing}"
        for attribute, value in element.attrib.items():
            allowed = self._values.get(name, {}).get(attribute)
            if not allowed or not allowed.fullmatch(value):
                yield f"{name} has {attribute}={value!r}"

    def _element(self, name: str, model: tuple[Any, ...]) -> None:
        self._children[name] = re.compile(_pattern(model))
        if model[0] == kinds.XML_CTYPE_MIXED:
            self._with_text.add(name)

    def _attribute(self, element: str, name: str, kind: str, default: str | None, required: int) -> None:
        values = re.compile(".*" if kind == "CDATA" else kind, re.DOTALL)
        self._values.setdefault(element, {})[name] = values
        if required and default is None:
            self._required.setdefault(element, set()).add(name)


def _pattern(model: tuple[Any, ...]) -> str:
    """Return the regular expression of the names of children, each followed by a comma."""
    kind, repeat, name, children = model
    parts = [*([f"{name},"] if name else []), *map(_pattern, children)]
    joined = "".join(parts) if kind == kinds.XML_CTYPE_SEQ else "|".join(parts)
    return f"(?:{joined}){_REPEAT[repeat]}"
