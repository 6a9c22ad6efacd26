"""What the chunks of a job that have ended came to, as the job keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_ENOUGH: Final = 1_000  # probes, after which the time they took says more than an estimate


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the chunks with an index below `done`, each counted once: they change together with `done`.

    Attributes:
        done: these chunks have ended.
        probes: by outcome.
        addresses: distinct ones that answered, were refused or were lost, by outcome.
        places: which ones, a bit for each address of the subnet; empty where the job has one block of ports, and each
            address so one chunk.
        reasons: the first reasons why addresses were refused or lost.
        seconds: slot seconds.
    """

    done: int = 0
    probes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    addresses: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    places: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def pace(self) -> float | None:
        """Slot seconds for one probe."""
        probes = sum(self.probes.values())
        return self.seconds / probes if probes >= _ENOUGH and self.seconds else None


EMPTY: Final = Totals()
