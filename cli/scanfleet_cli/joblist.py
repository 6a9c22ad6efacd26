"""The list of jobs: columns, details that the API's list does not contain, and live updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from pydantic import TypeAdapter

from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job, JobStatus
from scanfleet_cli import calls, resolve
from scanfleet_cli.errors import CommandError
from scanfleet_cli.output import Column, Format, Output, Row, ago, column, duration
from scanfleet_cli.session import LIMIT, Session
from scanfleet_cli.views import LiveLines


def columns(output: Output, *, users: bool) -> list[Column]:
    """Return the columns of the table.

    Args:
        output: of the command.
        users: whether to show the owner.
    """
    wide = output.format is Format.WIDE
    return [
        column("ID"),
        Column("STATUS", _status),
        column("SUBNET", "subnet" if wide else "subnet_id"),
        column("POLICY", "policy" if wide else "policy_id"),
        *([column("USER", "user_id")] if users else []),
        Column("STARTED", lambda row: ago(row["start_time"], output)),
        Column("TOOK", lambda row: took(row, output)),
        column("MACHINES", "machines_found", wide=True),
        column("ERROR", "error", wide=True),
    ]


def took(job: Row, output: Output) -> str:
    """Format the run time of a job of the API."""
    if not job["start_time"]:
        return "-"
    end = datetime.fromisoformat(job["end_time"]) if job["end_time"] else output.now()
    return duration((end - datetime.fromisoformat(job["start_time"])).total_seconds())


def _status(job: Row) -> str:
    return f"{job['status']} {job['progress']} %" if "progress" in job else str(job["status"])


class Details:
    """Details that a list of jobs does not contain: progress of unfinished jobs, and with `-o wide` names, machines and errors."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._every = session.output.format is Format.WIDE
        self._names = {each.id: f"{each.cidr} {each.name}" for each in resolve.subnets(session)} if self._every else {}
        self._policy_names = {each.id: each.name for each in resolve.policies(session)} if self._every else {}

    def read(self, job: Row) -> Row:
        """Read the details of a job."""
        task = None
        if self._every or not JobStatus(job["status"]).final:
            task = self._session.find(calls.read_task(job["id"]))
        return self.of(job, task.status if task else None)

    def of(self, job: Row, status: rest.TaskProgress | None) -> Row:
        """Return a job with its details; `status` may be newer than the job."""
        shown = {"machines_found": None, "error": "", **job}
        if status is not None:
            shown |= {"machines_found": status.machines_found, "error": status.error}
            if not status.status.final:
                shown |= {"status": str(status.status), "progress": status.progress}
        shown["subnet"] = self._names.get(job["subnet_id"], str(job["subnet_id"]))
        shown["policy"] = self._policy_names.get(job["policy_id"], str(job["policy_id"]))
        return shown


def watch(session: Session, call: calls.ListCall[rest.JobList], columns: Sequence[Column], details: Details) -> None:
    """Print a list of jobs and its changes: redrawn in place on a terminal, else line by line.

    Args:
        session: of the command.
        call: of the list.
        columns: of the table.
        details: of the jobs.

    Raises:
        CommandError: the format cannot be printed line by line, or `since` is not a time.
        KeyboardInterrupt: on Ctrl-C, the only end.
    """
    output = session.output
    if output.format not in {Format.TABLE, Format.WIDE, Format.JSONL} or output.fields is not None:
        raise CommandError("--watch prints a table, or JSON lines with -o jsonl", hint="leave out --watch")
    matches = _filter(call.query)
    if output.format is Format.JSONL:
        for task in session.client.watch_all(call.query.get("user_id"), session.notice):
            if matches(task.job):
                output.line(task.model_dump(mode="json"))
        return
    table = (_Redrawn if output.terminal else _Lines)(session, call, columns, details)
    try:
        for task in session.client.watch_all(call.query.get("user_id"), session.notice, table.opened):
            table.changed(task, matches=matches(task.job))
    finally:
        table.close()


class _Lines:
    """The list, then a line for each state of a matching job."""

    def __init__(
        self, session: Session, call: calls.ListCall[rest.JobList], columns: Sequence[Column], details: Details
    ) -> None:
        self._session = session
        self._call = call
        self._columns = columns
        self._details = details
        self._rows: dict[int, Row] = {}
        self._read = False

    def opened(self) -> None:
        """Read and print the list when the stream is first open: a job that ends during the read has an event in the stream."""
        if not self._read:
            self._rows = {row["id"]: self._details.read(row) for row in self._session.rows(self._call)}
            self._read = True
            self._print()

    def changed(self, task: rest.TaskStatus, *, matches: bool) -> None:
        """Show the new state of a job."""
        if matches:
            self._session.output.row(self._row(task), self._columns)

    def close(self) -> None:
        """Print the remaining rows."""

    def _row(self, task: rest.TaskStatus) -> Row:
        return self._details.of(task.job.model_dump(mode="json"), task.status)

    def _print(self) -> None:
        for row in self._rows.values():
            self._session.output.row(row, self._columns)


class _Redrawn(_Lines):
    """The list in its current state, redrawn in place."""

    def __init__(
        self, session: Session, call: calls.ListCall[rest.JobList], columns: Sequence[Column], details: Details
    ) -> None:
        super().__init__(session, call, columns, details)
        self._limit = session.limit_or(LIMIT)
        self._live_lines = LiveLines(session.output, session.output.stdout)

    def changed(self, task: rest.TaskStatus, *, matches: bool) -> None:
        rows, job_id = self._rows, task.job.id
        full = self._limit and len(rows) >= self._limit
        if not matches:
            rows.pop(job_id, None)
        elif job_id in rows:
            rows[job_id] = self._row(task)
        elif not full or task.status.status.final or job_id > max(rows):
            # Other jobs of the stream are further down in the list than the table shows.
            self._rows = dict(islice({job_id: self._row(task), **rows}.items(), self._limit or None))
        self._print()

    def close(self) -> None:
        self._live_lines.close()
        for line in self._table():
            self._session.output.emit(line)

    def _print(self) -> None:
        self._live_lines.draw(self._table())

    def _table(self) -> Iterable[str]:
        output = self._session.output
        return output.table(self._rows.values(), output.shown(self._columns))


def _filter(query: Mapping[str, Any]) -> Callable[[Job], bool]:
    """Return whether a job of the stream matches the filters of the list.

    Raises:
        CommandError: `since` is not a time with a time zone.
    """
    since = _time(query["since"]) if "since" in query else None
    statuses = query["status"].split(",") if "status" in query else None

    def matches(job: Job) -> bool:
        return (
            (statuses is None or job.status in statuses)
            and query.get("subnet_id") in {None, job.subnet_id}
            and query.get("policy_id") in {None, job.policy_id}
            and (since is None or job.created_at >= since)
        )

    return matches


def _time(text: str) -> datetime:
    try:
        return TypeAdapter(rest.InputTime).validate_python(text)
    except ValueError as error:
        raise CommandError(
            f"--since: {text} is not a time with a time zone", hint="for example 2026-01-01T12:00:00Z"
        ) from error
