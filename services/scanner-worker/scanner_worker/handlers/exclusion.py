"""Exclude a worker that cannot run nmap: the worker gets no chunks until a trial run of nmap succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from scanfleet.contracts.messages import ScanChunk
from scanfleet.errors import DependencyError
from scanner_worker.domain.scan import CannotStartError
from scanner_worker.metrics import EXCLUDED, EXCLUSIONS

FAILURES: Final = 3  # consecutive failed runs on different chunks: one bad chunk does not exclude a worker
SHORTEST_SECONDS: Final = 1.0  # delay before the first trial run; doubled after each further one until a scan succeeds
LONGEST_SECONDS: Final = 60.0

_log = structlog.stdlib.get_logger(__name__)


class Exclusion:
    """The exclusion state of the worker, and the trial runs that end an exclusion.

    Attributes:
        reason: why the worker is excluded; empty if it is not.
    """

    def __init__(self, check: Callable[[], Awaitable[None]], changed: Callable[[], None]) -> None:
        """Start excluded, until the first trial run succeeds.

        Args:
            check: a trial run; raises CannotStartError if it fails.
            changed: called whenever the exclusion begins or ends.
        """
        self.reason = "nmap has not been checked yet"
        self._check = check
        self._changed = changed
        self._pause = SHORTEST_SECONDS
        self._failed: set[str] = set()
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run a trial now, and further ones while the worker is excluded."""
        await self._try()
        self._task = asyncio.create_task(self._recover(), name="check nmap")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    async def probe(self) -> None:
        """Check that the worker is not excluded.

        Raises:
            DependencyError: the worker is excluded; the message has the reason.
        """
        if self.reason:
            raise DependencyError(self.reason)

    def exclude(self, reason: str) -> None:
        """Exclude the worker until a trial run succeeds."""
        _log.error(
            "worker_excluded",
            cause=reason,
            next_step="free the disk of the temporary folder, raise the process or memory limit, or install nmap; without a restart, "
            "the worker gets chunks again when a trial run of nmap succeeds",
        )
        if not self.reason:
            EXCLUSIONS.inc()
        self.reason = reason
        EXCLUDED.set(1)
        self._begun.set()
        self._changed()

    def succeeded(self) -> None:
        """Record a successful run of nmap."""
        self._failed.clear()
        self._pause = SHORTEST_SECONDS

    def failed(self, chunk: ScanChunk, reason: str) -> None:
        """Record a run of nmap that failed on this chunk; one that was dispatched before may itself be the cause."""
        if chunk.attempt > 1:
            return
        self._failed.add(chunk.chunk_id)
        if len(self._failed) == FAILURES:
            self._failed.clear()
            self._pause = SHORTEST_SECONDS  # targets may be the cause, and must not exclude the worker for long
            self.exclude(f"nmap failed on {FAILURES} consecutive chunks, the last time because {reason}")

    async def _recover(self) -> None:
        while True:
            await self._begun.wait()
            # The delay grows although a trial run succeeds: a scan may still be unable to start.
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_SECONDS)
            await self._try()

    async def _try(self) -> None:
        try:
            await self._check()
        except CannotStartError as error:
            self.exclude(str(error))
        else:
            _log.info("worker_available", cause="a trial run of nmap succeeded", before=self.reason)
            self.reason = ""
            self._begun.clear()
            EXCLUDED.set(0)
            self._changed()
