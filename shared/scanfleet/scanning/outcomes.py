"""The outcome map of a chunk: one outcome code (a letter) per address, in address order.

A map is a string, so that it reads the same in a message, in MongoDB and in a terminal. A code never changes once set,
so merging maps is idempotent and commutative for messages that are lost, duplicated or reordered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, summarize_address_range
from typing import Annotated, Final

from pydantic import StringConstraints

MAX_ADDRESSES = 1024  # per chunk; keeps the map a small part of a message and limits the work that a retry repeats


class Outcome(StrEnum):
    """The outcome of one address."""

    BLANK = "."
    ANSWERED = "a"
    SILENT = "s"
    DOWN = "d"
    TIMED_OUT = "t"
    EXCLUDED = "x"
    REFUSED = "r"
    LOST = "l"
    """Attempts on this address alone failed as often as allowed."""


CANCELLED: Final = "c"
IN_WORK: Final = ">"
"""In coverage maps, in addition to the codes of outcome maps: two kinds of blanks."""

WORST_FIRST: Final = "lrct>.asdx"

OutcomeMap = Annotated[str, StringConstraints(pattern=r"^[.asdtxrl]+$", max_length=MAX_ADDRESSES)]


def merge(known: str, news: str) -> str:
    """Return `known` with its blanks filled from `news`; codes that are already set stay.

    Raises:
        ValueError: the maps are of different chunks (their lengths differ).
    """
    if len(known) != len(news):
        raise ValueError(f"maps of {len(known)} and {len(news)} addresses are not of the same chunk")
    if known == news or Outcome.BLANK not in known:
        return known
    return "".join(old if old != Outcome.BLANK else new for old, new in zip(known, news, strict=True))


def counts(outcomes: str) -> Counter[Outcome]:
    """Return the number of addresses by outcome."""
    return Counter({Outcome(letter): n for letter, n in Counter(outcomes).items()})


def address_at(first: str, index: int) -> IPv4Address | IPv6Address:
    """Return the address at position `index` of a map that starts at `first`."""
    return ip_address(first) + index


def address_key(address: str) -> str:
    """Return a text of fixed width per family; the order of these texts is the order of addresses, IPv4 first."""
    parsed = ip_address(address)
    return f"{parsed.version}{parsed.packed.hex()}"


def index_of(first: str, address: str) -> int:
    """Return the position of `address` in a map that starts at `first`; it may be outside the map.

    Raises:
        ValueError: `address` is invalid or of the other address family.
    """
    base, other = ip_address(first), ip_address(address)
    if base.version != other.version:
        raise ValueError(f"{address} is not of the family of {first}")
    return int(other) - int(base)


def worst(letters: str) -> str:
    """Return the letter of several addresses, or of one address in several blocks of ports, in a coverage map."""
    return next((each for each in WORST_FIRST if each in letters), letters[:1])


def networks(first: str, outcomes: str) -> Iterator[IPv4Network | IPv6Network]:
    """Yield the blank addresses as the fewest canonical networks, in order."""
    base = ip_address(first)
    index = outcomes.find(Outcome.BLANK)
    while index >= 0:
        end = index
        while end < len(outcomes) and outcomes[end] == Outcome.BLANK:
            end += 1
        yield from summarize_address_range(base + index, base + (end - 1))
        index = outcomes.find(Outcome.BLANK, end)
