"""Totals of a job's chunks that have ended, stored in the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_ENOUGH: Final = 1_000  # probes from which on the measured time is better than an estimate


@dataclass(frozen=True, slots=True)
class Effort:
    """The slot seconds of the ended chunks of one protocol.

    Attributes:
        probes: number of probes with an outcome.
        seconds: slot seconds of all chunks.
        probed: number of probes without those of addresses that were down or refused, which take next to no time.
        probed_seconds: slot seconds of the chunks that have any of these, in proportion to their share of the chunk's probes:
            on a network with few hosts, discovery and the start of nmap take most of the time.
    """

    probes: int = 0
    seconds: float = 0.0
    probed: int = 0
    probed_seconds: float = 0.0

    @property
    def mean(self) -> float | None:
        """Return the slot seconds per probe of the request; None if there are too few probes."""
        return self.seconds / self.probes if self.probes >= _ENOUGH and self.seconds else None

    @property
    def pace(self) -> float | None:
        """Return the slot seconds per probe in chunks with addresses that are up; None if there are too few such probes."""
        return self.probed_seconds / self.probed if self.probed >= _ENOUGH and self.probed_seconds else None

    def plus(self, probes: int, probed: int, seconds: float) -> Effort:
        """Return the effort including another chunk, `probed` of whose `probes` went to addresses that are up."""
        return Effort(
            self.probes + probes,
            self.seconds + seconds,
            self.probed + probed,
            self.probed_seconds + (seconds * probed / probes if probed else 0.0),
        )


NO_EFFORT: Final = Effort()


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
        tcp: slot seconds of the chunks of TCP ports.
        udp: slot seconds of the chunks of UDP ports, which may take a thousand times as long.
        unprobed: number of addresses that the ledger lists, for each of at most 256 slices of the job's chunks, up to the last
            that has any; with it a page of them is found without reading the chunks before. None if an earlier release has
            counted some of the chunks.
    """

    done: int = 0
    probes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    addresses: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    places: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    reasons: tuple[str, ...] = ()
    tcp: Effort = NO_EFFORT
    udp: Effort = NO_EFFORT
    unprobed: tuple[int, ...] | None = ()


EMPTY: Final = Totals()
