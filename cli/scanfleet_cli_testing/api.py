"""A fake of the API as an HTTP transport, with faults that a test sets.

`FakeApi` implements the part of the API that the command uses; tests/e2e runs the command against a real gateway.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import Callable
from functools import partial
from ipaddress import ip_network
from typing import Any

import httpx2

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.scanning.policy import PolicyError, Preset, fill_in
from scanfleet_cli_testing.jobs import NOW, FakeJob, State
from scanfleet_cli_testing.streams import AllEvents, Events, Lines

TOKEN = "token-of-user-7"  # noqa: S105 # of the fake, not a secret


Fault = BaseException | httpx2.Response


_STREAM = {"content-type": "text/event-stream"}


class FakeApi(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """The API of one user, in memory."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []
        self.tokens = [TOKEN]
        self.subnets: dict[int, dict[str, Any]] = {}
        self.policies: dict[int, dict[str, Any]] = {}
        self.jobs: dict[int, FakeJob] = {}
        self.keys: dict[str, list[int]] = {}
        self.states: list[State] = [(JobStatus.PENDING, 0), (JobStatus.RUNNING, 62), (JobStatus.COMPLETED, 100)]
        """States of the next jobs."""

        self.made: Callable[[FakeJob], None] = lambda _job: None
        """Called with each new job, to set its outcome."""

        self.faults: list[Fault] = []
        """Faults of the next requests, one each."""

        self.fault_of: Callable[[httpx2.Request], Fault | None] = lambda _request: None
        self.cut_after: int | None = None
        """Number of events after which one stream is cut."""

        self.answers: dict[tuple[str, str], Any] = {}
        """Responses of further operations, or functions that return them, by method and path."""

        self._routes: list[tuple[re.Pattern[str], Callable[..., httpx2.Response]]] = [
            (re.compile(pattern), handler)
            for pattern, handler in (
                ("GET task", self._tasks),
                ("POST task", self._submit),
                ("GET events", lambda _request: httpx2.Response(200, headers=_STREAM, stream=AllEvents(self))),
                (r"[A-Z]+ task/([0-9]+)(/?.*)", self._job),
                ("GET subnet", lambda request: self._list(request, "subnets", list(reversed(self.subnets.values())))),
                ("GET policy", lambda request: self._list(request, "policies", list(reversed(self.policies.values())))),
                ("POST subnet", lambda request: self._create(self.subnets, _subnet, request, len(self.subnets) + 5)),
                ("POST subnet/import", self._import),
                ("POST policy", lambda request: self._create(self.policies, _policy, request, len(self.policies) + 3)),
                (r"[A-Z]+ subnet/([0-9]+)", partial(self._object, self.subnets, _subnet, "Subnet")),
                (r"[A-Z]+ policy/([0-9]+)", partial(self._object, self.policies, _policy, "Policy")),
            )
        ]

    # Transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        return self._answer(request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        await asyncio.sleep(0)
        return self._answer(request)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        fault = self.fault_of(request) or (self.faults.pop(0) if self.faults else None)
        if isinstance(fault, BaseException):
            raise fault
        return fault or self.carry_out(request)

    def carry_out(self, request: httpx2.Request) -> httpx2.Response:
        """Handle a request; a fault may call it before it cuts the connection."""
        method, path = request.method, request.url.path
        if (
            request.headers.get("authorization") not in {f"Bearer {token}" for token in self.tokens}
            and path != "/api/v1/info"
        ):
            return _error(401, "no valid bearer token")
        if (method, path) in self.answers:
            answer = self.answers[method, path]
            answer = answer(request) if callable(answer) else answer
            return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)
        for route, handler in self._routes:
            if match := route.fullmatch(f"{method} {path.removeprefix('/api/v1/')}"):
                return handler(request, *match.groups())
        return _error(404, "Not Found")

    def _tasks(self, request: httpx2.Request) -> httpx2.Response:
        jobs = [each.job.model_dump(mode="json") for each in reversed(self.jobs.values())]
        wanted = request.url.params.get("status")
        return self._list(request, "jobs", [each for each in jobs if not wanted or each["status"] in wanted.split(",")])

    def _list(self, request: httpx2.Request, name: str, every: list[Any]) -> httpx2.Response:
        page, size = int(request.url.params.get("page", 1)), int(request.url.params.get("page_size", 10))
        some = every[(page - 1) * size : page * size]
        return httpx2.Response(200, json={name: some, "total": len(every), "page": page, "page_size": size})

    def _create(
        self, kind: dict[int, Any], make: Callable[[int, dict[str, Any]], Any], request: httpx2.Request, number: int
    ) -> httpx2.Response:
        (known,) = self.keys.get(request.headers["idempotency-key"], [None])
        if known is not None:
            return httpx2.Response(201, json=kind[known])
        answer = self._put(kind, make, request, number)
        if answer.is_success:
            self.keys[request.headers["idempotency-key"]] = [number]
        return answer

    def _put(
        self, kind: dict[int, Any], make: Callable[[int, dict[str, Any]], Any], request: httpx2.Request, number: int
    ) -> httpx2.Response:
        try:
            kind[number] = make(number, json.loads(request.content))
        except (ValueError, PolicyError) as error:
            return _error(400, str(error))
        return httpx2.Response(201, json=kind[number])

    def _object(
        self,
        kind: dict[int, Any],
        make: Callable[[int, dict[str, Any]], Any],
        noun: str,
        request: httpx2.Request,
        number: str,
    ) -> httpx2.Response:
        if int(number) not in kind:
            return _error(404, f"{noun} not found")
        etag = f'"{hash(json.dumps(kind[int(number)])) & 0xFFFF}"'
        match request.method:
            case "GET":
                return httpx2.Response(200, json=kind[int(number)], headers={"ETag": etag})
            case "PUT":
                if request.headers.get("if-match", etag) != etag:
                    return _error(412, f"{noun.lower()} {number} has changed")
                return self._put(kind, make, request, int(number))
        del kind[int(number)]
        return httpx2.Response(200, json={"message": f"{noun} deleted successfully"})

    def _submit(self, request: httpx2.Request) -> httpx2.Response:
        body, key = json.loads(request.content), request.headers["idempotency-key"]
        if body["policy_id"] not in self.policies:
            return _error(400, f"Policy {body['policy_id']} not found")
        if key not in self.keys:
            self.keys[key] = []
            for subnet_id in body["subnet_ids"]:
                job = FakeJob(len(self.jobs) + 41, subnet_id, body["policy_id"], list(self.states))
                self.made(job)
                self.jobs[job.id] = job
                self.keys[key].append(job.id)
        jobs = [self.jobs[number].job.model_dump(mode="json") for number in self.keys[key]]
        return httpx2.Response(201, json={"message": "Scan jobs created successfully", "jobs": jobs})

    def _job(self, request: httpx2.Request, number: str, what: str) -> httpx2.Response:
        job = self.jobs.get(int(number))
        if job is None:
            return _error(404, "Job not found")
        answers: dict[str, Callable[[], httpx2.Response]] = {
            "GET ": lambda: _model(job.task),
            "GET /ledger": lambda: _model(
                job.ledger(**{name: int(text) for name, text in request.url.params.items() if name != "page_size"})
            ),
            "GET /events": lambda: httpx2.Response(200, headers=_STREAM, stream=Events(self, job)),
            "GET /map": lambda: httpx2.Response(200, json=_map(job)) if job.letters else _error(404, "Not Found"),
            "GET /results": lambda: _results(request, job),
            "GET /nmap.xml": lambda: httpx2.Response(200, stream=Lines(["<nmaprun>", "</nmaprun>"])),
            "GET /hosts": lambda: httpx2.Response(200, stream=Lines([json.dumps(each) + "\n" for each in job.hosts])),
            "POST /cancel": lambda: _cancel(job),
            "DELETE ": lambda: self._delete(job),
        }
        answer = answers.get(f"{request.method} {what}")
        return answer() if answer else _error(404, "Not Found")

    def _delete(self, job: FakeJob) -> httpx2.Response:
        if not job.status.final:
            return _error(409, f"Job is {job.status}; cancel it first")
        del self.jobs[job.id]
        return httpx2.Response(200, json={"message": "Job deleted successfully"})

    def _import(self, request: httpx2.Request) -> httpx2.Response:
        """Create a subnet for each line unless it exists, or update one of its name; a dry run returns a verdict per line."""
        update = "update" in request.url.params
        verdicts: list[dict[str, Any]] = []
        wanted = []
        rows = csv.DictReader(io.StringIO(request.content.decode(), newline=""))
        for row in rows:
            number = rows.line_num
            exclude = [each.strip() for each in (row.get("exclude") or "").split(";") if each.strip()]
            body = {"name": row["name"], "cidr": row["cidr"], "exclude": exclude}
            there = [each["id"] for each in self.subnets.values() if body.items() <= each.items()]
            try:
                ip_network(row["cidr"])
            except ValueError as error:
                verdicts.append({"line": number, "action": "refused", "id": None, "error": str(error)})
                continue
            named = [each["id"] for each in self.subnets.values() if update and each["name"] == row["name"]]
            action = "exists" if there or body in wanted else "update" if named else "create"
            id_ = next(iter(there or named), None)
            verdicts.append({"line": number, "action": action, "id": id_, "error": None})
            wanted.append(body)
        if request.url.params.get("dry_run"):
            return httpx2.Response(200, json={"lines": verdicts})
        if refused := [each for each in verdicts if each["error"]]:
            return _error(400, f"line {refused[0]['line']}: {refused[0]['error']}")
        subnets, created = [], 0
        for body, verdict in zip(wanted, verdicts, strict=True):
            known = [each for each in self.subnets.values() if body.items() <= each.items()]
            if not known:
                number = verdict["id"] or len(self.subnets) + 5
                created += number not in self.subnets
                self.subnets[number] = _subnet(number, body)
            subnets.append(known[0] if known else self.subnets[number])
        answer = {"message": f"{created} subnets created", "created": created, "subnets": subnets}
        return httpx2.Response(201, json=answer)


def _map(job: FakeJob) -> dict[str, Any]:
    drawn = {
        "job_id": job.id,
        "seq": job.seq,
        "status": job.status,
        "first": "127.9.9.0",
        "addresses": len(job.letters),
    }
    return drawn | {"blocks": [{"ports": "22", "letters": job.letters}]}


def _cancel(job: FakeJob) -> httpx2.Response:
    if job.status.final:
        return _error(400, f"Job is already {job.status}")
    job.states = [(JobStatus.CANCELLED, 62)]
    return httpx2.Response(200, json={"message": "Job cancelled successfully"})


def _results(request: httpx2.Request, job: FakeJob) -> httpx2.Response:
    if request.headers["accept"] == "text/csv":
        lines = ["ip_address,port", *(f"{each['ip_address']},{each['port']}" for each in job.results)]
        return httpx2.Response(200, text="\r\n".join(lines) + "\r\n")
    after = int(request.url.params.get("after", 0))
    lines = [json.dumps(each) + "\n" for each in job.results if each["id"] > after]
    return httpx2.Response(200, stream=Lines([*lines, " "]))  # as after a search that found nothing more for some time


def _subnet(number: int, body: dict[str, Any]) -> dict[str, Any]:
    given = rest.SubnetBody.model_validate(body)
    made = rest.Subnet(
        id=number,
        user_id=7,
        name=given.name,
        cidr=given.cidr,
        exclude=[str(ip_network(each)) for each in given.exclude or []],
        created_at=NOW,
        updated_at=NOW,
    )
    return made.model_dump(mode="json")


def _policy(number: int, body: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in body.items() if name not in {"name", "preset"}}
    scan = fill_in(Preset(body.get("preset", "standard")), fields)
    made = rest.Policy(id=number, user_id=7, name=body["name"], created_at=NOW, updated_at=NOW, **scan.model_dump())
    return made.model_dump(mode="json")


def _model(model: Any) -> httpx2.Response:
    return httpx2.Response(200, content=model.model_dump_json().encode(), headers={"content-type": "application/json"})


def _error(status: int, message: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": message}, headers={"X-Request-ID": "c0ffee"})
