"""Imports of subnets from CSV: the verdict of the service on each line, and the import of the lines that it accepts."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from typing import Final

from scanfleet.contracts import rest
from scanfleet_cli import calls
from scanfleet_cli.output import printable
from scanfleet_cli.session import Session, supported

FIELDS: Final = tuple(rest.SubnetImportLine.model_fields)
"""Fields of a line as JSON."""


def imported(session: Session, text: str, *, dry_run: bool, update: bool) -> list[rest.SubnetImportLine]:
    """Import the lines that the service accepts; return its verdict on each line, with the ids of the subnets.

    Args:
        session: of the command.
        text: the CSV file.
        dry_run: whether to change nothing.
        update: whether to change existing subnets of the same name.

    Raises:
        ApiError: the text is not CSV with the columns of a subnet.
    """
    with supported("imports of subnets"):
        lines = session.client.send(calls.check_subnets(text, update=update)).lines
    refused = {each.line for each in lines if each.action == "refused"}
    if dry_run or all(each.action in {"exists", "refused"} for each in lines):
        return lines
    made = session.client.send(calls.import_subnets(_without(text, refused), update=update))
    ids = iter([subnet.id for subnet in made.subnets])
    return [each if each.line in refused else each.model_copy(update={"id": next(ids)}) for each in lines]


def _without(text: str, lines: set[int]) -> str:
    """Return a CSV file without the rows that end in these lines, counted from 1."""
    reader = csv.reader(io.StringIO(text, newline=""))
    kept = io.StringIO()
    csv.writer(kept, lineterminator="\n").writerows(row for row in reader if reader.line_num not in lines)
    return kept.getvalue()


def summary(lines: Sequence[rest.SubnetImportLine], *, dry_run: bool) -> str:
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
