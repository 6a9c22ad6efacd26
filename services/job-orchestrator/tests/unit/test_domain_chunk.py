"""The life of a chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_orchestrator.domain import chunk as rules
from job_orchestrator.domain.chunk import (
    HELD,
    MAX_FAILURES,
    OPEN,
    TABLE,
    Chunk,
    ChunkState,
    ChunkTrigger,
    IllegalChunkChangeError,
    WorkerReport,
    cancel,
    dispatch,
    fault,
    give_back,
    hear,
    holds,
    incomplete,
    last_words,
    settle_charge,
    store,
)
from job_orchestrator.testing import chunk
from job_orchestrator.testing.things import THEN
from scanfleet.messages import ChunkClaimed, ChunkFailed, ChunkProgressed, ChunkReleased, ChunkScanned

FINAL = (ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED)
NOT_FINAL = tuple(state for state in ChunkState if state not in FINAL)
LETTERS = "asdtr"


def in_state(state: ChunkState, **changed: Any) -> Chunk:
    """A chunk under attempt 2 of worker w-1."""
    fields = {"attempt": 2, "worker_id": "w-1", "partition": 5, "charged": 0.5}
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


REPORTS = (ChunkClaimed, ChunkProgressed, ChunkReleased, ChunkScanned, ChunkFailed)

# How each trigger is pulled, and the chunk it needs to end in each of the states that the table names.
PULL = {
    ChunkTrigger.DISPATCH: lambda c: dispatch(c, "w-2", 3),
    ChunkTrigger.CLAIM: lambda c: hear(c, report(ChunkClaimed), 5, THEN),
    ChunkTrigger.SCAN: lambda c: hear(c, report(ChunkScanned, "asdt"), 5, THEN),
    ChunkTrigger.GIVE_BACK: lambda c: give_back(c, "r"),
    ChunkTrigger.FAULT: lambda c: fault(c, "r"),
    ChunkTrigger.STORE: lambda c: rules._move(c, ChunkTrigger.STORE, ChunkState.STORED),
    ChunkTrigger.CANCEL: cancel,
}
CHUNKS: list[dict[str, Any]] = [{}, {"outcomes": "asdt"}, {"failures": MAX_FAILURES - 1}]


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("trigger", ChunkTrigger)
def test_the_table_decides_every_change(state: ChunkState, trigger: ChunkTrigger) -> None:
    """Pulling a trigger leads to the states that the table names, to all of them, and to no other; else it raises."""
    ends = set[ChunkState]()
    for fields in CHUNKS:
        before = in_state(state, **fields)
        try:
            ends.add(PULL[trigger](before).state)
        except IllegalChunkChangeError as error:
            assert f"it is {state}" in str(error)  # noqa: PT017 # whether it raises is what is asked
    claimed_already = trigger is ChunkTrigger.CLAIM and state is ChunkState.RUNNING
    assert ends - ({state} if claimed_already else set()) == TABLE[state].get(trigger, frozenset())


def test_the_states_are_sorted_into_open_held_and_final() -> None:
    """Only final states have no way out, and workers hold what is dispatched or running."""
    assert set(NOT_FINAL) == OPEN
    assert {ChunkState.DISPATCHED, ChunkState.RUNNING} == HELD


def test_a_dispatch_is_a_new_token() -> None:
    """A dispatched chunk has the next attempt, its worker and partition, and its user is charged the estimate."""
    sent = dispatch(chunk(attempt=4, worker_id="old"), "w-2", 3)
    assert (sent.state, sent.attempt, sent.worker_id, sent.partition) == (ChunkState.DISPATCHED, 5, "w-2", 3)
    assert sent.charged == sent.estimate


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("kind", REPORTS)
def test_only_the_current_token_of_a_held_chunk_is_heard(state: ChunkState, kind: type[WorkerReport]) -> None:
    """A report counts if a worker holds the chunk and attempt, worker and job are the chunk's; no other does."""
    held = in_state(state)
    assert holds(held, report(kind)) is (state in HELD)
    for stale in ({"attempt": 1}, {"attempt": 3}, {"worker_id": "w-2"}, {"job_id": 2}):
        assert not holds(held, report(kind, **stale))


@pytest.mark.parametrize("state", sorted(HELD))
@pytest.mark.parametrize("kind", [ChunkClaimed, ChunkProgressed])
def test_any_sign_of_life_is_a_claim(state: ChunkState, kind: type[WorkerReport]) -> None:
    """A dispatched chunk runs from its holder's first sign of life, in the partition where it was read."""
    heard = hear(in_state(state, partition=3), report(kind), 5, THEN)
    assert (heard.state, heard.partition) == (ChunkState.RUNNING, 5)


@pytest.mark.parametrize("kind", [kind for kind in REPORTS if kind is not ChunkClaimed])
def test_the_first_letter_stays(kind: type[WorkerReport]) -> None:
    """Whatever a report's map says, letters that are set stay and blanks are filled."""
    heard = hear(in_state(ChunkState.RUNNING, outcomes="d.x."), report(kind, "aaxa"), 5, THEN)
    assert heard.outcomes == "daxa"


@pytest.mark.parametrize("news", ["aaa", "aaaaa", "aaxa", "aaaa", "xxxx"])
def test_a_map_of_another_chunk_says_nothing(news: str) -> None:
    """A map of another length, or with other addresses excluded, is not merged."""
    held = in_state(ChunkState.RUNNING, outcomes="d..x")
    assert hear(held, report(ChunkProgressed, news), 5, THEN).outcomes == "d..x"


@given(
    first=st.text(LETTERS + ".", min_size=4, max_size=4), news=st.lists(st.text(LETTERS + ".", min_size=4, max_size=4))
)
def test_no_order_of_reports_takes_a_letter_back(first: str, news: list[str]) -> None:
    """A letter that is set is the same for ever."""
    held = in_state(ChunkState.RUNNING, outcomes=first)
    for outcomes in news:
        after = hear(held, report(ChunkProgressed, outcomes), 5, THEN)
        assert all(new == old for old, new in zip(held.outcomes, after.outcomes, strict=True) if old != ".")
        held = after


@pytest.mark.parametrize("state", sorted(HELD))
def test_a_chunk_without_blanks_is_scanned(state: ChunkState) -> None:
    """ChunkScanned of a full map ends the attempt; result-store was asked now, and how it was scanned is noted."""
    heard = hear(in_state(state), report(ChunkScanned, "asdt"), 5, THEN)
    assert (heard.state, heard.outcomes, heard.technique, heard.scanned_at) == (ChunkState.SCANNED, "asdt", "syn", THEN)
    assert heard.failures == 0


def test_why_addresses_were_refused_is_kept() -> None:
    """The reason of a ChunkScanned is the chunk's."""
    heard = hear(in_state(ChunkState.RUNNING), report(ChunkScanned, "rrrr", reason="needs raw packets"), 5, THEN)
    assert heard.reason == "needs raw packets"


def test_scanned_with_blanks_left_is_a_fault() -> None:
    """A worker that calls a chunk scanned and leaves addresses out has failed once."""
    heard = hear(in_state(ChunkState.RUNNING), report(ChunkScanned, "asd."), 5, THEN)
    assert (heard.state, heard.outcomes, heard.failures) == (ChunkState.QUEUED, "asd.", 1)


@pytest.mark.parametrize("state", sorted(HELD))
def test_a_release_costs_nothing(state: ChunkState) -> None:
    """A released chunk is queued again with what was done, without a failure, however often."""
    held = in_state(state, failures=MAX_FAILURES - 1)
    heard = hear(held, report(ChunkReleased), 5, THEN)
    assert (heard.state, heard.outcomes, heard.failures) == (ChunkState.QUEUED, "as..", MAX_FAILURES - 1)


@pytest.mark.parametrize("end", [ChunkReleased, ChunkFailed])
def test_with_no_blank_left_there_is_nothing_to_scan_again(end: type[WorkerReport]) -> None:
    """A chunk that was given up with every letter set is scanned, and result-store is to be asked at once."""
    held = in_state(ChunkState.RUNNING, failures=MAX_FAILURES - 1, scanned_at=THEN)
    heard = hear(held, report(end, "asdt"), 5, THEN)
    assert (heard.state, heard.outcomes, heard.scanned_at) == (ChunkState.SCANNED, "asdt", None)


def test_three_failures_make_a_chunk_failed() -> None:
    """Failures queue a chunk again until the third, which ends it with its reason; the map is kept."""
    held = in_state(ChunkState.RUNNING)
    for number in range(1, MAX_FAILURES):
        again = hear(held, report(ChunkFailed), 5, THEN)
        assert (again.state, again.failures, again.reason) == (ChunkState.QUEUED, number, "because")
        held = replace(again, state=ChunkState.RUNNING)
    failed = hear(held, report(ChunkFailed, "as.d", reason="at last"), 5, THEN)
    assert (failed.state, failed.failures, failed.reason) == (ChunkState.FAILED, MAX_FAILURES, "at last")
    assert failed.outcomes == "as.d"


@pytest.mark.parametrize("state", sorted(NOT_FINAL))
def test_stored_is_a_fact_from_any_attempt(state: ChunkState) -> None:
    """ChunkStored ends every chunk that is not final, with the map that the stored hosts prove."""
    after = store(in_state(state, outcomes="s..x"), "asdx")
    assert (after.state, after.outcomes) == (ChunkState.STORED, "asdx")


def test_stored_changes_no_final_state() -> None:
    """A final chunk stays as it is; only a cancelled one still learns what can be read of it."""
    for state in (ChunkState.STORED, ChunkState.FAILED):
        assert store(in_state(state, outcomes="s..."), "asdt") == in_state(state, outcomes="s...")
    after = store(in_state(ChunkState.CANCELLED, outcomes="s..."), "asdt")
    assert (after.state, after.outcomes) == (ChunkState.CANCELLED, "asdt")


@pytest.mark.parametrize("outcomes", ["asd", "asdtt", "asd.", "axdt", "asdt"])
def test_a_map_that_cannot_be_the_chunks_stores_nothing(outcomes: str) -> None:
    """A ChunkStored with blanks, or with another frame than the chunk's, is ignored."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asxt")
    assert store(scanned, outcomes) == scanned


def test_missing_results_make_addresses_blank_again() -> None:
    """ChunkIncomplete blanks the addresses named and counts as a failure; excluded and foreign ones are left alone."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asxt", scanned_at=THEN)
    after = incomplete(scanned, 2, ["127.9.8.1", "127.9.8.2", "127.9.8.9", "127.9.7.255"])
    assert (after.state, after.outcomes, after.failures) == (ChunkState.QUEUED, "a.xt", 1)
    assert "results" in after.reason
    last = incomplete(replace(scanned, failures=MAX_FAILURES - 1), 2, ["127.9.8.0"])
    assert (last.state, last.outcomes) == (ChunkState.FAILED, ".sxt")


def test_word_of_missing_results_counts_only_for_the_scan_it_is_about() -> None:
    """ChunkIncomplete of another attempt, of a chunk that is not scanned, or that names nothing, changes nothing."""
    scanned = in_state(ChunkState.SCANNED, outcomes="asdt")
    assert incomplete(scanned, 1, ["127.9.8.0"]) == scanned
    assert incomplete(scanned, 2, []) == scanned
    for state in set(ChunkState) - {ChunkState.SCANNED}:
        other = in_state(state, outcomes="asdt")
        assert incomplete(other, 2, ["127.9.8.0"]) == other


def test_a_cancelled_chunk_hears_the_last_words_of_its_holder() -> None:
    """What was done before the cancel is in the ledger; strangers, claims and chunks that are not cancelled say nothing."""
    cancelled = cancel(in_state(ChunkState.RUNNING))
    assert last_words(cancelled, report(ChunkReleased)).outcomes == "as.."
    assert last_words(cancelled, report(ChunkReleased)).state is ChunkState.CANCELLED
    assert last_words(cancelled, report(ChunkReleased, attempt=1)) == cancelled
    assert last_words(cancelled, report(ChunkClaimed)) == cancelled
    queued = in_state(ChunkState.QUEUED)
    assert last_words(queued, report(ChunkReleased)) == queued


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("end", [ChunkReleased, ChunkScanned, ChunkFailed])
def test_the_end_of_an_attempt_corrects_the_charge_once(state: ChunkState, end: type[WorkerReport]) -> None:
    """Whatever became of the chunk meanwhile, its holder's end says what the attempt really took, and only once."""
    settled, correction = settle_charge(in_state(state), report(end))
    assert correction == pytest.approx(1.5 - 0.5)
    assert settle_charge(settled, report(end)) == (settled, 0.0)


def test_only_an_end_of_the_current_token_corrects_the_charge() -> None:
    """Signs of life and stale ends leave the charge alone."""
    held = in_state(ChunkState.RUNNING)
    for each in (report(ChunkClaimed), report(ChunkProgressed), report(ChunkScanned, attempt=1)):
        assert settle_charge(held, each) == (held, 0.0)
