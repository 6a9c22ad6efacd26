"""The record of a chunk's attempts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import bson
import pytest

from job_orchestrator.domain.attempts import MAX_ATTEMPTS, Attempt, Probed
from job_orchestrator.domain.chunk import (
    Chunk,
    ChunkState,
    apply,
    cancel,
    dispatch,
    expire,
    incomplete,
    late_report,
    store,
)
from job_orchestrator.handlers.chunks.changer import scanned_again
from job_orchestrator.repository import documents
from job_orchestrator_testing import chunk
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import ChunkClaimed, ChunkFailed, ChunkProgressed, ChunkReleased, ChunkScanned, Run
from scanfleet.contracts.messages.chunks import MAX_DETECTION_CHARS
from scanfleet.scanning.outcomes import MAX_ADDRESSES
from scanfleet.scanning.policy import MAX_SCRIPT_CHARS, MAX_SCRIPTS
from scanfleet.scanning.ports import MAX_TOP
from scanfleet_testing.chunk_grants import signer

SOON: Final = THEN + timedelta(seconds=2)
LATER: Final = THEN + timedelta(minutes=1)
PATIENCE: Final = timedelta(minutes=1)
EARLY: Final = Run(nmap="7.93", arguments="a" * 64, source="10.0.0.5", rules="b" * 64, began=0.25)
LATE: Final = EARLY.model_copy(update={"began": 58.0})
MAX_BYTES: Final = 128 << 10  # of the largest chunk document; usually one has a kilobyte


def dispatched(queued: Chunk) -> Chunk:
    return dispatch(queued, "w-1", THEN, size=4, share=1.0, estimate=1.5)


def report(kind: type[Any], outcomes: str = "asds", **fields: Any) -> Any:
    token: dict[str, Any] = {"job_id": 1, "chunk_id": "1-0", "attempt": 1, "worker_id": "w-1"}
    if kind is not ChunkClaimed:
        token["outcomes"] = outcomes
    if kind in {ChunkReleased, ChunkFailed}:
        token["reason"] = "because"
    if kind is ChunkScanned:
        token |= {"first_address": "127.9.8.0", "slot_seconds": 1.5, "technique": "connect"}
    return kind(**(token | fields))


def running() -> Chunk:
    return apply(dispatched(chunk()), report(ChunkClaimed, run=EARLY), SOON, PATIENCE)


@pytest.mark.parametrize(
    ("kind", "outcomes", "how"),
    [(ChunkScanned, "asds", "scanned"), (ChunkReleased, "as..", "released"), (ChunkFailed, "as..", "failed")],
)
def test_attempt_is_recorded_from_its_dispatch_to_its_report(kind: type[Any], outcomes: str, how: str) -> None:
    """The dispatch begins the record before any packet, the claim and the final report complete it."""
    first = dispatched(chunk())
    begun = Attempt(n=1, worker="w-1", at=THEN)
    assert first.attempts == (begun,)
    claimed = apply(first, report(ChunkClaimed, run=EARLY), SOON, PATIENCE)
    assert claimed.attempts == (replace(begun, claimed=SOON, run=EARLY),)
    beating = apply(claimed, report(ChunkProgressed, "a..."), SOON, PATIENCE)
    assert beating.attempts == claimed.attempts
    ended = apply(beating, report(kind, outcomes, run=LATE), LATER, PATIENCE)
    assert ended.attempts == (replace(begun, claimed=SOON, ended=LATER, how=how, run=LATE),)
    again = dispatched(replace(ended, state=ChunkState.QUEUED))
    assert again.attempts == (*ended.attempts, replace(begun, n=2))


def test_attempt_without_a_claim_is_recorded() -> None:
    """A short scan has no heartbeat, and a worker of an earlier release reports its nmap in ChunkScanned alone."""
    scanned = report(ChunkScanned, nmap="7.92", arguments="c" * 64)
    ended = apply(dispatched(chunk()), scanned, LATER, PATIENCE)
    run = Run(nmap="7.92", arguments="c" * 64)
    assert ended.attempts == (Attempt(n=1, worker="w-1", at=THEN, ended=LATER, how="scanned", run=run),)


@pytest.mark.parametrize(
    ("how", "lose"),
    [
        ("expired", lambda each: expire(each, "sent no report", LATER)),
        ("cancelled", cancel),
        ("stored", lambda each: store(each, "asds", LATER)),
        ("incomplete", lambda each: incomplete(each, 1, ["127.9.8.0"], LATER)),
    ],
)
def test_attempt_that_lost_its_chunk_has_no_end_before_its_report(how: str, lose: Callable[[Chunk], Chunk]) -> None:
    """Until its final report arrives the worker may send packets; the record then has both the cause and the end."""
    lost = lose(running())
    [record] = lost.attempts
    assert (record.how, record.ended, record.run) == (how, None, EARLY)
    assert late_report(lost, report(ChunkProgressed, "asds"), LATER).attempts == lost.attempts
    assert late_report(lost, report(ChunkReleased, "as..", attempt=2), LATER) == lost
    ended = late_report(lost, report(ChunkReleased, "asds", run=LATE), LATER)
    assert ended.attempts == (replace(record, ended=LATER, run=LATE),)
    assert late_report(ended, report(ChunkReleased, "asds"), LATER + PATIENCE) == ended


@pytest.mark.parametrize("kind", [ChunkScanned, ChunkReleased, ChunkFailed])
def test_end_of_a_superseded_attempt_is_recorded_once(kind: type[Any]) -> None:
    """The end of an attempt whose chunk another worker has got changes its record alone, and only by its own worker."""
    second = dispatch(expire(running(), "sent no report", SOON), "w-2", SOON, size=4, share=1.0, estimate=1.5)
    first, current = second.attempts
    assert late_report(second, report(kind, worker_id="w-2"), LATER) is second
    ended = late_report(second, report(kind, run=LATE), LATER)
    assert ended == replace(second, attempts=(replace(first, ended=LATER, run=LATE), current))
    assert late_report(ended, report(kind), LATER + PATIENCE) is ended
    scanned = apply(ended, report(ChunkScanned, attempt=2, worker_id="w-2"), LATER, PATIENCE)
    assert scanned.attempts == (ended.attempts[0], replace(current, ended=LATER, how="scanned"))


def test_end_of_an_attempt_that_is_not_recorded_changes_nothing() -> None:
    """Of more attempts than a chunk keeps, those between the first and the last ones have no record to change."""
    each = chunk()
    for _ in range(MAX_ATTEMPTS + 1):
        each = dispatched(replace(each, state=ChunkState.QUEUED))
    assert late_report(each, report(ChunkReleased, attempt=11), LATER) is each


def test_reports_on_an_attempt_of_an_earlier_release_are_not_recorded() -> None:
    """A chunk that a replica of an earlier release has dispatched has no record of this attempt, and its reports count."""
    held = chunk(state=ChunkState.RUNNING, attempt=2, worker_id="w-1", attempts=(Attempt(n=1, worker="w-0", at=THEN),))
    ended = apply(held, report(ChunkReleased, attempt=2, run=LATE), LATER, PATIENCE)
    assert (ended.attempts, ended.state) == (held.attempts, ChunkState.SCANNED)


def test_first_and_last_attempts_are_kept() -> None:
    """However often a chunk is dispatched, ten and forty attempts are kept, and the number of the others."""
    each = chunk()
    for _ in range(200):
        each = dispatched(replace(each, state=ChunkState.QUEUED))
    assert [attempt.n for attempt in each.attempts] == [*range(1, 11), *range(161, 201)]
    assert (len(each.attempts), each.dropped) == (MAX_ATTEMPTS, 150)


def test_port_numbers_that_are_not_those_of_the_chunk_are_not_stored() -> None:
    """Ranges that are invalid, too many, or of a chunk with numbers of its own would stay in its record."""
    top = chunk(ports="top:3")
    for ports, common, kept in [
        ("top:3", "22,80,443", "22,80,443"),
        ("top:3", "1-4", ""),
        ("top:3", "80-22", ""),
        ("22,80", "22,80", ""),
    ]:
        scanned = report(
            ChunkScanned, nmap="7.93", common_ports=common, detection="sV7", discovery="default", scripts=("banner",)
        )
        probed = apply(dispatched(replace(top, ports=ports)), scanned, LATER, PATIENCE).probed
        assert probed is not None
        assert (probed.common_ports, probed.detection, probed.discovery) == (kept, "sV7", "default")
        assert probed.scripts == ("banner",)


@pytest.mark.parametrize("kind", [ChunkClaimed, ChunkReleased, ChunkFailed, ChunkScanned])
def test_probes_are_known_however_the_last_attempt_ends(kind: type[Any]) -> None:
    """Also a chunk whose last addresses are lost without a ChunkScanned is checked with what was probed."""
    facts = {"technique": "syn", "detection": "sV7", "discovery": "none", "common_ports": "22,80,443"}
    first = dispatched(chunk(ports="top:3"))
    ended = apply(first, report(kind, **facts, nmap="7.93", run=EARLY), LATER, PATIENCE)
    late = late_report(expire(first, "sent no report", SOON), report(kind, **facts, nmap="7.93", run=EARLY), LATER)
    for each in (ended, late) if kind is not ChunkClaimed else (ended,):
        [asked] = scanned_again([replace(each, outcomes="llll")], signer())
        assert asked.model_dump(include=set(facts)) == facts
        assert asked.nmap == "7.93"


def test_unknown_probes_have_no_nmap() -> None:
    """A worker of an earlier release does not report what it has probed; result-store then stores it as unknown."""
    ended = apply(dispatched(chunk(ports="top:3")), report(ChunkFailed, run=EARLY), LATER, PATIENCE)
    [asked] = scanned_again([replace(ended, outcomes="llll")], signer())
    assert (asked.nmap, asked.common_ports, asked.run) == ("", "", None)


def test_attempt_without_nmap_keeps_the_probes_of_an_earlier_one() -> None:
    """An attempt that only refuses addresses does not make the probes of an earlier attempt unknown."""
    failed = report(ChunkFailed, "aa..", technique="syn", detection="sV7", run=EARLY)
    second = dispatched(apply(dispatched(chunk()), failed, LATER, PATIENCE))
    ended = apply(second, report(ChunkScanned, "aarr", attempt=2), LATER, PATIENCE)
    assert ended.probed == Probed(attempt=1, detection="sV7")
    assert ended.technique == "syn"


def test_probes_and_nmap_of_a_repeated_check_are_of_one_attempt() -> None:
    """Neither a later attempt whose probes are unknown nor one that a replica of an earlier release dispatched changes them."""
    facts: dict[str, Any] = {"technique": "syn", "detection": "sV7", "run": EARLY}
    first = apply(dispatched(chunk()), report(ChunkFailed, "aa..", **facts), LATER, PATIENCE)
    other = EARLY.model_copy(update={"nmap": "7.95"})
    later = apply(dispatched(first), report(ChunkFailed, "aasd", attempt=2, run=other), LATER, PATIENCE)
    unrecorded = apply(
        replace(first, state=ChunkState.RUNNING, attempt=2, worker_id="w-1"),
        report(ChunkScanned, attempt=2, technique="connect", detection="sV9", nmap="7.95", run=other),
        LATER,
        PATIENCE,
    )
    for each in (later, unrecorded):
        [asked] = scanned_again([replace(each, outcomes="aasd")], signer())
        assert (asked.technique, asked.detection, asked.nmap, asked.run) == ("syn", "sV7", EARLY.nmap, EARLY)


def test_largest_document_of_a_chunk_is_bounded() -> None:
    """A chunk with as many attempts and as long reports as the contracts allow stays small for MongoDB."""
    run = Run(
        nmap="7" * 64,
        arguments="a" * 64,
        source="2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        egress="2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        rules="b" * 64,
        began=1e15 / 3,
    )
    common = ",".join(str(number) for number in range(40_000, 40_000 + 2 * MAX_TOP, 2))
    scripts = tuple(f"{'a' * (MAX_SCRIPT_CHARS - 3)}{n:03}" for n in range(2 * MAX_SCRIPTS))
    worker = "w" * 100
    each = chunk(outcomes="." * MAX_ADDRESSES, ports=f"top:{MAX_TOP}", reason="r" * 1_000)
    for n in range(1, 2 * MAX_ATTEMPTS):
        each = dispatch(replace(each, state=ChunkState.QUEUED), worker, THEN, size=9, share=1.0, estimate=1.5)
        claim = report(ChunkClaimed, attempt=n, worker_id=worker, run=run)
        each = apply(each, claim, SOON, PATIENCE)
        fields: dict[str, Any] = {
            "nmap": "7.93",
            "common_ports": common,
            "scripts": scripts,
            "detection": "d" * MAX_DETECTION_CHARS,
            "discovery": "d" * 100,
            "run": run,
        }
        scanned = report(ChunkScanned, "a" * MAX_ADDRESSES, attempt=n, worker_id=worker, **fields)
        each = apply(each, scanned, LATER, PATIENCE)
    assert each.probed is not None
    assert (len(each.attempts), each.probed.common_ports) == (MAX_ATTEMPTS, common)
    assert len(bson.encode(documents.write_chunk(each))) < MAX_BYTES
    assert documents.read_chunk(documents.write_chunk(each)) == each
