"""The list of jobs: columns, details that the API's list does not contain, and live updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from scanfleet import rest
from scanfleet.messages import Job, JobStatus
from scanfleet_cli import calls, resolve
from scanfleet_cli.errors import CommandError
from scanfleet_cli.output import Column, Format, Output, Row, ago, column, duration
from scanfleet_cli.session import LIMIT, Session
from scanfleet_cli.views import Redrawn


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
    """Details that a list of jobs does not contain: the progress of unfinished jobs; with `-o wide` names and machines too."""

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
        CommandError: the format cannot be printed line by line.
        KeyboardInterrupt: on Ctrl-C, the only end.
    """
    output = session.output
    if output.format not in {Format.TABLE, Format.WIDE, Format.JSONL} or output.fields is not None:
        raise CommandError("--watch prints a table, or JSON lines with -o jsonl", hint="leave out --watch")
    states = session.client.watch_all(call.query.get("user_id"), output.note)
    matching = (task for task in states if _matches(task.job, call.query))
    if output.format is Format.JSONL:
        for task in matching:
            output.line(task.model_dump(mode="json"))
    elif output.terminal:
        _redraw(session, call, states, columns, details)
    else:
        for row in session.rows(call):
            output.row(details.read(row), columns)
        for task in matching:
            output.row(details.of(task.job.model_dump(mode="json"), task.status), columns)


def _redraw(
    session: Session,
    call: calls.ListCall[rest.JobList],
    states: Iterator[rest.TaskStatus],
    columns: Sequence[Column],
    details: Details,
) -> None:
    output = session.output
    rows = {row["id"]: details.read(row) for row in session.rows(call)}
    redrawn = Redrawn(output, output.stdout)
    try:
        redrawn.draw(output.table(rows.values(), output.shown(columns)))
        for task in states:
            row = details.of(task.job.model_dump(mode="json"), task.status)
            if not _matches(task.job, call.query):
                rows.pop(task.job.id, None)
            elif task.job.id in rows:
                rows[task.job.id] = row
            else:
                rows = dict(islice({task.job.id: row, **rows}.items(), session.limit_or(LIMIT) or None))
            redrawn.draw(output.table(rows.values(), output.shown(columns)))
    finally:
        redrawn.close()
        for line in output.table(rows.values(), output.shown(columns)):
            output.emit(line)


def _matches(job: Job, query: Mapping[str, Any]) -> bool:
    """Whether a job of the stream matches the filters of the list, except `since`, which new jobs always match."""
    statuses = query.get("status")
    return (
        (statuses is None or job.status in statuses.split(","))
        and query.get("subnet_id") in {None, job.subnet_id}
        and query.get("policy_id") in {None, job.policy_id}
    )
