"""Serve the audit log to administrators."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request

from job_orchestrator.api.state import Handed, Paged, Recorded
from scanfleet.contracts import rest
from scanfleet.errors import ForbiddenError, Rule
from scanfleet.security.auth import Caller, Guarded

router = APIRouter(prefix="/api/v1/audit", route_class=Guarded)

_PAGING: Final = frozenset({"page", "page_size"})

Text = Annotated[str | None, Query(max_length=200)]


@router.get("")
async def list_audit(
    *,
    request: Request,
    caller: Caller,
    state: Handed,
    paged: Paged,
    record: Recorded,
    subject: Text = None,
    request_id: Text = None,
    action: Text = None,
    decision: Literal["allowed", "refused"] | None = None,
    rule: Text = None,
    source: Text = None,
    since: rest.InputTime | None = None,
    until: rest.InputTime | None = None,
) -> rest.AuditList:
    if not caller.admin:
        raise ForbiddenError("The audit log is for administrators", rule=Rule.ROLE)
    asked = sorted(f"{name}={value}" for name, value in request.query_params.items() if name not in _PAGING)
    await record.reading("?".join(("/api/v1/audit", *filter(None, ["&".join(asked)]))))
    entries, total = await state.store.audit.page(
        paged.skip,
        paged.page_size,
        since=since,
        until=until,
        subject=subject,
        request_id=request_id,
        action=action,
        decision=decision,
        rule=rule,
        source=source,
    )
    return rest.AuditList(entries=entries, total=total, page=paged.page, page_size=paged.page_size)
