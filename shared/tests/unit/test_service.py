"""The common HTTP behaviour of every service: ids, errors, limits, probes and metrics."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Annotated
from urllib.parse import quote

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from scanfleet.contracts import queries
from scanfleet.errors import ConflictError, DependencyError, MessageError, UnauthorizedError, UnavailableError
from scanfleet.runtime import logging, tracing
from scanfleet.runtime.http import middleware
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.runtime.http.responses import AsciiJSON, ModelJSON
from scanfleet.runtime.service import create_app, create_probes
from scanfleet.runtime.settings import CommonSettings, ConnectionSettings
from scanfleet.scanning.targets import Network
from scanfleet.security.audit import Refusals
from scanfleet.security.auth import AuthenticatedRoute, Caller, Principal
from scanfleet_testing.tokens import Issuer

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

router = APIRouter(prefix="/thing")


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[int, Field(ge=1)]


@router.get("")
async def list_things(page: Annotated[int, Query(ge=1)] = 1) -> int:
    return page


@router.post("")
async def create_thing(body: Thing) -> int:
    return body.size


@router.put("")
async def read_whole(request: Request) -> int:
    return len(await request.body())


@router.get("/{thing_id}")
async def read_thing(thing_id: PathId) -> int:
    return thing_id


class Filters(queries.Page):
    port: tuple[queries.Port, ...] = ()
    from_: Annotated[queries.Text | None, Field(alias="from")] = None


@router.get("/filters/parsed")
async def read_filters(query: Annotated[Filters, parsed(Filters)]) -> Filters:
    return query


@router.get("/text/{text}")
async def echo(text: str) -> dict[str, str]:
    return {"text": text}


@router.get("/raise/{kind}")
async def fail(kind: str) -> None:
    raise {
        "conflict": ConflictError("in use"),
        "token": UnauthorizedError("no token"),
        "unavailable": UnavailableError("busy", retry_after=7),
        "dependency": DependencyError("mongodb://user:password@host is unavailable"),
        "message": MessageError("internal"),
        "bug": ZeroDivisionError("internal"),
    }[kind]


@router.get("/raise/late/bug")
async def fail_late() -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    return StreamingResponse(body())


@router.get("/endless/stream")
async def endless() -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    return StreamingResponse(body())


@router.get("/trace/current")
async def trace() -> str | None:
    return tracing.current()


guarded = APIRouter(prefix="/guarded", route_class=AuthenticatedRoute)


@guarded.post("")
async def create_guarded(body: Thing, caller: Caller) -> int:
    return body.size + caller.user_id


class Loop:
    alive = True
    ready = True


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield


PROXY = ip_network("127.0.0.1")  # where the client of these tests is


@pytest.fixture
def app() -> FastAPI:
    return make_app(proxies=[PROXY])


def make_app(proxies: Sequence[Network] = (), *, public: bool = False) -> FastAPI:
    logging.configure("test", CommonSettings(instance="test"))
    settings = ConnectionSettings(trusted_proxies=tuple(proxies))
    return create_app(
        name="test",
        refusals=Refusals("test"),
        settings=settings,
        lifespan=lifespan,
        routers=[router, guarded],
        public=public,
    )


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with calling(app) as client:
        yield client


@pytest.fixture
async def probes(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with calling(create_probes(app)) as client:
        yield client


def calling(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.mark.parametrize(
    ("kind", "status", "error", "headers"),
    [
        ("conflict", 409, "in use", {}),
        ("token", 401, "no token", {"WWW-Authenticate": "Bearer"}),
        ("unavailable", 503, "busy", {"Retry-After": "7"}),
        ("dependency", 503, "a dependency of the service is unavailable; try again", {"Retry-After": "1"}),
        ("message", 500, "Internal Server Error", {}),
        ("bug", 500, "Internal Server Error", {}),
    ],
)
async def test_errors_have_one_format_and_no_internal_details(
    client: httpx2.AsyncClient,
    kind: str,
    status: int,
    error: str,
    headers: dict[str, str],
) -> None:
    """An error is answered with its status and headers in the common format, without internal details."""
    answer = await client.get(f"/thing/raise/{kind}")
    assert (answer.status_code, answer.json()) == (status, {"error": error})
    assert answer.headers["X-Request-ID"]
    assert {name: answer.headers.get(name) for name in headers} == headers


@pytest.mark.parametrize("sent", ["port=80&port=0443", "port[]=80&port[]=443", "port=80,443", "port=80&port[]=443"])
async def test_query_lists_are_repeated_or_separated_by_commas(client: httpx2.AsyncClient, sent: str) -> None:
    """A list is sent as a repeated parameter, in brackets or not, or separated by commas; other parameters have defaults."""
    answer = await client.get(f"/thing/filters/parsed?page=2&from=127.0.0.1&{sent}")
    assert answer.json() == {"page": 2, "page_size": 10, "port": [80, 443], "from": "127.0.0.1"}


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ("page=0", "query.page: Input should be greater than or equal to 1"),
        ("page=", "query.page: Input should be a valid integer, unable to parse string as an integer"),
        ("port=80,+1", "query.port.1: must be a number from 0 to 65535"),
        ("port=65536", "query.port.0: Input should be less than or equal to 65535"),
        ("port=", "query.port.0: Input should be a valid integer, unable to parse string as an integer"),
        (f"from={'x' * 201}", "query.from: String should have at most 200 characters"),
    ],
)
async def test_query_with_an_invalid_value_is_400(client: httpx2.AsyncClient, sent: str, error: str) -> None:
    """The error names the parameter by the name that the caller sent."""
    answer = await client.get(f"/thing/filters/parsed?{sent}")
    assert (answer.status_code, answer.json()) == (400, {"error": error})


async def test_error_during_a_response_aborts_the_connection(app: FastAPI) -> None:
    """An error in the middle of a response reaches the server, which aborts the connection."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/thing/raise/late/bug")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"{", "JSON"),
        (b"[" * 900, "body"),
        (b'{"size": "1"}', "size: "),
        (b'{"size": true}', "size: "),
        (b'{"size": 1.0}', "size: "),
        (b'{"size": NaN}', "size: "),
        (b'{"size": 0}', "size: "),
        (b'{"size": 1, "user_id": 2}', "user_id: "),
        (b'{"size": 1, "\\ud800": 2}', ""),
        (b"null", ""),
        (b"\xff", ""),
        (b"", ""),
    ],
)
async def test_invalid_body_is_a_400(client: httpx2.AsyncClient, body: bytes, error: str) -> None:
    """An invalid body is a 400 that names the field and the reason, never a 422 or a 500."""
    answer = await client.post("/thing", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error in answer.json()["error"]


async def test_error_of_a_very_invalid_request_is_short(client: httpx2.AsyncClient) -> None:
    """The error of a request with many invalid values is short, plain ASCII."""
    answer = await client.post("/thing", json={"\u202e" * 40 + str(number): 1 for number in range(5)})
    assert answer.status_code == 400
    assert len(answer.json()["error"]) <= 500
    assert answer.content.isascii()


async def test_invalid_query_is_a_400(client: httpx2.AsyncClient) -> None:
    """An invalid query parameter is a 400 that names it."""
    for page in ("0", "x", "", "1.5", "9" * 5000):
        answer = await client.get("/thing", params={"page": page})
        assert answer.status_code == 400
        assert "page" in answer.json()["error"]


@pytest.mark.parametrize("id_", ["0", "-1", "01", "1.0", "x", "%201", "\u0661", str(2**53), "9" * 5000])
async def test_invalid_path_id_is_a_404(client: httpx2.AsyncClient, id_: str) -> None:
    """An id in a path that is not an integer in canonical form is a 404."""
    answer = await client.get(f"/thing/{id_}")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


async def test_path_ids_reach_the_maximum_of_javascript(client: httpx2.AsyncClient) -> None:
    """The first and the last id are valid."""
    assert (await client.get("/thing/1")).json() == 1
    assert (await client.get(f"/thing/{2**53 - 1}")).json() == 2**53 - 1


async def test_unknown_paths_and_verbs(client: httpx2.AsyncClient) -> None:
    """An unknown path is a 404, and a wrong verb a 405 that names every right one."""
    for path in ("/nope", "/thing/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    answer = await client.delete("/thing")
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed"})
    assert answer.headers["Allow"] == "GET, HEAD, POST, PUT"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/thing", "/thing/1", "/thing/text/x", "/nope"])
async def test_head_is_get_without_the_body(app: FastAPI, path: str) -> None:
    """HEAD works wherever GET does, on both ports: the same status and headers, and no body."""
    async with calling(create_probes(app) if path in ("/healthz", "/readyz", "/metrics") else app) as client:
        expected = await client.get(path)
        answer = await client.head(path)
    assert (answer.status_code, answer.content) == (expected.status_code, b"")
    if path != "/metrics":  # which counts itself
        assert answer.headers["Content-Length"] == expected.headers["Content-Length"]
    assert answer.headers["Content-Type"] == expected.headers["Content-Type"]


async def test_head_of_an_endless_answer_ends(client: httpx2.AsyncClient) -> None:
    """HEAD of a stream is answered with its headers, and the stream ends."""
    async with asyncio.timeout(10):
        answer = await client.head("/thing/endless/stream")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_head_without_a_get_is_405(client: httpx2.AsyncClient) -> None:
    """HEAD of a path that has no GET is a 405."""
    assert (await client.head("/guarded")).status_code == 405


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_body_of_another_content_type_is_refused_by_name(
    client: httpx2.AsyncClient, content_type: str | None
) -> None:
    """A JSON body that is not sent as JSON is a 400 that names the header to send."""
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await client.post("/thing", content=b'{"size": 1}', headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]


@pytest.mark.proves("A29")
async def test_json_is_printable_ascii(client: httpx2.AsyncClient) -> None:
    """Control, C1 and bidirectional characters come back as escapes, in answers and in errors."""
    hostile = "\x00\x1b[31m\x7f\x9b31m\u202e\u2066\u2028\U0001f600"
    for answer in (
        await client.get(f"/thing/text/{quote(hostile)}"),
        await client.post("/thing", json={hostile: 1, "size": 1}),
    ):
        assert re.fullmatch(rb"[\x20-\x7e]+", answer.content), answer.content
    assert (await client.get(f"/thing/text/{quote(hostile)}")).json() == {"text": hostile}


@pytest.mark.proves("A29")
def test_model_is_encoded_as_any_other_answer() -> None:
    """A list that is encoded in one pass has the same bytes, escapes included."""

    class Thing(BaseModel):
        text: str
        at: datetime

    thing = Thing(text="\x00\x1b[31m\x7f\x9b31m\u202e\u2066\u2028\U0001f600", at=datetime(2026, 1, 2, 3, 4, 5, 6, UTC))
    assert ModelJSON(thing).body == AsciiJSON(thing.model_dump(mode="json")).body


@pytest.mark.proves("A16")
async def test_body_above_the_limit_is_a_413(client: httpx2.AsyncClient) -> None:
    """A body of the maximum size is accepted; one byte more is a 413, announced or not."""

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 1024

    assert (await client.put("/thing", content=b"x" * 16_384)).json() == 16_384
    assert (await client.put("/thing", content=pieces(16))).json() == 16_384
    for content in (b"x" * 16_385, pieces(17)):
        answer = await client.put("/thing", content=content)
        assert (answer.status_code, answer.json()) == (413, {"error": "the body has more than 16384 bytes"})
        assert answer.headers["Connection"] == "close"


@pytest.mark.proves("A16")
async def test_body_that_arrives_too_slowly_is_a_408(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that arrives too slowly is a 408 that closes the connection."""
    monkeypatch.setattr(middleware, "MAX_BODY_SECONDS", 0.02)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    answer = await client.put("/thing", content=stalling())
    assert (answer.status_code, answer.json()) == (408, {"error": "the body arrived too slowly"})
    assert answer.headers["Connection"] == "close"


class Counting:
    """A verifier that notes what it is asked."""

    def __init__(self, issuer: Issuer) -> None:
        self._verifier = issuer.verifier
        self.asked: list[str] = []

    async def verify(self, token: str) -> Principal:
        self.asked.append(token)
        return await self._verifier.verify(token)


@pytest.mark.proves("A7")
async def test_invalid_token_is_a_401_before_the_body_is_read(client: httpx2.AsyncClient, app: FastAPI) -> None:
    """Without a valid token the answer is 401 whatever the body is, and no byte of it is read."""
    app.state.verifier = Issuer().verifier

    async def untouched() -> AsyncIterator[bytes]:
        raise AssertionError("a body was read")
        yield b""

    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic eDp5"}):
        for content in (b"{", b"", untouched()):
            answer = await client.post("/guarded", content=content, headers=headers)
            assert (answer.status_code, set(answer.json())) == (401, {"error"})
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert (await client.get("/guarded")).status_code == 405
    assert (await client.get("/guarded/1")).status_code == 404


async def test_token_is_verified_once_per_request(client: httpx2.AsyncClient, app: FastAPI) -> None:
    """A valid token is verified once per request, and the route receives its caller."""
    issuer = Issuer()
    app.state.verifier = counting = Counting(issuer)
    answer = await client.post("/guarded", json={"size": 3}, headers=issuer.bearer(7))
    assert (answer.status_code, answer.json()) == (200, 10)
    assert len(counting.asked) == 1


async def test_unguarded_route_has_no_caller(client: httpx2.AsyncClient, app: FastAPI) -> None:
    """A route that uses the caller without being guarded answers no request."""
    app.add_api_route("/forgotten", create_guarded, methods=["POST"])
    answer = await client.post("/forgotten", json={"size": 3}, headers=Issuer().bearer(7))
    assert answer.status_code == 500


async def test_request_id_of_a_trusted_proxy_is_kept(client: httpx2.AsyncClient) -> None:
    """A request id of the allowed characters comes back with the answer."""
    for request_id in ("a", "A-z_0.9", "x" * 64):
        assert (await client.get("/thing", headers={"X-Request-ID": request_id})).headers["X-Request-ID"] == request_id


@pytest.mark.proves("A17")
@pytest.mark.parametrize(("proxies", "public"), [([], False), ([], True), ([PROXY], True)])
async def test_request_id_of_a_caller_is_kept_apart(
    proxies: list[Network], *, public: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request id from an untrusted caller, or at the public service, is only logged; the service assigns its own."""
    async with calling(make_app(proxies, public=public)) as client:
        answer = await client.get("/thing", headers={"X-Request-ID": "theirs"})
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
    assert (line["request_id"], line["client_request_id"]) == (answer.headers["X-Request-ID"], "theirs")


@pytest.mark.proves("A17")
@pytest.mark.parametrize("request_id", ["", " ", "a b", "x" * 65, "a\tb", "{}", "\u00e9", "a\x85b"])
async def test_invalid_request_id_is_replaced(client: httpx2.AsyncClient, request_id: str) -> None:
    """A request id that is too long or has other characters is replaced by a generated one."""
    raw = [(b"X-Request-ID", request_id.encode("latin-1"))]
    answer = await client.get("/thing", headers=raw)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])


async def test_traceparent_of_a_stranger_is_replaced() -> None:
    """Neither the trace of a caller nor its sampled flag is followed, unless a trusted proxy sends it."""
    async with calling(make_app()) as client:
        current = (await client.get("/thing/trace/current", headers={"traceparent": TRACEPARENT})).json()
    assert current[3:35] != TRACEPARENT[3:35]


async def test_valid_traceparent_is_continued(client: httpx2.AsyncClient) -> None:
    """A valid traceparent is propagated."""
    assert (await client.get("/thing/trace/current", headers={"traceparent": TRACEPARENT})).json() == TRACEPARENT


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "x",
        TRACEPARENT.upper(),
        TRACEPARENT + "-01",
        TRACEPARENT[:-1],
        "ff" + TRACEPARENT[2:],
        "00-" + "0" * 32 + TRACEPARENT[35:],
        TRACEPARENT[:36] + "0" * 16 + "-01",
    ],
)
async def test_invalid_traceparent_is_replaced(client: httpx2.AsyncClient, traceparent: str) -> None:
    """An invalid traceparent is replaced by a new trace."""
    current = (await client.get("/thing/trace/current", headers={"traceparent": traceparent})).json()
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", current)
    assert current != traceparent


async def test_health_is_that_of_the_loops(app: FastAPI, probes: httpx2.AsyncClient) -> None:
    """A service is healthy until a loop that it watches dies."""
    loop = Loop()
    app.state.probes.watch(loop)
    loop.ready = False
    assert (await probes.get("/healthz")).status_code == 200
    loop.alive = False
    answer = await probes.get("/healthz")
    assert (answer.status_code, set(answer.json())) == (503, {"error"})


async def test_process_with_a_dead_loop_exits(app: FastAPI) -> None:
    """A service whose loop has died exits, so that its supervisor restarts it."""
    loop, running, ended = Loop(), asyncio.get_running_loop(), asyncio.Event()
    app.state.probes.watch(loop)
    running.add_signal_handler(signal.SIGTERM, ended.set)
    try:
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0)
            assert not ended.is_set()
            loop.alive = False
            async with asyncio.timeout(10):
                await ended.wait()
            running.remove_signal_handler(signal.SIGTERM)
    finally:
        running.remove_signal_handler(signal.SIGTERM)


async def test_readiness_is_that_of_the_dependencies(app: FastAPI, probes: httpx2.AsyncClient) -> None:
    """A service is unready while a loop is or a check fails, with its name in the answer, and ready again after."""
    loop, unavailable = Loop(), False

    async def check() -> None:
        if unavailable:
            raise DependencyError("mongodb is unavailable")

    app.state.probes.watch(loop)
    app.state.probes.depend("mongodb", check)
    assert (await probes.get("/readyz")).status_code == 200
    loop.ready, unavailable = False, True
    answer = await probes.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"error": "unavailable: mongodb, bus"})
    loop.ready, unavailable = True, False
    assert (await probes.get("/readyz")).status_code == 200


@pytest.mark.parametrize("stage", ["starting", "ending"])
async def test_readiness_while_starting_or_ending_is_503(app: FastAPI, probes: httpx2.AsyncClient, stage: str) -> None:
    """A process that takes no requests yet or no longer is alive and unready."""
    app.state.probes.stage = stage
    answer = await probes.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"error": stage})
    assert (await probes.get("/healthz")).status_code == 200


async def test_readiness_check_that_hangs_counts_as_failed(app: FastAPI, probes: httpx2.AsyncClient) -> None:
    """A dependency that does not answer counts as unavailable, so that the probe itself always answers."""

    async def hang() -> None:
        await asyncio.Event().wait()

    app.state.probes.depend("mongodb", hang)
    assert (await probes.get("/readyz")).json() == {"error": "unavailable: mongodb"}


async def test_metrics_are_labelled_by_route_not_path(client: httpx2.AsyncClient, probes: httpx2.AsyncClient) -> None:
    """Requests are counted by the route's template, so that no caller can create new series."""
    for path in ("/thing/123", "/thing/456", "/never-heard-of"):
        await client.get(path)
    await client.request("BREW", "/thing")
    metrics = (await probes.get("/metrics")).text
    assert 'scanfleet_http_requests_total{method="GET",route="/thing/{thing_id}",status="200"}' in metrics
    assert 'method="other"' in metrics
    assert not re.search("BREW|never-heard-of|/thing/123", metrics)
