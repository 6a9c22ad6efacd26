from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from result_store.api import CSV, JSON, NDJSON, PIECE, Format, negotiate, router, write
from result_store.domain import ClosedChunk, fold
from result_store.testing import Log, MemoryStore, host
from scanfleet import service
from scanfleet.errors import DependencyError
from scanfleet.messages import HostScanned, PortFound
from scanfleet.rest import Result
from scanfleet.settings import FrontSettings
from scanfleet.testing.tokens import Issuer

FIELDS = [
    *("id", "job_id", "ip_address", "port", "protocol", "service", "version"),
    *("os_info", "status", "banner", "raw_data", "created_at", "updated_at"),
]
HOSTILE = "<script>alert(1)</script>\x1b[2J\x1b]0;pwned\x07\u202e\r\n\"quoted\", 'and' \N{SNOWMAN}\x9b31m"

ISSUER = Issuer()


class AwayStore(MemoryStore):
    async def results(self, job_id: int, user_id: int | None) -> AsyncIterator[Iterable[Result]]:  # noqa: ARG002 # as in the store
        raise DependencyError("mongodb://secret-host is away")
        yield []


def client(store: MemoryStore) -> httpx.AsyncClient:
    @asynccontextmanager
    async def nothing(_app: FastAPI) -> AsyncIterator[None]:
        yield

    app = service.create_app(name="result-store", settings=FrontSettings(), lifespan=nothing, routers=[router])
    app.state.store = store
    app.state.verifier = ISSUER.verifier
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://result-store")


async def store_of(*messages: HostScanned) -> MemoryStore:
    store = MemoryStore()
    await store.add(list(fold(Log().append(*messages)).hosts.values()))
    return store


async def get(
    store: MemoryStore,
    path: str = "/api/v1/task/1/results",
    *,
    user: int = 7,
    admin: bool = False,
    accept: str | None = None,
) -> httpx.Response:
    headers = ISSUER.bearer(user, admin=admin) | ({} if accept is None else {"Accept": accept})
    async with client(store) as http:
        return await http.get(path, headers=headers)


async def test_a_result_has_exactly_the_public_fields() -> None:
    """A result shows each field of the API, in its order, and no other."""
    port = PortFound(
        port=22,
        service="ssh",
        version="OpenSSH 9.2p1",
        os_info="Linux 5.X",
        banner="SSH-2.0-OpenSSH_9.2p1",
        raw_data='<port protocol="tcp" portid="22"/>',
    )
    response = await get(await store_of(host("127.9.8.1", port)))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    [result] = response.json()
    assert list(result) == FIELDS
    assert result == {
        "id": 1,
        "job_id": 1,
        "ip_address": "127.9.8.1",
        "port": 22,
        "protocol": "tcp",
        "service": "ssh",
        "version": "OpenSSH 9.2p1",
        "os_info": "Linux 5.X",
        "status": "open",
        "banner": "SSH-2.0-OpenSSH_9.2p1",
        "raw_data": '<port protocol="tcp" portid="22"/>',
        "created_at": "2026-01-01T00:00:00.000Z",
        "updated_at": "2026-01-01T00:00:00.000Z",
    }


async def test_what_nmap_did_not_say_is_empty() -> None:
    """Text that is unknown is an empty string, never null and never left out."""
    [result] = (await get(await store_of(host("127.9.8.1", 22)))).json()
    assert [result[name] for name in ("service", "version", "os_info", "banner", "raw_data")] == [""] * 5


async def test_results_come_by_time_of_creation() -> None:
    """Results are listed in the order in which the log holds their hosts."""
    response = await get(await store_of(host("127.9.8.9", 80), host("127.9.8.1", 443, 22)))
    found = [(each["ip_address"], each["port"]) for each in response.json()]
    assert found == [("127.9.8.9", 80), ("127.9.8.1", 22), ("127.9.8.1", 443)]
    times = [each["created_at"] for each in response.json()]
    assert times == sorted(times)


async def test_ids_are_numbers_from_one() -> None:
    """Ids are distinct integers that start at 1."""
    response = await get(await store_of(host("127.9.8.1", 22, 80), host("127.9.8.2", 22)))
    assert [each["id"] for each in response.json()] == [1, 2, 3]


async def test_udp_and_undecided_ports_are_results() -> None:
    """A port that is open or open|filtered is a result, for TCP and UDP."""
    found = PortFound(port=53, protocol="udp", status="open|filtered")
    [result] = (await get(await store_of(host("127.9.8.1", found)))).json()
    assert (result["protocol"], result["status"]) == ("udp", "open|filtered")


async def test_a_task_without_results_has_an_empty_list() -> None:
    """Nothing found yet is `[]`, whoever knows whether the task exists."""
    assert (await get(MemoryStore())).text == "[]"


async def test_a_host_that_came_too_late_is_not_shown() -> None:
    """A host that a closed chunk does not claim is in no answer."""
    store = await store_of(host("127.9.8.0", 22), host("127.9.8.1", 80))
    await store.close([ClosedChunk(1, "1-0", "127.9.8.0", "ad")])
    assert [each["port"] for each in (await get(store)).json()] == [22]


@pytest.mark.parametrize(
    "job_id", ["x", "0", "-1", "1.5", "1e3", "01", "+1", "%201", "9" * 30, "9007199254740992", "$ne"]
)
async def test_an_id_that_cannot_be_one_is_unknown(job_id: str) -> None:
    """A path whose id is no id is a 404 with an error."""
    response = await get(MemoryStore(), f"/api/v1/task/{job_id}/results")
    assert (response.status_code, list(response.json())) == (404, ["error"])


async def test_the_largest_id_is_one() -> None:
    """An id up to 2^53 - 1 is looked up."""
    assert (await get(MemoryStore(), f"/api/v1/task/{2**53 - 1}/results")).text == "[]"


async def test_without_a_token_nothing_is_shown() -> None:
    """A request without a token, or with a bad one, is a 401 that says how to authenticate."""
    async with client(await store_of(host("127.9.8.1", 22))) as http:
        for headers in ({}, {"Authorization": "Bearer junk"}):
            response = await http.get("/api/v1/task/1/results", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert list(response.json()) == ["error"]


async def test_users_see_only_their_own() -> None:
    """Results that belong to another user are not shown, whoever let the request through."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    assert [each["port"] for each in (await get(store, user=7)).json()] == [22]
    assert [each["port"] for each in (await get(store, user=8)).json()] == [80]
    assert (await get(store, user=9)).json() == []


async def test_an_administrator_sees_all() -> None:
    """An administrator is shown every result of the task."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    assert [each["port"] for each in (await get(store, user=1, admin=True)).json()] == [22, 80]


@pytest.mark.parametrize("query", ["user_id=8", "user_id[$ne]=7", "admin=true", "job_id=2"])
async def test_nothing_in_the_query_widens_the_view(query: str) -> None:
    """No query parameter changes whose results are shown."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    response = await get(store, f"/api/v1/task/1/results?{query}")
    assert [each["port"] for each in response.json()] == [22]


async def test_a_store_that_is_away_is_a_503() -> None:
    """When nothing could be read yet the answer is a 503 with Retry-After, and tells no internals."""
    response = await get(AwayStore())
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert list(response.json()) == ["error"]
    assert "secret-host" not in response.text


async def test_json_is_text_for_every_terminal() -> None:
    """Hostile text comes back exactly, from a document of printable ASCII that no browser takes for a page."""
    response = await get(await store_of(host("127.9.8.1", PortFound(port=80, banner=HOSTILE))))
    assert response.json()[0]["banner"] == HOSTILE
    assert response.content.isascii()
    assert response.text.isprintable()
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["vary"] == "Accept"


async def test_ndjson_has_a_result_on_each_line() -> None:
    """Each line of NDJSON is one result, as JSON shows it, whatever text it holds."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=HOSTILE), 443))
    response = await get(store, accept="application/x-ndjson")
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    assert [json.loads(line) for line in response.text.splitlines()] == (await get(store)).json()


async def test_csv_is_a_table_with_a_header() -> None:
    """CSV names its columns, ends lines with CRLF, quotes as RFC 4180 says, and holds what JSON holds."""
    port = PortFound(port=80, version='Apache "2.4", (Debian)', service="http")
    store = await store_of(host("127.9.8.1", port, 443))
    response = await get(store, accept="text/csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    header, *rows = csv.reader(io.StringIO(response.text, newline=""), strict=True)
    assert header == FIELDS
    assert rows == [[str(value) for value in each.values()] for each in (await get(store)).json()]
    assert response.text.count("\r\n") == response.text.count("\n") == 3
    assert '"Apache ""2.4"", (Debian)"' in response.text


async def test_csv_is_one_line_of_printable_text_a_result() -> None:
    """What does not print is written as an escape in CSV, so neither a terminal nor a line-wise reader is misled."""
    response = await get(await store_of(host("127.9.8.1", PortFound(port=80, banner=HOSTILE))), accept="text/csv")
    lines = response.text.split("\r\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    [_, row] = csv.reader(lines[:2], strict=True)
    assert row[FIELDS.index("banner")] == (
        "<script>alert(1)</script>\\x1b[2J\\x1b]0;pwned\\x07\\u202e\\r\\n\"quoted\", 'and' \N{SNOWMAN}\\x9b31m"
    )


_SIGNS = ["=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}"]


@pytest.mark.parametrize("sign", _SIGNS)
@pytest.mark.parametrize(
    ("before", "written"),
    [
        ("", "'"),
        (" ", "' "),
        ('"', "'\""),
        ("x;", "x;'"),
        ("x|", "x|'"),
        ("x;  ", "x;'  "),
        ('x;"', "x;'\""),
        (";", ";'"),
    ],
)
async def test_csv_holds_no_formula(before: str, written: str, sign: str) -> None:
    """What a spreadsheet would calculate, whichever separator it uses, gets an apostrophe in CSV and none in JSON."""
    formula = f'{sign}HYPERLINK("http://127.0.0.1")'
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=before + formula)))
    [_, row] = csv.reader(io.StringIO((await get(store, accept="text/csv")).text))
    assert row[FIELDS.index("banner")] == written + formula
    assert (await get(store)).json()[0]["banner"] == before + formula


@pytest.mark.parametrize("text", ["a=b", "x; y=1", "C++", "SSH-2.0-OpenSSH_9.2", "a|b", "root@host", "1 - 2; 3 - 4"])
async def test_csv_leaves_plain_text_alone(text: str) -> None:
    """A sign within a cell, which no spreadsheet calculates, gets no apostrophe."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=text)))
    [_, row] = csv.reader(io.StringIO((await get(store, accept="text/csv")).text))
    assert row[FIELDS.index("banner")] == text


@given(st.text(alphabet=" \";|,\t\r\n=+-@x'", max_size=30))
async def test_csv_cell_never_begins_as_a_formula(text: str) -> None:
    """No separator that a spreadsheet may use leaves a cell that begins with the sign of a formula."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=text)))
    response = await get(store, accept="text/csv")
    for separator in ",;|\t":
        for row in csv.reader(io.StringIO(response.text, newline=""), delimiter=separator):
            assert not [cell for cell in row if cell.lstrip(' "').startswith(tuple(_SIGNS))]


@pytest.mark.parametrize(("accept", "empty"), [("application/x-ndjson", ""), ("text/csv", ",".join(FIELDS) + "\r\n")])
async def test_no_results_are_an_empty_document(accept: str, empty: str) -> None:
    """Without results NDJSON is empty and CSV has its header alone."""
    assert (await get(MemoryStore(), accept=accept)).text == empty


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/json", JSON),
        ("application/x-ndjson", NDJSON),
        ("Application/X-NDJSON", NDJSON),
        ("text/csv", CSV),
        ("text/*", CSV),
        ("text/csv; charset=utf-8", CSV),
        ("text/csv;header=present;q=0.5, application/json;q=0.4", CSV),
        ("text/csv;q=0.5, application/json;q=0.6", JSON),
        ("text/csv ; q=0.5 , */* ; q=0.1", CSV),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON),
        ("text/csv, application/x-ndjson;q=1.0, application/json;q=0", NDJSON),
        ("application/json;q=0, */*", NDJSON),
        ("application/*;q=0.2, application/json;q=0.1", NDJSON),
        ("image/png", JSON),
        ("application/json;q=0", JSON),
        ("text/csv;q=2", JSON),
        ("text/csv;q=nan", JSON),
        (",;/,q=1,text/csv/x," + "a" * 9_000, JSON),
    ],
)
def test_the_format_is_what_the_caller_likes_best(accept: str, form: Format) -> None:
    """The most specific range of Accept gives a format its quality, the highest wins, and JSON when none is liked."""
    assert negotiate(accept) is form


async def test_several_accept_headers_are_one() -> None:
    """A list that was split over several header lines is read whole."""
    async with client(MemoryStore()) as http:
        headers = [*ISSUER.bearer().items(), ("Accept", "application/json;q=0.1"), ("Accept", "text/csv")]
        response = await http.get("/api/v1/task/1/results", headers=headers)
    assert response.headers["content-type"].startswith("text/csv")


@pytest.mark.parametrize("form", [JSON, NDJSON, CSV])
async def test_an_answer_goes_out_in_pieces(form: Format) -> None:
    """A large answer is written in pieces of a bounded size, and reading one asks the store for no more than it takes."""
    asked = 0

    async def endless() -> AsyncIterator[Iterable[Result]]:
        nonlocal asked
        [one] = fold(Log().append(host("127.9.8.1", PortFound(port=80, raw_data="x" * 1000)))).hosts.values()
        while True:
            asked += 1
            yield one.results(asked)

    pieces = write(form, endless())
    for number in range(1, 4):
        piece = await anext(pieces)
        assert PIECE <= len(piece) < 2 * PIECE
        assert asked <= number * (PIECE // 1000 + 1)


async def test_the_time_is_the_brokers() -> None:
    """Both times are the broker's stamp in UTC to the millisecond, with a Z."""
    store = await store_of(host(), host("127.9.8.2", 22))
    [result] = (await get(store)).json()
    assert result["created_at"] == result["updated_at"] == "2026-01-01T00:00:00.001Z"
