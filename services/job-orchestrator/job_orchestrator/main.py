"""Builds the orchestrator: `uvicorn --factory job_orchestrator.main:create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from job_orchestrator.api import ROUTERS
from job_orchestrator.api.state import State
from job_orchestrator.handlers.commands import Commands
from job_orchestrator.handlers.dispatch import Dispatcher
from job_orchestrator.handlers.jobs import Jobs
from job_orchestrator.handlers.progress import Progress
from job_orchestrator.handlers.stored import Stored
from job_orchestrator.handlers.sweep import Sweeper
from job_orchestrator.repository import MongoStore
from job_orchestrator.settings import Settings
from scanfleet import logging, mongo, service
from scanfleet.auth import open_verifier
from scanfleet.bus import Bus, Consumer, Handler
from scanfleet.kafka import KafkaBus
from scanfleet.loop import Loop
from scanfleet.messages.topics import ORCHESTRATOR, SCAN_COMMANDS, SCAN_PROGRESS, SCAN_STORED, SCAN_WORKERS, Topic

_SWEEP_SECONDS = 1.0


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    logging.configure(ORCHESTRATOR, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.verifier = await stack.enter_async_context(open_verifier(settings))
            database = mongo.connect(settings.mongodb, settings.database)
            stack.callback(database.client.close)
            store = MongoStore(database)
            await store.prepare()
            app.state.probes.depend("mongodb", lambda: mongo.ping(database))
            bus = KafkaBus(
                bootstrap=settings.kafka,
                prefix=settings.topic_prefix,
                source=ORCHESTRATOR,
                instance=settings.instance,
            )
            await bus.start()
            stack.push_async_callback(bus.stop)
            app.state.probes.watch(bus)

            dispatcher = Dispatcher(store, bus, settings.lease_seconds)
            jobs = Jobs(store, bus, dispatcher.wake)
            commands = Commands(store, bus, jobs, settings.target_rules)
            sweeper = Sweeper(store, bus, jobs, settings.stored_seconds)
            app.state.orchestrator = State(store, commands, settings.target_rules)

            handlers: dict[Topic, Handler] = {
                SCAN_COMMANDS: commands,
                SCAN_WORKERS: dispatcher,
                SCAN_PROGRESS: Progress(store, bus, jobs, dispatcher.wake, settings.lease_seconds),
                SCAN_STORED: Stored(store, jobs, dispatcher.wake),
            }
            for loop in (dispatcher.loop, Loop("sweep", _SWEEP_SECONDS, sweeper.sweep), *_consumers(bus, handlers)):
                await loop.start()
                stack.push_async_callback(loop.stop)
                app.state.probes.watch(loop)
            yield

    return service.create_app(name=ORCHESTRATOR, lifespan=lifespan, routers=ROUTERS)


def _consumers(bus: Bus, handlers: dict[Topic, Handler]) -> list[Consumer]:
    # A group for each topic: no loop waits for another, and a rebalance of one leaves the others alone.
    return [bus.consume(topic, f"{ORCHESTRATOR}-{topic.name}", handler) for topic, handler in handlers.items()]
