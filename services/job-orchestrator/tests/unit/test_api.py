"""The orchestrator's part of the public API, and the gateway's internal queries."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from job_orchestrator.api import ROUTERS
from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.fairness import Credit
from job_orchestrator.domain.job import JobTrigger, ScanJob, change
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.resources import Owned, ScanTarget, Subnet
from job_orchestrator_testing import MemoryStore, Simulation, chunk, replanned, scan_job, scan_policy
from job_orchestrator_testing.api import app_of, state_of
from job_orchestrator_testing.builders import THEN
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.topics import SCAN_COMMANDS
from scanfleet.errors import DependencyError
from scanfleet.runtime.turns import AT_ONCE, Turns
from scanfleet_testing.tokens import Issuer

ISSUER = Issuer()
JOB = ["id", "user_id", "policy_id", "subnet_id", "status", "start_time", "end_time", "created_at", "updated_at"]
AnyResource = rest.Resource[Any, Any, Any]
BODIES: dict[str, dict[str, Any]] = {"subnet": {"cidr": "127.9.8.0/24"}, "policy": {}}
"""Fields of a body in addition to its name, by resource."""

every_resource = pytest.mark.parametrize("resource", rest.RESOURCES, ids=lambda resource: resource.name)
SUBNET = ["id", "user_id", "name", "cidr", "exclude", "created_at", "updated_at"]
POLICY = {
    "id",
    "user_id",
    "name",
    "preset",
    "ports",
    "technique",
    "discovery",
    "service_detection",
    "version_intensity",
    "os_detection",
    "scripts",
    "timing",
    "max_rate",
    "min_rate",
    "max_rtt_timeout",
    "max_retries",
    "host_timeout",
    "created_at",
    "updated_at",
}
LATER = THEN + timedelta(seconds=5)
EVERY_OTHER_PORT = ",".join(str(port) for port in range(1, 4_001, 2))
MAP_CPU_SECONDS = 1.0  # takes 0.2 s on a slow core; 11 s when each block parsed the ports again


class Api:
    """Requests of one user after another."""

    def __init__(self, app: FastAPI) -> None:
        self._http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")

    async def __call__(
        self,
        request: str,
        body: object = None,
        *,
        user: int = 7,
        admin: bool = False,
        status: int = 200,
    ) -> Any:
        """`request` is verb and path; the answer has this status, and if it is an error, the shape of one."""
        method, path = request.split(" ")
        bearer = ISSUER.bearer(user, admin=admin)
        answer = await self._http.request(method, path, json=body, headers=bearer)
        assert answer.status_code == status, answer.text
        parsed = answer.json()
        if status >= 400:
            assert list(parsed) == ["error"]
            assert isinstance(parsed["error"], str)
            assert parsed["error"]
        return parsed

    async def raw(self, method: str, path: str, **how: Any) -> httpx2.Response:
        return await self._http.request(method, path, **how)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def simulation(store: MemoryStore) -> Simulation:
    return Simulation(store)


@pytest.fixture
def quotas() -> Quotas:
    return Quotas()


@pytest.fixture
def api(simulation: Simulation, quotas: Quotas) -> Api:
    checks = replace(simulation.only.checks, quotas=quotas)
    return Api(app_of(replace(state_of(simulation), checks=checks), ISSUER.verifier))


async def test_list_of_jobs_solves_no_dependencies(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take a tenth of the CPU time of a list, which is the most frequent request."""

    async def unexpected(**_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("fastapi.dependencies.utils.solve_dependencies", unexpected)
    assert (await api("GET /api/v1/task"))["jobs"] == []


@pytest.mark.proves("A22", "G20")
async def test_requests_that_parse_networks_take_turns(simulation: Simulation, store: MemoryStore) -> None:
    """A user has four at once, also after errors; further ones wait, and those of another user do not."""
    state = replace(state_of(simulation), turns=Turns(wait_seconds=0.05))
    api = Api(app_of(state, ISSUER.verifier))
    now = utc_now()
    for user in (7, 8):
        content = ScanTarget("127.9.8.0/30")
        subnet = Owned(id=user, user_id=user, name="x", content=content, created_at=now, updated_at=now)
        await store.subnets.add(subnet)
    subnet_body, policy = {"name": "x", "cidr": "127.9.8.0/30"}, {"name": "p"}
    requests: list[tuple[str, Any, int]] = [
        ("POST /api/v1/subnet", subnet_body, 201),
        ("PUT /api/v1/subnet/{}", subnet_body, 200),
        ("POST /api/v1/policy", policy, 201),
        ("POST /api/v1/task/estimate", {"subnet_id": "{}", "policy": {}}, 200),
        ("POST /api/v1/subnet/import", None, 400),
    ]
    for _ in range(AT_ONCE + 1):
        await api("POST /api/v1/subnet/import", status=400)
    async with AsyncExitStack() as held:
        for _ in range(AT_ONCE):
            await held.enter_async_context(state.turns.turn(7))
        for request, body, status in requests:
            for user in (7, 8):
                own = body if body is None or "subnet_id" not in body else {"subnet_id": user, "policy": {}}
                await api(request.format(user), own, user=user, status=503 if user == 7 else status)


def times(answer: dict[str, Any]) -> None:
    """Times are RFC 3339 in UTC with a Z."""
    for name in ("created_at", "updated_at"):
        assert answer[name].endswith("Z")
        datetime.fromisoformat(answer[name])


FOR_THE_GATEWAY = [  # in its own name: test_access.py
    ("GET", "/internal/ready"),
    ("GET", "/internal/revocations"),
    ("POST", "/internal/users"),
    ("GET", "/internal/limits"),
    ("POST", "/internal/keys"),
]
EVERY_ROUTE = [
    ("GET", "/api/v1/task"),
    ("POST", "/api/v1/task/estimate"),
    ("GET", "/api/v1/task/1"),
    ("DELETE", "/api/v1/task/1"),
    ("GET", "/api/v1/task/1/ledger"),
    ("GET", "/api/v1/task/1/waiting"),
    ("GET", "/api/v1/task/1/snapshot"),
    ("GET", "/api/v1/task/1/map"),
    ("GET", "/api/v1/deletion"),
    *((verb, resource.path) for resource in rest.RESOURCES for verb in ("GET", "POST")),
    *((verb, f"{resource.path}/1") for resource in rest.RESOURCES for verb in ("GET", "PUT", "DELETE")),
    *((verb, "/api/v1/subnet/1/retention") for verb in ("GET", "PUT")),
    ("POST", "/api/v1/subnet/import"),
    ("GET", "/api/v1/audit"),
    *((verb, "/api/v1/revocation") for verb in ("GET", "POST")),
    ("DELETE", "/api/v1/revocation/1"),
    *FOR_THE_GATEWAY,
    ("GET", "/internal/jobs/1/owner"),
    ("GET", "/internal/jobs/1/owner/hosts"),
    ("GET", "/internal/jobs/1/export"),
    ("GET", "/internal/jobs/1/latest"),
    ("GET", "/internal/jobs/latest"),
    ("POST", "/internal/jobs/cancel"),
    ("POST", "/api/v1/task/1/cancel"),
    ("POST", "/internal/commands/c-1/expire"),
    *(("POST", f"/internal/session/{change}") for change in ("create", "refresh", "end")),
]


def test_routes_are_all_tested() -> None:
    """The list of routes in these tests is that of the service."""
    served = {
        (verb, re.sub(r"{\w+}", "1", route.path.replace("{command_id}", "c-1")))  # type: ignore[attr-defined] # these routers hold API routes only
        for router in ROUTERS
        for route in router.routes
        for verb in route.methods  # type: ignore[attr-defined] # the same
    }
    assert served == set(EVERY_ROUTE)


@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
async def test_routes_require_a_valid_token(api: Api, method: str, path: str) -> None:
    """Without a token, or with a malformed or expired one, the answer is 401 with WWW-Authenticate."""
    expired = f"Bearer {ISSUER.token(exp=1)}"
    for headers in ({}, {"Authorization": "Bearer junk"}, {"Authorization": expired}):
        answer = await api.raw(method, path, headers=headers, json={})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert list(answer.json()) == ["error"]


# Subnets


async def test_subnet_is_created_read_replaced_listed_and_deleted(api: Api) -> None:
    """A POST is answered 201, and the subnet is read, replaced, listed, and deleted with the documented message."""
    made = await api("POST /api/v1/subnet", {"name": "lab", "cidr": "127.9.8.0/24"}, status=201)
    assert list(made) == SUBNET
    assert (made["id"], made["user_id"], made["name"], made["cidr"], made["exclude"]) == (
        1,
        7,
        "lab",
        "127.9.8.0/24",
        [],
    )
    times(made)
    assert await api("GET /api/v1/subnet/1") == made
    body = {"name": "new", "cidr": "127.9.9.7", "exclude": []}
    put = await api("PUT /api/v1/subnet/1", body)
    assert (put["id"], put["name"], put["cidr"], put["created_at"]) == (1, "new", "127.9.9.7/32", made["created_at"])
    assert put["updated_at"] >= made["updated_at"]
    assert await api("GET /api/v1/subnet") == {"subnets": [put], "total": 1, "page": 1, "page_size": 10}
    assert await api("DELETE /api/v1/subnet/1") == {"message": "Subnet deleted successfully"}
    await api("GET /api/v1/subnet/1", status=404)


@pytest.mark.parametrize(
    ("exclude", "effective"),
    [
        (["127.9.8.128/25", "127.9.8.1"], ["127.9.8.1/32", "127.9.8.128/25"]),
        (["10.0.0.0/8", "127.9.8.8/30", "127.9.8.9", "::1"], ["127.9.8.8/30"]),
        (None, []),
    ],
)
async def test_subnet_has_its_effective_excludes(api: Api, exclude: object, effective: list[str]) -> None:
    """POST and PUT return the excluded networks in canonical form, sorted and limited to those within the subnet."""
    body = {"name": "x", "cidr": "127.9.8.0/24", "exclude": exclude}
    made = await api("POST /api/v1/subnet", body, status=201)
    assert made["exclude"] == effective
    assert (await api("PUT /api/v1/subnet/1", body))["exclude"] == effective


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x"},
        {"cidr": "127.9.8.0/24"},
        {"name": "", "cidr": "127.9.8.0/24"},
        {"name": "x\n", "cidr": "127.9.8.0/24"},
        {"name": 1, "cidr": "127.9.8.0/24"},
        {"name": "x", "cidr": 1},
        {"name": "x", "cidr": "127.9.8.0/24", "exclude": "127.9.8.1"},
        {"name": "x", "cidr": "127.9.8.0/24", "exclude": ["10.0.0.0/33"]},
        {"name": "x", "cidr": "127.9.8.0/24", "exclude": ["127.9.8.0/24"]},
        {"name": "x", "cidr": "127.9.8.0/24", "exclude": ["127.9.8.1"] * 1_001},
        {"name": "x", "cidr": "127.9.8.1/24"},
        {"name": "x", "cidr": "127.9.8.0/33"},
        {"name": "x", "cidr": "127.1"},
        {"name": "x", "cidr": "0x7f000001"},
        {"name": "x", "cidr": "2130706433"},
        {"name": "x", "cidr": "010.0.0.1"},
        {"name": "x", "cidr": "127.0.0.1 -oN x"},
        {"name": "x", "cidr": "127.0.0.1,--script,x"},
        {"name": "x", "cidr": "10.0.0.0/24"},
        {"name": "x", "cidr": "169.254.169.254"},
        {"name": "x", "cidr": "::ffff:10.0.0.1"},
        {"name": "x", "cidr": "127.0.0.0/8"},
        {"name": "x", "cidr": {"$ne": ""}},
        {"name": "x", "cidr": "127.9.8.0/24", "user_id": 8},
        {"name": "x", "cidr": "127.9.8.0/24", "_id": 8},
        {"name": "x", "cidr": "127.9.8.0/24", "$set": {}},
        [],
        "x",
        None,
    ],
)
async def test_invalid_subnet_is_a_400(api: Api, body: object) -> None:
    """Missing, malformed, unknown, denied and too large values are a 400 on POST and PUT, and change nothing."""
    await api("POST /api/v1/subnet", body, status=400)
    made = await api("POST /api/v1/subnet", {"name": "good", "cidr": "127.9.8.0/24"}, status=201)
    await api(f"PUT /api/v1/subnet/{made['id']}", body, status=400)
    assert await api(f"GET /api/v1/subnet/{made['id']}") == made


async def test_delete_of_a_subnet_with_unfinished_jobs_is_a_409(api: Api, store: MemoryStore) -> None:
    """A subnet with an unfinished job cannot be deleted: 409; once the job has ended it can."""
    await api("POST /api/v1/subnet", {"name": "x", "cidr": "127.9.8.0/30"}, status=201)
    await store.jobs.insert([scan_job(1, subnet_id=1)])
    await api("DELETE /api/v1/subnet/1", status=409)
    job = (await store.jobs.get([1]))[1]
    await store.jobs.save([change(job, JobTrigger.CANCEL, LATER)])
    await api("DELETE /api/v1/subnet/1")


# Imports


async def imported(api: Api, text: str | bytes, status: int = 201, query: str = "") -> Any:
    answer = await api.raw("POST", f"/api/v1/subnet/import{query}", content=text, headers=ISSUER.bearer())
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_subnets_are_imported_from_csv(api: Api, store: MemoryStore) -> None:
    """Each line is a subnet, audited, in canonical form; a repeat creates none and answers the same subnets."""
    text = '\ufeffName,CIDR,exclude\r\n lab ,127.9.8.0/24,127.9.8.128/25; 127.9.8.1\r\n\r\n"a,b",127.9.9.7,\r\n'
    answer = await imported(api, text)
    assert (answer["message"], answer["created"]) == ("2 subnets created", 2)
    assert [(each["id"], each["name"], each["cidr"], each["exclude"]) for each in answer["subnets"]] == [
        (1, "lab", "127.9.8.0/24", ["127.9.8.1/32", "127.9.8.128/25"]),
        (2, "a,b", "127.9.9.7/32", []),
    ]
    entries, _ = await store.audit.page(0, 10, action="import_subnets")
    assert {entry.target for entry in entries} == {"/api/v1/subnet/1", "/api/v1/subnet/2"}
    again = await imported(api, text + "lab,127.9.8.0/24,\r\nlab,127.9.8.0/24,\r\n")
    assert (again["created"], [each["id"] for each in again["subnets"]]) == (1, [1, 2, 3, 3])
    assert again["subnets"][:2] == answer["subnets"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the first line must be"),
        ("cidr\n127.9.8.0/24\n", "the first line must be"),
        ("name,cidr,owner\nx,127.9.8.0/24,8\n", "the first line must be"),
        ("name,cidr,name\n", "the first line must be"),
        ("name,cidr\nx\n", "line 2: 1 cells, but 2 columns"),
        (
            "name,cidr\ngood,127.9.8.0/24\nx,127.9.8.1/24\n,127.9.8.0/24\n",
            "line 3: cidr: 127.9.8.1/24 has host bits set",
        ),
        ("name,cidr\ngood,127.9.8.0/24\nx,10.0.0.0/8\n", "line 3: cidr: "),
        ("name,cidr\n,127.9.8.0/24\n", "line 2: name: "),
        ("name,cidr,exclude\nx,127.9.8.0/24,y\n", "line 2: exclude: "),
        ('name,cidr\n"x,127.9.8.0/24\n', "the body is not CSV"),
        (b"name,cidr\n\xff,127.9.8.0/24\n", "the body is not CSV"),
        ("name,cidr\n" + "x,127.9.8.0/24\n" * 1_001, "more than 1000 lines"),
    ],
)
async def test_import_with_an_invalid_line_creates_nothing(api: Api, text: str | bytes, error: str) -> None:
    """A file that is not CSV, or has an invalid line, is a 400 that names the line, and no subnet is created."""
    assert (await imported(api, text, 400))["error"].startswith(error)
    assert (await api("GET /api/v1/subnet"))["total"] == 0


async def test_import_error_with_many_lines_has_whole_problems(api: Api) -> None:
    """The error has about a thousand characters, truncates no problem, and counts those that it omits."""
    lines = [f"x{number},127.9.8.{number}/24" for number in range(1, 101)]
    error = (await imported(api, "name,cidr\n" + "\n".join(lines), 400))["error"]
    *named, more = error.split("; line ")
    last, rest = more.split("; and ")
    assert 900 < len(error) < 1_100
    assert all(each.endswith("has host bits set; the network is 127.9.8.0/24") for each in (*named, last))
    assert rest == f"{100 - len(named) - 1} more"


async def test_dry_run_of_an_import_has_a_verdict_per_line_and_creates_nothing(api: Api, store: MemoryStore) -> None:
    """Each line is to be created, exists already or in an earlier line, or is refused; nothing is stored or audited."""
    await api("POST /api/v1/subnet", {"name": "lab", "cidr": "127.9.8.0/24"}, status=201)
    _, audited = await store.audit.page(0, 10)
    text = "name,cidr\nlab,127.9.8.0/24\n\nnew,127.9.9.0/24\nnew,127.9.9.0/24\nx,127.9.8.1/24\n"
    answer = await api.raw("POST", "/api/v1/subnet/import?dry_run=1", content=text, headers=ISSUER.bearer())
    error = "cidr: 127.9.8.1/24 has host bits set; the network is 127.9.8.0/24"
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "lines": [
                {"line": 2, "action": "exists", "id": 1, "error": None},
                {"line": 4, "action": "create", "id": None, "error": None},
                {"line": 5, "action": "exists", "id": None, "error": None},
                {"line": 6, "action": "refused", "id": None, "error": error},
            ]
        },
    )
    assert (await api("GET /api/v1/subnet"))["total"] == 1
    assert (await store.audit.page(0, 10))[1] == audited


async def test_import_with_update_changes_the_subnets_of_the_same_name(api: Api, store: MemoryStore) -> None:
    """A line with the name of one subnet replaces its network and exclusions, audited; other lines are as without update."""
    for number, name in enumerate(("lab", "web", "same"), 1):
        await api("POST /api/v1/subnet", {"name": name, "cidr": f"127.9.{number}.0/24"}, status=201)
    before = await api("GET /api/v1/subnet/1")
    text = "name,cidr,exclude\nlab,127.9.1.0/24,127.9.1.1\nsame,127.9.3.0/24,\nnew,127.9.4.0/24,\nlab,127.9.1.0/24,127.9.1.1\n"
    dry = await imported(api, text, 200, "?update=true&dry_run=true")
    assert [(each["action"], each["id"]) for each in dry["lines"]] == [
        ("update", 1),
        ("exists", 3),
        ("create", None),
        ("exists", 1),
    ]
    assert await api("GET /api/v1/subnet/1") == before
    answer = await imported(api, text, query="?update=true")
    assert (answer["message"], answer["created"], answer["updated"]) == ("1 subnet created, 1 updated", 1, 1)
    assert [each["id"] for each in answer["subnets"]] == [1, 3, 4, 1]
    after = await api("GET /api/v1/subnet/1")
    assert after == before | {"exclude": ["127.9.1.1/32"], "updated_at": after["updated_at"]} == answer["subnets"][0]
    assert after["updated_at"] > before["updated_at"]
    entries, _ = await store.audit.page(0, 10, action="import_subnets")
    assert {entry.target for entry in entries} == {"/api/v1/subnet/1", "/api/v1/subnet/4"}
    assert (await imported(api, text, query="?update=true"))["message"] == "0 subnets created"


async def test_import_with_update_of_a_subnet_that_is_deleted_meanwhile_is_a_409(
    api: Api, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All existing subnets are updated by one call of the store, and the answer states that one no longer exists."""
    await imported(api, "name,cidr\nlab,127.9.1.0/24\nweb,127.9.2.0/24\n")
    replace_all = store.subnets.replace_all
    calls: list[int] = []

    async def after_a_delete(subnets: Collection[Subnet]) -> bool:
        calls.append(len(subnets))
        await store.subnets.delete(7, 1)
        return await replace_all(subnets)

    monkeypatch.setattr(store.subnets, "replace_all", after_a_delete)
    changed = "name,cidr\nlab,127.9.3.0/24\nweb,127.9.4.0/24\n"
    answer = await imported(api, changed, 409, "?update=true")
    assert answer["error"] == "a subnet was deleted during the import; repeat the import"
    assert (await api("GET /api/v1/subnet/2"))["cidr"] == "127.9.4.0/24"
    assert calls == [2]


@pytest.mark.parametrize("dry_run", [True, False])
async def test_import_with_update_of_an_ambiguous_name_is_refused(api: Api, dry_run: bool) -> None:
    """A name of several subnets, or one that several lines give different networks, is an error of each such line."""
    for number, name in enumerate(("twice", "twice", "web"), 1):
        await api("POST /api/v1/subnet", {"name": name, "cidr": f"127.9.{number}.0/24"}, status=201)
    text = "name,cidr\ntwice,127.9.4.0/24\nweb,127.9.5.0/24\nweb,127.9.6.0/24\n"
    errors = [
        "name: several subnets have the name twice: 1, 2",
        "name: several lines have the name web of subnet 3",
        "name: several lines have the name web of subnet 3",
    ]
    if dry_run:
        lines = (await imported(api, text, 200, "?update=true&dry_run=true"))["lines"]
        assert [(each["action"], each["error"]) for each in lines] == [("refused", error) for error in errors]
    else:
        refused = await imported(api, text, 400, "?update=true")
        assert refused["error"] == "; ".join(f"line {number}: {error}" for number, error in enumerate(errors, 2))


async def test_retention_of_a_subnet_is_read_and_replaced(api: Api) -> None:
    """Without its own the platform's applies; what is put is read back, survives a PUT of the subnet, and null unsets it."""
    await api("POST /api/v1/subnet", {"name": "lab", "cidr": "127.9.8.0/24"}, status=201)
    path = "/api/v1/subnet/1/retention"
    default = {"keep_results_days": None, "effective_days": 0}
    assert await api(f"GET {path}") == default
    assert await api(f"PUT {path}", {"keep_results_days": 30}) == {"keep_results_days": 30, "effective_days": 30}
    await api("PUT /api/v1/subnet/1", {"name": "new", "cidr": "127.9.8.0/25"})
    assert await api(f"GET {path}") == {"keep_results_days": 30, "effective_days": 30}
    assert await api(f"PUT {path}", {"keep_results_days": None}) == default
    for wrong in ({}, {"keep_results_days": 0}, {"keep_results_days": 36_501}, {"keep_results_days": "9"}, {"x": 1}):
        await api(f"PUT {path}", wrong, status=400)
    for verb in ("GET", "PUT"):
        for admin in (False, True):
            await api(f"{verb} {path}", {"keep_results_days": 1}, user=8, admin=admin, status=404)
        await api(f"{verb} /api/v1/subnet/9/retention", {"keep_results_days": 1}, status=404)
    entries = (await api("GET /api/v1/audit?action=replace_subnet_retention", admin=True))["entries"]
    assert [(each["target"], each["decision"]) for each in entries if each["decision"] == "allowed"] == [
        (path, "allowed"),
        (path, "allowed"),
    ]


# Policies


async def test_policy_is_created_read_replaced_listed_and_deleted(api: Api) -> None:
    """A POST is answered 201 with every field, and the policy is read, replaced, listed and deleted."""
    made = await api("POST /api/v1/policy", {"name": "lab"}, status=201)
    assert set(made) == POLICY
    assert (made["preset"], made["ports"], made["scripts"], made["max_rate"]) == ("standard", "top:1000", [], None)
    times(made)
    assert await api("GET /api/v1/policy/1") == made
    put = await api("PUT /api/v1/policy/1", {"name": "new", "preset": "quick", "ports": "T:80,U:53"})
    assert (put["id"], put["ports"], put["timing"], put["created_at"]) == (1, "T:80,U:53", 4, made["created_at"])
    assert await api("GET /api/v1/policy") == {"policies": [put], "total": 1, "page": 1, "page_size": 10}
    assert await api("DELETE /api/v1/policy/1") == {"message": "Policy deleted successfully"}
    await api("GET /api/v1/policy/1", status=404)


async def test_policy_accepts_every_documented_field(api: Api) -> None:
    """Each documented field is stored and returned unchanged."""
    given = {
        "name": "all",
        "preset": "full",
        "ports": "22,80,8000-8100",
        "technique": "connect",
        "discovery": "none",
        "service_detection": False,
        "version_intensity": 3,
        "os_detection": True,
        "scripts": ["banner", "ssl-cert"],
        "timing": 2,
        "max_rate": 100,
        "min_rate": 50,
        "max_rtt_timeout": 250,
        "max_retries": 0,
        "host_timeout": 30,
    }
    assert given.keys() == POLICY - {"id", "user_id", "created_at", "updated_at"}
    made = await api("POST /api/v1/policy", given, status=201)
    assert {name: made[name] for name in given} == given


@pytest.mark.parametrize("given", [{}, {"host_timeout": None}])
async def test_policy_without_a_host_timeout_shows_the_default(api: Api, given: dict[str, None]) -> None:
    """A policy without a host timeout, or with null, is returned with the 15 minutes that apply."""
    made = await api("POST /api/v1/policy", {"name": "lab", **given}, status=201)
    assert made["host_timeout"] == (await api("GET /api/v1/policy/1"))["host_timeout"] == 900


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"preset": "slow"},
        {"ports": ""},
        {"ports": "1-70000"},
        {"ports": "80 -oN x"},
        {"ports": "http"},
        {"ports": "top:0"},
        {"ports": ",".join(["1"] * 7_000)},
        {"technique": "xmas"},
        {"discovery": "always"},
        {"service_detection": "yes"},
        {"service_detection": 1},
        {"version_intensity": 10},
        {"version_intensity": -1},
        {"version_intensity": 1.5},
        {"os_detection": None},
        {"scripts": "banner"},
        {"scripts": ["default"]},
        {"min_rate": 200, "max_rate": 100},
        {"scripts": ["exploit"]},
        {"scripts": ["banner", "../../x"]},
        {"timing": 6},
        {"timing": "4"},
        {"max_rate": 0},
        {"max_retries": 11},
        {"host_timeout": 0},
        {"arguments": "-oN x"},
        {"user_id": 8},
        {"id": 8},
    ],
)
async def test_invalid_policy_is_a_400(api: Api, wrong: dict[str, object]) -> None:
    """An undocumented value, an unknown field and a value of another type are 400s."""
    await api("POST /api/v1/policy", {"name": "x"} | wrong, status=400)


# Tags


@every_resource
async def test_put_with_an_outdated_etag_is_a_412(api: Api, resource: AnyResource) -> None:
    """A PUT with the tag of an earlier state is a 412 and changes nothing; with the current tag, `*` or none it succeeds."""
    path, body = resource.path, {"name": "x"} | BODIES[resource.name]

    async def put(tag: str | None, name: str = "y") -> httpx2.Response:
        headers = ISSUER.bearer() | ({"If-Match": tag} if tag else {})
        return await api.raw("PUT", f"{path}/1", json=body | {"name": name}, headers=headers)

    made = await api.raw("POST", path, json=body, headers=ISSUER.bearer())
    first = made.headers["ETag"]
    assert (await api.raw("GET", f"{path}/1", headers=ISSUER.bearer())).headers["ETag"] == first
    changed = await put(f'"other", {first}')
    assert (changed.status_code, changed.headers["ETag"] != first) == (200, True)
    for stale in (first, f"W/{changed.headers['ETag']}", "x"):
        refused = await put(stale, "z")
        assert (refused.status_code, list(refused.json())) == (412, ["error"])
    assert (await api(f"GET {path}/1"))["name"] == "y"
    assert [(await put(tag, "y")).status_code for tag in ("*", None)] == [200, 200]


@every_resource
async def test_repeated_put_succeeds(api: Api, resource: AnyResource) -> None:
    """A PUT that is repeated with its first `If-Match`, as after a lost response, is a 200 with the ETag that it had made."""
    path, body = resource.path, {"name": "x"} | BODIES[resource.name]
    made = await api.raw("POST", path, json=body, headers=ISSUER.bearer())
    headers = ISSUER.bearer() | {"If-Match": made.headers["ETag"]}
    first, repeat = [await api.raw("PUT", f"{path}/1", json=body | {"name": "y"}, headers=headers) for _ in range(2)]
    assert (repeat.status_code, repeat.headers["ETag"], repeat.json()) == (200, first.headers["ETag"], first.json())


@every_resource
@pytest.mark.parametrize(("name", "status"), [("other", 412), ("same", 200)])
async def test_concurrent_different_change_returns_412(
    api: Api, store: MemoryStore, resource: AnyResource, name: str, status: int
) -> None:
    """A change between the check of the tag and the write is detected by the write; a repeat of the request is answered."""
    path, body = resource.path, {"name": "x"} | BODIES[resource.name]
    made = await api.raw("POST", path, json=body, headers=ISSUER.bearer())
    add_audit = store.audit.add

    async def change_meanwhile(entries: Any) -> None:
        store.audit.add = add_audit  # type: ignore[method-assign] # once
        await api(f"PUT {path}/1", body | {"name": name})
        await add_audit(entries)

    store.audit.add = change_meanwhile  # type: ignore[method-assign] # runs between the check and the write
    headers = ISSUER.bearer() | {"If-Match": made.headers["ETag"]}
    answer = await api.raw("PUT", f"{path}/1", json=body | {"name": "same"}, headers=headers)
    now = await api.raw("GET", f"{path}/1", headers=ISSUER.bearer())
    assert (answer.status_code, now.json()["name"]) == (status, name)
    assert (answer.headers.get("ETag") == now.headers["ETag"]) == (status == 200)


# Both


@every_resource
async def test_resources_are_listed_by_page_newest_first(api: Api, resource: AnyResource) -> None:
    """Lists hold the user's own, newest first, by pages of 10 by default, and `total` counts all."""
    path, body = resource.path, {"name": "x"} | BODIES[resource.name]
    for _ in range(12):
        await api(f"POST {path}", body, status=201)
    await api(f"POST {path}", body, user=8, status=201)
    first = await api(f"GET {path}")
    assert [each["id"] for each in first[resource.plural]] == list(range(12, 2, -1))
    assert {name: first[name] for name in ("total", "page", "page_size")} == {"total": 12, "page": 1, "page_size": 10}
    third = await api(f"GET {path}?page=3&page_size=5")
    assert [each["id"] for each in third[resource.plural]] == [2, 1]
    assert (third["page"], third["page_size"]) == (3, 5)
    assert (await api(f"GET {path}?page=1000000000"))[resource.plural] == []


@every_resource
async def test_repeated_post_with_a_key_gets_the_first_answer(
    api: Api, store: MemoryStore, resource: AnyResource
) -> None:
    """Concurrent and later repeats create nothing, whether the object was changed or deleted meanwhile."""
    body = {"name": "lab"} | BODIES[resource.name]

    async def post(key: str, body: object = body, *, user: int = 7) -> httpx2.Response:
        return await api.raw("POST", resource.path, json=body, headers=ISSUER.bearer(user) | {"Idempotency-Key": key})

    answers = await asyncio.gather(*(post("k") for _ in range(20)))
    first = answers[0]
    assert first.status_code == 201
    assert {(each.status_code, each.text, each.headers["etag"]) for each in answers} == {
        (201, first.text, first.headers["etag"])
    }
    assert (await api(f"GET {resource.path}"))["total"] == 1
    path = f"{resource.path}/{first.json()['id']}"
    await api(f"PUT {path}", body | {"name": "other"})
    assert (await post("k")).text == first.text
    assert (await api(f"GET {path}"))["name"] == "other"
    await api(f"DELETE {path}")
    assert (await post("k")).text == first.text
    assert (await api(f"GET {resource.path}"))["total"] == 0
    other = await post("k", body | {"name": "other"})
    assert (other.status_code, other.json()) == (400, {"error": "Idempotency-Key was used for another request"})
    assert (await post("k", user=8)).json()["id"] != first.json()["id"]
    assert (await post("other")).json()["id"] != first.json()["id"]
    targets = Counter(each.target for each in (await store.audit.page(0, 100))[0] if each.action.startswith("create"))
    assert targets[path] == 22


async def test_key_of_one_resource_is_refused_for_another(api: Api) -> None:
    """The keys of a user are those of all of the user's requests."""
    headers = ISSUER.bearer(7) | {"Idempotency-Key": "k"}
    for resource, status in ((rest.SUBNETS, 201), (rest.POLICIES, 400)):
        answer = await api.raw("POST", resource.path, json={"name": "a"} | BODIES[resource.name], headers=headers)
        assert answer.status_code == status


@every_resource
async def test_post_with_a_key_that_was_interrupted_is_finished_by_its_repeat(
    api: Api, store: MemoryStore, resource: AnyResource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the orchestrator ends after the acceptance, the repeat creates the object of the answer."""
    body, headers = {"name": "lab"} | BODIES[resource.name], ISSUER.bearer(7) | {"Idempotency-Key": "k"}

    async def fail(*_: object) -> None:
        raise DependencyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(store, resource.plural), "add", fail)
        assert (await api.raw("POST", resource.path, json=body, headers=headers)).status_code == 503
    assert (await api(f"GET {resource.path}"))["total"] == 0
    answer = await api.raw("POST", resource.path, json=body, headers=headers)
    assert answer.status_code == 201
    assert (await api(f"GET {resource.path}"))[resource.plural] == [answer.json()]


@every_resource
async def test_refused_post_leaves_its_key_free(api: Api, resource: AnyResource) -> None:
    """A corrected request may use the key of a refused one."""
    body, headers = {"name": "lab"} | BODIES[resource.name], ISSUER.bearer(7) | {"Idempotency-Key": "k"}
    assert (await api.raw("POST", resource.path, json=body | {"name": ""}, headers=headers)).status_code == 400
    assert (await api.raw("POST", resource.path, json=body, headers=headers)).status_code == 201


@pytest.mark.parametrize("kind", ["subnet", "policy", "task"])
@pytest.mark.parametrize(
    "query",
    ["page=0", "page=-1", "page=x", "page=", "page=1.5", "page=99999999999999999999", "page_size=0", "page_size=101"],
)
async def test_invalid_page_is_a_400(api: Api, kind: str, query: str) -> None:
    """`page` is from 1, `page_size` from 1 to 100, both integers."""
    await api(f"GET /api/v1/{kind}?{query}", status=400)


@every_resource
async def test_resource_of_another_user_is_a_404(api: Api, resource: AnyResource) -> None:
    """Reading, replacing or deleting another user's resource is a 404 without effect, for an administrator too."""
    path, body = resource.path, {"name": "x"} | BODIES[resource.name]
    made = await api(f"POST {path}", body, status=201)
    for admin in (False, True):
        await api(f"GET {path}/1", user=8, admin=admin, status=404)
        await api(f"PUT {path}/1", body, user=8, admin=admin, status=404)
        await api(f"DELETE {path}/1", user=8, admin=admin, status=404)
    assert await api(f"GET {path}/1") == made


@pytest.mark.parametrize("path", ["subnet/{}", "policy/{}", "task/{}", "task/{}/ledger"])
@pytest.mark.parametrize("id_", ["x", "0", "-1", "1.0", "01", "99", str(2**53), "1" * 40, "%00", "null"])
async def test_invalid_or_unknown_id_is_a_404(api: Api, path: str, id_: str) -> None:
    """An id that is not an integer from 1, or does not exist, is a 404."""
    await api(f"GET /api/v1/{path.format(id_)}", status=404)


async def test_unknown_path_is_a_404_and_unknown_method_a_405(api: Api) -> None:
    """An unknown path is a 404, an unsupported method a 405 that names the supported ones; both in the common format."""
    await api("GET /api/v1/tasks", status=404)
    await api("GET /api/v1/subnet/", status=404)
    await api("PATCH /api/v1/subnet/1", {}, status=405)
    answer = await api.raw("PATCH", "/api/v1/subnet/1", headers=ISSUER.bearer())
    assert answer.headers["Allow"] == "DELETE, GET, HEAD, PUT"


async def test_malformed_json_is_a_400(api: Api) -> None:
    """A body that cannot be read is the caller's mistake."""
    headers = ISSUER.bearer() | {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b"", b"[" * 60_000):
        answer = await api.raw("POST", "/api/v1/subnet", headers=headers, content=content)
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


async def test_unavailable_database_is_a_503(api: Api, store: MemoryStore) -> None:
    """While MongoDB is unavailable every route answers 503 with Retry-After, without details."""
    store.data.unavailable = True
    for method, path in [each for each in EVERY_ROUTE if each not in FOR_THE_GATEWAY]:
        name = path.split("/")[3]
        body: dict[str, Any] = {"jti": "x"} if name == "revocation" else {"name": "x"} | BODIES.get(name, {})
        if path.endswith("/cancel"):
            body = {"all": True}
        if path.endswith("/estimate"):
            body = {"subnet_id": 1, "policy_id": 1}
        if path.endswith("/retention"):
            body = {"keep_results_days": 1}
        sent: dict[str, Any] = (
            {"content": "name,cidr\nx,127.9.8.0/24\n"} if path.endswith("/import") else {"json": body}
        )
        answer = await api.raw(method, path, headers=ISSUER.bearer(admin=True), **sent)
        assert (answer.status_code, int(answer.headers["Retry-After"]) >= 1) == (503, True), path
        assert "database" not in answer.json()["error"]


# Tasks


async def test_task_list_has_exactly_the_documented_fields(api: Api, store: MemoryStore) -> None:
    """A job in the list has the documented fields in order, times with a Z, and null where there is no value yet."""
    await store.jobs.insert([scan_job(1), change(scan_job(2), JobTrigger.START, LATER)])
    answer = await api("GET /api/v1/task")
    assert list(answer) == ["jobs", "total", "page", "page_size"]
    pending, running = answer["jobs"]
    assert list(pending) == list(running) == JOB
    assert pending == {
        "id": 1,
        "user_id": 7,
        "policy_id": 1,
        "subnet_id": 1,
        "status": "pending",
        "start_time": None,
        "end_time": None,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:00Z",
    }
    assert (running["status"], running["start_time"], running["end_time"]) == ("running", "2026-01-01T00:00:05Z", None)


async def test_tasks_are_the_callers_own_newest_start_first(api: Api, store: MemoryStore) -> None:
    """Only the caller's jobs are listed, pending ones first, then by start, for an administrator too."""
    await store.jobs.insert(
        [
            change(scan_job(1), JobTrigger.START, LATER),
            scan_job(2),
            change(scan_job(3), JobTrigger.START, LATER + timedelta(seconds=1)),
            scan_job(4),
            scan_job(5, user_id=8),
        ],
    )
    answer = await api("GET /api/v1/task", admin=True)
    assert [job["id"] for job in answer["jobs"]] == [4, 2, 3, 1]
    assert answer["total"] == 4
    page = await api("GET /api/v1/task?page=2&page_size=3")
    assert ([job["id"] for job in page["jobs"]], page["total"], page["page"], page["page_size"]) == ([1], 4, 2, 3)


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", [1, 3, 2]),
        ("status=pending", [1]),
        ("status=running&status=pending", [1, 2]),
        ("status[]=running&status[]=cancelled", [3, 2]),
        ("status=running,cancelled", [3, 2]),
        ("status=completed", []),
    ],
)
async def test_tasks_are_filtered_by_status(api: Api, store: MemoryStore, query: str, ids: list[int]) -> None:
    """`status` may be repeated, bracketed or separated by commas, and `total` counts what matches."""
    started = change(scan_job(2), JobTrigger.START, LATER)
    cancelled = change(scan_job(3), JobTrigger.CANCEL, LATER)
    await store.jobs.insert([scan_job(1), started, cancelled])
    answer = await api(f"GET /api/v1/task?{query}")
    assert ([job["id"] for job in answer["jobs"]], answer["total"]) == (ids, len(ids))


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("subnet_id=2", [3, 2]),
        ("policy_id=5", [4, 2]),
        ("subnet_id=2&policy_id=5&status=pending", [2]),
        ("subnet_id=99", []),
        ("since=2026-01-01T00:00:05Z", [4, 3]),
        ("since=2026-01-01T02:00:05%2B02:00&subnet_id=2", [3]),
    ],
)
async def test_tasks_are_filtered_by_subnet_policy_and_time(
    api: Api, store: MemoryStore, query: str, ids: list[int]
) -> None:
    """Jobs are selected by subnet, policy and the time of their creation, all of which must match."""
    later: Any = {"created_at": LATER, "updated_at": LATER}
    await store.jobs.insert(
        [
            scan_job(1),
            scan_job(2, subnet_id=2, policy_id=5),
            scan_job(3, subnet_id=2, **later),
            scan_job(4, policy_id=5, **later),
        ]
    )
    answer = await api(f"GET /api/v1/task?{query}")
    assert ([job["id"] for job in answer["jobs"]], answer["total"]) == (ids, len(ids))


@pytest.mark.parametrize("query", ["subnet_id=0", "subnet_id=x", "policy_id=", "since=x", "since=2026-01-01T00:00:00"])
async def test_invalid_filter_is_a_400(api: Api, query: str) -> None:
    """An invalid id, and a time that is invalid or has no zone, are refused by name."""
    assert query.split("=", maxsplit=1)[0] in (await api(f"GET /api/v1/task?{query}", status=400))["error"]


@pytest.mark.parametrize(
    ("operation", "body", "error"),
    [
        ("GET /api/v1/task?user_id=abc", None, 'query.user_id: must be the id of a user, or "all"'),
        (
            "GET /api/v1/task?since=2026-01-01T00:00:00",
            None,
            "query.since: must be a time with a time zone, such as 2026-01-01T12:00:00Z",
        ),
        (
            "POST /api/v1/subnet",
            {"name": "a\nb", "cidr": "127.9.8.0/24"},
            "name: must be text without control characters",
        ),
    ],
)
async def test_value_of_a_wrong_form_is_a_400_in_words(api: Api, operation: str, body: object, error: str) -> None:
    """The error describes what the value must be, not the pattern that it does not match."""
    assert (await api(operation, body, status=400))["error"] == error


@pytest.mark.parametrize("query", ["status=done", "status=", "status=running,", "status[]=PENDING", "status=running,x"])
async def test_unknown_status_is_a_400(api: Api, query: str) -> None:
    """A value that is not a job status is refused by name."""
    assert "status" in (await api(f"GET /api/v1/task?{query}", status=400))["error"]


async def test_task_has_id_status_and_job(api: Api, store: MemoryStore) -> None:
    """The response has the id as text, the live status with its four fields, and the job."""
    running = change(scan_job(1), JobTrigger.START, LATER, progress=42, machines_found=17)
    await store.jobs.insert([running])
    assert await api("GET /api/v1/task/1") == {
        "job_id": "1",
        "status": {"status": "running", "progress": 42, "machines_found": 17, "error": ""},
        "job": (await api("GET /api/v1/task"))["jobs"][0],
    }
    await store.jobs.save([change(running, JobTrigger.FAIL, LATER, error="1 address lost")])
    assert (await api("GET /api/v1/task/1"))["status"] == {
        "status": "failed",
        "progress": 42,
        "machines_found": 17,
        "error": "1 address lost",
    }


@pytest.mark.proves("A10", "A24", "G13")
@pytest.mark.parametrize("of", ["", "/ledger", "/waiting", "/snapshot", "/map"])
async def test_task_of_another_user_is_a_404(api: Api, store: MemoryStore, of: str) -> None:
    """An administrator reads a job like its owner, with an audit entry; for any other user it is a 404."""
    path = f"/api/v1/task/1{of}"
    await store.jobs.insert([scan_job(1)])
    await api(f"GET {path}", user=8, status=404)
    assert await api(f"GET {path}", user=9, admin=True) == await api(f"GET {path}")
    (entry,), _ = await store.audit.page(0, 10)
    assert (entry.subject, entry.rule, entry.target) == ("9", "role", f"{path} of user 7")


@pytest.mark.proves("A24", "G13")
async def test_administrator_lists_jobs_of_other_users(api: Api, store: MemoryStore) -> None:
    """With `user_id` an administrator lists that user's jobs, or all; any other user gets a 403 except for their own."""
    await store.jobs.insert([scan_job(1), scan_job(2, user_id=8), change(scan_job(3), JobTrigger.START, LATER)])

    async def ids(query: str, *, user: int = 9, admin: bool = True) -> list[int]:
        return [job["id"] for job in (await api(f"GET /api/v1/task{query}", user=user, admin=admin))["jobs"]]

    assert await ids("?user_id=7") == [1, 3]
    assert await ids("?user_id=8&status=running") == []
    assert await ids("?user_id=all") == [2, 1, 3]
    assert await ids("?user_id=all&status=running") == [3]
    assert await ids("") == []
    assert await ids("?user_id=8", user=8, admin=False) == [2]
    for whose in ("7", "all"):
        await api(f"GET /api/v1/task?user_id={whose}", user=8, status=403)
    for whose in ("0", "x", "ALL", "", "7,8", "99999999999999999999"):
        await api(f"GET /api/v1/task?user_id={whose}", user=9, admin=True, status=400)


# Waiting


async def waiting(api: Api) -> dict[str, Any]:
    answer: dict[str, Any] = await api("GET /api/v1/task/1/waiting")
    return answer


async def kinds(api: Api) -> list[str]:
    return [reason["kind"] for reason in (await waiting(api))["reasons"]]


async def test_waiting_without_workers_has_the_reason(api: Api, store: MemoryStore) -> None:
    """While no worker takes work, a job that no worker holds a chunk of waits for one, since it last moved."""
    await store.jobs.insert([scan_job(1)])
    await store.chunks.insert([chunk()])
    await store.dispatch.seen_workers([Credit("leaving", "leaving", 0, raw=True, partition=0)])
    assert await waiting(api) == {
        "job_id": 1,
        "waiting": True,
        "since": "2026-01-01T00:00:00.000Z",
        "next_possible_start": None,
        "reasons": [
            {
                "kind": "no_worker",
                "until": None,
                "detail": "no worker that takes work has announced itself in the last 12 s; start a scanner-worker",
            }
        ],
        "queued_chunks": 1,
        "held_chunks": 0,
        "eta_seconds": None,
    }


async def test_waiting_for_a_raw_worker_has_the_reason(api: Api, store: MemoryStore) -> None:
    """Queued chunks that need raw packets have the reason `no_raw_worker` if only plain workers are live; others `queue`."""
    await store.jobs.insert([scan_job(1)])
    await store.chunks.insert([chunk(needs_raw=True)])
    await store.dispatch.seen_workers([Credit("plain", "plain", 2, raw=False, partition=0)])
    (reason,) = (await waiting(api))["reasons"]
    assert reason["kind"] == "no_raw_worker"
    assert reason["detail"].startswith("1 of 1 queued chunks need raw packets, and no worker that may send them")
    await store.chunks.insert([chunk(id="1-1", index=1)])
    assert await kinds(api) == ["no_raw_worker", "queue"]
    await store.dispatch.seen_workers([Credit("raw", "raw", 2, raw=True, partition=0)])
    assert await kinds(api) == ["queue"]


async def test_waiting_of_a_queued_job_has_the_work_ahead(api: Api, store: MemoryStore) -> None:
    """With workers alive a job waits for its turn, and is shown the queued work of others."""
    await store.jobs.insert([scan_job(1, seconds_left=5.0), scan_job(2, user_id=8, seconds_left=42.0)])
    await store.dispatch.seen_workers([Credit("plain", "plain", 2, raw=False, partition=0)])
    (reason,) = (await waiting(api))["reasons"]
    assert (reason["kind"], reason["detail"]) == ("queue", "42 slot seconds of work are ahead")


async def test_waiting_of_a_scanned_or_final_job_is_false(api: Api, store: MemoryStore) -> None:
    """While a worker holds a chunk, while only results are awaited, and once it is final, a job does not wait."""
    running = change(scan_job(1), JobTrigger.START, LATER, eta_seconds=12.5)
    await store.jobs.insert([running])
    await store.chunks.insert([chunk(state=ChunkState.RUNNING), chunk(id="1-1", index=1)])
    scanning = await waiting(api)
    assert (scanning["waiting"], scanning["since"], scanning["reasons"]) == (False, None, [])
    assert (scanning["queued_chunks"], scanning["held_chunks"], scanning["eta_seconds"]) == (1, 1, 12.5)
    assert (await api("GET /api/v1/task/1/ledger"))["eta_seconds"] == 12.5
    both = await store.chunks.get(["1-0", "1-1"])
    await store.chunks.save([replace(each, state=ChunkState.SCANNED) for each in both.values()])
    assert (await waiting(api))["waiting"] is False
    await store.jobs.save([change(running, JobTrigger.CANCEL, LATER)])
    over = await waiting(api)
    assert (over["waiting"], over["reasons"], over["queued_chunks"], over["eta_seconds"]) == (False, [], 0, None)
    assert (await api("GET /api/v1/task/1/ledger"))["eta_seconds"] is None


# Snapshot and map


async def test_snapshot_has_the_request(api: Api, store: MemoryStore) -> None:
    """Subnet and policy are shown as they were when the job was created, whether or not they still exist."""
    job = scan_job(1, cidr="127.9.8.0/29", exclude=("127.9.8.7/32",), policy=scan_policy(ports="T:22,U:53"))
    await store.jobs.insert([job])
    assert await api("GET /api/v1/task/1/snapshot") == {
        "job_id": 1,
        "cidr": "127.9.8.0/29",
        "exclude": ["127.9.8.7/32"],
        "policy": job.policy.model_dump(mode="json"),
        "addresses": 8,
        "excluded": 1,
        "ports": 2,
        "chunks": job.plan.chunk_count,
        "estimate_seconds": job.plan.estimate,
    }
    assert set(job.policy.model_dump()) == POLICY - {"id", "user_id", "name", "created_at", "updated_at"}


def letters(answer: dict[str, Any]) -> dict[str, str]:
    return {block["ports"]: block["letters"] for block in answer["blocks"]}


def mapped_job(**changed: Any) -> ScanJob:
    """16 addresses in chunks of four for TCP and for UDP; the last but one slice and one address are excluded."""
    return scan_job(
        1,
        cidr="127.9.8.0/28",
        exclude=("127.9.8.3/32", "127.9.8.8/30"),
        policy=scan_policy(ports="T:22,U:53"),
        **{"chunk_addresses": 4, "chunk_count": 6, "blocks": 2, "chunk_ports": 8_192} | changed,
    )


def mapped_chunk(job: ScanJob, index: int, **changed: Any) -> Chunk:
    (made,) = plan.chunks(job, index, index + 1)
    return replace(made, **changed)


async def test_map_has_a_letter_for_each_address(api: Api, store: MemoryStore) -> None:
    """Each block of ports has outcomes, exclusions, addresses being scanned, and waiting ones."""
    job = change(mapped_job(), JobTrigger.START, LATER)
    await store.jobs.insert([job])
    await store.chunks.insert(
        [
            mapped_chunk(job, 0, state=ChunkState.STORED, outcomes="asdx"),
            mapped_chunk(job, 1, state=ChunkState.RUNNING, outcomes="a...", reach=3),
            mapped_chunk(job, 2, state=ChunkState.QUEUED),
            mapped_chunk(job, 3, state=ChunkState.FAILED, outcomes="t.rx"),
        ]
    )
    answer = await api("GET /api/v1/task/1/map")
    assert answer == {
        "job_id": 1,
        "seq": job.seq,
        "status": "running",
        "first": "127.9.8.0",
        "addresses": 16,
        "step": 1,
        "blocks": [
            {"ports": "22", "letters": "asdxa>>.xxxx...."},
            {"ports": "U:53", "letters": "tlrx....xxxx...."},
        ],
    }
    assert letters(await api("GET /api/v1/task/1/map?ports=U:1-100")) == {"U:53": answer["blocks"][1]["letters"]}
    part = await api("GET /api/v1/task/1/map?from=127.9.8.5&ports=22")
    assert (part["first"], part["addresses"], letters(part)) == ("127.9.8.5", 11, {"22": ">>.xxxx...."})


async def test_map_by_chunk_has_the_worst_letter_of_each(api: Api, store: MemoryStore) -> None:
    """A map by chunk has one letter for the addresses of each slice, excluded ones and those without a chunk included."""
    job = change(mapped_job(), JobTrigger.START, LATER)
    await store.jobs.insert([job])
    await store.chunks.insert(
        [
            mapped_chunk(job, 0, state=ChunkState.STORED, outcomes="asdx"),
            mapped_chunk(job, 1, state=ChunkState.RUNNING, outcomes="a...", reach=3),
            mapped_chunk(job, 3, state=ChunkState.FAILED, outcomes="t.ax"),
            mapped_chunk(job, 4, state=ChunkState.STORED, outcomes="ddsd"),
        ]
    )
    answer = await api("GET /api/v1/task/1/map?by=chunk")
    assert {name: answer[name] for name in ("first", "addresses", "step")} == {
        "first": "127.9.8.0",
        "addresses": 16,
        "step": 4,
    }
    assert letters(answer) == {"22": "a>x.", "U:53": "lsx."}
    part = await api("GET /api/v1/task/1/map?by=chunk&from=127.9.8.6&ports=22")
    assert (part["first"], part["addresses"], letters(part)) == ("127.9.8.4", 12, {"22": ">x."})
    assert "by" in (await api("GET /api/v1/task/1/map?by=port", status=400))["error"]


@pytest.mark.parametrize("cidr", ["10.0.0.0/12", "2001:db8::/108"])
async def test_map_by_chunk_of_a_large_network_is_one_answer(api: Api, store: MemoryStore, cidr: str) -> None:
    """A network of a million addresses is a letter per chunk, and is read without a list of its addresses."""
    job = scan_job(1, cidr=cidr, chunk_addresses=1_024, chunk_count=1_024)
    await store.jobs.insert([change(job, JobTrigger.START, LATER)])
    await store.chunks.insert([mapped_chunk(job, 1_023, state=ChunkState.STORED, outcomes="s" * 1_023 + "a")])
    answer = await api("GET /api/v1/task/1/map?by=chunk")
    assert (answer["addresses"], answer["step"]) == (1 << 20, 1_024)
    assert letters(answer) == {job.policy.ports: "." * 1_023 + "a"}
    assert "?by=chunk" in (await api("GET /api/v1/task/1/map", status=413))["error"]


async def test_map_by_chunk_of_more_chunks_than_an_answer_names_a_part(api: Api, store: MemoryStore) -> None:
    """With a chunk per address a map by chunk is as large as one by address, and the 413 names the first part only."""
    await store.jobs.insert([scan_job(1, cidr="10.0.0.0/15", policy=scan_policy(ports="22"), chunk_addresses=1)])
    error = (await api("GET /api/v1/task/1/map?by=chunk", status=413))["error"]
    assert "?from=10.0.0.0" in error
    assert "?by=chunk" not in error
    assert (await api("GET /api/v1/task/1/map?by=chunk&from=10.1.0.0"))["addresses"] == 65_536


async def test_map_of_a_cancelled_job_has_cancelled_addresses(api: Api, store: MemoryStore) -> None:
    """In a final job no address waits: those without an outcome were cancelled, in chunks that were never created too."""
    job = change(mapped_job(), JobTrigger.CANCEL, LATER)
    await store.jobs.insert([job])
    await store.chunks.insert([mapped_chunk(job, 0, state=ChunkState.CANCELLED, outcomes="a..x")])
    answer = letters(await api("GET /api/v1/task/1/map"))
    assert answer == {"22": "accxccccxxxxcccc", "U:53": "cccxccccxxxxcccc"}


async def test_map_of_a_job_of_release_0_1_is_read_slice_by_slice(api: Api, store: MemoryStore) -> None:
    """Chunks that are numbered slice by slice are at the same positions."""
    job = change(mapped_job(blockwise=False), JobTrigger.START, LATER)
    await store.jobs.insert([job])
    await store.chunks.insert([mapped_chunk(job, 3, state=ChunkState.STORED, outcomes="aaaa")])
    answer = letters(await api("GET /api/v1/task/1/map?from=127.9.8.4"))
    assert answer == {"22": "....xxxx....", "U:53": "aaaaxxxx...."}


async def test_map_etag_changes_with_each_code(api: Api, store: MemoryStore) -> None:
    """A caller with the current map gets 304; the tag changes with each code, even if the job's state does not."""
    job = change(mapped_job(), JobTrigger.START, LATER)
    await store.jobs.insert([job])
    await store.chunks.insert([mapped_chunk(job, 0)])

    async def ask(tag: str = "") -> httpx2.Response:
        headers = ISSUER.bearer() | ({"If-None-Match": tag} if tag else {})
        return await api.raw("GET", "/api/v1/task/1/map", headers=headers)

    first = await ask()
    tag = first.headers["ETag"]
    assert tag.startswith(f'"{job.seq}')
    again = await ask(f'"other", W/{tag}')
    assert (again.status_code, again.headers["ETag"], again.content) == (304, tag, b"")
    (chunk_,) = (await store.chunks.get(["1-0"])).values()
    await store.chunks.save([replace(chunk_, outcomes="a..x")])
    changed = await ask(tag)
    assert (changed.status_code, changed.headers["ETag"] != tag) == (200, True)

    await store.jobs.save([replace(change(job, JobTrigger.CANCEL, LATER), settled=True)])
    over = await ask(tag)
    assert (over.status_code, over.headers["ETag"]) == (200, f'"{job.seq + 1}.{job.rev + 1}"')
    assert (await ask(over.headers["ETag"])).status_code == 304


async def test_map_tag_of_a_settled_job_changes_with_a_late_report(
    api: Api, store: MemoryStore, simulation: Simulation
) -> None:
    """A chunk of a cancelled job that was stored after all shows its outcomes to a caller who has the map before it."""

    async def ask(tag: str = "") -> httpx2.Response:
        return await api.raw("GET", "/api/v1/task/1/map", headers=ISSUER.bearer() | {"If-None-Match": tag})

    simulation.worker.hold = True
    await simulation.start_scan("127.9.8.0/30")
    (task,) = simulation.worker.tasks
    await simulation.worker.claim(task)
    await simulation.cancel(1)
    await simulation.settle()
    assert (await store.jobs.get([1]))[1].settled
    before = await ask()
    assert (await ask(before.headers["ETag"])).status_code == 304
    await simulation.worker.scanned(task)
    await simulation.wait(2, seconds=11.0)
    assert (await store.jobs.get([1]))[1].settled
    after = await ask(before.headers["ETag"])
    assert (before.json()["blocks"][0]["letters"], after.status_code) == ("cccc", 200)
    assert after.json()["blocks"][0]["letters"] == "ssss"


async def test_too_large_map_is_a_413_that_names_a_valid_request(api: Api, store: MemoryStore) -> None:
    """Above 65,536 addresses, or a megabyte of letters, the answer is a 413 that names a request that would succeed."""
    many = scan_job(2, cidr="10.0.0.0/16", policy=scan_policy(ports="1-17"), blocks=17, chunk_ports=1)
    await store.jobs.insert([scan_job(1, cidr="10.0.0.0/15"), many])
    assert "?from=10.0.0.0" in (await api("GET /api/v1/task/1/map", status=413))["error"]
    first = await api("GET /api/v1/task/1/map?from=10.0.0.0")
    second = await api("GET /api/v1/task/1/map?from=10.1.0.0")
    assert [(part["first"], part["addresses"]) for part in (first, second)] == [
        ("10.0.0.0", 65_536),
        ("10.1.0.0", 65_536),
    ]
    assert "?ports=" in (await api("GET /api/v1/task/2/map", status=413))["error"]


@pytest.mark.parametrize(
    ("ports", "query"),
    [
        ("-", ""),
        ("-", "?from=127.9.8.7"),
        ("-", f"?ports={EVERY_OTHER_PORT[:7_999]}"),
        (EVERY_OTHER_PORT, "?from=127.9.8.7"),
        (EVERY_OTHER_PORT, f"?from=127.9.8.7&ports={EVERY_OTHER_PORT[:7_999]}"),
    ],
)
async def test_map_of_many_blocks_is_refused_before_chunks_are_read(
    api: Api, store: MemoryStore, ports: str, query: str
) -> None:
    """Timing 0 plans a chunk per port and address: a map of too many of them is a 413 within a bounded CPU time."""
    job = scan_job(1, cidr="127.9.8.0/29", policy=scan_policy(ports=ports, timing=0))
    assert job.plan.chunk_count >= 8 * 2_000
    await store.jobs.insert([job])
    began = time.process_time()
    assert "?ports=" in (await api(f"GET /api/v1/task/1/map{query}", status=413))["error"]
    assert time.process_time() - began < MAP_CPU_SECONDS


async def test_map_of_the_largest_number_of_blocks_is_answered_within_a_bounded_cpu_time(
    api: Api, store: MemoryStore
) -> None:
    """A map of 65,535 blocks of one address is one range of chunks, and costs a fraction of a second beside the chunks."""
    await store.jobs.insert([scan_job(1, cidr="127.9.8.0/32", policy=scan_policy(ports="-", timing=0))])
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.005)
            turns += 1

    others = asyncio.create_task(count_turns())
    began = time.process_time()
    answer = await api("GET /api/v1/task/1/map")
    assert time.process_time() - began < 2 * MAP_CPU_SECONDS
    others.cancel()
    assert turns > 10  # the event loop served others meanwhile
    assert (len(answer["blocks"]), answer["blocks"][-1]) == (65_535, {"ports": "65535", "letters": "."})


@pytest.mark.parametrize("query", ["from=127.9.9.0", "from=x", "from=::1", "from=127.9.7.255", "ports=x", "ports=U:53"])
async def test_map_of_other_addresses_or_ports_is_a_400(api: Api, store: MemoryStore, query: str) -> None:
    """An address or a port that the job does not ask for is named in the error."""
    await store.jobs.insert([scan_job(1)])
    error = (await api(f"GET /api/v1/task/1/map?{query}", status=400))["error"]
    assert error.startswith(f"{query.partition('=')[0]}: ")


# Cancels of many


@pytest.mark.parametrize(
    ("wanted", "cancelled"),
    [
        ({"all": True}, [1, 2, 3]),
        ({"status": ["pending"]}, [1, 3]),
        ({"status": ["running", "pending"], "subnet_id": 2}, [3]),
        ({"policy_id": 5}, [2]),
        ({"policy_id": 5, "subnet_id": None, "status": None, "all": False}, [2]),
        ({"policy_id": 5, "status": ["pending"]}, []),
    ],
)
async def test_jobs_are_cancelled_by_filter(
    api: Api, simulation: Simulation, store: MemoryStore, wanted: object, cancelled: list[int]
) -> None:
    """The caller's unfinished jobs that match every filter are cancelled, with their events; no other job changes."""
    await store.jobs.insert(
        [
            scan_job(1),
            change(scan_job(2, policy_id=5), JobTrigger.START, LATER),
            scan_job(3, subnet_id=2),
            change(scan_job(4, policy_id=5), JobTrigger.CANCEL, LATER),
            scan_job(5, user_id=8, policy_id=5),
        ]
    )
    before = await store.jobs.get(range(1, 6))
    for admin in (False, True):
        answer = await api("POST /internal/jobs/cancel", wanted, admin=admin)
        assert answer == {"job_ids": [] if admin else cancelled, "more": False}  # a repeat finds none
    after = await store.jobs.get(range(1, 6))
    assert [id_ for id_ in after if after[id_].status != before[id_].status] == cancelled
    for id_ in cancelled:
        assert (after[id_].status, simulation.events(id_)[-1].job.status) == ("cancelled", "cancelled")


@pytest.mark.proves("G8")
async def test_job_is_cancelled(api: Api, simulation: Simulation, store: MemoryStore) -> None:
    """Its owner and an administrator cancel a pending or running job, with its event, also while the bus is unavailable."""
    await store.jobs.insert([scan_job(1), change(scan_job(2), JobTrigger.START, LATER), scan_job(3)])
    assert await api("POST /api/v1/task/1/cancel") == {"message": "Job cancelled successfully"}
    assert await api("POST /api/v1/task/2/cancel", user=9, admin=True) == {"message": "Job cancelled successfully"}
    assert [simulation.events(id_)[-1].job.status for id_ in (1, 2)] == ["cancelled", "cancelled"]
    simulation.bus.broker.unavailable = True
    await api("POST /api/v1/task/3/cancel")
    assert not await store.jobs.unfinished(7, 10)


async def test_job_that_cannot_be_cancelled_is_unchanged(
    api: Api, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that has ended is a 400, one of another user or an unknown one a 404, and one that cannot be changed a 503."""
    ended = change(scan_job(1), JobTrigger.CANCEL, LATER)
    await store.jobs.insert([ended, scan_job(2, user_id=8), scan_job(3)])
    before = await store.jobs.get([1, 2, 3])
    assert await api("POST /api/v1/task/1/cancel", status=400) == {"error": "Job is already cancelled"}
    for id_ in (2, 4):
        assert await api(f"POST /api/v1/task/{id_}/cancel", status=404) == {"error": "Job not found"}
    monkeypatch.setattr("job_orchestrator.handlers.commands.cancels.change_job", lambda *_, **__: 1 / 0)
    assert await api("POST /api/v1/task/3/cancel", status=503) == {"error": "The job cannot be changed now"}
    assert await store.jobs.get([1, 2, 3]) == before


async def test_bulk_cancel_above_a_page_needs_several_requests(api: Api, store: MemoryStore) -> None:
    """One request cancels a page of a thousand jobs and reports whether there may be more."""
    await store.jobs.insert([scan_job(id_) for id_ in range(1, 1_003)])
    first, second = [await api("POST /internal/jobs/cancel", {"all": True}) for _ in range(2)]
    assert (len(first["job_ids"]), first["more"], len(second["job_ids"]), second["more"]) == (1_000, True, 2, False)
    assert not await store.jobs.unfinished(7, 10)


async def test_jobs_are_cancelled_while_the_bus_is_unavailable(
    api: Api, simulation: Simulation, store: MemoryStore
) -> None:
    """Without the bus jobs are cancelled all the same, and their events are published once it is back."""
    await store.jobs.insert([scan_job(1)])
    simulation.bus.broker.unavailable = True
    assert (await api("POST /internal/jobs/cancel", {"all": True}))["job_ids"] == [1]
    simulation.bus.broker.unavailable = False
    await simulation.only.outbox.publish(
        await store.jobs.with_old_events(utc_now() + timedelta(hours=1), 10, range(12))
    )
    assert simulation.events(1)[-1].job.status == "cancelled"


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        None,
        {"all": False},
        {"all": "yes"},
        {"all": True, "subnet_id": 1},
        {"status": []},
        {"status": "pending"},
        {"status": ["completed"]},
        {"status": ["pending"] * 3},
        {"subnet_id": 0},
        {"subnet_id": "1"},
        {"policy_id": {"$ne": 0}},
        {"subnet_id": None},
        {"all": True, "user_id": 8},
    ],
)
async def test_cancel_without_a_clear_filter_is_a_400(api: Api, store: MemoryStore, body: object) -> None:
    """Without a filter or `all`, with both, or with an invalid value, no job is cancelled and the answer is 400."""
    await store.jobs.insert([scan_job(1)])
    await api("POST /internal/jobs/cancel", body, status=400)
    assert await store.jobs.unfinished(7, 10) == [1]


# The ledger


async def test_ledger_accounts_for_every_probe(api: Api, store: MemoryStore) -> None:
    """It has the request, counts that add up to it, and the addresses that were not probed with the reason."""
    job = scan_job(1, cidr="127.9.8.0/29", exclude=("127.9.8.7/32",), chunk_addresses=4, chunk_count=2)
    await store.jobs.insert([change(job, JobTrigger.START, LATER)])
    await store.chunks.insert(
        [
            chunk(state=ChunkState.STORED, outcomes="aasd"),
            chunk(
                id="1-1",
                index=1,
                first_address="127.9.8.4",
                state=ChunkState.FAILED,
                outcomes="t.rx",
                reason="nmap died",
            ),
        ],
    )
    assert await api("GET /api/v1/task/1/ledger") == {
        "job_id": 1,
        "status": "running",
        "accounted": False,
        "request": {"addresses": 8, "ports": 2, "probes": 16},
        "counts": {
            "answered": 4,
            "silent": 2,
            "down": 2,
            "timed_out": 2,
            "excluded": 2,
            "refused": 2,
            "cancelled": 0,
            "lost": 2,
            "waiting": 0,
        },
        "not_probed": {
            "addresses": [
                {"address": "127.9.8.7", "ports": "22,80", "outcome": "excluded", "reason": ""},
                {"address": "127.9.8.3", "ports": "22,80", "outcome": "down", "reason": ""},
                {"address": "127.9.8.4", "ports": "22,80", "outcome": "timed_out", "reason": ""},
                {"address": "127.9.8.5", "ports": "22,80", "outcome": "lost", "reason": "nmap died"},
                {"address": "127.9.8.6", "ports": "22,80", "outcome": "refused", "reason": "nmap died"},
            ],
            "total": 5,
            "page": 1,
            "page_size": 100,
            "next": None,
        },
        "eta_seconds": None,
    }
    page = (await api("GET /api/v1/task/1/ledger?page=2&page_size=2"))["not_probed"]
    assert [each["address"] for each in page["addresses"]] == ["127.9.8.4", "127.9.8.5"]
    assert (page["total"], page["page"], page["page_size"]) == (5, 2, 2)
    page = (await api("GET /api/v1/task/1/ledger?after=0&page_size=2"))["not_probed"]
    assert [each["address"] for each in page["addresses"]] == ["127.9.8.7", "127.9.8.3"]
    page = (await api(f"GET /api/v1/task/1/ledger?after={page['next']}"))["not_probed"]
    assert [each["address"] for each in page["addresses"]] == ["127.9.8.4", "127.9.8.5", "127.9.8.6"]
    assert (page["total"], page["next"]) == (5, None)
    await api("GET /api/v1/task/1/ledger?after=0&page=2", status=400)
    await api("GET /api/v1/task/1/ledger?after=-1", status=400)
    await api("GET /api/v1/task/1/ledger?page_size=1001", status=400)
    await api("GET /api/v1/task/1/ledger?page=0", status=400)


async def test_ledger_page_by_number_that_is_too_long_is_413(api: Api, store: MemoryStore) -> None:
    """A page by number cannot end early: with long lists of ports it must be smaller, or begin after a position."""
    policy = scan_policy(ports=",".join(map(str, range(1, 3_900, 2))))
    await store.jobs.insert([scan_job(1, cidr="127.9.0.0/16", exclude=("127.9.0.0/22",), policy=policy)])
    path = "GET /api/v1/task/1/ledger?page_size"
    assert "page_size" in (await api(f"{path}=1000", status=413))["error"]
    assert len((await api(f"{path}=100"))["not_probed"]["addresses"]) == 100
    page = (await api(f"{path}=1000&after=0"))["not_probed"]
    assert page["next"] == len(page["addresses"]) < 150


async def test_ledger_of_a_job_without_chunks_adds_up(api: Api, store: MemoryStore) -> None:
    """Before its chunks are created all addresses are waiting; after a cancel before that, all are listed as cancelled."""
    await store.jobs.insert([scan_job(1, exclude=("127.9.8.3/32",))])
    waiting = await api("GET /api/v1/task/1/ledger")
    assert (waiting["counts"]["waiting"], waiting["counts"]["excluded"], waiting["accounted"]) == (6, 2, False)
    await store.jobs.save([change((await store.jobs.get([1]))[1], JobTrigger.CANCEL, LATER)])
    cancelled = await api("GET /api/v1/task/1/ledger")
    assert (cancelled["counts"]["cancelled"], cancelled["counts"]["excluded"]) == (6, 2)
    assert [each["outcome"] for each in cancelled["not_probed"]["addresses"]] == ["excluded"] + ["cancelled"] * 3


@pytest.mark.parametrize("trigger", [None, JobTrigger.CANCEL])
@pytest.mark.parametrize("query", ["", "?page=600", "?after=0&page_size=1000"])
async def test_ledger_of_the_largest_job_is_answered_within_a_bounded_cpu_time(
    api: Api, store: MemoryStore, trigger: JobTrigger | None, query: str
) -> None:
    """The ledger of a job of 524,288 chunks, most of which are not created, occupies the event loop for less than 0.1 s."""
    job = replanned(scan_job(1, cidr="127.9.0.0/16", policy=scan_policy(ports="1-65535", timing=3)))
    assert job.plan.chunk_count == 524_288
    job = replace(job, made=plan.WINDOW)
    await store.jobs.insert([change(job, trigger, LATER) if trigger else job])
    await store.chunks.insert(list(plan.chunks(job, 0, job.made)))
    began = time.thread_time()
    answer = await api(f"GET /api/v1/task/1/ledger{query}")
    assert time.thread_time() - began < 0.1
    assert answer["counts"]["cancelled" if trigger else "waiting"] == answer["request"]["probes"]


@pytest.mark.parametrize(
    ("lost", "page", "read"),
    [
        ([], 1, 0),
        ([2_000], 1, 8),
        ([3, 2_000], 1, 16),
        ([3, 2_000], 2, 0),
        ([7 * each for each in range(250)], 1, 696),
        ([7 * each for each in range(250)], 3, 344),
    ],
)
async def test_ledger_reads_the_chunks_of_its_page_only(
    api: Api, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, *, lost: list[int], page: int, read: int
) -> None:
    """Of a job with 2,048 finished chunks a page reads those that it lists, and at most 7 others on each side."""
    job = scan_job(1, cidr="127.9.0.0/19", chunk_addresses=4, chunk_count=2_048, made=2_048)
    job = change(job, JobTrigger.START, THEN)
    ended = [
        replace(each, state=ChunkState.STORED, outcomes="asal" if each.index in lost else "asas")
        for each in plan.chunks(job, 0, 2_048)
    ]
    tally = Tally(job)
    for each in ended:
        tally.end(each)
    await store.jobs.insert([change(replace(job, totals=tally.totals), JobTrigger.FAIL, THEN, settled=True)])
    await store.chunks.insert(ended)
    seen: list[Chunk] = []
    of_job = store.chunks.of_job

    async def counted(job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        async for each in of_job(job_id, first, end):
            seen.append(each)
            yield each

    monkeypatch.setattr(store.chunks, "of_job", counted)
    answer = await api(f"GET /api/v1/task/1/ledger?page={page}")
    assert len(seen) == read
    assert answer["not_probed"]["total"] == len(lost)
    assert len(answer["not_probed"]["addresses"]) == min(100, max(0, len(lost) - 100 * (page - 1)))
    assert answer["counts"]["lost"] == 2 * len(lost)


async def test_ledger_of_a_completed_job_is_accounted(api: Api, store: MemoryStore) -> None:
    """When every chunk is stored and every probe has an outcome, the ledger is accounted."""
    await store.jobs.insert([scan_job(1)])
    await store.chunks.insert([chunk(state=ChunkState.STORED, outcomes="asdt")])
    assert (await api("GET /api/v1/task/1/ledger"))["accounted"] is True


# Queries of the gateway


async def test_results_are_readable_by_owner_and_administrator(api: Api, store: MemoryStore) -> None:
    """The owner and an administrator get the job's owner; others get 403, and 404 for a job that does not exist."""
    await store.jobs.insert([scan_job(1)])
    for what in ("owner", "owner/hosts"):
        assert await api(f"GET /internal/jobs/1/{what}") == {"user_id": 7}
        assert await api(f"GET /internal/jobs/1/{what}", user=8, admin=True) == {"user_id": 7}
        await api(f"GET /internal/jobs/1/{what}", user=8, status=403)
        await api(f"GET /internal/jobs/2/{what}", status=404)
        await api(f"GET /internal/jobs/2/{what}", user=8, admin=True, status=404)
        await api(f"GET /internal/jobs/x/{what}", status=404)


async def test_results_are_exported_after_the_end_of_the_job(api: Api, store: MemoryStore) -> None:
    """The facts of an ended job for an export are returned to callers who may read its results."""
    ended = utc_now()
    finished = scan_job(1, status=JobStatus.FAILED, error="64 lost", start_time=None, end_time=ended)
    await store.jobs.insert([finished, scan_job(2)])
    found = rest.ExportedJob.model_validate(await api("GET /internal/jobs/1/export"))
    assert (found.status, found.error, found.cidr, found.ports) == (
        "failed",
        "64 lost",
        finished.cidr,
        finished.policy.ports,
    )
    assert (found.start, found.end) == (finished.created_at, ended)
    await api("GET /internal/jobs/1/export", user=8, admin=True)
    await api("GET /internal/jobs/1/export", user=8, status=403)
    await api("GET /internal/jobs/3/export", status=404)
    assert "pending" in (await api("GET /internal/jobs/2/export", status=409))["error"]


async def test_watched_task_is_readable_by_owner_and_administrator(api: Api, store: MemoryStore) -> None:
    """The response is the task and the `seq` of its last event; for any other user it is a 404."""
    job = scan_job(1, seq=3)
    await store.jobs.insert([job])
    shown = {"seq": job.seq, "task": await api("GET /api/v1/task/1")}
    assert await api("GET /internal/jobs/1/latest") == shown
    assert await api("GET /internal/jobs/1/latest", user=9, admin=True) == shown
    await api("GET /internal/jobs/1/latest", user=8, status=404)
    for admin in (False, True):
        await api("GET /internal/jobs/2/latest", admin=admin, status=404)


async def test_watched_tasks_are_paged(api: Api, store: MemoryStore) -> None:
    """A page has 200 jobs by id and the start of the next page, and shows each job as a GET does."""
    await store.jobs.insert([scan_job(id_) for id_ in range(1, 202)])
    first = await api("GET /internal/jobs/latest")
    assert ([each["task"]["job_id"] for each in first["snapshots"]][-1], first["next"]) == ("200", 200)
    second = await api("GET /internal/jobs/latest?after=200")
    assert ([each["task"] for each in second["snapshots"]], second["next"]) == (
        [await api("GET /api/v1/task/201")],
        None,
    )
    assert datetime.fromisoformat(second["time"]).tzinfo is not None


async def test_watched_ended_jobs_follow_the_unfinished_ones(api: Api, store: MemoryStore) -> None:
    """After the unfinished jobs, pages have those that ended since, by their end; a page may contain both kinds."""
    now = utc_now().replace(microsecond=0)
    await store.jobs.insert([scan_job(id_) for id_ in range(1, 151)])
    ended = [change(scan_job(id_), JobTrigger.CANCEL, now) for id_ in range(151, 402)]
    await store.jobs.insert(ended)
    path = f"/internal/jobs/latest?ended_since={now.isoformat()}".replace("+", "%2B")
    first = await api(f"GET {path}")
    second = await api(f"GET {path}&ended_after={first['next_ended']}")
    third = await api(f"GET {path}&ended_after={second['next_ended']}")
    pages = [[int(each["task"]["job_id"]) for each in page["snapshots"]] for page in (first, second, third)]
    assert pages == [list(range(1, 201)), list(range(201, 401)), [401]]
    assert [(page["next"], bool(page["next_ended"])) for page in (first, second, third)] == [
        (None, True),
        (None, True),
        (None, False),
    ]
    await api(f"GET {path}&ended_after=1-x", status=400)


@pytest.mark.proves("A24", "G13")
async def test_watched_jobs_of_others_are_readable_by_administrators_only(api: Api, store: MemoryStore) -> None:
    """Only administrators may watch another user's jobs, or all, with one audit entry per stream; others get 403."""
    await store.jobs.insert([scan_job(1), scan_job(2, user_id=8)])
    for whose, ids in (("7", ["1"]), ("all", ["1", "2"])):
        path = f"/internal/jobs/latest?user_id={whose}"
        await api(f"GET {path}", user=8, status=403)
        answer = await api(f"GET {path}", user=9, admin=True)
        assert [each["task"]["job_id"] for each in answer["snapshots"]] == ids
        (entry, *_), _ = await store.audit.page(0, 10)
        assert (entry.action, entry.rule, entry.target) == ("watch_tasks", "role", f"/api/v1/events?user_id={whose}")
    assert [
        each["task"]["job_id"] for each in (await api("GET /internal/jobs/latest", user=9, admin=True))["snapshots"]
    ] == []


async def test_jobs_that_ended_long_ago_are_not_listed_again(api: Api, store: MemoryStore) -> None:
    """Jobs that ended within a day are listed to a client that was disconnected since then."""
    now = utc_now()
    recent, old = (change(scan_job(id_), JobTrigger.CANCEL, now - timedelta(hours=id_ * 20)) for id_ in (1, 2))
    await store.jobs.insert([recent, old])
    since = (now - timedelta(days=30)).isoformat().replace("+", "%2B")
    answer = await api(f"GET /internal/jobs/latest?ended_since={since}")
    assert [each["task"]["job_id"] for each in answer["snapshots"]] == ["1"]


async def test_expire_decides_an_undecided_command(api: Api, simulation: Simulation) -> None:
    """An unknown command is expired permanently; a decided one gets its original reply."""
    assert await api("POST /internal/commands/c-1/expire") == {"state": "expired"}
    assert await api("POST /internal/commands/c-1/expire") == {"state": "expired"}
    accepted = await simulation.submit()
    refused = await simulation.send(99, [1])
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    answer = await api(f"POST /internal/commands/{accepted}/expire")
    assert answer == {
        "state": "accepted",
        "jobs": [job.model_dump(mode="json") for job in simulation.accepted(accepted)],
    }
    assert list(answer["jobs"][0]) == JOB
    assert await api(f"POST /internal/commands/{refused}/expire") == {
        "state": "rejected",
        "status": 400,
        "error": "Policy 99 not found",
    }
    assert await api(f"POST /internal/commands/{accepted}/expire", user=8) == {"state": "expired"}


@pytest.mark.parametrize("id_", ["a b", "a/b", "x" * 65, "$ne"])
async def test_invalid_command_id_is_a_404(api: Api, id_: str) -> None:
    """Ids of commands are short and plain."""
    await api(f"POST /internal/commands/{id_.replace(' ', '%20')}/expire", status=404)


async def test_policies_of_earlier_versions_are_still_shown(api: Api, store: MemoryStore) -> None:
    """A stored policy is answered with its own values, not with the presets of today."""
    old = Owned(id=5, user_id=7, name="old", content=scan_policy(timing=1), created_at=THEN, updated_at=LATER)
    await store.policies.add(old)
    shown = await api("GET /api/v1/policy/5")
    assert (shown["preset"], shown["timing"], shown["updated_at"]) == ("quick", 1, "2026-01-01T00:00:05Z")


@pytest.mark.parametrize("quotas", [Quotas(subnets_per_user=2, policies_per_user=1)])
async def test_resource_above_the_quota_is_a_400(api: Api) -> None:
    """A subnet or policy above the quota is refused by name until one is deleted; other users are not affected."""
    lab = {"name": "lab", "cidr": "127.9.8.0/24"}
    for _ in range(2):
        await api("POST /api/v1/subnet", lab, status=201)
    await api("POST /api/v1/policy", {"name": "lab"}, status=201)
    refused = await api("POST /api/v1/subnet", lab, status=400)
    assert refused["error"] == "you have 2 subnets, and the limit is 2 (SCANFLEET_SUBNETS_PER_USER); delete one first"
    refused = await api("POST /api/v1/policy", {"name": "lab"}, status=400)
    assert refused["error"] == "you have 1 policies, and the limit is 1 (SCANFLEET_POLICIES_PER_USER); delete one first"
    await api("POST /api/v1/subnet", lab, user=8, status=201)
    await api("DELETE /api/v1/subnet/1")
    assert (await api("POST /api/v1/subnet", lab, status=201))["id"] == 4  # the refused ones took no id


@pytest.mark.parametrize("quotas", [Quotas(subnets_per_user=2)])
async def test_import_above_the_quota_is_a_400_and_creates_nothing(api: Api) -> None:
    """An import counts all of its new subnets; one that repeats existing ones is accepted at the limit."""
    two = "name,cidr\nlab,127.9.8.0/24\nlab,127.9.9.0/24\n"
    refused = await imported(api, two + "lab,127.9.7.0/24\n", status=400)
    assert refused["error"] == (
        "you have 0 subnets and requested 3 more, and the limit is 2 (SCANFLEET_SUBNETS_PER_USER); delete some first"
    )
    assert (await api("GET /api/v1/subnet"))["total"] == 0
    assert (await imported(api, two))["created"] == 2
    assert (await imported(api, two))["created"] == 0


@pytest.mark.parametrize("quotas", [Quotas(subnets_per_user=2, policies_per_user=2)])
async def test_parallel_requests_stay_within_the_quota(
    api: Api, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are handled at the same time create as many objects as fit, and the others are refused."""
    for resources in (store.subnets, store.policies):
        monkeypatch.setattr(resources, "take_ids", _interrupted(resources.take_ids))

    async def post(path: str, content: str) -> int:
        headers = ISSUER.bearer() | {"Content-Type": "application/json"}
        return (await api.raw("POST", f"/api/v1/{path}", content=content, headers=headers)).status_code

    files = [f"name,cidr\nlab,127.9.{n}.0/25\nlab,127.9.{n}.128/25\n" for n in range(5)]
    for path, contents, created in [("policy", ['{"name": "lab"}'] * 5, 2), ("subnet/import", files, 1)]:
        statuses = Counter(await asyncio.gather(*(post(path, content) for content in contents)))
        assert statuses == {201: created, 400: 5 - created}


@every_resource
@pytest.mark.parametrize("quotas", [Quotas(subnets_per_user=1, policies_per_user=1)])
async def test_parallel_repeat_at_the_quota_returns_the_answer_of_the_first_request(
    api: Api, store: MemoryStore, resource: AnyResource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose key another request is using is answered like it, even if no further object is allowed."""
    resources = getattr(store, resource.plural)
    monkeypatch.setattr(resources, "take_ids", _interrupted(resources.take_ids))
    body, headers = {"name": "lab"} | BODIES[resource.name], ISSUER.bearer() | {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*(api.raw("POST", resource.path, json=body, headers=headers) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.text for answer in answers}) == 1


async def test_parallel_imports_of_a_file_create_its_subnets_once(
    api: Api, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that waits for another one returns the subnets that the other has created."""
    monkeypatch.setattr(store.subnets, "take_ids", _interrupted(store.subnets.take_ids))
    lines = "name,cidr\nlab,127.9.8.0/24\nweb,127.9.9.0/24\n"
    answers = await asyncio.gather(*(imported(api, lines) for _ in range(3)))
    assert [answer["created"] for answer in answers] == [2, 0, 0]
    assert all(answer["subnets"] == answers[0]["subnets"] for answer in answers)


def _interrupted(take_ids: Callable[[int], Awaitable[range]]) -> Callable[[int], Awaitable[range]]:
    """Return the same call, during which other requests are handled."""

    async def interrupted(count: int = 1) -> range:
        for _ in range(20):
            await asyncio.sleep(0)
        return await take_ids(count)

    return interrupted


@pytest.mark.parametrize("quotas", [Quotas(subnets_per_user=2)])
async def test_updates_of_an_import_do_not_count_for_the_quota(api: Api) -> None:
    """A user at the limit can change subnets by an import, and its dry run gives the same verdicts."""
    await imported(api, "name,cidr\nlab,127.9.8.0/24\nweb,127.9.9.0/24\n")
    changed = "name,cidr\nlab,127.9.7.0/24\nweb,127.9.6.0/24\n"
    assert (await imported(api, changed, 200, "?update=1&dry_run=1"))["lines"][1]["action"] == "update"
    await imported(api, changed, 400)
    assert (await imported(api, changed, query="?update=1"))["updated"] == 2
