"""The bus as services see it: publish batches, handle batches.

`scanfleet.kafka` is the real thing, `scanfleet.testing` holds the in-memory one; both pass the same suite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from scanfleet.messages import Message
from scanfleet.messages.envelope import RawRecord
from scanfleet.messages.topics import Topic

DeadLetterHearer = Callable[[RawRecord, str], None]


@dataclass(frozen=True, slots=True)
class Record:
    """A decoded message and where it stands in the log."""

    message: Message
    topic: str
    partition: int
    offset: int
    timestamp: datetime
    """When the broker appended it (UTC): the only clock that two readers share."""


class Handler(Protocol):
    """What a service does with a topic. One loop calls one handler: nothing here runs concurrently with itself.

    A batch is one unit of work, and only the loop commits, after `handle` returned. A batch may come again, whole or in
    part. What `handle` raises says what happens next:

    - `DependencyError`: the same batch is handled again after a pause, without end, and the service is unready.
    - anything else: the batch is handled again record by record, and the record that raises again is dead-lettered, or
      skipped and counted by a reader without a group.
    """

    async def handle(self, records: Sequence[Record]) -> None: ...

    async def assigned(self, partitions: Collection[int]) -> None:
        """These partitions are ours from now on."""

    async def revoked(self, partitions: Collection[int]) -> None:
        """These are not ours any more."""

    async def caught_up(self, partitions: Collection[int]) -> None:
        """About once a second: these were just read and handled up to the end that the broker named after the last call."""


class Publisher(Protocol):
    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        """Send all messages, in order for each key, and return when the broker has acknowledged every one.

        Raises:
            MessageError: a message is too large or not of this topic; none was sent.
            DependencyError: the broker did not acknowledge in time; any of them may yet arrive, so do not send again
                what must not be in the log twice.
        """


class Consumer(Protocol):
    """A running loop over one topic."""

    async def start(self) -> None:
        """Return once positions are resolved: a message sent from now on will be seen.

        Raises:
            DependencyError: the broker is away.
        """

    async def stop(self) -> None:
        """Finish the batch in hand, commit it, leave the group."""

    @property
    def alive(self) -> bool:
        """False when the loop has died of a fault of its own; the process must then be replaced."""

    @property
    def ready(self) -> bool:
        """False while a dependency keeps the batch in hand from being handled, or the broker is away."""


class Bus(Publisher, Protocol):
    """One connection to the bus, made in `main.py`."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    @property
    def alive(self) -> bool:
        """False when what was sent can no longer be accounted for; the process must then be replaced."""

    @property
    def ready(self) -> bool:
        """False while the broker is away."""

    def hear_dead_letters(self, hear: DeadLetterHearer) -> None:
        """Call `hear` with each record that was dead-lettered from now on, and why."""

    def consume(self, topic: Topic, group: str, handler: Handler) -> Consumer:
        """A member of `group`: shares the topic's partitions, from the earliest record, with commits."""

    def tail(self, topic: Topic, handler: Handler, *, key: str | None = None) -> Consumer:
        """A reader of every partition without a group, from the end, without commits.

        What it cannot handle it skips and counts: other processes read the same records. With `key` it decodes and handles the
        records of that key alone.
        """
