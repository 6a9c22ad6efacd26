"""A worker that cannot run nmap excludes itself: it gets no chunks until a trial run of nmap succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from prometheus_client import Gauge

from scanfleet.errors import DependencyError
from scanner_worker.domain import CannotStartError

FAILURES: Final = 3  # runs in a row that failed on different chunks: one bad chunk excludes no worker
SHORTEST_S: Final = 1.0  # before the first trial run, doubled with each that follows
LONGEST_S: Final = 60.0

_excluded = Gauge("scanfleet_worker_excluded", "1 while the worker gets no chunks because it cannot run nmap, else 0.")
_log = structlog.stdlib.get_logger(__name__)


class Exclusion:
    """Whether the worker is excluded, and the trial runs that end it.

    Attributes:
        reason: why the worker is excluded; empty while it is not.
    """

    def __init__(self, check: Callable[[], Awaitable[None]], changed: Callable[[], None]) -> None:
        """Begin excluded: the first trial run decides.

        Args:
            check: a trial run; raises CannotStartError.
            changed: called whenever the worker was excluded or included.
        """
        self.reason = "nmap has not been checked yet"
        self._check = check
        self._changed = changed
        self._pause = SHORTEST_S
        self._failed: set[str] = set()
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Try nmap once, and from now on whenever the worker is excluded."""
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
        """Return while the worker is not excluded.

        Raises:
            DependencyError: it is; says why.
        """
        if self.reason:
            raise DependencyError(self.reason)

    def exclude(self, reason: str) -> None:
        """Exclude the worker until a trial run succeeds."""
        _log.error(
            "the worker excludes itself and gets no chunks until a trial run of nmap succeeds",
            cause=reason,
            remedy="free the disk of the temporary folder, raise the process or memory limit, or install nmap; no restart needed",
        )
        self.reason = reason
        _excluded.set(1)
        self._begun.set()
        self._changed()

    def succeeded(self) -> None:
        """Note a run of nmap that counts."""
        self._failed.clear()
        self._pause = SHORTEST_S

    def failed(self, chunk_id: str, reason: str) -> None:
        """Note a run of nmap that failed on this chunk."""
        if len(self._failed) < FAILURES:
            self._failed.add(chunk_id)
        if len(self._failed) == FAILURES:  # and again after a trial run, until a scan succeeds
            self.exclude(f"nmap failed on {FAILURES} chunks in a row, the last time because {reason}")

    async def _recover(self) -> None:
        while True:
            await self._begun.wait()
            # Longer with each trial run until a chunk succeeds: a trial run may pass where a scan cannot start.
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_S)
            await self._try()

    async def _try(self) -> None:
        try:
            await self._check()
        except CannotStartError as error:
            self.exclude(str(error))
        else:
            _log.info("nmap works", before=self.reason)
            self.reason = ""
            self._begun.clear()
            _excluded.set(0)
            self._changed()
