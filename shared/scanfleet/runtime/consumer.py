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
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import structlog
from prometheus_client import Counter, Gauge, Histogram

from scanfleet.contracts.messages.envelope import RawRecord, decode
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError, MessageError
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Handler, M, PartitionListener, Record
from scanfleet.runtime.end_offsets import LABELS, UNAVAILABLE, EndOffsets
from scanfleet.runtime.source import BatchDroppedError, Source

REBALANCE_BATCH_SECONDS: Final = 10.0  # timeout of the current batch at a rebalance; enough for a few slow writes
FIRST_PAUSE_SECONDS: Final = 0.1  # before the first retry: short, for a brief interruption
LONGEST_PAUSE_SECONDS: Final = 5.0  # maximum retry delay: notices recovery soon without overloading the dependency
COMMIT_SECONDS: Final = 0.25  # delay of a commit between batches: short, since a crash redelivers what is not committed
_MOST_LEFT: Final = 500  # records in memory that wait for a later batch, beside the next poll

_Outcome = TypeVar("_Outcome")

Rejected = Sequence[tuple[RawRecord, str]]
"""Records that cannot be handled, each with the reason."""

_log = structlog.stdlib.get_logger(__name__)

_CONSUMED: Final = Counter("scanfleet_bus_consumed_total", "Records handled", LABELS)
_FAILED: Final = Counter("scanfleet_bus_failed_total", "Batches or records whose handler raised an exception", LABELS)
_RETRIED: Final = Counter(
    "scanfleet_bus_retried_total", "Attempts that failed because a dependency was unavailable", LABELS
)
_DEAD_LETTERED: Final = Counter("scanfleet_bus_dead_lettered_total", "Records sent to the dead-letter topic", LABELS)
_SKIPPED: Final = Counter("scanfleet_bus_skipped_total", "Records that a reader without a group cannot handle", LABELS)
_BATCH_AGE: Final = Gauge(
    "scanfleet_bus_batch_age_seconds", "Age of the current batch or commit in seconds; 0 if there is none", LABELS
)
_HANDLING: Final = Histogram("scanfleet_bus_handling_seconds", "Time to handle one batch, retries included", LABELS)


@dataclass(slots=True)
class _Uncommitted:
    """Handled records that are not committed yet."""

    offsets: dict[int, int] = field(default_factory=dict)
    """By partition, the offset after the last handled record."""

    due: float = math.inf
    """When to commit, on the monotonic clock."""

    def add(self, offsets: Mapping[int, int]) -> None:
        if not self.offsets:
            self.due = time.monotonic() + COMMIT_SECONDS
        self.offsets |= offsets


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
        self._source = source
        followed = type(self._partitions).caught_up is not PartitionListener.caught_up
        self._ends = EndOffsets(source, topic.name, group, followed=followed, left=lambda: len(self._left))
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
        self._uncommitted = _Uncommitted()
        self._left: list[tuple[RawRecord, Record[M]]] = []
        """The records that the handler leaves for a later batch, in order of their offsets; they are part of the next batch."""
        self._read: dict[int, int] = {}
        """By partition, the offset after the last record of the batches since nothing was left."""
        self._assigned: set[int] = set()
        self._epoch = 0  # counts revocations: records polled before one may belong to another member
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
            task.cancel()
        await asyncio.wait([task])
        await self._ends.stop()
        await self._source.close()
        _BATCH_AGE.remove(*self._labels)

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    @property
    def ready(self) -> bool:
        return self.alive and self._ends.broker_available and not self._blocked

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
            self._left.clear()
            self._read.clear()
            self._ends.clear()
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
        try:
            wake = 0.0 if self._left else min(self._ends.look_due, self._uncommitted.due)
            seconds = max(0.0, wake - time.monotonic())
            records = await self._source.poll(seconds) if len(self._left) < _MOST_LEFT else ()
        except UNAVAILABLE as error:
            self._ends.set_broker_state(available=False, error=error)
            await asyncio.sleep(FIRST_PAUSE_SECONDS)
            return
        epoch = self._epoch
        async with self._handler_lock:
            if epoch != self._epoch:
                return
            if (self._left or records) and not await self._finish(records):
                return
            if time.monotonic() >= self._uncommitted.due and not await self._commit():
                return
        await self._ends.look()
        # Not when the query ends: positions include records that were polled but not yet handled.
        async with self._handler_lock:
            if epoch == self._epoch and not self._left:
                await self._report()

    def _batch_age_seconds(self) -> float:
        return 0.0 if self._taken is None else time.monotonic() - self._taken

    async def _report(self) -> None:
        """Report to the handler which partitions were read to their end."""
        reached = await self._ends.reached()
        if not reached or self._hurry.is_set():
            return
        try:
            async with asyncio.timeout(None) as self._deadline:
                await self._partitions.caught_up(reached)
            self._blocked = False
        except UNAVAILABLE as error:
            self._blocked = True  # the next query triggers the next call
            _log.warning("catch_up_failed", consumer=self._name, error=repr(error))
        finally:
            self._deadline = None

    async def _finish(self, records: Sequence[RawRecord]) -> bool:
        """Handle a batch of these and the left records, or the part that the handler takes; return False when it was dropped."""
        self._taken = time.monotonic()
        left, self._left = self._left, []
        try:
            with self._handling.time():
                async with asyncio.timeout(None) as self._deadline:
                    await self._handle(left, records)
        except (BatchDroppedError, TimeoutError) as error:
            _log.info(
                "batch_dropped",
                consumer=self._name,
                records=len(left) + len(records),
                error=repr(error),
                next_step="the uncommitted records are redelivered",
            )
            return False
        finally:
            self._deadline = self._taken = None
            self._blocked = False
        for record in records:
            self._read[record.partition] = max(record.offset + 1, self._read.get(record.partition, 0))
        first_left = {record.partition: record.offset for record, _ in reversed(self._left)}
        self._uncommitted.add(self._read | first_left)
        if not self._left:
            self._read = {}
        return True

    async def _commit(self) -> bool:
        """Commit the offsets of the handled batches, with retries without a broker; return False if a rebalance prevents it."""
        self._taken = time.monotonic()
        try:
            await self._retry_until_available(lambda: self._source.commit(self._uncommitted.offsets))
        except BatchDroppedError as error:
            self._commit_failed(error)
            return False
        finally:
            self._taken = None
            self._blocked = False
            self._uncommitted = _Uncommitted()
        return True

    async def _commit_by(self, deadline: float) -> None:
        """Commit the handled offsets before their partitions are released. If that fails, the records are redelivered."""
        if not self._uncommitted.offsets:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._source.commit(self._uncommitted.offsets)
        except (BatchDroppedError, *UNAVAILABLE) as error:
            self._commit_failed(error)
        finally:
            self._uncommitted = _Uncommitted()

    def _commit_failed(self, error: Exception) -> None:
        _log.info(
            "commit_failed",
            consumer=self._name,
            error=repr(error),
            next_step="the handled records are redelivered",
        )

    async def _handle(self, left: Sequence[tuple[RawRecord, Record[M]]], records: Sequence[RawRecord]) -> None:
        batch = list(left)
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
                leaves = await self._call_handler([record for _, record in batch])
                places = {(record.partition, record.offset) for record in leaves}
                self._left = [each for each in batch if (each[0].partition, each[0].offset) in places]
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

    async def _call_handler(self, records: Sequence[Record[M]]) -> Collection[Record]:
        """Return the records that the handler leaves for a later batch."""
        try:
            left = await self._retry_until_available(lambda: self._handler.handle(records)) or ()
        except BatchDroppedError:
            raise
        except Exception:
            self._failed.inc()
            raise
        self._consumed.inc(len(records) - len(left))
        return left

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

    async def _retry_until_available(self, action: Callable[[], Awaitable[_Outcome]]) -> _Outcome:
        """Run `action`, retrying while a dependency is unavailable.

        Raises:
            BatchDroppedError: a rebalance or a stop ends the retries.
        """
        for attempt in itertools.count():
            try:
                outcome = await action()
            except UNAVAILABLE as error:
                self._blocked = True
                self._retried.inc()
                self._ends.remove_lag()
                _log.warning("dependency_unavailable", consumer=self._name, error=repr(error))
            else:
                self._blocked = False
                return outcome
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10))):
                    await self._hurry.wait()
            if self._hurry.is_set():
                raise BatchDroppedError("a rebalance or a stop ended the wait for a dependency")
        raise AssertionError("unreachable")


@contextlib.contextmanager
def _log_context(record: Record) -> Iterator[None]:
    """Add the record's subject to every log line, and its trace to every message sent."""
    named = {name: getattr(record.message, name, None) for name in ("command_id", "job_id", "chunk_id")}
    ids = {name: id_ for name, id_ in named.items() if id_ is not None}
    with tracing.within(record.message.traceparent), structlog.contextvars.bound_contextvars(**ids):
        yield
