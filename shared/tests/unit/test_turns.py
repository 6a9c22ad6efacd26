"""Turns of users for answers that read a whole job."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from scanfleet.errors import UnavailableError
from scanfleet.runtime.turns import AT_ONCE, IN_ALL, Turns


@pytest.mark.proves("G20", "A22")
async def test_turn_of_a_user_with_many_requests_delays_no_other_user() -> None:
    """A user's fifth request gets an error after its wait, and one of another user is served meanwhile."""
    turns = Turns(wait_seconds=0.05)
    async with AsyncExitStack() as held:
        for _ in range(AT_ONCE):
            await held.enter_async_context(turns.turn(7))
        with pytest.raises(UnavailableError, match="too many requests of this kind are in progress; try again"):
            await held.enter_async_context(turns.turn(7))
        async with turns.turn(8):
            pass
    async with turns.turn(7):
        pass


@pytest.mark.proves("G20", "A22")
async def test_turns_of_all_users_are_bounded() -> None:
    """While many users have turns, one more user waits, and gets the next one that becomes free."""
    turns = Turns()
    async with AsyncExitStack() as held:
        for user in range(IN_ALL):
            await held.enter_async_context(turns.turn(user))
        async with AsyncExitStack() as later:
            waiting = asyncio.create_task(later.enter_async_context(turns.turn(IN_ALL)))
            for _ in range(3):
                await asyncio.sleep(0)
            assert not waiting.done()
            await held.aclose()
            await waiting


async def test_turn_is_free_again_after_a_cancelled_wait() -> None:
    """A request that ends while it waits takes no turn."""
    turns = Turns()
    async with AsyncExitStack() as held:
        for _ in range(AT_ONCE):
            await held.enter_async_context(turns.turn(7))
        waiting = asyncio.create_task(held.enter_async_context(turns.turn(7)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with AsyncExitStack() as held:
        for _ in range(AT_ONCE):
            await held.enter_async_context(turns.turn(7))
