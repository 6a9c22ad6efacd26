"""A broker that is away, in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aiokafka.errors import KafkaError

from scanfleet.errors import DependencyError

BACKOFF_MS: Final = (
    300  # between two tries of a client: a broker that is away costs little, one that is back is found soon
)


async def connect(start: Callable[[], Awaitable[None]]) -> None:
    """Call `start` until it finds a broker; the caller bounds it in time."""
    while True:
        try:
            await start()
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(BACKOFF_MS / 1000)
        else:
            return


@contextmanager
def depending(on: str) -> Iterator[None]:
    """Turn what the client raises, a timeout too, into DependencyError; `on` says what could not be done."""
    try:
        yield
    except (KafkaError, TimeoutError) as error:
        raise DependencyError(f"{on}: {error!r}") from error
