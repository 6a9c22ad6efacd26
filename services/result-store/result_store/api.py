r"""The results of a task, streamed as JSON, NDJSON or CSV.

JSON and NDJSON hold every text exactly, written in ASCII, so that no escape sequence or right-to-left override acts on
a reader's terminal. CSV is for spreadsheets and people: RFC 4180, one line per record; unprintable characters are written
as escapes (`\n`, `\t`, `\x1b`, `\u202e`). An apostrophe precedes each part of a text that a spreadsheet would evaluate as a
formula: at the start of the text, and after `;` and `|`, which separate cells in some locales.
"""

from __future__ import annotations

import csv
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Protocol, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from scanfleet.auth import Caller, Guarded
from scanfleet.rest import Result
from scanfleet.service import PathId

PIECE: Final = (
    1 << 16
)  # characters per chunk of the response: as much as the server buffers before it waits for the reader

# A formula prefix or its full-width form where a cell may begin. Spreadsheets drop spaces and quotes before it.
_FORMULA: Final = re.compile(r"""(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])""")
_RANGE: Final = re.compile(
    r"([\w.+*-]+/[\w.+*-]+)(?:;(?!q=)[^;]*)*(?:;q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?", re.ASCII
)

# A banner may contain HTML: browsers must not sniff the response as a page.
_HEADERS: Final = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}


class Results(Protocol):
    def results(self, job_id: int, user_id: int | None) -> AsyncIterator[Iterable[Result]]:
        """Yield the job's results in order of creation, host by host; `user_id` limits them to that user's.

        Raises:
            DependencyError: the store is unavailable; it can fail after some results were yielded.
        """


@dataclass(frozen=True, slots=True)
class Format:
    """An export format: how a list of results is serialized."""

    media_type: str
    head: str
    row: Callable[[Result], str]
    between: str
    tail: str


class _Line:
    """A file for `csv.writer` whose `write` returns the line, so that `writerow` returns it too."""

    def write(self, text: str) -> str:
        return text


_csv: Final = csv.writer(_Line())


def _csv_row(result: Result) -> str:
    return cast(str, _csv.writerow([_cell(value) for value in result.model_dump(mode="json").values()]))


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.isprintable():
        value = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return _FORMULA.sub(r"\1'", value)


def _json_row(result: Result) -> str:
    return result.model_dump_json(ensure_ascii=True)


JSON: Final = Format("application/json", "[", _json_row, ",", "]")
NDJSON: Final = Format("application/x-ndjson", "", lambda result: _json_row(result) + "\n", "", "")
CSV: Final = Format("text/csv", ",".join(Result.model_fields) + "\r\n", _csv_row, "", "")


def negotiate(accept: str) -> Format:
    """Return the format with the highest quality in an Accept header; JSON if none is acceptable or several are equal."""
    liked: dict[str, float] = {}
    for item in accept.lower().split(","):
        if match := _RANGE.fullmatch(re.sub(r"\s", "", item)):
            liked[match[1]] = float(match[2] or 1)

    def quality(form: Format) -> float:
        anything_like = form.media_type.split("/")[0] + "/*"
        return liked.get(form.media_type, liked.get(anything_like, liked.get("*/*", 0)))

    return max((JSON, NDJSON, CSV), key=quality)


async def write(form: Format, results: AsyncIterator[Iterable[Result]]) -> AsyncIterator[bytes]:
    """Yield the document in pieces of about `PIECE` bytes; at least one."""
    parts, size, between = [form.head], 0, ""
    async for some in results:
        for result in some:
            row = form.row(result)
            parts += (between, row)
            size += len(row)
            between = form.between
            if size >= PIECE:
                yield "".join(parts).encode()
                parts, size = [], 0
    parts.append(form.tail)
    yield "".join(parts).encode()


async def _store(request: Request) -> Results:  # a thread would run what is not async
    return cast(Results, request.app.state.store)


router = APIRouter(route_class=Guarded)


@router.get("/api/v1/task/{job_id}/results")
async def results(
    job_id: PathId,
    caller: Caller,
    request: Request,
    store: Annotated[Results, Depends(_store)],
) -> StreamingResponse:
    """Stream the task's results in order of creation, limited to those that the caller owns.

    Only the orchestrator stores whether the task exists and who owns it; the gateway asks the orchestrator first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")))
    pieces = write(form, store.results(job_id, None if caller.admin else caller.user_id))
    first = await anext(pieces)  # if the store is unavailable now, the response is a 503; later it can only be cut off

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type=form.media_type, headers=_HEADERS)
