"""A chunk and everything that can change it.

The life of a chunk is `TABLE`. Every change of a chunk's state, token or map is made by a function of this file. A message
of a worker is accepted only under the chunk's current token (attempt and worker); any other changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
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
    instance_of,
)
from scanfleet.outcomes import Outcome, index_of, merge

MAX_FAILURES = 3  # one can be the network and two a coincidence; with the third what is scanned is at fault
MAX_FRUITLESS = 20  # dispatches that brought no letter: then the chunk itself may be what ends them


class ChunkState(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    SCANNED = "scanned"
    STORED = "stored"
    FAILED = "failed"
    """Only in documents of release 0.1: today the addresses of a chunk that fails are lost, and it is stored as such."""
    CANCELLED = "cancelled"


class ChunkTrigger(StrEnum):
    DISPATCH = "dispatch"
    CLAIM = "claim"
    SCAN = "scan"
    RELEASE = "release"  # at no cost
    FAIL = "fail"  # a lost lease, a failed attempt, missing results
    STORE = "store"
    CANCEL = "cancel"


_S = ChunkState
_T = ChunkTrigger

TABLE: Final[dict[ChunkState, dict[ChunkTrigger, frozenset[ChunkState]]]] = {
    _S.QUEUED: {
        _T.DISPATCH: frozenset({_S.DISPATCHED}),
        _T.STORE: frozenset({_S.STORED}),  # of an attempt whose lease was lost
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.DISPATCHED: {
        _T.CLAIM: frozenset({_S.RUNNING}),
        _T.SCAN: frozenset({_S.SCANNED}),  # the claim was lost
        _T.RELEASE: frozenset({_S.QUEUED, _S.SCANNED}),
        _T.FAIL: frozenset({_S.QUEUED, _S.SCANNED}),
        _T.STORE: frozenset({_S.STORED}),
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.RUNNING: {
        _T.SCAN: frozenset({_S.SCANNED}),
        _T.RELEASE: frozenset({_S.QUEUED, _S.SCANNED}),  # scanned: released with no blank left
        _T.FAIL: frozenset({_S.QUEUED, _S.SCANNED}),  # scanned: with what is blank lost
        _T.STORE: frozenset({_S.STORED}),  # published by result-store before the worker's report was read
        _T.CANCEL: frozenset({_S.CANCELLED}),
    },
    _S.SCANNED: {
        _T.FAIL: frozenset({_S.QUEUED, _S.SCANNED}),  # results were missing
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
    """Its place in the job's plan; chunks are made and counted in this order."""
    turn: int
    """Its place among the chunks of its user: lower goes first."""
    partition: int
    """Of scan-progress, by the job's id: the partition's owner holds the chunk's lease."""
    first_address: str
    outcomes: str
    ports: str
    port_count: int
    estimate: float
    """Slot seconds for the blanks, as expected when the chunk was made."""
    needs_raw: bool
    state: ChunkState = ChunkState.QUEUED
    attempt: int = 0
    worker_id: str = ""
    reach: int = 0
    """The attempt scans the blanks before this place in the map."""
    share: float = 1.0
    """Of a slot that the attempt occupies: small chunks share one."""
    dispatched_at: datetime | None = None
    not_before: datetime | None = None
    """When the next attempt may begin; None at once."""
    limit: int = 0
    """Blanks that the next attempt may scan; 0 is all."""
    failures: int = 0
    """Since the last progress, of attempts that could not be narrowed further."""
    failed_by: tuple[str, ...] = ()
    """Worker instances that failed it since the last progress."""
    fruitless: int = 0
    """Dispatches since the last progress."""
    seconds: float = 0.0
    """Slot seconds of all its attempts."""
    reason: str = ""
    technique: Technique | None = None
    ask_at: datetime | None = None
    """When result-store is asked again to check it; None at once."""
    asked: int = 0
    """How often it was asked again."""
    rev: int = 0

    @property
    def blank(self) -> int:
        """Addresses left to scan."""
        return self.outcomes.count(Outcome.BLANK)

    @property
    def attempted(self) -> int:
        """Addresses that the current attempt has left to scan."""
        return self.outcomes.count(Outcome.BLANK, 0, self.reach)


def dispatch(chunk: Chunk, worker_id: str, now: datetime, *, size: int, share: float) -> Chunk:
    """The chunk under a new token, for an attempt on its first `size` blanks."""
    return _move(
        chunk,
        ChunkTrigger.DISPATCH,
        ChunkState.DISPATCHED,
        attempt=chunk.attempt + 1,
        worker_id=worker_id,
        reach=_reach(chunk.outcomes, size),
        share=share,
        dispatched_at=now,
        fruitless=chunk.fruitless + 1,
    )


def holds(chunk: Chunk, report: WorkerReport) -> bool:
    """Whether the report comes under the token of a chunk that a worker holds now."""
    return chunk.state in HELD and _current(chunk, report)


def apply(chunk: Chunk, report: WorkerReport, now: datetime, patience: timedelta) -> Chunk:
    """The chunk after its holder's report. Call only when `holds`.

    Every report of a dispatched chunk is a claim: the claim itself may have been lost.

    Args:
        chunk: as it was read.
        report: under its current token.
        now: platform time.
        patience: how long result-store may take to check a scanned chunk before it is asked again.
    """
    if not isinstance(report, ChunkClaimed):
        chunk = _learn(chunk, report.outcomes)
    if isinstance(report, Ended):
        chunk = replace(chunk, seconds=chunk.seconds + min(report.slot_seconds, elapsed(chunk, now)))
    match report:
        case ChunkClaimed() | ChunkProgressed():
            if chunk.state is ChunkState.RUNNING:
                return chunk
            return _move(chunk, ChunkTrigger.CLAIM, ChunkState.RUNNING)
        case ChunkScanned() if not chunk.blank:
            return _move(
                chunk,
                ChunkTrigger.SCAN,
                ChunkState.SCANNED,
                technique=report.technique,
                ask_at=now + patience,
                reason=report.reason or chunk.reason,
            )
        case ChunkScanned():
            return fail(chunk, "the worker reported the chunk as scanned with addresses left", now)
        case ChunkReleased():
            return release(chunk, now, too_slow=report.too_slow, reason=report.reason)
        case ChunkFailed():
            return fail(chunk, f"worker {report.worker_id}: {report.reason}", now, narrow=True)


def final_report(chunk: Chunk, report: WorkerReport) -> Chunk:
    """A cancelled chunk with the last map of its holder, so that the ledger shows what was done before the cancel."""
    mine = chunk.state is ChunkState.CANCELLED and _current(chunk, report)
    if not mine or isinstance(report, ChunkClaimed):
        return chunk
    return replace(chunk, outcomes=_merged(chunk, report.outcomes))


def elapsed(chunk: Chunk, now: datetime) -> float:
    """Slot seconds of the current attempt so far, as measured here and not as its worker reports."""
    if chunk.dispatched_at is None:
        return 0.0
    return chunk.share * max(0.0, (now - chunk.dispatched_at).total_seconds())


def release(chunk: Chunk, now: datetime, *, too_slow: bool = False, reason: str = "") -> Chunk:
    """Queue the chunk again at no cost; with no blank left there is nothing to scan, only to check.

    After an attempt that was too slow the next one gets half as many addresses. One dispatched again and again without
    progress counts as failed: it may be what ends the attempts.
    """
    if chunk.fruitless >= MAX_FRUITLESS:
        return fail(chunk, f"{MAX_FRUITLESS} dispatches brought no progress", now)
    limit = chunk.limit
    if too_slow:
        limit = _half(chunk)
    elif limit and not chunk.attempted:  # what could be scanned in small parts may be scanned in larger ones again
        limit = limit * 2 if limit * 2 < len(chunk.outcomes) else 0
    state = ChunkState.QUEUED if chunk.blank else ChunkState.SCANNED
    return _move(chunk, ChunkTrigger.RELEASE, state, limit=limit, ask_at=None, reason=chunk.reason or reason)


def expire(chunk: Chunk, reason: str, now: datetime) -> Chunk:
    """The chunk after its worker's lease expired: a failure, but one for each worker instance."""
    if instance_of(chunk.worker_id) in chunk.failed_by and chunk.fruitless < MAX_FRUITLESS:
        return _move(chunk, ChunkTrigger.FAIL, ChunkState.QUEUED, reason=reason)
    return fail(chunk, reason, now)


def fail(chunk: Chunk, reason: str, now: datetime, *, narrow: bool = False) -> Chunk:
    """Queue the chunk again after a failure, with a pause; the last failure loses its addresses.

    Args:
        chunk: as it was read.
        reason: what failed, for the job's error.
        now: platform time.
        narrow: an attempt on several addresses failed: the next one gets half of them, so that a host that nmap cannot
            bear ends up alone and costs one address.
    """
    if not chunk.blank:
        return _move(chunk, ChunkTrigger.FAIL, ChunkState.SCANNED, reason=reason, ask_at=None)
    instance = instance_of(chunk.worker_id)
    failed_by = chunk.failed_by if instance in chunk.failed_by else (*chunk.failed_by, instance)
    narrower = narrow and chunk.attempted != 1
    failures = chunk.failures + (not narrower)
    again: dict[str, Any] = {"reason": reason, "failed_by": failed_by, "ask_at": None, "fruitless": 0}
    if failures < MAX_FAILURES:
        again |= {
            "failures": failures,
            "limit": _half(chunk) if narrower else chunk.limit,
            # A lost lease was pause enough; what nmap could not do may be possible a little later.
            "not_before": now + timedelta(seconds=2 ** max(1, failures)) if narrow else None,
        }
        return _move(chunk, ChunkTrigger.FAIL, ChunkState.QUEUED, **again)
    # An attempt on one address costs that address, a lost lease all that are left.
    lost = chunk.outcomes.replace(Outcome.BLANK, Outcome.LOST, 1 if narrow else -1)
    again |= {"outcomes": lost, "failures": 0, "failed_by": (), "limit": 0, "not_before": None}
    state = ChunkState.QUEUED if Outcome.BLANK in lost else ChunkState.SCANNED
    return _move(chunk, ChunkTrigger.FAIL, state, **again)


def incomplete(chunk: Chunk, attempt: int, addresses: Iterable[str], now: datetime) -> Chunk:
    """The chunk after result-store missed the hosts at `addresses`: these are blank again, which counts as a failure.

    It may be read before the report that it is about. A verdict on an earlier attempt changes nothing.
    """
    if chunk.state not in HELD | {ChunkState.SCANNED} or chunk.attempt != attempt:
        return chunk
    letters = list(chunk.outcomes)
    for address in addresses:
        index = index_of(chunk.first_address, address)
        if 0 <= index < len(letters) and letters[index] != Outcome.EXCLUDED:
            letters[index] = Outcome.BLANK
    blanked = replace(chunk, outcomes="".join(letters))
    if not blanked.blank:
        return chunk
    return fail(blanked, "results were lost on their way to the store", now)


def store(chunk: Chunk, outcomes: str) -> Chunk:
    """The chunk with the map that its stored hosts prove: a fact, whatever attempt it came from.

    A final state stays; a cancelled chunk still takes its map, so that the ledger shows what can be read. A map that is
    not of this chunk, or has a blank, proves nothing.
    """
    if _frame(outcomes) != _frame(chunk.outcomes) or Outcome.BLANK in outcomes:
        return chunk
    if chunk.state is ChunkState.CANCELLED:
        return replace(chunk, outcomes=outcomes)
    if chunk.state not in OPEN:
        return chunk
    return _move(replace(chunk, outcomes=outcomes), ChunkTrigger.STORE, ChunkState.STORED)


def ask_again(chunk: Chunk, now: datetime, patience: timedelta) -> Chunk:
    """A scanned chunk that result-store is asked about now, and not again before a pause that doubles each time."""
    if chunk.state is not ChunkState.SCANNED:
        return chunk
    pause = min(patience * 2**chunk.asked, timedelta(hours=1))
    return replace(chunk, ask_at=now + pause, asked=min(chunk.asked + 1, MAX_FRUITLESS))


def cancel(chunk: Chunk) -> Chunk:
    return _move(chunk, ChunkTrigger.CANCEL, ChunkState.CANCELLED)


def _learn(chunk: Chunk, news: str) -> Chunk:
    """The chunk with the letters of a report; new ones are progress, after which failures count from the start."""
    merged = _merged(chunk, news)
    if merged == chunk.outcomes:
        return chunk
    return replace(chunk, outcomes=merged, failures=0, failed_by=(), fruitless=0)


def _half(chunk: Chunk) -> int:
    """Half of what the attempt has left; as before when nothing is left of it."""
    return max(1, chunk.attempted // 2) if chunk.attempted else chunk.limit


def _reach(outcomes: str, size: int) -> int:
    """The place in the map after its first `size` blanks."""
    place = -1
    for _ in range(size):
        place = outcomes.find(Outcome.BLANK, place + 1)
        if place < 0:
            return len(outcomes)
    return place + 1


def _current(chunk: Chunk, report: WorkerReport) -> bool:
    return (report.job_id, report.attempt, report.worker_id) == (chunk.job_id, chunk.attempt, chunk.worker_id)


def _merged(chunk: Chunk, news: str) -> str:
    """A map of another length, or one that leaves out other addresses, is not of this chunk and is ignored."""
    return merge(chunk.outcomes, news) if _frame(news) == _frame(chunk.outcomes) else chunk.outcomes


_FRAME: Final = str.maketrans({letter.value: Outcome.BLANK.value for letter in set(Outcome) - {Outcome.EXCLUDED}})


def _frame(outcomes: str) -> str:
    """Length and excluded places: what no scan of a chunk can change."""
    return outcomes.translate(_FRAME)


def _move(chunk: Chunk, trigger: ChunkTrigger, to: ChunkState, **fields: Any) -> Chunk:
    if to not in TABLE[chunk.state].get(trigger, frozenset()):
        raise IllegalChunkChangeError(f"cannot {trigger} chunk {chunk.id} to {to}: it is {chunk.state}")
    return replace(chunk, state=to, **fields)
