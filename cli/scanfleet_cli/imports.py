"""Imports of subnets from CSV: the verdict of the service on each line, and updates of existing subnets."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from scanfleet.contracts import rest
from scanfleet_cli import calls, changes, resolve
from scanfleet_cli.errors import Exit, ScanfleetError, explain
from scanfleet_cli.output import Row, printable
from scanfleet_cli.session import Session, supported

FIELDS: Final = ("line", "action", "id", "error")
"""Fields of a line as JSON."""


@dataclass(slots=True)
class Line:
    """One line of the file, and the action for it."""

    line: int
    """Number of the line in the file, from 1."""

    action: Literal["create", "update", "exists", "refused"]
    body: rest.SubnetBody
    id: int | None = None
    error: str = ""

    @property
    def row(self) -> Row:
        return {"line": self.line, "action": self.action, "id": self.id, "error": self.error or None}

    def refuse(self, error: str) -> None:
        self.action, self.error = "refused", error


def planned(session: Session, text: str, *, update: bool) -> list[Line]:
    """Return the action for each line; change nothing.

    Args:
        session: of the command.
        text: the CSV file.
        update: whether to change existing subnets of the same name.

    Raises:
        ApiError: the text is not CSV with the columns of a subnet.
    """
    with supported("imports of subnets"):
        checked = session.client.send(calls.check_subnets(text)).lines
    lines = [
        Line(each.line, each.action, body, each.id, each.error or "")
        for each, body in zip(checked, _bodies(text), strict=True)
    ]
    if update and any(line.action == "create" for line in lines):
        _choose_updates(session, lines)
    return lines


def _choose_updates(session: Session, lines: Sequence[Line]) -> None:
    """Turn the lines that name an existing subnet into updates."""
    known: dict[str, list[int]] = {}
    for subnet in resolve.subnets(session):
        known.setdefault(subnet.name, []).append(subnet.id)
    named = Counter(line.body.name for line in lines)
    for line in (each for each in lines if each.action == "create"):
        name = line.body.name
        ids = known.get(name, [])
        if len(ids) > 1:
            line.refuse(f"several subnets have the name {name}: {', '.join(map(str, ids))}")
        elif ids and named[name] > 1:
            line.refuse(f"several lines have the name {name} of subnet {ids[0]}")
        elif ids:
            line.action, line.id = "update", ids[0]


def carry_out(session: Session, lines: Sequence[Line]) -> None:
    """Create and update the subnets; an update that the service refuses changes its line.

    Raises:
        ScanfleetError: the service failed or is unavailable, or the token was refused; the lines before are done.
    """
    accepted = [line for line in lines if line.action in {"create", "exists"}]
    if any(line.action == "create" for line in accepted):
        made = session.client.send(calls.import_subnets(_csv([line.body for line in accepted])))
        for line, subnet in zip(accepted, made.subnets, strict=True):
            line.id = subnet.id
    for line in lines:
        if line.action == "update" and line.id is not None:
            try:
                etag = session.client.ask(calls.read_subnet(line.id)).etag
                changes.replaced(session, calls.replace_subnet(line.id, line.body, etag))
            except ScanfleetError as error:
                end = explain(error)
                if end.code not in {Exit.REFUSED, Exit.NOT_FOUND}:
                    raise  # the other lines would fail alike, each after all its retries
                line.refuse(end.message)


def summary(lines: Sequence[Line], *, dry_run: bool) -> str:
    """Format the actions: `12 created, 3 unchanged, 1 refused: line 7: …`."""
    counts = Counter(line.action for line in lines)
    words = {"create": "to create", "update": "to update"} if dry_run else {"create": "created", "update": "updated"}
    shown = [f"{counts['create']} {words['create']}", f"{counts['exists']} unchanged"]
    if counts["update"]:
        shown.append(f"{counts['update']} {words['update']}")
    if counts["refused"]:
        errors = "; ".join(f"line {line.line}: {line.error}" for line in lines if line.action == "refused")
        shown.append(f"{counts['refused']} refused: {printable(errors)}")
    return ", ".join(shown)


def _bodies(text: str) -> Iterator[rest.SubnetBody]:
    """Yield the subnet of each line of a file that the service accepted as CSV, for which it has a verdict each."""
    reader = csv.reader(io.StringIO(text, newline=""))
    columns = [name.strip().lower() for name in next(reader, [])]
    for values in reader:
        if values:
            cells: dict[str, Any] = dict(zip(columns, map(str.strip, values), strict=False))
            exclude = [each.strip() for each in cells.get("exclude", "").split(";") if each.strip()]
            fields = {"name": cells["name"], "cidr": cells["cidr"], "exclude": exclude}
            yield resolve.body(rest.SubnetBody, fields)


def _csv(bodies: Sequence[rest.SubnetBody]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "cidr", "exclude"))
    writer.writerows((body.name, body.cidr, ";".join(body.exclude or [])) for body in bodies)
    return text.getvalue()
