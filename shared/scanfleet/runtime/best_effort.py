"""Publish messages whose loss is repaired later: a partition without a leader must not block other jobs. ADR 15."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher

# Far below the 5 s after which the gateway expires a command that waits behind the messages.
TIMEOUT_SECONDS: Final = 1.0

_log = structlog.stdlib.get_logger(__name__)


async def try_publish(publisher: Publisher, topic: Topic, messages: Sequence[Message], next_step: str) -> None:
    """Publish these messages as `best_effort` does.

    Args:
        publisher: publishes them.
        topic: their topic.
        messages: the messages.
        next_step: how the loss of a message is repaired, for the log.
    """
    async with best_effort(topic, len(messages), next_step):
        await publisher.publish(topic, messages)


@asynccontextmanager
async def best_effort(
    topic: Topic, messages: int, next_step: str, seconds: float = TIMEOUT_SECONDS
) -> AsyncIterator[None]:
    """Wait for the body, which publishes messages; log if some were not acknowledged.

    Some may arrive although they were not acknowledged.

    Args:
        topic: their topic.
        messages: number of messages.
        next_step: how the loss of a message is repaired, for the log.
        seconds: timeout.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except (DependencyError, TimeoutError) as error:
        cause = (
            str(error)
            or f"no acknowledgement within {seconds:.0f} s; is the broker available, and does {topic.name} exist?"
        )
        _log.warning("publish_failed", topic=topic.name, messages=messages, error=cause, next_step=next_step)
