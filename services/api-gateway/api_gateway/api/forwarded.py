"""Routes that job-orchestrator serves: the gateway authenticates, limits and documents them, and forwards their requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.params import Depends as Dependency
from pydantic import BaseModel

from api_gateway.api.admission import Route
from api_gateway.api.openapi import ETAG, IF_NONE_MATCH, body, errors, query
from api_gateway.api.state import State
from scanfleet.contracts import queries, rest
from scanfleet.runtime.http.requests import PathId, typed
from scanfleet.security.auth import Caller

Responses = Mapping[int | str, dict[str, Any]]


@dataclass(frozen=True)
class Forwarded:
    """A route whose requests are forwarded.

    Args:
        path: below the prefix of its router; a name in braces is an id.
        name: of the operation.
        answer: model of the response.
        status: of success.
        errors: statuses of errors besides those of every route.
        query: its query parameters.
        headers: its header parameters.
        body: model of its JSON body.
        content: its body of another type, by media type.
        responses: other responses than those of `answer` and `errors`.
        dependencies: checks of the gateway.
    """

    method: str
    path: str
    name: str
    description: str
    answer: type[BaseModel]
    _: KW_ONLY
    status: int = 200
    errors: Sequence[int] = ()
    query: type[queries.Query] | None = None
    headers: Sequence[dict[str, Any]] = ()
    body: type[BaseModel] | None = None
    content: Mapping[str, Any] | None = None
    responses: Responses = field(default_factory=dict)
    dependencies: Sequence[Dependency] = ()

    def documented(self) -> dict[str, Any]:
        """Return the parts of the OpenAPI document that the framework cannot derive, since another service parses them."""
        parts: dict[str, Any] = body(self.body) if self.body else {}
        if self.content:
            parts["requestBody"] = {"required": True, "content": self.content}
        if parameters := [*(query(self.query) if self.query else ()), *self.headers]:
            parts["parameters"] = parameters
        return parts


def router_of(prefix: str, tag: str, *routes: Forwarded) -> APIRouter:
    """Return the router of these routes."""
    router = APIRouter(prefix=prefix, tags=[tag])
    for route in routes:
        ids = [Depends(_id(name)) for name in re.findall(r"{(\w+)}", route.path)]
        router.add_api_route(
            route.path,
            _documented,
            methods=[route.method],
            name=route.name,
            description=route.description,
            status_code=route.status,
            response_model=route.answer,
            responses={**route.responses, **errors(*route.errors)},
            dependencies=[*ids, *route.dependencies],
            openapi_extra=route.documented(),
            # The framework's handler would cost more than a tenth of a forwarded request, and only checks the dependencies.
            route_class_override=Route if route.dependencies else _ForwardedRoute,
        )
    return router


def _id(name: str) -> Any:
    @typed(id_=Annotated[PathId, Path(alias=name)])
    async def with_id(id_: int) -> None:
        """Document and check the id."""

    return with_id


async def _forward(request: Request) -> Response:
    return await cast(State, request.app.state.gateway).orchestrator.forward(request)


async def _documented(request: Request, _caller: Caller) -> Response:
    return await _forward(request)


class _ForwardedRoute(Route):
    """A route without any check besides those of `Route`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return _forward


TASKS: Final = router_of(
    "/api/v1/task",
    "task",
    Forwarded(
        "GET",
        "",
        "list_tasks",
        "List the caller's scan jobs, pending ones first, then by start, the latest first.",
        rest.JobList,
        errors=(400, 403),
        query=queries.Tasks,
    ),
    Forwarded(
        "GET",
        "/{job_id}",
        "read_task",
        "Read the current state and progress of a scan job.",
        rest.TaskStatus,
        errors=(404,),
    ),
    Forwarded(
        "DELETE",
        "/{job_id}",
        "delete_task",
        "Delete a scan job that has ended, with its results and ledger.",
        rest.Done,
        errors=(404, 409),
    ),
    Forwarded(
        "GET",
        "/{job_id}/ledger",
        "read_ledger",
        "Read the outcomes of all probes of a scan job, and the list of addresses that were not completely probed.",
        rest.Ledger,
        errors=(400, 404, 413),
        query=queries.Ledger,
    ),
    Forwarded(
        "GET",
        "/{job_id}/snapshot",
        "read_snapshot",
        "Read the subnet and policy of a scan job as they were when it was created.",
        rest.JobSnapshot,
        errors=(404,),
    ),
    Forwarded(
        "GET",
        "/{job_id}/map",
        "read_map",
        "Read the outcome of each address or chunk of a scan job as one letter, for each block of its ports.",
        rest.CoverageMap,
        errors=(400, 404, 413),
        query=queries.Map,
        headers=(IF_NONE_MATCH,),
        responses={
            200: {"headers": ETAG},
            304: {"description": "The map has not changed since the one of `If-None-Match`.", "headers": ETAG},
        },
    ),
    Forwarded(
        "GET",
        "/{job_id}/waiting",
        "read_waiting",
        "Read why a scan job does not progress: its queued chunks, and the reasons for which they wait.",
        rest.Waiting,
        errors=(404,),
    ),
)
DELETIONS: Final = router_of(
    "/api/v1/deletion",
    "task",
    Forwarded(
        "GET",
        "",
        "list_deletions",
        "List the receipts of deleted scan jobs, the last requested first.",
        rest.DeletionList,
        errors=(400, 403),
        query=queries.Deletions,
    ),
)
SUBNETS: Final = router_of(
    rest.SUBNETS.path,
    rest.SUBNETS.name,
    Forwarded(
        "POST",
        "/import",
        "import_subnets",
        "Create or change a subnet for each line of a CSV file; a file with an invalid line is rejected as a whole.\n\n"
        "Existing equal subnets are not created again, so the request is idempotent.",
        rest.SubnetsImported,
        status=201,
        errors=(400, 409, 413),
        query=queries.SubnetImport,
        content={
            "text/csv": {
                "schema": {
                    "type": "string",
                    "description": "UTF-8. The first line names the columns `name`, `cidr` and, optionally, `exclude`, in which "
                    f"semicolons separate networks; at most {rest.MAX_IMPORT_LINES:,} lines follow.",
                },
                "example": "name,cidr,exclude\nlab,127.9.8.0/24,127.9.8.128/25;127.9.8.1\n",
            }
        },
        responses={200: {"model": rest.SubnetImportCheck, "description": "The verdicts of a dry run."}},
    ),
    Forwarded(
        "GET",
        "/{subnet_id}/retention",
        "read_subnet_retention",
        "Read how long jobs of a subnet are kept after their end.",
        rest.SubnetRetention,
        errors=(404,),
    ),
    Forwarded(
        "PUT",
        "/{subnet_id}/retention",
        "replace_subnet_retention",
        "Replace how long jobs of a subnet are kept after their end. A replacement of the subnet does not change it.",
        rest.SubnetRetention,
        errors=(400, 404, 413),
        body=rest.SubnetRetentionBody,
    ),
)
AUDIT: Final = router_of(
    "/api/v1/audit",
    "audit",
    Forwarded(
        "GET",
        "",
        "list_audit",
        "List changes and refusals, newest first; for administrators.",
        rest.AuditList,
        errors=(400, 403),
        query=queries.Audit,
    ),
)
REVOCATIONS: Final = router_of(
    "/api/v1/revocation",
    "revocation",
    Forwarded(
        "GET",
        "",
        "list_revocations",
        "List the revocations that are in force, newest first; for administrators.",
        rest.RevocationList,
        errors=(400, 403),
        query=queries.Page,
    ),
    Forwarded(
        "POST",
        "",
        "create_revocation",
        "Revoke one token, or all tokens of a user that were issued before a time; for administrators.\n\n"
        "Every gateway refuses them within five seconds; a gateway that cannot read the revocations refuses all tokens after 60. A\n"
        "revocation expires after 31 days, when all of its tokens have.",
        rest.Revocation,
        status=201,
        errors=(400, 403, 409, 413),
        body=rest.RevocationBody,
    ),
    Forwarded(
        "DELETE",
        "/{revocation_id}",
        "delete_revocation",
        "Accept the tokens of a revocation again; for administrators.",
        rest.Done,
        errors=(403, 404),
    ),
)
