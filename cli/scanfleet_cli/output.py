"""Output: formats, fields, tables, and escapes of text from the network."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeAlias

from scanfleet_cli.errors import CommandError

if TYPE_CHECKING:
    from pydantic import BaseModel

Row = Mapping[str, Any]
"""An object of the API as JSON."""


class Format(StrEnum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    NAME = "name"
    XML = "xml"
    """nmap's; of results only."""

    @property
    def machine(self) -> bool:
        return self in {Format.JSON, Format.JSONL}


COLOURS: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "bright_black",
    "running": "yellow",
    "answered": "green",
    "lost": "red",
    "timed_out": "yellow",
}
"""Colours of states; other words have none."""

# Positions in a cell that a spreadsheet reads as the start of a formula; the CSV of the service escapes the same.
_FORMULA: Final = re.compile(r"""(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])""")
_GAP: Final = 2  # spaces between columns
_NARROWEST: Final = 8  # characters of a cell that is cut to fit the terminal


def printable(text: str) -> str:
    r"""Escape non-printing characters (`\n`, `\x1b`, `\u202e`), so that no text controls the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    cell: Callable[[Row], str]
    wide: bool = False
    """Shown only with `-o wide`."""


def column(title: str, path: str = "", *, wide: bool = False) -> Column:
    """Return the column of one field."""
    path = path or title.lower()
    return Column(title, lambda row: text_of(pick(row, path)), wide)


def text_of(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() | [dict(), *_]:
            return json.dumps(value)
        case list() | tuple():
            return ",".join(map(text_of, value)) or "-"
        case _:
            return str(value)


def pick(row: Row, path: str) -> Any:
    """Return the value at a dotted path.

    Raises:
        KeyError: the path does not exist.
    """
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(path)
        value = value[name]
    return value


def paths_of(row: Row, prefix: str = "") -> Iterator[str]:
    """Yield every dotted path of an object."""
    for name, value in row.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from paths_of(value, f"{prefix}{name}.")


Kind: TypeAlias = "type[BaseModel] | tuple[str, ...]"
"""A kind of object that a command prints: the model of the API, or the paths of its fields."""


def fields_of(kind: Kind) -> list[str]:
    """Return every dotted path of the objects of a kind."""
    return list(kind) if isinstance(kind, tuple) else list(_fields_of_model(kind))


def _fields_of_model(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        nested: Any = field.annotation
        if hasattr(nested, "model_fields"):
            yield from _fields_of_model(nested, f"{prefix}{name}.")


class Output:
    """stdout and stderr of a command.

    Args:
        stdout: for data.
        stderr: for everything else.
    """

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.format = Format.TABLE
        self.fields: list[str] | None = None
        self.kind: Kind = ()
        """Of the objects that the command prints."""

        self.quiet = False
        self.coloured = False
        self.width = 0
        """Columns of the terminal; 0 if stdout is not a terminal."""

        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.clear: Callable[[], None] = lambda: None
        """Erases lines that are redrawn in place; called before each permanent line."""

    @property
    def terminal(self) -> bool:
        return self.width > 0

    def emit(self, text: str = "") -> None:
        """Print a line on stdout."""
        self.clear()
        print(text, file=self.stdout, flush=not self.terminal)

    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet is given."""
        if not self.quiet:
            self.prompt(text)

    def prompt(self, text: str) -> None:
        """Print a line on stderr that the user needs to continue, even with --quiet."""
        self.clear()
        print(text, file=self.stderr, flush=True)

    def paint(self, word: str, text: str | None = None) -> str:
        """Return `text` in the colour of the state `word`."""
        text = word if text is None else text
        if not self.coloured or word not in COLOURS:
            return text
        from click import style  # noqa: PLC0415 # only on a terminal

        return style(text, fg=COLOURS[word])

    def one(self, thing: Row, block: Callable[[], Iterable[str]], name: str = "id") -> None:
        """Print one object.

        Args:
            thing: object of the API, which the JSON formats print unchanged.
            block: returns the lines of the table formats.
            name: path of the field that `-o name` prints.
        """
        match self.format:
            case Format.JSON | Format.JSONL:
                self._json(self._chosen(thing), indent=self.format is Format.JSON)
            case Format.CSV:
                self._csv([thing])
            case Format.NAME:
                self.emit(text_of(pick(thing, name)))
            case _ if self.fields is not None:
                self._json(self._chosen(thing), indent=True)
            case _:
                for line in block():
                    self.emit(line)

    def line(self, thing: Row) -> None:
        """Print one object as a JSON line."""
        self._json(self._chosen(thing), indent=False)

    def many(self, rows: Iterable[Row], columns: Sequence[Column], name: str = "id") -> None:
        """Print objects as a table, or unchanged in a JSON format; streamed if the format allows it."""
        if self.fields is not None and self.format in {Format.TABLE, Format.WIDE}:
            self.format = Format.JSON
        match self.format:
            case Format.JSON:
                self._json([self._chosen(row) for row in rows], indent=True)
            case Format.JSONL:
                for row in rows:
                    self.line(row)
            case Format.CSV:
                self._csv(rows)
            case Format.NAME:
                for row in rows:
                    self.emit(printable(text_of(pick(row, name))))
            case _:
                self._table(rows, columns)

    def _table(self, rows: Iterable[Row], columns: Sequence[Column]) -> None:
        if self.terminal:
            for text in self.table(rows, self.shown(columns)):
                self.emit(text)
            return
        for row in rows:
            self.row(row, columns)

    def row(self, row: Row, columns: Sequence[Column]) -> None:
        """Print one row of a table whose other rows are not available yet; its cells are not aligned."""
        cells = [printable(each.cell(row)) for each in self.shown(columns)]
        self.emit(("  " if self.terminal else "\t").join(cells))

    def shown(self, columns: Sequence[Column]) -> list[Column]:
        """Return the columns that the format shows."""
        return [each for each in columns if self.format is Format.WIDE or not each.wide]

    def table(self, rows: Iterable[Row], columns: Sequence[Column]) -> Iterator[str]:
        """Yield the lines of a table that fits the terminal; none without rows."""
        cells = [[each.title for each in columns]]
        cells += [[printable(each.cell(row)) for each in columns] for row in rows]
        if len(cells) == 1:
            return
        widths = self._widths(cells)
        for number, line in enumerate(cells):
            shown = [_fit(cell, width) for cell, width in zip(line, widths, strict=True)]
            if number:
                shown = [self.paint(cell.split(" ")[0], text) for cell, text in zip(line, shown, strict=True)]
            yield (" " * _GAP).join(shown).rstrip()

    def _widths(self, cells: Sequence[Sequence[str]]) -> list[int]:
        """Return the widths of the columns; the widest shrinks until the table fits the terminal."""
        widths = [max(_length(line[index]) for line in cells) for index in range(len(cells[0]))]
        over = sum(widths) + _GAP * (len(widths) - 1) - self.width
        while over > 0 and max(widths) > _NARROWEST:
            widest = widths.index(max(widths))
            cut = min(
                over, widths[widest] - _NARROWEST, max(1, widths[widest] - sorted(widths)[-2]) if widths[1:] else over
            )
            widths[widest] -= cut
            over -= cut
        return widths

    def check_fields(self, kind: Kind) -> None:
        """Set the kind of the objects to print, and check the fields of `--json`.

        Raises:
            CommandError: there is none, or the objects of this kind have no such field.
        """
        self.kind = kind
        if self.fields is None:
            return
        known = fields_of(kind)
        unknown = [path for path in self.fields if path not in known]
        if unknown or not self.fields:
            problem = f"no field {', '.join(unknown)}" if unknown else "name the fields"
            raise CommandError(f"--json: {problem}", hint=f"fields: {', '.join(known)}")

    def _chosen(self, row: Row) -> Row:
        """Return a row with the fields of `--json`, nested as in the API; null if an older service omits one."""
        if self.fields is None:
            return row
        chosen: dict[str, Any] = {}
        for path in self.fields:
            *above, name = path.split(".")
            place = chosen
            for each in above:
                place = place.setdefault(each, {})
            place[name] = _value(row, path)
        return chosen

    def _json(self, value: Any, *, indent: bool) -> None:
        self.emit(json.dumps(value, indent=2) if indent else json.dumps(value, separators=(",", ":")))

    def _csv(self, rows: Iterable[Row]) -> None:
        writer = csv.writer(self.stdout)
        paths: list[str] | None = None
        for row in rows:
            if paths is None:
                paths = self.fields or [path for path in paths_of(row) if not isinstance(pick(row, path), Mapping)]
                writer.writerow(paths)
            writer.writerow([_csv_cell(_value(row, path)) for path in paths])
            if not self.terminal:  # a pipe receives each row at once
                self.stdout.flush()
        if paths is None:
            known = fields_of(self.kind)
            writer.writerow(self.fields or [path for path in known if not any(f"{path}." in each for each in known)])

    def error(self, error: CommandError) -> None:
        """Print an error."""
        if self.format.machine:
            body = {"error": error.message, "status": error.status, "hint": error.hint, "request_id": error.request_id}
            print(json.dumps(body), file=self.stderr)
            return
        print(f"scanfleet: {printable(error.message)}", file=self.stderr)
        if error.hint:
            print(f"  {printable(error.hint)}", file=self.stderr)
        if error.request_id:
            print(f"  request {printable(error.request_id)}", file=self.stderr)


def _value(row: Row, path: str) -> Any:
    try:
        return pick(row, path)
    except KeyError:
        return None


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return _FORMULA.sub(r"\1'", printable("" if value in (None, []) else text_of(value)))


def _length(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 # only for text with wide characters

    return cell_len(text)


def _fit(text: str, width: int) -> str:
    length = _length(text)
    if length <= width:
        return text + " " * (width - length)
    while _length(text) > width - 1:
        text = text[:-1]
    return text + "…" + " " * (width - 1 - _length(text))


def count(number: int, noun: str, plural: str = "") -> str:
    """Format a count: `1 job`, `1,204 jobs`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Format a duration: `0:41`, `12:03`, `2:00:41`, `3 days 2:00:41`."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{count(days, 'day')} {clock}" if days else clock


def ago(text: str | None, output: Output) -> str:
    """Format a time of the API for a table: relative on a terminal, unchanged elsewhere."""
    if text is None:
        return "-"
    if not output.terminal:
        return text
    seconds = (output.now() - datetime.fromisoformat(text)).total_seconds()
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            return f"{count(int(seconds // length), unit)} ago"
    return "just now"
