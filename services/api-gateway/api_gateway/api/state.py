"""What `main.py` hands to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from api_gateway.handlers import Commands
from api_gateway.upstream import Orchestrator, Upstream


@dataclass(frozen=True, slots=True)
class State:
    commands: Commands
    orchestrator: Orchestrator
    result_store: Upstream


async def _state(request: Request) -> State:  # a thread would run what is not async
    return cast(State, request.app.state.gateway)


Handed = Annotated[State, Depends(_state)]
