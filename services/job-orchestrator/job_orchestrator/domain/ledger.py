"""What became of every probe of a job: addresses × ports by outcome, and their sum is the request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from scanfleet import outcomes
from scanfleet.messages import JobStatus
from scanfleet.outcomes import Outcome, address_at

ANSWERED, SILENT, DOWN, TIMED_OUT = "answered", "silent", "down", "timed_out"
EXCLUDED, REFUSED, CANCELLED, LOST, WAITING = "excluded", "refused", "cancelled", "lost", "waiting"

NAMES: Final = (ANSWERED, SILENT, DOWN, TIMED_OUT, EXCLUDED, REFUSED, CANCELLED, LOST, WAITING)
_OF_LETTER: Final = {
    Outcome.ANSWERED: ANSWERED,
    Outcome.SILENT: SILENT,
    Outcome.DOWN: DOWN,
    Outcome.TIMED_OUT: TIMED_OUT,
    Outcome.EXCLUDED: EXCLUDED,
    Outcome.REFUSED: REFUSED,
}
ACCOUNTED: Final = (ANSWERED, SILENT, DOWN, TIMED_OUT, EXCLUDED)
_PROBED: Final = frozenset({ANSWERED, SILENT})
_FAILING: Final = (REFUSED, LOST)


@dataclass(frozen=True, slots=True)
class NotProbed:
    """One address of one port block that was not probed to the end, and why."""

    address: str
    ports: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tally:
    """What the chunks of a job say together."""

    probes: Counter[str]
    """By name; excluded addresses are the job's to count."""
    machines_found: int
    failing: Counter[str]
    """Addresses refused or lost, by name."""
    reasons: tuple[str, ...]


def tally(status: JobStatus, chunks: Iterable[Chunk]) -> Tally:
    """Fold a job's chunks; an address counts once, however many port blocks it is in."""
    probes: Counter[str] = Counter()
    reasons: dict[str, None] = {}
    answered = _Addresses()
    failing = {name: _Addresses() for name in _FAILING}
    for chunk in chunks:
        for letter, count in outcomes.counts(chunk.outcomes).items():
            name = _name(letter, status, chunk)
            probes[name] += count * chunk.port_count
            if letter is Outcome.ANSWERED:
                answered.add(chunk, letter)
            elif name in failing:
                failing[name].add(chunk, letter)
                if chunk.reason:
                    reasons[chunk.reason] = None
    del probes[EXCLUDED]
    return Tally(
        probes=probes,
        machines_found=answered.count,
        failing=Counter({name: addresses.count for name, addresses in failing.items()}),
        reasons=tuple(reasons),
    )


def counts(job: ScanJob, tally: Tally) -> dict[str, int]:
    """Probes by name; they add up to the request. What no chunk was made for yet waits, or was cancelled with the job."""
    of = dict.fromkeys(NAMES, 0) | tally.probes
    of[EXCLUDED] = job.excluded * job.ports
    missing = job.addresses * job.ports - sum(of.values())
    of[CANCELLED if job.status is JobStatus.CANCELLED else WAITING] += missing
    return of


def progress(job: ScanJob, tally: Tally) -> int:
    """Per cent of the probes that have an outcome, rounded down, 99 until the job is complete."""
    wanted = (job.addresses - job.excluded) * job.ports
    settled = sum(tally.probes[name] for name in (ANSWERED, SILENT, DOWN, TIMED_OUT, REFUSED))
    return min(99, 100 * settled // wanted)


def error(tally: Tally) -> str:
    """Why the job failed: how many addresses were not scanned, and the reasons given; "" if none failed."""
    parts = [
        f"{tally.failing[name]} {'address' if tally.failing[name] == 1 else 'addresses'} {name}"
        for name in _FAILING
        if tally.failing[name]
    ]
    if not parts:
        return ""
    text = f"{' and '.join(parts)}: {'; '.join(tally.reasons[:3])}" if tally.reasons else " and ".join(parts)
    return text[:1_000]  # a reason can quote nmap at length


def not_probed(job: ScanJob, chunks: Sequence[Chunk]) -> Iterator[NotProbed]:
    """By name, in order: every address that was excluded, refused, cancelled, lost, down or timed out."""
    for chunk in chunks:
        for index, letter in enumerate(chunk.outcomes):
            name = _name(letter, job.status, chunk)
            if name not in _PROBED and name != WAITING:
                reason = chunk.reason if name in _FAILING else ""
                yield NotProbed(str(address_at(chunk.first_address, index)), chunk.ports, name, reason)


class _Addresses:
    """Distinct addresses: a union of maps, taken letter by letter only where port blocks share a slice."""

    def __init__(self) -> None:
        self._maps: dict[str, list[tuple[str, Outcome]]] = defaultdict(list)

    def add(self, chunk: Chunk, letter: Outcome) -> None:
        self._maps[chunk.first_address].append((chunk.outcomes, letter))

    @property
    def count(self) -> int:
        return sum(
            maps[0][0].count(maps[0][1])
            if len(maps) == 1
            else len({index for text, letter in maps for index, each in enumerate(text) if each == letter})
            for maps in self._maps.values()
        )


def _name(letter: str, status: JobStatus, chunk: Chunk) -> str:
    if letter != Outcome.BLANK:
        return _OF_LETTER[Outcome(letter)]
    if chunk.state is ChunkState.FAILED:
        return LOST
    return CANCELLED if status is JobStatus.CANCELLED or chunk.state is ChunkState.CANCELLED else WAITING
