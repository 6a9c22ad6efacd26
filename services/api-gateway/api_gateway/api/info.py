"""The platform's settings for clients, and the caller with the remaining limits."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, cast

from fastapi import APIRouter, Request

from api_gateway.api.admission import Admission, Route
from api_gateway.api.openapi import errors
from api_gateway.api.state import StateDep
from scanfleet import VERSION
from scanfleet.contracts import rest
from scanfleet.security.auth import Caller

public = APIRouter(prefix="/api/v1", tags=["platform"])
router = APIRouter(prefix="/api/v1", tags=["platform"], route_class=Route)


@public.get("/info", responses=errors(guarded=False))
async def read_info(request: Request, state: StateDep) -> rest.Info:
    """Read the settings that a client needs for sign-in and forms; needs no token."""
    settings = state.settings
    limits = await state.scan_limits.read()
    return rest.Info(
        version=VERSION,
        api="v1",
        issuer=settings.jwt_issuer,
        client_id=settings.oidc_client_id,
        audience=settings.jwt_audience,
        scopes=list(settings.oidc_scopes),
        presets=limits.presets,
        scripts=limits.scripts,
        max_addresses=limits.max_addresses,
        sign_in=["token", "oidc"] if settings.oidc_client_id else ["token"],
        sign_in_to_page=_ways_to_page(request),
    )


def _ways_to_page(request: Request) -> list[Literal["token", "oidc"]]:
    if request.app.state.sessions is None:
        return []
    return ["token", "oidc"] if request.app.state.sign_in else ["token"]


@router.get("/me", responses=errors())
async def read_me(request: Request, caller: Caller) -> rest.Me:
    """Read the caller by the token, and the remaining limits."""
    admission = cast(Admission, request.app.state.admission)
    return rest.Me(
        user_id=caller.user_id,
        admin=caller.admin,
        expires_at=datetime.fromtimestamp(caller.expires_at, UTC),
        limits=await admission.left(caller.user_id),
    )
