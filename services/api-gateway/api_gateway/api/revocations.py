"""Revocations of tokens at job-orchestrator; requests are forwarded, and every gateway applies the list."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import body, errors, query
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.runtime.http.requests import PathId
from scanfleet.security.auth import Caller

router = APIRouter(prefix="/api/v1/revocation", tags=["revocation"], route_class=Route)


@router.get(
    "",
    response_model=rest.RevocationList,
    responses=errors(400, 403),
    openapi_extra={"parameters": query(queries.Page)},
)
async def list_revocations(request: Request, _caller: Caller, state: StateDep) -> Response:
    """List the revocations that are in force, newest first; for administrators."""
    return await state.orchestrator.forward(request)


@router.post(
    "",
    status_code=201,
    response_model=rest.Revocation,
    responses=errors(400, 403, 409, 413),
    openapi_extra=body(rest.RevocationBody),
)
async def create_revocation(request: Request, _caller: Caller, state: StateDep) -> Response:
    """Revoke one token, or all tokens of a user that were issued before a time; for administrators.

    Every gateway refuses them within five seconds; a gateway that cannot read the revocations refuses all tokens after 60. A
    revocation expires after 31 days, when all of its tokens have.
    """
    return await state.orchestrator.forward(request)


@router.delete("/{revocation_id}", response_model=rest.Done, responses=errors(403, 404))
async def delete_revocation(revocation_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:  # noqa: ARG001 # documents the path
    """Accept the tokens of a revocation again; for administrators."""
    return await state.orchestrator.forward(request)
