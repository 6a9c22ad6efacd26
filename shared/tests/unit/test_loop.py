"""Work that a service does on its own."""

from __future__ import annotations

import asyncio

from scanfleet.loop import Loop


async def test_what_comes_soon_after_a_step_shares_the_next_one() -> None:
    """However often a loop is woken within its least pause, one more step follows, and not before the pause is over."""
    begun: list[float] = []
    stepped = asyncio.Event()

    async def step() -> None:
        begun.append(asyncio.get_running_loop().time())
        stepped.set()

    loop = Loop("test", 60.0, step, least=0.1)
    await loop.start()
    await stepped.wait()
    stepped.clear()
    for _ in range(10):
        loop.wake()
        await asyncio.sleep(0)
    await stepped.wait()
    await asyncio.sleep(0)
    await loop.stop()
    assert len(begun) == 2
    assert begun[1] - begun[0] >= 0.1
