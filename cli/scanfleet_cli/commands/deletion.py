"""`scanfleet deletion`: receipts of deleted jobs."""

from __future__ import annotations

import click

from scanfleet.contracts import rest
from scanfleet_cli import calls
from scanfleet_cli.output import Column, ago, column
from scanfleet_cli.session import Session, lists, supported, with_session


@click.group()
def deletion() -> None:
    """Receipts of deleted jobs."""


@deletion.command("list")
@click.option(
    "--state", type=click.Choice(["open", "done"]), help="Only deletions in progress (open), or completed ones (done)."
)
@click.option("--user", metavar="ID|all", help="Administrators only: jobs of this user, or of all users.")
@lists(rest.Deletion)
@with_session
def list_(session: Session, /, *, state: str | None, user: str | None) -> None:
    """List deletions of jobs, the last requested first."""
    output = session.output
    columns = [
        column("JOB", "job_id"),
        column("SUBNET", "subnet_id"),
        *([column("USER", "user_id")] if user is not None else []),
        column("REASON"),
        column("BY", "requested_by"),
        Column("REQUESTED", lambda row: ago(row["requested_at"], output)),
        column("STATE"),
        column("HOSTS", "deleted.hosts"),
        column("RESULTS", "deleted.rows"),
        column("CHUNKS", "deleted.chunks", wide=True),
        column("COMPLETED", "completed_at", wide=True),
    ]
    rows = session.rows(calls.list_deletions(state=state, user_id=user))
    with supported("receipts of deletions"):
        session.show_list(rows, columns, "no deletion matches" if state or user else "no deleted jobs", "job_id")
