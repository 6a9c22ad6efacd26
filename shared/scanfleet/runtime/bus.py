"""The bus as services see it: publish batches, handle batches.

`scanfleet.kafka` implements it on Kafka, `scanfleet_testing` in memory; both pass the same test suite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol

from typing_extensions import TypeVar  # with defaults, which Python has from 3.13 on

from scanfleet.contracts.messages import Message
from scanfleet.contracts.messages.envelope import RawRecord
from scanfleet.contracts.messages.topics import M_co, Topic

M = TypeVar("M", bound=Message, default=Message)
M_contra = TypeVar("M_contra", bound=Message, contravariant=True, default=Message)

DeadLetterCallback = Callable[[RawRecord, str], None]


@dataclass(frozen=True, slots=True)
class Record(Generic[M_co]):
    """A decoded message and its position in the log."""

    message: M_co
    topic: str
    partition: int
    offset: int
    timestamp: datetime
    """Time at which the broker appended the record (UTC): the only clock that all readers share."""


class Handler(Protocol[M_contra]):
    """Handles the messages of a topic. One loop calls one handler, so its methods never run concurrently.

    A handler with state per partition derives from `PartitionListener` too.

    A batch is one unit of work. Only the loop commits, after `handle` has returned. Delivery is at least once: a batch
    may be redelivered, whole or in part, so `handle` must be idempotent. The exception that `handle` raises decides
    what happens:

    - `DependencyError`: the loop retries the same batch after a delay, indefinitely, and the service is unready.
    - any other: the loop handles the batch again record by record. A record that raises again is dead-lettered; a
      reader without a group skips and counts it.
    """

    async def handle(self, records: Sequence[Record[M_contra]]) -> Collection[Record] | None:
        """Handle the records, or some of them, but at least one.

        Returns:
            The records that are left: the next call gets them again, together with newer ones.
        """


class PartitionListener:
    """Base of handlers with state per partition: the loop calls these methods, which do nothing unless overridden.

    They never run concurrently with `handle`.
    """

    async def assigned(self, partitions: Collection[int]) -> None:
        """React to the assignment of these partitions."""

    async def revoked(self, partitions: Collection[int]) -> None:
        """React to the revocation of these partitions, or to the stop of their consumer."""

    async def caught_up(self, partitions: Collection[int]) -> None:
        """React to having handled these partitions to their end.

        Called about once a second; the end is the one that the broker reported after the previous call.
        """


class Publisher(Protocol):
    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        """Send all messages, in order for each key, and return when the broker has acknowledged every one.

        Raises:
            MessageError: a message is too large or not of this topic; none was sent.
            DependencyError: the broker did not acknowledge in time; any of the messages may still arrive, so do not
                resend messages that must not be duplicated.
        """


class Consumer(Protocol):
    """A running loop over one topic."""

    async def start(self) -> None:
        """Return once positions are resolved: every message sent afterwards will be read.

        Raises:
            DependencyError: the broker is unavailable.
        """

    async def stop(self) -> None:
        """Finish and commit the current batch, then leave the group."""

    @property
    def alive(self) -> bool:
        """False when the loop has died of an unexpected error; the process must then be restarted."""

    @property
    def ready(self) -> bool:
        """False while the current batch waits for a dependency, or the broker is unavailable."""


class Bus(Publisher, Protocol):
    """One connection to the bus, made in `main.py`."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    @property
    def alive(self) -> bool:
        """False when sent messages can no longer be accounted for; the process must then be restarted."""

    @property
    def ready(self) -> bool:
        """False while the broker is unavailable."""

    def leaderless(self, topic: Topic) -> Collection[int]:
        """Return the partitions of the topic that are known to have no leader: no message to them is acknowledged."""

    def on_dead_letter(self, callback: DeadLetterCallback) -> None:
        """Call `callback` with each record that is dead-lettered from now on, and the reason."""

    def consume(self, topic: Topic[M], group: str, handler: Handler[M]) -> Consumer:
        """Return a member of `group`: it shares the topic's partitions, starts at the earliest record and commits."""

    def tail(
        self,
        topic: Topic[M],
        handler: Handler[M],
        *,
        wants: Callable[[str], bool] | None = None,
        partition: int | None = None,
    ) -> Consumer:
        """Return a reader of every partition without a group, from the end, without commits.

        It skips and counts records that it cannot handle, because other processes read the same records. With `wants` it
        decodes and handles only the records for whose key it returns True. With `partition` it reads only that one.
        """
