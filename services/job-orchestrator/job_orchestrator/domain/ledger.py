"""What became of every probe of a job: addresses × ports by outcome, and their sum is the request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from scanfleet import outcomes
from scanfleet.messages import JobStatus
from scanfleet.outcomes import Outcome, address_at
from scanfleet.targets import Target

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
    Outcome.LOST: LOST,
}
ACCOUNTED: Final = (ANSWERED, SILENT, DOWN, TIMED_OUT, EXCLUDED)
_SETTLED: Final = (ANSWERED, SILENT, DOWN, TIMED_OUT, REFUSED)
_FAILING: Final = (REFUSED, LOST)
_NAMED: Final = frozenset({DOWN, TIMED_OUT, REFUSED, CANCELLED, LOST})
_REASONS: Final = 3  # in a job's error; more is for the ledger
_MAX_ERROR: Final = 1_000  # characters: a reason can quote nmap at length


@dataclass(frozen=True, slots=True)
class NotProbed:
    """One address of one port block that was not probed to the end, and why."""

    address: str
    ports: str
    outcome: str
    reason: str


class Tally:
    """What the chunks of a job say together. Chunk after chunk is added, so that a huge job need not be in memory.

    An address counts once, however many port blocks it is in.
    """

    def __init__(self, job: ScanJob) -> None:
        self._job = job
        self._probes: Counter[str] = Counter()
        self._answered = _Addresses()
        self._failing = {name: _Addresses() for name in _FAILING}
        self._reasons: dict[str, None] = {}
        self.chunks: Counter[ChunkState] = Counter()

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.state] += 1
        for letter, count in outcomes.counts(chunk.outcomes).items():
            name = _name(letter, self._job.status, chunk)
            self._probes[name] += count * chunk.port_count
            if letter is Outcome.ANSWERED:
                self._answered.add(chunk, letter)
            elif name in self._failing:
                self._failing[name].add(chunk, letter)
                if chunk.reason and len(self._reasons) < _REASONS:
                    self._reasons[chunk.reason] = None

    @property
    def counts(self) -> dict[str, int]:
        """Probes by name. With every chunk of the plan added they sum up to the request."""
        # What is excluded is the job's to count: no chunk is made of addresses that are all excluded.
        return dict.fromkeys(NAMES, 0) | self._probes | {EXCLUDED: self._job.excluded * self._job.ports}

    @property
    def accounted(self) -> bool:
        """Whether every probe of the request has an outcome."""
        return sum(self.counts[name] for name in ACCOUNTED) == self._job.addresses * self._job.ports

    @property
    def machines_found(self) -> int:
        """Addresses that answered on any port."""
        return self._answered.count

    @property
    def progress(self) -> int:
        """Per cent of the probes that have an outcome, rounded down, 99 until the job is complete."""
        wanted = (self._job.addresses - self._job.excluded) * self._job.ports
        settled = sum(self._probes[name] for name in _SETTLED)
        return min(99, 100 * settled // wanted)

    @property
    def error(self) -> str:
        """Why the job failed: how many addresses were not scanned, and the first reasons given; "" if none failed."""
        counts = {name: addresses.count for name, addresses in self._failing.items() if addresses.count}
        parts = [f"{count} {'address' if count == 1 else 'addresses'} {name}" for name, count in counts.items()]
        text = ": ".join(filter(None, [" and ".join(parts), "; ".join(self._reasons)]))
        return text[:_MAX_ERROR]


class Names:
    """One page of the addresses that were not probed to their end, and how many there are.

    First those that the request excludes, then by chunk those that were refused, cancelled, lost, down or timed out.
    """

    def __init__(self, job: ScanJob, skip: int, size: int) -> None:
        self._job = job
        self._skip = skip
        self._size = size
        self.page: list[NotProbed] = []
        self.total = 0
        for network in Target.parse(job.cidr, job.exclude).exclude:
            first = str(network.network_address)
            self._take(range(network.num_addresses), first, job.policy.ports, lambda _: (EXCLUDED, ""))

    def add(self, chunk: Chunk) -> None:
        names = {letter: _name(letter, self._job.status, chunk) for letter in set(chunk.outcomes)}
        wanted = {letter for letter, name in names.items() if name in _NAMED}
        if wanted:
            places = [index for index, letter in enumerate(chunk.outcomes) if letter in wanted]
            self._take(
                places, chunk.first_address, chunk.ports, lambda index: _why(names[chunk.outcomes[index]], chunk)
            )

    def _take(
        self,
        places: Sequence[int],
        first: str,
        ports: str,
        why: Callable[[int], tuple[str, str]],
    ) -> None:
        """Those of the places after `first` that are on the page; counts all."""
        start = max(0, self._skip - self.total)
        for place in places[start : start + self._size - len(self.page)]:
            self.page.append(NotProbed(str(address_at(first, place)), ports, *why(place)))
        self.total += len(places)


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


def _why(name: str, chunk: Chunk) -> tuple[str, str]:
    return name, chunk.reason if name in _FAILING else ""
