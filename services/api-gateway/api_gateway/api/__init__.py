"""Serve the public REST API. Queries are forwarded to the services behind the gateway and only documented here."""

from __future__ import annotations

from fastapi import APIRouter

from api_gateway.api import forwarded, info, resources, session, sign_in, tasks
from scanfleet.contracts import rest

ROUTERS: tuple[APIRouter, ...] = (
    info.public,
    info.router,
    tasks.router,
    forwarded.TASKS,
    tasks.cancels,
    tasks.streams,
    tasks.all_streams,
    forwarded.DELETIONS,
    *map(resources.router_of, rest.RESOURCES),
    forwarded.SUBNETS,
    forwarded.AUDIT,
    forwarded.REVOCATIONS,
    session.router,
    sign_in.router,
)
