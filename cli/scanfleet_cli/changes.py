"""Changing objects of the API: what several commands create, replace, delete and cancel in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import httpx2

from scanfleet.messages import JobStatus
from scanfleet_cli import calls
from scanfleet_cli.client import Reply
from scanfleet_cli.errors import ApiError, CommandError, Exit, ScanfleetError, UnavailableError, explain
from scanfleet_cli.output import Column, Row, column
from scanfleet_cli.session import Session, many_failed


def create_jobs(session: Session, subnet_ids: Sequence[int], policy_id: int, key: str | None) -> Reply:
    """The answer to the request for a job for each subnet.

    Args:
        session: of the command.
        subnet_ids: of the subnets.
        policy_id: of the policy.
        key: of the user; otherwise the command makes one.

    Raises:
        CommandError: the jobs may have been created under a key that the user does not have yet.
    """
    sent = key or uuid4().hex
    try:
        return session.client.ask(calls.create_tasks(subnet_ids, policy_id, sent))
    except (ApiError, UnavailableError) as error:
        if key is not None or not error.unsure:
            raise
        end = explain(error)
        raise CommandError(
            end.message,
            Exit.FAULT,
            hint=f"the jobs may have been created; to repeat the command safely, add --key {sent}",
            status=end.status,
            request_id=end.request_id,
        ) from error


def submitted_columns(networks: Mapping[int, str]) -> list[Column]:
    """Of jobs that were just created; `networks` are those of subnets, by id."""
    return [
        Column("JOB", lambda row: f"job {row['id']}"),
        Column("NETWORK", lambda row: networks.get(row["subnet_id"], "")),
        column("STATUS"),
    ]


def replaced(session: Session, call: calls.Call[Any]) -> Row:
    """The answer to a PUT.

    Raises:
        CommandError: the object has changed since it was read.
    """
    try:
        after: Row = session.ask(call)
    except ApiError as error:
        if error.status == httpx2.codes.PRECONDITION_FAILED:
            raise CommandError(
                "it was changed by another request in the meantime; nothing was changed",
                hint="repeat the command",
                status=error.status,
            ) from error
        raise
    return after


def delete_each(
    session: Session, noun: str, deletions: Sequence[tuple[int, calls.Call[Any]]], conflict: str = ""
) -> None:
    """Delete objects one by one; one that cannot be deleted stops no other.

    Args:
        session: of the command.
        noun: of the objects.
        deletions: the id of each, and the call that deletes it.
        conflict: what to do when the state of an object forbids it; may be empty.

    Raises:
        CommandError: some could not be deleted.
    """
    errors = []
    for number, call in deletions:
        try:
            session.ask(call)
        except ScanfleetError as error:
            end = explain(error)
            if end.status == httpx2.codes.CONFLICT:
                end.hint = conflict
            errors.append(end)
            continue
        session.output.note(f"✓ {noun} {number} deleted")
    many_failed(errors, session.output)


def cancel_each(session: Session, job_ids: Sequence[int]) -> None:
    """Cancel jobs one by one; one that cannot be cancelled stops no other.

    Raises:
        CommandError: some could not be cancelled.
    """
    errors = []
    for job_id in dict.fromkeys(job_ids):
        try:
            _cancel(session, job_id)
        except ScanfleetError as error:
            end = explain(error)
            end.message = f"job {job_id} could not be cancelled: {end.message}"
            errors.append(end)
            continue
        session.output.note(f"✓ job {job_id} cancelled")
    many_failed(errors, session.output)


def _cancel(session: Session, job_id: int) -> None:
    try:
        session.client.send(calls.cancel_task(job_id))
    except ApiError as error:
        if error.status != httpx2.codes.BAD_REQUEST:
            raise
        task = session.client.send(calls.read_task(job_id))
        if not (error.unsure and task.status.status is JobStatus.CANCELLED):  # else an attempt without an answer did it
            when = task.job.model_dump(mode="json")["end_time"]
            raise CommandError(f"{error.message} (since {when})", status=error.status) from error
