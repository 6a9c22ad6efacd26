"""Numbers of jobs and chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from job_orchestrator.domain.chunk import OPEN, Chunk, ChunkState
from scanfleet.contracts.messages import JobStatus

MAX_COUNTED: Final = 100_000  # chunks of each state: a census reads them in a tenth of a second, whatever the backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenChunks:
    """Numbers of chunks of one job that workers hold or can get."""

    queued: int = 0
    queued_raw: int = 0
    """The queued chunks that need raw packets."""
    held: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """The chunks of a job that have not ended, in one consistent read."""

    open: int = 0
    begun: bool = False
    """Whether a worker has started one of them."""
    lowest: int | None = None
    """The lowest index of them; None if there is none."""

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Self:
        """Return the standing of a job whose chunks, apart from some that have ended, are `chunks`."""
        open_ = [chunk for chunk in chunks if chunk.state in OPEN]
        begun = any(chunk.state in {ChunkState.RUNNING, ChunkState.SCANNED} for chunk in open_)
        return cls(len(open_), begun, min((chunk.index for chunk in open_), default=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCensus:
    """Numbers of unfinished jobs. Ages are in seconds by the database's clock.

    Jobs that wait for the hours of their user grant count only as numbers: workers cannot shorten their wait.
    """

    numbers: Counter[JobStatus]
    ages_seconds: Mapping[JobStatus, float]
    """Age of the oldest job in each status, since its creation."""
    slot_seconds: float
    """Expected slot seconds of unfinished jobs, for scaling."""


@dataclass(frozen=True, slots=True)
class DeletionCensus:
    """Deletions that are not complete."""

    open: int = 0
    age_seconds: float = 0.0
    """Time since the oldest of them was requested, by the database's clock."""
