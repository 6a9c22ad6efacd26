"""Policies of job-orchestrator; requests are forwarded."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.document import IF_MATCH, TAGGED, body, errors, paging
from api_gateway.api.state import Handed
from scanfleet import rest
from scanfleet.auth import Caller
from scanfleet.service import PathId

router = APIRouter(prefix="/api/v1/policy", tags=["policy"], route_class=Route)


@router.get(
    "",
    response_model=rest.PolicyList,
    responses=errors(400),
    openapi_extra={"parameters": paging()},
)
async def list_policies(request: Request, _caller: Caller, state: Handed) -> Response:
    """List the caller's policies, newest first."""
    return await state.orchestrator.forward(request)


@router.post(
    "",
    status_code=201,
    response_model=rest.Policy,
    responses=TAGGED[201] | errors(400, 413),
    openapi_extra=body(rest.PolicyBody),
)
async def create_policy(request: Request, _caller: Caller, state: Handed) -> Response:
    """Create a policy."""
    return await state.orchestrator.forward(request)


@router.get("/{policy_id}", response_model=rest.Policy, responses=TAGGED[200] | errors(404))
async def read_policy(policy_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Read a policy."""
    return await state.orchestrator.forward(request)


@router.put(
    "/{policy_id}",
    response_model=rest.Policy,
    responses=TAGGED[200] | errors(400, 404, 412, 413),
    openapi_extra=body(rest.PolicyBody) | {"parameters": [IF_MATCH]},
)
async def replace_policy(policy_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Replace a policy as a whole; existing jobs keep the previous one."""
    return await state.orchestrator.forward(request)


@router.delete("/{policy_id}", response_model=rest.Done, responses=errors(404))
async def delete_policy(policy_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Delete a policy."""
    return await state.orchestrator.forward(request)
