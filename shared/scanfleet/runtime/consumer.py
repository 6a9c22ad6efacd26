"""The loop between a topic and its handler, the same for Kafka and for memory.

This module alone decides whether a record is committed, retried, isolated, dead-lettered or dropped. A `Source`
provides the records.

The offsets of handled batches are committed together, `COMMIT_SECONDS` after the first of them or, if a batch is being
handled then, after that batch. A crash redelivers all batches since the last commit.

Rebalances and stops take effect between two batches, and commit what is handled. They bound the current batch and that
commit: a batch ends at once if it waits for a dependency, else both end within `REBALANCE_BATCH_SECONDS`. An unfinished batch is
dropped without a commit and is redelivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol

import structlog
from prometheus_client import Counter, Gauge, Histogram

from scanfleet.contracts.messages.envelope import RawRecord, decode
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError, MessageError, ScanfleetError
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Handler, M, PartitionListener, Record

REBALANCE_BATCH_SECONDS: Final = 10.0  # timeout of the current batch at a rebalance; enough for a few slow writes
FIRST_PAUSE_SECONDS: Final = 0.1  # before the first retry: short, for a brief interruption
LONGEST_PAUSE_SECONDS: Final = 5.0  # maximum retry delay: notices recovery soon without overloading the dependency
COMMIT_SECONDS: Final = 0.25  # delay of a commit between batches: short, since a crash redelivers what is not committed
LOOK_SECONDS: Final = 1.0  # interval of queries of the partitions' end offsets
LAG_SECONDS: Final = 5.0  # the same if only the lag and the broker's state depend on them
QUERY_SECONDS: Final = 0.25  # maximum delay of a batch by such a query, and interval of checks for its end
STALE_SECONDS: Final = 3.0  # maximum age of end offsets that prove "caught up": far below the shortest lease, 10 s

Rejected = Sequence[tuple[RawRecord, str]]
"""Records that cannot be handled, each with the reason."""

_UNAVAILABLE: Final = (DependencyError, OSError)  # OSError includes TimeoutError, refused connections and full disks

_log = structlog.stdlib.get_logger(__name__)

_LABELS: Final = ("topic", "group")
_CONSUMED: Final = Counter("scanfleet_bus_consumed_total", "Records handled", _LABELS)
_FAILED: Final = Counter("scanfleet_bus_failed_total", "Batches or records whose handler raised an exception", _LABELS)
_RETRIED: Final = Counter(
    "scanfleet_bus_retried_total", "Attempts that failed because a dependency was unavailable", _LABELS
)
_DEAD_LETTERED: Final = Counter("scanfleet_bus_dead_lettered_total", "Records sent to the dead-letter topic", _LABELS)
_SKIPPED: Final = Counter("scanfleet_bus_skipped_total", "Records that a reader without a group cannot handle", _LABELS)
_LAG: Final = Gauge("scanfleet_bus_lag", "Records not yet handled; absent while unknown", _LABELS)
_BATCH_AGE: Final = Gauge(
    "scanfleet_bus_batch_age_seconds", "Age of the current batch or commit in seconds; 0 if there is none", _LABELS
)
_HANDLING: Final = Histogram("scanfleet_bus_handling_seconds", "Time to handle one batch, retries included", _LABELS)


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


@dataclass(frozen=True, slots=True)
class _Target:
    """The end of a partition when the broker was last queried."""

    end: int
    asked: float
    """Monotonic time before the query was sent."""

    def stale(self, now: float) -> bool:
        """Whether the process was too slow, or frozen, for this end to be current."""
        return now - self.asked > STALE_SECONDS


class ConsumerLoop(Generic[M]):
    """A `scanfleet.runtime.bus.Consumer`.

    Args:
        topic: the topic to read.
        group: name of the group, or of a reader without one; a metric label.
        handler: receives the messages.
        source: provides the records.
        dead_letter: `dead_letter(rejected)` returns when the records are stored, or raises DependencyError to be retried.
            None for a reader without a group, which skips and counts instead because others read the same records.
        wants: returns for a key whether to handle its records; others are not decoded.
    """

    def __init__(
        self,
        topic: Topic[M],
        group: str,
        handler: Handler[M],
        source: Source,
        dead_letter: Callable[[Rejected], Awaitable[None]] | None,
        *,
        wants: Callable[[str], bool] | None = None,
    ) -> None:
        self._topic = topic
        self._wants = wants
        self._handler = handler
        self._partitions = handler if isinstance(handler, PartitionListener) else PartitionListener()
        follows = type(self._partitions).caught_up is not PartitionListener.caught_up
        self._look_seconds = LOOK_SECONDS if follows else LAG_SECONDS
        self._source = source
        self._dead_letter = dead_letter
        self._name = f"{topic.name} ({group})"
        self._consumed = _CONSUMED.labels(topic.name, group)
        self._failed = _FAILED.labels(topic.name, group)
        self._retried = _RETRIED.labels(topic.name, group)
        self._dead_lettered = _DEAD_LETTERED.labels(topic.name, group)
        self._skipped = _SKIPPED.labels(topic.name, group)
        self._handling = _HANDLING.labels(topic.name, group)
        self._labels = (topic.name, group)
        self._taken: float | None = None  # when the current batch or commit began, on the monotonic clock
        self._task: asyncio.Task[None] | None = None
        self._handler_lock = asyncio.Lock()  # serialises calls to the handler
        self._hurry = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None  # of the current call to the handler
        self._uncommitted: dict[int, int] = {}  # by partition, the offset after the last handled record
        self._commit_due = math.inf  # on the monotonic clock
        self._assigned: set[int] = set()
        self._epoch = 0  # counts revocations: records polled before one may belong to another member
        self._looked = 0.0
        self._query: asyncio.Task[None] | None = None  # of the end offsets
        self._targets: dict[int, _Target] = {}
        self._broker_available = True
        self._blocked = False

    async def start(self) -> None:
        try:
            await self._source.open(self)
        except OSError as error:
            await self._source.close()
            raise DependencyError(f"cannot read {self._name}: {error}") from error
        except BaseException:
            await self._source.close()
            raise
        _BATCH_AGE.labels(*self._labels).set_function(self._batch_age_seconds)
        self._task = asyncio.create_task(self._run(), name=f"consumer of {self._name}")

    async def stop(self) -> None:
        if self._task is None:
            return
        deadline = self._hurry_up()
        async with self._handler_lock:
            await self._commit_by(deadline)
            if self._assigned:
                await self._partitions.revoked(self._assigned)  # the client does not call its listener
            task, self._task = self._task, None
            tasks = [task, *([self._query] if self._query else [])]
            for each in tasks:
                each.cancel()
        await asyncio.wait(tasks)
        await self._source.close()
        for gauge in (_LAG, _BATCH_AGE):
            gauge.remove(*self._labels)

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    @property
    def ready(self) -> bool:
        return self.alive and self._broker_available and not self._blocked

    async def assigned(self, partitions: Collection[int]) -> None:
        async with self._handler_lock:
            self._hurry.clear()
            self._assigned = set(partitions)
            await self._partitions.assigned(partitions)

    async def revoked(self, partitions: Collection[int]) -> None:
        self._epoch += 1
        deadline = self._hurry_up()
        async with self._handler_lock:
            await self._commit_by(deadline)
            self._targets.clear()
            self._assigned.clear()
            self._blocked = False  # a partition that another member catches up with
            if partitions:
                await self._partitions.revoked(partitions)

    def _hurry_up(self) -> float:
        """Bound the current batch, and return its deadline on the event loop's clock."""
        self._hurry.set()
        deadline = asyncio.get_running_loop().time() + REBALANCE_BATCH_SECONDS
        if self._deadline is not None:
            self._deadline.reschedule(deadline)
        return deadline

    async def _run(self) -> None:
        try:
            while True:
                await self._run_once()
        except Exception:
            _log.exception("consumer_died", consumer=self._name)
            raise

    async def _run_once(self) -> None:
        look_due = self._looked + (self._look_seconds if self._broker_available else LOOK_SECONDS)
        try:
            wake = time.monotonic() + QUERY_SECONDS if self._query else look_due
            records = await self._source.poll(max(0.0, min(wake, self._commit_due) - time.monotonic()))
        except _UNAVAILABLE as error:
            self._set_broker_state(available=False, error=error)
            await asyncio.sleep(FIRST_PAUSE_SECONDS)
            return
        epoch = self._epoch
        async with self._handler_lock:
            if epoch != self._epoch:
                return
            if records and not await self._finish(records):
                return
            if time.monotonic() >= self._commit_due and not await self._commit():
                return
        if self._query is not None or time.monotonic() >= look_due:
            await self._look()
        # Not when the query ends: positions include records that were polled but not yet handled.
        async with self._handler_lock:
            if epoch == self._epoch:
                await self._report()

    async def _look(self) -> None:
        """Query the end offsets; a query that a broker delays continues beside the next batches."""
        if self._query is None:
            self._query = asyncio.create_task(self._query_ends(), name=f"end offsets of {self._name}")
            await asyncio.wait([self._query], timeout=QUERY_SECONDS)
        if self._query.done():
            query, self._query = self._query, None
            query.result()

    async def _query_ends(self) -> None:
        self._looked = now = time.monotonic()
        epoch = self._epoch
        try:
            ends = await self._source.ends()
        except _UNAVAILABLE as error:
            self._set_broker_state(available=False, error=error)
            return
        self._set_broker_state(available=True)
        positions = await self._source.positions()
        if epoch != self._epoch:
            return
        if positions.keys() <= ends.keys():
            lag = sum(max(0, end - positions.get(partition, end)) for partition, end in ends.items())
            _LAG.labels(*self._labels).set(lag)
        else:
            self._remove_lag()  # a partition has no leader
        for partition, end in ends.items():
            # A target is kept until it is reached: under steady traffic a moving target never would be.
            if partition not in self._targets or self._targets[partition].stale(now):
                self._targets[partition] = _Target(end, asked=now)

    def _set_broker_state(self, *, available: bool, error: Exception | None = None) -> None:
        if available != self._broker_available:
            if available:
                _log.warning("broker_available", consumer=self._name)
            else:
                _log.warning("broker_unavailable", consumer=self._name, error=repr(error))
        self._broker_available = available
        if not available:
            self._remove_lag()

    def _remove_lag(self) -> None:
        """Remove the lag metric: the last known value would look like a reader that keeps up."""
        _LAG.remove(*self._labels)

    def _batch_age_seconds(self) -> float:
        return 0.0 if self._taken is None else time.monotonic() - self._taken

    async def _report(self) -> None:
        """Report to the handler which partitions were read to their end."""
        if not self._targets:
            return
        now = time.monotonic()
        positions = await self._source.positions()
        reached = {p for p, target in self._targets.items() if positions.get(p, -1) >= target.end}
        fresh = {p for p in reached if not self._targets.pop(p).stale(now)}
        if not fresh or self._hurry.is_set():
            return
        try:
            async with asyncio.timeout(None) as self._deadline:
                await self._partitions.caught_up(fresh)
            self._blocked = False
        except _UNAVAILABLE as error:
            self._blocked = True  # the next query triggers the next call
            _log.warning("catch_up_failed", consumer=self._name, error=repr(error))
        finally:
            self._deadline = None

    async def _finish(self, records: Sequence[RawRecord]) -> bool:
        """Handle one batch; return False when it was dropped."""
        self._taken = time.monotonic()
        try:
            with self._handling.time():
                async with asyncio.timeout(None) as self._deadline:
                    await self._handle(records)
        except (BatchDroppedError, TimeoutError) as error:
            _log.info(
                "batch_dropped",
                consumer=self._name,
                records=len(records),
                error=repr(error),
                next_step="the uncommitted records are redelivered",
            )
            return False
        finally:
            self._deadline = self._taken = None
            self._blocked = False
        if not self._uncommitted:
            self._commit_due = time.monotonic() + COMMIT_SECONDS
        # Later records of a partition overwrite earlier ones.
        self._uncommitted |= {record.partition: record.offset + 1 for record in records}
        return True

    async def _commit(self) -> bool:
        """Commit the offsets of the handled batches, retrying while the broker is unavailable; return False when a rebalance prevents it."""
        self._taken = time.monotonic()
        try:
            await self._retry_until_available(lambda: self._source.commit(self._uncommitted))
        except BatchDroppedError as error:
            self._commit_failed(error)
            return False
        finally:
            self._taken = None
            self._blocked = False
            self._forget_uncommitted()
        return True

    async def _commit_by(self, deadline: float) -> None:
        """Commit the handled offsets before their partitions are released. If that fails, the records are redelivered."""
        if not self._uncommitted:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._source.commit(self._uncommitted)
        except (BatchDroppedError, *_UNAVAILABLE) as error:
            self._commit_failed(error)
        finally:
            self._forget_uncommitted()

    def _forget_uncommitted(self) -> None:
        self._uncommitted, self._commit_due = {}, math.inf

    def _commit_failed(self, error: Exception) -> None:
        _log.info(
            "commit_failed",
            consumer=self._name,
            error=repr(error),
            next_step="the handled records are redelivered",
        )

    async def _handle(self, records: Sequence[RawRecord]) -> None:
        batch: list[tuple[RawRecord, Record[M]]] = []
        rejected: list[tuple[RawRecord, str]] = []
        for raw in records:
            if self._wants is not None and not self._wants((raw.key or b"").decode(errors="replace")):
                continue
            try:
                message = decode(self._topic, raw)
            except MessageError as error:
                rejected.append((raw, str(error)))
            else:
                batch.append((raw, Record(message, raw.topic, raw.partition, raw.offset, raw.timestamp)))
        await self._dead_letter_or_skip(rejected)
        if not batch:
            return
        try:
            with _log_context(batch[0][1]) if len(batch) == 1 else contextlib.nullcontext():
                await self._call_handler([record for _, record in batch])
        except BatchDroppedError:
            raise
        except Exception:  # noqa: BLE001 # one record must not stop the others of the batch, whatever its error
            _log.exception(
                "batch_failed", consumer=self._name, records=len(batch), next_step="the records are handled one by one"
            )
            failed: list[tuple[RawRecord, str]] = []
            for raw, record in batch:
                with _log_context(record):
                    if (cause := await self._isolate(record)) is not None:
                        failed.append((raw, cause))
            await self._dead_letter_or_skip(failed)

    async def _isolate(self, record: Record[M]) -> str | None:
        """Handle one record; return why it failed, or None."""
        try:
            await self._call_handler([record])
        except BatchDroppedError:
            raise
        except Exception as error:  # noqa: BLE001 # the record becomes a dead letter, whatever its error
            _log.exception("record_failed", consumer=self._name, partition=record.partition, offset=record.offset)
            return repr(error)
        return None

    async def _call_handler(self, records: Sequence[Record[M]]) -> None:
        try:
            await self._retry_until_available(lambda: self._handler.handle(records))
        except BatchDroppedError:
            raise
        except Exception:
            self._failed.inc()
            raise
        self._consumed.inc(len(records))

    async def _dead_letter_or_skip(self, rejected: Rejected) -> None:
        """Dead-letter records together: one write and one log line per record would delay the other partitions."""
        if not rejected:
            return
        dead_letter = self._dead_letter
        first, cause = rejected[0]
        place = {"consumer": self._name, "partition": first.partition, "offset": first.offset}
        if dead_letter is None:
            _log.debug("records_skipped", **place, records=len(rejected), cause=cause)
            self._skipped.inc(len(rejected))
            return
        _log.error("records_dead_lettered", **place, records=len(rejected), cause=cause)
        await self._retry_until_available(lambda: dead_letter(rejected))
        self._dead_lettered.inc(len(rejected))

    async def _retry_until_available(self, action: Callable[[], Awaitable[None]]) -> None:
        """Run `action`, retrying while a dependency is unavailable.

        Raises:
            BatchDroppedError: a rebalance or a stop ends the retries.
        """
        for attempt in itertools.count():
            try:
                await action()
            except _UNAVAILABLE as error:
                self._blocked = True
                self._retried.inc()
                self._remove_lag()
                _log.warning("dependency_unavailable", consumer=self._name, error=repr(error))
            else:
                self._blocked = False
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10))):
                    await self._hurry.wait()
            if self._hurry.is_set():
                raise BatchDroppedError("a rebalance or a stop ended the wait for a dependency")


@contextlib.contextmanager
def _log_context(record: Record) -> Iterator[None]:
    """Add the record's subject to every log line, and its trace to every message sent."""
    named = {name: getattr(record.message, name, None) for name in ("command_id", "job_id", "chunk_id")}
    ids = {name: id_ for name, id_ in named.items() if id_ is not None}
    with tracing.within(record.message.traceparent), structlog.contextvars.bound_contextvars(**ids):
        yield
