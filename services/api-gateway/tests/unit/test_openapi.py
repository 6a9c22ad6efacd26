"""The OpenAPI document is correct, complete and readable without any other host."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from typing import Any

import httpx2
import pytest

from api_gateway_testing.gateway import Client, Gateway, Running
from scanfleet.contracts import rest

PATHS = {
    "/api/v1/info": {"get"},
    "/api/v1/me": {"get"},
    "/api/v1/events": {"get"},
    "/api/v1/task": {"get", "post"},
    "/api/v1/task/cancel": {"post"},
    "/api/v1/task/estimate": {"post"},
    "/api/v1/task/{job_id}": {"get", "delete"},
    "/api/v1/task/{job_id}/events": {"get"},
    "/api/v1/task/{job_id}/cancel": {"post"},
    "/api/v1/task/{job_id}/results": {"get"},
    "/api/v1/task/{job_id}/hosts": {"get"},
    "/api/v1/task/{job_id}/nmap.xml": {"get"},
    "/api/v1/task/{job_id}/ledger": {"get"},
    "/api/v1/task/{job_id}/waiting": {"get"},
    "/api/v1/task/{job_id}/snapshot": {"get"},
    "/api/v1/task/{job_id}/map": {"get"},
    "/api/v1/subnet": {"get", "post"},
    "/api/v1/subnet/import": {"post"},
    "/api/v1/subnet/{subnet_id}/retention": {"get", "put"},
    "/api/v1/subnet/{subnet_id}": {"get", "put", "delete"},
    "/api/v1/policy": {"get", "post"},
    "/api/v1/policy/{policy_id}": {"get", "put", "delete"},
    "/api/v1/audit": {"get"},
    "/api/v1/deletion": {"get"},
    "/api/v1/revocation": {"get", "post"},
    "/api/v1/revocation/{revocation_id}": {"delete"},
    "/api/v1/session": {"post", "delete"},
    "/api/v1/session/refresh": {"post"},
}


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run() as running:
        yield running


@pytest.fixture
async def document(gateway: Running) -> dict[str, Any]:
    answer = await gateway.client.get("/openapi.json")
    assert re.fullmatch(rb"[\x20-\x7e]+", answer.content)
    content: dict[str, Any] = answer.json()
    return content


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            yield path, verb, operation


async def test_document_is_rendered_once(gateway: Running) -> None:
    """Requests share one copy of the document, however many of them are not read yet."""
    bodies = []
    for client in (Client(gateway, "/openapi.json"), Client(gateway, "/openapi.json")):
        await client.run()
        client.messages.get_nowait()  # its head
        bodies.append(client.messages.get_nowait()["body"])
    assert bodies[0] is bodies[1]


def test_document_has_every_route(document: dict[str, Any]) -> None:
    """The document has every public path with every verb, and no other."""
    assert {path: set(verbs) for path, verbs in document["paths"].items()} == PATHS


def test_document_has_every_referenced_schema(document: dict[str, Any]) -> None:
    """Every schema that the document refers to is in it."""
    for name in re.findall(r'"#/components/schemas/([^"]*)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    assert not re.search(r'"\$ref": "(?!#/components/schemas/)', json.dumps(document))


def test_documented_errors_have_one_schema(document: dict[str, Any]) -> None:
    """Every documented error is `{"error": string}`, none is a 422, and all routes but one require a token."""
    assert "422" not in json.dumps(document)
    error = document["components"]["schemas"]["Error"]
    assert error["properties"]["error"]["type"] == "string"
    for path, _, operation in operations(document):
        if path == "/api/v1/info":
            assert "security" not in operation
        else:
            assert operation["security"] == [{"bearer": []}]
            assert {"401", "429"} <= set(operation["responses"])
        assert {"500", "503"} <= set(operation["responses"])
        for status, answer in operation["responses"].items():
            if status == "default" or int(status) >= 400:
                assert answer["content"] == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def test_documented_successes_have_a_schema(document: dict[str, Any]) -> None:
    """Every success with a body has a schema, and every operation has a description."""
    for path, _, operation in operations(document):
        assert operation["description"]
        if not {"200", "201"} & set(operation["responses"]):
            assert "content" not in operation["responses"]["204"]
            continue
        other = {"events": "text/event-stream", "nmap.xml": "application/xml"}
        kind = other.get(path.rpartition("/")[2], "application/json")
        for status in {"200", "201"} & set(operation["responses"]):
            assert operation["responses"][status]["content"][kind]["schema"]


def test_documented_ids_have_bounds(document: dict[str, Any]) -> None:
    """Every parameter of a path is documented as an integer with its bounds."""
    for path, _, operation in operations(document):
        documented = {p["name"]: p for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert set(documented) == set(re.findall(r"{(\w+)}", path))
        for parameter in documented.values():
            schema = parameter["schema"]
            assert (schema["type"], schema["minimum"], schema["maximum"]) == ("integer", 1, 2**53 - 1)


def test_forwarded_bodies_and_queries_are_documented(document: dict[str, Any]) -> None:
    """Bodies, pages and states that the gateway only forwards are documented completely."""
    for each in rest.RESOURCES:
        for verb, where in (("post", each.path), ("put", f"{each.path}/{{{each.id_name}}}")):
            body = document["paths"][where][verb]["requestBody"]
            schema = body["content"]["application/json"]["schema"]
            assert body["required"]
            assert "name" in schema["required"]
            assert schema["additionalProperties"] is False
    queries = {p["name"]: p["schema"] for p in document["paths"]["/api/v1/task"]["get"]["parameters"]}
    assert (queries["page"]["minimum"], queries["page"]["default"]) == (1, 1)
    assert (queries["page_size"]["minimum"], queries["page_size"]["maximum"], queries["page_size"]["default"]) == (
        1,
        100,
        10,
    )
    assert queries["status"]["items"]["enum"] == ["pending", "running", "completed", "failed", "cancelled"]


def test_hosts_are_documented_in_every_format(document: dict[str, Any]) -> None:
    """Hosts are documented as a list of objects with every field, and as one object per line."""
    content = document["paths"]["/api/v1/task/{job_id}/hosts"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "application/x-ndjson"}
    of_host = document["components"]["schemas"]["Host"]
    assert set(of_host["required"]) == set(of_host["properties"]) == set(rest.Host.model_fields)


def test_results_are_documented_in_every_format(document: dict[str, Any]) -> None:
    """Results are documented as JSON, NDJSON and CSV."""
    content = document["paths"]["/api/v1/task/{job_id}/results"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "application/x-ndjson", "text/csv"}


def test_events_are_documented_as_a_stream(document: dict[str, Any]) -> None:
    """A stream of events is documented as Server-Sent Events only, with its errors."""
    answers = document["paths"]["/api/v1/task/{job_id}/events"]["get"]["responses"]
    assert set(answers["200"]["content"]) == {"text/event-stream"}
    assert set(answers) == {"200", "204", "401", "404", "429", "500", "503", "default"}
    assert "content" not in answers["204"]


async def test_docs_page_uses_only_the_gateways_files(gateway: Running) -> None:
    """The page at /docs and all of its files come from the gateway itself."""
    page = (await gateway.client.get("/docs")).text
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//", page)
    for asset in re.findall(r"/docs/assets/[\w.-]+", page):
        answer = await gateway.client.get(asset)
        assert (answer.status_code, bool(answer.content)) == (200, True)
    assert "/openapi.json" in page


async def test_docs_page_range_of_a_file_is_ignored(gateway: Running) -> None:
    """A malformed Range header of a file of /docs has no effect."""
    answer = await gateway.client.get("/docs/assets/swagger-ui.css", headers={"Range": "bytes=x"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/css; charset=utf-8")


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/api/v1/task/", "/redoc", "/docs/assets/nope", "/internal/jobs/1/owner", "//"]
)
async def test_unknown_path_is_404(gateway: Running, path: str) -> None:
    """An unknown path is a 404 in the common form, also a path of the services behind the gateway."""
    answer = await gateway.client.get(f"http://gateway{path}")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


async def test_unsupported_method_is_a_405_with_the_allowed_ones(gateway: Running) -> None:
    """An unsupported method of a path is a 405 that names all supported ones."""
    for path, verbs in PATHS.items():
        with_head = verbs | {"head"} if "get" in verbs else verbs
        answer = await gateway.client.patch(re.sub(r"{\w+}", "1", path))
        assert (answer.status_code, set(answer.json())) == (405, {"error"})
        assert answer.headers["Allow"] == ", ".join(sorted(verb.upper() for verb in with_head))


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/docs/assets/swagger-ui.css"])
async def test_head_of_a_document_has_no_body(gateway: Running, path: str) -> None:
    """HEAD is answered like GET, without a body."""
    answer = await gateway.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/internal/ready"])
async def test_path_that_no_ingress_passes_on_is_404(gateway: Running, path: str) -> None:
    """The API's port serves no probes, no metrics and no internal paths of the services."""
    assert (await gateway.client.get(path)).status_code == 404


async def test_readiness_until_each_service_has_been_ready_is_503(gateway: Running) -> None:
    """The gateway is unready until the orchestrator and result-store have each been ready once, over their own addresses."""
    gateway.services.unavailable.update({"orchestrator", "result-store"})
    answer = await gateway.probes.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"error": "unavailable: job-orchestrator, result-store"})
    gateway.services.unavailable.clear()
    gateway.services.on(
        "GET", "http://orchestrator/internal/ready", httpx2.Response(503, json={"error": "unavailable: bus"})
    )
    answer = await gateway.probes.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"error": "unavailable: job-orchestrator"})
    gateway.services.on("GET", "http://orchestrator/internal/ready", httpx2.Response(200, json={"status": "ok"}))
    assert (await gateway.probes.get("/readyz")).status_code == 200


async def test_readiness_in_a_later_outage_of_a_service_stays_200(gateway: Running) -> None:
    """The gateway stays ready when a service becomes unavailable later; only requests that need it are answered 503."""
    assert (await gateway.probes.get("/readyz")).status_code == 200
    gateway.services.unavailable.update({"orchestrator", "result-store"})
    assert (await gateway.probes.get("/readyz")).status_code == 200


async def test_readiness_without_the_bus_is_503(gateway: Running) -> None:
    """The gateway is unready, and healthy, while its bus is unavailable."""
    gateway.broker.unavailable = True
    answer = await gateway.probes.get("/readyz")
    gateway.broker.unavailable = False
    assert (answer.status_code, answer.json()) == (503, {"error": "unavailable: bus"})
    assert (await gateway.probes.get("/healthz")).status_code == 200


async def test_docs_page_policy_allows_only_its_own_scripts(gateway: Running) -> None:
    """The policy of `/docs` allows its one inline script by hash and its own files, but no other host and no frame."""
    answer = await gateway.client.get("/docs")
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["Content-Security-Policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert (policy["default-src"], policy["frame-ancestors"], policy["connect-src"]) == ("'none'", "'none'", "'self'")
    for path in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
        assert path.startswith("/docs/assets/")
        assert (await gateway.client.get(path)).status_code == 200


@pytest.mark.proves("A12")
@pytest.mark.parametrize("path", [path for path, verbs in PATHS.items() if "get" in verbs and path != "/api/v1/info"])
async def test_unknown_query_parameter_is_400(gateway: Running, path: str) -> None:
    """Every route refuses an undocumented query parameter with a short message that names it."""
    before = len(gateway.services.requests)
    path = re.sub(r"{\w+}", "1", path)
    for query in ("status[$ne]=x", "status[$in][]=running", "$where=1", "_=1", "sUbnet_id=1", "x" * 5_000):
        answer = await gateway.client.get(f"{path}?{query}")
        assert (answer.status_code, list(answer.json())) == (400, ["error"])
        assert answer.json()["error"].startswith(f"unknown query parameters: {query.split('=')[0]}"[:200])
        assert len(answer.json()["error"]) <= 200
    assert len(gateway.services.requests) == before


async def test_documented_query_parameter_is_forwarded(gateway: Running, document: dict[str, Any]) -> None:
    """Every route accepts its documented query parameters, also lists in brackets."""
    for path, verb, operation in operations(document):
        for each in operation.get("parameters", ()):
            if each["in"] != "query" or path == "/api/v1/events":
                continue
            names = [each["name"]] + ([f"{each['name']}[]"] if each["schema"].get("type") == "array" else [])
            for name in names:
                value = each["schema"].get("enum", ["1"])[0]
                kind = "text/csv" if path.endswith("/import") else "application/json"
                answer = await gateway.client.request(
                    verb, re.sub(r"{\w+}", "1", path), params={name: value}, headers={"Content-Type": kind}
                )
                assert answer.status_code == 404, (path, name)  # the fakes' answer


async def test_import_of_another_content_type_is_400(gateway: Running) -> None:
    """CSV is forwarded unchanged; another body is a 400 that names the right content type."""
    gateway.services.on("POST", "http://orchestrator/api/v1/subnet/import", httpx2.Response(201, json={}))
    for kind, status in (("text/csv", 201), ("text/csv; charset=utf-8", 201), ("application/json", 400), ("", 400)):
        answer = await gateway.client.post(
            "/api/v1/subnet/import", content=b"name,cidr\n", headers={"Content-Type": kind}
        )
        assert answer.status_code == status, kind
    assert answer.json()["error"] == 'the body must be CSV, sent with the header "Content-Type: text/csv"'
    assert [asked.content for asked in gateway.services.asked("orchestrator")] == [b"name,cidr\n"] * 2
