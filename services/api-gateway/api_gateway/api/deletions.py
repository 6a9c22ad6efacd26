"""Receipts of deleted jobs of job-orchestrator; requests are forwarded."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import errors, query
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.security.auth import Caller

router = APIRouter(prefix="/api/v1/deletion", tags=["task"], route_class=Route)


@router.get(
    "",
    response_model=rest.DeletionList,
    responses=errors(400, 403),
    openapi_extra={"parameters": query(queries.Deletions)},
)
async def list_deletions(request: Request, _caller: Caller, state: StateDep) -> Response:
    """List the receipts of deleted scan jobs, the last requested first."""
    return await state.orchestrator.forward(request)
