r"""The results of a task, streamed as JSON, NDJSON or CSV.

JSON and NDJSON hold every text exactly, written in ASCII, so that no escape sequence or right-to-left override acts on
a reader's terminal. CSV is for spreadsheets and people: RFC 4180, one line per record; unprintable characters are written
as escapes (`\n`, `\t`, `\x1b`, `\u202e`). An apostrophe precedes each part of a text that a spreadsheet would evaluate as a
formula: at the start of the text, and after `;` and `|`, which separate cells in some locales.
"""

from __future__ import annotations

import csv
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import chain, islice
from typing import Annotated, Final, Protocol, cast

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from scanfleet.auth import Caller, Guarded
from scanfleet.errors import BadRequestError
from scanfleet.messages.fields import MAX_ID
from scanfleet.rest import MAX_RESULTS, Result
from scanfleet.service import PathId, words
from scanfleet.targets import Network, parse_network

PIECE: Final = (
    1 << 16
)  # characters per chunk of the response: as much as the server buffers before it waits for the reader

# A formula prefix or its full-width form where a cell may begin. Spreadsheets drop spaces and quotes before it.
_FORMULA: Final = re.compile(r"""(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])""")
_RANGE: Final = re.compile(
    r"([\w.+*-]+/[\w.+*-]+)(?:;(?!q=)[^;]*)*(?:;q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?", re.ASCII
)

_PORT: Final = re.compile(r"[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]")

# A banner may contain HTML: browsers must not sniff the response as a page.
_HEADERS: Final = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}


class Results(Protocol):
    def results(
        self, job_id: int, user_id: int | None, *, after: int | None = None, raw: bool = True
    ) -> AsyncIterator[Iterable[Result]]:
        """Yield the job's results in order of creation, host by host.

        Args:
            job_id: the job.
            user_id: limits the results to those of this user.
            after: skips the hosts whose results all have lower ids, and yields the others in order of their ids.
            raw: include `raw_data`; without it, the field is empty.

        Raises:
            DependencyError: the store is unavailable; it can fail after some results were yielded.
        """


Fields = tuple[str, ...]
"""Names of fields of a result, in the result's own order."""

ALL_FIELDS: Final[Fields] = tuple(Result.model_fields)


@dataclass(frozen=True, slots=True)
class Format:
    """An export format: how a list of results is serialized."""

    media_type: str
    head: Callable[[Fields], str]
    row: Callable[[Result, Fields], str]
    between: str
    tail: str


class _Line:
    """A file for `csv.writer` whose `write` returns the line, so that `writerow` returns it too."""

    def write(self, text: str) -> str:
        return text


_csv: Final = csv.writer(_Line())


def _csv_row(result: Result, fields: Fields) -> str:
    values = result.model_dump(mode="json", include=set(fields))
    return cast(str, _csv.writerow([_cell(value) for value in values.values()]))


def _csv_head(fields: Fields) -> str:
    return ",".join(fields) + "\r\n"


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.isprintable():
        value = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return _FORMULA.sub(r"\1'", value)


def _json_row(result: Result, fields: Fields) -> str:
    text = result.model_dump_json(include=None if fields == ALL_FIELDS else set(fields), ensure_ascii=True)
    return text.replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


JSON: Final = Format("application/json", lambda _: "[", _json_row, ",", "]")
NDJSON: Final = Format(
    "application/x-ndjson", lambda _: "", lambda result, fields: _json_row(result, fields) + "\n", "", ""
)
CSV: Final = Format("text/csv", _csv_head, _csv_row, "", "")


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


async def write(
    form: Format, results: AsyncIterator[Iterable[Result]], fields: Fields = ALL_FIELDS
) -> AsyncIterator[bytes]:
    """Yield the document in pieces of about `PIECE` bytes; at least one."""
    parts, size, between = [form.head(fields)], 0, ""
    async for some in results:
        for result in some:
            row = form.row(result, fields)
            parts += (between, row)
            size += len(row)
            between = form.between
            if size >= PIECE:
                yield "".join(parts).encode()
                parts, size = [], 0
    parts.append(form.tail)
    yield "".join(parts).encode()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of a job's results are requested."""

    after: int | None = None
    limit: int | None = None
    ports: frozenset[int] = frozenset()
    """Empty selects every port."""

    service: str | None = None
    addresses: Network | None = None

    def __contains__(self, result: Result) -> bool:
        return (
            (self.after is None or result.id > self.after)
            and (not self.ports or result.port in self.ports)
            and (self.service is None or result.service == self.service)
        )

    def _of_host(self, some: Iterable[Result]) -> Iterator[Result]:
        """Yield the selected results of one host."""
        results = iter(some)
        first = next(results, None)
        if first is not None and (self.addresses is None or ip_address(first.ip_address) in self.addresses):
            yield from (result for result in chain((first,), results) if result in self)

    async def of(self, results: AsyncIterator[Iterable[Result]]) -> AsyncIterator[Iterator[Result]]:
        """Yield the selected results, host by host and one at a time, at most `limit`."""
        left = self.limit
        async for some in results:
            found = self._of_host(some)
            if left is None:
                yield found
                continue
            page = list(islice(found, left))
            left -= len(page)
            yield iter(page)
            if not left:
                return


async def _store(request: Request) -> Results:  # a thread would run what is not async
    return cast(Results, request.app.state.store)


router = APIRouter(route_class=Guarded)


async def _selection(
    request: Request,
    after: Annotated[int | None, Query(ge=0, le=MAX_ID)] = None,
    limit: Annotated[int | None, Query(ge=1, le=MAX_RESULTS)] = None,
    service: Annotated[str | None, Query(max_length=200)] = None,
    address: Annotated[str | None, Query(max_length=50)] = None,
) -> Selection:
    ports = words(request, "port")
    if not all(_PORT.fullmatch(port) for port in ports):
        raise BadRequestError("port must be a number from 0 to 65535")
    try:
        addresses = None if address is None else parse_network(address)
    except ValueError as error:
        raise BadRequestError(f"address: {error}") from error
    by_id = after is not None or limit is not None
    return Selection((after or 0) if by_id else None, limit, frozenset(map(int, ports)), service, addresses)


async def _fields(request: Request) -> Fields:
    wanted = words(request, "fields")
    if not set(wanted) <= set(ALL_FIELDS):
        raise BadRequestError(f"fields must be of {', '.join(ALL_FIELDS)}")
    return tuple(name for name in ALL_FIELDS if name in wanted) or ALL_FIELDS


@router.get("/api/v1/task/{job_id}/results")
async def results(
    *,
    job_id: PathId,
    caller: Caller,
    request: Request,
    store: Annotated[Results, Depends(_store)],
    selection: Annotated[Selection, Depends(_selection)],
    fields: Annotated[Fields, Depends(_fields)],
) -> StreamingResponse:
    """Stream the selected results of the task in order of creation, limited to those that the caller owns.

    Only the orchestrator stores whether the task exists and who owns it; the gateway asks the orchestrator first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")))
    owner = None if caller.admin else caller.user_id
    found = store.results(job_id, owner, after=selection.after, raw="raw_data" in fields)
    pieces = write(form, selection.of(found), fields)
    first = await anext(pieces)  # if the store is unavailable now, the response is a 503; later it can only be cut off

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type=form.media_type, headers=_HEADERS)
