"""Waiting for conditions, never for time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PATIENCE = 30.0  # seconds that a test waits for a condition: far above the usual time
PAUSE = 0.01  # seconds between two checks


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until `condition()` is true; an awaitable result is awaited first.

    Raises:
        TimeoutError: it did not hold in time.
    """
    async with asyncio.timeout(seconds):
        while not await _holds(condition):  # noqa: ASYNC110 # what is awaited has no event
            await asyncio.sleep(PAUSE)


async def _holds(condition: Callable[[], object]) -> object:
    found = condition()
    return await found if isinstance(found, Awaitable) else found
