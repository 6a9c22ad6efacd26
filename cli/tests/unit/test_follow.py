"""Following jobs: terminals, interrupts, streams, and what happens when the service does not answer."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import changes, coverage, findings, follow, views
from scanfleet_cli.config import Config
from scanfleet_cli.output import Output
from scanfleet_cli.session import Effects, Session
from scanfleet_cli_testing.api import TOKEN, FakeApi
from scanfleet_cli_testing.jobs import FakeJob, result


def busy() -> httpx2.Response:
    return httpx2.Response(503, json={"error": "busy"})


@pytest.fixture
def running(api: FakeApi, run: Any) -> FakeApi:
    """Jobs 41 and 42 run, and do not end."""
    api.states = [(JobStatus.RUNNING, 62)]
    run("scan", "127.9.8.0/24", "--no-watch")
    run("scan", "127.9.8.0/24", "--no-watch")
    return api


def interrupt(request: httpx2.Request) -> BaseException | None:
    return KeyboardInterrupt() if request.url.path.endswith("/events") else None


def test_failed_cancel_after_an_interrupt_is_reported(running: FakeApi, run: Any) -> None:
    """The error names the job and the reason, decides the exit code, and the other jobs are cancelled."""

    def fault(request: httpx2.Request) -> Any:
        return busy() if request.url.path.endswith("/41/cancel") else interrupt(request)

    running.fault_of = fault
    ended = run("--retry", "0", "job", "watch", "41", "42", "--cancel-on-interrupt")
    assert ended.code == 6
    assert "job 41 could not be cancelled: busy" in ended.err
    assert "✓ job 42 cancelled" in ended.err
    assert running.jobs[41].status is JobStatus.RUNNING
    assert running.jobs[42].status is JobStatus.CANCELLED


@pytest.mark.parametrize(("end", "code"), [(JobStatus.COMPLETED, 0), (JobStatus.FAILED, 3), (JobStatus.CANCELLED, 7)])
def test_interrupt_after_the_end_exits_with_the_end(api: FakeApi, run: Any, end: JobStatus, code: int) -> None:
    """A job that ended just before Ctrl-C cannot be cancelled: its results are printed, and its end decides the exit code."""
    api.states = [(JobStatus.RUNNING, 62)]

    def ends(request: httpx2.Request) -> BaseException | None:
        if not request.url.path.endswith("/events"):
            return None
        api.fault_of = lambda _request: None
        api.jobs[41].states = [(end, 99)]
        api.jobs[41].results = [result(1, "127.9.8.1", 22)]
        return KeyboardInterrupt()

    api.fault_of = ends
    ended = run("scan", "127.9.8.0/24", "--cancel-on-interrupt")
    assert ended.code == code
    assert ended.out.startswith("127.9.8.1\t22/tcp")
    assert "cancelling 41" in ended.err
    assert ended.err.count(f"job 41 {end}") == 1
    assert "could not be cancelled" not in ended.err


def submit_interrupted(api: FakeApi) -> None:
    """Ctrl-C arrives after the service has created the jobs and before its response."""

    def fault(request: httpx2.Request) -> BaseException | None:
        if (request.method, request.url.path) != ("POST", "/api/v1/task"):
            return None
        api.fault_of = lambda _request: None
        api.carry_out(request)
        return KeyboardInterrupt()

    api.fault_of = fault


@pytest.mark.parametrize("command", [["scan", "127.9.8.0/24"], ["job", "submit", "--subnet", "5", "--policy", "3"]])
def test_interrupt_of_a_submit_prints_the_key_to_continue_with(api: FakeApi, run: Any, command: list[str]) -> None:
    """The jobs may have been created, and the same command with the key returns to them."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    run("policy", "create", "web")
    submit_interrupted(api)
    ended = run(*command)
    assert ended.code == 130
    assert "the jobs may have been created" in ended.err
    assert run(*command, "--key", ended.err.split("--key ")[1].split()[0]).code == 0
    assert list(api.jobs) == [41]


def test_interrupt_of_a_submit_with_cancel_on_interrupt_cancels_its_jobs(api: FakeApi, run: Any) -> None:
    """The ids are those that the service returns for the same key."""
    submit_interrupted(api)
    ended = run("scan", "127.9.8.0/24", "--cancel-on-interrupt")
    assert ended.code == 130
    assert "✓ job 41 cancelled" in ended.err
    assert [each.status for each in api.jobs.values()] == [JobStatus.CANCELLED]


def test_interrupt_of_a_submit_that_cannot_be_cancelled_prints_the_key(api: FakeApi, run: Any) -> None:
    """With --cancel-on-interrupt too, the key is printed before the request that returns the jobs."""

    def fault(request: httpx2.Request) -> BaseException | None:
        if (request.method, request.url.path) != ("POST", "/api/v1/task"):
            return None
        if api.jobs:
            return httpx2.ConnectError("connection refused")
        api.carry_out(request)
        return KeyboardInterrupt()

    api.fault_of = fault
    ended = run("--retry", "0", "scan", "127.9.8.0/24", "--cancel-on-interrupt")
    api.fault_of = lambda _request: None
    assert ended.code == 6
    key = ended.err.split("--key ")[1].split()[0]
    assert run("scan", "127.9.8.0/24", "--no-watch", "--key", key).code == 0
    assert list(api.jobs) == [41]


@pytest.mark.parametrize(("cancel", "status"), [(False, JobStatus.PENDING), (True, JobStatus.CANCELLED)])
def test_interrupt_between_submit_and_watch_names_or_cancels_the_jobs(
    api: FakeApi, run: Any, session: Session, cancel: bool, status: JobStatus
) -> None:
    """A job whose id the command has is not lost before its watch begins."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    run("policy", "create", "web")
    with pytest.raises(KeyboardInterrupt), changes.submitted(session, [5], 3, None, cancel=cancel):
        raise KeyboardInterrupt
    assert api.jobs[41].status is status
    assert isinstance(session.output.stderr, io.StringIO)
    assert ("✓ job 41 cancelled" if cancel else "scanfleet job watch 41") in session.output.stderr.getvalue()


def test_interrupt_after_the_end_of_some_jobs_cancels_the_others(running: FakeApi, run: Any) -> None:
    """An ended job is no error; the exit code shows that the other jobs were interrupted."""
    running.jobs[41].states = [(JobStatus.COMPLETED, 100)]
    running.fault_of = interrupt
    ended = run("job", "watch", "41", "42", "--cancel-on-interrupt")
    assert ended.code == 130
    assert "✓ job 42 cancelled" in ended.err
    assert running.jobs[42].status is JobStatus.CANCELLED


def test_scan_without_a_readable_ledger_prints_its_results(api: FakeApi, run: Any) -> None:
    """-o json prints job and results with a null ledger, and stderr has the reason."""
    api.fault_of = lambda request: busy() if request.url.path.endswith("/ledger") else None
    ended = run("--retry", "0", "scan", "127.9.8.0/24", "-o", "json")
    document = json.loads(ended.out)
    assert (document["ledger"], document["results"]) == (None, [])
    assert document["job"]["status"]["status"] == "completed"
    assert "cannot read the ledger: busy" in ended.err


def test_log_has_one_line_for_the_end_of_a_job(api: FakeApi, run: Any) -> None:
    """Without a terminal each status is printed once, the final one with its ledger."""
    ended = run("scan", "127.9.8.0/24")
    assert api.jobs[41].status is JobStatus.COMPLETED
    lines = [line.split(" ", 1)[1] for line in ended.err.splitlines() if " job 41 " in line]
    assert lines == [
        "job 41 pending 0%",
        "job 41 running 62%",
        "job 41 completed 100% machines=0 accounted=true answered=256",
    ]


def test_log_is_never_silent_for_long(running: FakeApi) -> None:
    """A job without a change has a line after each interval, also before its first state was read."""
    log = views.Log(output := Output(io.StringIO(), io.StringIO()), silence=0)
    job = views.Followed(41)
    log.tick([job])
    job.task = running.jobs[41].task
    log.tick([job])
    assert isinstance(output.stderr, io.StringIO)
    lines = output.stderr.getvalue().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["job 41 no state yet", "job 41 running 62%"]


def test_several_jobs_are_watched_over_one_stream(running: FakeApi, run: Any) -> None:
    """`job watch` opens the stream of all jobs instead of one for each."""
    for job in running.jobs.values():
        job.states = [(JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
    running.requests.clear()
    assert run("job", "watch", "41", "42").code == 0
    streams = [each.url.path for each in running.requests if each.url.path.endswith("/events")]
    assert streams == ["/api/v1/events"]


@pytest.mark.parametrize(("admin", "user"), [(False, "7"), (True, "all"), (None, None)])
def test_several_jobs_of_unknown_owner_are_watched_over_the_widest_stream_and_read_once(
    running: FakeApi, run: Any, admin: bool | None, user: str | None
) -> None:
    """An administrator may watch the jobs of any users; a service that does not state the caller has only the own stream."""
    for job in running.jobs.values():
        job.states = [(JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
    quota = {"limit": 600, "left": 600, "reset": 60}
    limits = {"reads": quota, "writes": quota, "cancels": quota, "at_once": {"limit": 64, "left": 63}}
    me = {"user_id": 7, "admin": admin, "expires_at": "2026-03-14T21:00:00Z", "limits": limits}
    if admin is not None:
        running.answers["GET", "/api/v1/me"] = me
    running.requests.clear()
    assert run("job", "watch", "41", "42").code == 0
    (stream,) = [each for each in running.requests if each.url.path == "/api/v1/events"]
    assert stream.url.params.get("user_id") == user
    paths = [each.url.path for each in running.requests]
    assert [paths.count(f"/api/v1/task/{number}") for number in (41, 42)] == [1, 1]


@pytest.mark.parametrize("fault", [busy(), httpx2.ConnectError("connection refused")])
def test_several_jobs_are_watched_to_their_ends_while_the_caller_cannot_be_read(
    running: FakeApi, run: Any, fault: Any
) -> None:
    """The caller is read again like a stream that fails, also for longer than the retries of a request last."""
    for job in running.jobs.values():
        job.states = [(JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
    reads = [0]

    def fault_of(request: httpx2.Request) -> Any:
        if request.url.path == "/api/v1/me":
            return fault
        if request.method == "GET" and request.url.path.startswith("/api/v1/task/"):
            reads[0] += 1
            if reads[0] > 4:
                for job in running.jobs.values():
                    job.seq = 2
        return None

    running.fault_of = fault_of
    ended = run("--retry", "0.01", "job", "watch", "41", "42")
    assert ended.code == 0, ended.err
    assert "connection lost" in ended.err


@pytest.mark.parametrize(
    "command",
    [
        ["scan", "127.9.8.0/24", "127.9.9.0/24"],
        ["job", "wait", "--all"],
        ["job", "submit", "--subnet", "5", "--subnet", "6", "--policy", "3", "--watch"],
    ],
)
def test_several_jobs_of_a_known_owner_are_read_once_at_the_start(api: FakeApi, run: Any, command: list[str]) -> None:
    """The response that created or listed the jobs names their owner, so the stream is opened without a further request."""
    run("scan", "127.9.8.0/24", "127.9.9.0/24", "--no-watch")
    assert run(*command).code == 0
    paths = [each.url.path for each in api.requests if each.method == "GET"]
    assert [path for path in paths if path.startswith("/api/v1/task/4") and path.count("/") == 4] == [
        f"/api/v1/task/{number}" for number in sorted(api.jobs)[-2:]
    ]
    assert "/api/v1/me" not in paths


class Counting(views.Silent):
    """Counts the redraws."""

    wants_ledger = True
    ticks = 0

    def tick(self, _jobs: Sequence[views.Followed]) -> None:
        self.ticks += 1


@pytest.fixture
def session(effects: Effects, tmp_path: Path) -> Session:
    environment = {"SCANFLEET_URL": "http://scanfleet.test", "SCANFLEET_TOKEN": TOKEN}
    return Session(Config(tmp_path, environment), Output(io.StringIO(), io.StringIO()), effects)


def event(job: FakeJob, state: JobStatus) -> bytes:
    job.states = [(state, 50)]
    return f"event: {state}\ndata: {job.task.model_dump_json()}\nid: 1-{job.id}-1\n\n".encode()


def test_states_that_arrive_together_are_drawn_once(running: FakeApi, session: Session) -> None:
    """The number of redraws does not grow with the number of events that wait."""
    job = running.jobs[41]
    content = event(job, JobStatus.RUNNING) * 200 + event(job, JobStatus.COMPLETED)
    stream = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    running.answers["GET", "/api/v1/task/41/events"] = stream
    view = Counting(session.output)
    (followed,) = follow.to_the_end(session, [41], view, None)
    assert followed.final
    assert view.ticks < 10


class Late(FakeApi, httpx2.AsyncByteStream):
    """The response with the ledger of running job 41 arrives after the end of the job; then job 42 ends too."""

    def __init__(self, jobs: dict[int, FakeJob]) -> None:
        super().__init__()
        self.jobs = jobs
        self.asked, self.ended, self.arrived = asyncio.Event(), asyncio.Event(), asyncio.Event()
        headers = {"content-type": "text/event-stream"}
        self.answers["GET", "/api/v1/events"] = httpx2.Response(200, headers=headers, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for job in self.jobs.values():
            yield event(job, JobStatus.RUNNING)
        await self.asked.wait()
        yield event(self.jobs[41], JobStatus.COMPLETED)
        await self.arrived.wait()
        yield event(self.jobs[42], JobStatus.COMPLETED)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if request.url.path.endswith("/41/ledger") and request.url.params["page_size"] == "1":
            self.asked.set()
            await self.ended.wait()
            self.arrived.set()
        return response


def test_late_ledger_of_a_running_job_does_not_replace_the_final_one(
    running: FakeApi, session: Session, effects: Effects
) -> None:
    """A ledger that was requested before the end of the job and arrives after it is dropped."""
    late = Late(running.jobs)
    session.effects = replace(effects, transport=late, async_transport=late)
    jobs = follow.to_the_end(
        session, [41, 42], Counting(session.output), None, ended=lambda _job: late.ended.set(), owner=7
    )
    assert [job.ledger and job.ledger.status for job in jobs] == [JobStatus.COMPLETED, JobStatus.COMPLETED]


class NoTransport(httpx2.BaseTransport):
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        raise AssertionError(f"blocking {request.method} {request.url.path}")


def test_watch_sends_every_request_in_its_event_loop(run: Any, effects: Effects) -> None:
    """No request blocks the loop: another job's states are shown while a final ledger is read."""
    run("scan", "127.9.8.0/24", "--no-watch")
    ended = run("job", "watch", "41", effects=replace(effects, transport=NoTransport()))
    assert ended.code == 0
    assert "accounted=true" in ended.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_on_a_terminal_is_not_erased_with_the_bar(api: FakeApi, run: Any) -> None:
    """A permanent line is printed after the bar is erased, and the next redraw starts below it."""
    run("scan", "127.9.8.0/24", "--no-watch")
    job = views.Followed(41, api.jobs[41].task)
    output = Output(io.StringIO(), terminal := Terminal())
    bars = views.Bars(output)
    bars.tick([job])
    bars.tick([job])
    output.note("connection lost")
    bars.tick([job])
    bars.close()
    drawn, _, after = terminal.getvalue().partition("connection lost\n")
    assert drawn.count("pending") >= 2
    assert "\x1b[1A" not in after.partition("pending")[0]
    assert drawn.rstrip("\n").endswith("\x1b[2K")


@pytest.mark.parametrize("columns", [75, 80, 200])
def test_bar_leaves_room_for_the_times(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """On a narrow terminal the bar is shorter, and the line is not cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    api.states = [(JobStatus.RUNNING, 62)]
    run("scan", "127.9.8.0/24", "--no-watch")
    ledger = api.jobs[41].ledger().model_copy(update={"eta_seconds": 25.0})
    bars = views.Bars(Output(io.StringIO(), terminal := Terminal()))
    bars.tick([views.Followed(41, api.jobs[41].task, ledger)])
    (line,) = [each for each in terminal.getvalue().split("\n") if "running" in each]
    assert line.rstrip().endswith(", about 0:25 left")
    assert sum(line.count(cell) for cell in "█░") <= views.BAR
    assert "█" in line


def test_bar_of_an_unfinished_job_remains_on_the_terminal(api: FakeApi, run: Any) -> None:
    """Ctrl-C and a time limit leave the last bar in the scrollback; the end of a job replaces its bar."""
    api.states = [(JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
    run("scan", "127.9.8.0/24", "--no-watch")
    job = views.Followed(41, api.jobs[41].task)
    output = Output(io.StringIO(), terminal := Terminal())
    bars = views.Bars(output)
    bars.tick([job])
    bars.close()
    assert terminal.getvalue().rpartition("\x1b[2K")[2].startswith("running  62 %")
    bars.tick([job])
    api.jobs[41].seq = 2
    job.task = api.jobs[41].task
    bars.close()
    assert terminal.getvalue().rpartition("\x1b[2K")[2].strip() == ""


def test_notice_in_a_log_has_its_time(running: FakeApi, run: Any) -> None:
    """Without a terminal the lost and the restored connection are lines of the log."""
    running.jobs[41].states = [(JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
    running.cut_after = 1
    lines = run("job", "watch", "41").err.splitlines()
    words = [line.split(" ", 2)[::2] for line in lines if "connect" in line]
    assert [word.partition(" (")[0] for _, word in words] == ["41 connection lost", "41 reconnected"]
    assert all(datetime.fromisoformat(time) for time, _ in words)


def test_json_of_a_watch_is_the_final_states(api: FakeApi, run: Any) -> None:
    """-o json and --json print the final states, and JSON lines each state with the chosen fields."""
    run("scan", "127.9.8.0/24", "--no-watch")
    assert json.loads(run("job", "watch", "41", "-o", "json").out) == [json.loads(api.jobs[41].task.model_dump_json())]
    assert json.loads(run("job", "watch", "41", "--json", "job_id,status.progress").out) == [
        {"job_id": "41", "status": {"progress": 100}}
    ]
    assert run("job", "watch", "41", "-o", "jsonl", "--json", "status.progress").out == '{"status":{"progress":100}}\n'


@pytest.mark.parametrize("format_", ["json", "jsonl"])
def test_fields_of_a_scan_in_a_format_without_a_choice_are_refused(api: FakeApi, run: Any, format_: str) -> None:
    """--json chooses fields of results, which a document of job, ledger and results does not offer."""
    ended = run("scan", "127.9.8.0/24", "-o", format_, "--json", "port")
    assert ended.code == 2
    assert "--json" in ended.err
    assert not api.jobs


@pytest.mark.parametrize("command", [["scan", "127.9.8.0/24"], ["job", "watch", "41"], ["job", "wait", "41"]])
def test_time_limit_of_zero_is_refused(api: FakeApi, run: Any, command: list[str]) -> None:
    """A limit of no time would never show a state, so it is an error instead of no limit."""
    ended = run(*command, "--timeout", "0")
    assert ended.code == 2
    assert "--timeout: 0 is not a positive duration" in ended.err
    assert not api.jobs


def test_reasons_of_a_failed_job_are_read_from_every_page(api: FakeApi, run: Any) -> None:
    """The end of a job names the addresses of all pages of its ledger."""

    def failed(job: FakeJob) -> None:
        job.counts = {"answered": 254, "lost": 2}
        job.page_size = 1
        job.not_probed = [
            rest.LedgerEntry(address=f"127.9.8.{number}", ports="22", outcome="lost", reason=f"reason {number}")
            for number in (1, 2)
        ]

    api.states, api.made = [(JobStatus.FAILED, 99)], failed
    ended = run("scan", "127.9.8.0/24")
    assert "reason 1 (127.9.8.1); reason 2 (127.9.8.2)" in ended.err
    assert "  reason 2 (127.9.8.2)\n" in run("job", "ledger", "41").out
    api.requests.clear()
    ended = run("job", "ledger", "41", "--not-probed")
    assert len(ended.out.splitlines()) == 2
    assert "listed" not in ended.err
    assert [each.url.params.get("after") for each in api.requests] == ["0", "1"]


def entries(outcome: str, addresses: Sequence[str], reason: str = "") -> list[rest.LedgerEntry]:
    return [rest.LedgerEntry(address=each, ports="22", outcome=outcome, reason=reason) for each in addresses]


@pytest.mark.parametrize("before", ["excluded", "down"])
def test_reason_after_many_other_entries_is_named(
    api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Excluded and down addresses do not count towards the entries that a summary reads."""
    monkeypatch.setattr(coverage, "ENTRIES", 2)

    def failed(job: FakeJob) -> None:
        job.counts = {"answered": 251, before: 4, "lost": 1}
        job.page_size = 2
        job.not_probed = entries(before, [f"127.9.8.{n}" for n in range(4)]) + entries("lost", ["127.9.8.9"], "killed")

    api.states, api.made = [(JobStatus.FAILED, 99)], failed
    assert "1 of 256 addresses was NOT probed: killed (127.9.8.9)\n" in run("scan", "127.9.8.0/24").err
    assert run("job", "ledger", "41").out.endswith("  killed (127.9.8.9)\n")


def test_reasons_of_more_entries_than_are_read_end_with_and_others(
    api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary does not name the networks of the first pages as if they were all."""
    monkeypatch.setattr(coverage, "ENTRIES", 2)

    def cancelled(job: FakeJob) -> None:
        job.counts = {"answered": 252, "cancelled": 4}
        job.page_size = 2
        job.not_probed = entries("cancelled", [f"127.9.8.{n}" for n in range(4)])

    api.states, api.made = [(JobStatus.CANCELLED, 99)], cancelled
    ended = run("scan", "127.9.8.0/24")
    assert "4 of 256 addresses were NOT probed: cancelled (127.9.8.0/31); and others\n" in ended.err
    assert run("job", "ledger", "41").out.endswith("  cancelled (127.9.8.0/31)\n  and others\n")
    assert run("job", "ledger", "41", "--not-probed", "--networks").out == "127.9.8.0/30\tcancelled\t\n"


def test_ledger_of_an_accounted_job_is_read_once(api: FakeApi, run: Any) -> None:
    """The summary of a completed job has no reasons, so further pages are not needed."""

    def completed(job: FakeJob) -> None:
        job.counts, job.page_size = {"answered": 254, "down": 2}, 1
        job.not_probed = entries("down", ["127.9.8.1", "127.9.8.2"])

    api.states, api.made = [(JobStatus.COMPLETED, 100)], completed
    run("scan", "127.9.8.0/24")
    assert len([each for each in api.requests if each.url.path.endswith("/ledger")]) == 1


def test_time_limit_while_a_final_ledger_is_read_still_prints_the_end(api: FakeApi, run: Any) -> None:
    """When the time is over before the ledger was read, the end is printed without it."""
    api.fault_of = lambda request: busy() if request.url.path.endswith("/ledger") else None
    began = time.monotonic()
    ended = run("--retry", "30", "scan", "127.9.8.0/24", "--timeout", "0.5s")
    assert time.monotonic() - began < 20
    assert ended.code == 0
    assert "completed 100%" in ended.err
    assert "no response before --timeout expired" in ended.err


@pytest.mark.parametrize("format_", ["table", "jsonl"])
def test_found_prints_results_while_the_job_runs(api: FakeApi, run: Any, format_: str) -> None:
    """--found prints each result once, also of a job that has not ended."""

    def found(job: FakeJob) -> None:
        job.results = [result(1, "127.9.8.1", 22), result(2, "127.9.8.7", 80)]

    api.states, api.made = [(JobStatus.RUNNING, 62)], found
    for command in (["scan", "127.9.8.0/24"], ["job", "watch", "41"]):
        ended = run(*command, "--found", "--timeout", "0.5s", "-o", format_)
        assert ended.code == 124
        assert (ended.out.count("127.9.8.1"), ended.out.count("127.9.8.7")) == (1, 1)
    reads = [each for each in api.requests if each.url.path.endswith("/results")]
    assert {each.url.params["after"] for each in reads} == {"0", "2"}


def test_found_prints_the_results_that_came_last(api: FakeApi, run: Any) -> None:
    """Results found after the last poll of a running job are printed at its end."""

    def found(job: FakeJob) -> None:
        job.results = [result(1, "127.9.8.1", 22)]

    api.made = found
    for command in (["scan", "127.9.8.0/24"], ["job", "watch", "41"]):
        assert run(*command, "--found").out == "127.9.8.1\t22/tcp\topen\tssh\tOpenSSH 9.2p1\n"


def test_printer_prints_a_result_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A result that was printed while the job ran is not printed again at its end."""
    printer = findings.Printer(Output())
    for number in (1, 2, 1):
        printer.print(result(number, f"127.9.8.{number}", 22))
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["127.9.8.1", "127.9.8.2"]


def test_found_in_a_format_of_whole_documents_is_refused(api: FakeApi, run: Any) -> None:
    """A document cannot be printed line by line."""
    assert run("scan", "127.9.8.0/24", "--found", "-o", "json").code == 2
    assert not api.requests
