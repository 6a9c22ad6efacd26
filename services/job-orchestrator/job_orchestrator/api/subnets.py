"""Create, read, update and delete subnets, each owned by one user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Literal

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
from job_orchestrator.domain.resources import Subnet
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.errors import BadRequestError, ConflictError, NotFoundError, Rule
from scanfleet.runtime.service import PathId
from scanfleet.scanning.targets import Target, TargetRules, parse_network
from scanfleet.security.auth import Caller, Guarded

router = APIRouter(prefix="/api/v1/subnet", route_class=Guarded)


@router.post("", status_code=201)
async def create_subnet(
    body: rest.SubnetBody, response: Response, caller: Caller, state: Handed, record: Recorded
) -> rest.Subnet:
    cidr, exclude = checked(body, state.rules)
    now = utc_now()
    await within_quota(state, "subnets", caller.user_id)
    (id_,) = await state.store.subnets.take_ids()
    subnet = Subnet(
        id=id_,
        user_id=caller.user_id,
        name=body.name,
        cidr=cidr,
        exclude=exclude,
        created_at=now,
        updated_at=now,
    )
    await record(target=f"/api/v1/subnet/{id_}")
    await state.store.subnets.add(subnet)
    return tagged(view(subnet), response)


@router.get("")
async def list_subnets(caller: Caller, state: Handed, paged: Paged) -> rest.SubnetList:
    found, total = await state.store.subnets.page(caller.user_id, paged.skip, paged.page_size)
    return rest.SubnetList(
        subnets=[view(each) for each in found],
        total=total,
        page=paged.page,
        page_size=paged.page_size,
    )


@router.get("/{subnet_id}")
async def read_subnet(subnet_id: PathId, response: Response, caller: Caller, state: Handed) -> rest.Subnet:
    return tagged(view(await mine(state.store.subnets, "Subnet", caller.user_id, subnet_id)), response)


@router.put("/{subnet_id}")
async def replace_subnet(
    *,
    subnet_id: PathId,
    body: rest.SubnetBody,
    request: Request,
    response: Response,
    caller: Caller,
    state: Handed,
    record: Recorded,
) -> rest.Subnet:
    old = await mine(state.store.subnets, "Subnet", caller.user_id, subnet_id)
    conditional = check_unchanged(view(old), request)
    cidr, exclude = checked(body, state.rules)
    updated_at = max(utc_now(), old.updated_at + timedelta(milliseconds=1))  # each state has its own time
    new = replace(old, name=body.name, cidr=cidr, exclude=exclude, updated_at=updated_at)
    await record()
    if not await state.store.subnets.replace(new, unchanged_since=old.updated_at if conditional else None):
        await mine(state.store.subnets, "Subnet", caller.user_id, subnet_id)  # it may have been deleted
        raise changed()
    return tagged(view(new), response)


@router.delete("/{subnet_id}")
async def delete_subnet(subnet_id: PathId, caller: Caller, state: Handed, record: Recorded) -> rest.Done:
    await mine(state.store.subnets, "Subnet", caller.user_id, subnet_id)
    if await state.store.jobs.has_unfinished(subnet_id):
        raise ConflictError("Subnet has unfinished jobs")
    await record()
    if not await state.store.subnets.delete(caller.user_id, subnet_id):
        raise NotFoundError("Subnet not found")
    return rest.Done(message="Subnet deleted successfully")


def checked(body: rest.SubnetBody, rules: TargetRules) -> tuple[str, tuple[str, ...]]:
    """Return the network and its exclusions in canonical form.

    Raises:
        BadRequestError: one of them is not a network, or must not be scanned. The message begins with the field at fault.
    """
    target = parsed(body.cidr, body.exclude)
    if refusal := rules.refusal(target.network):
        raise _wrong("cidr", refusal, body.cidr)
    return str(target.network), tuple(str(each) for each in target.exclude)


def parsed(cidr: str, exclude: Sequence[str] | None) -> Target:
    """Return the networks of a request.

    Raises:
        BadRequestError: one of them is not a network, or every address is excluded. The message begins with the field at fault.
    """
    try:
        parse_network(cidr)
    except ValueError as error:
        raise _wrong("cidr", str(error), cidr) from error
    try:
        return Target.parse(cidr, exclude or ())
    except ValueError as error:
        raise _wrong("exclude", str(error), cidr) from error


def _wrong(field: Literal["cidr", "exclude"], reason: str, cidr: str) -> BadRequestError:
    return BadRequestError(f"{field}: {reason}", rule=Rule.TARGETS, target=cidr)


def view(subnet: Subnet) -> rest.Subnet:
    return rest.Subnet(
        id=subnet.id,
        user_id=subnet.user_id,
        name=subnet.name,
        cidr=subnet.cidr,
        exclude=list(subnet.exclude),
        created_at=subnet.created_at,
        updated_at=subnet.updated_at,
    )
