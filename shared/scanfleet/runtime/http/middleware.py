"""The outermost parts of an application: request ids, body limits, request metrics, and 503 until the service has started."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Final
from uuid import uuid4

import structlog
from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scanfleet.contracts.rest import BODY_LIMITS, MAX_BODY_BYTES
from scanfleet.runtime import tracing
from scanfleet.runtime.http.proxies import Proxies
from scanfleet.runtime.http.requests import METHODS
from scanfleet.runtime.http.responses import error_response
from scanfleet.runtime.startup import Startup

MAX_BODY_SECONDS: Final = 10.0  # timeout from the first byte of a body to its last: 50 kbit/s for the largest one

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Probed every few seconds, so their access lines are omitted.
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics", "/internal/ready", "/internal/revocations"})
_OF_BODIES: Final = frozenset({b"content-length", b"transfer-encoding"})  # a request without them has no body
_DISCONNECTED: Final = 499  # in logs and metrics, as proxies record it: the client has disconnected

_REQUESTS: Final = Counter("scanfleet_http_requests_total", "HTTP requests answered.", ["method", "route", "status"])
_LATENCY: Final = Histogram("scanfleet_http_request_seconds", "Time to the end of the response.", ["method", "route"])

_log = structlog.stdlib.get_logger(__name__)


class StartupGate:
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


class Outermost:
    """The outermost middleware: request ids, body limits, HEAD, metrics and unhandled errors."""

    def __init__(self, app: ASGIApp, *, proxies: Proxies, public: bool) -> None:
        self._app = app
        self._proxies = proxies
        self._public = public

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
        if headers.keys().isdisjoint(_OF_BODIES):
            return receive
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
            until = until or asyncio.get_running_loop().time() + MAX_BODY_SECONDS
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
        method = scope["method"] if scope["method"] in METHODS else "other"
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
