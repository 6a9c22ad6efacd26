"""Parts of the OpenAPI document for requests that the gateway forwards without parsing them."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from scanfleet.contracts import queries, rest

_NULL: Final = {"type": "null"}  # of a parameter that is missing, which no caller sends
_RETRY_AFTER: Final = {
    "Retry-After": {
        "description": "Seconds until the request may be repeated.",
        "schema": {"type": "integer", "minimum": 1},
    },
}
_REQUEST_ID: Final = {
    "X-Request-ID": {"description": "Id of this request in all logs.", "schema": {"type": "string"}},
}


ETAG: Final = {
    "ETag": {"description": "Identifies this state of the object.", "schema": {"type": "string"}},
}
TAGGED: Final[dict[int, dict[int | str, dict[str, Any]]]] = {
    status: {status: {"headers": ETAG}} for status in (200, 201)
}
"""Responses with an `ETag`, by the status of success."""

_ERRORS: Final[dict[int, str]] = {
    400: "The request is malformed or invalid; the error names the reason.",
    401: "The bearer token is missing or invalid.",
    403: "The object belongs to another user, the operation is for administrators, or no user grant covers the scan.",
    404: "The object does not exist, or belongs to another user.",
    409: "The state of the object does not allow the operation.",
    412: "The object has changed since it was read: its `ETag` is not the one in `If-Match`.",
    413: "The body or the response is too large.",
    429: "The caller has reached a limit: requests per minute, concurrent requests, or unfinished jobs; the error names it.",
    500: "Internal error.",
    503: "A dependency is unavailable or overloaded; the request may be repeated.",
}
_HEADERS: Final[dict[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def server_sent(description: str) -> dict[str, Any]:
    """Return the schema of a stream: tools apply it to the whole text or, since OpenAPI 3.2, to each event."""
    fields = {"event": "string", "data": "string", "id": "string", "retry": "integer"}
    event = {"type": "object", "properties": {name: {"type": type_} for name, type_ in fields.items()}}
    return {"anyOf": [{"type": "string", "description": description}, event]}


def errors(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route: the given ones, and those of every route; `guarded` if it requires a token."""
    always = {401, 429, 500, 503} if guarded else {500, 503}
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": rest.Error, "description": _ERRORS[status], "headers": _REQUEST_ID | _HEADERS.get(status, {})}
        for status in sorted({*statuses, *always})
    }
    # With a default the framework does not document a 422, which is never sent.
    answers["default"] = {"model": rest.Error, "description": "Any other error.", "headers": _REQUEST_ID}
    return answers


def body(model: type[BaseModel]) -> dict[str, Any]:
    """Return a JSON body that another service parses. Its schema refers only to models of some response of the API."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def query(model: type[queries.Query]) -> list[dict[str, Any]]:
    """Return the query parameters of a route, which another service parses."""
    return [_parameter(name, schema) for name, schema in model.model_json_schema()["properties"].items()]


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    description = " ".join(schema.pop("description").split())
    del schema["title"]
    if schema["default"] in (None, []):
        del schema["default"]
    match [each for each in schema.pop("anyOf", []) if each != _NULL]:
        case [only]:
            schema |= only
        case [_, *_] as several:
            schema["anyOf"] = several
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _header(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": description,
    }


IF_MATCH: Final = _header(
    "If-Match",
    "The `ETag` of the object as the caller has read it. If it has changed since, the response is 412, unless the object already "
    "equals the result of the request. A request whose response was lost can therefore be repeated.",
)
IF_NONE_MATCH: Final = _header(
    "If-None-Match", "The `ETag` of the caller's copy; the response is 304 if the object has not changed."
)
