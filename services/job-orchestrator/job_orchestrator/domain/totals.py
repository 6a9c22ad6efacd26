"""Totals of a job's chunks that have ended, stored in the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_ENOUGH: Final = 1_000  # probes from which on the measured time is better than an estimate


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the chunks with an index below `done`, each counted once: they change together with `done`.

    Attributes:
        done: number of chunks that have ended.
        probes: number of probes by outcome.
        addresses: number of distinct addresses that answered, were refused or were lost, by outcome.
        places: these addresses as a bit per address of the subnet; empty if the job has one block of ports, and therefore
            each address one chunk.
        reasons: the first reasons why addresses were refused or lost.
        seconds: slot seconds.
        unprobed: number of addresses that the ledger lists, for each of at most 256 slices of the job's chunks, up to the last
            that has any; with it a page of them is found without reading the chunks before. None if an earlier release has
            counted some of the chunks.
    """

    done: int = 0
    probes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    addresses: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    places: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    unprobed: tuple[int, ...] | None = ()

    @property
    def pace(self) -> float | None:
        """Return the slot seconds per probe; None if there are too few probes."""
        probes = sum(self.probes.values())
        return self.seconds / probes if probes >= _ENOUGH and self.seconds else None


EMPTY: Final = Totals()
