"""Audit entries of requests, and the record of refused ones."""

from __future__ import annotations

from typing import Literal, Protocol, cast
from uuid import uuid4

from fastapi import Request

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.audit import MAX_REASON_CHARS, MAX_TARGET_CHARS
from scanfleet.errors import Rule
from scanfleet.runtime.http.requests import source


class RefusalLog(Protocol):
    """The record of refused requests, for the audit log."""

    service: str

    def add(self, entry: AuditEntry) -> None: ...


class _Caller(Protocol):
    """The authenticated caller, in `scope["caller"]`."""

    @property
    def user_id(self) -> int: ...


def audit_entry(
    request: Request,
    decision: Literal["allowed", "refused"],
    *,
    rule: Rule | None = None,
    target: str = "",
    reason: str = "",
) -> AuditEntry:
    """Return the audit entry of this request; the default target is its path."""
    caller = cast(_Caller | None, request.scope.get("caller"))
    return AuditEntry(
        id=uuid4().hex,
        time=utc_now(),
        service=cast(RefusalLog, request.app.state.refusals).service,
        subject=str(caller.user_id) if caller else "",
        source=source(request),
        action=request.scope["route"].name,
        target=(target or request.scope["path"])[:MAX_TARGET_CHARS],
        decision=decision,
        rule=rule or "",
        reason=reason[:MAX_REASON_CHARS],
        request_id=request.scope["request_id"],
    )


def record_refusal(request: Request, rule: Rule, *, target: str = "", reason: str = "") -> None:
    """Add a refused request to the entries that the service publishes for the audit log."""
    entry = audit_entry(request, "refused", rule=rule, target=target, reason=reason)
    cast(RefusalLog, request.app.state.refusals).add(entry)
