"""The import of subnets into job-orchestrator; requests are forwarded."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from api_gateway.api.admission import Route
from api_gateway.api.openapi import errors, query
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.security.auth import Caller

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

router = APIRouter(prefix=rest.SUBNETS.path, tags=[rest.SUBNETS.name], route_class=Route)


@router.post(
    "/import",
    status_code=201,
    response_model=rest.SubnetsImported,
    responses={
        200: {"model": rest.SubnetImportCheck, "description": "The verdicts of a dry run."},
        **errors(400, 409, 413),
    },
    openapi_extra={"requestBody": _CSV, "parameters": query(queries.SubnetImport)},
)
async def import_subnets(request: Request, _caller: Caller, state: StateDep) -> Response:
    """Create or change a subnet for each line of a CSV file; a file with an invalid line is rejected as a whole.

    Existing equal subnets are not created again, so the request is idempotent.
    """
    return await state.orchestrator.forward(request)
