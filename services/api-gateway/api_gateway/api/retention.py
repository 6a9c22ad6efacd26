"""Routes of the retention of a subnet's jobs; requests are forwarded to job-orchestrator."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import body, errors
from api_gateway.api.state import StateDep
from scanfleet.contracts import rest
from scanfleet.runtime.http.requests import PathId
from scanfleet.security.auth import Caller

router = APIRouter(prefix=f"{rest.SUBNETS.path}/{{subnet_id}}/retention", tags=[rest.SUBNETS.name], route_class=Route)


@router.get("", response_model=rest.SubnetRetention, responses=errors(404))
async def read_subnet_retention(subnet_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:  # noqa: ARG001 # documents the path
    """Read how long jobs of a subnet are kept after their end."""
    return await state.orchestrator.forward(request)


@router.put(
    "",
    response_model=rest.SubnetRetention,
    responses=errors(400, 404, 413),
    openapi_extra=body(rest.SubnetRetentionBody),
)
async def replace_subnet_retention(subnet_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:  # noqa: ARG001 # documents the path
    """Replace how long jobs of a subnet are kept after their end. A replacement of the subnet does not change it."""
    return await state.orchestrator.forward(request)
