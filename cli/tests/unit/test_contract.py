"""The SDK covers the API: each operation of the OpenAPI document has a call, and each call is as documented."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import calls
from scanfleet_cli.client import Client

DOCUMENT = json.loads((Path(__file__).parents[3] / "docs" / "openapi" / "current.json").read_text(encoding="utf-8"))
OF_BROWSERS = {"session"}
"""Tags of operations that set or need a cookie; the SDK sends tokens."""

ARGUMENTS: dict[str, Any] = {
    "status": [JobStatus.RUNNING],
    "subnet_ids": [5],
    "key": "k",
    "csv": "name,cidr\n",
    "if_match": '"1"',
    "last_event_id": "1-41-2",
    "hosts": "up",
    "accept": calls.NDJSON,
}
"""Arguments that are not a plain number."""

OPERATION_OF = {"check_subnets": "import_subnets"}
"""Operations of functions that do not have their name."""

BODIES: dict[str, Any] = {
    "cancel_tasks": rest.CancelJobs(all=True),
    "estimate_task": rest.EstimateBody(cidr="127.9.8.0/24", policy_id=3),
    "create_subnet": rest.SubnetBody(name="lab", cidr="127.9.8.0/24"),
    "create_policy": rest.PolicyBody(name="web"),
    "create_revocation": rest.RevocationBody(user_id=7),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the document."""

    method: str
    path: re.Pattern[str]
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.fields["operationId"])

    def parameters(self, place: str) -> set[str]:
        return {each["name"].lower() for each in self.fields.get("parameters", []) if each["in"] == place}

    @property
    def models(self) -> set[str]:
        """Return the names of the models of successful responses."""
        answers = {status: each for status, each in self.fields["responses"].items() if status.startswith("2")}
        return set(re.findall(r"#/components/schemas/(\w+)", json.dumps(answers)))


OPERATIONS = [
    Operation(method.upper(), re.compile(re.sub(r"{\w+}", "[^/]+", path)), fields)
    for path, methods in DOCUMENT["paths"].items()
    for method, fields in methods.items()
    if not OF_BROWSERS & set(fields["tags"])
]
FUNCTIONS = {
    name: function
    for name, function in vars(calls).items()
    if inspect.isroutine(function) and function.__module__ == calls.__name__ and not name.startswith("_")
}


def called(name: str) -> calls.Call[Any]:
    """Return a call with every argument."""
    given: dict[str, Any] = {}
    for each in inspect.signature(FUNCTIONS[name]).parameters:
        if each in {"body", "wanted"}:
            given[each] = BODIES[name.replace("replace_", "create_")]
        else:
            given[each] = ARGUMENTS.get(each, 3)
    call: calls.Call[Any] = FUNCTIONS[name](**given)
    return call


def operations_of(call: calls.Call[Any]) -> Iterator[Operation]:
    yield from (each for each in OPERATIONS if each.method == call.method and each.path.fullmatch(call.path))


def test_operations_of_the_api_have_a_call() -> None:
    """A route without a call of the SDK is found here; those of browsers need none."""
    covered = {operation.id for name in FUNCTIONS for operation in operations_of(called(name))}
    assert covered == {each.id for each in OPERATIONS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_call_is_as_documented(name: str) -> None:
    """The request has documented parameters and body, and the model of the response is the documented one."""
    call = called(name)
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200)

    with Client("http://scanfleet.test", transport=httpx2.MockTransport(answer)) as client:
        if isinstance(call, calls.ListCall):
            call = call.page(1, calls.PAGE_SIZE)
        client.ask(call)
    (operation,) = operations_of(call)
    assert operation.id == OPERATION_OF.get(name, name)
    (request,) = sent
    assert set(request.url.params) <= operation.parameters("query")
    assert {name.lower() for name in call.headers} - {"accept", "content-type"} <= operation.parameters("header")
    if request.content:
        content = operation.fields["requestBody"]["content"]
        assert request.headers["content-type"] in content
    if call.body is not None:
        schema = content["application/json"]["schema"]
        schema = DOCUMENT["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], schema)
        assert call.body.keys() <= schema["properties"].keys()
    model = next(iter(get_args(call.answer)), call.answer)
    if model is not object:
        assert model.__name__ in operation.models
