"""The audit log of job-orchestrator; requests are forwarded."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import TEXT, TIME, errors, paging, query
from api_gateway.api.state import Handed
from scanfleet.contracts import rest
from scanfleet.security.auth import Caller

router = APIRouter(prefix="/api/v1/audit", tags=["audit"], route_class=Route)


@router.get(
    "",
    response_model=rest.AuditList,
    responses=errors(400, 403),
    openapi_extra={
        "parameters": [
            query("subject", TEXT, "Only entries about this user."),
            query("request_id", TEXT, "Only entries of this request."),
            query("action", TEXT, "Only entries of this operation, by its `operationId`."),
            query("decision", {"type": "string", "enum": ["allowed", "refused"]}, "Only entries with this decision."),
            query("rule", TEXT, "Only entries decided by this rule."),
            query("source", TEXT, "Only requests from this address."),
            query("since", TIME, "Only entries received at or after this time."),
            query("until", TIME, "Only entries received before this time."),
            *paging(),
        ],
    },
)
async def list_audit(request: Request, _caller: Caller, state: Handed) -> Response:
    """List changes and refusals, newest first; for administrators."""
    return await state.orchestrator.forward(request)
