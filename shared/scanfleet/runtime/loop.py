"""Periodic background work of a service: sweeps, heartbeats, dispatch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from scanfleet.errors import DependencyError

_log = structlog.stdlib.get_logger(__name__)

_BACKOFF_SECONDS = 1.0  # retry delay after a dependency failure


class Loop:
    """Calls `step` periodically, and at once when woken; steps never overlap.

    After a `DependencyError` the loop retries. Any other error ends the loop, and the process must be restarted.

    Args:
        name: name of the loop, for the log.
        seconds: interval between two steps.
        step: the work to do.
        least: minimum interval in seconds between two steps; wake-ups in between share the next one.
        vital: whether the service is unready while steps raise `DependencyError`. False for repairs, which can wait
            while the service keeps working.
        grace: time in seconds for which `stop` waits for the current step before it cancels it.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        step: Callable[[], Awaitable[object]],
        *,
        least: float = 0.0,
        vital: bool = True,
        grace: float = 0.0,
    ) -> None:
        self._name = name
        self._seconds = seconds
        self._step = step
        self._least = least
        self._vital = vital
        self._grace = grace
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ready = True
        self.stopping = False
        """Whether `stop` was called: a long step should end early."""

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """Cancel the current step, if it does not end in time; a later run completes what it left unfinished."""
        self.stopping = True
        if self._task is not None:
            if self._grace:
                self.wake()
                await asyncio.wait({self._task}, timeout=self._grace)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        self._woken.set()

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    @property
    def ready(self) -> bool:
        return self._ready or not self._vital

    async def _run(self) -> None:
        try:
            while not self.stopping:
                await self._once()
        except Exception:
            _log.exception("loop_died", loop=self._name)
            raise

    async def _once(self) -> None:
        self._woken.clear()
        try:
            await self._step()
            self._ready = True
        except DependencyError as error:
            self._ready = False
            _log.warning("step_failed", loop=self._name, error=str(error), retry_seconds=_BACKOFF_SECONDS)
            await asyncio.sleep(_BACKOFF_SECONDS)
            return
        await asyncio.sleep(self._least)
        try:
            async with asyncio.timeout(self._seconds - self._least):
                await self._woken.wait()
        except TimeoutError:
            return
