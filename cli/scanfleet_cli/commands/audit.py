"""`scanfleet audit`: the audit log, for administrators."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, Final

import click

from scanfleet.clock import rfc3339
from scanfleet.contracts import rest
from scanfleet_cli import calls
from scanfleet_cli.output import Column, Format, Row, column
from scanfleet_cli.session import LIMIT, Session, lists, with_session

TAIL_SECONDS: Final = 2.0  # polling interval of the log
OVERLAP: Final = timedelta(seconds=10)  # time within which entries may be recorded out of order

_FILTERS: Final = (
    ("subject", "Only entries of this user."),
    ("request", "Only entries of this request id."),
    ("action", "Only this action, for example create_tasks."),
    ("decision", "Only entries with this decision."),
    ("rule", "Only decisions of this rule."),
    ("source", "Only from this source address."),
    ("service", "Only entries of this service, for example api-gateway."),
    ("since", "Only entries since this time (RFC 3339)."),
    ("until", "Only entries before this time (RFC 3339)."),
)
_TYPES: Final = {"decision": click.Choice(["allowed", "refused"])}


def _filters(command: Any) -> Any:
    for name, text in reversed(_FILTERS):
        command = click.option(f"--{name}", type=_TYPES.get(name), help=text)(command)
    return command


def _columns() -> list[Column]:
    return [
        column("TIME"),
        column("WHO", "subject"),
        column("DID", "action"),
        column("WHAT", "target"),
        Column("DECISION", _decision),
        column("RULE"),
        column("FROM", "source"),
        column("REASON", wide=True),
        column("REQUEST", "request_id", wide=True),
    ]


def _decision(row: Row) -> str:
    return str(row["decision"]) if row.get("genuine", True) else f"{row['decision']} (not genuine)"


@click.group()
def audit() -> None:
    """The audit log, for administrators."""


@audit.command("list")
@_filters
@lists(rest.AuditEntry)
@with_session
def list_(session: Session, /, **filters: str | None) -> None:
    """List changes and refusals, newest first."""
    session.show_list(session.rows(_call(filters)), _columns(), "no entry matches", "id")


@audit.command()
@_filters
@lists(rest.AuditEntry)
@with_session
def tail(session: Session, /, **filters: str | None) -> None:
    """Print the latest entries, then new ones until Ctrl-C."""
    output, new = session.output, _recorded(session, filters)
    if output.format is Format.JSON:  # an array would not end
        output.format = Format.JSONL
    if output.format in {Format.TABLE, Format.WIDE} and output.fields is None:
        for entries in new:
            output.many(entries, _columns())
    else:
        if output.fields is not None and output.format is not Format.CSV:
            output.format = Format.JSONL
        output.many(chain.from_iterable(new), _columns())


def _recorded(session: Session, filters: dict[str, str | None]) -> Iterator[list[Row]]:
    """Yield the latest entries, then the new ones of each poll, oldest first and without duplicates.

    Pages start at the newest entry, so an entry that is recorded meanwhile moves others to the next page: duplicates are
    recognised by id. Each poll overlaps the previous one by some seconds, since several replicas record concurrently; it
    reads again only entries that the previous one has read.
    """
    seen: set[str] = set()
    earliest = filters["since"]
    limit = session.limit_or(LIMIT)
    latest = _latest(session.rows(_call(filters), 0), limit)
    while True:
        read = {str(row["id"]): row for row in reversed(latest)}
        yield [row for id_, row in read.items() if id_ not in seen][-limit:]
        limit = 0
        if read:
            seen = set(read)
            since = max(map(_time, read.values())) - OVERLAP
            if earliest is None or since > datetime.fromisoformat(earliest):
                filters = filters | {"since": rfc3339(since)}
        session.effects.sleep(TAIL_SECONDS)
        latest = list(session.rows(_call(filters), 0))


def _latest(entries: Iterator[Row], limit: int) -> list[Row]:
    """Return the first `limit` entries, or all, and those that the next poll reads again."""
    found: list[Row] = []
    for row in entries:
        if limit and len(found) >= limit and _time(row) < _time(found[0]) - OVERLAP:
            break
        found.append(row)
    return found


def _time(row: Row) -> datetime:
    return datetime.fromisoformat(row["received_at"])


def _call(filters: dict[str, str | None]) -> calls.ListCall[Any]:
    return calls.list_audit(**{("request_id" if name == "request" else name): value for name, value in filters.items()})
