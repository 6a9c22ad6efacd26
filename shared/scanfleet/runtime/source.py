"""The port between a `ConsumerLoop` and a broker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from scanfleet.contracts.messages.envelope import RawRecord
from scanfleet.errors import ScanfleetError


class BatchDroppedError(ScanfleetError):
    """The current batch was abandoned without a commit; it is redelivered, here or to another member."""


class Listener(Protocol):
    """Receives the rebalances of a source."""

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None:
        """Return when the current batch is finished or dropped."""


class Source(Protocol):
    """Provides the records of one topic to a loop, as a member of a group or as a tail.

    Each method raises DependencyError, or OSError, when the broker is unavailable.
    """

    async def open(self, listener: Listener) -> None:
        """Return when the positions are resolved and `listener.assigned` has been called."""

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        """Return the next records in order for each partition, or nothing after `seconds`."""

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Store for each partition the offset to resume from; a tail does nothing.

        Raises:
            BatchDroppedError: the partitions are assigned to another member.
        """

    async def positions(self) -> Mapping[int, int]:
        """Return the next offset of `poll` for each assigned partition with a known position."""

    async def ends(self) -> Mapping[int, int]:
        """Query the broker for the offset that the next record of each assigned partition with a leader will get."""

    async def close(self) -> None: ...
