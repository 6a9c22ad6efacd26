"""Publish messages whose loss is repaired later: a partition without a leader must not block other jobs. ADR 15."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher

_log = structlog.get_logger()


async def try_publish(publisher: Publisher, topic: Topic, messages: Sequence[Message], next_step: str) -> None:
    """Publish these messages; log if some were not acknowledged.

    Args:
        publisher: publishes them.
        topic: their topic.
        messages: the messages; some may arrive although they were not acknowledged.
        next_step: how the loss of a message is repaired, for the log.
    """
    try:
        await publisher.publish(topic, messages)
    except DependencyError as error:
        _log.warning("publish_failed", topic=topic.name, messages=len(messages), error=str(error), next_step=next_step)
