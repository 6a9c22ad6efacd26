"""Read and replace the retention of the jobs of a subnet."""

from __future__ import annotations

from fastapi import APIRouter

from job_orchestrator.api.resource_rules import SUBNETS
from job_orchestrator.api.state import Recorded, State, StateDep, mine
from scanfleet.contracts import rest
from scanfleet.errors import NotFoundError
from scanfleet.runtime.http.requests import PathId
from scanfleet.security.auth import AuthenticatedRoute, Caller

router = APIRouter(prefix=f"{rest.SUBNETS.path}/{{subnet_id}}/retention", route_class=AuthenticatedRoute)


@router.get("")
async def read_subnet_retention(subnet_id: PathId, caller: Caller, state: StateDep) -> rest.SubnetRetention:
    await mine(state, SUBNETS, caller.user_id, subnet_id)
    return _view(state, await state.store.retention.days(subnet_id))


@router.put("")
async def replace_subnet_retention(
    subnet_id: PathId, body: rest.SubnetRetentionBody, caller: Caller, state: StateDep, record: Recorded
) -> rest.SubnetRetention:
    await mine(state, SUBNETS, caller.user_id, subnet_id)
    await record()
    if not await state.store.retention.set_days(subnet_id, body.keep_results_days):
        raise NotFoundError(SUBNETS.not_found)
    return _view(state, body.keep_results_days)


def _view(state: State, days: int | None) -> rest.SubnetRetention:
    keep = state.deletions.keep
    return rest.SubnetRetention(
        keep_results_days=days, effective_days=days if days is not None else keep.days if keep else 0
    )
