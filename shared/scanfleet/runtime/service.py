"""The HTTP runtime of all services: probes, metrics, request ids and one format for all errors.

A service's `main.py` calls `create_app` with its routers and a lifespan that opens adapters and consumers; `scanfleet.runtime.server` runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import FrameType
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, cast, get_origin
from uuid import uuid4

import structlog
from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.audit import MAX_REASON_CHARS, MAX_TARGET_CHARS
from scanfleet.contracts.messages.fields import MAX_ID
from scanfleet.contracts.rest import BODY_LIMITS, MAX_BODY_BYTES
from scanfleet.errors import ConfigurationError, DependencyError, PublicError, Rule, UnavailableError
from scanfleet.runtime import tracing
from scanfleet.runtime.connection_limits import ConnectionLimits
from scanfleet.runtime.proxies import Proxies
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.runtime.startup import Startup

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Check = Callable[[], Awaitable[None]]

MAX_BODY_SECONDS: Final = 10.0  # timeout from the first byte of a body to its last: 50 kbit/s for the largest one
HEALTH_PERIOD_SECONDS: Final = 1.0  # interval of checks of the loops; `/healthz` reports at once
CHECK_TIMEOUT_SECONDS: Final = 2.0  # timeout of one readiness check: container orchestrators probe every few seconds

_DECIMAL: Final = re.compile(r"[1-9][0-9]{0,15}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probed every few seconds, so their access lines are omitted.
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics", "/internal/ready", "/internal/revocations"})
_MAX_ERROR_CHARS: Final = 500  # maximum length of an error message, which may quote the caller's input
_DISCONNECTED: Final = 499  # in logs and metrics, as proxies record it: the client has disconnected
_MAX_ERRORS: Final = 5  # reported per invalid request; enough to correct it in a few attempts

# FastAPI's own telemetry stays off: a provider or environment variable set elsewhere would enable it, and it exports
# query strings and exception messages. Metrics are defined here and spans in `tracing`.
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
"""An id in a path, in canonical form; anything else is answered 404."""


_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def typed(**types: Any) -> Callable[[_Endpoint], _Endpoint]:
    """Decorate a route or dependency defined in a function: the framework resolves names in annotations of the module only."""

    def typing(endpoint: _Endpoint) -> _Endpoint:
        endpoint.__annotations__.update(types)
        return endpoint

    return typing


_REQUESTS: Final = Counter("scanfleet_http_requests_total", "HTTP requests answered.", ["method", "route", "status"])
_LATENCY: Final = Histogram("scanfleet_http_request_seconds", "Time to the end of the response.", ["method", "route"])

_log = structlog.stdlib.get_logger(__name__)


class Watched(Protocol):
    """A bus, consumer or loop that runs in the background."""

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...


class Refusals(Protocol):
    """The record of refused requests, for the audit log."""

    service: str

    def add(self, entry: AuditEntry) -> None: ...


class _Caller(Protocol):
    """The authenticated caller, in `scope["caller"]`."""

    @property
    def user_id(self) -> int: ...


class Probes:
    """The conditions of a service's health and readiness; `create_app` creates it, the lifespan fills it."""

    def __init__(self) -> None:
        self.stage = ""
        """`starting` or `ending` while the process takes no requests; the server sets it."""

        self._watched: list[Watched] = []
        self._checks: dict[str, Check] = {}

    def watch(self, watched: Watched) -> None:
        """Add a background part: the service is unhealthy once it has died, and unready while it is unready."""
        self._watched.append(watched)

    def depend(self, name: str, check: Check) -> None:
        """Add a dependency: the service is unready while `check` raises or takes longer than `CHECK_TIMEOUT_SECONDS`."""
        self._checks[name] = check

    @property
    def healthy(self) -> bool:
        return all(watched.alive for watched in self._watched)

    async def missing(self) -> list[str]:
        """Return the names of unavailable dependencies, `bus` for a background part; empty when ready."""
        ready = all(watched.alive and watched.ready for watched in self._watched)
        away = await asyncio.gather(*(self._away(name, check) for name, check in self._checks.items()))
        return [name for name in away if name] + ([] if ready else ["bus"])

    @staticmethod
    async def _away(name: str, check: Check) -> str | None:
        try:
            await asyncio.wait_for(check(), CHECK_TIMEOUT_SECONDS)
        except (DependencyError, TimeoutError, OSError) as error:
            _log.warning("dependency_unavailable", dependency=name, error=str(error))
            return f"{name} ({error})" if isinstance(error, ConfigurationError) else name
        return None


def create_app(
    *,
    name: str,
    settings: ConnectionSettings,
    lifespan: Lifespan,
    refusals: Refusals,
    routers: Sequence[APIRouter] = (),
    public: bool = False,
    max_body_seconds: float = MAX_BODY_SECONDS,
    **documents: Any,
) -> FastAPI:
    """Create the ASGI application of a service.

    Args:
        name: the service's name.
        settings: limits of connections and requests.
        lifespan: opens adapters and consumers and closes them in reverse. It registers them at `app.state.probes`
            and waits for dependencies with `app.state.startup`.
        refusals: the record of refused requests.
        routers: the service's own routes.
        public: the service is exposed to clients, so it assigns every request id itself. A service behind the gateway
            keeps the id that a trusted proxy, the gateway, sends.
        max_body_seconds: timeout of a request body; a slower one is answered 408.
        documents: FastAPI's arguments that describe the API (`title`, `openapi_url`, ...). Without it no document is
            served.
    """
    startup = Startup()
    app = FastAPI(
        **(_BASICS | {"title": name} | documents),
        lifespan=_watched(lifespan, settings),
        middleware=[
            Middleware(
                _Outermost,
                proxies=Proxies(settings.trusted_proxies),
                public=public,
                max_body_seconds=max_body_seconds,
            ),
            Middleware(_Opened, startup=startup),
        ],
    )
    app.state.settings = settings
    app.state.startup = startup
    app.state.probes = Probes()
    app.state.probes.watch(startup)
    app.state.refusals = refusals
    for router in routers:
        app.include_router(router)
    return app


def create_probes(app: FastAPI) -> FastAPI:
    """Create the application that serves a service's probes and metrics on a separate port.

    Args:
        app: the result of `create_app`.
    """
    probes = FastAPI(
        **_BASICS,
        middleware=[Middleware(_Outermost, proxies=Proxies(()), public=True, max_body_seconds=MAX_BODY_SECONDS)],
    )
    probes.state = app.state
    probes.include_router(_probes)
    return probes


def _watched(
    lifespan: Lifespan, settings: ConnectionSettings
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Add the server's limits to the lifespan, and end an unhealthy process so that it is restarted."""

    @asynccontextmanager
    async def watched(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with cast(Startup, app.state.startup).opening(lifespan(app)):
            watching = asyncio.create_task(_end_when_unhealthy(app.state.probes))
            try:
                yield {"connection_limits": ConnectionLimits(settings)}  # read by the server for every connection
            finally:
                watching.cancel()
                await tracing.stop()

    return watched


async def _end_when_unhealthy(probes: Probes) -> None:
    while probes.healthy:  # noqa: ASYNC110 # many parts are checked, and none of them signals its death
        await asyncio.sleep(HEALTH_PERIOD_SECONDS)
    _log.critical(
        "process_unhealthy",
        cause="a background loop died",
        next_step="the process shuts down, and the supervisor restarts it",
    )
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """Also call `call` on SIGTERM, before the server waits for responses in progress."""
    loop = asyncio.get_running_loop()
    server = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        if callable(server):
            server(number, frame)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, server)


class AsciiJSON(JSONResponse):
    """A response of printable ASCII JSON: control, C1 and bidirectional characters of callers and hosts are escaped."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content).encode()


def ascii_json(content: Any) -> str:
    """Encode `content` as printable ASCII JSON."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response in the common format of all errors."""
    return AsciiJSON({"error": message}, status, headers)


_probes = APIRouter()


@_probes.get("/healthz")
async def _healthz(request: Request) -> Response:
    if not cast(Probes, request.app.state.probes).healthy:
        return error_response(503, "a loop has died")
    return Response('{"status":"ok"}', media_type="application/json")


@_probes.get("/readyz")
async def readiness(request: Request) -> Response:
    """Answer whether the service is ready."""
    if starting := cast(Startup, request.app.state.startup).missing:
        return error_response(503, f"starting, waiting for {starting}")
    if stage := cast(Probes, request.app.state.probes).stage:
        return error_response(503, stage)
    if missing := await cast(Probes, request.app.state.probes).missing():
        return error_response(503, f"unavailable: {', '.join(missing)}")
    return Response('{"status":"ok"}', media_type="application/json")


@_probes.get("/metrics")
async def _metrics() -> Response:
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def source(request: Request) -> str:
    """Return the source address of the request as determined by the server."""
    return request.client.host if request.client else ""


def parsed(model: type[BaseModel]) -> Any:
    """Return a dependency that parses the query parameters as `model`, whose tuples are lists.

    The values of a list are sent as `name=a&name=b`, as `name[]=a&name[]=b` or as `name=a,b`.
    """
    fields = {field.alias or name: get_origin(field.annotation) is tuple for name, field in model.model_fields.items()}

    async def parse(request: Request) -> BaseModel:
        query = request.query_params
        given: dict[str, Any] = {}
        for name, is_list in fields.items():
            if is_list:
                texts = query.getlist(name) + query.getlist(f"{name}[]")
                given[name] = [word for text in texts for word in text.split(",")]
            elif name in query:
                given[name] = query[name]
        try:
            return model.model_validate(given)
        except ValidationError as error:
            raise RequestValidationError(
                [{**each, "loc": ("query", *each["loc"])} for each in error.errors()]
            ) from error

    return Depends(parse)


def audit_entry(
    request: Request,
    decision: Literal["allowed", "refused"],
    *,
    rule: Rule | None = None,
    target: str = "",
    reason: str = "",
) -> AuditEntry:
    """Return the audit entry of this request; the default target is its path."""
    caller = cast(_Caller | None, request.scope.get("caller"))
    return AuditEntry(
        id=uuid4().hex,
        time=utc_now(),
        service=cast(Refusals, request.app.state.refusals).service,
        subject=str(caller.user_id) if caller else "",
        source=source(request),
        action=request.scope["route"].name,
        target=(target or request.scope["path"])[:MAX_TARGET_CHARS],
        decision=decision,
        rule=rule or "",
        reason=reason[:MAX_REASON_CHARS],
        request_id=request.scope["request_id"],
    )


def record_refusal(request: Request, rule: Rule, *, target: str = "", reason: str = "") -> None:
    """Add a refused request to the entries that the service publishes for the audit log."""
    entry = audit_entry(request, "refused", rule=rule, target=target, reason=reason)
    cast(Refusals, request.app.state.refusals).add(entry)


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
        allowed = _allowed(request)
        headers["Allow"] = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
    elif "caller" in request.scope:  # then a route was found, and the request is invalid
        record_refusal(request, Rule.REQUEST)
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


# Common parts of both applications of a service.
_BASICS: Final[dict[str, Any]] = {
    "openapi_url": None,
    "default_response_class": AsciiJSON,
    "telemetry": _TELEMETRY,
    "redirect_slashes": False,  # a path with an extra slash is unknown; a redirect would drop the body
    "exception_handlers": {
        PublicError: _public,
        DependencyError: _dependency,
        HTTPException: _http,
        RequestValidationError: _invalid,
    },
}


class _Opened:
    """Answers 503 until the service has started."""

    def __init__(self, app: ASGIApp, *, startup: Startup) -> None:
        self._app = app
        self._startup = startup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._startup.ready:
            await error_response(503, "the service is starting; try again", {"Retry-After": "1"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body has more than {most} bytes", {"Connection": "close"})


class _Outermost:
    """The outermost middleware: request ids, body limits, HEAD, metrics and unhandled errors."""

    def __init__(self, app: ASGIApp, *, proxies: Proxies, public: bool, max_body_seconds: float) -> None:
        self._app = app
        self._proxies = proxies
        self._public = public
        self._max_body_seconds = max_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        peer, port = scope["client"] or ("", 0)
        trusted = peer in self._proxies
        if trusted:
            forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
            scope["client"] = (self._proxies.source(peer, forwarded), port)
        ids = self._ids(headers.get(b"x-request-id", b"").decode("latin-1"), trusted=trusted)
        request_id = ids["request_id"]
        # An untrusted sampled flag could flood the collector, and an untrusted trace id may belong to another caller.
        traceparent = headers.get(b"traceparent", b"").decode("latin-1") if trusted else ""
        tracing_it = (
            tracing.within(traceparent)
            if scope["path"] in _QUIET
            else tracing.span(scope["method"], traceparent, "server")
        )
        scope["request_id"] = request_id
        started = time.perf_counter()
        status = 0
        most = next((most for prefix, most in BODY_LIMITS.items() if scope["path"].startswith(prefix)), MAX_BODY_BYTES)
        head = scope["method"] == "HEAD"
        scope["answer_headers"] = []  # that a route adds to whatever answer is sent, an error included
        inner = {**scope, "method": "GET"} if head else scope

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = (*scope["answer_headers"], (b"x-request-id", request_id.encode()))
                message["headers"] = [*message.get("headers", ()), *added]
                await send(message)
                if head:  # the response is complete with its headers, and the producer of its body is disconnected
                    await send({"type": "http.response.body"})
            elif not head:
                await send(message)

        with tracing_it as span, structlog.contextvars.bound_contextvars(**ids):
            try:
                await self._app(inner, self._limited(receive, headers, most), send_with_id)
            except ClientDisconnect:
                status = _DISCONNECTED
            except Exception:
                _log.exception("request_failed", method=scope["method"], path=scope["path"])
                if status:
                    raise  # a response is in progress: the server must abort it, so that it does not look complete
                await error_response(500, "Internal Server Error")(inner, receive, send_with_id)
            finally:
                self._account(scope, inner.get("route"), status, time.perf_counter() - started, span)

    def _ids(self, named: str, *, trusted: bool) -> dict[str, str]:
        """Return the request ids for the logs: one that no client can choose, and the caller's own."""
        known = _REQUEST_ID.fullmatch(named) is not None
        if known and trusted and not self._public:
            return {"request_id": named}
        return {"request_id": uuid4().hex} | ({"client_request_id": named} if known else {})

    def _limited(self, receive: Receive, headers: Mapping[bytes, bytes], most: int) -> Receive:
        # The framework's own limit responds in plain text and bypasses the error handlers.
        announced = int(headers.get(b"content-length", b"0"))
        left = most
        until: float | None = None
        ended = False

        async def limited() -> Message:
            nonlocal left, until, ended
            if ended:
                return await receive()  # waits until the client disconnects
            if announced > most:
                raise _too_large(most)
            until = until or asyncio.get_running_loop().time() + self._max_body_seconds
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                # Bytes that arrive later must not be parsed as the next request.
                raise HTTPException(408, "the body arrived too slowly", {"Connection": "close"}) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large(most)
            ended = not message.get("more_body", False)
            return message

        return limited

    @staticmethod
    def _account(scope: Scope, found: object, status: int, seconds: float, span: tracing.Span) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(found, "path", "none")
        _REQUESTS.labels(method, route, status).inc()
        _LATENCY.labels(method, route).observe(seconds)
        if span.is_recording():
            span.update_name(f"{method} {route}")
            span.set_attributes(
                {"http.request.method": method, "http.route": route, "http.response.status_code": status},
            )
        if route not in _QUIET:
            _log.info(
                "request_completed", method=method, path=scope["path"], status=status, ms=round(seconds * 1000, 1)
            )
