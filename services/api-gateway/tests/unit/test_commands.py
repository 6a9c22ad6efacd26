"""Commands create and cancel scan jobs; the response reports their true outcome, also after failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import REGISTRY

from api_gateway_testing.gateway import Gateway, Running
from api_gateway_testing.replies import accept, job, silence
from scanfleet.contracts.messages import CommandAccepted, CommandRejected, CommandReply, SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_REPLIES
from scanfleet.security.auth import Principal
from scanfleet_testing.waiting import until

BODY = {"subnet_ids": [5, 6], "policy_id": 3}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run() as running:
        yield running


@pytest.fixture
async def hasty() -> AsyncIterator[Running]:
    """A gateway with a very short timeout for replies, and an orchestrator that sends none."""
    async with Gateway().run(reply_seconds=0.02) as running:
        running.replier.reply = silence
        yield running


async def test_create_tasks_publishes_one_command(gateway: Running) -> None:
    """A POST publishes one SubmitJobs of the token's user, and its reply is the response."""
    headers = {"Idempotency-Key": "key-1"}
    answer = await gateway.client.post("/api/v1/task", json=BODY, headers=headers)
    assert answer.status_code == 201
    assert answer.json()["message"] == "Scan jobs created successfully"
    assert [(each["id"], each["subnet_id"]) for each in answer.json()["jobs"]] == [(1, 5), (2, 6)]
    assert set(answer.json()["jobs"][0]) == {
        *("id", "user_id", "policy_id", "subnet_id", "status"),
        *("start_time", "end_time", "created_at", "updated_at"),
    }
    (command,) = gateway.replier.commands
    assert isinstance(command, SubmitJobs)
    assert (command.user_id, command.policy_id, command.subnet_ids) == (7, 3, (5, 6))
    assert command.idempotency_key == "key-1"


async def test_create_tasks_passes_on_the_roles_that_grants_name(tmp_path: Path) -> None:
    """The command has the roles of the token that a grant names, from no other source; a refusal is a 403."""
    file = tmp_path / "grants.toml"
    file.write_text('[[grants]]\nname = "ops"\nroles = ["ops", "night"]')

    async def refuse(command: SubmitJobs) -> Sequence[CommandReply]:
        return [CommandRejected(command_id=command.command_id, status=403, error="no grant", rule="grant")]

    async with Gateway().run(grants_file=file) as gateway:
        gateway.replier.reply = refuse
        token = gateway.issuer.token(7, roles=["staff", "ops", "x" * 1_000])
        headers = {"Authorization": f"Bearer {token}", "Roles": "night"}
        answer = await gateway.client.post("/api/v1/task", json=BODY, headers=headers)
        assert (answer.status_code, answer.json()) == (403, {"error": "no grant"})
        (command,) = gateway.replier.commands
    assert isinstance(command, SubmitJobs)
    assert command.roles == ("ops",)


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1/32",)])
async def test_command_continues_only_the_trace_of_a_trusted_proxy(trusted: tuple[str, ...]) -> None:
    """The command has the traceparent of a trusted proxy; one of another client is replaced."""
    async with Gateway().run(trusted_proxies=trusted) as gateway:
        await gateway.client.post("/api/v1/task", json=BODY, headers={"traceparent": TRACEPARENT})
        (command,) = gateway.replier.commands
    assert (command.traceparent == TRACEPARENT) is bool(trusted)


async def test_times_in_a_response_end_in_z(gateway: Running) -> None:
    """Times in a response end in Z, and unset ones are null."""
    (first, _) = (await gateway.client.post("/api/v1/task", json=BODY)).json()["jobs"]
    assert first["created_at"].endswith("Z")
    assert first["start_time"] is None


async def test_create_tasks_with_the_same_key_has_another_command_id(gateway: Running) -> None:
    """Two requests with the same Idempotency-Key are two commands."""
    headers = {"Idempotency-Key": "same"}
    for _ in range(2):
        await gateway.client.post("/api/v1/task", json=BODY, headers=headers)
    first, second = gateway.replier.commands
    assert first.command_id != second.command_id


async def test_replies_to_other_gateways_are_not_decoded(gateway: Running) -> None:
    """Of all replies only those to waiting requests of this gateway are handled."""

    def handled() -> float:
        samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
        name, topic = "scanfleet_bus_consumed_total", SCAN_REPLIES.name
        return sum(each.value for each in samples if each.name == name and each.labels["topic"] == topic)

    async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
        mine = CommandAccepted(command_id=command.command_id, jobs=(job(1),))
        return [*(CommandAccepted(command_id=f"foreign-{number}", jobs=()) for number in range(20)), mine]

    gateway.replier.reply = reply
    before = handled()
    assert (await gateway.client.post("/api/v1/task", json=BODY)).status_code == 201
    await until(lambda: handled() > before)
    assert handled() == before + 1


async def test_replies_are_matched_to_their_requests(gateway: Running) -> None:
    """Concurrent requests each get the reply with their command id, also among duplicates and replies to others."""
    everyone_waits = asyncio.Barrier(3)

    async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
        assert isinstance(command, SubmitJobs)
        mine = CommandAccepted(command_id=command.command_id, jobs=(job(command.subnet_ids[0] * 100),))
        foreign = CommandAccepted(command_id="of-another-gateway", jobs=())
        return [foreign, mine, mine]

    async def post(subnet: int) -> object:
        await everyone_waits.wait()
        body = {"subnet_ids": [subnet], "policy_id": 3}
        answer = await gateway.client.post("/api/v1/task", json=body)
        return answer.json()["jobs"][0]["id"]

    gateway.replier.reply = reply
    assert await asyncio.gather(*(post(subnet) for subnet in (1, 2, 3))) == [100, 200, 300]
    gateway.replier.reply = accept
    assert (await gateway.client.post("/api/v1/task", json=BODY)).status_code == 201
    assert not gateway.broker.records("scan-replies-dlq")


@pytest.mark.parametrize("status", [400, 404, 409])
async def test_rejected_command_returns_its_status_and_error(gateway: Running, status: int) -> None:
    """A rejected command is answered with the orchestrator's status and error."""

    async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
        return [CommandRejected(command_id=command.command_id, status=status, error="subnet 5 does not exist")]

    gateway.replier.reply = reply
    answer = await gateway.client.post("/api/v1/task", json=BODY)
    assert (answer.status_code, answer.json()) == (status, {"error": "subnet 5 does not exist"})


@pytest.mark.parametrize("status", [429, 503])
async def test_rejected_command_that_may_be_retried_has_retry_after(gateway: Running, status: int) -> None:
    """A 503, and a 429 for too many unfinished jobs, have Retry-After."""

    async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
        return [CommandRejected(command_id=command.command_id, status=status, error="too old")]

    gateway.replier.reply = reply
    answer = await gateway.client.post("/api/v1/task", json=BODY)
    assert (answer.status_code, answer.json()) == (status, {"error": "too old"})
    assert int(answer.headers["Retry-After"]) >= 1


async def test_command_without_a_reply_is_expired(hasty: Running) -> None:
    """After the timeout the gateway expires the command in the caller's name, and the response is a 503 with Retry-After."""
    hasty.services.verdict = httpx2.Response(200, json={"state": "expired"})
    answer = await hasty.client.post("/api/v1/task", json=BODY)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "will not be" in answer.json()["error"]
    (asked,) = hasty.services.asked("orchestrator")
    (command,) = hasty.broker.records("scan-commands")
    assert command.key is not None
    assert (asked.method, asked.url.path) == ("POST", f"/internal/commands/{command.key.decode()}/expire")
    assert await hasty.caller(asked) == Principal(7)
    assert asked.headers["x-request-id"] == answer.headers["x-request-id"]


async def test_command_accepted_before_its_expiry_returns_its_jobs(hasty: Running) -> None:
    """A command that cannot expire because its jobs exist is answered 201 with them."""
    jobs = [job(41).model_dump(mode="json")]
    hasty.services.verdict = httpx2.Response(200, json={"state": "accepted", "jobs": jobs})
    answer = await hasty.client.post("/api/v1/task", json=BODY)
    assert (answer.status_code, answer.json()["jobs"]) == (201, jobs)


async def test_command_rejected_before_its_expiry_returns_the_rejection(hasty: Running) -> None:
    """A command that cannot expire because it was rejected is answered with the rejection."""
    hasty.services.verdict = httpx2.Response(200, json={"state": "rejected", "status": 400, "error": "no such policy"})
    answer = await hasty.client.post("/api/v1/task", json=BODY)
    assert (answer.status_code, answer.json()) == (400, {"error": "no such policy"})


@pytest.mark.parametrize(
    "answer",
    [
        None,
        httpx2.Response(500, json={"error": "Internal Server Error"}),
        httpx2.Response(401, json={"error": "the token has expired"}),
        httpx2.Response(200, text="not JSON"),
        httpx2.Response(200, json={"state": "odd"}),
        httpx2.Response(200, json={"state": "accepted"}),
    ],
)
async def test_command_with_an_unknown_outcome_is_503(hasty: Running, answer: httpx2.Response | None) -> None:
    """If the orchestrator cannot determine the outcome of a command, the 503 gives that reason and names the Idempotency-Key."""
    if answer is None:
        hasty.services.unavailable.add("orchestrator")
    else:
        hasty.services.verdict = answer
    response = await hasty.client.post("/api/v1/task", json=BODY)
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert "unknown" in response.json()["error"]
    assert "Idempotency-Key" in response.json()["error"]


async def test_command_that_was_not_published_is_expired(gateway: Running) -> None:
    """A command whose publication failed may still be delivered, so it is expired as well."""
    gateway.services.verdict = httpx2.Response(200, json={"state": "expired"})
    gateway.broker.unavailable = True
    answer = await gateway.client.post("/api/v1/task", json=BODY)
    gateway.broker.unavailable = False
    assert answer.status_code == 503
    assert "will not be" in answer.json()["error"]


keyed = pytest.mark.parametrize("path", ["/api/v1/task", "/api/v1/subnet", "/api/v1/policy"])

BAD_BODIES: dict[str, Any] = {
    "no JSON": b"{",
    "nothing": b"",
    "not UTF-8": b'{"subnet_ids": [1], "policy_id": "\xff"}',
    "a list": [BODY],
    "a string": "text",
    "null": None,
    "deep": b"[" * 30_000,
    "a number of 5000 digits": b'{"subnet_ids": [1], "policy_id": ' + b"9" * 5000 + b"}",
    "not a number": b'{"subnet_ids": [NaN], "policy_id": 1}',
    "no policy": {"subnet_ids": [1]},
    "no subnets": {"policy_id": 1},
    "empty subnets": {"subnet_ids": [], "policy_id": 1},
    "too many subnets": {"subnet_ids": list(range(1, 1002)), "policy_id": 1},
    "subnets in a string": {"subnet_ids": "1,2", "policy_id": 1},
    "one subnet": {"subnet_ids": 1, "policy_id": 1},
    "a subnet in a string": {"subnet_ids": ["1"], "policy_id": 1},
    "a subnet of true": {"subnet_ids": [True], "policy_id": 1},
    "a fractional subnet": {"subnet_ids": [1.0], "policy_id": 1},
    "subnet zero": {"subnet_ids": [0], "policy_id": 1},
    "a negative subnet": {"subnet_ids": [-1], "policy_id": 1},
    "a subnet beyond JavaScript": {"subnet_ids": [2**53], "policy_id": 1},
    "a policy in a string": {"subnet_ids": [1], "policy_id": "1"},
    "a policy of null": {"subnet_ids": [1], "policy_id": None},
    "an operator": {"subnet_ids": [1], "policy_id": {"$ne": ""}},
    **{
        f"the field {name}": BODY | {name: 1}
        for name in ("user_id", "status", "attempt", "_id", "$set", "id", "__class__", "\ud800")
    },
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=map(ascii, BAD_BODIES))
async def test_invalid_body_is_refused(gateway: Running, body: object) -> None:
    """An invalid body is a 400 with an error, and no command is published."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await gateway.client.post("/api/v1/task", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert not gateway.broker.records("scan-commands")


@pytest.mark.parametrize("path", ["/api/v1/task", "/api/v1/task/cancel", "/api/v1/subnet"])
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_body_of_another_content_type_is_refused(gateway: Running, path: str, content_type: str | None) -> None:
    """A body with another content type, or without one, is a 400 that names the right one, and is not forwarded."""
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await gateway.client.post(path, content=b'{"all": true}', headers=headers)
    assert answer.status_code == 400
    assert '"Content-Type: application/json"' in answer.json()["error"]
    assert not gateway.services.requests


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
async def test_body_of_any_json_content_type_is_accepted(gateway: Running, content_type: str) -> None:
    """Every content type of JSON is accepted."""
    headers = {"Content-Type": content_type}
    answer = await gateway.client.post("/api/v1/task", content=json.dumps(BODY).encode(), headers=headers)
    assert answer.status_code == 201


async def test_compressed_body_is_refused(gateway: Running) -> None:
    """A compressed body is a 400 that names the header."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await gateway.client.post("/api/v1/task", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 400
    assert '"Content-Encoding"' in answer.json()["error"]


@keyed
@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "a\tb", "\u00e9".encode(), b"\x7f"], ids=ascii)
async def test_invalid_idempotency_key_is_refused(gateway: Running, key: str | bytes, path: str) -> None:
    """A key that is empty, too long or not visible ASCII is a 400, and nothing is published or forwarded."""
    raw = key.encode() if isinstance(key, str) else key
    answer = await gateway.client.post(path, json=BODY, headers=[(b"Idempotency-Key", raw)])
    assert answer.status_code == 400
    assert not gateway.broker.records("scan-commands") + gateway.services.requests


async def test_idempotency_key_of_a_wrong_form_is_refused_in_words(gateway: Running) -> None:
    """The error describes what the key must be, not the pattern that it does not match."""
    answer = await gateway.client.post("/api/v1/task", json=BODY, headers={"Idempotency-Key": "a b"})
    assert answer.json()["error"] == "header.Idempotency-Key: must be visible ASCII without spaces"


@keyed
async def test_repeated_idempotency_key_is_refused(gateway: Running, path: str) -> None:
    """Of two keys neither is chosen: the request is a 400, and nothing is published or forwarded."""
    headers = [("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    answer = await gateway.client.post(path, json=BODY, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, 'the header "Idempotency-Key" must be sent once')
    assert not gateway.broker.records("scan-commands") + gateway.services.requests


async def test_idempotency_key_of_the_maximum_length_is_accepted(gateway: Running) -> None:
    """A key of 255 visible characters reaches the command unchanged."""
    key = ("".join(map(chr, range(0x21, 0x7F))) * 3)[:255]
    answer = await gateway.client.post("/api/v1/task", json=BODY, headers={"Idempotency-Key": key})
    assert answer.status_code == 201
    (command,) = gateway.replier.commands
    assert isinstance(command, SubmitJobs)
    assert command.idempotency_key == key


CANCEL_ONE = "http://orchestrator/api/v1/task/41/cancel"


@pytest.mark.proves("G8")
async def test_cancel_task_is_a_request_of_its_caller(gateway: Running) -> None:
    """A cancel is forwarded, and waits for no command on the bus."""
    gateway.services.on("POST", CANCEL_ONE, httpx2.Response(200, json={"message": "Job cancelled successfully"}))
    answer = await gateway.client.post("/api/v1/task/41/cancel")
    assert (answer.status_code, answer.json()) == (200, {"message": "Job cancelled successfully"})
    (asked,) = gateway.services.requests
    assert await gateway.caller(asked) == Principal(7)
    assert not gateway.broker.records("scan-commands")


@pytest.mark.proves("A24", "G13")
async def test_cancel_task_of_an_administrator_is_determined_by_the_token(gateway: Running) -> None:
    """The caller is an administrator by a token with that role; no body or header sets it, and a query is rejected."""
    gateway.services.on("POST", CANCEL_ONE, httpx2.Response(200, json={"message": "Job cancelled successfully"}))
    for headers in (gateway.issuer.bearer(9, admin=True), {"X-Admin": "true", "Roles": "admin"}):
        await gateway.client.post("/api/v1/task/41/cancel", json={"admin": True}, headers=headers)
        rejected = await gateway.client.post("/api/v1/task/41/cancel?admin=true", headers=headers)
        assert rejected.status_code == 400
    callers = [await gateway.caller(each) for each in gateway.services.requests]
    assert callers == [Principal(9, admin=True), Principal(7)]


@pytest.mark.parametrize("status", [400, 404, 503, None])
async def test_cancel_task_that_fails_has_the_answer_of_the_orchestrator(gateway: Running, status: int | None) -> None:
    """Errors of the orchestrator are forwarded; if it is unavailable, the response is 503 with Retry-After."""
    if status is None:
        gateway.services.unavailable.add("orchestrator")
    else:
        gateway.services.on("POST", CANCEL_ONE, httpx2.Response(status, json={"error": "x"}))
    answer = await gateway.client.post("/api/v1/task/41/cancel")
    assert (answer.status_code, list(answer.json())) == (status or 503, ["error"])
    assert status or "Retry-After" in answer.headers


CANCEL = "http://orchestrator/internal/jobs/cancel"


async def test_cancel_tasks_continues_until_no_job_matches(gateway: Running) -> None:
    """The gateway cancels page by page in the caller's name until no job matches, and returns all cancelled jobs."""
    pages = iter([{"job_ids": [1, 2], "more": True}, {"job_ids": [4], "more": False}])
    gateway.services.on("POST", CANCEL, lambda _request: httpx2.Response(200, json=next(pages)))
    answer = await gateway.client.post("/api/v1/task/cancel", json={"status": ["pending"], "subnet_id": 5})
    assert (answer.status_code, answer.json()) == (200, {"message": "3 jobs cancelled", "job_ids": [1, 2, 4]})
    for asked in gateway.services.requests:
        assert json.loads(asked.content) == {"status": ["pending"], "subnet_id": 5, "policy_id": None, "all": False}
        assert await gateway.caller(asked) == Principal(7)
    assert not gateway.broker.records("scan-commands")


@pytest.mark.parametrize(("job_ids", "message"), [([], "0 jobs cancelled"), ([7], "1 job cancelled")])
async def test_cancel_tasks_counts_the_cancelled_jobs(gateway: Running, job_ids: list[int], message: str) -> None:
    """The message has the number of jobs."""
    gateway.services.on("POST", CANCEL, httpx2.Response(200, json={"job_ids": job_ids, "more": False}))
    answer = await gateway.client.post("/api/v1/task/cancel", json={"all": True})
    assert answer.json() == {"message": message, "job_ids": job_ids}


@pytest.mark.parametrize("body", [{}, {"all": True, "policy_id": 1}, {"status": ["failed"]}, {"user_id": 8}, [], None])
async def test_cancel_tasks_with_an_ambiguous_body_is_refused(gateway: Running, body: object) -> None:
    """Without a filter or `all`, with both, or with another field, the response is 400, and nothing is forwarded."""
    answer = await gateway.client.post("/api/v1/task/cancel", json=body)
    assert (answer.status_code, set(answer.json())) == (400, {"error"})
    assert not gateway.services.requests


@pytest.mark.parametrize("answer", [None, httpx2.Response(503, json={"error": "x"}), httpx2.Response(200, json={})])
async def test_cancel_tasks_without_the_orchestrator_is_503(gateway: Running, answer: httpx2.Response | None) -> None:
    """While the orchestrator is unavailable, or its response is invalid, the response is 503 with Retry-After."""
    if answer is None:
        gateway.services.unavailable.add("orchestrator")
    else:
        gateway.services.on("POST", CANCEL, answer)
    response = await gateway.client.post("/api/v1/task/cancel", json={"all": True})
    assert (response.status_code, "Retry-After" in response.headers) == (503, True)


@pytest.mark.parametrize(
    "id_",
    [
        "0",
        "-1",
        "+1",
        "1.0",
        "01",
        "1e3",
        "x",
        "%20 1",
        "1%00",
        "\u0661",
        str(2**53),
        "9" * 5000,
        "true",
        "1;2",
        "%2e%2e",
    ],
)
async def test_malformed_id_in_a_path_is_404(gateway: Running, id_: str) -> None:
    """A path whose id is not an integer in canonical form is that of no route: 404 with any token, and nothing is forwarded."""
    for method, path in (("POST", f"/api/v1/task/{id_}/cancel"), ("GET", f"/api/v1/task/{id_}")):
        for headers in ({}, {"Authorization": "Bearer forged"}):
            answer = await gateway.client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    assert not gateway.broker.records("scan-commands")
    assert not gateway.services.requests


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/v1/task%0A"), ("POST", "/api/v1/task%0A"), ("GET", "/api/v1/task/1%0A")]
)
async def test_path_that_ends_with_a_newline_is_404(gateway: Running, method: str, path: str) -> None:
    """It is the path of no route, so nothing is forwarded or published."""
    answer = await gateway.client.request(method, path, json=BODY if method == "POST" else None)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    assert not gateway.services.requests
    assert not gateway.broker.records("scan-commands")
