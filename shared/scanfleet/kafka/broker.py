"""A broker that is away, in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aiokafka.errors import KafkaError

from scanfleet.errors import DependencyError

RETRY_SECONDS: Final = 0.2  # between two looks for a broker that is not up yet


async def connect(start: Callable[[], Awaitable[None]]) -> None:
    """Call `start` until it finds a broker; the caller bounds it in time."""
    while True:
        try:
            await start()
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


@contextmanager
def depending(on: str) -> Iterator[None]:
    """Turn what the client raises, a timeout too, into DependencyError; `on` says what could not be done."""
    try:
        yield
    except (KafkaError, TimeoutError) as error:
        raise DependencyError(f"{on}: {error!r}") from error
