"""Create, read, update and delete the objects of resources, each owned by one user."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from job_orchestrator.api.keys import Creation, IdempotencyKey
from job_orchestrator.api.resource_rules import POLICIES, SUBNETS, Answer, Body, Listed, ResourceRules
from job_orchestrator.api.state import (
    Recorded,
    Recorder,
    State,
    StateDep,
    TurnDep,
    check_quota,
    check_unchanged,
    creating,
    mine,
    repeated,
    tagged,
)
from job_orchestrator.domain.resources import Content, Owned
from scanfleet.clock import utc_now
from scanfleet.contracts import queries, rest
from scanfleet.errors import NotFoundError, PreconditionFailedError
from scanfleet.runtime.http.requests import PathId, parsed, typed
from scanfleet.security.auth import AuthenticatedRoute, Caller


def router_of(rules: ResourceRules[Body, Answer, Listed, Content]) -> APIRouter:
    """Return the routes of a resource."""
    resource = rules.resource
    name, one = resource.name, f"/{{{resource.id_name}}}"
    path_id = Annotated[PathId, Path(alias=resource.id_name)]
    router = APIRouter(prefix=resource.path, route_class=AuthenticatedRoute)

    @router.post("", name=f"create_{name}", status_code=201, response_model=resource.answer)
    @typed(body=resource.body)
    async def create(
        *,
        body: Body,
        response: Response,
        caller: Caller,
        state: StateDep,
        record: Recorded,
        _turn: TurnDep,
        idempotency_key: IdempotencyKey = None,
    ) -> Answer:
        creation = Creation(state.store.commands, caller.user_id, idempotency_key, resource.path, body)
        async with creating(state, caller.user_id):
            if answer := await creation.answer():
                return tagged(await _add(state, rules, record, answer), response)
            content = rules.accept(body, state.checks)
            await check_quota(state, rules, caller.user_id)
            now = utc_now()
            (id_,) = await rules.repository(state.store).take_ids()
            new = Owned(id=id_, user_id=caller.user_id, name=body.name, content=content, created_at=now, updated_at=now)
            answer = await creation.accept(rules.view(new).model_dump_json())
            return tagged(await _add(state, rules, record, answer), response)

    @router.get("", name=f"list_{resource.plural}", response_model=resource.listed)
    async def list_(caller: Caller, state: StateDep, query: Annotated[queries.Page, parsed(queries.Page)]) -> Listed:
        async with state.turns.turn(caller.user_id):  # a hundred subnets with all exclusions take 9 MB
            found, total = await rules.repository(state.store).page(caller.user_id, query.skip, query.page_size)
            views = [rules.view(each) for each in found]
            return resource.listed.model_validate(
                {resource.plural: views, "total": total, "page": query.page, "page_size": query.page_size}
            )

    @router.get(one, name=f"read_{name}", response_model=resource.answer)
    @typed(id_=path_id)
    async def read(id_: int, response: Response, caller: Caller, state: StateDep) -> Answer:
        return tagged(rules.view(await mine(state, rules, caller.user_id, id_)), response)

    @router.put(one, name=f"replace_{name}", response_model=resource.answer)
    @typed(id_=path_id, body=resource.body)
    async def replace_(
        *,
        id_: int,
        body: Body,
        request: Request,
        response: Response,
        caller: Caller,
        state: StateDep,
        record: Recorded,
        _turn: TurnDep,
    ) -> Answer:
        old = await mine(state, rules, caller.user_id, id_)
        content = rules.accept(body, state.checks)
        try:
            conditional = check_unchanged(rules.view(old), request)
        except PreconditionFailedError:
            return tagged(rules.view(repeated(old, body.name, content)), response)
        new = old.revised(body.name, content, utc_now())
        await record()
        unchanged_since = old.updated_at if conditional else None
        if not await rules.repository(state.store).replace(new, unchanged_since=unchanged_since):
            changed = await mine(state, rules, caller.user_id, id_)  # it may have been deleted
            new = repeated(changed, body.name, content)
        return tagged(rules.view(new), response)

    @router.delete(one, name=f"delete_{name}")
    @typed(id_=path_id)
    async def delete(id_: int, caller: Caller, state: StateDep, record: Recorded) -> rest.Done:
        await mine(state, rules, caller.user_id, id_)
        await rules.check_unused(state.store, id_)
        await record()
        if not await rules.repository(state.store).delete(caller.user_id, id_):
            raise NotFoundError(rules.not_found)
        return rest.Done(message=f"{name.capitalize()} deleted successfully")

    return router


async def _add(
    state: State, rules: ResourceRules[Body, Answer, Listed, Content], record: Recorder, answer: str
) -> Answer:
    """Store the object that this answer has created, and return its view."""
    view = rules.resource.answer.model_validate_json(answer)
    created = rules.viewed(view)
    await record(target=f"{rules.resource.path}/{created.id}")
    await rules.repository(state.store).add(created)
    return view


ROUTERS: tuple[APIRouter, ...] = (router_of(SUBNETS), router_of(POLICIES))
