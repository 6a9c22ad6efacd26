"""The life of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_orchestrator.domain import chunk as rules
from job_orchestrator.domain.chunk import (
    HELD,
    MAX_DELAY,
    MAX_FAILURES,
    MAX_FRUITLESS,
    OPEN,
    TABLE,
    Chunk,
    ChunkState,
    ChunkTrigger,
    IllegalChunkChangeError,
    WorkerReport,
    apply,
    cancel,
    dispatch,
    elapsed,
    expire,
    fail,
    holds,
    incomplete,
    late_report,
    release,
    request_check,
    store,
)
from job_orchestrator.domain.fairness import Candidate, Credit, Round
from job_orchestrator_testing import chunk
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import ChunkClaimed, ChunkFailed, ChunkProgressed, ChunkReleased, ChunkScanned

FINAL = (ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED)
NOT_FINAL = tuple(state for state in ChunkState if state not in FINAL)
LETTERS = "asdtrl"
WITH_HOST = "ast"  # the codes for which result-store must have a host
PATIENCE = timedelta(seconds=60)
NOW = THEN + timedelta(seconds=10)


def in_state(state: ChunkState, **changed: Any) -> Chunk:
    """A chunk under attempt 2 of worker w-1 on all of its addresses, dispatched ten seconds before NOW."""
    fields = {"attempt": 2, "worker_id": "w-1", "reach": 4, "dispatched_at": THEN}
    return chunk(state=state, **(fields | changed))


def report(kind: type[Any], outcomes: str = "as..", **changed: Any) -> Any:
    fields: dict[str, Any] = {"job_id": 1, "chunk_id": "1-0", "attempt": 2, "worker_id": "w-1"}
    if kind is not ChunkClaimed:
        fields["outcomes"] = outcomes
    if kind is ChunkScanned:
        fields |= {"first_address": "127.9.8.0", "slot_seconds": 1.5, "technique": "syn"}
    if kind in {ChunkReleased, ChunkFailed}:
        fields |= {"reason": "because", "slot_seconds": 1.5}
    return kind(**(fields | changed))


def after(held: Chunk, report_: WorkerReport) -> Chunk:
    return apply(held, report_, NOW, PATIENCE)


REPORTS = (ChunkClaimed, ChunkProgressed, ChunkReleased, ChunkScanned, ChunkFailed)

# How each trigger is applied, and the chunks that lead to each of the states that the table names.
APPLY = {
    ChunkTrigger.DISPATCH: lambda c: dispatch(c, "w-2", NOW, size=4, share=1.0, estimate=1.5),
    ChunkTrigger.CLAIM: lambda c: after(c, report(ChunkClaimed)),
    ChunkTrigger.SCAN: lambda c: after(c, report(ChunkScanned, "asdt")),
    ChunkTrigger.RELEASE: lambda c: release(c, NOW),
    ChunkTrigger.FAIL: lambda c: fail(c, "r", NOW),
    ChunkTrigger.STORE: lambda c: rules._move(c, ChunkTrigger.STORE, ChunkState.STORED),
    ChunkTrigger.CANCEL: cancel,
}
CHUNKS: list[dict[str, Any]] = [{}, {"outcomes": "asdt"}, {"failures": MAX_FAILURES - 1}]


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("trigger", ChunkTrigger)
def test_table_decides_every_change(state: ChunkState, trigger: ChunkTrigger) -> None:
    """A trigger leads to each of the states that the table names and to no other; where it names none, it raises."""
    ends = set[ChunkState]()
    for fields in CHUNKS:
        before = in_state(state, **fields)
        try:
            ends.add(APPLY[trigger](before).state)
        except IllegalChunkChangeError as error:
            assert f"it is {state}" in str(error)  # noqa: PT017 # whether it raises is what is asked
    claimed_already = trigger is ChunkTrigger.CLAIM and state is ChunkState.RUNNING
    assert ends - ({state} if claimed_already else set()) == TABLE[state].get(trigger, frozenset())


def test_states_are_open_held_or_final() -> None:
    """Only final states have no transition, and held states are dispatched and running."""
    assert set(NOT_FINAL) == OPEN
    assert {ChunkState.DISPATCHED, ChunkState.RUNNING} == HELD


def test_changes_never_lead_to_failed() -> None:
    """`failed` is read only from documents of release 0.1: a failing chunk is stored with its addresses lost."""
    assert ChunkState.FAILED not in {end for ways in TABLE.values() for ends in ways.values() for end in ends}


def test_dispatch_makes_a_new_token() -> None:
    """A dispatched chunk has the next attempt, its worker, its time and its share of a slot."""
    sent = dispatch(chunk(attempt=4, worker_id="old", fruitless=3), "w-2", NOW, size=4, share=0.5, estimate=1.5)
    assert (sent.state, sent.attempt, sent.worker_id) == (ChunkState.DISPATCHED, 5, "w-2")
    assert (sent.dispatched_at, sent.share, sent.fruitless) == (NOW, 0.5, 4)


def test_attempt_has_a_separate_estimate() -> None:
    """The estimate of an attempt does not replace that of the whole chunk, which is used if the attempt has none."""
    sent = dispatch(chunk(estimate=8.0), "w-1", NOW, size=1, share=1.0, estimate=2.0)
    assert (sent.expected, sent.estimate) == (2.0, 8.0)
    assert release(sent, NOW).estimate == 8.0
    assert chunk(estimate=8.0).expected == 8.0


@pytest.mark.parametrize(
    ("outcomes", "size", "attempted"),
    [("....", 4, 4), ("....", 2, 2), ("a.x.s..", 2, 2), ("a.x.", 9, 2), ("..a", 1, 1)],
)
def test_attempt_covers_the_first_blanks(outcomes: str, size: int, attempted: int) -> None:
    """An attempt of a size is on so many blanks from the front, or on all where there are fewer."""
    sent = dispatch(chunk(outcomes=outcomes), "w-1", NOW, size=size, share=1.0, estimate=1.5)
    assert sent.attempted == attempted
    assert outcomes[: sent.reach].count(".") == attempted


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("kind", REPORTS)
def test_report_counts_only_with_the_current_token_of_a_held_chunk(state: ChunkState, kind: type[WorkerReport]) -> None:
    """A report counts if a worker holds the chunk and attempt, worker and job are the chunk's."""
    held = in_state(state)
    assert holds(held, report(kind)) is (state in HELD)
    for stale in ({"attempt": 1}, {"attempt": 3}, {"worker_id": "w-2"}, {"job_id": 2}):
        assert not holds(held, report(kind, **stale))


@pytest.mark.parametrize("state", sorted(HELD))
@pytest.mark.parametrize("kind", [ChunkClaimed, ChunkProgressed])
def test_first_report_implies_a_claim(state: ChunkState, kind: type[WorkerReport]) -> None:
    """A dispatched chunk runs from its holder's first report on, in the partition of its job."""
    changed = after(in_state(state, partition=3), report(kind))
    assert (changed.state, changed.partition) == (ChunkState.RUNNING, 3)


@pytest.mark.parametrize("kind", [kind for kind in REPORTS if kind is not ChunkClaimed])
def test_codes_of_a_map_never_change(kind: type[WorkerReport]) -> None:
    """Whatever a report's map contains, existing codes stay and blanks are filled."""
    assert after(in_state(ChunkState.RUNNING, outcomes="d.x."), report(kind, "aaxa")).outcomes == "daxa"


@pytest.mark.parametrize("news", ["aaa", "aaaaa", "aaxa", "aaaa", "xxxx"])
def test_map_of_another_chunk_is_ignored(news: str) -> None:
    """A map of another length, or with other addresses excluded, is not merged."""
    held = in_state(ChunkState.RUNNING, outcomes="d..x")
    assert after(held, report(ChunkProgressed, news)).outcomes == "d..x"


@given(
    first=st.text(LETTERS + ".", min_size=4, max_size=4), news=st.lists(st.text(LETTERS + ".", min_size=4, max_size=4))
)
def test_codes_are_kept_in_any_order_of_reports(first: str, news: list[str]) -> None:
    """An existing code never changes."""
    held = in_state(ChunkState.RUNNING, outcomes=first)
    for outcomes in news:
        changed = after(held, report(ChunkProgressed, outcomes))
        assert all(new == old for old, new in zip(held.outcomes, changed.outcomes, strict=True) if old != ".")
        held = changed


@pytest.mark.parametrize("state", sorted(HELD))
def test_chunk_without_blanks_is_scanned(state: ChunkState) -> None:
    """ChunkScanned of a full map ends the attempt; result-store is asked again after its patience only."""
    scanned = after(in_state(state), report(ChunkScanned, "asdt", nmap="7.93"))
    assert (scanned.state, scanned.outcomes) == (ChunkState.SCANNED, "asdt")
    assert (scanned.ask_at, scanned.failures) == (NOW + PATIENCE, 0)


def test_reason_of_refused_addresses_is_kept() -> None:
    """The reason of a ChunkScanned is the chunk's; without one the chunk keeps what it has."""
    held = in_state(ChunkState.RUNNING, reason="before")
    assert after(held, report(ChunkScanned, "rrrr", reason="needs raw packets")).reason == "needs raw packets"
    assert after(held, report(ChunkScanned, "ssss")).reason == "before"


def test_scanned_with_blanks_left_is_a_failure() -> None:
    """A worker that reports a chunk as scanned and leaves addresses out has failed once."""
    changed = after(in_state(ChunkState.RUNNING), report(ChunkScanned, "asd."))
    assert (changed.state, changed.outcomes, changed.failures) == (ChunkState.QUEUED, "asd.", 1)


@pytest.mark.parametrize("state", sorted(HELD))
def test_release_is_not_a_failure(state: ChunkState) -> None:
    """A released chunk is queued again with its outcomes, without a failure, a delay or a smaller limit."""
    held = in_state(state, outcomes="as..", failures=MAX_FAILURES - 1, failed_by=("w-0",))
    changed = after(held, report(ChunkReleased))
    assert (changed.state, changed.outcomes, changed.failures) == (ChunkState.QUEUED, "as..", MAX_FAILURES - 1)
    assert (changed.not_before, changed.limit, changed.failed_by) == (None, 0, ("w-0",))


@pytest.mark.parametrize("end", [ChunkReleased, ChunkFailed])
def test_attempt_that_ends_without_blanks_is_checked_at_once(end: type[WorkerReport]) -> None:
    """A chunk that was released or failed with every code set is scanned, and its check is requested at once."""
    held = in_state(ChunkState.RUNNING, failures=MAX_FAILURES - 1, ask_at=NOW)
    changed = after(held, report(end, "asdt"))
    assert (changed.state, changed.outcomes, changed.ask_at) == (ChunkState.SCANNED, "asdt", None)


# Failures


def test_attempt_that_fails_is_narrowed_to_half() -> None:
    """After a failure on several addresses the next attempt gets half of those left, two seconds later, uncounted."""
    held = in_state(ChunkState.RUNNING, outcomes="." * 9, reach=9)
    changed = after(held, report(ChunkFailed, "a" + "." * 8))
    assert (changed.state, changed.limit, changed.failures) == (ChunkState.QUEUED, 4, 0)
    assert (changed.failed_by, changed.not_before) == (("w-1",), NOW + timedelta(seconds=2))
    assert changed.reason == "worker w-1: because"


def test_failures_on_one_address_are_delayed_and_then_lose_it() -> None:
    """The attempts on a failing address are delayed by 2 s and 4 s, and the third failure loses it; the others are queued."""
    held = in_state(ChunkState.RUNNING, reach=1, limit=1)
    pauses = []
    for number in range(1, MAX_FAILURES):
        again = after(held, report(ChunkFailed, "...."))
        assert (again.state, again.failures) == (ChunkState.QUEUED, number)
        assert again.not_before is not None
        pauses.append((again.not_before - NOW).total_seconds())
        held = replace(again, state=ChunkState.RUNNING)
    lost = after(held, report(ChunkFailed, "....", reason="at last"))
    assert pauses == [2, 4]
    assert (lost.state, lost.outcomes, lost.reason) == (ChunkState.QUEUED, "l...", "worker w-1: at last")
    assert (lost.failures, lost.failed_by, lost.limit, lost.not_before) == (0, (), 1, None)


def without_route(left: Chunk, worker_id: str) -> Chunk:
    held = dispatch(left, worker_id, NOW, size=left.limit or 4, share=1.0, estimate=1.5)
    return after(held, report(ChunkFailed, left.outcomes, no_route=True, attempt=held.attempt, worker_id=worker_id))


def test_attempt_without_a_route_goes_to_each_instance_and_then_fails() -> None:
    """Each instance without a route has one attempt, not narrowed; then no live one has a route, and each attempt is a failure."""
    left, pauses = chunk(), []
    for worker, failures in (("w-1-00000001", 0), ("w-2-00000001", 0), ("w-1-00000002", 1), ("w-2-00000001", 2)):
        left = without_route(left, worker)
        assert (left.state, left.limit, left.failures) == (ChunkState.QUEUED, 0, failures)
        assert left.not_before is not None
        pauses.append((left.not_before - NOW).total_seconds())
    assert pauses == [2, 2, 4, 8]
    assert left.no_route == left.failed_by == ("w-1", "w-2")
    lost = without_route(left, "w-1-00000002")
    assert (lost.state, lost.outcomes, lost.reason) == (ChunkState.SCANNED, "llll", "worker w-1-00000002: because")


def test_attempt_without_a_route_loses_only_its_own_addresses() -> None:
    """The addresses that the attempt reached keep their outcome, and those that it did not include begin again."""
    held = in_state(ChunkState.RUNNING, reach=2, limit=2)
    again = after(held, report(ChunkFailed, "a...", no_route=True))
    assert (again.outcomes, again.limit, again.no_route) == ("a...", 2, ("w-1",))
    last = replace(again, state=ChunkState.RUNNING, failures=MAX_FAILURES - 1)
    lost = after(last, report(ChunkFailed, "a...", no_route=True))
    assert (lost.state, lost.outcomes) == (ChunkState.QUEUED, "al..")
    assert (lost.no_route, lost.failed_by, lost.limit, lost.not_before) == ((), (), 0, None)
    larger = in_state(ChunkState.RUNNING, reach=1, limit=1, outcomes="." * 8, no_route=("w-1",), failed_by=("w-1",))
    last = replace(larger, failures=MAX_FAILURES - 1)
    assert (
        after(last, report(ChunkFailed, "." * 8, no_route=True)).limit == 2
    )  # a route is missing, nmap has not failed


def test_attempt_without_a_route_on_many_instances_loses_its_addresses() -> None:
    """A chunk that no instance of a large fleet reaches is lost after a fixed number of them."""
    left = chunk()
    for number in range(1, MAX_FRUITLESS):
        left = without_route(left, f"w-{number}-00000001")
    assert (left.outcomes, len(left.no_route), left.fruitless) == ("....", MAX_FRUITLESS - 1, MAX_FRUITLESS - 1)
    assert without_route(left, "w-0-00000001").outcomes == "llll"


def test_attempt_without_a_route_ignores_names_that_an_older_release_left() -> None:
    """A replica of release 0.2 resets only `failed_by` on progress, so that a name that is not in it begins again."""
    left = without_route(chunk(failed_by=("w-2",), no_route=("w-1", "w-2", "w-3")), "w-1-00000001")
    assert (left.failures, left.failed_by, left.no_route) == (0, ("w-2", "w-1"), ("w-2", "w-1"))


def test_last_address_that_fails_alone_leaves_the_chunk_scanned() -> None:
    """Without another blank the chunk is scanned, and its check is requested at once."""
    held = in_state(ChunkState.RUNNING, outcomes="asd.", failures=MAX_FAILURES - 1)
    lost = after(held, report(ChunkFailed, "asd."))
    assert (lost.state, lost.outcomes, lost.ask_at) == (ChunkState.SCANNED, "asdl", None)


def run(left: Chunk, poison: Collection[int]) -> tuple[Chunk, int, float]:
    """Return the chunk after all attempts, their number, and the seconds of the pauses between them.

    An attempt finishes all of its addresses, or fails without any code where a poisoned address is in it.
    """
    seconds = 0.0
    for attempts in range(10_000):
        if left.state is ChunkState.SCANNED:
            return left, attempts, seconds
        size = min(left.blank, left.limit or left.blank)
        held = dispatch(left, "w-1", NOW, size=size, share=1.0, estimate=1.5)
        tried = [place for place in range(held.reach) if held.outcomes[place] == "."]
        token = {"attempt": held.attempt}
        if set(tried) & set(poison):
            left = after(held, report(ChunkFailed, held.outcomes, **token))
            seconds += (left.not_before - NOW).total_seconds() if left.not_before else 0.0
            continue
        done = "".join("s" if place in tried else code for place, code in enumerate(held.outcomes))
        left = after(held, report(ChunkReleased if "." in done else ChunkScanned, done, **token))
    raise AssertionError("the attempts do not end")


HALVINGS = 6  # of 64 addresses down to one


@given(st.sets(st.integers(0, 63)))
def test_hosts_that_crash_nmap_lose_only_themselves(poison: set[int]) -> None:
    """If any of 64 addresses crash every nmap that scans them, only these are lost, after few attempts and pauses for each."""
    scanned, attempts, pauses = run(chunk(outcomes="." * 64), poison)
    assert [place for place, code in enumerate(scanned.outcomes) if code == "l"] == sorted(poison)
    assert set(scanned.outcomes) <= {"s", "l"}
    assert attempts <= 1 + HALVINGS + len(poison) * (
        3 * HALVINGS + MAX_FAILURES
    )  # the limit grows again after the last one
    assert attempts <= MAX_FAILURES * 64 + 2 * HALVINGS
    assert pauses <= (2 + 4) * len(poison) + 2 * min(len(poison) * 2 * HALVINGS, 64)


@pytest.mark.parametrize(("size", "halvings"), [(64, HALVINGS), (512, 9)])
def test_chunk_of_which_every_address_fails_is_lost_within_bounds(size: int, halvings: int) -> None:
    """The chunk is halved once, and then three failures lose each address: 1,545 attempts and 51 minutes of pauses for 512."""
    scanned, attempts, pauses = run(chunk(outcomes="." * size), range(size))
    assert scanned.outcomes == "l" * size
    assert attempts == halvings + MAX_FAILURES * size
    assert pauses == 2 * halvings + (2 + 4) * size


def test_attempt_that_is_too_slow_is_halved_at_no_cost() -> None:
    """After an attempt that ran out of its time the next one gets half of what was left, at once and uncounted."""
    held = in_state(ChunkState.RUNNING, outcomes="." * 9, reach=9)
    changed = after(held, report(ChunkReleased, "a" + "." * 8, too_slow=True))
    assert (changed.state, changed.limit, changed.failures, changed.not_before) == (ChunkState.QUEUED, 4, 0, None)
    assert changed.failed_by == ()
    one = in_state(ChunkState.RUNNING, reach=1)
    assert after(one, report(ChunkReleased, "....", too_slow=True)).limit == 1


def test_attempt_that_is_too_slow_without_progress_goes_to_another_worker() -> None:
    """A worker that finished no address of the chunk in time does not get it again while another lives."""
    held = dispatch(chunk(), "w-1-00000001", NOW, size=4, share=1.0, estimate=1.5)
    changed = after(held, report(ChunkReleased, "....", too_slow=True, attempt=1, worker_id="w-1-00000001"))
    assert (changed.failed_by, changed.failures) == (("w-1",), 0)


def test_limit_doubles_after_each_success_and_is_then_removed() -> None:
    """After successful small attempts the next ones grow again, finally to the whole chunk."""
    left = chunk(outcomes="." * 32, limit=1)
    limits = []
    while left.limit:
        held = dispatch(left, "w-1", NOW, size=left.limit, share=1.0, estimate=1.5)
        done = "s" * held.reach + held.outcomes[held.reach :]
        left = after(held, report(ChunkReleased, done, attempt=held.attempt))
        limits.append(left.limit)
    assert limits == [2, 4, 8, 16, 0]


def test_release_before_the_limit_was_reached_keeps_it() -> None:
    """A drain in the middle of a limited attempt proves nothing about a larger one."""
    held = in_state(ChunkState.RUNNING, limit=2, reach=2)
    assert after(held, report(ChunkReleased, "a...")).limit == 2


def test_new_codes_reset_failures() -> None:
    """Failures and dispatches without progress count since the last progress, and failing instances since their own."""
    failed = {"failed_by": ("w-2", "w-1", "w-3"), "no_route": ("w-3",)}
    held = in_state(ChunkState.RUNNING, failures=2, fruitless=9, **failed)
    same = after(held, report(ChunkProgressed, "...."))
    assert (same.failures, same.failed_by, same.no_route, same.fruitless) == (2, ("w-2", "w-1", "w-3"), ("w-3",), 9)
    more = after(held, report(ChunkProgressed, "a..."))
    assert (more.failures, more.failed_by, more.no_route, more.fruitless) == (0, ("w-2", "w-3"), (), 0)


def test_chunk_visits_each_instance_whose_nmap_always_fails_once() -> None:
    """Instances that fail every attempt, always free and first in line, get a chunk once while a healthy one finishes it."""
    fleet = [Credit(f"w-{number}-00000001", f"w-{number}", slots=1, raw=True, partition=0) for number in (1, 2, 3)]
    left, takers = chunk(outcomes="." * 16), []
    while left.state is ChunkState.QUEUED:
        candidate = Candidate(left.id, 1, left.job_id, 1.5, needs_raw=False, failed_by=left.failed_by)
        [(_, worker, _)] = Round(fleet, {1: 0.0}, {}, fleet).picks({1: [candidate]})
        takers.append(worker.instance)
        held = dispatch(left, worker.worker_id, NOW, size=left.limit or 16, share=1.0, estimate=1.5)
        token = {"attempt": held.attempt, "worker_id": held.worker_id}
        if worker.instance != "w-3":
            left = after(held, report(ChunkFailed, held.outcomes, **token))
            continue
        done = "s" * held.reach + held.outcomes[held.reach :]
        left = after(held, report(ChunkReleased if "." in done else ChunkScanned, done, **token))
    assert takers == ["w-1", "w-2", "w-3", "w-3", "w-3"]
    assert left.outcomes == "s" * 16


def claimed(left: Chunk, worker: str) -> Chunk:
    """The chunk on its next attempt, which the worker has begun."""
    held = dispatch(left, worker, NOW, size=4, share=1.0, estimate=1.5)
    return after(held, report(ChunkClaimed, attempt=held.attempt, worker_id=worker))


def test_attempts_without_progress_count_as_failures() -> None:
    """A chunk begun and released 20 times without a code has failed once, and after three times so its addresses are lost."""
    left, dispatches = chunk(), 0
    while left.state is not ChunkState.SCANNED:
        assert dispatches < 1_000
        left = release(claimed(left, "w-1"), NOW)
        dispatches += 1
        assert left.failures == dispatches // MAX_FRUITLESS % MAX_FAILURES
    assert (left.outcomes, dispatches) == ("llll", MAX_FAILURES * MAX_FRUITLESS)
    assert "no progress" in left.reason


def test_release_without_progress_is_delayed_from_the_third_on() -> None:
    """A chunk without progress is not scanned again without a pause, and its addresses last for forty minutes."""
    left, now, pauses = in_state(ChunkState.QUEUED), NOW, []
    while left.failures == 0:
        held = replace(dispatch(left, "w-1", now, size=4, share=1.0, estimate=1.0), state=ChunkState.RUNNING)
        left = release(held, now)
        pauses.append((left.not_before - now).total_seconds() if left.not_before else 0.0)
        now = left.not_before or now
    assert pauses[:6] == [0, 0, 8, 16, 32, 60]
    assert set(pauses[6:-1]) == {60}
    assert MAX_FAILURES * sum(pauses) > 2_500


@pytest.mark.proves("F33", "G17")
@pytest.mark.parametrize("fruitless", [0, 10, MAX_FRUITLESS - 1])
def test_release_without_acknowledgements_is_delayed_and_loses_nothing(fruitless: int) -> None:
    """In an outage of any length the chunk is queued a minute after each attempt; at most six are dispatches without progress."""
    left, pauses = chunk(fruitless=fruitless), []
    for _ in range(MAX_FAILURES * MAX_FRUITLESS + 1):
        held = claimed(left, "w-1")
        left = after(held, report(ChunkReleased, "....", attempt=held.attempt, unacknowledged=True))
        pauses.append((left.not_before - NOW).total_seconds() if left.not_before else 0.0)
    assert (left.state, left.outcomes, left.failures) == (ChunkState.QUEUED, "....", 0)
    assert left.fruitless == max(fruitless, 6)
    assert pauses[:6] == ([0, 0, 8, 16, 32, 60] if not fruitless else [60] * 6)
    assert set(pauses[6:]) == {60}


@pytest.mark.parametrize(
    "begin", [claimed, lambda left, worker: dispatch(left, worker, NOW, size=4, share=1.0, estimate=1.5)]
)
def test_release_without_acknowledgements_goes_to_another_worker_from_the_third_on(
    begin: Callable[[Chunk, str], Chunk],
) -> None:
    """A worker that alone does not reach a broker does not keep the chunk, even if its claims are lost; an outage excludes none."""
    left, failed_by = chunk(), []
    for number in (1, 1, 1, 1, 2):
        held = begin(left, f"w-{number}-00000001")
        sent = report(ChunkReleased, "....", attempt=held.attempt, worker_id=held.worker_id, unacknowledged=True)
        left = after(held, sent)
        failed_by.append(left.failed_by)
    assert failed_by == [(), (), ("w-1",), ("w-1",), ("w-1", "w-2")]
    fleet = [Credit(f"w-{number}-00000001", f"w-{number}", slots=1, raw=True, partition=0) for number in (1, 2)]
    for names, taker in ((("w-1",), "w-2"), (left.failed_by, "w-1")):
        candidate = Candidate(left.id, 1, left.job_id, 1.5, needs_raw=False, failed_by=names)
        [(_, worker, _)] = Round(fleet, {1: 0.0}, {}, fleet).picks({1: [candidate]})
        assert worker.instance == taker


@pytest.mark.parametrize("fruitless", [0, 7, MAX_FRUITLESS])
def test_release_of_an_unclaimed_chunk_costs_nothing(fruitless: int) -> None:
    """A chunk that is released before it was begun counts neither a failure nor a dispatch without progress, however often."""
    left = chunk(fruitless=fruitless)
    for _ in range(MAX_FAILURES * MAX_FRUITLESS + 1):
        held = dispatch(left, "w-1", NOW, size=4, share=1.0, estimate=1.5)
        left = after(held, report(ChunkReleased, "....", attempt=held.attempt))
    assert (left.state, left.failures, left.fruitless) == (ChunkState.QUEUED, 0, fruitless)


def test_unclaimed_attempts_that_were_too_slow_count_as_dispatches_without_progress() -> None:
    """An attempt that timed out was begun, although its claim was lost."""
    left = in_state(ChunkState.DISPATCHED, fruitless=MAX_FRUITLESS)
    assert release(left, NOW, too_slow=True).failures == 1


def test_release_that_was_too_slow_and_unacknowledged_counts_as_too_slow() -> None:
    """A report with both causes neither repeats the chunk at once without limit nor is counted less."""
    held = in_state(ChunkState.RUNNING, fruitless=7)
    sent = report(ChunkReleased, "....", too_slow=True, unacknowledged=True)
    assert after(held, sent) == after(held, sent.model_copy(update={"unacknowledged": False}))
    assert release(replace(held, fruitless=MAX_FRUITLESS), NOW, too_slow=True, unacknowledged=True).failures == 1


def test_lost_lease_of_an_unclaimed_chunk_counts_no_failure() -> None:
    """A task that was not delivered, to any number of workers, costs no address, and the next one goes to another worker."""
    left = chunk()
    for number in range(MAX_FRUITLESS - 1):
        left = expire(dispatch(left, f"w-{number}-00000001", NOW, size=4, share=1.0, estimate=1.5), "no report", NOW)
        assert (left.state, left.failures, left.outcomes) == (ChunkState.QUEUED, 0, "....")
        assert left.failed_by[-1] == f"w-{number}"


def test_lost_lease_counts_once_for_each_worker_instance() -> None:
    """Leases lost by processes of one instance are one failure; three instances lose the addresses."""
    left = chunk()
    failures = []
    for worker in ("w-1-00000001", "w-1-00000002", "w-2-00000001", "w-1-00000003", "w-3-00000001"):
        left = expire(claimed(left, worker), "no report", NOW)
        failures.append(left.failures)
        assert left.not_before is None
    assert failures == [1, 1, 2, 2, 0]
    assert (left.state, left.outcomes) == (ChunkState.SCANNED, "llll")


@pytest.mark.parametrize(
    ("begin", "expected"),
    [("claimed", 1 + 2 * MAX_FRUITLESS), ("dispatched", MAX_FAILURES * MAX_FRUITLESS)],
)
def test_lost_leases_of_one_instance_are_bounded(begin: str, expected: int) -> None:
    """The addresses of a chunk that repeatedly kills its only worker are finally lost."""
    left, dispatches = chunk(), 0
    while left.state is not ChunkState.SCANNED:
        assert dispatches < 1_000
        worker = f"w-1-{dispatches:08x}"
        held = dispatch(left, worker, NOW, size=4, share=1.0, estimate=1.5)
        left = expire(claimed(left, worker) if begin == "claimed" else held, "no report", NOW)
        dispatches += 1
    assert (left.outcomes, dispatches) == ("llll", expected)


def test_lost_lease_after_the_last_letter_leaves_the_chunk_scanned() -> None:
    """A chunk whose map was full when its worker was lost needs a check, not a scan."""
    assert expire(in_state(ChunkState.RUNNING, outcomes="asdt"), "no report", NOW).state is ChunkState.SCANNED


# Time


@pytest.mark.parametrize("end", [ChunkReleased, ChunkScanned, ChunkFailed])
@pytest.mark.parametrize(("claimed", "counted"), [(1.5, 1.5), (1e6, 5.0)])
def test_slot_seconds_are_bounded_by_the_measured_time(end: type[Any], claimed: float, counted: float) -> None:
    """An attempt is charged at most the time since its dispatch, times its share, whatever its worker reports."""
    held = in_state(ChunkState.RUNNING, share=0.5, seconds=2.0)
    assert elapsed(held, NOW) == pytest.approx(5.0)
    assert after(held, report(end, slot_seconds=claimed)).seconds == pytest.approx(2.0 + counted)


LOST: dict[str, Callable[[Chunk], Chunk]] = {
    "stored": lambda held: store(held, "asdt", NOW),
    "expired": lambda held: expire(held, "no report", NOW),
    "incomplete": lambda held: incomplete(held, 2, ["127.9.8.0"], NOW),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
@pytest.mark.parametrize("state", sorted(HELD))
@pytest.mark.parametrize(("estimate", "counted"), [(60.0, 5.0), (4.0, 2.0)])
def test_slot_seconds_of_an_attempt_without_a_final_report_are_counted_up_to_its_estimate(
    lose: Callable[[Chunk], Chunk], state: ChunkState, estimate: float, counted: float
) -> None:
    """A verdict that overtakes the report, and an expired lease after progress, count the measured time times the share."""
    held = in_state(state, share=0.5, seconds=2.0, attempt_estimate=estimate)
    assert lose(held).seconds == pytest.approx(2.0 + counted)


def test_slot_seconds_of_an_expired_attempt_without_progress_are_not_counted() -> None:
    """They are those of the lost worker, and would make the job's later chunks seem longer."""
    assert expire(in_state(ChunkState.RUNNING, fruitless=1, attempt_estimate=60.0), "no report", NOW).seconds == 0.0


def test_elapsed_is_never_negative() -> None:
    """An attempt that was never dispatched, or in the future, has taken nothing."""
    assert elapsed(chunk(), NOW) == 0.0
    assert elapsed(in_state(ChunkState.RUNNING, dispatched_at=NOW + timedelta(seconds=1)), NOW) == 0.0


def test_elapsed_since_a_time_excludes_earlier_seconds() -> None:
    """Of an attempt from before that time only the seconds after it count; of a later one all."""
    held = in_state(ChunkState.RUNNING, share=0.5)
    assert elapsed(held, NOW, NOW - timedelta(seconds=4)) == 2.0
    assert elapsed(held, NOW, THEN - timedelta(hours=1)) == 5.0


def test_questions_to_result_store_double_their_pause_up_to_five_minutes() -> None:
    """Each repeated question waits twice as long as the one before, five minutes at most, however often it is repeated."""
    asked = in_state(ChunkState.SCANNED, outcomes="asdt")
    pauses = []
    for _ in range(100):
        asked = request_check(asked, NOW, PATIENCE)
        assert asked.ask_at is not None
        pauses.append((asked.ask_at - NOW).total_seconds())
    assert pauses[:4] == [60, 120, 240, 300]
    assert set(pauses[4:]) == {300}
    damaged = request_check(replace(asked, asked=2_000), NOW, PATIENCE)
    assert damaged.ask_at == asked.ask_at


@pytest.mark.parametrize("state", sorted(set(ChunkState) - {ChunkState.SCANNED}))
def test_check_is_requested_only_for_scanned_chunks(state: ChunkState) -> None:
    """A chunk that is not scanned does not change."""
    assert request_check(in_state(state), NOW, PATIENCE) == in_state(state)


# Result-store


@pytest.mark.parametrize("state", sorted(NOT_FINAL))
def test_stored_of_any_attempt_ends_the_chunk(state: ChunkState) -> None:
    """ChunkStored ends every chunk that is not final, with the map that the stored hosts prove."""
    changed = store(in_state(state, outcomes="s..x"), "asdx", NOW)
    assert (changed.state, changed.outcomes) == (ChunkState.STORED, "asdx")


def test_stored_changes_no_final_state() -> None:
    """A final chunk does not change, except that a cancelled one still takes the map of its stored results."""
    for state in (ChunkState.STORED, ChunkState.FAILED):
        assert store(in_state(state, outcomes="s..."), "asdt", NOW) == in_state(state, outcomes="s...")
    changed = store(in_state(ChunkState.CANCELLED, outcomes="s..."), "asdt", NOW)
    assert (changed.state, changed.outcomes) == (ChunkState.CANCELLED, "asdt")


@pytest.mark.parametrize("outcomes", ["asd", "asdtt", "asd.", "axdt", "asdt"])
def test_stored_with_an_invalid_map_is_ignored(outcomes: str) -> None:
    """A ChunkStored with blanks, or with other addresses excluded than the chunk's, is ignored."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asxt")
    assert store(scanned, outcomes, NOW) == scanned


def test_missing_results_make_addresses_blank_again() -> None:
    """ChunkIncomplete blanks the addresses named and counts as a failure; excluded and foreign ones are left alone."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asxt", ask_at=NOW)
    again = incomplete(scanned, 2, ["127.9.8.1", "127.9.8.2", "127.9.8.9", "127.9.7.255"], NOW)
    assert (again.state, again.outcomes, again.failures) == (ChunkState.QUEUED, "a.xt", 1)
    assert (again.unstored, again.not_before) == (1, NOW + timedelta(seconds=2))
    assert "results" in again.reason
    last = incomplete(replace(scanned, failures=MAX_FAILURES - 1), 2, ["127.9.8.0"], NOW)
    assert (last.state, last.outcomes) == (ChunkState.SCANNED, "lsxt")


def test_results_missing_at_three_checks_lose_their_addresses() -> None:
    """The third check that misses results loses the addresses that it names, whatever was scanned between the checks."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asxt", unstored=MAX_FAILURES - 1)
    lost = incomplete(scanned, 2, ["127.9.8.1", "127.9.8.2"], NOW)
    assert (lost.state, lost.outcomes, lost.ask_at, lost.not_before) == (ChunkState.SCANNED, "alxt", None, None)
    more = incomplete(in_state(ChunkState.RUNNING, unstored=MAX_FAILURES), 2, ["127.9.8.1"], NOW)
    assert (more.state, more.outcomes, more.unstored) == (ChunkState.QUEUED, ".l..", MAX_FAILURES)


@pytest.mark.parametrize("state", sorted(HELD))
def test_incomplete_before_its_report_requeues_the_chunk(state: ChunkState) -> None:
    """ChunkIncomplete that overtakes its ChunkScanned queues the chunk under the current attempt; the report is stale."""
    again = incomplete(in_state(state), 2, ["127.9.8.1"], NOW)
    assert (again.state, again.outcomes, again.failures) == (ChunkState.QUEUED, "....", 1)
    assert not holds(again, report(ChunkScanned, "asdt"))


def test_missing_results_count_only_for_their_attempt() -> None:
    """ChunkIncomplete of another attempt, of a chunk that is not scanned, or without addresses is ignored."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asdt")
    assert incomplete(scanned, 1, ["127.9.8.0"], NOW) == scanned
    assert incomplete(scanned, 3, ["127.9.8.0"], NOW) == scanned
    assert incomplete(scanned, 2, [], NOW) == scanned
    for state in set(ChunkState) - HELD - {ChunkState.SCANNED}:
        other = in_state(state, outcomes="asdt")
        assert incomplete(other, 2, ["127.9.8.0"], NOW) == other


def test_cancelled_chunk_takes_the_late_report_of_its_holder() -> None:
    """Work before the cancel is in the ledger; other tokens, claims and states change nothing."""
    cancelled = cancel(in_state(ChunkState.RUNNING))
    assert late_report(cancelled, report(ChunkReleased), NOW).outcomes == "as.."
    assert late_report(cancelled, report(ChunkReleased), NOW).state is ChunkState.CANCELLED
    assert late_report(cancelled, report(ChunkReleased, attempt=1), NOW) == cancelled
    assert late_report(cancelled, report(ChunkProgressed), NOW).outcomes == "as.."
    assert late_report(cancelled, report(ChunkClaimed), NOW) == cancelled
    queued = in_state(ChunkState.QUEUED)
    assert late_report(queued, report(ChunkReleased), NOW) == queued


# Any order

MAPS = st.text(LETTERS + ".", min_size=4, max_size=4)
STEPS = st.one_of(
    st.tuples(st.just("dispatch"), st.sampled_from(["w-1", "w-2", "w-1-0000000a"]), st.integers(1, 4)),
    st.tuples(st.just("report"), st.sampled_from(REPORTS), MAPS),
    st.tuples(st.just("too_slow"), st.just(ChunkReleased), MAPS),
    st.tuples(st.just("unacknowledged"), st.just(ChunkReleased), MAPS),
    st.tuples(st.just("no_route"), st.just(ChunkFailed), MAPS),
    st.tuples(st.just("expire"), st.just(""), st.just("")),
    st.tuples(st.just("incomplete"), st.just(""), st.sets(st.integers(0, 3))),
)


def step(left: Chunk, kind: str, what: Any, news: Any) -> Chunk:
    token = {"attempt": left.attempt, "worker_id": left.worker_id}
    match kind:
        case "dispatch" if left.state is ChunkState.QUEUED:
            return dispatch(left, what, THEN, size=news, share=0.5, estimate=1.5)
        case "report" if left.state in HELD:
            return after(left, report(what, news, **token))
        case "too_slow" | "unacknowledged" | "no_route" if left.state in HELD:
            return after(left, report(what, news, **{kind: True}, **token))
        case "expire" if left.state in HELD:
            return expire(left, "no report", NOW)
        case "incomplete":
            return incomplete(left, left.attempt, [f"127.9.8.{place}" for place in news], NOW)
    return left


def stored_in_the_end(left: Chunk, never: Collection[int]) -> Chunk:
    """Attempts that find every host, and checks of a result-store that misses the hosts at some indexes each time."""
    for _ in range(2 * MAX_FAILURES):
        if left.state is ChunkState.QUEUED:
            left = dispatch(left, "w-1", NOW, size=4, share=1.0, estimate=1.5)
        if left.state in HELD:
            done = left.outcomes.replace(".", "a")
            left = after(left, report(ChunkScanned, done, attempt=left.attempt, worker_id=left.worker_id))
        if missing := [f"127.9.8.{place}" for place in never if left.outcomes[place] in WITH_HOST]:
            left = incomplete(left, left.attempt, missing, NOW)
        else:
            left = store(left, left.outcomes, NOW)
    return left


@given(st.lists(STEPS, max_size=60), st.sets(st.integers(0, 3)))
def test_chunk_is_consistent_in_any_order_of_events(steps: list[tuple[str, Any, Any]], never: set[int]) -> None:
    """A queued chunk has something to scan, a scanned one nothing; counts and times stay within bounds; the chunk can be stored."""
    left = chunk()
    for kind, what, news in steps:
        before, left = left, step(left, kind, what, news)
        assert left.attempt >= before.attempt
        assert 0 <= left.seconds - before.seconds <= (elapsed(before, NOW) if before.state in HELD else 0.0)
        assert left.not_before is None or left.not_before <= NOW + MAX_DELAY
        assert left.state is not ChunkState.QUEUED or left.blank
        assert left.state is not ChunkState.SCANNED or not left.blank
        assert 0 <= left.failures < MAX_FAILURES
        assert 0 <= left.fruitless <= MAX_FRUITLESS
        assert 0 <= left.limit <= len(left.outcomes)
        assert len(left.failed_by) == len(set(left.failed_by))
        assert set(left.no_route) <= set(left.failed_by)
        assert 0 <= left.unstored <= MAX_FAILURES
    assert stored_in_the_end(left, never).state is ChunkState.STORED
