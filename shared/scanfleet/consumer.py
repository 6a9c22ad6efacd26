"""The loop between a topic and its handler, the same for Kafka and for memory.

All that decides what becomes of a record lives here: what is committed, retried, isolated, dead-lettered or dropped.
Where records come from is a `Source`.

A rebalance and a stop meet the loop between two batches. They make a batch in hand hurry: it ends at once when it
waits for a dependency, else within `HURRY_SECONDS`. A batch that was not finished is dropped without a commit and comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from prometheus_client import Counter, Gauge, Histogram

from scanfleet import tracing
from scanfleet.bus import Handler, Record
from scanfleet.errors import DependencyError, MessageError, ScanfleetError
from scanfleet.messages.envelope import RawRecord, decode
from scanfleet.messages.topics import Topic

HURRY_SECONDS: Final = 10.0  # for a batch in hand at a rebalance: a few slow writes
FIRST_PAUSE: Final = 0.1  # seconds before the second try of a dependency: a blip costs no more
LONGEST_PAUSE: Final = 5.0  # seconds between later tries: what is back is found soon, and not trampled
LOOK_SECONDS: Final = 1.0  # between two looks at the ends of the partitions
STALE_SECONDS: Final = 3.0  # age of a look that still says "caught up": far below the shortest lease, 10 s

_AWAY: Final = (DependencyError, OSError)  # OSError holds TimeoutError, refused connections and full disks

log = logging.getLogger(__name__)

_LABELS: Final = ("topic", "group")
_CONSUMED: Final = Counter("scanfleet_bus_consumed", "Records handled", _LABELS)
_FAILED: Final = Counter("scanfleet_bus_failed", "Batches or records whose handling raised", _LABELS)
_RETRIED: Final = Counter("scanfleet_bus_retried", "Tries that failed because something stood on is away", _LABELS)
_DEAD_LETTERED: Final = Counter("scanfleet_bus_dead_lettered", "Records sent to the dead-letter topic", _LABELS)
_SKIPPED: Final = Counter("scanfleet_bus_skipped", "Records that a reader without a group cannot handle", _LABELS)
_LAG: Final = Gauge("scanfleet_bus_lag", "Records not yet handled; no number while it cannot be known", _LABELS)
_IN_HAND: Final = Gauge("scanfleet_bus_in_hand_seconds", "Age of the batch in hand, 0 without one", _LABELS)
_HANDLING: Final = Histogram("scanfleet_bus_handling_seconds", "Time to handle one batch, retries included", _LABELS)


class BatchDroppedError(ScanfleetError):
    """The batch in hand was given up without a commit: it comes again, here or to another member."""


class Listener(Protocol):
    """What a source tells its loop."""

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None:
        """Returns when the batch in hand is finished or dropped."""


class Source(Protocol):
    """Where a loop gets its records: one topic, as a member of a group or as a tail.

    Each method raises DependencyError, or OSError, when the broker is away.
    """

    async def open(self, listener: Listener) -> None:
        """Return when the positions are resolved, and `assigned` was told."""

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        """The next records in order for each partition, or nothing after `seconds`."""

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Note for each partition the offset to go on from; a tail has nowhere to.

        Raises:
            BatchDroppedError: the partitions are not ours any more.
        """

    async def positions(self) -> Mapping[int, int]:
        """For each assigned partition with a known position the offset that `poll` gives next."""

    async def ends(self) -> Mapping[int, int]:
        """For each assigned partition the offset that its next record will get, asked of the broker now."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a partition ended when we last asked."""

    end: int
    asked: float
    """On the monotonic clock, before the question was sent."""

    def stale(self, now: float) -> bool:
        """Whether we were too slow, or frozen, for this to say anything about now."""
        return now - self.asked > STALE_SECONDS


class ConsumerLoop:
    """A `scanfleet.bus.Consumer`.

    Args:
        topic: what is read.
        group: the name of the group, or of the reader without one; a label of metrics.
        handler: gets the messages.
        source: where the records come from.
        dead_letter: `dead_letter(record, reason)` returns when the record is safe, or raises DependencyError to be called
            again. A reader without a group has none: others read the same records, so it skips and counts instead.
        key: read the records of this key alone; others are not even decoded.
    """

    def __init__(
        self,
        topic: Topic,
        group: str,
        handler: Handler,
        source: Source,
        dead_letter: Callable[[RawRecord, str], Awaitable[None]] | None,
        *,
        key: str | None = None,
    ) -> None:
        self._topic = topic
        self._key = None if key is None else key.encode()
        self._handler = handler
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
        self._taken: float | None = None  # when the batch in hand was, on the monotonic clock
        self._task: asyncio.Task[None] | None = None
        self._in_hand = asyncio.Lock()  # whoever holds it has the handler to himself
        self._hurry = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None  # of the batch in hand
        self._epoch = 0  # counts revocations: records polled before one are not ours any more
        self._looked = 0.0
        self._targets: dict[int, _Target] = {}
        self._broker_away = False
        self._held_up = False

    async def start(self) -> None:
        try:
            await self._source.open(self)
        except OSError as error:
            await self._source.close()
            raise DependencyError(f"cannot read {self._name}: {error}") from error
        except BaseException:
            await self._source.close()
            raise
        _IN_HAND.labels(*self._labels).set_function(self._in_hand_seconds)
        self._task = asyncio.create_task(self._run(), name=f"consumer of {self._name}")

    async def stop(self) -> None:
        if self._task is None:
            return
        self._hurry_up()
        async with self._in_hand:
            task, self._task = self._task, None
            task.cancel()
        await asyncio.wait([task])
        await self._source.close()
        for gauge in (_LAG, _IN_HAND):
            gauge.remove(*self._labels)

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    @property
    def ready(self) -> bool:
        return self.alive and not self._broker_away and not self._held_up

    async def assigned(self, partitions: Collection[int]) -> None:
        async with self._in_hand:
            self._hurry.clear()
            await self._handler.assigned(partitions)

    async def revoked(self, partitions: Collection[int]) -> None:
        self._epoch += 1
        self._hurry_up()
        async with self._in_hand:
            self._targets.clear()
            if partitions:
                await self._handler.revoked(partitions)

    def _hurry_up(self) -> None:
        self._hurry.set()
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + HURRY_SECONDS)

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except Exception:
            log.exception("the consumer of %s died", self._name)
            raise

    async def _turn(self) -> None:
        try:
            records = await self._source.poll(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        except _AWAY as error:
            self._broker_is(away=True, why=error)
            await asyncio.sleep(FIRST_PAUSE)
            return
        epoch = self._epoch
        if time.monotonic() >= self._looked + LOOK_SECONDS:
            await self._look()
        async with self._in_hand:
            if epoch != self._epoch:
                return
            if records and not await self._finish(records):
                return
            await self._report()

    async def _look(self) -> None:
        self._looked = now = time.monotonic()
        try:
            ends = await self._source.ends()
        except _AWAY as error:
            self._broker_is(away=True, why=error)
            return
        self._broker_is(away=False)
        positions = await self._source.positions()
        _LAG.labels(*self._labels).set(
            sum(max(0, end - positions.get(partition, end)) for partition, end in ends.items())
        )
        for partition, end in ends.items():
            # A target stands until it is reached: under steady traffic one that moves never would be.
            if partition not in self._targets or self._targets[partition].stale(now):
                self._targets[partition] = _Target(end, asked=now)

    def _broker_is(self, *, away: bool, why: Exception | None = None) -> None:
        if away != self._broker_away:
            log.warning("the broker of %s is %s", self._name, f"away: {why!r}" if away else "back")
        self._broker_away = away
        if away:
            self._forget_lag()

    def _forget_lag(self) -> None:
        """The last one known would look like a reader that keeps up."""
        _LAG.remove(*self._labels)

    def _in_hand_seconds(self) -> float:
        return 0.0 if self._taken is None else time.monotonic() - self._taken

    async def _report(self) -> None:
        """Say which partitions were read to their end."""
        if not self._targets:
            return
        now = time.monotonic()
        positions = await self._source.positions()
        reached = {p for p, target in self._targets.items() if positions.get(p, -1) >= target.end}
        fresh = {p for p in reached if not self._targets.pop(p).stale(now)}
        if not fresh:
            return
        try:
            await self._handler.caught_up(fresh)
            self._held_up = False
        except _AWAY as error:
            self._held_up = True  # and the next look brings the next call
            log.warning("caught up with %s, but held up: %r", self._name, error)

    async def _finish(self, records: Sequence[RawRecord]) -> bool:
        """Handle and commit one batch; False when it was dropped."""
        self._taken = time.monotonic()
        try:
            with self._handling.time():
                async with asyncio.timeout(None) as self._deadline:
                    await self._handle(records)
                    # Later records of a partition overwrite earlier ones.
                    offsets = {record.partition: record.offset + 1 for record in records}
                    await self._persist(lambda: self._source.commit(offsets))
        except (BatchDroppedError, TimeoutError) as error:
            log.info("dropped %d records of %s uncommitted: %r", len(records), self._name, error)
            return False
        finally:
            self._deadline = self._taken = None
            self._held_up = False
        return True

    async def _handle(self, records: Sequence[RawRecord]) -> None:
        batch: list[tuple[RawRecord, Record]] = []
        for raw in records:
            if self._key not in {None, raw.key}:
                continue
            try:
                message = decode(self._topic, raw)
            except MessageError as error:
                await self._bury(raw, str(error))
            else:
                batch.append((raw, Record(message, raw.topic, raw.partition, raw.offset, raw.timestamp)))
        if not batch:
            return
        try:
            with _about(batch[0][1]) if len(batch) == 1 else contextlib.nullcontext():
                await self._give([record for _, record in batch])
        except BatchDroppedError:
            raise
        except Exception:
            log.exception("a batch of %s failed: trying its %d records one by one", self._name, len(batch))
            for raw, record in batch:
                with _about(record):
                    await self._isolate(raw, record)

    async def _isolate(self, raw: RawRecord, record: Record) -> None:
        try:
            await self._give([record])
        except BatchDroppedError:
            raise
        except Exception as error:
            log.exception("%s cannot be handled: partition %d, offset %d", self._name, raw.partition, raw.offset)
            await self._bury(raw, repr(error))

    async def _give(self, records: Sequence[Record]) -> None:
        try:
            await self._persist(lambda: self._handler.handle(records))
        except BatchDroppedError:
            raise
        except Exception:
            self._failed.inc()
            raise
        self._consumed.inc(len(records))

    async def _bury(self, raw: RawRecord, reason: str) -> None:
        dead_letter = self._dead_letter
        if dead_letter is None:
            log.debug("skipped %s, partition %d, offset %d: %s", self._name, raw.partition, raw.offset, reason)
            self._skipped.inc()
            return
        log.error("dead letter from %s, partition %d, offset %d: %s", self._name, raw.partition, raw.offset, reason)
        await self._persist(lambda: dead_letter(raw, reason))
        self._dead_lettered.inc()

    async def _persist(self, action: Callable[[], Awaitable[None]]) -> None:
        """Do `action`, again and again while something that it stands on is away.

        Raises:
            BatchDroppedError: a rebalance or a stop does not let us wait any longer.
        """
        for attempt in itertools.count():
            try:
                await action()
            except _AWAY as error:
                self._held_up = True
                self._retried.inc()
                self._forget_lag()
                log.warning("%s is held up: %r", self._name, error)
            else:
                self._held_up = False
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 10))):
                    await self._hurry.wait()
            if self._hurry.is_set():
                raise BatchDroppedError("no time to wait for a dependency")


@contextlib.contextmanager
def _about(record: Record) -> Iterator[None]:
    """Let every line of the log say whose record is handled, and all that is sent belong to its trace."""
    named = {name: getattr(record.message, name, None) for name in ("command_id", "job_id", "chunk_id")}
    ids = {name: id_ for name, id_ in named.items() if id_ is not None}
    with tracing.within(record.message.traceparent), structlog.contextvars.bound_contextvars(**ids):
        yield
