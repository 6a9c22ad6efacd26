"""The audit log: kept by job-orchestrator, passed on."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.document import TEXT, TIME, errors, paging, query
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
            query("subject", TEXT, "Only what this user did or was refused."),
            query("request_id", TEXT, "Only what became of this request."),
            query("action", TEXT, "Only this operation, by its `operationId`."),
            query("decision", {"type": "string", "enum": ["allowed", "refused"]}, "Only what was decided so."),
            query("rule", TEXT, "Only what this rule decided."),
            query("source", TEXT, "Only what came from this address."),
            query("since", TIME, "Only what was received then or later."),
            query("until", TIME, "Only what was received before."),
            *paging(),
        ],
    },
)
async def list_audit(request: Request, _caller: Caller, state: Handed) -> Response:
    """Changes and refusals, newest first; for administrators."""
    return await state.orchestrator.forward(request)
