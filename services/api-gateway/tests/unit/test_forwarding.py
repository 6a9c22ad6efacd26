"""The gateway forwards responses of other services unchanged and as a stream, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from api_gateway.upstream import SMALL_BYTES
from api_gateway_testing.gateway import Client, Gateway, Running
from api_gateway_testing.services import Stream
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.rest import RESOURCES, ExportedJob
from scanfleet.security.auth import Principal

OWNER = "http://orchestrator/internal/jobs/41/owner"
RESULTS = "http://result-store/api/v1/task/41/results"

PASSED_ON = [
    ("GET", "/api/v1/task"),
    ("GET", "/api/v1/task/41"),
    ("GET", "/api/v1/task/41/ledger"),
    ("GET", "/api/v1/task/41/waiting"),
    ("GET", "/api/v1/task/41/snapshot"),
    ("GET", "/api/v1/task/41/map"),
    ("GET", "/api/v1/audit"),
    ("GET", "/api/v1/deletion"),
    *((verb, "/api/v1/subnet/41/retention") for verb in ("GET", "PUT")),
    ("GET", "/api/v1/revocation"),
    ("POST", "/api/v1/revocation"),
    ("DELETE", "/api/v1/revocation/41"),
    *((verb, each.path) for each in RESOURCES for verb in ("GET", "POST")),
    *((verb, f"{each.path}/41") for each in RESOURCES for verb in ("GET", "PUT", "DELETE")),
]


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run() as running:
        running.services.on("GET", OWNER, httpx2.Response(200, json={"user_id": 7}))
        yield running


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
async def test_forward_uses_the_same_path_and_verb(gateway: Running, method: str, path: str) -> None:
    """Every query is forwarded to the orchestrator with its path and verb, and its response is the response."""
    body = b'{"as":  "it is"}'
    gateway.services.on(method, f"http://orchestrator{path}", httpx2.Response(409, content=body))
    sent = b'{ "any": "thing" }' if method in ("POST", "PUT") else b""
    answer = await gateway.client.request(method, path, content=sent, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.content) == (409, body)
    (asked,) = gateway.services.requests
    assert asked.content == sent


async def test_query_is_forwarded_without_the_frameworks_handler(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solving dependencies and waiting for a body that no query has would be a quarter of its cost."""

    async def unexpected(**_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("fastapi.routing.solve_dependencies", unexpected)
    monkeypatch.setattr("scanfleet.runtime.http.middleware.asyncio.timeout_at", unexpected)
    gateway.services.on("GET", "http://orchestrator/api/v1/task/41", httpx2.Response(200, json={"job_id": "41"}))
    assert (await gateway.client.get("/api/v1/task/41")).json() == {"job_id": "41"}


async def test_estimate_is_forwarded_with_the_roles_that_grants_name(tmp_path: Path) -> None:
    """The orchestrator gets the unchanged body in the name of the caller with the roles of grants; other queries have no roles."""
    file = tmp_path / "grants.toml"
    file.write_text('[[grants]]\nname = "ops"\nroles = ["ops", "night"]')
    url = "http://orchestrator/api/v1/task"
    async with Gateway().run(grants_file=file) as gateway:
        gateway.services.on("POST", f"{url}/estimate", httpx2.Response(200, json={"probes": 4}))
        gateway.services.on("GET", url, httpx2.Response(200, json={}))
        token = gateway.issuer.token(7, roles=["staff", "ops"])
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = b'{"subnet_id": 5,  "policy_id": 3}'
        answer = await gateway.client.post("/api/v1/task/estimate", content=body, headers=headers)
        await gateway.client.get("/api/v1/task", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"probes": 4})
        asked, listed = gateway.services.requests
        assert asked.content == body
        assert (await gateway.caller(asked)).roles == {"ops"}
        assert (await gateway.caller(listed)).roles == frozenset()


@pytest.mark.parametrize("path", [path for method, path in PASSED_ON if method == "GET"])
@pytest.mark.parametrize("status", [200, 404])
async def test_head_is_answered_like_get(gateway: Running, path: str, status: int) -> None:
    """HEAD is forwarded as GET, and returns its status and headers without a body."""
    gateway.services.on("GET", f"http://orchestrator{path}", httpx2.Response(status, json={"error": "x"}))
    answer = await gateway.client.head(path, headers={"X-Request-ID": "same"})
    get = await gateway.client.get(path, headers={"X-Request-ID": "same"})
    for each in (answer, get):
        for name in ("x-request-id", "ratelimit"):  # each has its own
            del each.headers[name]
    assert (answer.status_code, answer.headers, answer.content) == (status, get.headers, b"")
    assert {asked.method for asked in gateway.services.requests} == {"GET"}


async def test_head_of_a_streamed_response_reads_no_body(gateway: Running) -> None:
    """HEAD of a streamed response ends after the headers, and the service's response is closed."""
    stream = Stream(b"[1", b",2]")
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream))
    stream.go.release()
    answer = await asyncio.wait_for(gateway.client.head("/api/v1/task/41/results"), 10)
    assert (answer.status_code, answer.content) == (200, b"")
    assert stream.closed.is_set()


async def test_head_requires_a_token_like_get(gateway: Running) -> None:
    """HEAD without a token is a 401, and on a route without GET a 405."""
    answer = await gateway.client.head("/api/v1/task", headers={"Authorization": ""})
    assert (answer.status_code, answer.content, answer.headers["WWW-Authenticate"]) == (401, b"", "Bearer")
    assert (await gateway.client.head("/api/v1/task/41/cancel")).status_code == 405


async def test_forward_with_a_non_ascii_header_passes_it_on_unchanged(gateway: Running) -> None:
    """HTTP permits bytes above 0x7f in a header; UTF-8 reaches the service unchanged."""
    gateway.services.on("GET", "http://orchestrator/api/v1/task", httpx2.Response(200, json={}))
    answer = await gateway.client.get("/api/v1/task", headers=[(b"Accept", "text/\u00e9, \u20ac".encode())])
    (asked,) = gateway.services.requests
    assert answer.status_code == 200
    assert dict(asked.headers.raw)[b"accept"] == "text/\u00e9, \u20ac".encode()


async def test_forward_sends_only_the_known_headers(gateway: Running) -> None:
    """The services get caller, Accept, content type, conditions, request id, trace, query and real address, and nothing else."""
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await gateway.client.get(
        "/api/v1/task?status%5B%5D=running&status=a,b&page=2&since=%F0%9F%98%80",
        headers={
            "Accept": "application/json",
            "If-Match": '"1"',
            "If-None-Match": '"2"',
            "X-Request-ID": "r-1",
            "traceparent": traceparent,
            "Cookie": "c=1",
            "Connection": "keep-alive, X-Secret",
            "X-Secret": "1",
            "X-Forwarded-For": "1.2.3.4",
            "X-User-Id": "1",
            "Idempotency-Key": "k",
            "Accept-Encoding": "gzip",
            "Transfer-Encoding": "gzip",
        },
    )
    (asked,) = gateway.services.requests
    assert asked.url.raw_path == b"/api/v1/task?status%5B%5D=running&status=a,b&page=2&since=%F0%9F%98%80"
    ours = asked.headers["traceparent"]
    assert ours[3:35] != traceparent[3:35]
    assert dict(asked.headers) == {
        "host": "orchestrator",
        "authorization": asked.headers["authorization"],
        "accept": "application/json",
        "idempotency-key": "k",
        "if-match": '"1"',
        "if-none-match": '"2"',
        "accept-encoding": "identity",
        "user-agent": "scanfleet-api-gateway",
        "x-forwarded-for": "127.0.0.1",
        "x-request-id": answer.headers["x-request-id"],
        "traceparent": ours,
    }
    assert answer.headers["x-request-id"] != "r-1"
    assert await gateway.caller(asked) == Principal(7)


async def test_forward_returns_only_the_known_headers(gateway: Running) -> None:
    """The client gets the headers that it needs, but not those of the connection and of the server."""
    kept = {
        "content-type": "text/csv; charset=utf-8",
        "content-length": "2",
        "content-disposition": "attachment",
        "etag": '"3"',
        "retry-after": "3",
        "www-authenticate": "Bearer",
        "vary": "Accept",
        "x-content-type-options": "nosniff",
    }
    dropped = {"server": "uvicorn", "set-cookie": "a=1", "x-request-id": "theirs", "x-internal": "1", "keep-alive": "5"}
    gateway.services.on(
        "GET", "http://orchestrator/api/v1/task", httpx2.Response(503, content=b"[]", headers=kept | dropped)
    )
    answer = await gateway.client.get("/api/v1/task")
    (asked,) = gateway.services.requests
    ours = {name: answer.headers[name] for name in ("ratelimit", "ratelimit-policy")}
    assert dict(answer.headers) == kept | ours | {"x-request-id": asked.headers["x-request-id"]}


async def test_forward_of_a_304_has_no_body(gateway: Running) -> None:
    """A 304 is forwarded with its tag, as a complete response."""
    gateway.services.on("GET", "http://orchestrator/api/v1/task/41/map", httpx2.Response(304, headers={"ETag": '"3"'}))
    answer = await gateway.client.get("/api/v1/task/41/map", headers={"If-None-Match": '"3"'})
    assert (answer.status_code, answer.headers["ETag"], answer.content) == (304, '"3"', b"")


@pytest.mark.parametrize(
    "value", [b"\xff\xfe", b"\x01", b"a b", b"%zz", b"#", b"\xc3\xa9", b"&&&", b"===???"], ids=repr
)
async def test_query_with_invalid_bytes_is_forwarded_escaped(gateway: Running, value: bytes) -> None:
    """A query with bytes that are invalid in a URL reaches the orchestrator escaped."""
    client = Client(gateway, "/api/v1/task")
    client.scope["query_string"] = b"since=" + value
    await client.run()
    assert (await client.messages.get())["status"] == 404
    (asked,) = gateway.services.requests
    assert asked.url.query.isascii()


async def test_query_that_is_too_long_is_400(gateway: Running) -> None:
    """A URL that is too long to forward is a 400."""
    client = Client(gateway, "/api/v1/task")
    client.scope["query_string"] = b"since=" + b"x" * 100_000
    await client.run()
    assert (await client.messages.get())["status"] == 400


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
async def test_forward_to_an_unavailable_service_is_503(gateway: Running, method: str, path: str) -> None:
    """While the orchestrator is unavailable its routes are answered 503 with Retry-After."""
    gateway.services.unavailable.add("orchestrator")
    answer = await gateway.client.request(method, path, json={})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert set(answer.json()) == {"error"}


async def test_results_of_the_owner_are_forwarded(gateway: Running) -> None:
    """Once the orchestrator permits it, results are requested from result-store in the caller's name with the same Accept."""
    gateway.services.on("GET", RESULTS, httpx2.Response(200, content=b'{"id":1}\n', headers={"Content-Type": "x/y"}))
    answer = await gateway.client.get("/api/v1/task/41/results", headers={"Accept": "application/x-ndjson"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b'{"id":1}\n', "x/y")
    owner, results = gateway.services.requests
    assert (str(owner.url), str(results.url)) == (OWNER, RESULTS)
    assert results.headers["accept"] == "application/x-ndjson"
    for asked in (owner, results):
        assert await gateway.caller(asked) == Principal(7)


async def test_hosts_of_the_owner_are_forwarded(gateway: Running) -> None:
    """Hosts are requested from result-store with the same query, once the orchestrator permits it."""
    hosts = "http://result-store/api/v1/task/41/hosts"
    gateway.services.on("GET", f"{OWNER}/hosts", httpx2.Response(200, json={"user_id": 7}))
    gateway.services.on("GET", hosts, httpx2.Response(200, json=[]))
    assert (await gateway.client.get("/api/v1/task/41/hosts?limit=2&after=127.9.8.1")).json() == []
    permitted, asked = gateway.services.requests
    assert (permitted.url.path, str(asked.url)) == ("/internal/jobs/41/owner/hosts", f"{hosts}?limit=2&after=127.9.8.1")
    gateway.services.on("GET", f"{OWNER}/hosts", httpx2.Response(403, json={"error": "not yours"}))
    assert (await gateway.client.get("/api/v1/task/41/hosts")).status_code == 403
    assert len(gateway.services.asked("result-store")) == 1


async def test_nmap_xml_of_a_finished_job_is_streamed(gateway: Running) -> None:
    """result-store gets the facts of the job from the orchestrator, and its document is streamed as an attachment."""
    now = utc_now()
    job = ExportedJob(
        job_id=41, status=JobStatus.COMPLETED, error="", cidr="127.9.8.0/24", ports="22", start=now, end=now
    )
    export, target = "http://orchestrator/internal/jobs/41/export", "http://result-store/internal/jobs/41/nmap.xml"
    gateway.services.on("GET", export, httpx2.Response(200, content=job.model_dump_json()))
    headers = {"Content-Type": "application/xml", "Content-Disposition": "attachment"}
    stream = Stream(b"<nmaprun>", b"</nmaprun>")
    stream.go.release()
    stream.go.release()
    gateway.services.on("POST", target, httpx2.Response(200, headers=headers, stream=stream))
    answer = await gateway.client.get("/api/v1/task/41/nmap.xml?hosts=up")
    assert answer.text == "<nmaprun></nmaprun>"
    assert (answer.headers["content-type"], answer.headers["content-disposition"]) == ("application/xml", "attachment")
    _, asked = gateway.services.requests
    assert asked.url.query == b"hosts=up"
    assert ExportedJob.model_validate_json(asked.content) == job
    assert await gateway.caller(asked) == Principal(7)


@pytest.mark.parametrize("status", [403, 404, 409])
async def test_nmap_xml_refused_by_the_orchestrator_returns_its_error(gateway: Running, status: int) -> None:
    """The orchestrator's refusal is the response, and result-store is not queried; an unknown selection is a 400."""
    refusal = httpx2.Response(status, json={"error": "not now"})
    gateway.services.on("GET", "http://orchestrator/internal/jobs/41/export", refusal)
    answer = await gateway.client.get("/api/v1/task/41/nmap.xml")
    assert (answer.status_code, answer.json()) == (status, {"error": "not now"})
    assert (await gateway.client.get("/api/v1/task/41/nmap.xml?hosts=some")).status_code == 400
    assert not gateway.services.asked("result-store")


@pytest.mark.parametrize("status", [403, 404, 503])
async def test_results_refused_by_the_orchestrator_return_its_error(gateway: Running, status: int) -> None:
    """The orchestrator's refusal is the response, and result-store is not queried."""
    refusal = httpx2.Response(
        status, json={"error": "not yours"}, headers={"Retry-After": "1"} if status == 503 else {}
    )
    gateway.services.on("GET", OWNER, refusal)
    answer = await gateway.client.get("/api/v1/task/41/results")
    assert (answer.status_code, answer.json()) == (status, {"error": "not yours"})
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert not gateway.services.asked("result-store")


@pytest.mark.parametrize("host", ["orchestrator", "result-store"])
async def test_results_without_a_service_are_503(gateway: Running, host: str) -> None:
    """Results need both services; while one is unavailable the response is 503 with Retry-After."""
    gateway.services.unavailable.add(host)
    answer = await gateway.client.get("/api/v1/task/41/results")
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers


async def test_long_response_is_streamed(gateway: Running) -> None:
    """Each piece of a long response reaches the client before the next one exists."""
    stream = Stream(b"[1", b",2", b",3]")
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream))
    client = Client(gateway, "/api/v1/task/41/results")
    task = asyncio.create_task(client.run())
    assert (await client.messages.get())["status"] == 200
    for piece in stream.pieces:
        assert client.messages.empty()
        stream.go.release()
        assert await client.messages.get() == {"type": "http.response.body", "body": piece, "more_body": True}
    assert await client.messages.get() == {"type": "http.response.body", "body": b"", "more_body": False}
    await task
    assert stream.closed.is_set()


async def test_long_response_of_known_length_is_streamed(gateway: Running) -> None:
    """A long response with a Content-Length reaches the client piece by piece too."""
    stream = Stream(b"x" * SMALL_BYTES, b"x")
    headers = {"Content-Length": str(SMALL_BYTES + 1)}
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream, headers=headers))
    client = Client(gateway, "/api/v1/task/41/results")
    task = asyncio.create_task(client.run())
    stream.go.release()
    assert (await client.messages.get())["status"] == 200
    assert len((await client.messages.get())["body"]) == SMALL_BYTES
    stream.go.release()
    assert (await client.messages.get())["body"] == b"x"
    await task
    assert stream.closed.is_set()


async def test_small_response_that_breaks_off_is_503(gateway: Running) -> None:
    """When the service fails in the middle of a small response, nothing of it is forwarded: the response is 503."""
    stream = Stream(b"[1", breaks=True)
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream, headers={"Content-Length": "4"}))
    stream.go.release()
    answer = await gateway.client.get("/api/v1/task/41/results")
    assert (answer.status_code, set(answer.json())) == (503, {"error"})
    assert "Retry-After" in answer.headers
    assert stream.closed.is_set()


async def test_long_response_that_breaks_off_is_incomplete(gateway: Running) -> None:
    """When the service fails in the middle of a response, the client's response is cut off without its last piece."""
    stream = Stream(b"[1", breaks=True)
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream))
    client = Client(gateway, "/api/v1/task/41/results")
    stream.go.release()
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.run()
    sent = [client.messages.get_nowait() for _ in range(client.messages.qsize())]
    assert [message.get("more_body") for message in sent] == [None, True]
    assert stream.closed.is_set()


async def test_client_that_disconnects_closes_the_services_response(gateway: Running) -> None:
    """When the client disconnects in the middle of a response, the service's response is closed."""
    stream = Stream(b"[1", b",2]")
    gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream))
    client = Client(gateway, "/api/v1/task/41/results")
    task = asyncio.create_task(client.run())
    stream.go.release()
    for _ in range(2):
        await client.messages.get()
    client.leaves.set()
    await task
    assert stream.closed.is_set()


async def test_client_that_reads_nothing_is_disconnected() -> None:
    """A client that stalls for too long is disconnected, and the service's response is closed."""
    async with Gateway().run(stalled_seconds=0.02) as gateway:
        stream = Stream(b"[1", b",2]")
        gateway.services.on("GET", OWNER, httpx2.Response(200, json={"user_id": 7}))
        gateway.services.on("GET", RESULTS, httpx2.Response(200, stream=stream))
        client = Client(gateway, "/api/v1/task/41/results")
        task = asyncio.create_task(client.run())
        await client.messages.get()
        client.takes.clear()
        stream.go.release()
        with pytest.raises(TimeoutError):
            await task
        assert stream.closed.is_set()


async def test_client_that_reads_nothing_of_a_small_response_is_disconnected() -> None:
    """A client that does not read a small response is disconnected after the same time."""
    async with Gateway().run(stalled_seconds=0.02) as gateway:
        gateway.services.on("GET", "http://orchestrator/api/v1/task", httpx2.Response(200, json=[]))
        client = Client(gateway, "/api/v1/task")
        client.takes.clear()
        with pytest.raises(TimeoutError):
            await client.run()
        assert client.messages.empty()


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
async def test_request_without_a_token_is_not_forwarded(gateway: Running, method: str, path: str) -> None:
    """Without a valid token no service behind the gateway receives the request."""
    for authorization in (
        "",
        "Bearer",
        "Bearer x",
        "Basic dXNlcjpwYXNz",
        f"Bearer {gateway.issuer.token(exp=1, iat=1)}",
    ):
        answer = await gateway.client.request(method, path, headers={"Authorization": authorization}, json={})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not gateway.services.requests


async def test_body_that_is_too_large_is_413(gateway: Running) -> None:
    """A body above the limit, announced or not, is a 413, and is not forwarded."""

    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    for content in (json.dumps({"name": "x" * 2_000_000}).encode(), unannounced()):
        answer = await gateway.client.post(
            "/api/v1/subnet",
            content=content,
            headers={"Content-Type": "application/json"},
        )
        assert (answer.status_code, set(answer.json())) == (413, {"error"})
    assert not gateway.services.requests
