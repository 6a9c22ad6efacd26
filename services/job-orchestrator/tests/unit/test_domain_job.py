"""The life of a job."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from job_orchestrator.domain.job import (
    TABLE,
    IllegalJobChangeError,
    JobTrigger,
    ScanJob,
    change,
    observe,
    published,
    restored_from_backup,
    wait,
)
from job_orchestrator_testing import scan_job
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import JobCancelled, JobCompleted, JobFailed, JobProgressed, JobStarted, JobStatus

LATER = THEN + timedelta(seconds=5)
EVENTS = {
    JobTrigger.START: JobStarted,
    JobTrigger.COMPLETE: JobCompleted,
    JobTrigger.FAIL: JobFailed,
    JobTrigger.CANCEL: JobCancelled,
}
FINAL = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


def in_status(status: JobStatus) -> ScanJob:
    """A job in this status by the table, with an empty outbox."""
    job = scan_job()
    if status is not JobStatus.PENDING:
        job = change(job, JobTrigger.START, THEN)
    if status in FINAL:
        trigger = next(trigger for trigger, end in TABLE[JobStatus.RUNNING].items() if end is status)
        job = change(job, trigger, THEN)
    return published(job, job.seq)


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("trigger", JobTrigger)
def test_change_follows_the_table(status: JobStatus, trigger: JobTrigger) -> None:
    """A transition in the table leads to its status, with the next seq and its event; any other raises."""
    job = in_status(status)
    if trigger not in TABLE[status]:
        with pytest.raises(IllegalJobChangeError, match=f"it is {status}"):
            change(job, trigger, LATER)
        return
    after = change(job, trigger, LATER)
    assert after.status is TABLE[status][trigger]
    assert after.seq == job.seq + 1
    (out,) = after.outbox
    assert type(out.event) is EVENTS[trigger]
    assert (out.event.seq, out.event.job, out.at) == (after.seq, after.view, LATER)


def test_table_matches_the_published_graph() -> None:
    """Jobs change from pending to running to a final status, or from pending to failed or cancelled, only."""
    edges = {(start, end) for start, ways in TABLE.items() for end in ways.values()}
    assert edges == {
        (JobStatus.PENDING, JobStatus.RUNNING),
        *((start, end) for start in (JobStatus.PENDING, JobStatus.RUNNING) for end in FINAL[1:]),
        (JobStatus.RUNNING, JobStatus.COMPLETED),
    }
    assert {status for status, ways in TABLE.items() if not ways} == set(FINAL)
    assert {status for status in JobStatus if in_status(status).final} == set(FINAL)


def test_new_job_has_its_creation_event_in_the_outbox() -> None:
    """A new job is pending, without start and end, and its creation event has seq 1."""
    job = scan_job(traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    assert (job.status, job.seq, job.start_time, job.end_time, job.progress) == (JobStatus.PENDING, 1, None, None, 0)
    (out,) = job.outbox
    assert (out.event.event_id, out.event.traceparent) == ("job-1-1", job.traceparent)
    assert out.event.job == job.view


def test_start_and_end_times_never_run_backwards() -> None:
    """Start and end are the moments of their changes; a clock that went back is not followed."""
    started = change(scan_job(), JobTrigger.START, LATER)
    assert (started.start_time, started.end_time, started.updated_at) == (LATER, None, LATER)
    ended = change(started, JobTrigger.COMPLETE, THEN)
    assert (ended.start_time, ended.end_time, ended.updated_at) == (LATER, LATER, LATER)
    never = change(scan_job(), JobTrigger.CANCEL, LATER)
    assert (never.start_time, never.end_time) == (None, LATER)


def test_events_wait_in_the_outbox_in_order() -> None:
    """Unpublished events of several changes are all kept, in seq order, and only those named are removed."""
    job = change(change(scan_job(), JobTrigger.START, LATER), JobTrigger.CANCEL, LATER)
    assert [out.event.seq for out in job.outbox] == [1, 2, 3]
    assert [out.event.seq for out in published(job, 2).outbox] == [3]
    assert published(job, 0) is job


def test_progress_is_published_once_and_never_decreases() -> None:
    """Higher progress or more machines are published with the next seq; less or the same is not; 100 is completion's."""
    running = in_status(JobStatus.RUNNING)
    assert observe(running, 0, 0, LATER) is None
    news = observe(running, 40, 3, LATER)
    assert news is not None
    job, event = news
    assert (job.progress, job.machines_found, job.seq, job.updated_at) == (40, 3, running.seq + 1, LATER)
    assert isinstance(event, JobProgressed)
    assert (event.seq, event.progress, event.machines_found, event.job) == (job.seq, 40, 3, job.view)
    assert job.outbox == ()
    assert observe(job, 39, 2, LATER) is None
    more = observe(job, 30, 4, LATER)
    assert more is not None
    assert (more[0].progress, more[0].machines_found) == (40, 4)
    full = observe(job, 100, 3, LATER)
    assert full is not None
    assert full[0].progress == 99


@pytest.mark.parametrize("status", sorted(set(JobStatus) - {JobStatus.RUNNING}))
def test_progress_is_published_only_while_running(status: JobStatus) -> None:
    """No progress is published before the start or after the end."""
    assert observe(in_status(status), 40, 3, LATER) is None


def test_progress_waits_for_events_in_the_outbox() -> None:
    """While an event is unpublished there is no progress, so a reader cannot miss the event by its seq."""
    assert observe(change(scan_job(), JobTrigger.START, LATER), 40, 3, LATER) is None


def test_restored_job_continues_above_its_published_seq() -> None:
    """Its next event has a `seq` above the given one and above its own, and nothing else has changed."""
    job = in_status(JobStatus.RUNNING)
    assert change(restored_from_backup(job, 1_000), JobTrigger.COMPLETE, LATER).seq == 1_001
    assert restored_from_backup(restored_from_backup(job, 1_000), 5) == restored_from_backup(job, 1_000)
    assert replace(restored_from_backup(job, 1_000), seq=job.seq) == job


def test_progress_carries_the_remaining_time_and_ends_waiting() -> None:
    """Progress has the time left, null while it is unknown, and the job no longer waits."""
    waiting = replace(in_status(JobStatus.RUNNING), waiting="no_worker", waiting_since=THEN)
    news = observe(waiting, 40, 3, LATER, eta_seconds=12.5)
    assert news is not None
    assert news[0].waiting_since is None
    assert (news[0].waiting, news[0].eta_seconds, news[1].eta_seconds, news[1].waiting) == ("", 12.5, 12.5, "")
    unknown = observe(in_status(JobStatus.RUNNING), 40, 3, LATER)
    assert unknown is not None
    assert unknown[1].eta_seconds is None


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING])
def test_why_a_job_waits_is_published_once(status: JobStatus) -> None:
    """A new reason raises `seq`, has an event and its own time, and the end is unknown; the same one changes nothing."""
    job = replace(in_status(status), eta_seconds=12.5)
    assert wait(job, "", LATER) is None
    news = wait(job, "no_worker", LATER)
    assert news is not None
    waiting, event = news
    assert (waiting.waiting, waiting.waiting_since, waiting.seq) == ("no_worker", LATER, job.seq + 1)
    assert (waiting.eta_seconds, event.eta_seconds) == (None, None)
    assert (event.waiting, event.seq, event.job.status, event.error) == ("no_worker", waiting.seq, status, "")
    assert wait(waiting, "no_worker", LATER) is None
    other = wait(waiting, "no_raw_worker", LATER + timedelta(seconds=60))
    assert other is not None
    assert (other[0].waiting, other[0].waiting_since) == (
        "no_raw_worker",
        LATER + timedelta(seconds=60),
    )
    over = wait(other[0], "", LATER + timedelta(seconds=90))
    assert over is not None
    assert (over[0].waiting, over[0].waiting_since, over[1].waiting) == ("", None, "")


@pytest.mark.parametrize("status", FINAL)
def test_final_job_does_not_wait(status: JobStatus) -> None:
    """Its end clears the reason, the remaining time and slot seconds, and no wait is published after it."""
    job = replace(
        in_status(JobStatus.RUNNING), waiting="no_worker", waiting_since=THEN, eta_seconds=9.0, seconds_left=9.0
    )
    trigger = next(trigger for trigger, end in TABLE[JobStatus.RUNNING].items() if end is status)
    ended = change(job, trigger, LATER)
    assert (ended.waiting, ended.waiting_since, ended.eta_seconds, ended.seconds_left) == ("", None, None, 0.0)
    assert wait(in_status(status), "no_worker", LATER) is None


def test_waiting_reason_waits_for_events_in_the_outbox() -> None:
    """While an event is unpublished no reason is published, so a reader cannot skip the event by its seq."""
    assert wait(scan_job(), "no_worker", LATER) is None
