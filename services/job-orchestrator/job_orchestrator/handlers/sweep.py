"""Repairs: whatever is not yet as it should be is asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Final

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.store import Store
from job_orchestrator.handlers.chunks import change, scanned_again
from job_orchestrator.handlers.jobs import Jobs
from job_orchestrator.metrics import CENSUS
from scanfleet.bus import Publisher
from scanfleet.clock import utc_now
from scanfleet.messages.topics import SCAN_RESULTS

_OLD_EVENT: Final = timedelta(seconds=5)  # the replica that made it publishes it in milliseconds, if it lives
_RECONCILE_SECONDS: Final = 10.0
_CENSUS_SECONDS: Final = 10.0  # it reads an index of all that is unfinished
_PAGE: Final = 500


class Sweeper:
    """Runs on every replica; two of them do no harm.

    Args:
        store: where jobs and chunks are.
        publisher: for repeated requests to result-store.
        jobs: relays and reconciles.
        stored_seconds: how long a scanned chunk waits for result-store before it is asked again.
    """

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        jobs: Jobs,
        stored_seconds: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._jobs = jobs
        self._monotonic = monotonic
        self._patience = timedelta(seconds=stored_seconds)
        self._reconciled = float("-inf")
        self._counted = float("-inf")

    async def sweep(self) -> None:
        """One pass; called about once a second.

        Raises:
            DependencyError: the next pass does what this one left.
        """
        await self._jobs.relay(await self._store.jobs_with_old_events(utc_now() - _OLD_EVENT, _PAGE))
        await self._ask_again()
        now = self._monotonic()
        if now - self._counted > _CENSUS_SECONDS:
            self._counted = now  # also if it fails: a database in trouble is not asked more often
            CENSUS.show(await self._store.census())
        if now - self._reconciled > _RECONCILE_SECONDS:
            await self._reconcile_all()
            self._reconciled = now

    async def _ask_again(self) -> None:
        overdue = await self._store.overdue_chunks(utc_now() - self._patience, _PAGE)
        if not overdue:
            return
        await self._publisher.publish(SCAN_RESULTS, scanned_again(overdue))
        now = utc_now()

        def asked(chunk: Chunk) -> Chunk:
            return replace(chunk, scanned_at=now) if chunk.state is ChunkState.SCANNED else chunk

        await change(self._store, [chunk.id for chunk in overdue], asked)

    async def _reconcile_all(self) -> None:
        after = 0
        while page := await self._store.unsettled_jobs(after, _PAGE):
            await self._jobs.reconcile(page)
            after = page[-1]
