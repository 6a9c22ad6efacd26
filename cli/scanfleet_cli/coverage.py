"""What a ledger says, in sentences: how much was accounted for, what was not probed, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from typing import Final

from scanfleet import rest
from scanfleet_cli.output import count

Network = IPv4Network | IPv6Network
PaintWord = Callable[[str, str], str]

NOT_PROBED: Final = ("refused", "cancelled", "lost")
"""Outcomes of addresses that were asked for and not probed to their end, for no reason of their own."""

ENTRIES: Final = 10_000  # of the ledger that a sentence looks at: enough for a /19
_NETWORKS: Final = 5  # that a sentence names


def addresses(ledger: rest.Ledger, probes: int) -> int:
    """Probes as addresses; of one whose port blocks differ, its share."""
    return round(probes / ledger.request.ports) if ledger.request.ports else 0


def looked_at(ledger: rest.Ledger) -> int:
    return ledger.request.addresses - addresses(ledger, ledger.counts.waiting)


def outcomes(ledger: rest.Ledger, paint: PaintWord | None = None) -> str:
    """`answered 14 · silent 131 · waiting 97`: addresses by outcome, those that occur."""
    shown = []
    for name, probes in ledger.counts.model_dump().items():
        if probes:
            text = f"{name.replace('_', ' ')} {addresses(ledger, probes):,}"
            shown.append(paint(name, text) if paint else text)
    return " · ".join(shown)


def short(ledger: rest.Ledger) -> str:
    """`answered=14 silent=131`: the same for a log."""
    counts = ledger.counts.model_dump()
    return " ".join(f"{name}={addresses(ledger, probes)}" for name, probes in counts.items() if probes)


def missing(ledger: rest.Ledger) -> int:
    """Addresses that were not probed to their end."""
    counts = ledger.counts.model_dump()
    return addresses(ledger, sum(counts[name] for name in NOT_PROBED)) or int(any(counts[name] for name in NOT_PROBED))


def proof(ledger: rest.Ledger) -> str:
    """The sentence about a job that ended: what is accounted for, or what was not probed."""
    request = ledger.request
    if ledger.accounted:
        return (
            f"all {count(request.probes, 'probe')} of {count(request.addresses, 'address', 'addresses')} accounted for"
        )
    lost = missing(ledger)
    were = "was" if lost == 1 else "were"
    return f"{lost:,} of {count(request.addresses, 'address', 'addresses')} {were} NOT probed"


def reasons(entries: Iterable[rest.LedgerEntry], wanted: Iterable[str] = NOT_PROBED) -> list[str]:
    """Why addresses were not probed, one sentence for each reason, with their networks."""
    by_reason: dict[str, set[str]] = {}
    outcomes_wanted = set(wanted)
    for entry in entries:
        if entry.outcome in outcomes_wanted:
            by_reason.setdefault(entry.reason or entry.outcome, set()).add(entry.address)
    return [f"{reason} ({networks(found)})" for reason, found in by_reason.items()]


def collapse(found: Iterable[str]) -> list[str]:
    """The fewest networks that hold exactly these addresses; a single address without its length."""
    parsed = [ip_address(each) for each in found]
    collapsed = merged(ip_network(each) for each in parsed)
    return [str(each.network_address) if each.num_addresses == 1 else str(each) for each in collapsed]


def merged(found: Iterable[Network]) -> list[Network]:
    """The fewest networks that hold the same addresses, IPv4 first."""
    every = list(found)
    return [
        *collapse_addresses(each for each in every if isinstance(each, IPv4Network)),
        *collapse_addresses(each for each in every if isinstance(each, IPv6Network)),
    ]


def networks(found: Iterable[str]) -> str:
    every = collapse(found)
    more = f" and {len(every) - _NETWORKS} more" if len(every) > _NETWORKS else ""
    return ", ".join(every[:_NETWORKS]) + more


def further_pages(first: rest.Ledger, limit: int | None = ENTRIES) -> range:
    """The numbers of the pages after the first one that name more addresses.

    Args:
        first: the first page.
        limit: addresses to read at most; None for all.
    """
    page = first.not_probed
    wanted = page.total if limit is None else min(page.total, limit)
    return range(2, -(-wanted // page.page_size) + 1)
