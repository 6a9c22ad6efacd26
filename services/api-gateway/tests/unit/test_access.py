"""The caller in requests to the services, revoked tokens, and assigned user ids."""

from __future__ import annotations

import asyncio
import re
import selectors
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from api_gateway.auth import MAX_STALE_SECONDS, MAX_USERS, REFRESH_SECONDS, KeyReports, Revocations, UserIds
from api_gateway.settings import Settings
from api_gateway_testing.gateway import Gateway, Running
from scanfleet.contracts.rest import Revoked
from scanfleet.errors import DependencyError, UnauthorizedError, UnavailableError
from scanfleet.runtime.loop import Loop
from scanfleet.security.auth import Principal
from scanfleet_testing.tokens import Issuer
from scanfleet_testing.waiting import until

TASKS = "http://orchestrator/api/v1/task"
USERS = "http://orchestrator/internal/users"
RESULTS = "/api/v1/task/41/results"
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run() as running:
        running.services.on("GET", TASKS, httpx2.Response(200, json={}))
        yield running


async def ask(gateway: Running, **claims: Any) -> httpx2.Response:
    """Request the caller's tasks with a token of these claims."""
    headers = {"Authorization": f"Bearer {gateway.issuer.token(**claims)}"}
    return await gateway.client.get("/api/v1/task", headers=headers)


def revoked(**changed: Any) -> Revoked:
    return Revoked.model_validate({"jti": None, "sub": None, "user_id": None, "issued_before": None} | changed)


async def revoke(gateway: Running, **changed: Any) -> None:
    """Revoke, and have the gateway read the list."""
    gateway.services.revoked.append(revoked(**changed))
    await gateway.app.state.verifier._revoked.refresh()


# Keys of the issuer


@pytest.mark.proves("G15")
async def test_gateway_reports_the_keys_that_verify_tokens(gateway: Running) -> None:
    """Once the gateway has fetched the issuer's keys, the orchestrator gets their names, which contain no key."""
    await until(lambda: gateway.services.keys)
    (reported,) = gateway.services.keys
    issuer = gateway.issuer
    assert (reported.issuer, len(reported.keys)) == (issuer.settings.jwt_issuer, 1)
    assert reported.keys[0].endswith(f", kid '{issuer.kid}'")
    assert reported.keys[0] == gateway.app.state.verifier.key_names[0]


async def test_key_reports_after_a_failure_are_sent_again() -> None:
    """A failed report is retried; unchanged keys are reported once."""
    names, unavailable = ["a"], True
    reports: list[list[str]] = []

    async def report(keys: Sequence[str]) -> None:
        reports.append(list(keys))
        if unavailable:
            raise DependencyError("unavailable")

    keys = KeyReports(lambda: names, report)
    await keys.refresh()
    unavailable = False
    for _ in range(2):
        await keys.refresh()
    names = ["a", "b"]
    await keys.refresh()
    assert reports == [["a"], ["a"], ["a", "b"]]


@pytest.mark.parametrize(
    "kid", ["", "k" * 10_000, "\U0001f511" * 10_000, "\x00\x1b\x7f\r\n" * 100, "'\"\\" * 100, "\ud800"]
)
async def test_gateway_with_an_odd_key_id_reports_its_key(kid: str) -> None:
    """An issuer's key id of any length and characters gives a name that the orchestrator accepts."""
    async with Gateway(Issuer(kid=kid)).run() as gateway:
        await until(lambda: gateway.services.keys)
        (reported,) = gateway.services.keys
    (name,) = reported.keys
    assert re.fullmatch(r"[0-9a-f]{16}, kid [\x20-\x7e]{2,32}", name)


async def test_gateway_with_a_failed_key_report_task_is_unhealthy() -> None:
    """A report that ended by an error cannot be repeated by this process, so the supervisor has to restart it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which an unhealthy process sends to itself
    try:
        async with Gateway().run() as gateway:
            assert gateway.app.state.probes.healthy
            (report,) = [task for task in asyncio.all_tasks() if task.get_name() == "issuer's keys"]
            report.cancel()
            await asyncio.gather(report, return_exceptions=True)
            assert not gateway.app.state.probes.healthy
    finally:
        signal.signal(signal.SIGTERM, before)


# Internal tokens


async def test_services_get_separate_internal_tokens(gateway: Running) -> None:
    """Each service gets a token for the same caller that the other one refuses, and never the user's token."""
    gateway.services.on("GET", "http://orchestrator/internal/jobs/41/owner", httpx2.Response(200, json={"user_id": 7}))
    gateway.services.on("GET", f"http://result-store{RESULTS}", httpx2.Response(200, json=[]))
    headers = gateway.issuer.bearer(7, admin=True)
    await gateway.client.get(RESULTS, headers=headers)
    owner, results = gateway.services.requests
    assert [await gateway.caller(asked) for asked in (owner, results)] == [Principal(7, admin=True)] * 2
    assert headers["Authorization"] not in {owner.headers["authorization"], results.headers["authorization"]}
    for audience, asked in (("result-store", owner), ("job-orchestrator", results)):
        with pytest.raises(UnauthorizedError):
            await gateway.internal.caller(audience, asked.headers["authorization"])


async def test_service_that_refuses_the_gateways_token_is_503(gateway: Running) -> None:
    """A 401 of a service concerns the gateway's key, so the caller gets a 503."""
    gateway.services.on("GET", TASKS, httpx2.Response(401, json={"error": "the token is not valid"}))
    answer = await ask(gateway)
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers


async def test_token_for_a_service_follows_its_clock() -> None:
    """A gateway whose clock is two hours late makes tokens that are valid by the service's clock, after its first response."""
    async with Gateway().run() as gateway:
        ahead = datetime.now(UTC) + timedelta(hours=2)
        date = {"Date": ahead.strftime("%a, %d %b %Y %H:%M:%S GMT")}
        gateway.services.on("GET", TASKS, httpx2.Response(200, json={}, headers=date))
        await ask(gateway)
        await ask(gateway)
        first, second = gateway.services.requests
        assert await gateway.caller(first) == Principal(7)
        with pytest.raises(UnauthorizedError) as caught:  # by a clock that is not the service's
            await gateway.caller(second)
        assert caught.value.reason == "iat is in the future"


# Revocations


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize("which", [{"jti": "t-1"}, {"sub": "7"}, {"user_id": 7}], ids=["jti", "sub", "user_id"])
async def test_revoked_token_is_rejected(gateway: Running, which: dict[str, Any]) -> None:
    """A valid token is a 401 once its id, subject or user is revoked; another user's is still accepted."""
    issued = int(time.time()) - 60
    assert (await ask(gateway, jti="t-1", iat=issued)).status_code == 200
    await revoke(gateway, **which, **({} if "jti" in which else {"issued_before": issued + 1}))
    answer = await ask(gateway, jti="t-1", iat=issued)
    assert (answer.status_code, answer.json()) == (401, {"error": "the token has been revoked"})
    assert (await ask(gateway, user_id=8, jti="t-2")).status_code == 200
    gateway.services.revoked.clear()
    await gateway.app.state.verifier._revoked.refresh()
    assert (await ask(gateway, jti="t-1", iat=issued)).status_code == 200


@pytest.mark.proves("A28", "G14")
async def test_token_issued_after_the_revocation_is_accepted(gateway: Running) -> None:
    """After a revocation of a user's tokens, newer tokens are accepted; of two revocations the later applies."""
    now = int(time.time())
    for before in (now - 30, now - 90):
        await revoke(gateway, user_id=7, issued_before=before)
    assert (await ask(gateway, iat=now - 30)).status_code == 200
    assert (await ask(gateway, iat=now - 31)).status_code == 401


@pytest.mark.proves("A28", "G14")
async def test_revocation_takes_effect_within_seconds() -> None:
    """A token that is revoked while the gateway runs is refused without another event."""
    async with Gateway().run() as gateway:
        gateway.services.on("GET", TASKS, httpx2.Response(200, json={}))
        assert (await ask(gateway)).status_code == 200
        gateway.services.revoked.append(revoked(jti="t-1"))
        deadline = time.monotonic() + 5
        while (await ask(gateway, jti="t-1")).status_code == 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)  # the client in memory never waits, and so would no loop run


async def test_requests_before_the_list_was_read_are_503() -> None:
    """Until the list was read once every request is a 503, and the gateway is not ready."""
    gateway = Gateway()
    async with gateway.run() as running:
        running.app.state.verifier._revoked._read_at = float("-inf")
        running.services.unavailable.add("orchestrator")
        answer = await ask(running)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        ready = await running.probes.get("/readyz")
        assert (ready.status_code, "the revocations" in ready.json()["error"]) == (503, True)


async def test_revocations_that_cannot_be_refreshed_expire() -> None:
    """A list that cannot be refreshed stays in use until it is too old."""
    now = 0.0
    listed: list[Revoked] | None = [revoked(jti="t-1")]

    async def ask_for() -> list[Revoked]:
        if listed is None:
            raise DependencyError("unavailable")
        return listed

    revocations = Revocations(ask_for, clock=lambda: now)
    await revocations.refresh()
    listed = None
    now = MAX_STALE_SECONDS
    await revocations.refresh()
    one: dict[str, Any] = {"subject": "s", "user_id": 7, "issued_at": 1.0, "token_id": ""}
    assert revocations.revokes(**one | {"token_id": "t-1"})
    assert not revocations.revokes(**one)
    now += 0.1
    with pytest.raises(UnavailableError):
        revocations.revokes(**one)


class _Skipping(selectors.SelectSelector):
    """Advances the time of a loop instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class _SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


@pytest.mark.proves("A28")
@pytest.mark.parametrize(
    ("seconds", "limit"),
    [([1.4], 5), ([4.9, 0.1], 5), ([1.6], MAX_STALE_SECONDS)],
    ids=["slow answers", "one answer that is too slow", "only answers that are too slow"],
)
def test_token_is_accepted_for_no_longer_than_documented_after_its_revocation(
    seconds: list[float], limit: float
) -> None:
    """A token that is revoked just after a query has read the list is refused in time, also if answers are slow."""
    listed: list[Revoked] = []

    async def refused_after() -> float:
        clock = asyncio.get_running_loop().time
        times = iter(seconds)

        async def ask_for() -> list[Revoked]:
            read = list(listed)
            if not listed:
                listed.append(revoked(jti="t-1"))
            await asyncio.sleep(next(times, seconds[-1]))
            return read

        revocations = Revocations(ask_for, clock=clock)
        revocations._read_at = started = clock()
        refreshing = Loop("revocations", REFRESH_SECONDS, revocations.refresh)
        await refreshing.start()
        token: dict[str, Any] = {"subject": "s", "user_id": 7, "issued_at": 1.0, "token_id": "t-1"}
        with suppress(UnavailableError):
            await until(lambda: revocations.revokes(**token), 2 * MAX_STALE_SECONDS)
        refused = clock()
        await refreshing.stop()
        return refused - started

    with asyncio.Runner(loop_factory=_SkippingLoop) as runner:
        assert runner.run(refused_after()) <= limit + 0.02


# Mapped user ids


@pytest.fixture
async def mapped() -> AsyncIterator[Running]:
    async with Gateway().run(jwt_user_ids="mapped") as running:
        running.services.on("GET", TASKS, httpx2.Response(200, json={}))
        running.services.on("POST", USERS, httpx2.Response(200, json={"user_id": 41}))
        yield running


async def test_mapped_user_has_the_assigned_id(mapped: Running) -> None:
    """With mapped ids the services get the assigned id, which the gateway queries once and in its own name."""
    for number in range(3):
        assert (await ask(mapped, sub=UUID, jti=str(number))).status_code == 200
    assigned, *asked = mapped.services.requests
    assert assigned.content == f'{{"issuer":"{mapped.issuer.settings.jwt_issuer}","subject":"{UUID}"}}'.encode()
    assert await mapped.caller(assigned) == Principal(0)
    assert [await mapped.caller(each) for each in asked] == [Principal(41)] * 3


async def test_command_of_a_mapped_user_has_the_assigned_id(mapped: Running) -> None:
    """A command of a mapped user has the assigned id."""
    headers = {"Authorization": f"Bearer {mapped.issuer.token(sub=UUID)}"}
    answer = await mapped.client.post("/api/v1/task", json={"subnet_ids": [5], "policy_id": 3}, headers=headers)
    assert answer.status_code == 201
    assert [command.user_id for command in mapped.replier.commands] == [41]


class Exhausted(httpx2.AsyncBaseTransport):
    """A pool of connections without a free one."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        raise httpx2.PoolTimeout("no free connection", request=request)


@pytest.mark.proves("G8")
async def test_cancel_of_a_mapped_user_without_connections_for_queries_is_executed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The id and the revocations that a cancel needs are queried over the connections for cancels."""
    pools = iter([Exhausted()])

    @asynccontextmanager
    async def connect(_: Settings, services: httpx2.AsyncBaseTransport) -> AsyncIterator[httpx2.AsyncBaseTransport]:
        yield next(pools, services)

    monkeypatch.setattr("api_gateway.main.connect", connect)
    async with Gateway().run(jwt_user_ids="mapped") as running:
        running.services.on("POST", USERS, httpx2.Response(200, json={"user_id": 41}))
        running.services.on(
            "POST", "http://orchestrator/api/v1/task/1/cancel", httpx2.Response(200, json={"message": "x"})
        )
        headers = {"Authorization": f"Bearer {running.issuer.token(sub=UUID)}"}
        assert (await running.client.get("/api/v1/task", headers=headers)).status_code == 503
        assert (await running.client.post("/api/v1/task/1/cancel", headers=headers)).status_code == 200
        assert (await running.caller(running.services.requests[-1])).user_id == 41


@pytest.mark.parametrize("answer", [httpx2.Response(500), httpx2.Response(200, json={"user_id": 0}), None])
async def test_mapped_user_without_an_id_is_503(mapped: Running, answer: httpx2.Response | None) -> None:
    """While no id can be assigned the response is 503, and nothing is forwarded."""
    if answer is None:
        mapped.services.unavailable.add("orchestrator")
    else:
        mapped.services.on("POST", USERS, answer)
    got = await ask(mapped, sub=UUID)
    assert got.status_code == 503
    assert "Retry-After" in got.headers
    assert [asked.url.path for asked in mapped.services.requests] == ["/internal/users"]


@pytest.mark.parametrize("sub", ["", "x" * 256, "a\nb", {}, ["a"], True])
async def test_subject_that_cannot_be_mapped_is_401(mapped: Running, sub: object) -> None:
    """A subject that is not printable text of 1 to 255 characters is a 401, and gets no id."""
    assert (await ask(mapped, sub=sub)).status_code == 401
    assert not mapped.services.requests


async def test_cached_ids_are_bounded() -> None:
    """The cache of user ids is bounded, however many users there are."""
    asked: list[str] = []

    async def ask_for(_issuer: str, subject: str) -> int:
        asked.append(subject)
        return int(subject)

    users = UserIds(ask_for)
    for number in range(1, MAX_USERS + 3):
        assert await users.user_id("i", str(number)) == number
    assert len(users._known) == MAX_USERS
    assert await users.user_id("i", "1") == 1
    assert asked.count("1") == 2
