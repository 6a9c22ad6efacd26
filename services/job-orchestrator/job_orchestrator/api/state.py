"""What `main.py` hands to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request

from job_orchestrator.domain.store import Store
from job_orchestrator.handlers.commands import Commands
from scanfleet import rest
from scanfleet.audit import write_line
from scanfleet.auth import Caller
from scanfleet.errors import Rule
from scanfleet.service import audit_entry
from scanfleet.targets import TargetRules


@dataclass(frozen=True, slots=True)
class State:
    store: Store
    commands: Commands
    rules: TargetRules


async def _state(request: Request) -> State:  # a thread would run what is not async
    state: State = request.app.state.orchestrator
    return state


Handed = Annotated[State, Depends(_state)]


@dataclass(frozen=True, slots=True)
class Recorder:
    """Writes into the audit log what a request is about to do. What could not be written down is not done."""

    request: Request
    store: Store

    async def __call__(self, *, target: str = "", rule: Rule | None = None) -> None:
        entry = audit_entry(self.request, "allowed", rule=rule, target=target)
        await self.store.add_audit([entry])
        write_line(entry)


async def _recorder(request: Request, _caller: Caller, state: Handed) -> Recorder:
    return Recorder(request, state.store)


Recorded = Annotated[Recorder, Depends(_recorder)]


@dataclass(frozen=True, slots=True)
class Paging:
    """The page that a list was asked for."""

    page: int
    page_size: int

    @property
    def skip(self) -> int:
        return (self.page - 1) * self.page_size


async def _paging(
    page: Annotated[rest.Page, Query()] = 1,
    page_size: Annotated[rest.PageSize, Query()] = 10,
) -> Paging:
    return Paging(page, page_size)


Paged = Annotated[Paging, Depends(_paging)]
