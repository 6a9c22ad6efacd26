"""The gateway's refusals reach the audit log, and its commands have the source of the request."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from api_gateway_testing.gateway import Gateway, Running
from scanfleet.contracts.messages import Audited, AuditEntry
from scanfleet.contracts.messages.envelope import decode
from scanfleet.contracts.messages.topics import SCAN_AUDIT
from scanfleet.services import GATEWAY
from scanfleet_testing.bus import MemoryBus

BODY = {"subnet_ids": [5], "policy_id": 3}

pytestmark = pytest.mark.proves("G15")


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Gateway().run(writes_per_minute=3) as running:
        yield running


async def audited(gateway: Running) -> list[AuditEntry]:
    await gateway.app.state.refusals.flush(MemoryBus(gateway.broker))
    messages = [decode(SCAN_AUDIT[GATEWAY], record) for record in gateway.broker.records("scan-audit-api-gateway")]
    return [each.entry for each in messages if isinstance(each, Audited)]


@pytest.mark.proves("A7", "A17")
async def test_invalid_token_is_recorded(gateway: Running) -> None:
    """A request without a valid token is an entry without a subject, with address, operation and request id, without the token."""
    headers = {
        "Authorization": "Bearer eyJhbGciOiJub25lIn0.e30.",
        "X-Request-ID": "r-1",
        "X-Forwarded-For": "192.0.2.1",
    }
    answer = await gateway.client.post("/api/v1/task", json=BODY, headers=headers)
    (entry,) = await audited(gateway)
    assert (entry.service, entry.subject, entry.source) == ("api-gateway", "", "127.0.0.1")
    assert (entry.action, entry.target, entry.request_id) == (
        "create_tasks",
        "/api/v1/task",
        answer.headers["X-Request-ID"],
    )
    assert entry.request_id != "r-1"
    assert (entry.decision, entry.rule, entry.count) == ("refused", "token", 1)
    assert entry.reason == "header kid and alg match no key of the issuer"
    assert "eyJ" not in entry.model_dump_json()


@pytest.mark.proves("A11", "A18")
async def test_exceeded_limits_and_malformed_requests_are_recorded(gateway: Running) -> None:
    """A malformed request and one above a limit are entries of the user with their rule; forwarded refusals are recorded once."""
    await gateway.client.post("/api/v1/task", json=BODY | {"user_id": 1})
    await gateway.client.get("/api/v1/subnet/1")
    for _ in range(6):
        await gateway.client.post("/api/v1/task", json=BODY)
    entries = await audited(gateway)
    assert [entry.rule for entry in entries][:2] == ["request", "rate"]
    assert {entry.rule for entry in entries[1:]} == {"rate"}
    assert {(entry.subject, entry.action) for entry in entries} == {("7", "create_tasks")}


async def test_command_has_address_and_request_id(gateway: Running) -> None:
    """A command has the caller's address and the request id, for the orchestrator's entry."""
    answer = await gateway.client.post("/api/v1/task", json=BODY)
    (command,) = gateway.replier.commands
    assert (command.source, command.request_id) == ("127.0.0.1", answer.headers["X-Request-ID"])
    assert await audited(gateway) == []


@pytest.mark.proves("A30", "G15")
@pytest.mark.parametrize(
    ("trusted", "forwarded", "source"),
    [
        ((), "192.0.2.1", "127.0.0.1"),
        (("127.0.0.1/32",), "198.51.100.9, 192.0.2.1", "192.0.2.1"),
        (("127.0.0.1/32", "10.0.0.0/8"), "198.51.100.9, 192.0.2.1, 10.0.0.2", "192.0.2.1"),
    ],
    ids=["no proxy", "one proxy", "two proxies"],
)
async def test_source_with_forged_addresses_is_the_real_one(
    trusted: tuple[str, ...], forwarded: str, source: str
) -> None:
    """A caller that sends forged addresses is recorded under its own, behind no, one and two trusted proxies."""
    async with Gateway().run(trusted_proxies=trusted) as gateway:
        headers = {"X-Forwarded-For": forwarded}
        await gateway.client.get("/api/v1/task", headers=headers | {"Authorization": "Bearer x"})
        await gateway.client.post("/api/v1/task", json=BODY, headers=headers)
        (entry,) = await audited(gateway)
        (command,) = gateway.replier.commands
    assert (entry.source, command.source) == (source, source)
