"""A replica of the orchestrator in a separate process that can kill itself between two of its calls.

Run as `python replica.py <kafka> <mongodb> <prefix> <instance> <event> <moment>`: it kills itself `before` or `after` the
first event of that kind is published, which is after it was stored. Without the last two it runs until it is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable

import structlog

from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.main import Orchestrator
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import KEYS, RULES
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.topics import Topic
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import mongo
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import ORCHESTRATOR
from scanfleet_testing.chunk_grants import signer


class KillingPublisher:
    """A publisher that kills its process at one kind of event."""

    def __init__(self, bus: KafkaBus, kind: str, moment: str) -> None:
        self._bus = bus
        self._kind = kind
        self._moment = moment

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        messages = list(messages)
        fatal = any(type(message).__name__ == self._kind for message in messages)
        if fatal and self._moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await self._bus.publish(topic, messages)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)


async def main(kafka: str, mongodb: str, prefix: str, instance: str, *death: str) -> None:
    kind, moment = death or ("", "")
    store = MongoStore(mongo.connect(mongodb, prefix.strip("-")), KEYS, now=utc_now)
    await store.prepare()
    bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source=ORCHESTRATOR, instance=instance)
    await bus.start()
    clock = PlatformTime(store.time)
    await clock.refresh()
    orchestrator = Orchestrator(
        store,
        KillingPublisher(bus, kind, moment),
        leaderless=bus.leaderless,
        rules=RULES,
        keys=KEYS,
        signer=signer(),
        clock=clock,
        lease_seconds=10.0,
        stored_seconds=5.0,
        quotas=Quotas(),
        keep=None,
        deletes_per_second=2_000,
        raw_worker_seconds=600.0,
        max_workers=2_000,
    )
    for loop in (*orchestrator.request_loops, *orchestrator.job_loops, *orchestrator.consumers(bus)):
        await loop.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    # Standard output carries only the readiness line; the test does not drain it.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(*sys.argv[1:]))
