"""Hold a turn of the caller for the routes that read a whole job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, cast

from fastapi import Depends, Request

from scanfleet.runtime.turns import Turns
from scanfleet.security.auth import Caller


async def _turn(caller: Caller, request: Request) -> AsyncIterator[None]:
    async with cast(Turns, request.app.state.turns).turn(caller.user_id):
        yield  # to the end of the answer


TURN: Final = Depends(_turn)
