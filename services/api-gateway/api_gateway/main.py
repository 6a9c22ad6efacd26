"""Build the gateway; `python -m scanfleet.runtime.server api-gateway` runs it."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from hashlib import sha256
from typing import Final

import httpx2
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from api_gateway.api import ROUTERS, page
from api_gateway.api.admission import Admission
from api_gateway.api.session import Sessions
from api_gateway.api.state import State
from api_gateway.auth import REFRESH_SECONDS, KeyReports, Revocations, SignIn, UserIds
from api_gateway.connections import connect
from api_gateway.handlers.commands import Commands
from api_gateway.handlers.events import Subscriptions
from api_gateway.settings import Settings
from api_gateway.upstream import Orchestrator, ScanLimits, Upstream
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_REPLIES
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import logging, service, tracing
from scanfleet.runtime.bus import Bus
from scanfleet.runtime.http.responses import ascii_json
from scanfleet.runtime.loop import Loop
from scanfleet.runtime.startup import Startup
from scanfleet.security.audit import Refusals
from scanfleet.security.auth import InternalTokens, TokenVerifier, open_verifier, read_private_key
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE

_DESCRIPTION = """\
Scan networks as a service: register subnets and policies, create scan jobs, watch them run and read their results.

Every error is `{"error": "..."}`. Times are RFC 3339 in UTC. Every response to a valid token has `RateLimit` and
`RateLimit-Policy`: the remaining quota of the limit that applies to the request."""


# Only the page's own scripts and requests: no other host, no frame. Swagger UI sets styles on its elements.
_DOCS_POLICY: Final = (
    "default-src 'none'; script-src 'self' {script}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    settings: Settings | None = None,
    *,
    bus: Bus | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    issuer: httpx2.AsyncBaseTransport | None = None,
) -> FastAPI:
    """Create the gateway.

    Args:
        settings: from the environment unless given.
        bus: Kafka unless given.
        transport: for all HTTP calls; the network unless given.
        issuer: carries the calls that sign a user in at the issuer; likewise.
    """
    settings = settings or Settings()
    logging.configure(GATEWAY, settings)
    tracing.configure(GATEWAY, settings)
    refusals = Refusals(GATEWAY)
    bus = bus or KafkaBus(settings, source=GATEWAY, instance=settings.instance)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        startup: Startup = app.state.startup
        async with AsyncExitStack() as stack:
            key = read_private_key(settings.internal_key_file)
            # Cancels, and the queries that identify their callers, have a separate pool of connections, so that other
            # queries do not delay them.
            queries = await stack.enter_async_context(connect(settings, transport))
            cancels = await stack.enter_async_context(connect(settings, transport))
            tokens = InternalTokens(key, ORCHESTRATOR)
            url, seconds = str(settings.orchestrator_url), settings.stalled_seconds
            orchestrator = Orchestrator(queries, url, tokens, stalled_seconds=seconds)
            canceller = Orchestrator(cancels, url, tokens, stalled_seconds=seconds)
            result_store = Upstream(
                queries, str(settings.result_store_url), InternalTokens(key, RESULT_STORE), stalled_seconds=seconds
            )
            app.state.verifier = await stack.enter_async_context(_open_verifier(app, settings, canceller, transport))
            await startup.until_available("kafka", bus.start)
            stack.push_async_callback(bus.stop)
            app.state.probes.watch(bus)
            app.state.probes.watch(await stack.enter_async_context(refusals.publishing_to(bus)))
            commands = Commands(bus, reply_seconds=settings.reply_seconds)
            replies = bus.tail(SCAN_REPLIES, commands, wants=commands.awaits)
            await startup.until_available("kafka", replies.start)
            stack.push_async_callback(replies.stop)
            app.state.probes.watch(replies)
            subscriptions = Subscriptions()
            events = bus.tail(SCAN_EVENTS, subscriptions, wants=subscriptions.wants)
            await startup.until_available("kafka", events.start)
            stack.push_async_callback(events.stop)
            app.state.probes.watch(events)
            stack.enter_context(service.on_sigterm(subscriptions.end))
            app.state.probes.depend("job-orchestrator", orchestrator.reached)
            app.state.probes.depend("result-store", result_store.reached)
            app.state.gateway = State(
                commands,
                orchestrator,
                canceller,
                result_store,
                ScanLimits(orchestrator.scan_limits),
                subscriptions,
                events,
                settings,
            )
            yield

    app = service.create_app(
        name=GATEWAY,
        settings=settings,
        lifespan=lifespan,
        refusals=refusals,
        routers=ROUTERS,
        public=True,
        title="Scanfleet",
        version="1",
        description=_DESCRIPTION,
        openapi_url=None,  # served by `_openapi` as ASCII, like all JSON
        docs_url=None,  # served by `_docs` without files from other hosts
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.admission = Admission(settings)
    app.state.sessions = Sessions.open(settings)
    app.state.sign_in = SignIn.open(settings, issuer)
    page.serve(app)
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_swagger", "resources")]))
    app.add_route("/docs", _docs)
    app.add_route("/openapi.json", _openapi(app))
    return app


@asynccontextmanager
async def _open_verifier(
    app: FastAPI, settings: Settings, orchestrator: Orchestrator, transport: httpx2.AsyncBaseTransport | None
) -> AsyncIterator[TokenVerifier]:
    """Identify the caller by the token and the orchestrator's user ids and revocations."""
    revocations = Revocations(orchestrator.revoked)
    users = UserIds(orchestrator.user_id)
    roles = grants.roles if (grants := settings.user_grants) else frozenset()
    await revocations.refresh()  # no request is accepted without the list
    refreshing = Loop("revocations", REFRESH_SECONDS, revocations.refresh)
    await refreshing.start()
    try:
        async with open_verifier(
            settings, users=users, revoked=revocations, roles=roles, transport=transport
        ) as verifier:
            app.state.probes.depend("the issuer's keys", verifier.check)
            app.state.probes.depend("the revocations", revocations.check)
            app.state.probes.watch(refreshing)
            reports = KeyReports(
                lambda: verifier.key_names, lambda keys: orchestrator.report_keys(settings.jwt_issuer, keys)
            )
            reporting = Loop("issuer's keys", REFRESH_SECONDS, reports.refresh)
            app.state.probes.watch(reporting)
            await reporting.start()
            try:
                yield verifier
            finally:
                await reporting.stop()
    finally:
        await refreshing.stop()


def _openapi(app: FastAPI) -> Callable[[Request], Awaitable[Response]]:
    rendered = cache(lambda: ascii_json(app.openapi()).encode())  # once, with the first request

    async def openapi(_request: Request) -> Response:
        return Response(rendered(), media_type="application/json")

    return openapi


async def _docs(_request: Request) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Scanfleet",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-32x32.png",
    )
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digest = b64encode(sha256(script).digest()).decode()
    page.headers["Content-Security-Policy"] = _DOCS_POLICY.format(script=f"'sha256-{digest}'")
    return page
