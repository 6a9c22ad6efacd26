"""Build a job's coverage map: one code per address, or per slice of addresses, and block of ports."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import HELD, ChunkState
from job_orchestrator.domain.job import ScanJob
from scanfleet.scanning.outcomes import CANCELLED, IN_WORK, Outcome, index_of, worst
from scanfleet.scanning.targets import Target

MAX_CELLS: Final = 65_536  # per response: the addresses of a /16
MAX_LETTERS: Final = 16 * MAX_CELLS  # over all blocks: a megabyte


@dataclass(frozen=True, slots=True)
class MapPart:
    """The fields of a chunk that the map shows."""

    index: int
    first_address: str
    state: ChunkState
    outcomes: str
    reach: int


class Coverage:
    """The letters of a part of a job's addresses, filled in chunk by chunk.

    Addresses that are in none of the added chunks are excluded, are waiting, or were cancelled with the job.

    Args:
        job: the job of the addresses.
        first: position of the first address in the job's network.
        addresses: number of addresses.
        blocks: numbers of the blocks of ports.
        step: number of addresses of a letter: one, or those of a chunk, of which the letter is the worst.
    """

    def __init__(self, job: ScanJob, first: int, addresses: int, blocks: Collection[int], step: int) -> None:
        self._job = job
        self._network = job.cidr.partition("/")[0]
        self._first = first
        self._step = step
        cells = -(-addresses // step)
        empty = bytearray((CANCELLED if job.final else Outcome.BLANK).encode() * cells)
        for start, end in Target.parse(job.cidr, job.exclude).holes:
            low, high = max(0, -(-(start - first) // step)), min(cells, (end - first) // step)
            if low < high:
                empty[low:high] = Outcome.EXCLUDED.encode() * (high - low)
        self._letters = {block: bytearray(empty) for block in sorted(blocks)}

    def add(self, chunk: MapPart) -> None:
        """Fill in the requested part of a chunk."""
        block = plan.block_of(self._job, chunk.index)
        if block in self._letters:
            letters = self._letters[block]
            start = index_of(self._network, chunk.first_address) - self._first
            shown = _shown(chunk, ended=self._job.final)
            if self._step > 1:
                start, shown = start // self._step, worst(shown)
            low, high = max(0, start), min(len(letters), start + len(shown))
            if low < high:
                letters[low:high] = shown[low - start : high - start].encode()

    def letters(self) -> Iterator[tuple[int, str]]:
        """Yield each block's number and letters, in order."""
        for block, letters in self._letters.items():
            yield block, letters.decode()


def _shown(chunk: MapPart, *, ended: bool) -> str:
    """Return the chunk's map with a code for each kind of blank."""
    if chunk.state is ChunkState.FAILED:
        return chunk.outcomes.replace(Outcome.BLANK, Outcome.LOST)
    if ended or chunk.state is ChunkState.CANCELLED:
        return chunk.outcomes.replace(Outcome.BLANK, CANCELLED)
    if chunk.state in HELD:
        return chunk.outcomes[: chunk.reach].replace(Outcome.BLANK, IN_WORK) + chunk.outcomes[chunk.reach :]
    return chunk.outcomes
