"""Limits of requests by the token's user: one user's requests do not affect another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import httpx2
import pytest

from api_gateway_testing.gateway import Client, Gateway, Running
from api_gateway_testing.replies import accept
from api_gateway_testing.services import Stream
from scanfleet.contracts.messages import CommandReply, SubmitJobs
from scanfleet_testing.waiting import until

BODY = {"subnet_ids": [5], "policy_id": 3}


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run(writes_per_minute=5, reads_per_minute=7, requests_at_once_per_user=2) as running:
        yield running


async def post(gateway: Running, user_id: int = 7, **headers: str) -> httpx2.Response:
    return await gateway.client.post("/api/v1/task", json=BODY, headers=gateway.issuer.bearer(user_id) | headers)


async def refused(gateway: Running, method: str, path: str, **headers: str) -> tuple[int, httpx2.Response]:
    """Return the number of requests before the first 429, and that response. At the turn of a minute it may be one or two more."""
    for passed in range(10):
        headers["X-Forwarded-For"] = headers["X-Real-IP"] = f"192.0.2.{passed}"
        token = {"Authorization": f"Bearer {gateway.issuer.token(7, jti=str(passed))}"}
        answer = await gateway.client.request(method, path, json=BODY, headers=token | headers)
        if answer.status_code == 429:
            return passed, answer
    raise AssertionError("none was refused")


@pytest.mark.proves("G11", "A18")
async def test_request_above_the_rate_limit_is_429(gateway: Running) -> None:
    """Above the limit of writes or of reads the response is 429 with Retry-After; the two limits are independent."""
    for method, path, limit in (("POST", "/api/v1/task", 5), ("GET", "/api/v1/task/1", 7)):
        passed, answer = await refused(gateway, method, path)
        assert limit <= passed <= limit + 2
        assert set(answer.json()) == {"error"}
        assert answer.json()["error"].startswith(
            f"more than {limit} {'reads' if method == 'GET' else 'writes'} a minute"
        )
        assert 1 <= int(answer.headers["Retry-After"]) <= 60


async def test_estimates_count_as_writes(gateway: Running) -> None:
    """An estimate costs as much as a submit, so it has the same limit; reads are unaffected."""
    passed, answer = await refused(gateway, "POST", "/api/v1/task/estimate")
    assert 5 <= passed <= 7
    assert answer.json()["error"].startswith("more than 5 writes a minute")
    assert (await post(gateway)).status_code == 429
    assert (await gateway.client.get("/api/v1/task", headers=gateway.issuer.bearer(7))).status_code == 404


@pytest.mark.proves("A18")
async def test_limits_count_by_the_user_of_the_token(gateway: Running) -> None:
    """Tokens, addresses and headers of one user share one limit; another user has a separate one."""
    passed, _ = await refused(gateway, "POST", "/api/v1/task", Forwarded="for=192.0.2.1", **{"X-User-Id": "8"})
    assert passed <= 7
    assert len(gateway.replier.commands) == passed
    assert (await post(gateway, 8)).status_code == 201


@pytest.mark.proves("A18")
async def test_invalid_tokens_do_not_count_against_a_user(gateway: Running) -> None:
    """A flood of invalid tokens in a user's name does not use up that user's limits."""
    for _ in range(20):
        forged = gateway.issuer.token(7)[:-4] + "AAAA"
        assert (await post(gateway, Authorization=f"Bearer {forged}")).status_code == 401
    assert (await post(gateway)).status_code == 201


@pytest.mark.proves("G11", "A16")
async def test_concurrent_requests_are_limited_per_user() -> None:
    """Above a user's limit the response is 429 until a request ends, while another user is served."""
    async with Gateway().run(requests_at_once_per_user=2) as gateway:
        go = asyncio.Event()

        async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
            if command.user_id == 7:
                await go.wait()
            return await accept(command)

        gateway.replier.reply = reply
        waiting = [asyncio.create_task(post(gateway)) for _ in range(2)]
        while len(gateway.broker.records("scan-commands")) < 2:
            await gateway.broker.news(1)
        answer = await post(gateway)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert answer.json()["error"].startswith("2 of your requests are in progress, which is the limit")
        assert (await gateway.client.get("/api/v1/task", headers=gateway.issuer.bearer(8))).status_code == 404
        go.set()
        assert [(await each).status_code for each in waiting] == [201, 201]
        assert (await post(gateway)).status_code == 201


async def test_concurrent_requests_are_limited_in_total() -> None:
    """Above the limit of all users the next request of any user is a 503 with Retry-After."""
    async with Gateway().run(requests_at_once=1) as gateway:
        go = asyncio.Event()

        async def reply(command: SubmitJobs) -> Sequence[CommandReply]:
            await go.wait()
            return await accept(command)

        gateway.replier.reply = reply
        waiting = asyncio.create_task(post(gateway))
        while not gateway.broker.records("scan-commands"):
            await gateway.broker.news(1)
        answer = await post(gateway, 8)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert answer.json()["error"].startswith("1 requests are in progress, which is the limit of this replica")
        go.set()
        assert (await waiting).status_code == 201


@pytest.mark.proves("A22", "G8")
async def test_cancel_with_all_other_limits_reached_is_executed() -> None:
    """Cancels are executed at once while the limits of writes, requests and streams are reached."""
    limits = {"writes_per_minute": 2, "requests_at_once_per_user": 1, "requests_at_once": 1, "streams_at_once": 1}
    async with Gateway().run(**limits) as gateway:
        await refused(gateway, "POST", "/api/v1/task")
        owner = "http://orchestrator/internal/jobs/41/owner"
        stream = Stream(b"[1", b"]")
        gateway.services.on("GET", owner, httpx2.Response(200, json={"user_id": 7}))
        gateway.services.on("GET", "http://result-store/api/v1/task/41/results", httpx2.Response(200, stream=stream))
        gateway.services.on(
            "POST", "http://orchestrator/api/v1/task/41/cancel", httpx2.Response(200, json={"message": "x"})
        )
        gateway.services.on(
            "POST",
            "http://orchestrator/internal/jobs/cancel",
            httpx2.Response(200, json={"job_ids": [1], "more": False}),
        )
        reading = Client(gateway, "/api/v1/task/41/results")
        running = asyncio.create_task(reading.run())
        assert (await reading.messages.get())["status"] == 200
        assert (await gateway.client.get("/api/v1/task")).status_code == 429
        assert (await gateway.client.get("/api/v1/task", headers=gateway.issuer.bearer(8))).status_code == 503
        assert (await gateway.client.post("/api/v1/task/41/cancel")).status_code == 200
        assert (await gateway.client.post("/api/v1/task/cancel", json={"all": True})).status_code == 200
        reading.leaves.set()
        await running


@pytest.mark.proves("G11")
async def test_cancels_have_separate_limits() -> None:
    """A user's cancels have limits per minute and of concurrent ones, which the error names; other users are not affected."""
    async with Gateway().run(cancels_per_minute=3, cancels_at_once_per_user=1, cancels_at_once=1) as gateway:
        stream = Stream(b"{}")
        answers = httpx2.Response(200, stream=stream, headers={"Content-Length": "2"})
        gateway.services.on("POST", "http://orchestrator/api/v1/task/1/cancel", answers)
        waiting = asyncio.create_task(gateway.client.post("/api/v1/task/1/cancel"))
        await until(lambda: bool(gateway.services.asked("orchestrator")))
        same = await gateway.client.post("/api/v1/task/2/cancel")
        other = await gateway.client.post("/api/v1/task/2/cancel", headers=gateway.issuer.bearer(8))
        stream.go.release()
        assert (await waiting).status_code == 200
        assert (same.status_code, other.status_code) == (429, 503)
        assert same.json()["error"].startswith("1 of your cancels are in progress, which is the limit")
        assert other.json()["error"].startswith("1 cancels are in progress, which is the limit of this replica")
        passed, answer = await refused(gateway, "POST", "/api/v1/task/3/cancel")
        assert passed <= 5
        assert answer.json()["error"].startswith("more than 3 cancels a minute")
        assert (await post(gateway)).status_code == 201


@pytest.mark.proves("A7")
async def test_invalid_token_is_refused_before_the_body(gateway: Running) -> None:
    """Without a valid token every route is a 401, whatever the body; unknown paths and verbs stay 404 and 405."""
    for authorization in ("", "Bearer x"):
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        for content in (b"{", b"[]", b"[" * 50_000, b"\xff"):
            for method, path in (("POST", "/api/v1/task"), ("POST", "/api/v1/subnet"), ("PUT", "/api/v1/policy/1")):
                answer = await gateway.client.request(method, path, content=content, headers=headers)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert (await gateway.client.get("/api/v1/nope", headers=headers)).status_code == 404
        assert (await gateway.client.patch("/api/v1/task", headers=headers)).status_code == 405
