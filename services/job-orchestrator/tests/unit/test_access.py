"""Revocations, for administrators, and what the gateway asks in its own name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from fastapi import FastAPI

from job_orchestrator.domain import access
from job_orchestrator.metrics import UNREADABLE
from job_orchestrator_testing import RULES, MemoryStore, Simulation
from job_orchestrator_testing.api import app_of, state_of
from scanfleet.clock import utc_now
from scanfleet.security.auth import InternalVerifier, read_public_keys
from scanfleet.services import ORCHESTRATOR
from scanfleet_testing.tokens import InternalKeys, Issuer

PATH = "/api/v1/revocation"
SLOW: Final = timedelta(minutes=7)  # by which the clock of the platform differs from that of this process


class Api:
    """Requests that the gateway makes for users and for itself (user 0)."""

    def __init__(self, app: FastAPI, keys: InternalKeys, store: MemoryStore) -> None:
        self.store = store
        self.keys = keys
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")

    async def __call__(
        self, method: str, path: str, user: int = 9, *, admin: bool = False, json: Any = None
    ) -> httpx2.Response:
        headers = self.keys.bearer(ORCHESTRATOR, user, admin=admin)
        return await self.http.request(method, path, headers=headers, json=json)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    store = MemoryStore()
    keys = InternalKeys(tmp_path)
    slow = lambda: utc_now() - SLOW  # noqa: E731 # the platform's time differs from the process's
    app = app_of(
        replace(state_of(Simulation(store)), now=slow),
        InternalVerifier(read_public_keys(keys.public_keys_file), ORCHESTRATOR),
    )
    running = Api(app, keys, store)
    async with running.http:
        yield running


BODIES: dict[str, tuple[dict[str, Any], bool]] = {
    "a token": ({"jti": "t-1"}, True),
    "a subject": ({"sub": "0f8fad5b-d9cb"}, True),
    "a user": ({"user_id": 7}, True),
    "a time": ({"user_id": 7, "issued_before": "2026-11-28T04:00:00Z"}, True),
    "nothing": ({}, False),
    "only a time": ({"issued_before": "2026-11-28T04:00:00Z"}, False),
    "two of three": ({"jti": "t-1", "sub": "s"}, False),
    "a token and a time": ({"jti": "t-1", "issued_before": "2026-11-28T04:00:00Z"}, False),
    "a time without a zone": ({"sub": "s", "issued_before": "2026-11-28T04:00:00"}, False),
    "a time as a number": ({"sub": "s", "issued_before": 1_767_225_600}, False),
    "a time as a fraction": ({"sub": "s", "issued_before": 1_767_225_600.5}, False),
    "a time as digits": ({"sub": "s", "issued_before": "1767225600"}, False),
    "a time to come": ({"sub": "s", "issued_before": "9999-12-31T23:59:59-23:59"}, False),
    "a time before all": ({"sub": "s", "issued_before": "0001-01-01T00:00:00+23:59"}, False),
    "control characters": ({"sub": "s\u001b"}, False),
    "an empty id": ({"jti": ""}, False),
    "a long subject": ({"sub": "s" * 256}, False),
    "a field too many": ({"jti": "t-1", "id": 1}, False),
    "user zero": ({"user_id": 0}, False),
}


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize(("body", "good"), BODIES.values(), ids=BODIES)
async def test_revocation_by_an_administrator_is_listed_and_audited(
    api: Api, body: dict[str, Any], *, good: bool
) -> None:
    """A revocation of a token, a subject or a user is listed, read by the gateway, audited, and can be deleted."""
    before = utc_now() - SLOW
    made = await api("POST", PATH, admin=True, json=body)
    if not good:
        assert made.status_code == 400, made.text
        assert (await api("GET", PATH, admin=True)).json()["total"] == 0
        return
    assert made.status_code == 201
    revocation = made.json()
    assert {name: revocation[name] for name in body if name != "issued_before"} == {
        name: value for name, value in body.items() if name != "issued_before"
    }
    assert (revocation["created_by"], revocation["issued_before"] is None) == (9, "jti" in body)
    if "issued_before" not in body and "jti" not in body:
        assert revocation["issued_before"] == revocation["created_at"]
        assert abs(datetime.fromisoformat(revocation["created_at"]) - before) < timedelta(minutes=1)
    listed = (await api("GET", PATH, admin=True)).json()
    assert listed == {"revocations": [revocation], "total": 1, "page": 1, "page_size": 10}
    (read,) = (await api("GET", "/internal/revocations", 0)).json()
    assert read == {name: revocation[name] for name in ("jti", "sub", "user_id", "issued_before")}
    assert (await api("DELETE", f"{PATH}/{revocation['id']}", admin=True)).status_code == 200
    assert (await api("DELETE", f"{PATH}/{revocation['id']}", admin=True)).status_code == 404
    assert (await api("GET", "/internal/revocations", 0)).json() == []
    entries, _ = await api.store.audit.page(0, 10)
    assert sorted((entry.action, entry.target, entry.subject, entry.decision) for entry in entries) == [
        ("create_revocation", f"{PATH}/1", "9", "allowed"),
        ("delete_revocation", f"{PATH}/1", "9", "allowed"),
    ]


DAMAGE: dict[str, dict[str, Any]] = {
    "a missing field": {"jti": ...},
    "a field of another type": {"user_id": ["7"]},
    "a time without a zone": {"issued_before": "2026-11-28T04:00:00"},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_damaged_revocation_is_omitted_and_can_be_deleted(api: Api, damage: dict[str, Any]) -> None:
    """A revocation that cannot be read hides no other from the gateways or the list, is counted, and is deleted by its id."""
    damaged, good = [(await api("POST", PATH, admin=True, json={"user_id": user})).json() for user in (7, 8)]
    document = api.store.data.revocations[damaged["id"]] | damage
    api.store.data.revocations[damaged["id"]] = {name: each for name, each in document.items() if each is not ...}
    before = UNREADABLE.labels("revocations")._value.get()
    (read,) = (await api("GET", "/internal/revocations", 0)).json()
    assert read["user_id"] == 8
    assert (await api("GET", PATH, admin=True)).json()["revocations"] == [good]
    assert UNREADABLE.labels("revocations")._value.get() == before + 2
    assert (await api("DELETE", f"{PATH}/{damaged['id']}", admin=True)).status_code == 200
    assert (await api("DELETE", f"{PATH}/{damaged['id']}", admin=True)).status_code == 404
    assert api.store.data.revocations.keys() == {good["id"]}


@pytest.mark.proves("A10", "G13")
@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("GET", PATH), ("DELETE", f"{PATH}/1")])
async def test_revocation_by_another_user_is_a_403(api: Api, method: str, path: str) -> None:
    """Another user gets a 403, and nothing is revoked."""
    answer = await api(method, path, json={"jti": "t-1"})
    assert answer.status_code == 403
    assert (await api("GET", "/internal/revocations", 0)).json() == []


async def test_revocation_outlives_every_token(api: Api) -> None:
    """A revocation expires after the longest lifetime that any setting allows a token."""
    made = (await api("POST", PATH, admin=True, json={"user_id": 7})).json()
    ends = made["expires_at"]
    assert ends > (utc_now() + timedelta(days=30)).isoformat()[:19]


async def test_revocation_above_the_limit_is_a_409(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the list is full, a new revocation is a 409 and is not added."""
    monkeypatch.setattr("job_orchestrator_testing.repository.access.MAX_REVOCATIONS", 2)
    statuses = [(await api("POST", PATH, admin=True, json={"jti": str(number)})).status_code for number in range(3)]
    assert statuses == [201, 201, 409]
    assert access.MAX_REVOCATIONS == 1_000


async def test_user_id_is_assigned_once(api: Api) -> None:
    """Each subject of an issuer has its own id, the same each time."""
    named = [("https://a.test", "x"), ("https://a.test", "y"), ("https://b.test", "x"), ("https://a.test", "x")]
    ids = [
        (await api("POST", "/internal/users", 0, json={"issuer": issuer, "subject": subject})).json()["user_id"]
        for issuer, subject in named
    ]
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


@pytest.mark.proves("G15")
async def test_key_of_the_issuer_is_recorded_once(api: Api) -> None:
    """For any number of reports by any number of gateways the audit log has one entry for each key."""
    for keys in (["aa, kid '1'"], ["aa, kid '1'"], ["aa, kid '1'", "bb, kid '1'"]):
        body = {"issuer": "https://issuer.test", "keys": keys}
        assert (await api("POST", "/internal/keys", 0, json=body)).status_code == 200
    entries, _ = await api.store.audit.page(0, 10)
    assert sorted((each.action, each.target, each.subject) for each in entries) == [
        ("use_key", f"verifies tokens of https://issuer.test: key {key}", "") for key in ("aa, kid '1'", "bb, kid '1'")
    ]
    refused = await api("POST", "/internal/keys", 9, admin=True, json={"issuer": "i", "keys": ["aa"]})
    assert refused.status_code == 401


@pytest.mark.proves("G14")
@pytest.mark.parametrize(("method", "path"), [("GET", "/internal/revocations"), ("POST", "/internal/users")])
async def test_internal_routes_need_a_token_of_the_gateway(api: Api, method: str, path: str) -> None:
    """A user's token opens no route of the gateway, and the gateway's own token opens no route of a user."""
    body = {"issuer": "i", "subject": "s"}
    assert (await api(method, path, 9, admin=True, json=body)).status_code == 401
    assert (await api(method, path, 0, json=body)).status_code == 200
    assert (await api("GET", "/api/v1/task", 0)).status_code == 401
    assert (await api("GET", PATH, 0, admin=True)).status_code == 401


async def test_unavailable_database_is_a_503(api: Api) -> None:
    """While MongoDB is unavailable the gateway's own requests get a 503."""
    api.store.data.unavailable = True
    for method, path in (("GET", "/internal/revocations"), ("POST", "/internal/users")):
        assert (await api(method, path, 0, json={"issuer": "i", "subject": "s"})).status_code == 503


@pytest.mark.proves("A7", "G14")
async def test_internal_routes_accept_only_tokens_of_the_gateway(api: Api, tmp_path: Path) -> None:
    """A user's own token, one for another service and one by another key are refused."""
    (tmp_path / "other").mkdir()
    for headers in (
        Issuer().bearer(9),
        api.keys.bearer("result-store", 9),
        InternalKeys(tmp_path / "other").bearer(ORCHESTRATOR, 9),
    ):
        answer = await api.http.get("/api/v1/task", headers=headers)
        assert answer.status_code == 401


async def test_scan_limits_are_readable_by_the_gateway_only(api: Api) -> None:
    """The gateway gets presets with every field, scripts and the maximum size of a subnet; a user gets a 401."""
    answer = await api("GET", "/internal/limits", 0)
    limits = answer.json()
    assert (limits["presets"]["quick"]["ports"], limits["presets"]["full"]["version_intensity"]) == ("top:100", 9)
    assert "banner" in limits["scripts"]
    assert limits["max_addresses"] == RULES.max_addresses
    assert (await api("GET", "/internal/limits", 7, admin=True)).status_code == 401
