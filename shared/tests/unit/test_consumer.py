"""The loop at moments that no broker can be brought to on purpose: its source is a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from uuid import uuid4

import pytest
import structlog
from prometheus_client import REGISTRY

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import ChunkStored, WorkerReady
from scanfleet.contracts.messages.envelope import RawRecord, decode, encode
from scanfleet.contracts.messages.topics import SCAN_STORED, SCAN_WORKERS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Record
from scanfleet.runtime.consumer import COMMIT_SECONDS, ConsumerLoop, Rejected
from scanfleet.runtime.end_offsets import LOOK_SECONDS
from scanfleet.runtime.source import BatchDroppedError, Listener
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.waiting import until


class Script:
    """A source of one partition: `polls` yields the result of each poll; later polls are empty."""

    def __init__(self, polls: AsyncIterator[Sequence[RawRecord]]) -> None:
        self._polls = polls
        self.committed: list[Mapping[int, int]] = []
        self.listener: Listener
        self.end = 0

    async def open(self, listener: Listener) -> None:
        self.listener = listener
        await listener.assigned({0})

    async def poll(self, seconds: float) -> Sequence[RawRecord]:
        try:
            return await anext(self._polls)
        except StopAsyncIteration:
            await asyncio.sleep(seconds)
            return ()

    async def commit(self, offsets: Mapping[int, int]) -> None:
        self.committed.append(offsets)

    async def positions(self) -> Mapping[int, int]:
        return {0: self.end}

    async def ends(self) -> Mapping[int, int]:
        return {0: self.end}

    async def close(self) -> None: ...


def record(offset: int, *, value: bytes | None = None) -> RawRecord:
    envelope = encode(SCAN_WORKERS, WorkerReady(worker_id="w", slots=offset % 256, raw=False), source="test")
    value = envelope.value if value is None else value
    return RawRecord(SCAN_WORKERS.name, 0, offset, utc_now(), envelope.key, value, envelope.headers)


async def no_dead_letter(rejected: Rejected) -> None:
    raise AssertionError(rejected)


def metric(name: str, group: str) -> float | None:
    return REGISTRY.get_sample_value(f"scanfleet_bus_{name}", {"topic": SCAN_WORKERS.name, "group": group})


async def test_records_polled_before_a_revocation_are_not_handled_after_it() -> None:
    """A batch whose partitions are revoked between its poll and its turn belongs to another member."""

    class Slow(Recorder):
        async def assigned(self, partitions: Collection[int]) -> None:
            await asyncio.sleep(0.01)  # the batch waits for it
            await super().assigned(partitions)

    async def rebalance() -> None:
        await script.listener.assigned({0})
        await script.listener.revoked({0})
        await script.listener.assigned({0})

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        rebalances = asyncio.create_task(rebalance())
        await asyncio.sleep(0)
        yield [record(0)]
        await rebalances
        yield [record(1)]

    script, recorder = Script(polls()), Slow()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: script.committed)
    assert [handled.offset for handled in recorder.handled] == [1]
    assert script.committed == [{0: 2}]


async def test_commits_of_a_busy_loop_are_bounded_per_second() -> None:
    """Batches that follow each other share a commit, and the offsets of the last one are committed without another batch."""

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        for offset in range(100):
            await asyncio.sleep(0.01)
            yield [record(offset)]

    script, recorder = Script(polls()), Recorder()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        began = time.monotonic()
        await until(lambda: script.committed and script.committed[-1] == {0: 100})
        seconds = time.monotonic() - began
    assert len(recorder.handled) == len(recorder.tries) == 100
    assert len(script.committed) <= seconds / COMMIT_SECONDS + 1


@pytest.mark.parametrize("how", ["revocation", "stop"])
async def test_handled_offsets_are_committed_before_partitions_are_released(how: str) -> None:
    """A revocation and a stop commit what is handled, before the handler and the source release the partitions."""
    order: list[object] = []

    class Ordered(Script):
        async def commit(self, offsets: Mapping[int, int]) -> None:
            order.append(offsets)

        async def close(self) -> None:
            order.append("closed")

    class Revoked(Recorder):
        async def revoked(self, partitions: Collection[int]) -> None:
            order.append("revoked")
            await super().revoked(partitions)

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0)]

    script, recorder = Ordered(polls()), Revoked()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: recorder.handled)
        if how == "revocation":
            await script.listener.revoked({0})
            order.append("released")
    assert order == [{0: 1}, "revoked", *(["released"] if how == "revocation" else []), "closed"]


@pytest.mark.parametrize("error", [DependencyError("unavailable"), BatchDroppedError("another member has them")])
async def test_failed_commit_at_a_revocation_releases_the_partitions(error: Exception) -> None:
    """If what is handled cannot be committed, the partitions are released nevertheless, and it is not committed later."""
    tries: list[Mapping[int, int]] = []

    class Failing(Script):
        async def commit(self, offsets: Mapping[int, int]) -> None:
            tries.append(offsets)
            if len(tries) == 1:
                raise error

    released = asyncio.Event()

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0)]
        await released.wait()
        yield [record(7)]

    script, recorder = Failing(polls()), Recorder()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: recorder.handled)
        await script.listener.revoked({0})
        assert not recorder.partitions
        await script.listener.assigned({0})
        released.set()
        await until(lambda: len(tries) == 2)
    assert tries == [{0: 1}, {0: 8}]


async def test_commit_dependency_error_is_retried() -> None:
    """While offsets cannot be committed the loop is unready, its metric counts the time, and it handles nothing else."""
    tries: list[Mapping[int, int]] = []

    class Failing(Script):
        async def commit(self, offsets: Mapping[int, int]) -> None:
            tries.append(offsets)
            if len(tries) < 3:
                raise DependencyError("unavailable")

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0)]
        await asyncio.sleep(COMMIT_SECONDS)
        yield ()
        yield [record(1)]

    group = uuid4().hex
    script, recorder = Failing(polls()), Recorder()
    consumer = ConsumerLoop(SCAN_WORKERS, group, recorder, script, no_dead_letter)
    async with Running(consumer):
        await until(lambda: tries)
        assert not consumer.ready
        assert (metric("batch_age_seconds", group) or 0.0) > 0
        assert len(recorder.handled) == 1
        await until(lambda: len(recorder.handled) == 2)
        assert consumer.ready
        await until(lambda: metric("batch_age_seconds", group) == 0)
    assert tries == [{0: 1}] * 3 + [{0: 2}]


async def test_dead_letter_write_failure_is_retried() -> None:
    """No offset is committed and no later record handled before a dead letter is stored."""
    letters: list[int] = []
    tries: list[int] = []

    async def dead_letter(rejected: Rejected) -> None:
        assert not script.committed
        assert not recorder.handled
        tries.append(len(rejected))
        if len(tries) < 3:
            raise DependencyError("the broker is unavailable")
        letters.extend(raw.offset for raw, _ in rejected)

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0, value=b"junk"), record(1), record(2, value=b"junk")]

    script, recorder = Script(polls()), Recorder()
    consumer = ConsumerLoop(SCAN_WORKERS, "test", recorder, script, dead_letter)
    async with Running(consumer):
        await until(lambda: tries)
        assert not consumer.ready
        await until(lambda: script.committed)
        assert consumer.ready
    assert tries == [2, 2, 2]
    assert letters == [0, 2]
    assert [handled.offset for handled in recorder.handled] == [1]


async def test_consumer_with_an_unavailable_broker_is_unready_until_it_recovers() -> None:
    """A poll without a broker is retried; the loop stays alive, and is ready again when the broker answers."""
    back = asyncio.Event()

    class Away(Script):
        async def ends(self) -> Mapping[int, int]:
            if not back.is_set():
                raise DependencyError("unavailable")
            return await super().ends()

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []
        await back.wait()
        yield [record(0)]

    script, recorder = Away(polls()), Recorder()
    consumer = ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)
    async with Running(consumer):
        await until(lambda: not consumer.ready)
        assert consumer.alive
        back.set()
        await until(lambda: consumer.ready and recorder.handled)


async def test_slow_end_offsets_do_not_delay_records() -> None:
    """Records of healthy partitions are handled while a query of the end offsets waits for a broker."""
    answered = asyncio.Event()

    class Slow(Script):
        async def ends(self) -> Mapping[int, int]:
            await answered.wait()
            return await super().ends()

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        for offset in range(3):
            yield [record(offset)]

    script, recorder = Slow(polls()), Recorder()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: len(recorder.handled) == 3)
        assert not recorder.caught_up_after
        answered.set()
        await until(lambda: recorder.caught_up_after)


async def test_end_offsets_from_before_a_revocation_are_dropped() -> None:
    """A query that a revocation overtakes sets no targets: the partitions may belong to another member."""
    asked, answered = asyncio.Event(), asyncio.Event()

    class Slow(Script):
        async def ends(self) -> Mapping[int, int]:
            if asked.is_set():
                raise DependencyError("unavailable")
            asked.set()
            await answered.wait()
            return await super().ends()

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []

    script, recorder = Slow(polls()), Recorder()
    consumer = ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)
    async with Running(consumer):
        await asked.wait()
        await script.listener.revoked({0})
        await script.listener.assigned({0})
        answered.set()
        await until(lambda: not consumer.ready)  # after the next query
    assert not recorder.caught_up_after


async def test_member_without_partitions_is_ready_after_a_failed_catch_up() -> None:
    """A handler that could not catch up with partitions blocks the consumer no longer than they are assigned."""

    class Failing(Recorder):
        async def caught_up(self, _: object) -> None:
            raise DependencyError("MongoDB is unavailable")

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []

    script = Script(polls())
    consumer = ConsumerLoop(SCAN_WORKERS, "test", Failing(), script, no_dead_letter)
    async with Running(consumer):
        await until(lambda: not consumer.ready)
        await script.listener.revoked({0})
        await script.listener.assigned(set())
        assert consumer.ready


async def test_caught_up_dependency_error_is_retried() -> None:
    """A handler whose `caught_up` raises a DependencyError is called again, unready meanwhile."""
    calls: list[bool] = []

    class HeldUp(Recorder):
        async def caught_up(self, _: object) -> None:
            calls.append(consumer.ready)
            if len(calls) < 2:
                raise DependencyError("MongoDB is unavailable")

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []

    consumer = ConsumerLoop(SCAN_WORKERS, "test", HeldUp(), Script(polls()), no_dead_letter)
    async with Running(consumer):
        await until(lambda: len(calls) >= 2)
        await until(lambda: consumer.ready)
    assert calls[:2] == [True, False]


async def test_caught_up_is_cancelled_after_a_revocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebalance or a stop waits no longer for `caught_up` than for a batch."""
    monkeypatch.setattr("scanfleet.runtime.consumer.REBALANCE_BATCH_SECONDS", 0.05)
    called = asyncio.Event()

    class Hanging(Recorder):
        async def caught_up(self, _: object) -> None:
            called.set()
            await asyncio.Event().wait()

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []

    loop = ConsumerLoop(SCAN_WORKERS, "test", Hanging(), Script(polls()), no_dead_letter)
    await loop.start()
    await called.wait()
    async with asyncio.timeout(5):
        await loop.revoked({0})
        called.clear()
        await loop.assigned({0})
        await called.wait()
        await loop.stop()


async def test_steady_traffic_does_not_keep_a_partition_from_being_caught_up() -> None:
    """The reported end offset stays the target while newer records arrive: a moving target would never be reached."""

    class Growing(Script):
        """Its end is always ahead of its position."""

        async def positions(self) -> Mapping[int, int]:
            return {0: self.end - 1}

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        while True:
            await asyncio.sleep(LOOK_SECONDS * 1.1)  # so that there is a look in every turn
            script.end += 1
            yield [record(script.end)]

    script, recorder = Growing(polls()), Recorder()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: recorder.caught_up_after)


async def test_end_offsets_are_queried_less_often_for_a_handler_without_caught_up() -> None:
    """A handler that does not react to the end of a partition causes a query of end offsets only every few seconds."""

    class Counting(Script):
        looks = 0

        async def ends(self) -> Mapping[int, int]:
            self.looks += 1
            return await super().ends()

    class Plain:
        async def handle(self, _: object) -> None: ...

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []

    follows, plain = Counting(polls()), Counting(polls())
    async with Running(
        ConsumerLoop(SCAN_WORKERS, "test", Recorder(), follows, no_dead_letter),
        ConsumerLoop(SCAN_WORKERS, "plain", Plain(), plain, no_dead_letter),
    ):
        await until(lambda: follows.looks == 3)
        assert plain.looks == 1


async def test_handling_one_record_sets_log_context_and_trace() -> None:
    """While one record is handled every log line has its ids, and sent messages belong to its trace."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    seen: list[tuple[dict[str, object], str | None]] = []

    def does(_: object) -> None:
        seen.append((structlog.contextvars.get_contextvars(), tracing.current()))

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        stored = ChunkStored(job_id=41, chunk_id="41-7", outcomes="s", traceparent=trace)
        envelope = encode(SCAN_STORED, stored, source="test")
        one = RawRecord(SCAN_STORED.name, 0, 0, utc_now(), envelope.key, envelope.value, envelope.headers)
        yield [one]
        yield [one, one]

    script = Script(polls())
    async with Running(ConsumerLoop(SCAN_STORED, "test", Recorder(does), script, no_dead_letter)):
        await until(lambda: len(seen) == 2)
    assert seen == [({"job_id": 41, "chunk_id": "41-7"}, trace), ({}, None)]


async def test_lag_is_absent_while_unknown() -> None:
    """The lag metric is absent while the broker or a dependency is unavailable or the loop has stopped."""
    group, unavailable, broker_unavailable = uuid4().hex, asyncio.Event(), asyncio.Event()

    class Away(Script):
        async def ends(self) -> Mapping[int, int]:
            if broker_unavailable.is_set():
                raise DependencyError("unavailable")
            return {0: self.end + 7}

    def does(_: object) -> None:
        if unavailable.is_set():
            raise DependencyError("MongoDB is unavailable")

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []  # and there is a look
        assert (metric("lag", group), metric("batch_age_seconds", group)) == (7, 0)
        unavailable.set()
        yield [record(0)]
        while metric("lag", group) is None:
            yield []
            await asyncio.sleep(0.01)
        broker_unavailable.set()

    recorder = Recorder(does)
    async with Running(ConsumerLoop(SCAN_WORKERS, group, recorder, Away(polls()), no_dead_letter)):
        await until(unavailable.is_set)
        await until(lambda: metric("retried_total", group))
        assert metric("lag", group) is None
        assert (metric("batch_age_seconds", group) or 0.0) > 0
        unavailable.clear()
        await until(broker_unavailable.is_set)
        await until(lambda: metric("lag", group) is None)
    assert metric("lag", group) is metric("batch_age_seconds", group) is None


async def test_lag_with_a_leaderless_partition_is_absent() -> None:
    """The lag metric is absent while a partition has no leader, since its end is unknown."""
    group, led = uuid4().hex, asyncio.Event()

    class Partial(Script):
        async def positions(self) -> Mapping[int, int]:
            return {0: 5, 1: 0}

        async def ends(self) -> Mapping[int, int]:
            return {0: 7, 1: 1} if led.is_set() else {0: 7}

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield []  # and there is a look
        assert metric("lag", group) is None
        led.set()

    async with Running(ConsumerLoop(SCAN_WORKERS, group, Recorder(), Partial(polls()), no_dead_letter)):
        await until(lambda: metric("lag", group) == 3)
        led.clear()
        await until(lambda: metric("lag", group) is None)


@pytest.mark.proves("F17", "G4")
async def test_caught_up_needs_the_position_at_the_end() -> None:
    """While the position is before the end that the broker reported, the partition is not caught up."""

    class Behind(Script):
        position, looks = 0, 0

        async def positions(self) -> Mapping[int, int]:
            return {0: self.position}

        async def ends(self) -> Mapping[int, int]:
            self.looks += 1
            return {0: 5}

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield ()

    script, recorder = Behind(polls()), Recorder()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: script.looks > 2)
        assert recorder.caught_up_after == []
        script.position = 5
        await until(lambda: recorder.caught_up_after)


class Partial(Recorder):
    """Handles the last record of each batch."""

    async def handle(self, records: Sequence[Record]) -> Sequence[Record]:
        await super().handle(records[-1:])
        return records[:-1]


async def test_records_that_the_handler_leaves_follow_in_a_batch_with_newer_ones() -> None:
    """They are handled later, are not committed before, and do not count as read to the end."""

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0), record(1)]
        yield [record(2)]

    script, recorder = Script(polls()), Partial()
    script.end = 3
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: script.committed and script.committed[-1] == {0: 3})
        await until(lambda: recorder.caught_up_after)
    assert [handled.offset for handled in recorder.handled] == [1, 2, 0]
    assert recorder.caught_up_after[0] == ({0}, 3)
    assert all(each in ({0: 0}, {0: 3}) for each in script.committed)


async def test_records_that_the_handler_leaves_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a batch does not grow with the records that earlier ones have left."""
    decoded: list[int] = []

    def counting(topic: Topic[WorkerReady], raw: RawRecord) -> WorkerReady:
        decoded.append(raw.offset)
        return decode(topic, raw)

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(offset) for offset in range(10)]

    monkeypatch.setattr("scanfleet.runtime.consumer.decode", counting)
    recorder = Partial()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, Script(polls()), no_dead_letter)):
        await until(lambda: len(recorder.handled) == 10)
    assert decoded == list(range(10))


async def test_records_that_the_handler_leaves_belong_to_the_next_owner() -> None:
    """After a revocation only handled records before the first one that is left are committed, and no other is handled."""

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0), record(1)]
        await script.listener.revoked({0})
        await script.listener.assigned({0})
        yield []
        yield [record(2)]

    script, recorder = Script(polls()), Partial()
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, script, no_dead_letter)):
        await until(lambda: len(recorder.handled) > 1)
    assert [handled.offset for handled in recorder.handled] == [1, 2]
    assert script.committed[0] == {0: 0}


async def test_lag_includes_records_that_the_handler_leaves() -> None:
    """They are read, but not yet handled."""

    class Busy(Recorder):
        async def handle(self, records: Sequence[Record]) -> Sequence[Record]:
            return records

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [record(0), record(1)]

    script = Script(polls())
    script.end = 2
    async with Running(ConsumerLoop(SCAN_WORKERS, "left", Busy(), script, no_dead_letter)):
        await until(lambda: metric("lag", "left") is not None)
        assert metric("lag", "left") == 2


class Half(Recorder):
    """Handles the first half of each batch."""

    async def handle(self, records: Sequence[Record]) -> Sequence[Record]:
        half = (len(records) + 1) // 2
        await super().handle(records[:half])
        return records[half:]


async def test_records_that_the_handler_leaves_are_bounded() -> None:
    """While many are left, no further ones are read."""
    polled: list[int] = []

    async def polls() -> AsyncIterator[Sequence[RawRecord]]:
        yield [replace(first, offset=offset) for offset in range(1_000)]
        polled.append(len(recorder.handled))

    recorder, first = Half(), record(0)
    async with Running(ConsumerLoop(SCAN_WORKERS, "test", recorder, Script(polls()), no_dead_letter)):
        await until(lambda: polled)
    assert polled == [750]
