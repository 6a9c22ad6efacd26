"""The audit log: kept by job-orchestrator, passed on."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.document import errors, paging, query
from api_gateway.api.state import Handed
from scanfleet import rest
from scanfleet.auth import Caller

router = APIRouter(prefix="/api/v1/audit", tags=["audit"], route_class=Route)


@router.get(
    "",
    response_model=rest.AuditList,
    responses=errors(400, 403),
    openapi_extra={
        "parameters": [
            query("subject", {"type": "string"}, "Only what this user did or was refused."),
            query("request_id", {"type": "string"}, "Only what became of this request."),
            *paging(),
        ],
    },
)
async def list_audit(request: Request, _caller: Caller, state: Handed) -> Response:
    """What was changed and what was refused, newest first; for administrators."""
    return await state.orchestrator.forward(request)
