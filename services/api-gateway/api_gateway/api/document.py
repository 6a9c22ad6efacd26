"""Parts of the OpenAPI document for requests that the gateway forwards without parsing them."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, TypeAdapter

from scanfleet import rest

_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
}
_REQUEST_ID: Final = {
    "X-Request-ID": {"description": "Names this request in every log.", "schema": {"type": "string"}},
}


def _schema(type_: Any) -> dict[str, Any]:
    return TypeAdapter(type_).json_schema()


ID: Final = _schema(rest.QueryId)
TIME: Final = _schema(rest.InputTime)
TEXT: Final = {"type": "string", "maxLength": 200}

ETAG: Final = {
    "ETag": {"description": "Names this state of the thing.", "schema": {"type": "string"}},
}
TAGGED: Final[dict[int, dict[int | str, dict[str, Any]]]] = {
    status: {status: {"headers": ETAG}} for status in (200, 201)
}
"""By the status of a success, an answer with an `ETag`."""

_ERRORS: Final[dict[int, str]] = {
    400: "The request is malformed or invalid; the error says how.",
    401: "There is no bearer token, or not a good one.",
    403: "It belongs to another user, or is for administrators.",
    404: "There is no such thing, or it is not yours.",
    409: "Its state does not allow this.",
    412: "It has changed since it was read: its `ETag` is no longer the one in `If-Match`.",
    413: "The body or the answer is too large.",
    429: "A limit of the caller's is reached, of requests a minute or at once, or of unfinished jobs; the error names it.",
    500: "A fault of the service.",
    503: "A part of the service is unavailable or busy; the request may be repeated.",
}
_HEADERS: Final[dict[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def errors(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route: the given ones, and those that any route can have; `guarded` if it wants a token."""
    always = {401, 429, 500, 503} if guarded else {500, 503}
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": rest.Error, "description": _ERRORS[status], "headers": _REQUEST_ID | _HEADERS.get(status, {})}
        for status in sorted({*statuses, *always})
    }
    # Named so that the framework does not document a 422, which is never sent.
    answers["default"] = {"model": rest.Error, "description": "Any other error.", "headers": _REQUEST_ID}
    return answers


def body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body that another service reads. Its schema refers only to models that some answer of the API has too."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def paging(largest: Any = rest.PageSize, size: int = 10) -> list[dict[str, Any]]:
    """The query parameters of a list."""
    return [
        query("page", {**_schema(rest.Page), "default": 1}, "Which page, the first being 1."),
        query("page_size", {**_schema(largest), "default": size}, "How many on a page."),
    ]


def query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    """An optional query parameter."""
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
    "If-Match", "The `ETag` of what the caller has read: if it has changed since, the answer is 412."
)
IF_NONE_MATCH: Final = _header(
    "If-None-Match", "The `ETag` of what the caller has; the answer is 304 if it is still that."
)
