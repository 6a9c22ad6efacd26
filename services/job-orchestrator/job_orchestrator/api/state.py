"""Provide the routes with the state that `main.py` builds, and with shared dependencies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Final, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from job_orchestrator.api.resource_rules import Answer, Body, Listed, ResourceRules
from job_orchestrator.domain.ports import AuditRepository, Store
from job_orchestrator.domain.proposal import Checks
from job_orchestrator.domain.quotas import QuotaError
from job_orchestrator.domain.resources import Content, Owned
from job_orchestrator.domain.user_grants import UNLIMITED, JobGrants
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.commands.backlog import Backlog
from job_orchestrator.handlers.commands.cancels import Cancels
from job_orchestrator.handlers.commands.commands import Commands
from job_orchestrator.handlers.commands.submits import Submits
from job_orchestrator.handlers.jobs.deletions import Deletions
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.errors import BadRequestError, NotFoundError, PreconditionFailedError, Rule
from scanfleet.runtime.http.audit import audit_entry
from scanfleet.runtime.turns import Turns

_View = TypeVar("_View", bound=BaseModel)

MAX_ERROR_CHARS: Final = 200  # limits how much of the caller's input an error quotes


@dataclass(frozen=True, slots=True)
class State:
    store: Store
    commands: Commands
    cancels: Cancels
    submits: Submits
    deletions: Deletions
    checks: Checks
    backlog: Backlog
    grants: JobGrants = UNLIMITED
    now: Callable[[], datetime] = utc_now
    """The platform's time."""

    turns: Turns = field(default_factory=Turns)
    creations: WeakValueDictionary[int, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """By user: held while a request creates objects."""


async def state_of(request: Request) -> State:  # without async the framework would use a thread
    state: State = request.app.state.orchestrator
    return state


StateDep = Annotated[State, Depends(state_of)]


# Dependencies of dependencies would be solved again for each of them.
async def _turn(request: Request) -> AsyncIterator[None]:
    async with (await state_of(request)).turns.turn(request.scope["caller"].user_id):
        yield


TurnDep = Annotated[None, Depends(_turn, scope="function")]
"""Holds a turn of the caller until the answer is built: for requests that cost milliseconds of CPU time."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """Writes the intended change of a request to the audit log. If the entry cannot be written, the request fails."""

    request: Request
    audit: AuditRepository

    async def __call__(self, *, target: str = "", rule: Rule | None = None) -> None:
        await self._write(audit_entry(self.request, "allowed", rule=rule, target=target))

    async def each(self, targets: Iterable[str]) -> None:
        """Write one entry for each object that the request changes."""
        await self._write(*(audit_entry(self.request, "allowed", target=target) for target in targets))

    async def reading(self, target: str, *, streamed: bool = False) -> None:
        """Write that an administrator reads another user's data, deduplicated for pollers.

        There is one entry per administrator, operation, target and minute, across all replicas; for a stream, one per request
        and day.
        """
        entry = audit_entry(self.request, "allowed", rule=Rule.ROLE, target=target)
        once = f"{entry.request_id} {entry.time:%F}" if streamed else f"{entry.time:%F %R}"
        key = hashlib.sha256(f"{entry.subject} {entry.action} {entry.target} {once}".encode()).hexdigest()[:32]
        await self._write(entry.model_copy(update={"id": key}))

    async def _write(self, *entries: AuditEntry) -> None:
        await record(self.audit, entries)


async def recorder_of(request: Request) -> Recorder:
    return Recorder(request, (await state_of(request)).store.audit)


Recorded = Annotated[Recorder, Depends(recorder_of)]


def tags(request: Request, header: str, *, weak: bool = True) -> set[str]:
    """Return the entity tags of `If-None-Match`, weak ones as strong ones, or of `If-Match`, which allows no `weak` ones."""
    listed = ",".join(request.headers.getlist(header))
    stripped = (tag.strip() for tag in listed.split(","))
    return {tag.removeprefix("W/") if weak else tag for tag in stripped if tag}


def tagged(view: _View, response: Response) -> _View:
    """Return the view, with its entity tag in the headers of the response."""
    response.headers["ETag"] = _tag(view)
    return view


def check_unchanged(view: BaseModel, request: Request) -> bool:
    """Check `If-Match`; return whether the change applies only to the current state of the object, not to any state.

    Raises:
        PreconditionFailedError: the caller has read another state of the object.
    """
    wanted = tags(request, "if-match", weak=False)
    if not wanted or wanted == {"*"}:
        return False
    if _tag(view) not in wanted:
        raise _changed()
    return True


def repeated(changed: Owned[Content], name: str, content: Content) -> Owned[Content]:
    """Return the changed object if it has this content: the request is a repeat after a lost response (RFC 9110, 13.1.1).

    Raises:
        PreconditionFailedError: the object has different content.
    """
    if (changed.name, changed.content) != (name, content):
        raise _changed()
    return changed


def _changed() -> PreconditionFailedError:
    return PreconditionFailedError("it was changed after you read it: read it again, and send the new ETag in If-Match")


def _tag(view: BaseModel) -> str:
    return f'"{hashlib.sha256(view.model_dump_json().encode()).hexdigest()[:16]}"'


async def mine(
    state: State, rules: ResourceRules[Body, Answer, Listed, Content], user_id: int, id_: int
) -> Owned[Content]:
    """Return the user's object of a resource.

    Raises:
        NotFoundError: it does not exist or belongs to another user.
    """
    repository = rules.repository(state.store)
    found = await repository.get([(user_id, id_)])
    if not found:
        raise NotFoundError(rules.not_found, rule=Rule.OWNER if await repository.exists(id_) else None)
    return found[user_id, id_]


def creating(state: State, user_id: int) -> asyncio.Lock:
    """Return the lock that a request holds from the search for what exists until its new objects are stored."""
    return state.creations.setdefault(user_id, asyncio.Lock())


async def check_quota(
    state: State, rules: ResourceRules[Body, Answer, Listed, Content], user_id: int, wanted: int = 1
) -> None:
    """Check that the user may create `wanted` more objects of a resource.

    Raises:
        BadRequestError: the user would have more than the limit.
    """
    limit = rules.quota(state.checks.quotas)
    owned = await rules.repository(state.store).count(user_id, limit)
    try:
        state.checks.quotas.check_owned(rules.resource.plural, limit, owned, wanted)
    except QuotaError as error:
        raise BadRequestError(str(error), rule=Rule.QUOTA) from error
