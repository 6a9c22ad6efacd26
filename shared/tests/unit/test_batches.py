"""The parser of fetched batches, on bytes that any client with write access to a topic may compose."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from scanfleet.contracts.messages.envelope import Outgoing
from scanfleet.kafka.batches import UNREADABLE, Batches
from scanfleet_testing.batches import compressed, counted, damaged, encoded, expanding, sealed

PARTITION = TopicPartition("topic", 3)


def record(value: bytes) -> Outgoing:
    return b"key", value, [("name", b"")]


def at(base: int, data: bytearray) -> bytes:
    """Set the first offset of a batch, as the broker does."""
    struct.pack_into(">q", data, 0, base)
    return bytes(data)


def parse(*fetched: bytes, position: int = 0) -> tuple[list[Any], int]:
    """Return the records, and the position after them."""
    batches = Batches(PARTITION, MemoryRecords(b"".join(fetched)), None, position, None, None, True, 0)
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
    """One record stands for the unreadable offsets, and those before and after are yielded."""
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
    tracemalloc.start()
    try:
        records, position = parse(bomb, good, position=5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [each.offset for each in records] == [8, 9]
    assert error_of(records[0]).startswith("offsets 5 to 8: ")
    assert "compressed" in error_of(records[0])
    assert position == 10
    assert peak < 4_000_000


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
