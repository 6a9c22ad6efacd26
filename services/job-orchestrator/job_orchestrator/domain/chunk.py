"""A chunk and everything that can change it.

The life of a chunk is `TABLE`. Every change of a chunk's state, token or map is made by a function of this file. A message
of a worker is accepted only under the chunk's current token (attempt and worker); anything else changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from scanfleet.errors import ScanfleetError
from scanfleet.messages import (
    ChunkClaimed,
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    Technique,
)
from scanfleet.outcomes import Outcome, index_of, merge

MAX_FAILURES = 3  # once can be the network, twice bad luck; a third time the chunk itself is at fault


class ChunkState(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    SCANNED = "scanned"
    STORED = "stored"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ChunkTrigger(StrEnum):
    DISPATCH = "dispatch"
    CLAIM = "claim"
    SCAN = "scan"
    GIVE_BACK = "give back"  # released, or not claimed in time: no fault of the chunk
    FAULT = "fault"  # a lease lost, nmap failed, results missing: counts against the chunk
    STORE = "store"
    CANCEL = "cancel"


_S = ChunkState
_T = ChunkTrigger

TABLE: Final[dict[ChunkState, dict[ChunkTrigger, frozenset[ChunkState]]]] = {
    _S.QUEUED: {
        _T.DISPATCH: frozenset({_S.DISPATCHED}),
        _T.STORE: frozenset({_S.STORED}),  # of an attempt that was thought dead
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.DISPATCHED: {
        _T.CLAIM: frozenset({_S.RUNNING}),
        _T.SCAN: frozenset({_S.SCANNED}),  # the claim was lost
        _T.GIVE_BACK: frozenset({_S.QUEUED, _S.SCANNED}),
        _T.FAULT: frozenset({_S.QUEUED, _S.SCANNED, _S.FAILED}),
        _T.STORE: frozenset({_S.STORED}),
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.RUNNING: {
        _T.SCAN: frozenset({_S.SCANNED}),
        _T.GIVE_BACK: frozenset({_S.QUEUED, _S.SCANNED}),  # scanned: given back with no blank left
        _T.FAULT: frozenset({_S.QUEUED, _S.SCANNED, _S.FAILED}),
        _T.STORE: frozenset({_S.STORED}),  # told by result-store before the worker's own word was read
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.SCANNED: {
        _T.FAULT: frozenset({_S.QUEUED, _S.FAILED}),  # results were missing
        _T.STORE: frozenset({_S.STORED}),
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.STORED: {},
    _S.FAILED: {},
    _S.CANCELLED: {},
}

OPEN: Final = frozenset(state for state, ways in TABLE.items() if ways)
HELD: Final = frozenset({ChunkState.DISPATCHED, ChunkState.RUNNING})  # by a worker

Ended = ChunkReleased | ChunkScanned | ChunkFailed
WorkerReport = ChunkClaimed | ChunkProgressed | Ended


class IllegalChunkChangeError(ScanfleetError):
    """This change is not in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A slice of a job. `rev` rises with every stored change: the compare-and-set."""

    id: str
    job_id: int
    user_id: int
    index: int
    turn: int
    """Its place among the chunks of its user: lower goes first."""
    first_address: str
    outcomes: str
    ports: str
    port_count: int
    estimate: float
    needs_raw: bool
    state: ChunkState = ChunkState.QUEUED
    attempt: int = 0
    worker_id: str = ""
    failures: int = 0
    reason: str = ""
    partition: int = -1
    """Of the topic whose reader watches it: scan-workers while dispatched, scan-progress while running."""
    charged: float = 0.0
    """Slot seconds that its user's clock was charged and that the attempt's end will correct."""
    technique: Technique | None = None
    scanned_at: datetime | None = None
    """When result-store was last asked to check it."""
    rev: int = 0

    @property
    def blank(self) -> int:
        """Addresses left to scan."""
        return self.outcomes.count(Outcome.BLANK)


def dispatch(chunk: Chunk, worker_id: str, partition: int) -> Chunk:
    """The chunk under a new token, its user charged the estimate."""
    return _move(
        chunk,
        ChunkTrigger.DISPATCH,
        ChunkState.DISPATCHED,
        attempt=chunk.attempt + 1,
        worker_id=worker_id,
        partition=partition,
        charged=chunk.estimate,
    )


def holds(chunk: Chunk, report: WorkerReport) -> bool:
    """Whether the report comes under the token of a chunk that a worker holds now."""
    return chunk.state in HELD and _current(chunk, report)


def hear(chunk: Chunk, report: WorkerReport, partition: int, now: datetime) -> Chunk:
    """The chunk after its holder's report, read from that partition of scan-progress. Call only when `holds`.

    Any sign of life of a dispatched chunk is a claim: the claim itself may have been lost.
    """
    if not isinstance(report, ChunkClaimed):
        chunk = replace(chunk, outcomes=_merged(chunk, report.outcomes))
    match report:
        case ChunkClaimed() | ChunkProgressed():
            if chunk.state is ChunkState.RUNNING:
                return replace(chunk, partition=partition)
            return _move(chunk, ChunkTrigger.CLAIM, ChunkState.RUNNING, partition=partition)
        case ChunkScanned() if not chunk.blank:
            return _move(
                chunk,
                ChunkTrigger.SCAN,
                ChunkState.SCANNED,
                technique=report.technique,
                scanned_at=now,
                reason=report.reason or chunk.reason,
            )
        case ChunkScanned():
            return fault(chunk, "the worker called the chunk scanned with addresses left")
        case ChunkReleased():
            return give_back(chunk, chunk.reason)
        case ChunkFailed():
            return fault(chunk, report.reason)


def last_words(chunk: Chunk, report: WorkerReport) -> Chunk:
    """A cancelled chunk with the last map of its holder, so that the ledger knows what was done before the cancel."""
    mine = chunk.state is ChunkState.CANCELLED and _current(chunk, report)
    if not mine or isinstance(report, ChunkClaimed):
        return chunk
    return replace(chunk, outcomes=_merged(chunk, report.outcomes))


def settle_charge(chunk: Chunk, report: WorkerReport) -> tuple[Chunk, float]:
    """The chunk with nothing charged, and by how many slot seconds its user's clock was wrong; once for each attempt."""
    if not isinstance(report, Ended) or not chunk.charged or not _current(chunk, report):
        return chunk, 0.0
    return replace(chunk, charged=0.0), report.slot_seconds - chunk.charged


def give_back(chunk: Chunk, reason: str) -> Chunk:
    """Queue the chunk again at no cost; with no blank left there is nothing to scan, only to check."""
    state = ChunkState.QUEUED if chunk.blank else ChunkState.SCANNED
    return _move(chunk, ChunkTrigger.GIVE_BACK, state, reason=reason, charged=0.0, scanned_at=None)


def fault(chunk: Chunk, reason: str) -> Chunk:
    """Count a failure against the chunk, and queue it again unless it had its last chance."""
    failures = chunk.failures + 1
    if not chunk.blank:
        state = ChunkState.SCANNED
    elif failures < MAX_FAILURES:
        state = ChunkState.QUEUED
    else:
        state = ChunkState.FAILED
    return _move(chunk, ChunkTrigger.FAULT, state, failures=failures, reason=reason, scanned_at=None)


def incomplete(chunk: Chunk, attempt: int, addresses: Iterable[str]) -> Chunk:
    """The chunk after result-store missed the hosts at `addresses`: these are blank again, which counts as a failure.

    Word of an earlier attempt, or of a chunk that is not waiting for it, changes nothing.
    """
    if chunk.state is not ChunkState.SCANNED or chunk.attempt != attempt:
        return chunk
    letters = list(chunk.outcomes)
    for address in addresses:
        index = index_of(chunk.first_address, address)
        if 0 <= index < len(letters) and letters[index] != Outcome.EXCLUDED:
            letters[index] = Outcome.BLANK
    blanked = replace(chunk, outcomes="".join(letters))
    if not blanked.blank:
        return chunk
    return fault(blanked, "results were lost on their way to the store")


def store(chunk: Chunk, outcomes: str) -> Chunk:
    """The chunk with the map that its stored hosts prove: a fact, whatever attempt it came from.

    A final state stays; a cancelled chunk still learns its map, so that the ledger tells what can be read. A map that is
    not of this chunk, or has a blank, proves nothing.
    """
    if _frame(outcomes) != _frame(chunk.outcomes) or Outcome.BLANK in outcomes:
        return chunk
    if chunk.state is ChunkState.CANCELLED:
        return replace(chunk, outcomes=outcomes)
    if chunk.state not in OPEN:
        return chunk
    return _move(replace(chunk, outcomes=outcomes), ChunkTrigger.STORE, ChunkState.STORED)


def cancel(chunk: Chunk) -> Chunk:
    return _move(chunk, ChunkTrigger.CANCEL, ChunkState.CANCELLED)


def _current(chunk: Chunk, report: WorkerReport) -> bool:
    return (report.job_id, report.attempt, report.worker_id) == (chunk.job_id, chunk.attempt, chunk.worker_id)


def _merged(chunk: Chunk, news: str) -> str:
    """A map of another length, or one that leaves out other addresses, is not of this chunk and says nothing."""
    return merge(chunk.outcomes, news) if _frame(news) == _frame(chunk.outcomes) else chunk.outcomes


_FRAME: Final = str.maketrans({letter.value: Outcome.BLANK.value for letter in set(Outcome) - {Outcome.EXCLUDED}})


def _frame(outcomes: str) -> str:
    """Length and excluded places: what no scan of a chunk can change."""
    return outcomes.translate(_FRAME)


def _move(chunk: Chunk, trigger: ChunkTrigger, to: ChunkState, **fields: Any) -> Chunk:
    if to not in TABLE[chunk.state].get(trigger, frozenset()):
        raise IllegalChunkChangeError(f"cannot {trigger} chunk {chunk.id} to {to}: it is {chunk.state}")
    return replace(chunk, state=to, **fields)
