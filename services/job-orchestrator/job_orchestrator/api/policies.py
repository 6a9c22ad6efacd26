"""Create, read, update and delete policies, each owned by one user."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from fastapi import APIRouter, Request, Response

from job_orchestrator.api.state import (
    Handed,
    Paged,
    Recorded,
    changed,
    check_unchanged,
    mine,
    tagged,
    within_quota,
)
from job_orchestrator.domain.resources import Policy
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.errors import NotFoundError
from scanfleet.runtime.service import PathId
from scanfleet.security.auth import Caller, Guarded

router = APIRouter(prefix="/api/v1/policy", route_class=Guarded)


@router.post("", status_code=201)
async def create_policy(
    body: rest.PolicyBody, response: Response, caller: Caller, state: Handed, record: Recorded
) -> rest.Policy:
    scan = body.scan(state.scripts)
    now = utc_now()
    await within_quota(state, "policies", caller.user_id)
    (id_,) = await state.store.policies.take_ids()
    policy = Policy(
        id=id_,
        user_id=caller.user_id,
        name=body.name,
        scan=scan,
        created_at=now,
        updated_at=now,
    )
    await record(target=f"/api/v1/policy/{id_}")
    await state.store.policies.add(policy)
    return tagged(_view(policy), response)


@router.get("")
async def list_policies(caller: Caller, state: Handed, paged: Paged) -> rest.PolicyList:
    found, total = await state.store.policies.page(caller.user_id, paged.skip, paged.page_size)
    return rest.PolicyList(
        policies=[_view(each) for each in found],
        total=total,
        page=paged.page,
        page_size=paged.page_size,
    )


@router.get("/{policy_id}")
async def read_policy(policy_id: PathId, response: Response, caller: Caller, state: Handed) -> rest.Policy:
    return tagged(_view(await mine(state.store.policies, "Policy", caller.user_id, policy_id)), response)


@router.put("/{policy_id}")
async def replace_policy(
    *,
    policy_id: PathId,
    body: rest.PolicyBody,
    request: Request,
    response: Response,
    caller: Caller,
    state: Handed,
    record: Recorded,
) -> rest.Policy:
    old = await mine(state.store.policies, "Policy", caller.user_id, policy_id)
    conditional = check_unchanged(_view(old), request)
    updated_at = max(utc_now(), old.updated_at + timedelta(milliseconds=1))  # each state has its own time
    new = replace(old, name=body.name, scan=body.scan(state.scripts), updated_at=updated_at)
    await record()
    if not await state.store.policies.replace(new, unchanged_since=old.updated_at if conditional else None):
        await mine(state.store.policies, "Policy", caller.user_id, policy_id)  # it may have been deleted
        raise changed()
    return tagged(_view(new), response)


@router.delete("/{policy_id}")
async def delete_policy(policy_id: PathId, caller: Caller, state: Handed, record: Recorded) -> rest.Done:
    await mine(state.store.policies, "Policy", caller.user_id, policy_id)
    await record()
    if not await state.store.policies.delete(caller.user_id, policy_id):
        raise NotFoundError("Policy not found")
    return rest.Done(message="Policy deleted successfully")


def _view(policy: Policy) -> rest.Policy:
    return rest.Policy(
        id=policy.id,
        user_id=policy.user_id,
        name=policy.name,
        created_at=policy.created_at,
        updated_at=policy.updated_at,
        **policy.scan.model_dump(),
    )
