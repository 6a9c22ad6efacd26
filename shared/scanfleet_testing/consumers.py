"""Consumers in tests: a recording handler, and a context manager that runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from scanfleet.contracts.messages import Message
from scanfleet.runtime.bus import Consumer, PartitionListener, Record


class Recorder(PartitionListener):
    """A handler that records its calls; `does` is called with each batch before it counts as handled."""

    def __init__(self, does: Callable[[Sequence[Record]], object] = lambda _: None) -> None:
        self._does = does
        self.tries: list[Sequence[Record]] = []
        self.handled: list[Record] = []
        self.partitions: set[int] = set()
        self.caught_up_after: list[tuple[set[int], int]] = []
        """Partitions, and the number of records handled before."""

    async def handle(self, records: Sequence[Record]) -> Collection[Record]:
        self.tries.append(records)
        result = self._does(records)
        if asyncio.iscoroutine(result):
            await result
        self.handled += records
        return ()

    async def assigned(self, partitions: Collection[int]) -> None:
        self.partitions |= set(partitions)

    async def revoked(self, partitions: Collection[int]) -> None:
        self.partitions -= set(partitions)

    async def caught_up(self, partitions: Collection[int]) -> None:
        self.caught_up_after.append((set(partitions), len(self.handled)))

    @property
    def messages(self) -> list[Message]:
        """Return the handled messages."""
        return [record.message for record in self.handled]


class Running:
    """Runs consumers and stops them at the end of the block."""

    def __init__(self, *consumers: Consumer) -> None:
        self._consumers = consumers

    async def __aenter__(self) -> None:
        for consumer in self._consumers:
            await consumer.start()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(consumer.stop() for consumer in self._consumers))
