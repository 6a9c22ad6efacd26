"""The platform's settings for clients, and the caller's limits in every response."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import httpx2
import pytest
from structlog.testing import capture_logs

from api_gateway.upstream import LIMITS_RETRY_SECONDS, LIMITS_SECONDS, ScanLimits
from api_gateway_testing.gateway import Gateway, Running
from scanfleet import VERSION
from scanfleet.contracts import rest
from scanfleet.errors import DependencyError

LIMITS = rest.ScanLimits(presets={}, scripts=["banner"], max_addresses=65_536)
ANSWER = httpx2.Response(200, json=LIMITS.model_dump(mode="json"))
INTERNAL = "http://orchestrator/internal/limits"


async def test_info_without_a_token_is_answered() -> None:
    """A caller without a token gets the platform's settings and the orchestrator's limits."""
    async with Gateway().run(oidc_client_id="scanfleet-cli", oidc_scopes="openid,profile") as gateway:
        gateway.services.on("GET", INTERNAL, ANSWER)
        answer = await gateway.client.get("/api/v1/info", headers={"Authorization": ""})
        settings = gateway.issuer.settings
        assert (answer.status_code, answer.json()) == (
            200,
            {
                "presets": {},
                "scripts": ["banner"],
                "max_addresses": 65_536,
                "version": VERSION,
                "api": "v1",
                "issuer": settings.jwt_issuer,
                "client_id": "scanfleet-cli",
                "audience": settings.jwt_audience,
                "scopes": ["openid", "profile"],
                "sign_in": ["token", "oidc"],
                "sign_in_to_page": [],
            },
        )
        assert "ratelimit" not in answer.headers


async def test_info_without_a_client_id_names_only_tokens() -> None:
    """Without a registered client the only sign-in is a token."""
    async with Gateway().run() as gateway:
        gateway.services.on("GET", INTERNAL, ANSWER)
        answer = (await gateway.client.get("/api/v1/info")).json()
        assert (answer["client_id"], answer["sign_in"]) == (None, ["token"])


async def test_info_before_the_orchestrator_answered_is_503() -> None:
    """Without limits from the orchestrator the response is an error."""
    async with Gateway().run() as gateway:
        gateway.services.unavailable.add("orchestrator")
        answer = await gateway.client.get("/api/v1/info")
        assert (answer.status_code, set(answer.json())) == (503, {"error"})


async def test_scan_limits_are_read_once_a_minute() -> None:
    """Callers without a token cost the orchestrator one query a minute, and one a second during an outage."""
    now, asked, unavailable = 0.0, 0, False

    async def ask() -> rest.ScanLimits:
        nonlocal asked
        asked += 1
        if unavailable:
            raise DependencyError("unavailable")
        return LIMITS

    limits = ScanLimits(ask, clock=lambda: now)
    for _ in range(3):
        assert await limits.read() == LIMITS
    assert asked == 1
    now, unavailable = LIMITS_SECONDS + 1, True
    for _ in range(3):
        assert await limits.read() == LIMITS
    assert asked == 2
    now += LIMITS_RETRY_SECONDS
    for _ in range(3):
        assert await limits.read() == LIMITS
    assert asked == 3


async def test_scan_limits_failure_is_shared_by_waiting_callers() -> None:
    """Callers that wait for the first query share its failure, which is logged, until the next query a second later."""
    now, asked = 0.0, 0
    answered = asyncio.Event()

    async def ask() -> rest.ScanLimits:
        nonlocal asked
        asked += 1
        if asked > 1:
            return LIMITS
        await answered.wait()
        raise DependencyError("the orchestrator timed out")

    limits = ScanLimits(ask, clock=lambda: now)
    waiting = [asyncio.create_task(limits.read()) for _ in range(10)]
    await asyncio.sleep(0)
    with capture_logs() as logs:
        answered.set()
        results = await asyncio.gather(*waiting, limits.read(), return_exceptions=True)
    assert [str(result) for result in results] == ["the orchestrator timed out"] * 11
    assert [(log["log_level"], log["error"]) for log in logs] == [("warning", "the orchestrator timed out")]
    with pytest.raises(DependencyError, match="timed out"):
        await limits.read()
    assert asked == 1
    now = LIMITS_RETRY_SECONDS
    assert await limits.read() == LIMITS


async def test_scan_limits_during_a_query_are_the_last_ones() -> None:
    """A slow orchestrator delays one caller a minute, and no callers that arrive meanwhile."""
    now = 0.0
    go = asyncio.Event()
    go.set()

    async def ask() -> rest.ScanLimits:
        await go.wait()
        return LIMITS

    limits = ScanLimits(ask, clock=lambda: now)
    await limits.read()
    now = LIMITS_SECONDS
    go.clear()
    slow = asyncio.create_task(limits.read())
    await asyncio.sleep(0)
    assert await asyncio.wait_for(limits.read(), 10) == LIMITS
    assert not slow.done()
    go.set()
    assert await slow == LIMITS


async def test_me_has_the_caller_and_the_remaining_limits() -> None:
    """The response has id, role, the token's expiry, and limits that include this request."""
    async with Gateway().run(reads_per_minute=9, writes_per_minute=5, requests_at_once_per_user=3) as gateway:
        now = int(time.time())
        token = gateway.issuer.token(7, admin=True, iat=now, exp=now + 300)
        answer = await gateway.client.get("/api/v1/me", headers={"Authorization": f"Bearer {token}"})
        me = answer.json()
        assert (me["user_id"], me["admin"]) == (7, True)
        assert datetime.fromisoformat(me["expires_at"]).timestamp() == now + 300
        limits = me["limits"]
        assert {name: (limits[name]["limit"], limits[name]["left"]) for name in limits} == {
            "reads": (9, 8),
            "writes": (5, 5),
            "cancels": (600, 600),
            "at_once": (3, 2),
        }
        assert 0 <= limits["reads"]["reset"] <= 60
        await gateway.client.post("/api/v1/task", json={"subnet_ids": [5], "policy_id": 3})
        left = (await gateway.client.get("/api/v1/me")).json()["limits"]
        assert (left["writes"]["left"], left["reads"]["left"]) == (4, 7)


@pytest.mark.parametrize(
    ("method", "path", "status", "rate"),
    [
        ("GET", "/api/v1/me", 200, "reads"),
        ("GET", "/api/v1/task/1", 404, "reads"),
        ("POST", "/api/v1/task", 400, "writes"),
        ("POST", "/api/v1/task/1/cancel", 404, "cancels"),
    ],
)
async def test_response_has_the_remaining_quota(method: str, path: str, status: int, rate: str) -> None:
    """Responses and errors have the limit that applies to the request, and its remaining quota."""
    async with Gateway().run(reads_per_minute=9, writes_per_minute=9, cancels_per_minute=9) as gateway:
        answer = await gateway.client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == status
        assert answer.headers["RateLimit-Policy"] == f'"{rate}";q=9;w=60'
        assert answer.headers["RateLimit"].startswith(f'"{rate}";r=8;t=')


async def test_429_has_a_remaining_quota_of_zero() -> None:
    """A 429 has the same headers; a response to an invalid token has none of them."""
    async with Gateway().run(reads_per_minute=1) as gateway:
        answers = [await gateway.client.get("/api/v1/me") for _ in range(4)]
        assert answers[-1].status_code == 429
        assert answers[-1].headers["RateLimit"].startswith('"reads";r=0;t=')
        assert "RateLimit" not in (await _without_token(gateway)).headers


async def _without_token(gateway: Running) -> httpx2.Response:
    return await gateway.client.get("/api/v1/me", headers={"Authorization": ""})
