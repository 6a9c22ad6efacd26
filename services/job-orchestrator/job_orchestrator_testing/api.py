"""The orchestrator's API over the handlers of a `Simulation`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from job_orchestrator.api import ROUTERS
from job_orchestrator.api.state import State
from job_orchestrator_testing.simulation import Simulation
from scanfleet.runtime import service
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.security.audit import Refusals
from scanfleet.security.auth import Verifier
from scanfleet.services import ORCHESTRATOR


def state_of(simulation: Simulation) -> State:
    """Return the state of the only replica's routes."""
    only = simulation.only
    return State(simulation.store, only.commands, only.cancels, only.submits, only.deletions, only.checks, only.backlog)


def app_of(state: State, verifier: Verifier, settings: ConnectionSettings | None = None) -> FastAPI:
    """Return the application with this state."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield

    app = service.create_app(
        name=ORCHESTRATOR,
        refusals=Refusals(ORCHESTRATOR),
        settings=settings or ConnectionSettings(),
        lifespan=lifespan,
        routers=ROUTERS,
    )
    app.state.verifier = verifier
    app.state.orchestrator = state
    return app
