"""The audit log of job-orchestrator; requests are forwarded."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import errors, query
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.security.auth import Caller

router = APIRouter(prefix="/api/v1/audit", tags=["audit"], route_class=Route)


@router.get(
    "",
    response_model=rest.AuditList,
    responses=errors(400, 403),
    openapi_extra={"parameters": query(queries.Audit)},
)
async def list_audit(request: Request, _caller: Caller, state: StateDep) -> Response:
    """List changes and refusals, newest first; for administrators."""
    return await state.orchestrator.forward(request)
