"""A chunk and all of its state changes.

`TABLE` defines the life cycle of a chunk. Only functions of this module change a chunk's state, token or map. A worker's
message is accepted only with the chunk's current token (attempt and worker); any other message is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from pydantic import AwareDatetime, StrictInt

from job_orchestrator.domain.attempts import Attempt, Probed, append
from scanfleet.contracts.messages import (
    ChunkClaimed,
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    FencingToken,
    Run,
    Technique,
    instance_of,
)
from scanfleet.errors import ScanfleetError
from scanfleet.scanning.outcomes import Outcome, index_of, merge
from scanfleet.scanning.ports import PortSet, parse_ranges, port_count

MAX_FAILURES = 3  # one failure may be due to the network, two to coincidence; a third is attributed to the target
MAX_DELAY = timedelta(minutes=1)  # of the next attempt; a longer one results from a clock that was ahead
_PATIENT = 3  # dispatches without progress from which on the next one is delayed
MAX_FRUITLESS = 20  # dispatches without progress after which the chunk itself is assumed to be the cause
_OUTAGE = 6  # dispatches during an outage that are counted at most: they delay the next one by `MAX_DELAY`


class ChunkState(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    SCANNED = "scanned"
    STORED = "stored"
    FAILED = "failed"
    """Only in documents of release 0.1: since then the addresses of a failed chunk are lost, and the chunk is stored."""
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
        _T.STORE: frozenset({_S.STORED}),  # of an attempt whose lease had expired
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
        _T.RELEASE: frozenset({_S.QUEUED, _S.SCANNED}),  # scanned: released without blanks
        _T.FAIL: frozenset({_S.QUEUED, _S.SCANNED}),  # scanned: the blanks are lost
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
# Between two requests of a verdict: the sweep limits how many it sends. A longer one results from a clock that was ahead.
MAX_PAUSE: Final = timedelta(minutes=5)
HELD: Final = frozenset({ChunkState.DISPATCHED, ChunkState.RUNNING})  # by a worker

Ended = ChunkReleased | ChunkScanned | ChunkFailed
WorkerReport = ChunkClaimed | ChunkProgressed | Ended


class IllegalChunkChangeError(ScanfleetError):
    """The transition is not in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A slice of a job. Every stored change increments `rev`, which is the compare-and-set token."""

    id: str
    job_id: int
    user_id: int
    zone: str = ""
    """The network from which it is scanned; always empty, since there is one. Stored since 0.1."""
    index: int
    """Index in the job's plan; chunks are created and counted in this order."""
    turn: int
    """Position among the chunks of its user: lower values are dispatched first."""
    partition: int
    """Partition of scan-progress, by the job's id: the partition's owner manages the chunk's lease."""
    first_address: str
    outcomes: str
    ports: str
    port_count: int
    estimate: float
    """Estimated slot seconds of the blanks when the chunk was created."""
    needs_raw: bool
    state: ChunkState = ChunkState.QUEUED
    attempt: int = 0
    worker_id: str = ""
    reach: int = 0
    """The attempt scans the blanks before this index of the map."""
    share: float = 1.0
    """Fraction of a slot that the attempt occupies: small chunks share a slot."""
    attempt_estimate: float | None = None
    """Estimated slot seconds of the attempt's blanks; None in documents of earlier releases."""
    dispatched_at: AwareDatetime | None = None
    not_before: AwareDatetime | None = None
    """Earliest start of the next attempt; None for immediately."""
    limit: int = 0
    """Maximum number of blanks that the next attempt may scan; 0 for all."""
    failures: int = 0
    """Number since the last progress, of attempts that could not be narrowed further."""
    failed_by: tuple[str, ...] = ()
    """Worker instances that failed or lost the chunk, finished none of its addresses in time, or repeatedly were not acknowledged,
    and have made no progress since."""
    no_route: tuple[str, ...] = ()
    """Instances in `failed_by` without a route to some of its addresses, since the last progress."""
    fruitless: int = 0
    """Number of dispatches since the last progress."""
    unstored: int = 0
    """Number of checks that missed results, up to `MAX_FAILURES`; progress does not reset it."""
    seconds: float = 0.0
    """Slot seconds of the attempts: measured, up to the estimate for one without a final report; without cancelled ones and those
    whose lease expired without progress."""
    reason: str = ""
    technique: Technique | None = None
    """Of its TCP ports, by the report that `probed` is of."""
    attempts: tuple[Attempt, ...] = ()
    """The first and the last ones."""
    dropped: int = 0
    """Number of attempts between them that are not in `attempts`."""
    probed: Probed | None = None
    """By the latest report of a recorded attempt whose nmap was started; None before, and in documents of earlier releases."""
    ask_at: AwareDatetime | None = None
    """When result-store is next asked to check the chunk again; None for immediately."""
    asked: int = 0
    """Number of repeated checks."""
    rev: StrictInt = 0

    @property
    def token(self) -> FencingToken:
        return FencingToken(self.job_id, self.id, self.attempt, self.worker_id)

    @property
    def current(self) -> Attempt | None:
        """The record of the current or last attempt; None if there was none, or an earlier release dispatched it."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].n == self.attempt else None

    @property
    def run(self) -> Run | None:
        """The nmap of the attempt that `probed` is of."""
        return next((each.run for each in self.attempts if self.probed and each.n == self.probed.attempt), None)

    @property
    def expected(self) -> float:
        """Estimated slot seconds of the current attempt."""
        return self.estimate if self.attempt_estimate is None else self.attempt_estimate

    @property
    def udp(self) -> bool:
        """Whether the ports are UDP ports: a chunk's are of one protocol."""
        return self.ports.startswith("U:")

    @property
    def blank(self) -> int:
        """Number of addresses left to scan."""
        return self.outcomes.count(Outcome.BLANK)

    @property
    def attempted(self) -> int:
        """Number of addresses that the current attempt has left to scan."""
        return self.outcomes.count(Outcome.BLANK, 0, self.reach)


def dispatch(chunk: Chunk, worker_id: str, now: datetime, *, size: int, share: float, estimate: float) -> Chunk:
    """Return the chunk with a new token, for an attempt on its first `size` blanks that is expected to take `estimate`."""
    attempt = Attempt(n=chunk.attempt + 1, worker=worker_id, at=now)
    attempts, dropped = append(chunk.attempts, attempt)
    return _move(
        chunk,
        ChunkTrigger.DISPATCH,
        ChunkState.DISPATCHED,
        attempt=attempt.n,
        attempts=attempts,
        dropped=chunk.dropped + dropped,
        worker_id=worker_id,
        reach=_reach(chunk.outcomes, size),
        share=share,
        attempt_estimate=estimate,
        dispatched_at=now,
        fruitless=chunk.fruitless + 1,
    )


def holds(chunk: Chunk, report: WorkerReport) -> bool:
    """Return whether the report has the token of a chunk that a worker currently holds."""
    return chunk.state in HELD and chunk.token == report.token


def apply(chunk: Chunk, report: WorkerReport, now: datetime, patience: timedelta) -> Chunk:
    """Return the chunk after a report of its holder. Call only if `holds`.

    Every report of a dispatched chunk implies a claim, because the claim itself may have been lost.

    Args:
        chunk: the chunk as it was read.
        report: a report with the current token.
        now: platform time.
        patience: timeout for result-store to check a scanned chunk before it is asked again.
    """
    if not isinstance(report, ChunkClaimed):
        chunk = _with_report(chunk, report.outcomes)
    if isinstance(report, Ended):
        chunk = _with_probes(_ended(chunk, report, now), report)
        chunk = replace(chunk, seconds=chunk.seconds + min(report.slot_seconds, elapsed(chunk, now)))
    match report:
        case ChunkClaimed() | ChunkProgressed():
            if chunk.state is ChunkState.RUNNING:
                return chunk
            run = None
            if isinstance(report, ChunkClaimed):
                chunk, run = _with_probes(chunk, report), report.run
            return _move(_noted(chunk, claimed=now, run=run), ChunkTrigger.CLAIM, ChunkState.RUNNING)
        case ChunkScanned() if not chunk.blank:
            return _move(
                chunk,
                ChunkTrigger.SCAN,
                ChunkState.SCANNED,
                ask_at=now + min(patience, MAX_PAUSE),
                reason=report.reason or chunk.reason,
            )
        case ChunkScanned():
            return fail(chunk, "the worker reported the chunk as scanned although addresses are missing", now)
        case ChunkReleased():
            return release(
                chunk, now, too_slow=report.too_slow, unacknowledged=report.unacknowledged, reason=report.reason
            )
        case ChunkFailed():
            reason = f"worker {report.worker_id}: {report.reason}"
            return _without_route(chunk, reason, now) if report.no_route else fail(chunk, reason, now, narrow=True)


def late_report(chunk: Chunk, report: WorkerReport, now: datetime) -> Chunk:
    """Return the chunk after a report of an attempt that has lost the chunk.

    The end of the attempt is recorded, even if there are later ones, and what it probed if this is not known of another one. A
    cancelled chunk takes the map of its last attempt, so that the ledger shows the work before the cancel.
    """
    if isinstance(report, ChunkClaimed):
        return chunk
    if isinstance(report, Ended):
        chunk = _ended(chunk, report, now)
        if chunk.probed is None:
            chunk = _with_probes(chunk, report)
    if chunk.state is ChunkState.CANCELLED and chunk.token == report.token:
        chunk = replace(chunk, outcomes=_merged(chunk, report.outcomes))
    return chunk


def elapsed(chunk: Chunk, now: datetime, since: datetime | None = None) -> float:
    """Return the slot seconds of the current attempt so far, measured here and not reported by the worker.

    With `since`, only those after it.
    """
    if chunk.dispatched_at is None:
        return 0.0
    begin = chunk.dispatched_at if since is None else max(chunk.dispatched_at, since)
    return chunk.share * max(0.0, (now - begin).total_seconds())


def release(
    chunk: Chunk, now: datetime, *, too_slow: bool = False, unacknowledged: bool = False, reason: str = ""
) -> Chunk:
    """Requeue the chunk without counting a failure; without blanks it only needs to be checked.

    After an attempt that was too slow the next one gets half as many addresses; if nothing was finished, on another worker,
    since its nmap may hang. A chunk that is dispatched repeatedly without progress counts as failed, because it may be the
    cause; but not for attempts that never began, as without a free slot, or that were not acknowledged, as without a leader of the
    partition that takes the chunk's results. From the third such dispatch on the next one is delayed, because an outage may last;
    without acknowledgements it is also on another worker, since only this one may not reach the leader.
    """
    unacknowledged = unacknowledged and not too_slow
    unclaimed = chunk.state is ChunkState.DISPATCHED and not (too_slow or unacknowledged)
    uncounted = unclaimed or (unacknowledged and chunk.fruitless > _OUTAGE)
    if chunk.fruitless >= MAX_FRUITLESS and not uncounted:
        return fail(chunk, f"no progress after {MAX_FRUITLESS} dispatches", now)
    limit = chunk.limit
    if too_slow:
        limit = _half(chunk)
    elif not chunk.attempted:  # small attempts succeeded, so the size may grow again
        limit = _doubled(chunk)
    state = ChunkState.QUEUED if chunk.blank else ChunkState.SCANNED
    fruitless = max(0, chunk.fruitless - uncounted)
    delayed = fruitless >= _PATIENT and not (unclaimed or too_slow)
    elsewhere = (too_slow and fruitless > 0) or (unacknowledged and delayed)
    return _move(
        chunk,
        ChunkTrigger.RELEASE,
        state,
        limit=limit,
        ask_at=None,
        reason=chunk.reason or reason,
        failed_by=_failed_by(chunk) if elsewhere else chunk.failed_by,
        fruitless=fruitless,
        not_before=now + min(timedelta(seconds=2**fruitless), MAX_DELAY) if delayed else chunk.not_before,
    )


def expire(chunk: Chunk, reason: str, now: datetime) -> Chunk:
    """Return the chunk after its worker's lease expired: a failure, counted once per worker instance that began the attempt.

    A chunk that was never claimed goes to another worker at no cost: its task may not have been delivered.
    """
    chunk = _lost(_timed(chunk, now) if not chunk.fruitless else chunk, "expired")
    free = instance_of(chunk.worker_id) in chunk.failed_by or chunk.state is ChunkState.DISPATCHED
    if free and chunk.blank and chunk.fruitless < MAX_FRUITLESS:
        return _move(chunk, ChunkTrigger.FAIL, ChunkState.QUEUED, reason=reason, failed_by=_failed_by(chunk))
    return fail(chunk, reason, now)


def fail(chunk: Chunk, reason: str, now: datetime, *, narrow: bool = False) -> Chunk:
    """Requeue the chunk after a failure, with a delay; after the last failure its addresses are lost.

    Args:
        chunk: the chunk as it was read.
        reason: what failed, for the job's error.
        now: platform time.
        narrow: an attempt on several addresses failed: the next one gets half of them, so that a host that crashes nmap
            is finally isolated and only its address is lost.
    """
    if not chunk.blank:
        return _move(chunk, ChunkTrigger.FAIL, ChunkState.SCANNED, reason=reason, ask_at=None)
    narrower = narrow and chunk.attempted != 1
    failures = chunk.failures + (not narrower)
    if failures < MAX_FAILURES:
        return _move(
            chunk,
            ChunkTrigger.FAIL,
            ChunkState.QUEUED,
            reason=reason,
            failures=failures,
            failed_by=_failed_by(chunk),
            fruitless=0,
            limit=_half(chunk) if narrower else chunk.limit,
            # After an expired lease no delay is needed; a failure of nmap may be temporary.
            not_before=now + timedelta(seconds=2 ** max(1, failures)) if narrow else None,
            ask_at=None,
        )
    # A failed attempt on one address loses that address, an expired lease all remaining ones. The limit stays until an attempt
    # succeeds: the next addresses may fail too, and halving the whole chunk again for each of them would take days.
    return _give_up(chunk, reason, 1 if narrow else chunk.blank, chunk.limit)


def _without_route(chunk: Chunk, reason: str, now: datetime) -> Chunk:
    """Requeue the chunk for another instance, with a delay: the route may only be missing temporarily.

    Dispatch returns the chunk to an instance without a route only if no live instance may have a route. Then each attempt counts
    as a failure. After the last failure, or the last dispatch without progress, the attempt's addresses are lost.
    """
    if not chunk.blank:
        return fail(chunk, reason, now)
    instance = instance_of(chunk.worker_id)
    no_route = tuple(name for name in chunk.no_route if name in chunk.failed_by)  # release 0.2 resets only `failed_by`
    known = instance in no_route
    failures = chunk.failures + known
    if failures >= MAX_FAILURES or chunk.fruitless >= MAX_FRUITLESS:
        return _give_up(chunk, reason, chunk.attempted, _doubled(chunk))
    return _move(
        chunk,
        ChunkTrigger.FAIL,
        ChunkState.QUEUED,
        reason=reason,
        failures=failures,
        failed_by=_failed_by(chunk),
        no_route=no_route if known else (*no_route, instance),
        not_before=now + timedelta(seconds=2 ** (failures + 1)),
        ask_at=None,
    )


def _give_up(chunk: Chunk, reason: str, blanks: int, limit: int) -> Chunk:
    """Return the chunk without its first `blanks`, which are lost; the others begin again, at most `limit` in an attempt."""
    lost = chunk.outcomes.replace(Outcome.BLANK, Outcome.LOST, blanks)
    return _move(
        chunk,
        ChunkTrigger.FAIL,
        ChunkState.QUEUED if Outcome.BLANK in lost else ChunkState.SCANNED,
        outcomes=lost,
        reason=reason,
        failures=0,
        failed_by=(),
        no_route=(),
        fruitless=0,
        limit=limit,
        not_before=None,
        ask_at=None,
    )


def incomplete(chunk: Chunk, attempt: int, addresses: Iterable[str], now: datetime) -> Chunk:
    """Return the chunk after result-store missed hosts at `addresses`: these are blank again, which counts as a failure.

    From the third such check on these addresses are lost: each attempt reports them again, which is progress and resets the
    other counts. The verdict may arrive before the report that it refers to. A verdict on an earlier attempt is ignored.
    """
    if chunk.state not in HELD | {ChunkState.SCANNED} or chunk.attempt != attempt:
        return chunk
    unstored = min(chunk.unstored + 1, MAX_FAILURES)
    code = Outcome.BLANK if unstored < MAX_FAILURES else Outcome.LOST
    indexes = {index_of(chunk.first_address, address) for address in addresses}
    missed = {index for index in indexes if 0 <= index < len(chunk.outcomes)}
    missed -= {index for index in missed if chunk.outcomes[index] == Outcome.EXCLUDED}
    if not missed:
        return chunk
    outcomes = "".join(code if index in missed else old for index, old in enumerate(chunk.outcomes))
    lost = replace(_lost(_timed(chunk, now), "incomplete"), outcomes=outcomes, unstored=unstored)
    failed = fail(lost, "results were lost before they were stored", now)
    delay = timedelta(seconds=2**unstored)  # the cause may be temporary
    return replace(failed, not_before=now + delay) if failed.state is ChunkState.QUEUED else failed


def store(chunk: Chunk, outcomes: str, now: datetime) -> Chunk:
    """Return the chunk with the map of its stored hosts, which is valid for any attempt.

    A final state is kept; a cancelled chunk still takes the map, so that the ledger shows the stored results. A map of another
    chunk or with a blank is ignored.
    """
    if _frame(outcomes) != _frame(chunk.outcomes) or Outcome.BLANK in outcomes:
        return chunk
    if chunk.state is ChunkState.CANCELLED:
        return replace(chunk, outcomes=outcomes)
    if chunk.state not in OPEN:
        return chunk
    return _move(_lost(_timed(chunk, now), "stored"), ChunkTrigger.STORE, ChunkState.STORED, outcomes=outcomes)


def request_check(chunk: Chunk, now: datetime, patience: timedelta) -> Chunk:
    """Return a scanned chunk for which result-store is asked now, and again after a delay that doubles up to 5 minutes."""
    if chunk.state is not ChunkState.SCANNED:
        return chunk
    pause = min(patience * 2 ** min(chunk.asked, MAX_FRUITLESS), MAX_PAUSE)
    return replace(chunk, ask_at=now + pause, asked=min(chunk.asked + 1, MAX_FRUITLESS))


def cancel(chunk: Chunk) -> Chunk:
    return _move(_lost(chunk, "cancelled"), ChunkTrigger.CANCEL, ChunkState.CANCELLED)


_ENDS: Final[dict[type[Ended], str]] = {ChunkScanned: "scanned", ChunkReleased: "released", ChunkFailed: "failed"}


def _ended(chunk: Chunk, report: Ended, now: datetime) -> Chunk:
    """Record that the report's attempt has ended, unless it was recorded before or the attempt has no record."""
    ours = (report.attempt, report.worker_id)
    index = next((index for index, each in enumerate(chunk.attempts) if (each.n, each.worker) == ours), None)
    if index is None or chunk.attempts[index].ended is not None:
        return chunk
    attempt = chunk.attempts[index]
    run = report.run
    if run is None and isinstance(report, ChunkScanned) and report.nmap:  # of a worker of an earlier release
        run = Run(nmap=report.nmap, arguments=report.arguments)
    ended = replace(attempt, ended=now, how=attempt.how or _ENDS[type(report)], run=run or attempt.run)
    return replace(chunk, attempts=(*chunk.attempts[:index], ended, *chunk.attempts[index + 1 :]))


def _lost(chunk: Chunk, how: str) -> Chunk:
    """Record how the current attempt lost the chunk; its worker has not reported an end."""
    return _noted(chunk, how=how) if chunk.state in HELD else chunk


def _timed(chunk: Chunk, now: datetime) -> Chunk:
    """Add the measured time of the current attempt, whose worker has not reported it, up to its estimate.

    The measured time may contain a lease timeout, or an outage of this service, which the job's later estimates must not.
    """
    if chunk.state not in HELD:
        return chunk
    return replace(chunk, seconds=chunk.seconds + min(elapsed(chunk, now), chunk.share * chunk.expected))


def _noted(chunk: Chunk, **facts: Any) -> Chunk:
    """Return the chunk with these facts in the record of its current attempt, unless an earlier release dispatched it."""
    current = chunk.current
    return chunk if current is None else replace(chunk, attempts=(*chunk.attempts[:-1], replace(current, **facts)))


def _with_probes(chunk: Chunk, report: ChunkClaimed | Ended) -> Chunk:
    """Return the chunk with what the report's attempt has probed, without port numbers that cannot be those of the chunk."""
    if report.technique is None or (isinstance(report, ChunkScanned) and not report.nmap):
        return chunk
    if report.attempt not in {each.n for each in chunk.attempts}:
        return chunk  # what it probed would be taken for that of another attempt's nmap
    ports = PortSet.parse(chunk.ports)
    try:
        valid = port_count(parse_ranges(report.common_ports)) <= ports.tcp_count and ports.top
    except ValueError:
        valid = False
    probed = Probed(
        attempt=report.attempt,
        common_ports=report.common_ports if valid else "",
        scripts=report.scripts,
        detection=report.detection,
        discovery=report.discovery,
    )
    return replace(chunk, technique=report.technique, probed=probed)


def _with_report(chunk: Chunk, news: str) -> Chunk:
    """Return the chunk with the outcomes of a report; new ones are progress, which resets the failure counts.

    Other instances that failed the chunk still get it last: one whose nmap always fails would fail the remaining addresses too.
    """
    if news == chunk.outcomes:
        return chunk
    merged = _merged(chunk, news)
    if merged == chunk.outcomes:
        return chunk
    failed_by = tuple(name for name in chunk.failed_by if name != instance_of(chunk.worker_id))
    return replace(chunk, outcomes=merged, failures=0, failed_by=failed_by, no_route=(), fruitless=0)


def _failed_by(chunk: Chunk) -> tuple[str, ...]:
    """Return the worker instances that failed the chunk, including its current one."""
    instance = instance_of(chunk.worker_id)
    return chunk.failed_by if instance in chunk.failed_by else (*chunk.failed_by, instance)


def _half(chunk: Chunk) -> int:
    """Return half of the attempt's remaining addresses; the previous limit if none remain."""
    return max(1, chunk.attempted // 2) if chunk.attempted else chunk.limit


def _doubled(chunk: Chunk) -> int:
    """Return twice the limit, or none from the size of the chunk on."""
    return chunk.limit * 2 if chunk.limit * 2 < len(chunk.outcomes) else 0


def _reach(outcomes: str, size: int) -> int:
    """Return the index in the map after its first `size` blanks."""
    place = -1
    for _ in range(size):
        place = outcomes.find(Outcome.BLANK, place + 1)
        if place < 0:
            return len(outcomes)
    return place + 1


def _merged(chunk: Chunk, news: str) -> str:
    """Merge the map, unless it is of another chunk: it has another length or other excluded addresses."""
    return merge(chunk.outcomes, news) if _frame(news) == _frame(chunk.outcomes) else chunk.outcomes


_FRAME: Final = str.maketrans({code.value: Outcome.BLANK.value for code in set(Outcome) - {Outcome.EXCLUDED}})


def _frame(outcomes: str) -> str:
    """Return the length and excluded indexes of a map, which no scan of a chunk can change."""
    return outcomes.translate(_FRAME)


def _move(chunk: Chunk, trigger: ChunkTrigger, to: ChunkState, **fields: Any) -> Chunk:
    if to not in TABLE[chunk.state].get(trigger, frozenset()):
        raise IllegalChunkChangeError(f"cannot {trigger} chunk {chunk.id} to {to}: it is {chunk.state}")
    return replace(chunk, state=to, **fields)
