"""The parser of fetched batches, on bytes that any client with write access to a topic may compose."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from aiokafka import TopicPartition
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from scanfleet.contracts.messages.envelope import Outgoing
from scanfleet.kafka.batches import UNREADABLE, Batches
from scanfleet_testing.batches import compressed, counted, damaged, encoded, expanding, sealed

R = TypeVar("R")

PARTITION = TopicPartition("topic", 3)


def record(value: bytes) -> Outgoing:
    return b"key", value, [("name", b"")]


def at(base: int, data: bytearray) -> bytes:
    """Set the first offset of a batch, as the broker does."""
    struct.pack_into(">q", data, 0, base)
    return bytes(data)


def fetched(*data: bytes, position: int = 0) -> Batches:
    return Batches(PARTITION, MemoryRecords(b"".join(data)), None, position, None, None, True, 0)


def parse(*data: bytes, position: int = 0) -> tuple[list[Any], int]:
    """Return the records, and the position after them."""
    batches = fetched(*data, position=position)
    return list(batches), batches.next_fetch_offset


def error_of(replacement: Any) -> str:
    assert (replacement.topic, replacement.partition, replacement.key, replacement.value) == ("topic", 3, None, None)
    ((name, text),) = replacement.headers
    assert name == UNREADABLE
    return str(text.decode())


def test_batches_readable_yields_the_records_from_the_position_on() -> None:
    """Records before the position are left out, and the next position is behind the last batch."""
    records, position = parse(at(5, encoded([record(b"a"), record(b"b")])), at(7, encoded([record(b"c")])), position=6)
    assert [(each.offset, each.value) for each in records] == [(6, b"b"), (7, b"c")]
    assert position == 8


def test_batches_unreadable_record_replaces_the_rest_of_its_batch() -> None:
    """One record replaces the unreadable offsets; the records before and after them are yielded."""
    data = encoded([record(b"a"), record(b"bad"), record(b"c")])
    data[data.index(b"name", data.index(b"bad"))] = 0xFF
    records, position = parse(at(5, sealed(data)), at(8, encoded([record(b"d")])), position=5)
    assert [each.offset for each in records] == [5, 7, 8]
    assert error_of(records[1]).startswith("offsets 6 to 7: ")
    assert "utf-8" in error_of(records[1])
    assert position == 9


def test_batches_compressed_is_refused_without_expansion() -> None:
    """A batch that would expand to 100 MB is replaced by one record in constant memory."""
    bomb, good = at(5, counted(expanding(100_000_000), 4)), at(9, encoded([record(b"b")]))
    (records, position), peak = peak_of(lambda: parse(bomb, good, position=5))
    assert [each.offset for each in records] == [8, 9]
    assert error_of(records[0]).startswith("offsets 5 to 8: ")
    assert "compressed" in error_of(records[0])
    assert position == 10
    assert peak < 4_000_000


def test_batches_record_with_many_headers_is_replaced_and_freed() -> None:
    """A record with 100,000 headers is replaced, and its headers are freed before the replacement is yielded."""
    many = [at(offset, encoded([(b"", b"", [("", None)] * 100_000)])) for offset in range(3)]
    iterators = [fetched(each, position=offset) for offset, each in enumerate(many)]
    _, one = peak_of(lambda: parse(many[0]))
    records, three = peak_of(lambda: list(map(next, iterators)))
    assert [error_of(each) for each in records] == [
        f"offsets {offset} to {offset}: CorruptRecordException('record {offset} has 100000 headers')"
        for offset in range(3)
    ]
    assert three < 1.5 * one


def peak_of(function: Callable[[], R]) -> tuple[R, int]:
    """Return the function's result, and the peak of the memory allocated by it in bytes."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compose", [compressed, damaged])
def test_batches_compressed_is_replaced(compose: Any) -> None:
    """A compressed batch is replaced, whether or not it could be expanded."""
    records, position = parse(bytes(compose([record(b"a")])))
    assert "compressed" in error_of(records[0])
    assert position == 1


def test_batches_wrong_checksum_is_replaced() -> None:
    """A batch with a wrong checksum is replaced, and the next one is yielded."""
    data = encoded([record(b"a")])
    data[-1] ^= 1
    records, _ = parse(bytes(data), at(1, encoded([record(b"b")])))
    assert "checksum" in error_of(records[0])
    assert records[1].value == b"b"


def test_batches_damaged_header_still_advances() -> None:
    """A batch whose header has a wrong end advances the position by one offset, so that it is not read indefinitely."""
    data = encoded([record(b"a")])
    struct.pack_into(">i", data, 23, -4)
    records, position = parse(at(5, data), position=5)
    assert [each.offset for each in records] == [5]
    assert position == 6


def test_batches_record_with_an_offset_beyond_its_batch_is_replaced() -> None:
    """A forged offset, which a consumer would commit, is not yielded."""
    data = counted(encoded([record(b"a"), record(b"b")], offsets=[0, 1000]), 2)
    records, position = parse(at(5, data), at(7, encoded([record(b"c")])), position=5)
    assert [each.offset for each in records] == [5, 6, 7]
    assert "record 1005 in a batch that ends at 7" in error_of(records[1])
    assert position == 8


@pytest.mark.parametrize("offsets", [(0, 1, 1), (0, 1, 0), (0, 1, -3)], ids=["repeated", "descending", "negative"])
def test_batches_record_with_an_offset_below_the_previous_one_is_replaced(offsets: Sequence[int]) -> None:
    """A record whose offset does not ascend is not dropped silently, also after the records before the position."""
    data = at(5, counted(encoded([record(b"a"), record(b"b"), record(b"c")], offsets=offsets), 3))
    for position in (5, 6):
        records, end = parse(data, position=position)
        assert [each.offset for each in records] == [5, 6, 7][position - 5 :]
        assert f"record {5 + offsets[-1]} after offset 6" in error_of(records[-1])
        assert end == 8


def test_batches_old_format_is_replaced() -> None:
    """A batch in the format before Kafka 0.11, which brokers no longer accept, is replaced."""
    builder = LegacyRecordBatchBuilder(1, 0, 1 << 20)
    builder.append(0, 0, b"key", b"value")
    records, position = parse(bytes(builder.build()))
    assert error_of(records[0])
    assert position == 1


def test_batches_long_error_is_cut() -> None:
    """The text of an error that repeats the record's bytes has a bounded length."""
    data = encoded([(b"key", b"", [("name" * 25_000, b"")])])
    data[data.index(b"name")] = 0xFF
    records, _ = parse(bytes(sealed(data)))
    assert "utf-8" in error_of(records[0])
    assert len(error_of(records[0])) <= 500
