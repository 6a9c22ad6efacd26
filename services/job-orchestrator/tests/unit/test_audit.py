"""Every change has an audit entry before it is made, and every refusal one with the violated rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from pydantic import ValidationError

from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.job import JobTrigger, ScanJob, change
from job_orchestrator.handlers import audit
from job_orchestrator.handlers.audit import MAX_BYTES_AT_ONCE, Audit, record, stored_bytes
from job_orchestrator_testing import Simulation, scan_job
from job_orchestrator_testing.api import app_of, state_of
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import Audited, AuditEntry, CancelJob, OperatorActed
from scanfleet.contracts.messages.acls import acls_of
from scanfleet.contracts.messages.audit import MAX_TARGET_CHARS
from scanfleet.contracts.messages.envelope import encode
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_AUDIT_OPERATOR, SCAN_COMMANDS
from scanfleet.errors import DependencyError, MessageError
from scanfleet.runtime.bus import Record
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WORKER
from scanfleet_testing.audit import refusal
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.tokens import Issuer

ISSUER = Issuer()
SUBNET = {"name": "lab", "cidr": "127.9.8.0/24"}

pytestmark = pytest.mark.proves("G15")


@pytest.fixture
def app(simulation: Simulation) -> FastAPI:
    settings = ConnectionSettings(trusted_proxies=(ip_network("127.0.0.1"),))
    return app_of(state_of(simulation), ISSUER.verifier, settings)


class Caller:
    """Asks, and answers with the status and the entries that were made of it."""

    def __init__(self, app: FastAPI, simulation: Simulation) -> None:
        self._app = app
        self._simulation = simulation
        self._http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")

    async def __call__(
        self, request: str, body: object = None, *, user: int = 7, admin: bool = False
    ) -> tuple[int, Sequence[AuditEntry]]:
        method, path = request.split(" ")
        id_ = f"r-{method}-{path.replace('/', '.')}-{user}"[:64]
        headers = {"X-Request-ID": id_} | (ISSUER.bearer(user, admin=admin) if user else {})
        answer = await self._http.request(method, path, json=body, headers=headers)
        bus = MemoryBus()
        await self._app.state.refusals.flush(bus)
        refused = [each.entry for each in bus.messages(SCAN_AUDIT[ORCHESTRATOR]) if isinstance(each, Audited)]
        await self._simulation.store.audit.add(refused)
        entries, _ = await self._simulation.store.audit.page(0, 100, request_id=id_)
        assert {entry.service for entry in entries} <= {"job-orchestrator"}
        assert {entry.source for entry in entries} <= {"127.0.0.1"}
        return answer.status_code, entries


@pytest.fixture
def ask(app: FastAPI, simulation: Simulation) -> Caller:
    return Caller(app, simulation)


def fields_of(entries: Sequence[AuditEntry]) -> list[tuple[str, str, str, str, str]]:
    return [(each.subject, each.action, each.target, each.decision, each.rule) for each in entries]


async def test_change_of_a_resource_is_audited(ask: Caller) -> None:
    """Creating, replacing and deleting a subnet or a policy adds one entry each, with subject, action and target."""
    for kind, body in (("subnet", SUBNET), ("policy", {"name": "p"})):
        path = f"/api/v1/{kind}"
        for request, answer, action in (
            (f"POST {path}", 201, f"create_{kind}"),
            (f"PUT {path}/1", 200, f"replace_{kind}"),
            (f"DELETE {path}/1", 200, f"delete_{kind}"),
        ):
            status, entries = await ask(request, None if "DELETE" in request else body)
            assert (status, fields_of(entries)) == (answer, [("7", action, f"{path}/1", "allowed", "")])


@pytest.mark.parametrize("request_", ["POST /api/v1/subnet", "PUT /api/v1/subnet/1", "DELETE /api/v1/subnet/1"])
async def test_change_without_an_audit_entry_is_a_503_and_not_made(
    ask: Caller, simulation: Simulation, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """If the audit log cannot be written, a change is a 503 and does not happen."""
    await ask("POST /api/v1/subnet", SUBNET)
    before = await simulation.store.subnets.page(7, 0, 10)

    async def unavailable(_entries: object) -> None:
        raise DependencyError("no disk")

    with monkeypatch.context() as patch:
        patch.setattr(simulation.store.audit, "add", unavailable)
        answer = await ask._http.request(*request_.split(" "), json=SUBNET | {"name": "new"}, headers=ISSUER.bearer(7))
    assert answer.status_code == 503
    assert await simulation.store.subnets.page(7, 0, 10) == before


@pytest.mark.proves("A3", "A10")
async def test_refusal_is_audited_with_its_rule(ask: Caller, simulation: Simulation) -> None:
    """Resources of other users, refused targets, wrong roles, bad tokens and malformed requests each add an entry with the rule."""
    await ask("POST /api/v1/subnet", SUBNET)
    await ask("POST /api/v1/policy", {"name": "p"})
    await simulation.store.jobs.insert([scan_job(5)])
    metadata = {"name": "x", "cidr": "169.254.169.254/32"}
    for request, body, user, status, expected in (
        ("GET /api/v1/subnet/1", None, 8, 404, ("8", "read_subnet", "/api/v1/subnet/1", "refused", "owner")),
        ("PUT /api/v1/subnet/1", SUBNET, 8, 404, ("8", "replace_subnet", "/api/v1/subnet/1", "refused", "owner")),
        ("DELETE /api/v1/policy/1", None, 8, 404, ("8", "delete_policy", "/api/v1/policy/1", "refused", "owner")),
        ("GET /api/v1/task/5", None, 8, 404, ("8", "read_task", "/api/v1/task/5", "refused", "owner")),
        (
            "GET /internal/jobs/5/owner",
            None,
            8,
            403,
            ("8", "read_results", "/api/v1/task/5/results", "refused", "owner"),
        ),
        (
            "GET /internal/jobs/5/latest",
            None,
            8,
            404,
            ("8", "watch_task", "/api/v1/task/5/events", "refused", "owner"),
        ),
        ("POST /api/v1/subnet", metadata, 8, 400, ("8", "create_subnet", metadata["cidr"], "refused", "targets")),
        ("PUT /api/v1/subnet/1", metadata, 7, 400, ("7", "replace_subnet", metadata["cidr"], "refused", "targets")),
        ("POST /api/v1/policy", {"$set": 1}, 8, 400, ("8", "create_policy", "/api/v1/policy", "refused", "request")),
        ("GET /api/v1/audit", None, 8, 403, ("8", "list_audit", "/api/v1/audit", "refused", "role")),
        ("GET /api/v1/audit", None, 0, 401, ("", "list_audit", "/api/v1/audit", "refused", "token")),
    ):
        answered, entries = await ask(request, body, user=user)
        assert (answered, fields_of(entries)[:1]) == (status, [expected]), request


async def test_request_for_a_missing_object_is_not_audited(ask: Caller) -> None:
    """A request for an object that does not exist is a 404 without an entry."""
    for path in ("subnet/9", "policy/9", "task/9", "subnet/x"):
        assert await ask(f"GET /api/v1/{path}") == (404, [])
        assert await ask(f"DELETE /api/v1/{path}") in ((404, []), (405, []))


READS = {
    "GET /internal/jobs/5/owner": ("read_results", "/api/v1/task/5/results of user 7"),
    "GET /internal/jobs/5/owner/hosts": ("read_hosts", "/api/v1/task/5/hosts of user 7"),
    "GET /internal/jobs/5/latest": ("watch_task", "/api/v1/task/5/events of user 7"),
    "GET /api/v1/task/5": ("read_task", "/api/v1/task/5 of user 7"),
    "GET /api/v1/task/5/ledger": ("read_ledger", "/api/v1/task/5/ledger of user 7"),
    "GET /api/v1/task/5/waiting": ("read_waiting", "/api/v1/task/5/waiting of user 7"),
    "GET /api/v1/task?user_id=7": ("list_tasks", "/api/v1/task?user_id=7"),
    "GET /api/v1/task?user_id=all": ("list_tasks", "/api/v1/task?user_id=all"),
}


@pytest.mark.proves("A24", "G13")
@pytest.mark.parametrize("request_", READS)
async def test_read_by_an_administrator_of_another_users_data_is_audited(
    ask: Caller, simulation: Simulation, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """Reads of another user's job are one entry a minute with job and owner; reads of one's own job have none."""
    await simulation.store.jobs.insert([scan_job(5)])
    action, target = READS[request_]
    times = [THEN, THEN + timedelta(seconds=59), THEN + timedelta(days=1)]
    for now, entries in zip(times, (1, 1, 2), strict=True):
        monkeypatch.setattr("scanfleet.runtime.http.audit.utc_now", lambda now=now: now)
        expected = [("9", action, target, "allowed", "role")] * entries
        assert (await ask(request_, user=9, admin=True))[0] == 200
        recorded, _ = await simulation.store.audit.page(0, 10)
        assert fields_of(recorded) == expected
    if "all" not in request_:
        assert await ask(request_, user=7) == (200, [])


@pytest.mark.proves("A24", "G13")
async def test_stream_of_an_administrator_is_audited_once(
    ask: Caller, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that asks for the job's state for an hour is one entry; another stream has its own."""
    await simulation.store.jobs.insert([scan_job(5)])
    for minute in range(60):
        monkeypatch.setattr(
            "scanfleet.runtime.http.audit.utc_now", lambda minute=minute: THEN + timedelta(minutes=minute)
        )
        await ask("GET /internal/jobs/5/latest", user=9, admin=True)
    _, total = await simulation.store.audit.page(0, 10)
    assert total == 1
    headers = {"X-Request-ID": "another"} | ISSUER.bearer(9, admin=True)
    await ask._http.get("/internal/jobs/5/latest", headers=headers)
    _, total = await simulation.store.audit.page(0, 10)
    assert total == 2


async def test_cancel_by_filter_is_audited_for_each_job(ask: Caller, simulation: Simulation) -> None:
    """Each job that a filter matches is audited before it is cancelled; a request that matches none adds no entry."""
    await simulation.store.jobs.insert([scan_job(5), scan_job(6)])
    status, entries = await ask("POST /internal/jobs/cancel", {"all": True})
    assert status == 200
    assert sorted(fields_of(entries)) == [("7", "cancel_tasks", f"/api/v1/task/{id_}", "allowed", "") for id_ in (5, 6)]
    assert await ask("POST /internal/jobs/cancel", {"all": True}, user=8) == (200, [])


@pytest.mark.proves("A24", "G13")
async def test_cancel_is_audited_with_the_owner(ask: Caller, simulation: Simulation) -> None:
    """A cancel is audited before it is done, an administrator's of another user's job with the rule `role`."""
    await simulation.store.jobs.insert([scan_job(5), scan_job(6, user_id=9), scan_job(8)])
    for id_, user in ((5, 9), (6, 9), (8, 7)):
        assert (await ask(f"POST /api/v1/task/{id_}/cancel", user=user, admin=user == 9))[0] == 200
    recorded, _ = await simulation.store.audit.page(0, 10)
    assert sorted(fields_of(recorded)) == [
        ("7", "cancel_task", "/api/v1/task/8", "allowed", ""),
        ("9", "cancel_task", "/api/v1/task/5 of user 7", "allowed", "role"),
        ("9", "cancel_task", "/api/v1/task/6", "allowed", ""),
    ]


@pytest.mark.proves("A13")
async def test_refused_cancel_is_audited_once(
    ask: Caller, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel of an ended job, another user's or an unknown one adds one entry, and so does one that ends meanwhile."""
    jobs = simulation.store.jobs
    await jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN), scan_job(2, user_id=8), scan_job(3)])

    async def refused(id_: int, status: int) -> Any:
        answer, entries = await ask(f"POST /api/v1/task/{id_}/cancel")
        assert answer == status
        return fields_of(entries)

    for id_, status, rule in ((1, 400, "state"), (2, 404, "owner"), (99, 404, "request")):
        assert await refused(id_, status) == [("7", "cancel_task", f"/api/v1/task/{id_}", "refused", rule)]
    save = jobs.save

    async def end_before(saved: Sequence[ScanJob]) -> set[int]:
        monkeypatch.setattr(jobs, "save", save)
        started = change((await jobs.get([3]))[3], JobTrigger.START, THEN)
        await save([change(started, JobTrigger.FAIL, THEN, error="lost")])
        return await save(saved)

    monkeypatch.setattr(jobs, "save", end_before)
    assert await refused(3, 400) == [("7", "cancel_task", "/api/v1/task/3", "allowed", "")]


@pytest.mark.proves("A24", "G13")
async def test_cancel_command_by_an_administrator_is_audited_with_the_owner(simulation: Simulation) -> None:
    """An administrator's cancel of another user's job is audited with the rule `role`, of their own job without it."""
    await simulation.store.jobs.insert([scan_job(5), scan_job(6, user_id=9)])
    for job_id in (5, 6):
        await simulation.cancel(job_id, user_id=9, admin=True)
    assert sorted(await commanded(simulation, user=9)) == [
        ("9", "cancel_task", "/api/v1/task/5 of user 7", "allowed", "role"),
        ("9", "cancel_task", "/api/v1/task/6", "allowed", ""),
    ]


async def test_audit_log_is_paged_newest_first(ask: Caller, app: FastAPI) -> None:
    """The log is answered in the documented shape, newest first, by page, by subject and by request."""
    for number in range(3):
        await ask("POST /api/v1/subnet", SUBNET, user=number + 1)
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")
    bearer = ISSUER.bearer(9, admin=True)
    answer = (await http.get("/api/v1/audit?page=2&page_size=3", headers=bearer)).json()
    assert {name: answer[name] for name in ("total", "page", "page_size")} == {"total": 4, "page": 2, "page_size": 3}
    (entry,) = answer["entries"]  # before the other two, and this read
    assert entry["time"].endswith("Z")
    assert list(entry) == [*AuditEntry.model_fields, "received_at", "genuine"]
    mine = (await http.get("/api/v1/audit?subject=2", headers=bearer)).json()
    assert [each["subject"] for each in mine["entries"]] == ["2"]
    one = (await http.get("/api/v1/audit?request_id=r-POST-.api.v1.subnet-3", headers=bearer)).json()
    assert [each["subject"] for each in one["entries"]] == ["3"]
    assert (await http.get("/api/v1/audit?decision=refused", headers=bearer)).json()["total"] == 0
    assert (await http.get("/api/v1/audit?service=scanner-worker", headers=bearer)).json()["total"] == 0
    assert (await http.get("/api/v1/audit?service=job-orchestrator", headers=bearer)).json()["total"] > 0
    assert (await http.get("/api/v1/audit?decision=x", headers=bearer)).status_code == 400


@pytest.mark.proves("A24")
async def test_read_of_the_audit_log_is_audited(
    ask: Caller, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of the log is in the log with its filters, once a minute for each of them."""
    monkeypatch.setattr("scanfleet.runtime.http.audit.utc_now", lambda: THEN)
    for query in ("", "?page=2", "?subject=7&page=1", "?page_size=3&subject=7", "?request_id=r-1&subject=7"):
        assert (await ask(f"GET /api/v1/audit{query}", user=9, admin=True))[0] == 200
    recorded, _ = await simulation.store.audit.page(0, 10)
    assert sorted(fields_of(recorded)) == [
        ("9", "list_audit", f"/api/v1/audit{query}", "allowed", "role")
        for query in ("", "?request_id=r-1&subject=7", "?subject=7")
    ]


async def commanded(simulation: Simulation, *, user: int = 7) -> list[tuple[str, str, str, str, str]]:
    records = simulation.take(SCAN_COMMANDS)
    for _ in range(2):  # a redelivery changes nothing
        await simulation.hand(SCAN_COMMANDS, records)
    entries, _ = await simulation.store.audit.page(0, 100, subject=str(user))
    return fields_of(entries)


async def test_command_is_audited_once(simulation: Simulation) -> None:
    """A command that was carried out adds one entry, however often it is delivered."""
    await simulation.submit("127.9.8.0/30", "127.9.9.0/30")
    assert await commanded(simulation) == [("7", "create_tasks", "/api/v1/task/1,2", "allowed", "")]
    await simulation.cancel(1)
    assert ("7", "cancel_task", "/api/v1/task/1", "allowed", "") in await commanded(simulation)


async def test_id_of_a_command_suppresses_no_entry_of_the_orchestrator(simulation: Simulation) -> None:
    """A cancel under the id that the entry of a deletion by age will have does not take its place."""
    await simulation.bus.publish(SCAN_COMMANDS, [CancelJob(command_id="retention-1", user_id=7, job_id=1)])
    await simulation.settle()
    await record(
        simulation.store.audit, [own_entry("retention-1", "delete_task", "/api/v1/task/1", "allowed", "retention")]
    )
    entries, _ = await simulation.store.audit.page(0, 10)
    assert {entry.action for entry in entries} == {"cancel_task", "delete_task"}


@pytest.mark.proves("A10", "A13")
async def test_refused_command_is_audited_with_its_rule(simulation: Simulation) -> None:
    """A policy, subnet or job of another user, a refused target and a job that has ended are refusals with their rule."""
    policy_id, subnet_ids = await simulation.add("127.9.8.0/30")
    await simulation.store.jobs.insert([scan_job(50), change(scan_job(51, user_id=11), JobTrigger.CANCEL, THEN)])

    async def rules(user: int) -> Any:
        return [(action, decision, rule) for _, action, _, decision, rule in await commanded(simulation, user=user)]

    await simulation.send(policy_id, subnet_ids, user_id=8)
    assert await rules(8) == [("create_tasks", "refused", "owner")]
    await simulation.cancel(50, user_id=9)
    assert await rules(9) == [("cancel_task", "refused", "owner")]
    await simulation.submit("10.0.0.0/30", user_id=10)
    assert await rules(10) == [("create_tasks", "refused", "targets")]
    await simulation.cancel(51, user_id=11)
    assert await rules(11) == [("cancel_task", "refused", "state")]


async def test_redelivered_refusal_is_stored_once(simulation: Simulation) -> None:
    """Entries of an audit topic are stored once, however often they are delivered."""
    await simulation.bus.publish(SCAN_AUDIT[GATEWAY], [Audited(entry=refusal())] * 2)
    await simulation.hand(SCAN_AUDIT[GATEWAY], simulation.take(SCAN_AUDIT[GATEWAY]))
    entries, total = await simulation.store.audit.page(0, 10)
    assert total == 1
    assert entries[0].model_dump(exclude={"id", "received_at", "genuine"}) == refusal().model_dump(exclude={"id"})


@pytest.mark.proves("G15")
async def test_operator_command_is_an_entry_of_the_operators(simulation: Simulation) -> None:
    """Operators' actions on the bus are stored as entries of the operator, whatever service they name."""
    acted = OperatorActed(entry=refusal(action="replay_dead_letter", decision="allowed", rule="operator"))
    await simulation.bus.publish(SCAN_AUDIT_OPERATOR, [acted])
    await simulation.hand(SCAN_AUDIT_OPERATOR, simulation.take(SCAN_AUDIT_OPERATOR))
    entries, _ = await simulation.store.audit.page(0, 10)
    assert [(each.service, each.action, each.decision) for each in entries] == [
        ("operator", "replay_dead_letter", "allowed")
    ]


@pytest.mark.proves("G15")
async def test_restore_command_of_result_store_is_an_entry_of_result_store(simulation: Simulation) -> None:
    """result-store publishes its restore command over its own topic."""
    topic = SCAN_AUDIT[RESULT_STORE]
    acted = OperatorActed(entry=refusal(action="restore_database", decision="allowed", rule="operator"))
    await simulation.bus.publish(topic, [acted])
    await simulation.hand(topic, simulation.take(topic))
    entries, _ = await simulation.store.audit.page(0, 10)
    assert [(each.service, each.action, each.decision) for each in entries] == [
        ("result-store", "restore_database", "allowed")
    ]


@pytest.mark.proves("A26")
async def test_other_command_on_result_stores_topic_is_refused(simulation: Simulation) -> None:
    """result-store cannot add entries of commands that only an administrator of the bus can run."""
    topic = SCAN_AUDIT[RESULT_STORE]
    await simulation.bus.publish(topic, [OperatorActed(entry=refusal(action="create_acls", decision="allowed"))])
    with pytest.raises(MessageError, match="OperatorActed"):
        await simulation.hand(topic, simulation.take(topic))
    assert await simulation.store.audit.page(0, 10) == ([], 0)


@pytest.mark.proves("A26")
@pytest.mark.parametrize("service", [GATEWAY, ORCHESTRATOR, WORKER])
def test_command_on_the_topic_of_another_service_is_not_encoded(service: str) -> None:
    """Over the topics of the other services only refusals are recorded."""
    acted = OperatorActed(entry=refusal(action="restore_database", decision="allowed"))
    with pytest.raises(MessageError, match="OperatorActed is not a message"):
        encode(SCAN_AUDIT[service], acted, source=service)


@pytest.mark.proves("A26")
def test_operators_topic_is_not_writable_by_services() -> None:
    """The broker allows no service to write to the operators' topic."""
    written = {acl.name for service in SERVICES for acl in acls_of(service) if acl.operation == "Write"}
    assert SCAN_AUDIT_OPERATOR.name not in written
    assert SCAN_AUDIT[GATEWAY].name in written


@pytest.mark.proves("A26")
async def test_refusal_in_the_name_of_another_service_is_its_writers(simulation: Simulation) -> None:
    """An entry is attributed by its topic; an id of another service's entry suppresses nothing."""
    await simulation.submit("127.9.8.0/30")
    (command,) = simulation.take(SCAN_COMMANDS)
    command_id = getattr(command.message, "command_id")  # noqa: B009 # of one of two messages
    forged = refusal(id=command_id, service="job-orchestrator", subject="7")
    await simulation.bus.publish(SCAN_AUDIT[WORKER], [Audited(entry=forged)])
    await simulation.hand(SCAN_AUDIT[WORKER], simulation.take(SCAN_AUDIT[WORKER]))
    await simulation.hand(SCAN_COMMANDS, [command])
    entries, _ = await simulation.store.audit.page(0, 10, subject="7")
    assert {(each.service, each.decision) for each in entries} == {
        ("scanner-worker", "refused"),
        ("job-orchestrator", "allowed"),
    }


@pytest.mark.proves("A25", "A26", "G20")
async def test_flood_of_refusals_is_bounded_and_counted(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 570 refusals of a service in a minute 500 are stored and the rest is one entry; each minute allows 50 more."""
    size = stored_bytes(refusal(id="x100", service=WORKER))
    monkeypatch.setattr(audit, "MAX_BYTES_AT_ONCE", 500 * size)
    monkeypatch.setattr(audit, "MAX_BYTES_PER_MINUTE", 50 * size)
    handler = Audit(simulation.store.audit, WORKER)

    def excess() -> float:
        return REGISTRY.get_sample_value("scanfleet_audit_excess_total", {"service": WORKER}) or 0.0

    def sent(numbers: range, minute: int) -> list[Record[Audited]]:
        at = THEN + timedelta(minutes=minute)
        return [Record(Audited(entry=refusal(id=f"x{n}")), SCAN_AUDIT[WORKER].name, 0, n, at) for n in numbers]

    async def counted() -> list[int]:
        entries, _ = await simulation.store.audit.page(0, 10, rule="flood", service=ORCHESTRATOR)
        return [each.count for each in entries]

    before = excess()
    for first in range(100, 670, 10):
        await handler.handle(sent(range(first, first + 10), 0))
    assert (await simulation.store.audit.page(0, 1))[1] == 500
    assert excess() - before == 70
    await handler.handle(sent(range(670, 680), 1))
    assert (await simulation.store.audit.page(0, 1, service=WORKER))[1] == 510
    assert await counted() == [70]
    await handler.handle(sent(range(680, 730), 1))
    for _ in range(2):
        await handler.caught_up([0])
    assert sorted(await counted()) == [10, 70]
    assert (await simulation.store.audit.page(0, 1, service=WORKER))[1] == 550
    await handler.handle(sent(range(730, 831), 3))
    assert (await simulation.store.audit.page(0, 1, service=WORKER))[1] == 650


@pytest.mark.proves("A26", "G15")
async def test_flood_without_tokens_displaces_no_refusal_of_a_user(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals without a subject have a limit of their own."""
    size = stored_bytes(refusal(id="x100", subject=""))
    monkeypatch.setattr(audit, "MAX_BYTES_AT_ONCE", 50 * size)
    handler = Audit(simulation.store.audit, WORKER)

    def record_of(number: int, subject: str) -> Record[Audited]:
        return Record(
            Audited(entry=refusal(id=f"x{number}", subject=subject)), SCAN_AUDIT[WORKER].name, 0, number, THEN
        )

    await handler.handle([record_of(number, "") for number in range(100, 200)])
    await handler.handle([record_of(200, "7")])
    await handler.caught_up([0])
    stored, _ = await simulation.store.audit.page(0, 200, service=WORKER)
    assert Counter(entry.subject for entry in stored) == {"": 50, "7": 1}
    (flood,), _ = await simulation.store.audit.page(0, 10, rule="flood")
    assert flood.count == 50


@pytest.mark.proves("A25", "A26", "G20")
async def test_flood_of_the_largest_refusals_is_bounded_in_bytes(simulation: Simulation) -> None:
    """However long its refusals are, a service stores 30 MB at once, and 720 MB a day."""
    handler = Audit(simulation.store.audit, WORKER)
    texts = dict.fromkeys(("subject", "source", "action", "rule", "request_id"), "\U0001d11e" * 200)
    largest = refusal(**texts, target="\U0001d11e" * MAX_TARGET_CHARS, reason="\U0001d11e" * 300)
    most = MAX_BYTES_AT_ONCE // len(largest.model_dump_json().encode()) + 1

    async def flood(numbers: range, minute: int) -> int:
        at = THEN + timedelta(minutes=minute)
        entries = (largest.model_copy(update={"id": f"x{n}"}) for n in numbers)
        await handler.handle([Record(Audited(entry=each), SCAN_AUDIT[WORKER].name, 0, 0, at) for each in entries])
        return (await simulation.store.audit.page(0, 1, service=WORKER))[1]

    at_once = await flood(range(most + 1_000), 0)
    assert most * 0.9 < at_once <= most
    later = await flood(range(most + 1_000, most + 2_000), 10)
    assert later - at_once <= 10 * 500_000 // len(largest.model_dump_json().encode()) + 1


@pytest.mark.proves("A26")
@pytest.mark.parametrize(
    "hostile",
    [
        {"decision": "allowed"},
        {"target": "x" * 301},
        *({name: "x" * 201} for name in ("id", "service", "subject", "source", "action", "rule", "request_id")),
        {"reason": "x" * 301},
        {"count": 2**63},
    ],
    ids=lambda hostile: str(next(iter(hostile))),
)
def test_audited_that_is_no_bounded_refusal_is_not_decoded(hostile: dict[str, Any]) -> None:
    """Only refusals come over the bus, and every text in them has a maximum."""
    good = json.loads(Audited(entry=refusal()).model_dump_json())
    assert Audited.model_validate(good).entry == refusal()
    good["entry"] |= hostile
    with pytest.raises(ValidationError, match="entry"):
        Audited.model_validate(good)
