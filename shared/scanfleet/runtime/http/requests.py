"""Values that routes read from a request: ids in its path, its query as a model, its source."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Final, TypeVar, get_origin

from fastapi import Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from scanfleet.contracts.messages.fields import MAX_ID, is_id

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _decimal(text: str) -> str:
    if not is_id(text):
        raise ValueError("not an id")
    return text


PathId = Annotated[int, Field(ge=1, le=MAX_ID), BeforeValidator(_decimal), Path()]
"""An id in a path, in canonical form; anything else is answered 404."""


_Model = TypeVar("_Model", bound=BaseModel)
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def typed(**types: Any) -> Callable[[_Endpoint], _Endpoint]:
    """Decorate a route or dependency defined in a function: the framework resolves names in annotations of the module only."""

    def typing(endpoint: _Endpoint) -> _Endpoint:
        endpoint.__annotations__.update(types)
        return endpoint

    return typing


def source(request: Request) -> str:
    """Return the source address of the request as determined by the server."""
    return request.client.host if request.client else ""


def parsed(model: type[BaseModel]) -> Any:
    """Return a dependency that parses the query parameters, see `parse_query`."""

    async def parse(request: Request) -> BaseModel:
        return parse_query(request, model)

    return Depends(parse)


def parse_query(request: Request, model: type[_Model]) -> _Model:
    """Return the query parameters of a request as `model`, whose tuples are lists.

    The values of a list are sent as `name=a&name=b`, as `name[]=a&name[]=b` or as `name=a,b`.

    Raises:
        RequestValidationError: a value is invalid.
    """
    query = request.query_params
    given: dict[str, Any] = {}
    for name, is_list in _lists(model).items():
        if is_list:
            texts = query.getlist(name) + query.getlist(f"{name}[]")
            given[name] = [word for text in texts for word in text.split(",")]
        elif name in query:
            given[name] = query[name]
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("query", *each["loc"])} for each in error.errors()]) from error


@cache
def _lists(model: type[BaseModel]) -> dict[str, bool]:
    """Return whether each parameter of the model is a list, by name."""
    return {field.alias or name: get_origin(field.annotation) is tuple for name, field in model.model_fields.items()}
