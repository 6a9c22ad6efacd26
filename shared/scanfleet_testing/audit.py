"""Audit entries for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from scanfleet.contracts.messages import AuditEntry
from scanfleet.services import GATEWAY

_FIELDS: Final[dict[str, Any]] = {
    "id": "a",
    "time": datetime(2026, 1, 1, tzinfo=UTC),
    "service": GATEWAY,
    "subject": "",
    "source": "192.0.2.17",
    "action": "create_tasks",
    "target": "/api/v1/task",
    "decision": "refused",
    "rule": "token",
    "request_id": "r-1",
}


def refusal(**changed: Any) -> AuditEntry:
    """Return the entry of a request that the gateway refused because of its token, with these fields changed."""
    return AuditEntry(**_FIELDS | changed)
