from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from result_store.api import formats
from result_store.api.formats import CSV, JSON, NDJSON, PIECE_BYTES, Format, Piece, negotiate, stream, write
from result_store.api.results import ALL_FIELDS
from result_store.api.turns import Limits, Turn
from result_store.domain.results import ClosedChunk, fold
from result_store_testing import Log, MemoryStore, host
from result_store_testing.http import ISSUER, client, get, store_of
from scanfleet.contracts.messages import PortFound
from scanfleet.contracts.rest import Result
from scanfleet.errors import DependencyError, UnavailableError
from scanfleet.runtime.turns import Turns
from scanfleet.scanning.targets import Network
from scanfleet_testing.event_loop import counting_turns

FIELDS = [
    *("id", "job_id", "ip_address", "port", "protocol", "service", "version"),
    *("os_info", "status", "banner", "raw_data", "created_at", "updated_at"),
]
HOSTILE = "<script>alert(1)</script>\x1b[2J\x1b]0;pwned\x07\u202e\r\n\"quoted\", 'and' \N{SNOWMAN}\x9b31m"


class UnavailableStore(MemoryStore):
    async def results(
        self,
        job_id: int,  # noqa: ARG002 # as in the store
        user_id: int | None,  # noqa: ARG002 # likewise
        *,
        after: int | None = None,  # noqa: ARG002 # likewise
        raw: bool = True,  # noqa: ARG002 # likewise
        within: Network | None = None,  # noqa: ARG002 # likewise
    ) -> AsyncIterator[Iterable[Result]]:
        raise DependencyError("mongodb://secret-host is unavailable")
        yield []


async def test_results_have_exactly_the_public_fields() -> None:
    """A result has exactly the fields of the API, in the documented order."""
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


async def test_results_unknown_text_is_empty() -> None:
    """Unknown text is an empty string, never null and never omitted."""
    [result] = (await get(await store_of(host("127.9.8.1", 22)))).json()
    assert [result[name] for name in ("service", "version", "os_info", "banner", "raw_data")] == [""] * 5


async def test_results_are_in_log_order() -> None:
    """Results are listed in the order of their hosts in the log."""
    response = await get(await store_of(host("127.9.8.9", 80), host("127.9.8.1", 443, 22)))
    found = [(each["ip_address"], each["port"]) for each in response.json()]
    assert found == [("127.9.8.9", 80), ("127.9.8.1", 22), ("127.9.8.1", 443)]
    times = [each["created_at"] for each in response.json()]
    assert times == sorted(times)


async def test_results_ids_start_at_one() -> None:
    """Ids are distinct integers that start at 1."""
    response = await get(await store_of(host("127.9.8.1", 22, 80), host("127.9.8.2", 22)))
    assert [each["id"] for each in response.json()] == [1, 2, 3]


async def test_results_include_udp_and_open_filtered_ports() -> None:
    """A port that is open or open|filtered is a result, for TCP and UDP."""
    found = PortFound(port=53, protocol="udp", status="open|filtered")
    [result] = (await get(await store_of(host("127.9.8.1", found)))).json()
    assert (result["protocol"], result["status"]) == ("udp", "open|filtered")


async def test_results_of_empty_task_are_an_empty_list() -> None:
    """A task without results, or an unknown task, is `[]`."""
    assert (await get(MemoryStore())).text == "[]"


async def test_results_late_host_is_not_listed() -> None:
    """A host that a closed chunk does not claim is in no response."""
    store = await store_of(host("127.9.8.0", 22), host("127.9.8.1", 80))
    await store.close([ClosedChunk(1, "1-0", "127.9.8.0", "ad")])
    assert [each["port"] for each in (await get(store)).json()] == [22]


@pytest.mark.parametrize(
    "job_id", ["x", "0", "-1", "1.5", "1e3", "01", "+1", "%201", "9" * 30, "9007199254740992", "$ne"]
)
async def test_results_invalid_id_returns_404(job_id: str) -> None:
    """A path with an invalid id is a 404 with an error."""
    response = await get(MemoryStore(), f"/api/v1/task/{job_id}/results")
    assert (response.status_code, list(response.json())) == (404, ["error"])


async def test_results_largest_id_is_valid() -> None:
    """The largest valid id, 2^53 - 1, is looked up."""
    assert (await get(MemoryStore(), f"/api/v1/task/{2**53 - 1}/results")).text == "[]"


async def test_results_without_token_returns_401() -> None:
    """A request without a token, or with an invalid one, is a 401 with WWW-Authenticate."""
    async with client(await store_of(host("127.9.8.1", 22))) as http:
        for headers in ({}, {"Authorization": "Bearer junk"}):
            response = await http.get("/api/v1/task/1/results", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert list(response.json()) == ["error"]


async def test_results_of_other_users_are_not_listed() -> None:
    """Results of another user are not returned, even if the gateway forwards the request."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    assert [each["port"] for each in (await get(store, user=7)).json()] == [22]
    assert [each["port"] for each in (await get(store, user=8)).json()] == [80]
    assert (await get(store, user=9)).json() == []


async def test_results_administrator_sees_all() -> None:
    """An administrator gets every result of the task."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    assert [each["port"] for each in (await get(store, user=1, admin=True)).json()] == [22, 80]


@pytest.mark.parametrize("query", ["user_id=8", "user_id[$ne]=7", "admin=true", "job_id=2"])
async def test_results_query_parameters_do_not_widen_access(query: str) -> None:
    """No query parameter changes whose results are returned."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    response = await get(store, f"/api/v1/task/1/results?{query}")
    assert [each["port"] for each in response.json()] == [22]


async def test_results_store_unavailable_returns_503() -> None:
    """If the store fails before the first result, the response is a 503 with Retry-After and without internal details."""
    response = await get(UnavailableStore())
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert list(response.json()) == ["error"]
    assert "secret-host" not in response.text


@pytest.mark.proves("A29")
async def test_json_hostile_text_is_ascii() -> None:
    """Hostile text round-trips exactly, in a document of printable ASCII that browsers do not render as a page."""
    hostile = f"{HOSTILE}\x7f\u2028\u2066"
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=hostile)))
    response = await get(store)
    assert response.json()[0]["banner"] == hostile
    assert response.content.isascii()
    assert response.text.isprintable()
    (line,) = (await get(store, accept="application/x-ndjson")).text.splitlines()
    assert line.isascii()
    assert line.isprintable()
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["vary"] == "Accept"


async def test_ndjson_has_a_result_on_each_line() -> None:
    """Each line of NDJSON is one result, equal to its JSON form, whatever text it contains."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=HOSTILE), 443))
    response = await get(store, accept="application/x-ndjson")
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    assert [json.loads(line) for line in response.text.splitlines()] == (await get(store)).json()


async def test_csv_is_a_table_with_a_header() -> None:
    """CSV has a header, CRLF line ends and RFC 4180 quoting, and the same values as JSON."""
    port = PortFound(port=80, version='Apache "2.4", (Debian)', service="http")
    store = await store_of(host("127.9.8.1", port, 443))
    response = await get(store, accept="text/csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    header, *rows = csv.reader(io.StringIO(response.text, newline=""), strict=True)
    assert header == FIELDS
    assert rows == [[str(value) for value in each.values()] for each in (await get(store)).json()]
    assert response.text.count("\r\n") == response.text.count("\n") == 3
    assert '"Apache ""2.4"", (Debian)"' in response.text


async def test_csv_unprintable_text_is_escaped() -> None:
    """Unprintable characters are escaped in CSV, so that neither terminals nor line-based readers misread it."""
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
async def test_csv_formula_gets_an_apostrophe(before: str, written: str, sign: str) -> None:
    """Text that a spreadsheet would evaluate as a formula, with any separator, gets an apostrophe in CSV and none in JSON."""
    formula = f'{sign}HYPERLINK("http://127.0.0.1")'
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=before + formula)))
    [_, row] = csv.reader(io.StringIO((await get(store, accept="text/csv")).text))
    assert row[FIELDS.index("banner")] == written + formula
    assert (await get(store)).json()[0]["banner"] == before + formula


@pytest.mark.parametrize("text", ["a=b", "x; y=1", "C++", "SSH-2.0-OpenSSH_9.2", "a|b", "root@host", "1 - 2; 3 - 4"])
async def test_csv_plain_text_is_unchanged(text: str) -> None:
    """A formula prefix inside a cell, which no spreadsheet evaluates, gets no apostrophe."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=text)))
    [_, row] = csv.reader(io.StringIO((await get(store, accept="text/csv")).text))
    assert row[FIELDS.index("banner")] == text


@given(st.text(alphabet=" \";|,\t\r\n=+-@x'", max_size=30))
async def test_csv_cell_never_begins_with_a_formula(text: str) -> None:
    """No cell begins with a formula prefix, whichever separator a spreadsheet uses."""
    store = await store_of(host("127.9.8.1", PortFound(port=80, banner=text)))
    response = await get(store, accept="text/csv")
    for separator in ",;|\t":
        for row in csv.reader(io.StringIO(response.text, newline=""), delimiter=separator):
            assert not [cell for cell in row if cell.lstrip(' "').startswith(tuple(_SIGNS))]


@pytest.mark.parametrize(("accept", "empty"), [("application/x-ndjson", ""), ("text/csv", ",".join(FIELDS) + "\r\n")])
async def test_export_without_results_is_an_empty_document(accept: str, empty: str) -> None:
    """Without results NDJSON is empty and CSV has only its header."""
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
def test_negotiate_highest_quality_wins(accept: str, form: Format) -> None:
    """The most specific range of Accept sets a format's quality, the highest wins, and JSON is the default."""
    assert negotiate(accept) is form


async def test_negotiate_several_accept_headers_are_joined() -> None:
    """Several Accept headers are read as one list."""
    async with client(MemoryStore()) as http:
        headers = [*ISSUER.bearer().items(), ("Accept", "application/json;q=0.1"), ("Accept", "text/csv")]
        response = await http.get("/api/v1/task/1/results", headers=headers)
    assert response.headers["content-type"].startswith("text/csv")


@pytest.mark.parametrize("form", [JSON, NDJSON, CSV])
async def test_write_pieces_are_bounded(form: Format) -> None:
    """A large response is written in pieces of bounded size, and each piece reads only the hosts that it needs."""
    asked = 0

    async def endless() -> AsyncIterator[Iterable[Result]]:
        nonlocal asked
        [one] = fold(Log().append(host("127.9.8.1", PortFound(port=80, raw_data="x" * 1000)))).hosts.values()
        while True:
            asked += 1
            yield one.results(asked)

    pieces = write(form, endless(), ALL_FIELDS)
    for number in range(1, 4):
        piece = (await anext(pieces)).content
        assert PIECE_BYTES <= len(piece) < 2 * PIECE_BYTES
        assert asked <= number * (PIECE_BYTES // 1000 + 1)


@pytest.mark.parametrize("last", [True, False])
async def test_stream_sent_as_one_piece_closes_its_source(*, last: bool) -> None:
    """The search ends with an answer of one piece, and with a download above the limit of its user."""
    ended = False

    async def search() -> AsyncGenerator[Piece, None]:
        nonlocal ended
        try:
            yield Piece(b"first", last)
            yield Piece(b"second", last=True)
        finally:
            ended = True

    pieces = search()
    turn = Turn(Limits(downloads=Turns(at_once=0, wait_seconds=0.0)), 7, AsyncExitStack())
    with contextlib.nullcontext() if last else pytest.raises(UnavailableError):
        await stream(turn, pieces, "text/plain")
    assert ended


@pytest.mark.parametrize("form", [JSON, NDJSON, CSV])
async def test_write_long_search_is_a_valid_document(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filler that is sent while a search finds nothing changes no record, before, between and after them."""
    monkeypatch.setattr(formats, "BEGIN_SECONDS", 0.0)
    monkeypatch.setattr(formats, "SILENT_SECONDS", 0.0)
    [one] = fold(Log().append(host("127.9.8.1", 22))).hosts.values()
    rows = [*one.results(1), *one.results(2)]

    async def rare() -> AsyncIterator[Iterable[Result]]:
        for some in ([], [], rows[:1], [], [], rows[1:], [], []):
            yield some

    pieces = [piece.content async for piece in write(form, rare(), ("id", "port"))]
    assert len(pieces) == 9
    assert all(pieces[:-1])
    text = b"".join(pieces).decode()
    if form is CSV:
        assert text == "id,port\r\n1,22\r\n2,22\r\n"
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        found = json.loads(text) if form is JSON else [json.loads(line) for line in lines]
        assert found == [{"id": 1, "port": 22}, {"id": 2, "port": 22}]


async def test_write_of_csv_has_blank_lines_only_after_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all fields a search may find nothing for 15 minutes; then the response continues with blank lines."""
    monkeypatch.setattr(formats, "BEGIN_SECONDS", 0.0)
    monkeypatch.setattr(formats, "SILENT_SECONDS", 0.0)
    head = ",".join(ALL_FIELDS) + "\r\n"

    async def nothing(pages: int) -> AsyncIterator[Iterable[Result]]:
        for _ in range(pages):
            yield []

    quarter_hour = [piece.content async for piece in write(CSV, nothing(90), ALL_FIELDS)]
    assert b"".join(quarter_hour).decode() == head
    assert len(quarter_hour) == 91
    hours = [piece.content async for piece in write(CSV, nothing(1_000), ALL_FIELDS)]
    assert all(hours[:-1])
    assert b"".join(hours).decode().removeprefix(head).strip("\r\n") == ""


async def test_results_times_are_the_brokers() -> None:
    """Both times are the broker's timestamp in UTC with milliseconds and a Z."""
    store = await store_of(host(), host("127.9.8.2", 22))
    [result] = (await get(store)).json()
    assert result["created_at"] == result["updated_at"] == "2026-01-01T00:00:00.001Z"


async def found(store: MemoryStore, query: str) -> list[tuple[str, int]]:
    response = await get(store, f"/api/v1/task/1/results?{query}")
    assert response.status_code == 200, response.text
    return [(each["ip_address"], each["port"]) for each in response.json()]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("port=22", [("127.9.8.1", 22), ("127.9.8.9", 22)]),
        ("port=22&port=53", [("127.9.8.1", 22), ("127.9.8.1", 53), ("127.9.8.9", 22)]),
        ("port[]=53,443", [("127.9.8.1", 53), ("127.9.8.9", 443)]),
        ("service=http", [("127.9.8.9", 443)]),
        ("service=HTTP", []),
        ("address=127.9.8.9", [("127.9.8.9", 22), ("127.9.8.9", 443)]),
        ("address=127.9.8.0/30&port=22", [("127.9.8.1", 22)]),
        ("address=::1", []),
        ("after=2", [("127.9.8.9", 22), ("127.9.8.9", 443)]),
        ("after=1&limit=2", [("127.9.8.1", 53), ("127.9.8.9", 22)]),
        ("limit=1", [("127.9.8.1", 22)]),
        ("limit=1&port=443", [("127.9.8.9", 443)]),
        ("after=4", []),
    ],
)
async def test_results_are_filtered(query: str, expected: list[tuple[str, int]]) -> None:
    """Results are selected by port, service and address, from an id on, and up to a number."""
    ports = (PortFound(port=22), PortFound(port=443, service="http"))
    store = await store_of(host("127.9.8.1", 22, PortFound(port=53, protocol="udp")), host("127.9.8.9", *ports))
    assert await found(store, query) == expected


@pytest.mark.parametrize(
    "query",
    [
        *("port=x", "port=", "port=65536", "port=-1", "port=22,", "address=127.9.8.1/24", "address=x", "address="),
        *("after=-1", "after=x", "limit=0", "limit=1000001", "fields=", "fields=id,x", "fields=ID"),
    ],
)
async def test_results_filter_with_an_invalid_value_is_a_400(query: str) -> None:
    """A filter with an invalid value is refused, in an error that names it."""
    response = await get(MemoryStore(), f"/api/v1/task/1/results?{query}")
    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert query.split("=", maxsplit=1)[0] in response.json()["error"]


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ("application/json", '[{"id":1,"port":22},{"id":2,"port":80}]'),
        ("application/x-ndjson", '{"id":1,"port":22}\n{"id":2,"port":80}\n'),
        ("text/csv", "id,port\r\n1,22\r\n2,80\r\n"),
    ],
)
async def test_results_have_the_requested_fields_in_their_own_order(accept: str, text: str) -> None:
    """`fields` limits every format to these fields, in the order of the API."""
    store = await store_of(host("127.9.8.1", 22, 80))
    for query in ("fields=port,id", "fields=port&fields=id", "fields[]=port&fields[]=id"):
        assert (await get(store, f"/api/v1/task/1/results?{query}", accept=accept)).text == text


async def test_results_filter_parses_the_address_of_a_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a host is compared with the filter once, whatever its number of results."""
    parsed: list[str] = []

    def parse(text: str) -> IPv4Address | IPv6Address:
        parsed.append(text)
        return ip_address(text)

    monkeypatch.setattr("result_store.api.results.ip_address", parse)
    store = await store_of(host("127.9.8.1", *range(1, 501)), host("127.9.9.1", *range(1, 501)))
    answer = await get(store, "/api/v1/task/1/results?address=127.9.8.0/24")
    assert len(answer.json()) == 500
    assert parsed == ["127.9.8.1", "127.9.9.1"]


@pytest.mark.parametrize("path", ["results?limit=2", "results?after=0&limit=2", "results", "hosts?limit=2", "hosts"])
async def test_list_of_a_job_that_is_erased_is_a_404(path: str) -> None:
    """A job that is deleted after the gateway has asked for its owner has no page of results or hosts that looks complete."""
    store = await store_of(*(host(f"127.9.8.{n}", 22) for n in range(1, 5)))
    await store.begin_deletions([1])
    await store.erase(1, 1)
    response = await get(store, f"/api/v1/task/1/{path}")
    assert (response.status_code, response.json()) == (404, {"error": "Job not found"})


async def test_results_filter_without_a_match_lets_other_requests_run() -> None:
    """A read that selects none of many results pauses after each 500 of them."""
    store = await store_of(*(host(f"127.9.8.{last}", *range(1, 2_001)) for last in range(1, 6)))
    async with counting_turns() as turns:
        assert await found(store, "service=none") == []
    assert turns.count > 10_000 / 500
