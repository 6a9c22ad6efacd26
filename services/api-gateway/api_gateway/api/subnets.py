"""Subnets of job-orchestrator; requests are forwarded."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.document import IF_MATCH, TAGGED, body, errors, paging, query
from api_gateway.api.state import Handed
from scanfleet import rest
from scanfleet.auth import Caller
from scanfleet.service import PathId

_CSV: Final = {
    "required": True,
    "content": {
        "text/csv": {
            "schema": {
                "type": "string",
                "description": "UTF-8. The first line names the columns `name`, `cidr` and, optionally, `exclude`, in which "
                f"semicolons separate networks; at most {rest.MAX_IMPORT_LINES:,} lines follow.",
            },
            "example": "name,cidr,exclude\nlab,127.9.8.0/24,127.9.8.128/25;127.9.8.1\n",
        }
    },
}

router = APIRouter(prefix="/api/v1/subnet", tags=["subnet"], route_class=Route)


@router.get(
    "",
    response_model=rest.SubnetList,
    responses=errors(400),
    openapi_extra={"parameters": paging()},
)
async def list_subnets(request: Request, _caller: Caller, state: Handed) -> Response:
    """List the caller's subnets, newest first."""
    return await state.orchestrator.forward(request)


@router.post(
    "",
    status_code=201,
    response_model=rest.Subnet,
    responses=TAGGED[201] | errors(400, 413),
    openapi_extra=body(rest.SubnetBody),
)
async def create_subnet(request: Request, _caller: Caller, state: Handed) -> Response:
    """Create a subnet."""
    return await state.orchestrator.forward(request)


@router.post(
    "/import",
    status_code=201,
    response_model=rest.SubnetsImported,
    responses={200: {"model": rest.SubnetImportCheck, "description": "The verdicts of a dry run."}, **errors(400, 413)},
    openapi_extra={
        "requestBody": _CSV,
        "parameters": [
            query("dry_run", {"type": "boolean", "default": False}, "Whether to check each line and create nothing.")
        ],
    },
)
async def import_subnets(request: Request, _caller: Caller, state: Handed) -> Response:
    """Create a subnet for each line of a CSV file, all or none. Existing equal subnets are not created again, so the request is idempotent."""
    return await state.orchestrator.forward(request)


@router.get("/{subnet_id}", response_model=rest.Subnet, responses=TAGGED[200] | errors(404))
async def read_subnet(subnet_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Read a subnet."""
    return await state.orchestrator.forward(request)


@router.put(
    "/{subnet_id}",
    response_model=rest.Subnet,
    responses=TAGGED[200] | errors(400, 404, 412, 413),
    openapi_extra=body(rest.SubnetBody) | {"parameters": [IF_MATCH]},
)
async def replace_subnet(subnet_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Replace a subnet as a whole; existing jobs keep the previous one."""
    return await state.orchestrator.forward(request)


@router.delete("/{subnet_id}", response_model=rest.Done, responses=errors(404, 409))
async def delete_subnet(subnet_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Delete a subnet that no unfinished job scans."""
    return await state.orchestrator.forward(request)
