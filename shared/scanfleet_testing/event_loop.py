"""Count and time the turns of another task, for tests that long work leaves the event loop to others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Turns:
    count: int = 0
    longest: float = 0.0
    """The most CPU seconds of the event loop's thread without a turn; those of other programs do not count."""

    _last: float = field(default_factory=time.thread_time)

    def end(self) -> None:
        """Record the time since the last turn."""
        now = time.thread_time()
        self.longest, self._last = max(self.longest, now - self._last), now


@asynccontextmanager
async def counting_turns() -> AsyncIterator[Turns]:
    """Count how often the event loop runs another task during the block."""
    turns = Turns()

    async def other() -> None:
        while True:
            turns.end()
            turns.count += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(other())
    try:
        yield turns
        turns.end()
    finally:
        running.cancel()
