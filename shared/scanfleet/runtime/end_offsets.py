"""The end offsets of a consumer's partitions, its lag, and whether the broker is available."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import Gauge

from scanfleet.errors import DependencyError
from scanfleet.runtime.source import Source

LOOK_SECONDS: Final = 1.0  # interval of queries of the partitions' end offsets
LAG_SECONDS: Final = 5.0  # the same if only the lag and the broker's state depend on them
QUERY_SECONDS: Final = 0.25  # maximum delay of a batch by such a query, and interval of checks for its end
STALE_SECONDS: Final = 3.0  # maximum age of end offsets that prove "caught up": far below the shortest lease, 10 s

UNAVAILABLE: Final = (DependencyError, OSError)  # OSError includes TimeoutError, refused connections and full disks
LABELS: Final = ("topic", "group")

_LAG: Final = Gauge("scanfleet_bus_lag", "Records not yet handled; absent while unknown", LABELS)

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Target:
    """The end of a partition when the broker was last queried."""

    end: int
    asked: float
    """Monotonic time before the query was sent."""

    def stale(self, now: float) -> bool:
        """Return whether the process was too slow, or frozen, for this end to be current."""
        return now - self.asked > STALE_SECONDS


class EndOffsets:
    """Queries the end offsets, and decides which partitions were read to their end.

    Args:
        source: answers the queries.
        topic: name of the topic, a metric label.
        group: name of the group, a metric label.
        followed: whether the handler needs to know when partitions are caught up, so that queries are frequent.
        left: returns the number of records that the handler has left for a later batch.
    """

    def __init__(self, source: Source, topic: str, group: str, *, followed: bool, left: Callable[[], int]) -> None:
        self.broker_available = True
        self._source = source
        self._labels = (topic, group)
        self._name = f"{topic} ({group})"
        self._left = left
        self._look_seconds = LOOK_SECONDS if followed else LAG_SECONDS
        self._looked = 0.0
        self._query: asyncio.Task[None] | None = None
        self._targets: dict[int, _Target] = {}

    @property
    def look_due(self) -> float:
        """When to call `look`, on the monotonic clock."""
        if self._query is not None:
            return time.monotonic() + QUERY_SECONDS
        return self._looked + (self._look_seconds if self.broker_available else LOOK_SECONDS)

    async def look(self) -> None:
        """Query the end offsets if it is time; a query that a broker delays continues beside the next batches."""
        if self._query is None:
            if time.monotonic() < self.look_due:
                return
            self._query = asyncio.create_task(self._query_ends(), name=f"end offsets of {self._name}")
            await asyncio.wait([self._query], timeout=QUERY_SECONDS)
        if self._query.done():
            query, self._query = self._query, None
            query.result()

    async def reached(self) -> set[int]:
        """Return the partitions that were read to their end since the last call, as far as their ends are current."""
        if not self._targets:
            return set()
        now = time.monotonic()
        positions = await self._source.positions()
        reached = {p for p, target in self._targets.items() if positions.get(p, -1) >= target.end}
        return {p for p in reached if not self._targets.pop(p).stale(now)}

    def clear(self) -> None:
        """Discard the ends, including those of a running query, because the partitions are revoked."""
        self._targets = {}

    async def stop(self) -> None:
        if self._query is not None:
            self._query.cancel()
            await asyncio.wait([self._query])
        self.remove_lag()

    def set_broker_state(self, *, available: bool, error: Exception | None = None) -> None:
        """Log a change of the broker's state."""
        if available != self.broker_available:
            if available:
                _log.warning("broker_available", consumer=self._name)
            else:
                _log.warning("broker_unavailable", consumer=self._name, error=repr(error))
        self.broker_available = available
        if not available:
            self.remove_lag()

    def remove_lag(self) -> None:
        """Remove the lag metric: the last known value would look like a reader that keeps up."""
        _LAG.remove(*self._labels)

    async def _query_ends(self) -> None:
        self._looked = now = time.monotonic()
        targets = self._targets
        try:
            ends = await self._source.ends()
        except UNAVAILABLE as error:
            self.set_broker_state(available=False, error=error)
            return
        self.set_broker_state(available=True)
        positions = await self._source.positions()
        if targets is not self._targets:
            return
        self._set_lag(ends, positions)
        for partition, end in ends.items():
            # A target is kept until it is reached: under steady traffic a moving target never would be.
            if partition not in targets or targets[partition].stale(now):
                targets[partition] = _Target(end, asked=now)

    def _set_lag(self, ends: Mapping[int, int], positions: Mapping[int, int]) -> None:
        if positions.keys() <= ends.keys():
            lag = sum(max(0, end - positions.get(partition, end)) for partition, end in ends.items())
            _LAG.labels(*self._labels).set(lag + self._left())
        else:
            self.remove_lag()  # a partition has no leader
