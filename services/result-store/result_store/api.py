r"""The results of a task, streamed as JSON, NDJSON or CSV.

JSON and NDJSON hold every text exactly, written in ASCII, so that no escape sequence or right-to-left override acts on
the terminal of whoever looks at them. CSV is for spreadsheets and people: RFC 4180, one line a record; what does not print
is written as an escape (`\n`, `\t`, `\x1b`, `\u202e`). A `'` comes before each part of a text that a spreadsheet would take for
a formula: at its start, and after `;` and `|`, which separate cells in the spreadsheets of many languages.
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

PIECE: Final = 1 << 16  # characters that go out at once: what a server buffers before it waits for the reader

# A sign of a formula or its full-width form, where a cell may begin. Spreadsheets drop spaces and quotes before it.
_FORMULA: Final = re.compile(r"""(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])""")
_RANGE: Final = re.compile(
    r"([\w.+*-]+/[\w.+*-]+)(?:;(?!q=)[^;]*)*(?:;q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?", re.ASCII
)

# A banner may hold HTML: no browser is to guess that the answer is a page.
_HEADERS: Final = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}


class Results(Protocol):
    def results(self, job_id: int, user_id: int | None) -> AsyncIterator[Iterable[Result]]:
        """The job's results in order of creation, host by host; `user_id` limits them to that user's.

        Raises:
            DependencyError: the store is away, maybe halfway.
        """


@dataclass(frozen=True, slots=True)
class Format:
    """How a list of results is written."""

    media_type: str
    head: str
    row: Callable[[Result], str]
    between: str
    tail: str


class _Line:
    """What `csv` takes for a file; its writer answers what this writes."""

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
    """The format that an Accept header likes best; JSON if it likes none, or several equally."""
    liked: dict[str, float] = {}
    for item in accept.lower().split(","):
        if match := _RANGE.fullmatch(re.sub(r"\s", "", item)):
            liked[match[1]] = float(match[2] or 1)

    def quality(form: Format) -> float:
        anything_like = form.media_type.split("/")[0] + "/*"
        return liked.get(form.media_type, liked.get(anything_like, liked.get("*/*", 0)))

    return max((JSON, NDJSON, CSV), key=quality)


async def write(form: Format, results: AsyncIterator[Iterable[Result]]) -> AsyncIterator[bytes]:
    """The document in pieces of about `PIECE` bytes; at least one."""
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
    """The task's results in order of creation, as far as they are the caller's.

    Whether the task exists and whose it is only the orchestrator knows; the gateway asks it first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")))
    pieces = write(form, store.results(job_id, None if caller.admin else caller.user_id))
    first = await anext(pieces)  # a store that is away now is a 503; later it can only be a broken answer

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type=form.media_type, headers=_HEADERS)
