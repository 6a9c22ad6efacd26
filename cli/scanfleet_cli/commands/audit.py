"""`scanfleet audit`: the audit log, for administrators."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from scanfleet_cli import calls
from scanfleet_cli.output import Column, Row, column
from scanfleet_cli.session import Session, lists, with_session

TAIL_SECONDS: Final = 2.0  # between two looks at the log

_FILTERS: Final = (
    ("subject", "Only what this user did or was refused."),
    ("request", "Only what became of this request id."),
    ("action", "Only this action, for example task.create."),
    ("decision", "allowed or refused."),
    ("rule", "Only what this rule decided."),
    ("source", "Only from this address."),
    ("since", "Only since this time (RFC 3339)."),
    ("until", "Only until this time (RFC 3339)."),
)


def _filters(command: Any) -> Any:
    for name, text in reversed(_FILTERS):
        command = click.option(f"--{name}", help=text)(command)
    return command


def _columns() -> list[Column]:
    return [
        column("TIME"),
        column("WHO", "subject"),
        column("DID", "action"),
        column("WHAT", "target"),
        column("DECISION"),
        column("RULE"),
        column("FROM", "source"),
        column("REASON", wide=True),
        column("REQUEST", "request_id", wide=True),
    ]


@click.group()
def audit() -> None:
    """The audit log, for administrators."""


@audit.command("list")
@_filters
@lists
@with_session
def list_(session: Session, /, **filters: str | None) -> None:
    """List what was changed and what was refused, newest first."""
    session.show_list(session.rows(_call(filters)), _columns(), "no entry matches", "id")


@audit.command()
@_filters
@lists
@with_session
def tail(session: Session, /, **filters: str | None) -> None:
    """Print entries as they are recorded, until Ctrl-C."""
    seen: set[str] = set()
    first = True
    while True:
        page: list[Row] = session.client.ask(_call(filters).page(1, 100)).json["entries"]
        new = [row for row in reversed(page) if _key(row) not in seen]
        seen = {_key(row) for row in page} | (seen if len(seen) < 10_000 else set())  # noqa: PLR2004 # bounded
        if not first or session.limit == 0:
            session.output.many(new, _columns())
        elif new:
            session.output.many(new[-session.limit :], _columns())
        first = False
        time.sleep(TAIL_SECONDS)


def _key(row: Row) -> str:
    return repr(sorted(row.items()))


def _call(filters: dict[str, str | None]) -> calls.ListCall[Any]:
    return calls.list_audit(**{("request_id" if name == "request" else name): value for name, value in filters.items()})
