"""Start-up without Kafka or MongoDB: the process runs but is unready, and keeps retrying."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeVar

import structlog

from scanfleet.errors import DependencyError

PATIENCE_SECONDS: Final = 10.0  # time to start with available dependencies: joining a group takes up to a few seconds
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 10.0  # maximum delay until a recovered dependency is detected

_log = structlog.stdlib.get_logger(__name__)

Opened = TypeVar("Opened")


class Startup:
    """Opens the parts of a service in a background task; a `scanfleet.runtime.http.probes.Watched`."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.patience_seconds = patience_seconds
        self.missing = ""
        """The dependency that start-up waits for; empty once everything is open."""

        self._settled = asyncio.Event()  # everything is open, or has failed
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """False when a part failed permanently: the process must be restarted."""
        return self._task is None or not self._task.done() or self._closing.is_set()

    @property
    def ready(self) -> bool:
        """Whether everything is open."""
        return self._task is None or (self._settled.is_set() and self.alive)

    async def until_available(self, dependency: str, open_it: Callable[[], Awaitable[Opened]]) -> Opened:
        """Return the result of `open_it`, retrying with a delay while it raises DependencyError.

        Args:
            dependency: name of the dependency, for `/readyz` and the log.
            open_it: must release everything that it has opened if it raises.
        """
        self.missing, pause = dependency, FIRST_PAUSE_SECONDS
        while True:
            try:
                return await open_it()
            except DependencyError as error:
                _log.warning("dependency_unavailable", dependency=dependency, error=str(error), retry_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)

    @asynccontextmanager
    async def opening(self, parts: AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
        """Keep `parts` open for the duration of the block, which begins without them after `patience_seconds`.

        Raises:
            Exception: entering `parts` raised it before the block began; a later exception is logged.
        """
        self._task = asyncio.create_task(self._hold(parts), name="startup")
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.patience_seconds):
                    await self._settled.wait()
            if self._task.done():
                self._task.result()
            yield
        finally:
            if not self.ready:
                self._task.cancel()
            self._closing.set()
            await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.result()

    async def _hold(self, parts: AbstractAsyncContextManager[None]) -> None:
        try:
            async with parts:
                self.missing = ""
                self._settled.set()
                await self._closing.wait()
        except Exception:
            _log.exception("startup_failed")
            raise
        finally:
            self._settled.set()
