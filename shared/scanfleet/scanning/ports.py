"""The ports of a policy: nmap's port syntax, or the N most common TCP ports.

The text is parsed into numbers and formatted from them, so user input never reaches a command line.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

MAX_PORT = 65_535
MAX_TEXT = 10_000  # characters: longer than any realistic list, and short enough to reject cheaply
MAX_RANGES_TEXT = 200_000  # characters: room for every other port
MAX_TOP = 8_192  # nmap has frequencies for about this many

_TOP = re.compile(r"top:(?:([1-9][0-9]{0,4})-)?([1-9][0-9]{0,4})")
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_ITEM = re.compile(r"(?:([TUtu]):)?(?:([0-9]{1,5})|([0-9]{0,5})-([0-9]{0,5}))")

Range = tuple[int, int]


@dataclass(frozen=True)
class PortSet:
    """Distinct ports as sorted, disjoint, inclusive ranges; `top` counts the most common TCP ports instead."""

    tcp: tuple[Range, ...] = ()
    udp: tuple[Range, ...] = ()
    top: int = 0
    above: int = 0
    """For a `top` set, the number of most common ports that it skips."""

    @classmethod
    @lru_cache(maxsize=64)  # a long list takes milliseconds, and the chunks of a job share a few
    def parse(cls, text: str) -> PortSet:
        """Parse `"22,80,8000-8100"`, `"T:80,U:53"`, `"-"` (1 to 65535), `"top:100"` or its part `"top:51-100"`.

        As in nmap, a `T:` or `U:` applies until the next one. Ports before the first are TCP. With UDP ports in the
        same text nmap would treat them as both, which is rarely intended, so that is rejected. Spaces around an item
        and one trailing comma are ignored, and `t:` is `T:`.

        Raises:
            ValueError: the syntax is wrong, or a number is not a port.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"ports must be at most {MAX_TEXT} characters")
        text = text.strip(" ").removesuffix(",")
        if match := _TOP.fullmatch(text):
            from_rank, to_rank = int(match[1] or 1), int(match[2])
            if not from_rank <= to_rank <= MAX_TOP:
                raise ValueError(f"top:N takes at most {MAX_TOP} ports")
            return cls(top=to_rank, above=from_rank - 1)
        found: dict[str, list[Range]] = {"T": [], "U": []}
        protocol = "T"
        for item in text.split(","):
            match = _ITEM.fullmatch(item.strip(" "))
            if match is None:
                raise ValueError(
                    'ports must look like "22,80,8000-8100", "T:80,U:53" or "top:100": numbers and ranges of numbers, '
                    "not names of services and nothing in brackets"
                )
            protocol = (match[1] or protocol).upper()
            first, last = (match[2], match[2]) if match[2] else (match[3] or "1", match[4] or str(MAX_PORT))
            low, high = int(first), int(last)
            if not 0 <= low <= high <= MAX_PORT:
                raise ValueError(f"{item} is not a port or a range of ports from 0 to {MAX_PORT}")
            found[protocol].append((low, high))
        if found["U"] and text[0] not in "TUtu":
            raise ValueError('with UDP ports, TCP ports need "T:" before them, as in "T:80,U:53"')
        ports = cls(tcp=disjoint(found["T"]), udp=disjoint(found["U"]))
        if len(str(ports)) > MAX_TEXT:  # open ranges are longer when written out; the result must be parseable
            raise ValueError(f"ports must be at most {MAX_TEXT} characters")
        return ports

    @property
    def count(self) -> int:
        """The number of probes per address."""
        return self.tcp_count + self.udp_count

    @cached_property
    def tcp_count(self) -> int:
        return self.top - self.above if self.top else port_count(self.tcp)

    @cached_property
    def udp_count(self) -> int:
        return port_count(self.udp)

    def blocks(self, size: int) -> Iterator[PortSet]:
        """Split into sets of at most `size` ports of one protocol; a `top` set is split by frequency."""
        for above in range(self.above, self.top, size):
            yield PortSet(top=min(self.top, above + size), above=above)
        for part in _parts(self.tcp, size):
            yield PortSet(tcp=part)
        for part in _parts(self.udp, size):
            yield PortSet(udp=part)

    def block(self, number: int, size: int) -> PortSet:
        """Return one of the `blocks`, by its number from 0."""
        if self.top:
            above = self.above + number * size
            return PortSet(top=min(self.top, above + size), above=above)
        of_tcp = -(-self.tcp_count // size)
        if number < of_tcp:
            return PortSet(tcp=_part(self.tcp, number * size, size))
        return PortSet(udp=_part(self.udp, (number - of_tcp) * size, size))

    def meets(self, other: PortSet) -> bool:
        """Return whether a port is in both sets. A `top` set may contain any TCP port, since its numbers are unknown here."""
        if self.top and other.top:
            return self.above < other.top and other.above < self.top
        if (self.top and other.tcp_count) or (other.top and self.tcp_count):
            return True
        return overlap(self.tcp, other.tcp) or overlap(self.udp, other.udp)

    def without(self, others: PortSet) -> PortSet:
        """Return the TCP ports of this set that are not in the other one."""
        taken = {port for low, high in others.tcp for port in range(low, high + 1)}
        left = (port for low, high in self.tcp for port in range(low, high + 1) if port not in taken)
        return PortSet(tcp=disjoint([(port, port) for port in left]))

    def __str__(self) -> str:
        """Return the canonical text; `PortSet.parse(str(ports)) == ports`."""
        if self.top:
            return f"top:{self.above + 1}-{self.top}" if self.above else f"top:{self.top}"
        parts = [_text(self.tcp, "T:" if self.udp else "")] if self.tcp else []
        if self.udp:
            parts.append(_text(self.udp, "U:"))
        return ",".join(parts)


@lru_cache(maxsize=8)  # the hosts of a chunk often have the same; the longest text takes 4 MB as ranges
def parse_ranges(text: str) -> tuple[Range, ...]:
    """Parse "1-52,54" into sorted, disjoint, inclusive ranges; an empty text has none.

    Raises:
        ValueError: the syntax is wrong, the text is too long, or a number is not a port.
    """
    if len(text) > MAX_RANGES_TEXT:
        raise ValueError(f"ranges of ports must be at most {MAX_RANGES_TEXT} characters")
    ranges: list[Range] = []
    for item in text.split(",") if text else ():
        match = _RANGE.fullmatch(item)
        if match is None or not int(match[1]) <= int(match[2] or match[1]) <= MAX_PORT:
            raise ValueError(f"{item[:20]!r} is not a port or a range of ports from 0 to {MAX_PORT}")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return disjoint(ranges)


def port_count(ranges: Iterable[Range]) -> int:
    """Return the number of ports in the ranges."""
    return sum(high - low + 1 for low, high in ranges)


def overlap(some: tuple[Range, ...], others: tuple[Range, ...]) -> bool:
    """Return whether a port is in both tuples of sorted, disjoint ranges."""
    if len(some) > len(others):
        some, others = others, some
    for low, high in some:
        begun = bisect_right(others, (high, MAX_PORT))  # of the others that begin by `high`, the last reaches furthest
        if begun and others[begun - 1][1] >= low:
            return True
    return False


def ranges_text(ranges: tuple[Range, ...]) -> str:
    """Return the canonical text; `parse_ranges(ranges_text(ranges)) == ranges` for sorted, disjoint ranges."""
    return _text(ranges, "")


def disjoint(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same ports as sorted ranges that neither overlap nor adjoin."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _parts(ranges: tuple[Range, ...], size: int) -> Iterator[tuple[Range, ...]]:
    """Yield the ports in parts of `size`, the last one smaller, in one pass over the ranges."""
    part: list[Range] = []
    room = size
    for low, high in ranges:
        first = low
        while first <= high:
            last = min(high, first + room - 1)
            part.append((first, last))
            room -= last - first + 1
            first = last + 1
            if room == 0:
                yield tuple(part)
                part, room = [], size
    if part:
        yield tuple(part)


def _part(ranges: tuple[Range, ...], skip: int, size: int) -> tuple[Range, ...]:
    """Return up to `size` ports after the first `skip`."""
    part: list[Range] = []
    for low, high in ranges:
        first = low + skip
        skip = max(0, skip - (high - low + 1))
        if first > high:
            continue
        last = min(high, first + size - 1)
        part.append((first, last))
        size -= last - first + 1
        if size == 0:
            break
    return tuple(part)


def _text(ranges: tuple[Range, ...], prefix: str) -> str:
    return prefix + ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
