"""Account for every probe of a job: addresses × ports by outcome, which add up to the request."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import OPEN, Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.totals import EMPTY, Totals
from scanfleet.scanning import outcomes
from scanfleet.scanning.outcomes import Outcome, address_at, index_of
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Target

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
_PROBED: Final = (ANSWERED, SILENT, TIMED_OUT)
_FAILING: Final = (REFUSED, LOST)
_DISTINCT: Final = (ANSWERED, REFUSED, LOST)  # also counted as addresses
_NAMED: Final = frozenset({DOWN, TIMED_OUT, REFUSED, CANCELLED, LOST})
_SLICES: Final = 256  # slices with their own count of unprobed addresses: one or two kilobytes in the job
_STEP: Final = 16  # chunks of a page that are read first; each further query reads twice as many
_GAP: Final = 16  # chunks that are read on the way to the next ones, rather than by a further query
_TEXT: Final = 1_200_000  # characters of ports on a page: a hundred addresses with the longest lists
_READS: Final = 4  # chunks that are read for each address of a page that begins after a position
_REASONS: Final = 3  # maximum number in a job's error; the ledger has all
_MAX_ERROR: Final = 1_000  # characters: a reason can quote nmap at length


@dataclass(frozen=True, slots=True)
class NotProbed:
    """An address of a port block that was not fully probed, with the reason."""

    address: str
    ports: str
    outcome: str
    reason: str


class Tally:
    """Sums over the chunks of a job: its stored totals plus the chunks that are added.

    An address counts once, however many port blocks it is in. Addresses of chunks that were not added are waiting, or were
    cancelled with the job.
    """

    def __init__(self, job: ScanJob, totals: Totals | None = None) -> None:
        totals = job.totals if totals is None else totals
        self._job = job
        self._done = totals.done
        self._probes = Counter(totals.probes)
        self._addresses = Counter(totals.addresses)
        # An address is in several chunks if the ports are in several blocks.
        self._several = job.plan.blocks > 1
        self._places = {name: int.from_bytes(bits, "little") for name, bits in totals.places.items()}
        self._reasons = dict.fromkeys(totals.reasons)
        self._tcp, self._udp = totals.tcp, totals.udp
        self._unprobed = None if totals.unprobed is None else list(totals.unprobed)

    def add(self, chunk: Chunk) -> None:
        """Count a chunk that is not in the totals."""
        for code, count in outcomes.counts(chunk.outcomes).items():
            name = _name(code, chunk)
            if name in {WAITING, CANCELLED, EXCLUDED}:
                continue  # the remainder of the request
            self._probes[name] += count * chunk.port_count
            if name in _DISTINCT:
                self._distinct(name, code, chunk, count)
            if name in _FAILING and chunk.reason and len(self._reasons) < _REASONS:
                self._reasons[chunk.reason] = None

    def end(self, chunk: Chunk) -> None:
        """Count a chunk that has ended; chunks must be counted in index order."""
        self.add(chunk)
        self._done = chunk.index + 1
        counts = Counter[str]()
        for code, count in outcomes.counts(chunk.outcomes).items():
            counts[_name(code, chunk)] += count
        self._measure(chunk, counts)
        listed = sum(count for name, count in counts.items() if name in _NAMED)
        if self._unprobed is not None and listed:
            slice_ = chunk.index // _slice_size(self._job)
            self._unprobed += [0] * (slice_ + 1 - len(self._unprobed))
            self._unprobed[slice_] += listed

    @property
    def totals(self) -> Totals:
        """Return the totals to store in the job: every chunk so far has ended."""
        size = -(-self._job.plan.addresses // 8)
        return Totals(
            done=self._done,
            probes=dict(self._probes),
            addresses=dict(self._addresses),
            places={name: bits.to_bytes(size, "little") for name, bits in self._places.items()},
            reasons=tuple(self._reasons),
            tcp=self._tcp,
            udp=self._udp,
            unprobed=None if self._unprobed is None else tuple(self._unprobed),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of probes by name; they add up to the request."""
        counts = dict.fromkeys(NAMES, 0) | self._probes | {EXCLUDED: self._job.plan.excluded * self._job.plan.ports}
        left = self._job.plan.probes - sum(counts.values())
        counts[CANCELLED if self._job.final else WAITING] += left
        return counts

    @property
    def accounted(self) -> bool:
        """Return whether every probe of the request has an outcome."""
        counts = self.counts
        return sum(counts[name] for name in ACCOUNTED) == self._job.plan.probes

    @property
    def machines_found(self) -> int:
        """Return the number of addresses that answered on any port."""
        return self._addresses[ANSWERED]

    @property
    def progress(self) -> int:
        """Return the percentage of probes with an outcome, rounded down, at most 99 until the job is complete."""
        return min(99, 100 * self._settled // self._wanted)

    @property
    def seconds_left(self) -> float:
        """Return the expected slot seconds of the remaining probes, estimated for a protocol without measurements."""
        included = self._job.plan.addresses - self._job.plan.excluded
        return sum(
            left
            * (
                mean
                if mean is not None
                else plan.estimate(self._job.policy, ports, included, self._job.plan.parallel) / included / ports.count
            )
            for left, mean, ports in self._left
        )

    @property
    def measured(self) -> bool:
        """Return whether chunks of each protocol with remaining probes have been measured."""
        return all(mean is not None for _, mean, _ in self._left)

    @property
    def error(self) -> str:
        """Return why the job failed: the number of addresses that were not scanned, and the first reasons."""
        counts = {name: self._addresses[name] for name in _FAILING if self._addresses[name]}
        parts = [f"{count} {'address' if count == 1 else 'addresses'} {name}" for name, count in counts.items()]
        text = ": ".join(filter(None, [" and ".join(parts), "; ".join(self._reasons)]))
        return text[:_MAX_ERROR] or "the ledger does not account for every probe of the request"

    @property
    def _left(self) -> Sequence[tuple[int, float | None, PortSet]]:
        """Return the remaining probes, the slot seconds of each, and the ports, of each protocol that has any."""
        ports = self._job.policy.port_set
        included = self._job.plan.addresses - self._job.plan.excluded
        left = max(0, self._wanted - self._settled - self._probes[LOST])
        of_udp = min(left, included * ports.udp_count)  # the chunks of TCP ports come first
        both = (
            (left - of_udp, self._job.totals.tcp.mean, PortSet(tcp=ports.tcp, top=ports.top, above=ports.above)),
            (of_udp, self._job.totals.udp.mean, PortSet(udp=ports.udp)),
        )
        return [each for each in both if each[0]]

    @property
    def _wanted(self) -> int:
        return (self._job.plan.addresses - self._job.plan.excluded) * self._job.plan.ports

    @property
    def _settled(self) -> int:
        return sum(self._probes[name] for name in _SETTLED)

    def _measure(self, chunk: Chunk, counts: Mapping[str, int]) -> None:
        settled = chunk.port_count * sum(count for name, count in counts.items() if name in _SETTLED)
        probed = chunk.port_count * sum(count for name, count in counts.items() if name in _PROBED)
        if chunk.udp:
            self._udp = self._udp.plus(settled, probed, chunk.seconds)
        else:
            self._tcp = self._tcp.plus(settled, probed, chunk.seconds)

    def _distinct(self, name: str, code: str, chunk: Chunk, count: int) -> None:
        if not self._several:
            self._addresses[name] += count
            return
        network = self._job.cidr.partition("/")[0]
        base = index_of(network, chunk.first_address)
        bits = self._places.get(name, 0)
        for place, each in enumerate(chunk.outcomes):
            if each == code or (name == LOST and _name(each, chunk) == LOST):
                bits |= 1 << (base + place)
        self._places[name] = bits
        self._addresses[name] = bits.bit_count()


class RunningCount:
    """Sums over the chunks of a running job that have ended, in any order; each is read only once, since it is final.

    Only a cache: an empty one counts the same once the job's totals contain all chunks before its first open one.
    """

    def __init__(self) -> None:
        self._totals = EMPTY
        self._first = 0
        """Every chunk before this index is counted."""
        self._ended = 0
        """A bit for each chunk from there on: whether it is counted."""

    def start(self, job: ScanJob) -> range:
        """Begin with the job's totals if that takes fewer reads; return the indexes among which chunks are not counted."""
        done = max(0, job.totals.done - self._first)
        uncounted = done - (self._ended & ((1 << done) - 1)).bit_count()
        if (self._ended >> done).bit_count() < uncounted:
            self._totals, self._first, self._ended = job.totals, job.totals.done, 0
        return range(self._first, min(job.made, job.totals.done + plan.AHEAD))

    def is_counted(self, index: int) -> bool:
        return bool((self._ended >> (index - self._first)) & 1)

    def tally(self, job: ScanJob, chunks: Iterable[Chunk]) -> Tally:
        """Return the sums with these chunks, none of which is counted, and count those that have ended."""
        chunks = list(chunks)
        tally, ended = Tally(job, self._totals), self._ended
        for chunk in chunks:
            if chunk.state not in OPEN:
                tally.add(chunk)
                ended |= 1 << (chunk.index - self._first)
        gapless = (~ended & (ended + 1)).bit_length() - 1
        self._totals, self._first, self._ended = tally.totals, self._first + gapless, ended >> gapless
        for chunk in chunks:
            if chunk.state in OPEN:
                tally.add(chunk)
        return tally


class UnprobedPage:
    """One page of the addresses that were not fully probed, and their total number.

    First the addresses that the request excludes, then by chunk those that were refused, cancelled, lost, down or timed out,
    then those of chunks that were not created before the job ended. Each has a fixed position in this order, as if every
    address of every chunk were listed.

    Attributes:
        page: the addresses of the page.
        total: the number of addresses of all pages.
        next: the position after which the next page begins; None at the end.
        cut: whether the page ended early, since its lists of ports are long.
    """

    def __init__(self, job: ScanJob, size: int, *, skip: int = 0, after: int | None = None) -> None:
        """Begin with the excluded addresses.

        Args:
            job: the job.
            size: maximum number of addresses of the page.
            skip: number of addresses before the page.
            after: position after which the page begins; with it the page ends early rather than take more than `_READS`
                chunks per address.
        """
        self._job = job
        self._size = size
        self._skip = skip
        self._after = after or 0
        self._reads = job.plan.chunk_count if after is None else _READS * size
        self._counted = 0 if job.totals.unprobed is None else job.totals.done
        """Number of chunks whose addresses are counted in the totals."""
        self.page: list[NotProbed] = []
        self.total = 0
        self.next: int | None = None
        self.cut = False
        self._room = _TEXT
        target = Target.parse(job.cidr, job.exclude)
        for start, end in target.holes:
            first = str(target.network[start])
            self._take(self.total, range(end - start), first, job.policy.ports, lambda _: (EXCLUDED, ""))
            self.total += end - start
        self._excluded = self.total

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of chunk indexes to add, of those in the job's totals, until the page is complete."""
        totals = self._job.totals
        if totals.unprobed is None:  # counted by an earlier release
            counts = Tally(self._job).counts
            if any(counts[name] for name in _NAMED):
                yield 0, totals.done
            return
        self.total += sum(totals.unprobed)
        step = _STEP
        for begin, end in self._runs(totals.unprobed):
            first = begin
            while first < end and self.next is None:
                if not self._reads:
                    self.next = self._before(first)
                    return
                until = min(end, first + step, first + self._reads)
                self._reads -= until - first
                yield first, until
                first, step = until, 2 * step

    def add(self, chunk: Chunk) -> None:
        places = self._list(chunk)
        if chunk.index >= self._counted:
            self.total += len(places)

    def add_unmade(self) -> None:
        """Count the chunks that were not created; in a final job all of their addresses are cancelled."""
        if not self._job.final:
            return
        made, end = self._job.made, self._job.plan.chunk_count
        self.total += plan.blanks(self._job, made, end)
        first = plan.index_after(self._job, max(made, self._first), self._skip)
        self._skip -= plan.blanks(self._job, made, first) if self._skip else 0
        for chunk in plan.chunks(self._job, first, end):
            if self.next is not None:
                break
            self._list(chunk)

    @property
    def _first(self) -> int:
        """The index of the first chunk that the page may contain."""
        return max(0, self._after - self._excluded) // self._job.plan.chunk_addresses

    def _before(self, index: int) -> int:
        """Return the position before the first address of the chunk with this index."""
        return self._excluded + index * self._job.plan.chunk_addresses

    def _runs(self, unprobed: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges of counted chunks that may have addresses of the page; one ends where the page should be full."""
        size, at, skip = _slice_size(self._job), 0, self._skip
        runs: list[tuple[int, int]] = []
        for number, listed in enumerate(unprobed):
            begin, end = number * size, min((number + 1) * size, self._counted)
            first = max(begin, self._first)
            if at + listed <= skip:
                self._skip -= listed
            elif listed and first < end:
                if runs and at < skip + self._size and first - runs[-1][1] <= _GAP:
                    runs.append((runs.pop()[0], end))
                else:
                    runs.append((first, end))
            at += listed if first == begin else 0
        return runs

    def _list(self, chunk: Chunk) -> Sequence[int]:
        """Add the chunk's addresses to the page; return the places of all that belong to the list."""
        names = {code: _name(code, chunk, cancelled=self._job.final) for code in set(chunk.outcomes)}
        wanted = {code for code, name in names.items() if name in _NAMED}
        if not wanted:
            return ()
        places = [index for index, code in enumerate(chunk.outcomes) if code in wanted]
        self._take(
            self._before(chunk.index),
            places,
            chunk.first_address,
            chunk.ports,
            lambda index: _why(names[chunk.outcomes[index]], chunk),
        )
        return places

    def _take(
        self, before: int, places: Sequence[int], first: str, ports: str, why: Callable[[int], tuple[str, str]]
    ) -> None:
        """Add those of the places after the address `first`, whose position is `before` + 1, that are on the page."""
        if self.next is not None:
            return
        begin = bisect_left(places, self._after - before)
        skipped = min(self._skip, len(places) - begin)
        self._skip -= skipped
        begin += skipped
        for place in places[begin : begin + self._size - len(self.page)]:
            self.cut = self._room < 0
            if self.cut:
                self.next = before + place
                return
            self.page.append(NotProbed(str(address_at(first, place)), ports, *why(place)))
            self._room -= len(ports)
            if len(self.page) == self._size:
                self.next = before + place + 1
                return


def _slice_size(job: ScanJob) -> int:
    """Return the number of chunks in each slice of `Totals.unprobed`."""
    return -(-job.plan.chunk_count // _SLICES)


def _name(code: str, chunk: Chunk, *, cancelled: bool = False) -> str:
    if code != Outcome.BLANK:
        return _OF_LETTER[Outcome(code)]
    if chunk.state is ChunkState.FAILED:
        return LOST
    return CANCELLED if cancelled or chunk.state is ChunkState.CANCELLED else WAITING


def _why(name: str, chunk: Chunk) -> tuple[str, str]:
    return name, chunk.reason if name in _FAILING else ""
