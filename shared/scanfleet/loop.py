"""Work that a service does on its own, again and again: sweeps, heartbeats, dispatch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from scanfleet.errors import DependencyError

_log = structlog.get_logger()

_BACKOFF = 1.0  # seconds after a failed dependency: soon enough once it is back, rare enough to do no harm


class Loop:
    """Calls `step` every so many seconds, and at once when woken; a step never overlaps with itself.

    After a `DependencyError` the loop tries again. Any other error ends the loop, and the process must be replaced.

    Args:
        name: of the loop, for the log.
        seconds: between two steps.
        step: is called.
        least: seconds at least between two steps; what comes meanwhile shares the next one.
        vital: whether the service is unready while steps raise `DependencyError`. A repair is not vital: what it repairs waits,
            and the service goes on.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        step: Callable[[], Awaitable[object]],
        *,
        least: float = 0.0,
        vital: bool = True,
    ) -> None:
        self._name = name
        self._seconds = seconds
        self._step = step
        self._least = least
        self._vital = vital
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ready = True

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """Cancel the step in hand: whatever it leaves half done is found again."""
        if self._task is not None:
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
            while True:
                await self._once()
        except Exception:
            _log.exception("loop died", loop=self._name)
            raise

    async def _once(self) -> None:
        self._woken.clear()
        try:
            await self._step()
            self._ready = True
        except DependencyError as error:
            self._ready = False
            _log.warning("will try again", loop=self._name, error=str(error))
            await asyncio.sleep(_BACKOFF)
            return
        await asyncio.sleep(self._least)
        try:
            async with asyncio.timeout(self._seconds):
                await self._woken.wait()
        except TimeoutError:
            return
