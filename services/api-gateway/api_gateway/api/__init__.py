"""Serve the public REST API. Queries are forwarded to the services behind the gateway and only documented here."""

from __future__ import annotations

from fastapi import APIRouter

from api_gateway.api import audit, deletions, imports, info, resources, retention, revocations, session, sign_in, tasks
from scanfleet.contracts import rest

ROUTERS: tuple[APIRouter, ...] = (
    info.public,
    info.router,
    tasks.router,
    tasks.cancels,
    tasks.streams,
    tasks.all_streams,
    deletions.router,
    *map(resources.router_of, rest.RESOURCES),
    imports.router,
    retention.router,
    audit.router,
    revocations.router,
    session.router,
    sign_in.router,
)
