"""Routes of resources; requests are forwarded to job-orchestrator."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from api_gateway.api import forwarded
from api_gateway.api.forwarded import Forwarded
from api_gateway.api.keys import sent_key
from api_gateway.api.openapi import IF_MATCH, TAGGED
from scanfleet.contracts import queries, rest


def router_of(resource: rest.Resource[rest.NamedBody, BaseModel, BaseModel]) -> APIRouter:
    """Return the routes that list, create, read, replace and delete the objects of a resource."""
    name, one = resource.name, f"/{{{resource.id_name}}}"
    return forwarded.router_of(
        resource.path,
        name,
        Forwarded(
            "GET",
            "",
            f"list_{resource.plural}",
            f"List the caller's {resource.plural}, newest first.",
            resource.listed,
            errors=(400,),
            query=queries.Page,
        ),
        Forwarded(
            "POST",
            "",
            f"create_{name}",
            f"Create a {name}.",
            resource.answer,
            status=201,
            errors=(400, 413),
            body=resource.body,
            responses=TAGGED[201],
            dependencies=[Depends(sent_key)],
        ),
        Forwarded("GET", one, f"read_{name}", f"Read a {name}.", resource.answer, errors=(404,), responses=TAGGED[200]),
        Forwarded(
            "PUT",
            one,
            f"replace_{name}",
            f"Replace a {name} as a whole{resource.replacing and f'; {resource.replacing}'}.",
            resource.answer,
            errors=(400, 404, 412, 413),
            headers=(IF_MATCH,),
            body=resource.body,
            responses=TAGGED[200],
        ),
        Forwarded(
            "DELETE",
            one,
            f"delete_{name}",
            f"Delete a {name}{resource.deletable and f' {resource.deletable}'}.",
            rest.Done,
            errors=(404, 409) if resource.deletable else (404,),
        ),
    )
