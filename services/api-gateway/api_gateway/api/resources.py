"""Routes of resources; requests are forwarded to job-orchestrator."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel

from api_gateway.api.admission import Route
from api_gateway.api.keys import sent_key
from api_gateway.api.openapi import IF_MATCH, TAGGED, body, errors, query
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.runtime.http.requests import PathId, typed
from scanfleet.security.auth import Caller


def router_of(resource: rest.Resource[rest.NamedBody, BaseModel, BaseModel]) -> APIRouter:
    """Return the routes that list, create, read, replace and delete the objects of a resource."""
    name = resource.name
    router = APIRouter(prefix=resource.path, tags=[name], route_class=Route)

    @typed(id_=Annotated[PathId, Path(alias=resource.id_name)])
    async def with_id(id_: int) -> None:
        """Document and check the id."""

    of_all = partial(router.add_api_route, "", _forward)
    of_one = partial(router.add_api_route, f"/{{{resource.id_name}}}", _forward, dependencies=[Depends(with_id)])
    of_all(
        methods=["GET"],
        name=f"list_{resource.plural}",
        description=f"List the caller's {resource.plural}, newest first.",
        response_model=resource.listed,
        responses=errors(400),
        openapi_extra={"parameters": query(queries.Page)},
    )
    of_all(
        methods=["POST"],
        name=f"create_{name}",
        description=f"Create a {name}.",
        status_code=201,
        response_model=resource.answer,
        dependencies=[Depends(sent_key)],
        responses=TAGGED[201] | errors(400, 413),
        openapi_extra=body(resource.body),
    )
    of_one(
        methods=["GET"],
        name=f"read_{name}",
        description=f"Read a {name}.",
        response_model=resource.answer,
        responses=TAGGED[200] | errors(404),
    )
    of_one(
        methods=["PUT"],
        name=f"replace_{name}",
        description=f"Replace a {name} as a whole{resource.replacing and f'; {resource.replacing}'}.",
        response_model=resource.answer,
        responses=TAGGED[200] | errors(400, 404, 412, 413),
        openapi_extra=body(resource.body) | {"parameters": [IF_MATCH]},
    )
    of_one(
        methods=["DELETE"],
        name=f"delete_{name}",
        description=f"Delete a {name}{resource.deletable and f' {resource.deletable}'}.",
        response_model=rest.Done,
        responses=errors(404, 409) if resource.deletable else errors(404),
    )
    return router


async def _forward(request: Request, _caller: Caller, state: StateDep) -> Response:
    return await state.orchestrator.forward(request)
