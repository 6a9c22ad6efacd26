"""Serve the queries of the public API and the gateway's internal queries."""

from __future__ import annotations

from fastapi import APIRouter

from job_orchestrator.api import (
    access,
    audit,
    coverage,
    deletions,
    estimates,
    imports,
    internal,
    resources,
    retention,
    tasks,
)
from scanfleet.security.auth import for_gateway

ROUTERS: tuple[APIRouter, ...] = (
    tasks.router,
    estimates.router,
    coverage.router,
    deletions.router,
    *resources.ROUTERS,
    retention.router,
    imports.router,
    audit.router,
    internal.router,
    access.router,
    access.internal,
    for_gateway,
)
