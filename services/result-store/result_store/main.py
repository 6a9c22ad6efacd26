"""Build result-store, which `python -m scanfleet.runtime.server result-store` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from result_store.api import hosts, nmap_xml, results
from result_store.api.turns import Limits
from result_store.handlers import DeletionsHandler, ResultsHandler
from result_store.repository import MongoStore
from result_store.settings import Settings
from scanfleet.contracts.messages.topics import SCAN_DELETIONS, SCAN_RESULTS
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import logging, mongo, service, tracing
from scanfleet.runtime.startup import Startup
from scanfleet.security.audit import Refusals
from scanfleet.security.auth import InternalVerifier, for_gateway, read_public_keys
from scanfleet.security.chunk_grants import Grants
from scanfleet.services import RESULT_STORE


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    logging.configure(RESULT_STORE, settings)
    tracing.configure(RESULT_STORE, settings)
    refusals = Refusals(RESULT_STORE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        startup: Startup = app.state.startup
        async with AsyncExitStack() as stack:
            app.state.verifier = InternalVerifier(read_public_keys(settings.internal_public_keys_file), RESULT_STORE)
            grants = Grants(read_public_keys(settings.chunk_public_keys_file))
            database = mongo.connect(settings.mongodb_uri, settings.database)
            stack.callback(database.client.close)
            app.state.probes.depend("mongodb", lambda: mongo.ping(database))
            app.state.store = store = MongoStore(database)
            app.state.limits = Limits()
            await startup.until_available("mongodb", store.prepare)
            bus = KafkaBus(settings, source=RESULT_STORE, instance=settings.instance)
            await startup.until_available("kafka", bus.start)
            stack.push_async_callback(bus.stop)
            app.state.probes.watch(bus)
            app.state.probes.watch(await stack.enter_async_context(refusals.publishing_to(bus)))
            handler = ResultsHandler(store, bus, grants, refusals)
            deletions = DeletionsHandler(store, bus, settings.deletes_per_second)
            consumers = (
                bus.consume(SCAN_RESULTS, RESULT_STORE, handler),
                bus.consume(SCAN_DELETIONS, f"{RESULT_STORE}-{SCAN_DELETIONS.name}", deletions),
            )
            for loop in (*consumers, deletions.loop):
                await startup.until_available("kafka", loop.start)
                stack.push_async_callback(loop.stop)
                app.state.probes.watch(loop)
            yield

    routers = [results.router, hosts.router, nmap_xml.router, for_gateway]
    return service.create_app(
        name=RESULT_STORE, settings=settings, lifespan=lifespan, refusals=refusals, routers=routers
    )
