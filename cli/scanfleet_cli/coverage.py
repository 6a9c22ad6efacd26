"""Summaries of a ledger: how much is accounted for, what was not probed, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from typing import Final

from scanfleet.contracts import rest
from scanfleet_cli.output import count

Network = IPv4Network | IPv6Network
PaintWord = Callable[[str, str], str]

NOT_PROBED: Final = ("refused", "cancelled", "lost")
"""Outcomes of requested addresses that were not fully probed."""

ENTRIES: Final = 10_000  # maximum number of entries of which a summary gives the reasons
_NETWORKS: Final = 5  # networks that a summary lists


def addresses(ledger: rest.Ledger, probes: int) -> int:
    """Convert probes to addresses; one whose port blocks differ counts by its share."""
    return round(probes / ledger.request.ports) if ledger.request.ports else 0


def looked_at(ledger: rest.Ledger) -> int:
    return ledger.request.addresses - addresses(ledger, ledger.counts.waiting)


def outcomes(ledger: rest.Ledger, paint: PaintWord | None = None) -> str:
    """Format the addresses of each outcome that occurs: `answered 14 · silent 131 · waiting 97`."""
    shown = []
    for name, probes in ledger.counts.model_dump().items():
        if probes:
            text = f"{name.replace('_', ' ')} {addresses(ledger, probes):,}"
            shown.append(paint(name, text) if paint else text)
    return " · ".join(shown)


def short(ledger: rest.Ledger) -> str:
    """Format the same for a log: `answered=14 silent=131`."""
    counts = ledger.counts.model_dump()
    return " ".join(f"{name}={addresses(ledger, probes)}" for name, probes in counts.items() if probes)


def missing(ledger: rest.Ledger) -> int:
    """Count the addresses that were not fully probed."""
    counts = ledger.counts.model_dump()
    return addresses(ledger, sum(counts[name] for name in NOT_PROBED)) or int(any(counts[name] for name in NOT_PROBED))


def proof(ledger: rest.Ledger) -> str:
    """Summarise an ended job: all probes are accounted for, or how many addresses were not probed."""
    request = ledger.request
    if ledger.accounted:
        return (
            f"all {count(request.probes, 'probe')} of {count(request.addresses, 'address', 'addresses')} accounted for"
        )
    lost = missing(ledger)
    were = "was" if lost == 1 else "were"
    return f"{lost:,} of {count(request.addresses, 'address', 'addresses')} {were} NOT probed"


class NotProbed:
    """The addresses that a ledger lists as not fully probed, read page by page, with their reasons.

    Attributes:
        after: position after which the next page begins; None once enough is known.
    """

    def __init__(self) -> None:
        self.after: int | None = 0
        self._by_reason: dict[str, set[str]] = {}
        self._found = self._read = self._total = 0

    def add(self, ledger: rest.Ledger) -> None:
        """Add the next page; excluded addresses, and those that are down or timed out, are passed over."""
        page = ledger.not_probed
        found = [entry for entry in page.addresses if entry.outcome in NOT_PROBED]
        for entry in found:
            self._by_reason.setdefault(entry.reason or entry.outcome, set()).add(entry.address)
        self._found += len(found)
        self._read += len(page.addresses)
        self._total = page.total
        self.after = None if ledger.accounted or self._found >= ENTRIES else page.next

    @property
    def reasons(self) -> list[str]:
        """List the reasons why addresses were not probed, each with its networks; "and others" if not all entries were read."""
        listed = [f"{reason} ({networks(found)})" for reason, found in self._by_reason.items()]
        return [*listed, "and others"] if listed and self._read < self._total else listed


def collapse(found: Iterable[str]) -> list[str]:
    """Collapse addresses to the fewest networks; a single address has no prefix length."""
    parsed = [ip_address(each) for each in found]
    collapsed = merged(ip_network(each) for each in parsed)
    return [str(each.network_address) if each.num_addresses == 1 else str(each) for each in collapsed]


def merged(found: Iterable[Network]) -> list[Network]:
    """Merge networks to the fewest with the same addresses, IPv4 first."""
    every = list(found)
    return [
        *collapse_addresses(each for each in every if isinstance(each, IPv4Network)),
        *collapse_addresses(each for each in every if isinstance(each, IPv6Network)),
    ]


def networks(found: Iterable[str]) -> str:
    every = collapse(found)
    more = f" and {len(every) - _NETWORKS} more" if len(every) > _NETWORKS else ""
    return ", ".join(every[:_NETWORKS]) + more
