"""What became of every probe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import MAX_FAILURES, Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import ACCOUNTED, NAMES, Names, NotProbed, Tally
from job_orchestrator.testing import chunk, scan_job, scan_policy
from scanfleet.messages import JobStatus
from scanfleet.outcomes import Outcome

LETTERS = [letter for letter in Outcome if letter is not Outcome.EXCLUDED]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[ScanJob, list[Chunk]]:
    """A job in any status, its chunks in any state that may go with it, with any letters."""
    exclude = draw(st.sampled_from([(), ("127.9.8.4/30",), ("127.9.8.0/29", "127.9.8.8/32")]))
    ports = draw(st.sampled_from(["22,80", "1-20000"]))
    job = scan_job(cidr="127.9.8.0/28", exclude=exclude, policy=scan_policy(ports=ports))
    job = replace(job, status=draw(st.sampled_from(JobStatus)), chunk_addresses=8)
    chunks = []
    for each in plan.chunks(job, 0):
        letters = [
            letter if letter == Outcome.EXCLUDED else draw(st.sampled_from(LETTERS)).value for letter in each.outcomes
        ]
        state = draw(st.sampled_from(ChunkState))
        outcomes = "".join(letters)
        if state is ChunkState.STORED:
            outcomes = outcomes.replace(".", "d")
        if state is ChunkState.FAILED and "." not in outcomes:
            state = ChunkState.SCANNED
        chunks.append(replace(each, outcomes=outcomes, state=state, reason="nmap died"))
    return job, chunks


def tally(job: ScanJob, chunks: list[Chunk]) -> Tally:
    result = Tally(job)
    for each in chunks:
        result.add(each)
    return result


def names(job: ScanJob, chunks: list[Chunk], skip: int = 0, size: int = 1_000) -> Names:
    result = Names(job, skip, size)
    for each in chunks:
        result.add(each)
    return result


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_the_ledger_sums_to_the_request_whatever_happened(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """Counts by outcome add up to addresses × ports, and none is negative."""
    job, chunks = given_
    counts = tally(job, chunks).counts
    assert list(counts) == list(NAMES)
    assert sum(counts.values()) == job.addresses * job.ports
    assert min(counts.values()) >= 0


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_what_is_not_accounted_for_has_a_reason(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """When every chunk is final either all is accounted for, or the error says how many addresses are not."""
    job, chunks = given_
    over = [each for each in chunks if each.state in {ChunkState.STORED, ChunkState.FAILED}]
    if len(over) < len(chunks):
        return
    told = tally(replace(job, status=JobStatus.RUNNING), chunks)
    assert told.accounted is (told.error == "")
    assert told.accounted is (sum(told.counts[name] for name in ACCOUNTED) == job.addresses * job.ports)


@settings(max_examples=200, deadline=None)
@given(jobs(), st.integers(0, 40), st.integers(1, 10))
def test_pages_of_names_are_cuts_of_one_list(given_: tuple[ScanJob, list[Chunk]], skip: int, size: int) -> None:
    """Any page is what the whole list has there, and the total is the list's length whatever the page."""
    job, chunks = given_
    whole = names(job, chunks)
    page = names(job, chunks, skip, size)
    assert page.page == whole.page[skip : skip + size]
    assert page.total == whole.total == len(whole.page)


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_names_are_of_what_the_counts_count(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """Each outcome that is named is named as often as the counts say: by address where excluded, else by port block."""
    job, chunks = given_
    told = names(job, chunks)
    counts = tally(job, chunks).counts
    ports = {each.ports: each.port_count for each in chunks} | {job.policy.ports: job.ports}
    for outcome in ("down", "timed_out", "excluded", "refused", "cancelled", "lost"):
        assert sum(ports[each.ports] for each in told.page if each.outcome == outcome) == counts[outcome]
    assert {each.outcome for each in told.page} <= set(counts) - {"answered", "silent", "waiting"}


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_progress_is_99_at_most(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """The ledger never says 100: only completion does."""
    assert 0 <= tally(*given_).progress <= 99


def test_machines_are_counted_once_over_port_blocks() -> None:
    """An address that answers in three port blocks is one machine; another slice's are others."""
    job = scan_job(cidr="127.9.8.0/29", policy=scan_policy(ports="1-20000"))
    blocks = [
        chunk(id=f"1-{index}", index=index, outcomes=outcomes, ports=ports, first_address=first)
        for index, (first, ports, outcomes) in enumerate(
            [
                ("127.9.8.0", "1-8192", "aa.s"),
                ("127.9.8.0", "8193-16384", "as.a"),
                ("127.9.8.0", "16385-20000", "...."),
                ("127.9.8.4", "1-8192", "aaad"),
            ],
        )
    ]
    assert tally(job, blocks).machines_found == 3 + 3


def test_progress_is_weighted_by_ports() -> None:
    """A block of few ports moves progress less than one of many; what is excluded is not waited for."""
    job = scan_job(cidr="127.9.8.0/30", exclude=("127.9.8.3/32",), policy=scan_policy(ports="1-10000"))
    job = replace(job, chunk_addresses=4)
    large, small = plan.chunks(job, 0)
    assert (large.port_count, small.port_count) == (8_192, 1_808)
    done = "sssx"
    assert tally(job, [large, replace(small, outcomes=done)]).progress == 18
    assert tally(job, [replace(large, outcomes=done), small]).progress == 81
    assert tally(job, [replace(large, outcomes=done), replace(small, outcomes=done)]).progress == 99


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([("asdt", ChunkState.STORED, "")], ""),
        ([("as.t", ChunkState.FAILED, "nmap died")], "1 address lost: nmap died"),
        ([("rrr.", ChunkState.FAILED, "")], "3 addresses refused and 1 address lost"),
        (
            [("....", ChunkState.FAILED, "a"), ("...s", ChunkState.FAILED, "b"), ("rrss", ChunkState.STORED, "a")],
            "2 addresses refused and 7 addresses lost: a; b",
        ),
        ([("....", ChunkState.FAILED, text) for text in "abcde"], "20 addresses lost: a; b; c"),
    ],
)
def test_the_error_says_how_many_and_why(chunks: list[tuple[str, ChunkState, str]], error: str) -> None:
    """A failed job's error counts the addresses refused and lost, and gives the first reasons, each once."""
    job = scan_job(cidr="127.9.8.0/24")
    made = [
        chunk(
            id=f"1-{n}",
            index=n,
            first_address=f"127.9.8.{4 * n}",
            outcomes=outcomes,
            state=state,
            reason=reason,
            failures=MAX_FAILURES,
        )
        for n, (outcomes, state, reason) in enumerate(chunks)
    ]
    assert tally(job, made).error == error


def test_an_error_is_no_longer_than_one_reads() -> None:
    """nmap may say a lot; the job's error is cut."""
    assert len(tally(scan_job(), [chunk(state=ChunkState.FAILED, reason="x" * 5_000)]).error) == 1_000


def test_names_say_where_what_and_why() -> None:
    """Excluded addresses come first with all ports, then each chunk's, with the chunk's reason for those that failed."""
    job = scan_job(cidr="127.9.8.0/29", exclude=("127.9.8.6/31",))
    chunks = [
        chunk(outcomes="asdt", state=ChunkState.STORED),
        chunk(
            id="1-1", index=1, first_address="127.9.8.4", outcomes="r.xx", state=ChunkState.FAILED, reason="nmap died"
        ),
    ]
    assert names(job, chunks).page == [
        NotProbed("127.9.8.6", "22,80", "excluded", ""),
        NotProbed("127.9.8.7", "22,80", "excluded", ""),
        NotProbed("127.9.8.2", "22,80", "down", ""),
        NotProbed("127.9.8.3", "22,80", "timed_out", ""),
        NotProbed("127.9.8.4", "22,80", "refused", "nmap died"),
        NotProbed("127.9.8.5", "22,80", "lost", "nmap died"),
    ]


def test_what_a_cancelled_job_left_is_cancelled() -> None:
    """Blanks of a cancelled job are cancelled, whatever state their chunks are still in; of a running job they wait."""
    cancelled = replace(scan_job(), status=JobStatus.CANCELLED)
    assert tally(cancelled, [chunk(outcomes="as..")]).counts["cancelled"] == 4
    assert tally(replace(cancelled, status=JobStatus.RUNNING), [chunk(outcomes="as..")]).counts["waiting"] == 4
