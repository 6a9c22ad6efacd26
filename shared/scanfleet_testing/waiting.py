"""Waiting for conditions, never for time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PATIENCE_SECONDS = 30.0  # that a test waits for a condition: far above the usual time
PAUSE_SECONDS = 0.01  # between two checks


async def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until `condition()` is true; an awaitable result is awaited first.

    Raises:
        TimeoutError: it did not hold in time.
    """
    async with asyncio.timeout(seconds):
        while not await _holds(condition):  # noqa: ASYNC110 # what is awaited has no event
            await asyncio.sleep(PAUSE_SECONDS)


async def _holds(condition: Callable[[], object]) -> object:
    found = condition()
    return await found if isinstance(found, Awaitable) else found
