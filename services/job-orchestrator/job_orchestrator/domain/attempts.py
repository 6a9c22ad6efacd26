"""The record of a chunk's attempts: which worker may have sent packets, when and from where, and how each attempt ended. ADR 75."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import AwareDatetime

from scanfleet.contracts.messages.chunks import Run

_FIRST: Final = 10
_LAST: Final = 40
MAX_ATTEMPTS: Final = _FIRST + _LAST  # recorded per chunk; the first and the last ones usually show the cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One dispatch of a chunk. Times are the platform's; what the worker reports of its nmap is in `run`."""

    n: int
    """The attempt in the fencing token."""
    worker: str
    at: AwareDatetime
    """When it was dispatched: its worker sent no packet before."""
    claimed: AwareDatetime | None = None
    """When its first heartbeat was handled; None if it ended before."""
    ended: AwareDatetime | None = None
    """When its final report was handled; None until then, and if there was none: its worker may have sent packets later."""
    how: str = ""
    """How it ended: `scanned`, `released` or `failed` by its report, else `expired`, `cancelled`, `stored` or `incomplete`."""
    run: Run | None = None
    """Its nmap, by the latest report that mentions it.

    None if no report mentioned it: nmap was not started, or the worker was lost before its next report that has one.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What an attempt probes, by its worker's report; result-store stores it when it closes the chunk."""

    attempt: int = 0
    common_ports: str = ""
    """The TCP ports of a `top` set by number."""
    scripts: tuple[str, ...] = ()
    detection: str = ""
    discovery: str = ""


def append(attempts: Sequence[Attempt], attempt: Attempt) -> tuple[tuple[Attempt, ...], int]:
    """Return the attempts with another one, without those between the first and the last ones; and how many these are."""
    every = (*attempts, attempt)
    surplus = max(0, len(every) - MAX_ATTEMPTS)
    return (*every[:_FIRST], *every[_FIRST + surplus :]), surplus
