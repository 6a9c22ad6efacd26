"""One way to be a service: probes, metrics, request ids and one shape for every error.

A service's `main.py` calls `create_app` with its routers and a lifespan that opens adapters and consumers, and is run by
`uvicorn --factory <package>.main:create_app`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import FrameType
from typing import Annotated, Any, Final, Literal, Protocol, cast
from uuid import uuid4

import structlog
from fastapi import APIRouter, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from pydantic import BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scanfleet import tracing
from scanfleet.audit import Refusals
from scanfleet.auth import Principal
from scanfleet.clock import utc_now
from scanfleet.errors import ConfigurationError, DependencyError, PublicError, Rule, UnavailableError
from scanfleet.messages import AuditEntry
from scanfleet.messages.audit import MAX_REASON_CHARS
from scanfleet.rest import MAX_ID

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Check = Callable[[], Awaitable[None]]

MAX_BODY_BYTES: Final = 1 << 20  # the bus carries no larger message, and no honest request is a tenth of it
MAX_BODY_S: Final = 10.0  # from the first look at a body to its end: 1 Mbit/s for the largest one
HEALTH_PERIOD_S: Final = 1.0  # between two looks at the loops; `/healthz` tells at once
CHECK_TIMEOUT_S: Final = 2.0  # of one readiness check: orchestrators ask every few seconds

_DECIMAL: Final = re.compile(r"[1-9][0-9]{0,15}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds: their access lines are noise.
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics", "/internal/revocations"})
_MAX_ERROR_CHARS: Final = 500  # an error may quote the caller, but not at length
_MAX_TARGET_CHARS: Final = 200  # of an audit entry: a path that a caller made up may be long
_MAX_ERRORS: Final = 5  # of one invalid request; enough to mend it in a few rounds

# Off, on purpose: whatever else sets a provider or an environment variable would switch it on, and it exports query
# strings and exception messages. Metrics come from here and spans from `tracing`.
_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def _decimal(text: str) -> str:
    if _DECIMAL.fullmatch(text) is None:
        raise ValueError("not an id")
    return text


PathId = Annotated[int, Field(ge=1, le=MAX_ID), BeforeValidator(_decimal), Path()]
"""An id in a path, in its one spelling; anything else there is a 404."""


_requests = Counter("scanfleet_http_requests", "HTTP requests answered.", ["method", "route", "status"])
_latency = Histogram("scanfleet_http_request_seconds", "Time to the end of the answer.", ["method", "route"])

_log = structlog.stdlib.get_logger(__name__)


class Watched(Protocol):
    """A bus, a consumer or a loop that works in the background."""

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...


class Probes:
    """What a service's health and readiness hang on; `create_app` makes it, the lifespan fills it."""

    def __init__(self) -> None:
        self._watched: list[Watched] = []
        self._checks: dict[str, Check] = {}

    def watch(self, watched: Watched) -> None:
        """Be unhealthy when this has died, and unready while it is."""
        self._watched.append(watched)

    def depend(self, name: str, check: Check) -> None:
        """Be unready while `check` raises or takes longer than `CHECK_TIMEOUT_S`."""
        self._checks[name] = check

    @property
    def healthy(self) -> bool:
        return all(watched.alive for watched in self._watched)

    async def missing(self) -> list[str]:
        """The names of what is away, `bus` when something watched cannot go on; empty when ready."""
        ready = all(watched.alive and watched.ready for watched in self._watched)
        away = await asyncio.gather(*(self._away(name, check) for name, check in self._checks.items()))
        return [name for name in away if name] + ([] if ready else ["bus"])

    @staticmethod
    async def _away(name: str, check: Check) -> str | None:
        try:
            await asyncio.wait_for(check(), CHECK_TIMEOUT_S)
        except (DependencyError, TimeoutError, OSError) as error:
            _log.warning("dependency away", dependency=name, error=str(error))
            return f"{name} ({error})" if isinstance(error, ConfigurationError) else name
        return None


def create_app(
    *,
    name: str,
    lifespan: Lifespan,
    routers: Sequence[APIRouter] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_body_seconds: float = MAX_BODY_S,
    **documents: Any,
) -> FastAPI:
    """The ASGI application of a service.

    Args:
        name: the service's name, as in the architecture.
        lifespan: opens adapters and consumers and closes them in reverse. `app.state.probes` is there to be filled, and
            `app.state.refusals` to be told to the bus.
        routers: the service's own routes.
        max_body_bytes: a request with more is answered 413.
        max_body_seconds: one that takes longer to come is answered 408.
        documents: what FastAPI takes to describe the API (`title`, `openapi_url`, ...). Without it nothing is published.
    """
    app = FastAPI(
        **({"title": name, "openapi_url": None} | documents),
        lifespan=_watched(lifespan),
        telemetry=_TELEMETRY,
        redirect_slashes=False,  # a path with a slash too many is an unknown one, and a redirect would drop the body
        middleware=[Middleware(_Front, max_body_bytes=max_body_bytes, max_body_seconds=max_body_seconds)],
        exception_handlers={
            PublicError: _public,
            DependencyError: _dependency,
            HTTPException: _http,
            RequestValidationError: _invalid,
        },
    )
    app.state.probes = Probes()
    app.state.refusals = Refusals(name)
    app.include_router(_probes)
    for router in routers:
        app.include_router(router)
    return app


def _watched(lifespan: Lifespan) -> Lifespan:
    """The same lifespan in a process that ends when it can do no more good, so that its supervisor replaces it."""

    @asynccontextmanager
    async def watched(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app):
            watching = asyncio.create_task(_end_when_unhealthy(app.state.probes))
            try:
                yield
            finally:
                watching.cancel()
                await tracing.stop()

    return watched


async def _end_when_unhealthy(probes: Probes) -> None:
    while probes.healthy:  # noqa: ASYNC110 # many parts are looked at, and none of them can tell that it died
        await asyncio.sleep(HEALTH_PERIOD_S)
    _log.critical("a consumer loop has died: this process ends, to be started anew")
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def when_told_to_end(call: Callable[[], None]) -> Iterator[None]:
    """Call this too when the process is told to end (SIGTERM), before the server waits for the answers under way to end."""
    loop = asyncio.get_running_loop()
    server = signal.getsignal(signal.SIGTERM)

    def told(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        if callable(server):
            server(number, frame)

    signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, server)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """The one shape of every error. ASCII only, so that no text a caller sent can break the encoding."""
    return Response(json.dumps({"error": message}), status, headers, "application/json")


_probes = APIRouter(include_in_schema=False)


@_probes.get("/healthz")
async def _healthz(request: Request) -> Response:
    if not cast(Probes, request.app.state.probes).healthy:
        return error_response(503, "a loop has died")
    return Response('{"status":"ok"}', media_type="application/json")


@_probes.get("/readyz")
async def _readyz(request: Request) -> Response:
    if missing := await cast(Probes, request.app.state.probes).missing():
        return error_response(503, f"away: {', '.join(missing)}")
    return Response('{"status":"ok"}', media_type="application/json")


@_probes.get("/metrics")
async def _metrics() -> Response:
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def source(request: Request) -> str:
    """The address that the request came from, as the server knows it."""
    return request.client.host if request.client else ""


def audit_entry(
    request: Request,
    decision: Literal["allowed", "refused"],
    *,
    rule: Rule | None = None,
    target: str = "",
    reason: str = "",
) -> AuditEntry:
    """What the audit log is told of this request; its path is the target unless that is named."""
    caller = cast(Principal | None, request.scope.get("caller"))
    return AuditEntry(
        id=uuid4().hex,
        time=utc_now(),
        service=cast(Refusals, request.app.state.refusals).service,
        subject=str(caller.user_id) if caller else "",
        source=source(request),
        action=request.scope["route"].name,
        target=(target or request.scope["path"])[:_MAX_TARGET_CHARS],
        decision=decision,
        rule=rule or "",
        reason=reason[:MAX_REASON_CHARS],
        request_id=request.scope["request_id"],
    )


def _refused(request: Request, rule: Rule, target: str = "", reason: str = "") -> None:
    entry = audit_entry(request, "refused", rule=rule, target=target, reason=reason)
    cast(Refusals, request.app.state.refusals).add(entry)


async def _public(request: Request, error: Exception) -> Response:
    public = cast(PublicError, error)
    if public.rule is not None:
        _refused(request, public.rule, public.target, public.reason)
    return error_response(public.status, public.message, public.headers)


async def _dependency(request: Request, error: Exception) -> Response:
    _log.warning("dependency away", error=str(error))
    return await _public(request, UnavailableError("a part of the service is away; try again"))


async def _http(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)
    headers = dict(http.headers or {})
    if http.status_code == 405:  # noqa: PLR2004 # the router names the methods of one route; others may share the path
        headers["Allow"] = ", ".join(sorted(_allowed(request)))
    elif "caller" in request.scope:  # then a route was found, and what is wrong is the request
        _refused(request, Rule.REQUEST)
    return error_response(http.status_code, http.detail, headers)


def _allowed(request: Request) -> set[str]:
    return {
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    }


async def _invalid(request: Request, error: Exception) -> Response:
    problems = cast(RequestValidationError, error).errors()
    if any(problem["loc"][0] == "path" for problem in problems):
        return error_response(404, "Not Found")  # an id that cannot be one names nothing
    if "caller" in request.scope:
        _refused(request, Rule.REQUEST)
    text = "; ".join(_problem(problem) for problem in problems[:_MAX_ERRORS])
    return error_response(400, text[:_MAX_ERROR_CHARS])


def _problem(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    what = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


class _Front:
    """What happens to every request first and last: its ids, its size limit, its metrics and its last resort."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_body_seconds: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_body_seconds = max_body_seconds
        self._too_large = f"a request has at most {max_body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if _REQUEST_ID.fullmatch(request_id) is None:
            request_id = uuid4().hex
        traceparent = headers.get(b"traceparent", b"").decode("latin-1")
        tracing_it = (
            tracing.within(traceparent)
            if scope["path"] in _QUIET
            else tracing.span(scope["method"], traceparent, "server")
        )
        scope["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with tracing_it as span, structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
                    await error_response(413, self._too_large)(scope, receive, send_with_id)
                else:
                    await self._app(scope, self._limited(receive), send_with_id)
            except Exception:
                _log.exception("request failed", method=scope["method"], path=scope["path"])
                if status:
                    raise  # an answer is under way: the server must cut it off, so that it does not look whole
                await error_response(500, "Internal Server Error")(scope, receive, send_with_id)
            finally:
                self._account(scope, status, time.perf_counter() - started, span)

    def _limited(self, receive: Receive) -> Receive:
        # The framework's own limit answers in plain text, whatever the handlers say.
        left = self._max_body_bytes
        until: float | None = None
        ended = False

        async def limited() -> Message:
            nonlocal left, until, ended
            if ended:
                return await receive()  # waits for the client to go
            until = until or asyncio.get_running_loop().time() + self._max_body_seconds
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                # What comes after all is not a next request.
                raise HTTPException(408, "the body came too slowly", {"Connection": "close"}) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._too_large)
            ended = not message.get("more_body", False)
            return message

        return limited

    @staticmethod
    def _account(scope: Scope, status: int, seconds: float, span: tracing.Span) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        _requests.labels(method, route, status).inc()
        _latency.labels(method, route).observe(seconds)
        if span.is_recording():
            span.update_name(f"{method} {route}")
            span.set_attributes(
                {"http.request.method": method, "http.route": route, "http.response.status_code": status},
            )
        if route not in _QUIET:
            _log.info("request", method=method, path=scope["path"], status=status, ms=round(seconds * 1000, 1))
