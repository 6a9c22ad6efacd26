"""What `main.py` hands to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request

from job_orchestrator.domain.store import Store
from job_orchestrator.handlers.commands import Commands
from scanfleet import rest
from scanfleet.targets import TargetRules


@dataclass(frozen=True, slots=True)
class State:
    store: Store
    commands: Commands
    rules: TargetRules


def _state(request: Request) -> State:
    state: State = request.app.state.orchestrator
    return state


Handed = Annotated[State, Depends(_state)]


@dataclass(frozen=True, slots=True)
class Paging:
    """The page that a list was asked for."""

    page: int
    page_size: int

    @property
    def skip(self) -> int:
        return (self.page - 1) * self.page_size


def _paging(page: Annotated[rest.Page, Query()] = 1, page_size: Annotated[rest.PageSize, Query()] = 10) -> Paging:
    return Paging(page, page_size)


Paged = Annotated[Paging, Depends(_paging)]
