"""Work that a service does on its own."""

from __future__ import annotations

import asyncio

import pytest

from scanfleet.errors import DependencyError
from scanfleet.runtime.loop import Loop
from scanfleet_testing.waiting import until


async def test_wake_ups_within_the_least_interval_share_one_step() -> None:
    """Any number of wake-ups within the minimum interval cause one more step, and only after the interval."""
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


async def test_steps_of_a_loop_that_is_not_woken_keep_the_interval() -> None:
    """The minimum interval is a part of the interval, not an addition to it."""
    begun: list[float] = []

    async def step() -> None:
        begun.append(asyncio.get_running_loop().time())

    loop = Loop("test", 0.5, step, least=0.5)
    await loop.start()
    await until(lambda: len(begun) == 3)
    await loop.stop()
    assert min(begun[1] - begun[0], begun[2] - begun[1]) < 2 * 0.5  # the interval, and as much again for a slow machine


@pytest.mark.parametrize("vital", [True, False])
async def test_loop_with_a_failed_dependency_is_unready_only_if_it_is_vital(*, vital: bool) -> None:
    """A repair that cannot reach its database keeps trying, and leaves the service ready and alive."""
    tries = 0

    async def step() -> None:
        nonlocal tries
        tries += 1
        raise DependencyError("MongoDB: no server")

    loop = Loop("test", 60.0, step, vital=vital)
    await loop.start()
    await until(lambda: tries == 2)
    assert (loop.alive, loop.ready) == (True, not vital)
    await loop.stop()
