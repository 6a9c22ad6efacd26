"""Health, readiness and metrics of a service, and the routes that report them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, cast

import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from scanfleet.errors import ConfigurationError, DependencyError
from scanfleet.runtime.http.responses import error_response
from scanfleet.runtime.startup import Startup

Check = Callable[[], Awaitable[None]]

CHECK_TIMEOUT_SECONDS: Final = 2.0  # timeout of one readiness check: container orchestrators probe every few seconds

router = APIRouter()

_log = structlog.stdlib.get_logger(__name__)


class Watched(Protocol):
    """A bus, consumer or loop that runs in the background."""

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...


class Probes:
    """The conditions of a service's health and readiness; `create_app` creates it, the lifespan fills it."""

    def __init__(self) -> None:
        self.stage = ""
        """`starting` or `ending` while the process takes no requests; the server sets it."""

        self._watched: list[Watched] = []
        self._checks: dict[str, Check] = {}

    def watch(self, watched: Watched) -> None:
        """Add a background part: the service is unhealthy once it has died, and unready while it is unready."""
        self._watched.append(watched)

    def depend(self, name: str, check: Check) -> None:
        """Add a dependency: the service is unready while `check` raises or takes longer than `CHECK_TIMEOUT_SECONDS`."""
        self._checks[name] = check

    @property
    def healthy(self) -> bool:
        return all(watched.alive for watched in self._watched)

    async def missing(self) -> list[str]:
        """Return the names of unavailable dependencies, `bus` for a background part; empty when ready."""
        ready = all(watched.alive and watched.ready for watched in self._watched)
        unavailable = await asyncio.gather(*(self._unavailable(name, check) for name, check in self._checks.items()))
        return [name for name in unavailable if name] + ([] if ready else ["bus"])

    @staticmethod
    async def _unavailable(name: str, check: Check) -> str | None:
        try:
            await asyncio.wait_for(check(), CHECK_TIMEOUT_SECONDS)
        except (DependencyError, TimeoutError, OSError) as error:
            _log.warning("dependency_unavailable", dependency=name, error=str(error))
            return f"{name} ({error})" if isinstance(error, ConfigurationError) else name
        return None


@router.get("/healthz")
async def _healthz(request: Request) -> Response:
    if not cast(Probes, request.app.state.probes).healthy:
        return error_response(503, "a loop has died")
    return Response('{"status":"ok"}', media_type="application/json")


@router.get("/readyz")
async def readiness(request: Request) -> Response:
    """Answer whether the service is ready."""
    if starting := cast(Startup, request.app.state.startup).missing:
        return error_response(503, f"starting, waiting for {starting}")
    if stage := cast(Probes, request.app.state.probes).stage:
        return error_response(503, stage)
    if missing := await cast(Probes, request.app.state.probes).missing():
        return error_response(503, f"unavailable: {', '.join(missing)}")
    return Response('{"status":"ok"}', media_type="application/json")


@router.get("/metrics")
async def _metrics() -> Response:
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
