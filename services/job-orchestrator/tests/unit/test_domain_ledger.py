"""The ledger: the outcome of every probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_orchestrator.domain import ledger, plan
from job_orchestrator.domain.chunk import MAX_FAILURES, Chunk, ChunkState, store
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import ACCOUNTED, NAMES, NotProbed, RunningCount, Tally, UnprobedPage
from job_orchestrator.domain.totals import EMPTY
from job_orchestrator.repository import documents
from job_orchestrator_testing import chunk, replanned, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import JobStatus
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Target

LETTERS: list[Outcome] = [code for code in Outcome if code is not Outcome.EXCLUDED]
FEW_LISTED: list[Outcome] = [Outcome.LOST, *[Outcome.SILENT] * 15]


def cut(*, exclude: tuple[str, ...] = (), ports: str = "22,80", size: int = 8) -> ScanJob:
    """A /28 in slices of so many addresses and blocks of 8,192 ports, all of its chunks made."""
    job = scan_job(cidr="127.9.8.0/28", exclude=exclude, policy=scan_policy(ports=ports))
    of_job = job.policy.port_set
    blocks = -(-of_job.tcp_count // 8_192) + -(-of_job.udp_count // 8_192)
    job = replanned(job, chunk_addresses=size, chunk_ports=8_192, blocks=blocks)
    excluded = {position for hole in Target.parse(job.cidr, exclude).holes for position in range(*hole)}
    slices = {position // size for position in set(range(16)) - excluded}
    count = len(slices) * job.plan.blocks
    return replace(replanned(job, chunk_count=count), made=count)


def whole(job: ScanJob) -> list[Chunk]:
    return list(plan.chunks(job, 0, job.plan.chunk_count))


@st.composite
def jobs(draw: st.DrawFn, size: int = 8) -> tuple[ScanJob, list[Chunk]]:
    """A job in any status, its chunks in any state that may go with it, with any codes."""
    job = cut(
        exclude=draw(st.sampled_from([(), ("127.9.8.4/30",), ("127.9.8.0/29", "127.9.8.8/32")])),
        ports=draw(st.sampled_from(["22,80", "1-20000"])),
        size=size,
    )
    letters = draw(st.sampled_from([LETTERS, FEW_LISTED]))
    job = replace(job, status=draw(st.sampled_from(JobStatus)))
    chunks = []
    for each in whole(job):
        codes = [code if code == Outcome.EXCLUDED else draw(st.sampled_from(letters)).value for code in each.outcomes]
        state = draw(st.sampled_from(ChunkState))
        outcomes = "".join(codes)
        if state is ChunkState.STORED:
            outcomes = outcomes.replace(".", "d")
        if state is ChunkState.FAILED and "." not in outcomes:
            state = ChunkState.SCANNED
        if state is ChunkState.CANCELLED and not job.final:
            state = ChunkState.QUEUED
        chunks.append(replace(each, outcomes=outcomes, state=state, reason="nmap died"))
    return job, chunks


def tally(job: ScanJob, chunks: list[Chunk]) -> Tally:
    result = Tally(job)
    for each in chunks:
        result.add(each)
    return result


def names(job: ScanJob, chunks: list[Chunk], skip: int = 0, size: int = 1_000) -> UnprobedPage:
    result = UnprobedPage(job, size, skip=skip)
    for each in chunks:
        result.add(each)
    return result


def counted(job: ScanJob, chunks: list[Chunk], done: int) -> tuple[ScanJob, list[Chunk]]:
    """The job with the first `done` chunks in its totals, all of which have ended."""
    ended = [
        each
        if each.state in {ChunkState.FAILED, ChunkState.CANCELLED}
        else store(replace(each, state=ChunkState.SCANNED), codes, THEN)
        for each in chunks[:done]
        for codes in (each.outcomes.replace(".", "d"),)
    ]
    step = Tally(job)
    for each in ended:
        step.end(each)
    return replace(job, totals=step.totals), ended + chunks[done:]


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_counts_add_up_to_the_request(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """Counts by outcome add up to addresses × ports, and none is negative."""
    job, chunks = given_
    counts = tally(job, chunks).counts
    assert list(counts) == list(NAMES)
    assert sum(counts.values()) == job.plan.addresses * job.plan.ports
    assert min(counts.values()) >= 0


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_error_is_never_empty(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """In any state of the chunks the error has a cause, and `accounted` agrees with the counts."""
    job, chunks = given_
    found = tally(replace(job, status=JobStatus.RUNNING), chunks)
    assert found.error
    assert found.accounted is (sum(found.counts[name] for name in ACCOUNTED) == job.plan.addresses * job.plan.ports)


@settings(max_examples=60, deadline=None)
@given(jobs(), st.integers(0, 40), st.integers(1, 10))
def test_pages_of_addresses_are_slices_of_one_list(given_: tuple[ScanJob, list[Chunk]], skip: int, size: int) -> None:
    """Any page is a slice of the complete list, and the total is the list's length on every page."""
    job, chunks = given_
    whole = names(job, chunks)
    page = names(job, chunks, skip, size)
    assert page.page == whole.page[skip : skip + size]
    assert page.total == whole.total == len(whole.page)


@contextmanager
def small_steps(slices: int, gap: int, reads: int | None = None) -> Iterator[None]:
    """Reduce the limits of the ledger's pages, so that a small job reaches them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_SLICES", slices)
        patch.setattr(ledger, "_GAP", gap)
        patch.setattr(ledger, "_STEP", 1)
        if reads is not None:
            patch.setattr(ledger, "_READS", reads)
        yield


@settings(max_examples=100, deadline=None)
@given(
    given_=jobs(),
    done=st.integers(0, 6),
    skip=st.integers(0, 40),
    size=st.integers(1, 10),
    slices=st.integers(1, 6),
    gap=st.integers(0, 2),
)
def test_pages_from_totals_are_those_of_all_chunks(
    *, given_: tuple[ScanJob, list[Chunk]], done: int, skip: int, size: int, slices: int, gap: int
) -> None:
    """A page that leaves out chunks by their totals is that of all chunks, and has the same total."""
    with small_steps(slices, gap):
        job, chunks = counted(*given_, done)
        page = UnprobedPage(job, size, skip=skip)
        for first, end in page.ranges():
            for each in chunks[first:end]:
                page.add(each)
    for each in chunks[job.totals.done :]:
        page.add(each)
    whole = names(replace(job, totals=EMPTY), chunks, skip, size)
    assert (page.page, page.total) == (whole.page, whole.total)


@settings(max_examples=200, deadline=None)
@given(
    given_=jobs(size=2),
    done=st.integers(0, 24),
    unmade=st.integers(0, 3),
    size=st.integers(1, 10),
    slices=st.integers(1, 6),
    gap=st.integers(0, 2),
    reads=st.integers(1, 2),
)
def test_pages_after_positions_are_the_whole_list(
    *, given_: tuple[ScanJob, list[Chunk]], done: int, unmade: int, size: int, slices: int, gap: int, reads: int
) -> None:
    """Each page names the position of the next one, has the same total, and takes a bounded number of chunks of the totals."""
    with small_steps(slices, gap, reads):
        job, chunks = counted(*given_, done)
        made = max(job.totals.done, len(chunks) - unmade)
        job, chunks = replace(job, made=made), chunks[:made]
        whole = names(replace(job, totals=EMPTY), chunks)
        whole.add_unmade()
        listed: list[NotProbed] = []
        after: int | None = 0
        while after is not None:
            page = UnprobedPage(job, size, after=after)
            taken = 0
            for first, end in page.ranges():
                taken += end - first
                for each in chunks[first:end]:
                    page.add(each)
            for each in chunks[job.totals.done :]:
                page.add(each)
            page.add_unmade()
            assert page.total == whole.total
            assert taken <= reads * size
            assert len(page.page) <= size
            assert page.next is None or page.next > after
            listed += page.page
            after = page.next
    assert listed == whole.page


def test_page_that_is_full_with_its_last_address_is_complete() -> None:
    """A page whose last address takes the rest of the 1.2 MB of ports has no next page."""
    ports = ",".join(map(str, range(1, 3_900, 2)))
    exclude = ("127.9.8.0/25", "127.9.8.128/31", "127.9.8.130/32")
    page = UnprobedPage(scan_job(1, cidr="127.9.8.0/24", exclude=exclude, policy=scan_policy(ports=ports)), 1_000)
    assert 130 * len(ports) < 1_200_000 < 131 * len(ports)
    assert (len(page.page), page.cut, page.next) == (131, False, None)


@pytest.mark.proves("G20")
def test_pages_with_long_lists_of_ports_end_early() -> None:
    """A page has at most 1.2 MB of ports, and the pages after positions are still the whole list."""
    ports = ",".join(map(str, range(1, 3_900, 2)))
    job = scan_job(1, cidr="127.9.8.0/24", exclude=("127.9.8.0/25",), policy=scan_policy(ports=ports))
    listed: list[str] = []
    after: int | None = 0
    while after is not None:
        page = UnprobedPage(job, 1_000, after=after)
        for number in range(2):
            first = f"127.9.8.{128 + 64 * number}"
            page.add(
                chunk(index=number + 2, first_address=first, outcomes="l" * 64, ports=ports, state=ChunkState.FAILED)
            )
        assert sum(len(each.ports) for each in page.page) <= 1_250_000
        assert page.cut == (page.next is not None)
        listed += [each.address for each in page.page]
        after = page.next
    assert listed == [f"127.9.8.{n}" for n in range(256)]


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_listed_addresses_match_the_counts(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """Each outcome is listed as often as it is counted: by address where excluded, else by port block."""
    job, chunks = given_
    found = names(job, chunks)
    counts = tally(job, chunks).counts
    ports = {each.ports: each.port_count for each in chunks} | {job.policy.ports: job.plan.ports}
    for outcome in ("down", "timed_out", "excluded", "refused", "cancelled", "lost"):
        assert sum(ports[each.ports] for each in found.page if each.outcome == outcome) == counts[outcome]
    assert {each.outcome for each in found.page} <= set(counts) - {"answered", "silent", "waiting"}


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_progress_is_at_most_99(given_: tuple[ScanJob, list[Chunk]]) -> None:
    """The ledger never reports 100 %: only completion does."""
    assert 0 <= tally(*given_).progress <= 99


def test_machines_are_counted_once_over_port_blocks() -> None:
    """An address that answers in three port blocks is one machine; another slice's are others."""
    job = scan_job(cidr="127.9.8.0/29", policy=scan_policy(ports="1-20000"))
    job = replanned(job, blocks=3)
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
    job = replanned(job, chunk_addresses=4, chunk_ports=8_192, blocks=2, chunk_count=2)
    large, small = plan.chunks(job, 0, 2)
    assert (large.port_count, small.port_count) == (8_192, 1_808)
    done = "sssx"
    assert tally(job, [large, replace(small, outcomes=done)]).progress == 18
    assert tally(job, [replace(large, outcomes=done), small]).progress == 81
    assert tally(job, [replace(large, outcomes=done), replace(small, outcomes=done)]).progress == 99


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([("asdt", ChunkState.STORED, "")], "the ledger does not account for every probe of the request"),
        ([("aslt", ChunkState.STORED, "nmap died")], "1 address lost: nmap died"),
        ([("as.t", ChunkState.FAILED, "nmap died")], "1 address lost: nmap died"),
        ([("rrr.", ChunkState.FAILED, "")], "3 addresses refused and 1 address lost"),
        (
            [("....", ChunkState.FAILED, "a"), ("...s", ChunkState.FAILED, "b"), ("rrss", ChunkState.STORED, "a")],
            "2 addresses refused and 7 addresses lost: a; b",
        ),
        ([("....", ChunkState.FAILED, text) for text in "abcde"], "20 addresses lost: a; b; c"),
    ],
)
def test_error_has_counts_and_reasons(chunks: list[tuple[str, ChunkState, str]], error: str) -> None:
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


def test_error_is_truncated() -> None:
    """A reason may quote nmap at length; the error of the job is truncated."""
    assert len(tally(scan_job(), [chunk(state=ChunkState.FAILED, reason="x" * 5_000)]).error) == 1_000


def test_listed_addresses_have_ports_outcome_and_reason() -> None:
    """Excluded addresses come first with all ports, then each chunk's, with the chunk's reason for failed ones."""
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


def test_blanks_of_a_cancelled_job_are_cancelled() -> None:
    """Blanks of a cancelled job are counted as cancelled, whatever the state of their chunks; of a running job, as waiting."""
    cancelled = replace(scan_job(), status=JobStatus.CANCELLED)
    assert tally(cancelled, [chunk(outcomes="as..")]).counts["cancelled"] == 4
    assert tally(replace(cancelled, status=JobStatus.RUNNING), [chunk(outcomes="as..")]).counts["waiting"] == 4


ENDED = (ChunkState.STORED, ChunkState.FAILED, ChunkState.CANCELLED)


@settings(max_examples=40, deadline=None)
@given(jobs(), st.data())
def test_totals_added_one_by_one_equal_the_complete_count(
    given_: tuple[ScanJob, list[Chunk]], data: st.DataObject
) -> None:
    """Adding ended chunks to the job's document, in any number of steps, equals counting them all together."""
    job, chunks = given_
    chunks = [
        replace(each, state=each.state if each.state in ENDED else ChunkState.CANCELLED, seconds=0.5 * each.index)
        for each in chunks
    ]
    at_once = Tally(job)
    for each in chunks:
        at_once.end(each)
    folded = job
    for each in chunks:
        step = Tally(folded)
        step.end(each)
        folded = replace(folded, totals=step.totals)
        if data.draw(st.booleans()):
            folded = documents.read_job(documents.write_job(folded))
    assert folded.totals.done == len(chunks)
    result = Tally(folded)
    assert result.counts == at_once.counts
    assert sum(result.counts.values()) == job.plan.addresses * job.plan.ports
    assert (result.machines_found, result.error, result.progress) == (
        at_once.machines_found,
        at_once.error,
        at_once.progress,
    )
    assert result.totals == at_once.totals


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["22,80", "1-20000"]), st.data())
def test_running_counts_of_two_replicas_equal_a_complete_count(ports: str, data: st.DataObject) -> None:
    """Whichever replica reports, however late, after a restart, and before or after ended chunks are in the job's totals."""
    job = replace(cut(ports=ports, size=2), status=JobStatus.RUNNING)
    chunks = whole(job)
    maps = st.text(["a", "s", "d", "r", "l"], min_size=2, max_size=2)
    counts = [RunningCount(), RunningCount()]
    for _ in range(data.draw(st.integers(1, 40))):
        index = data.draw(st.integers(0, len(chunks) - 1))
        match data.draw(st.sampled_from(["begin", "end", "end", "add to totals", "restart"])):
            case "begin" if chunks[index].state is ChunkState.QUEUED:
                chunks[index] = replace(chunks[index], state=ChunkState.RUNNING, outcomes=data.draw(maps)[0] + ".")
            case "end" if chunks[index].state is not ChunkState.STORED:  # the process may end before it saves the job
                chunks[index] = replace(chunks[index], state=ChunkState.STORED, outcomes=data.draw(maps))
            case "add to totals":
                step = Tally(job)
                for each in takewhile(lambda each: each.state is ChunkState.STORED, chunks[job.totals.done :]):
                    step.end(each)
                job = replace(job, totals=step.totals)
            case "restart":
                counts[index % 2] = RunningCount()
        if (reports := data.draw(st.sampled_from([0, 1, None]))) is None:
            continue
        count = counts[reports]
        read = [chunks[each] for each in count.start(job) if not count.is_counted(each)]
        result = count.tally(job, [each for each in read if each.state is not ChunkState.QUEUED])
        complete = tally(replace(job, totals=EMPTY), [each for each in chunks if each.state is not ChunkState.QUEUED])
        assert (result.counts, result.machines_found) == (complete.counts, complete.machines_found)
        again = [chunks[each] for each in count.start(job) if not count.is_counted(each)]
        assert [each for each in again if each.state is ChunkState.STORED] == []


def test_running_count_behind_the_totals_starts_with_them() -> None:
    """Chunks that the totals of the job contain are not read, and those after them are."""
    job = replace(cut(size=2), status=JobStatus.RUNNING)
    chunks = [replace(each, state=ChunkState.STORED, outcomes="aa") for each in whole(job)]
    count, step = RunningCount(), Tally(job)
    count.tally(job, [chunks[3]])
    for each in chunks[:4]:
        step.end(each)
    job = replace(job, totals=step.totals)
    near = count.start(job)
    assert (near.start, [count.is_counted(each) for each in near]) == (4, [False] * 4)
    assert count.tally(job, chunks[4:]).machines_found == 16


def test_totals_of_a_job_with_one_block_have_no_places() -> None:
    """With one block of ports each address is in one chunk, so its document needs no bit for it; with several it does."""
    one, several = cut(), cut(ports="1-20000")
    for job, size in ((one, 0), (several, 2)):
        totals = tally(job, [replace(whole(job)[0], outcomes="aaaaaaaa")]).totals
        assert len(totals.places.get("answered", b"")) == size
        assert totals.addresses["answered"] == 8
    assert Tally(one).totals == EMPTY


@settings(max_examples=40, deadline=None)
@given(
    exclude=st.sampled_from([(), ("127.9.8.4/30",), ("127.9.8.0/29", "127.9.8.8/32")]),
    ports=st.sampled_from(["22,80", "1-20000"]),
    made=st.integers(0, 12),
    skip=st.integers(0, 60),
    size=st.integers(1, 10),
)
def test_pages_include_chunks_that_were_never_made(
    exclude: tuple[str, ...], ports: str, made: int, skip: int, size: int
) -> None:
    """Addresses of chunks that a cancelled job never made are on the pages of one list, and counted in its total."""
    job = cut(exclude=exclude, ports=ports, size=4)
    chunks = whole(job)
    job = replace(job, made=min(made, job.plan.chunk_count), status=JobStatus.CANCELLED)
    all_made = names(job, [replace(each, state=ChunkState.CANCELLED) for each in chunks])
    page = names(job, [replace(each, state=ChunkState.CANCELLED) for each in chunks[: job.made]], skip, size)
    page.add_unmade()
    assert page.page == all_made.page[skip : skip + size]
    assert page.total == all_made.total


def test_unmade_chunks_of_an_unfinished_job_are_not_named() -> None:
    """Addresses of chunks that a running job has not created yet are waiting, and are not listed."""
    job = replace(cut(), made=0, status=JobStatus.RUNNING)
    page = names(job, [])
    page.add_unmade()
    assert (page.page, page.total) == ([], 0)


def test_seconds_left_follow_the_pace_of_finished_chunks() -> None:
    """Until a thousand probes are done the estimate is scaled by what is left, then the measured time of each counts."""
    job = cut(ports="1-1000")
    first = replace(whole(job)[0], outcomes="ssssssss", state=ChunkState.STORED, seconds=16.0)
    assert Tally(job).seconds_left == pytest.approx(job.plan.estimate)
    assert not Tally(job).measured
    counted = ended(job, first)
    assert Tally(counted).seconds_left == pytest.approx(16.0)
    assert Tally(counted).measured


def test_seconds_left_of_udp_ports_do_not_follow_those_of_tcp_ports() -> None:
    """After the TCP chunks of a job, the estimate of its UDP ports counts until a thousand of their probes are done."""
    job = cut(ports="T:1-1000,U:1-600")
    chunks = [replace(each, outcomes="s" * len(each.outcomes), state=ChunkState.STORED) for each in whole(job)]
    counted = ended(job, *(replace(each, seconds=0.1) for each in chunks if not each.udp))
    udp = PortSet.parse("U:1-600")
    assert Tally(counted).seconds_left == pytest.approx(plan.estimate(job.policy, udp, 16))
    assert not Tally(counted).measured
    further = ended(
        counted, *(replace(each, seconds=600.0) for each in chunks if each.udp and each.index < len(chunks) - 1)
    )
    assert Tally(further).seconds_left == pytest.approx(600.0)


def test_pace_is_measured_on_chunks_with_hosts() -> None:
    """A chunk of empty addresses changes only the expected time of the job; one with some hosts counts by their share."""
    job = cut(ports="1-1000")
    empty, dense = (replace(each, state=ChunkState.STORED) for each in whole(job)[:2])
    counted = ended(
        job, replace(empty, outcomes="dddrdddd", seconds=1.0), replace(dense, outcomes="adddddds", seconds=6.0)
    )
    assert counted.totals.tcp.pace == pytest.approx(0.00075)
    assert counted.totals.tcp.mean == pytest.approx(7 / 16_000)


def ended(job: ScanJob, *chunks: Chunk) -> ScanJob:
    """The job with these chunks in its totals."""
    tally = Tally(job)
    for each in chunks:
        tally.end(each)
    return replace(job, totals=tally.totals)
