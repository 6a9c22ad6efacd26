"""Manage revoked tokens, and serve the gateway's queries of revocations and user ids."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request

from job_orchestrator.api.state import Recorded, StateDep
from job_orchestrator.domain.access import KEPT, MAX_REVOCATIONS, Revocation
from job_orchestrator.domain.audit import first_use
from scanfleet.contracts import queries, rest
from scanfleet.errors import BadRequestError, ConflictError, ForbiddenError, NotFoundError, Rule
from scanfleet.runtime.http.requests import PathId, parsed, source
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet.security.auth import AuthenticatedRoute, Caller, GatewayRoute, Principal

_SKEW: Final = timedelta(seconds=60)  # maximum by which a caller's clock may be ahead

router = APIRouter(prefix="/api/v1/revocation", route_class=AuthenticatedRoute)
internal = APIRouter(prefix="/internal", route_class=GatewayRoute)


async def _administrator(caller: Caller) -> Principal:
    if not caller.admin:
        raise ForbiddenError("Revocations are for administrators", rule=Rule.ROLE)
    return caller


Administrator = Annotated[Principal, Depends(_administrator)]


@router.post("", status_code=201)
async def create_revocation(
    body: rest.RevocationBody, caller: Administrator, state: StateDep, record: Recorded
) -> rest.Revocation:
    now = state.now()
    if body.issued_before is not None and body.issued_before > now + _SKEW:
        raise BadRequestError("issued_before: is in the future")
    id_ = await state.store.access.take_revocation_id()
    revocation = Revocation(
        id=id_,
        jti=body.jti,
        sub=body.sub,
        user_id=body.user_id,
        issued_before=None if body.jti is not None else body.issued_before or now,
        created_by=caller.user_id,
        created_at=now,
        expires_at=now + KEPT,
    )
    await record(target=f"/api/v1/revocation/{id_}")
    if not await state.store.access.add_revocation(revocation):
        raise ConflictError(
            f"There are {MAX_REVOCATIONS} revocations already; delete some, or revoke all of a user's tokens"
        )
    return _view(revocation)


@router.get("")
async def list_revocations(
    _caller: Administrator, state: StateDep, query: Annotated[queries.Page, parsed(queries.Page)]
) -> rest.RevocationList:
    found = await state.store.access.revocations()
    return rest.RevocationList(
        revocations=[_view(each) for each in found[query.skip : query.skip + query.page_size]],
        total=len(found),
        page=query.page,
        page_size=query.page_size,
    )


@router.delete("/{revocation_id}")
async def delete_revocation(
    revocation_id: PathId, _caller: Administrator, state: StateDep, record: Recorded
) -> rest.Done:
    if not await state.store.access.has_revocation(revocation_id):
        raise NotFoundError("Revocation not found")
    await record()
    await state.store.access.delete_revocation(revocation_id)
    return rest.Done(message="Revocation deleted successfully")


@internal.get("/revocations")
async def revoked(state: StateDep) -> list[rest.Revoked]:
    """List all revocations; every gateway polls this route every two seconds."""
    return [
        rest.Revoked(jti=each.jti, sub=each.sub, user_id=each.user_id, issued_before=each.issued_before)
        for each in await state.store.access.revocations()
    ]


@internal.get("/limits")
async def scan_limits(state: StateDep) -> rest.ScanLimits:
    """Return the limits of scans."""
    return rest.ScanLimits(
        presets={preset: fill_in(preset, {}, state.checks.scripts) for preset in Preset},
        scripts=sorted(state.checks.scripts),
        max_addresses=state.checks.rules.max_addresses,
    )


@internal.post("/keys")
async def use_issuer_keys(request: Request, body: rest.IssuerKeys, state: StateDep) -> rest.Done:
    """Record the keys of an issuer that the gateway accepts, each once."""
    await state.store.audit.add(
        [first_use(f"verifies tokens of {body.issuer}", key, source=source(request)) for key in body.keys]
    )
    return rest.Done(message="Keys recorded")


@internal.post("/users")
async def user_id(body: rest.Subject, state: StateDep) -> rest.UserId:
    """Return the id of this user; the first call assigns it."""
    return rest.UserId(user_id=await state.store.access.user_id(body.issuer, body.subject))


def _view(each: Revocation) -> rest.Revocation:
    return rest.Revocation(**{name: getattr(each, name) for name in rest.Revocation.model_fields})
