"""Serve the audit log to administrators."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Request

from job_orchestrator.api.state import Recorded, StateDep
from scanfleet.contracts import queries, rest
from scanfleet.errors import ForbiddenError, Rule
from scanfleet.runtime.http.requests import parsed
from scanfleet.security.auth import AuthenticatedRoute, Caller

router = APIRouter(prefix="/api/v1/audit", route_class=AuthenticatedRoute)

_PAGING: Final = frozenset({"page", "page_size"})


@router.get("")
async def list_audit(
    *,
    request: Request,
    caller: Caller,
    state: StateDep,
    record: Recorded,
    query: Annotated[queries.Audit, parsed(queries.Audit)],
) -> rest.AuditList:
    if not caller.admin:
        raise ForbiddenError("The audit log is for administrators", rule=Rule.ROLE)
    asked = sorted(f"{name}={value}" for name, value in request.query_params.items() if name not in _PAGING)
    await record.reading("/api/v1/audit" + ("?" + "&".join(asked) if asked else ""))
    entries, total = await state.store.audit.page(
        query.skip,
        query.page_size,
        since=query.since,
        until=query.until,
        subject=query.subject,
        request_id=query.request_id,
        action=query.action,
        decision=query.decision,
        rule=query.rule,
        source=query.source,
        service=query.service,
    )
    return rest.AuditList(entries=entries, total=total, page=query.page, page_size=query.page_size)
