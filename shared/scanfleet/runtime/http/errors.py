"""Errors that routes raise, as responses in one format."""

from __future__ import annotations

from typing import Any, Final, cast

import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from scanfleet.errors import DependencyError, PublicError, Rule, UnavailableError
from scanfleet.runtime.http.audit import record_refusal
from scanfleet.runtime.http.requests import METHODS
from scanfleet.runtime.http.responses import error_response

_MAX_ERROR_CHARS: Final = 500  # maximum length of an error message, which may quote the caller's input
_MAX_ERRORS: Final = 5  # reported per invalid request; enough to correct it in a few attempts

_log = structlog.stdlib.get_logger(__name__)


async def _public(request: Request, error: Exception) -> Response:
    public = cast(PublicError, error)
    if public.rule is not None:
        record_refusal(request, public.rule, target=public.target, reason=public.reason)
    return error_response(public.status, public.message, public.headers)


async def _dependency(request: Request, error: Exception) -> Response:
    _log.warning("dependency_unavailable", error=str(error))
    return await _public(request, UnavailableError("a dependency of the service is unavailable; try again"))


async def _http(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)
    headers = dict(http.headers or {})
    if http.status_code == 405:  # noqa: PLR2004 # the router lists the methods of one route; others may share the path
        allowed = _allowed(request) or {"GET"}  # files, which are no routes
        headers["Allow"] = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
    elif "caller" in request.scope:  # then a route was found, and the request is invalid
        record_refusal(request, Rule.REQUEST)
    return error_response(http.status_code, http.detail, headers)


def _allowed(request: Request) -> set[str]:
    return {
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    }


async def _invalid(request: Request, error: Exception) -> Response:
    problems = cast(RequestValidationError, error).errors()
    if any(problem["loc"][0] == "path" for problem in problems):
        return error_response(404, "Not Found")  # an invalid id names no object
    if "caller" in request.scope:
        record_refusal(request, Rule.REQUEST)
    if any(problem["loc"] == ("body",) for problem in problems) and not _is_json(request):
        return error_response(400, "the body must be JSON: send it with Content-Type: application/json")
    text = "; ".join(_problem(problem) for problem in problems[:_MAX_ERRORS])
    return error_response(400, text[:_MAX_ERROR_CHARS])


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _problem(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    what = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


ERROR_HANDLERS: Final = {
    PublicError: _public,
    DependencyError: _dependency,
    HTTPException: _http,
    RequestValidationError: _invalid,
}
