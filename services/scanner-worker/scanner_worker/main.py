"""Build scanner-worker: create its dependencies and pass them in."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from secrets import token_hex

from fastapi import FastAPI

from scanfleet.contracts.messages import topics
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import logging, service, tracing
from scanfleet.runtime.startup import Startup
from scanfleet.security.audit import Refusals
from scanfleet.services import WORKER
from scanner_worker.handlers.batch import Abilities
from scanner_worker.handlers.worker import Worker
from scanner_worker.scanner.process import Limits, Nmap
from scanner_worker.scanner.raw import may_send_raw, privileges
from scanner_worker.settings import Settings


def create_app() -> FastAPI:
    """Create the service, which `python -m scanfleet.runtime.server scanner-worker` runs."""
    settings = Settings()
    logging.configure(WORKER, settings)
    tracing.configure(WORKER, settings)
    refusals = Refusals(WORKER)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        grants = settings.user_grants
        # Without nmap the worker stays excluded and logs the cause.
        program = shutil.which(settings.nmap) or settings.nmap
        # The random part gives a restarted worker a new id, so that no assignment for the old process reaches it.
        worker_id = f"{settings.instance}-{token_hex(4)}"
        bus = KafkaBus(settings, source=WORKER, instance=settings.instance)
        limits = Limits(settings.max_output_bytes, settings.max_host_bytes, settings.stall_seconds)
        nmap = Nmap(program, limits, settings.allowed_scripts)
        abilities = Abilities(
            slots=settings.slots,
            raw=may_send_raw(privileges(program)),
            rules=settings.target_rules,
            attempt_seconds=settings.attempt_seconds,
            scripts=settings.allowed_scripts,
            grants=grants,
            egress=str(settings.egress_address) if settings.egress_address else None,
        )
        worker = Worker(worker_id, abilities, nmap, bus, refusals.add_denied_chunk)
        assignments = bus.tail(
            topics.SCAN_TASKS,
            worker,
            wants=lambda key: key == worker_id,
            partition=topics.SCAN_TASKS.partition_of(worker_id),
        )
        startup: Startup = app.state.startup
        async with AsyncExitStack() as stack:
            stack.callback(_exit_with_0)
            await nmap.start()
            stack.push_async_callback(nmap.stop)
            await startup.until_available("kafka", bus.start)
            stack.push_async_callback(bus.stop)
            app.state.probes.watch(bus)
            app.state.probes.watch(await stack.enter_async_context(refusals.publishing_to(bus)))
            await startup.until_available("kafka", assignments.start)
            stack.push_async_callback(assignments.stop)
            await worker.start()
            app.state.probes.depend("nmap", worker.exclusion.probe)
            # Stopped first, while assignments are still consumed, so that a scan that is finishing can still be cancelled.
            stack.push_async_callback(worker.stop, settings.stop_grace_seconds)
            for part in (assignments, worker, nmap):
                app.state.probes.watch(part)
            yield

    return service.create_app(name=WORKER, settings=settings, lifespan=lifespan, refusals=refusals)


def _exit_with_0() -> None:
    """Exit with 0 after a graceful shutdown: after the lifespan uvicorn raises the received signal again."""
    # Only uvicorn installs a handler for the signal; block it only in that case.
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
