"""Provide the routes with the state that `main.py` builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from api_gateway.handlers.commands import Commands
from api_gateway.handlers.events import Subscriptions
from api_gateway.settings import Settings
from api_gateway.upstream import Orchestrator, ScanLimits, Upstream
from scanfleet.runtime.bus import Consumer


@dataclass(frozen=True, slots=True)
class State:
    commands: Commands
    orchestrator: Orchestrator
    canceller: Orchestrator
    """The same service over a pool of connections for cancels, and for identifying callers."""
    result_store: Upstream
    scan_limits: ScanLimits
    subscriptions: Subscriptions
    events: Consumer
    """Reads the job events for `subscriptions`."""
    settings: Settings


async def _state(request: Request) -> State:  # without async the framework would use a thread
    return cast(State, request.app.state.gateway)


StateDep = Annotated[State, Depends(_state)]
