r"""The formats of lists: JSON, NDJSON and CSV.

JSON and NDJSON hold every text exactly, written in ASCII, so that no escape sequence or right-to-left override acts on
a reader's terminal. CSV is for spreadsheets and people: RFC 4180, one line per record; unprintable characters are written
as escapes (`\n`, `\t`, `\x1b`, `\u202e`). An apostrophe precedes each part of a text that a spreadsheet would evaluate as a
formula: at the start of the text, and after `;` and `|`, which separate cells in some locales.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from fastapi import Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from result_store.api.turns import Turn

# Characters per chunk of the response: as much as the server buffers before it waits for the reader.
PIECE_BYTES: Final = 1 << 16

BEGIN_SECONDS: Final = 1.0  # maximum time until the response begins; later errors cut it off
SILENT_SECONDS: Final = 10.0  # maximum time between two pieces: less than the 15 s of the gateway

# A formula prefix or its full-width form where a cell may begin. Spreadsheets drop spaces and quotes before it.
_FORMULA: Final = re.compile(r"""(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])""")
_RANGE: Final = re.compile(
    r"([\w.+*-]+/[\w.+*-]+)(?:;(?!q=)[^;]*)*(?:;q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?", re.ASCII
)

# A banner may contain HTML: browsers must not sniff the response as a page.
_HEADERS: Final = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}

Fields = tuple[str, ...]
"""Names of fields of an object, in the object's own order."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a list of objects is serialized."""

    media_type: str
    head: Callable[[Fields], str]
    row: Callable[[BaseModel, Fields], str]
    between: str
    tail: str
    filler: str
    """Changes no record; readers skip it."""

    reserve: int = 0
    """Number of characters that are kept back, and sent one at a time before fillers while a search finds nothing."""


class _Line:
    """A file for `csv.writer` whose `write` returns the line, so that `writerow` returns it too."""

    def write(self, text: str) -> str:
        return text


_csv: Final = csv.writer(_Line())


def _csv_row(item: BaseModel, fields: Fields) -> str:
    values = item.model_dump(mode="json", include=set(fields))
    return cast(str, _csv.writerow([_cell(value) for value in values.values()]))


def _csv_head(fields: Fields) -> str:
    return ",".join(fields) + "\r\n"


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.isprintable():
        value = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return _FORMULA.sub(r"\1'", value)


def _json_row(item: BaseModel, fields: Fields) -> str:
    some = set(fields) if len(fields) < len(type(item).model_fields) else None
    text = item.model_dump_json(include=some, ensure_ascii=True)
    return text.replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


JSON: Final = Format("application/json", lambda _: "[", _json_row, ",", "]", " ")
NDJSON: Final = Format(
    "application/x-ndjson", lambda _: "", lambda item, fields: _json_row(item, fields) + "\n", "", "", " "
)
# Spreadsheets and databases read a blank line as a record. Of all fields, the head alone lasts for 20 minutes.
CSV: Final = Format("text/csv", _csv_head, _csv_row, "", "", "\r\n", reserve=128)
FORMATS: Final = (JSON, NDJSON, CSV)


def negotiate(accept: str, formats: Sequence[Format] = FORMATS) -> Format:
    """Return the format with the highest quality in an Accept header; the first if none is acceptable or several are equal."""
    liked: dict[str, float] = {}
    for item in accept.lower().split(","):
        if match := _RANGE.fullmatch(re.sub(r"\s", "", item)):
            liked[match[1]] = float(match[2] or 1)

    def quality(form: Format) -> float:
        anything_like = form.media_type.split("/")[0] + "/*"
        return liked.get(form.media_type, liked.get(anything_like, liked.get("*/*", 0)))

    return max(formats, key=quality)


class Piece(NamedTuple):
    """A part of a document."""

    content: bytes
    last: bool = False


async def write(form: Format, found: AsyncIterator[Iterable[BaseModel]], fields: Fields) -> AsyncGenerator[Piece, None]:
    """Yield the document in pieces of about `PIECE_BYTES` bytes; at least one.

    While a search finds nothing, smaller pieces keep the connection, and the server notices when the client leaves.
    """
    parts, size, between = [form.head(fields)], 0, ""
    due = time.monotonic() + BEGIN_SECONDS
    async for some in found:
        for item in some:
            row = form.row(item, fields)
            parts += (between, row)
            size += len(row)
            between = form.between
            if size >= PIECE_BYTES:
                piece, kept = _cut("".join(parts), form)
                yield Piece(piece)
                parts, size, due = [kept], len(kept), time.monotonic() + SILENT_SECONDS
        if time.monotonic() >= due:
            piece, kept = _cut("".join(parts), form)
            yield Piece(piece)
            parts, size, due = [kept], len(kept), time.monotonic() + SILENT_SECONDS
    parts.append(form.tail)
    yield Piece("".join(parts).encode(), last=True)


def _cut(text: str, form: Format) -> tuple[bytes, str]:
    """Return the next piece, at least one character, and the rest of the text."""
    text = text or form.filler
    end = max(len(text) - form.reserve, 1)
    return text[:end].encode(), text[end:]


async def stream(
    turn: Turn, pieces: AsyncGenerator[Piece, None], media_type: str, headers: Mapping[str, str] = _HEADERS
) -> Response:
    """Return a response with these pieces, of which there is at least one.

    A document of one piece is built while its user has a turn; one of several is a download.

    Raises:
        NotFoundError: the job is deleted.
        UnavailableError: too many answers of the user are being built or sent.
        DependencyError: the store is unavailable now; later the response can only be cut off.
    """
    async with turn.to_begin(), AsyncExitStack() as unless_sent:
        unless_sent.push_async_callback(pieces.aclose)
        first = await anext(pieces)
        if first.last:
            return Response(first.content, media_type=media_type, headers=headers)
        await turn.download()
        unless_sent.pop_all()

    async def body() -> AsyncIterator[bytes]:
        yield first.content
        async for piece in pieces:
            yield piece.content

    return StreamingResponse(body(), media_type=media_type, headers=headers)
