"""Parse fetched batches of records, which any client with write access may have produced.

The client raises whatever its parsers raise, at the same offset again after every fetch, and expands a compressed batch
in memory before it yields the first record. A header takes up to 40 times its size in memory. `Batches` therefore
parses one batch at a time, refuses compressed ones, which no producer of the platform sends, and records with many
headers, and replaces what it cannot parse by a single record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError
from aiokafka.structs import ConsumerRecord

UNREADABLE: Final = "unreadable"
"""Header of a record that replaces the unreadable rest of a batch: the first and last offset, and the error."""

MOST_HEADERS: Final = 100  # per record, or per dead letter including its origin; the platform's own have about 16
_ERROR_LENGTH: Final = 500  # of that header: an error's text may repeat the bytes that caused it


def install() -> None:
    """Make all consumers of this process parse with `Batches`: the client has no parameter for it."""
    fetcher.PartitionRecords = Batches


class Batches(fetcher.PartitionRecords):  # type: ignore[misc] # the client ships no types
    """The client's iterator over the records that it fetched from one partition.

    The record that replaces the rest of a batch has the last offset of the batch, so that the next position is behind it.
    """

    next_fetch_offset: int

    def _unpack_records(self) -> Iterator[ConsumerRecord]:
        while self._records.has_next():
            batch = self._records.next_batch()
            try:
                if not batch.is_control_batch:
                    yield from self._parse(batch)
            except Exception as error:  # noqa: BLE001 # the parsers raise many kinds
                first = self.next_fetch_offset
                self.next_fetch_offset = max(first + 1, batch.next_offset)  # a damaged header may have a lower one
                replacement = self._replacement(first, error)
            else:
                self.next_fetch_offset = batch.next_offset
                continue
            yield replacement  # not above, where the error's traceback would keep the record in memory

    def _parse(self, batch: Any) -> Iterator[ConsumerRecord]:
        if batch.compression_type:
            raise UnsupportedCodecError("compressed batches are not accepted")
        if not batch.validate_crc():
            raise CorruptRecordException("wrong checksum")
        start, previous = self.next_fetch_offset, batch.base_offset - 1
        for record in batch:
            # The broker does not check the offsets within a batch.
            if record.offset >= batch.next_offset:
                raise CorruptRecordException(f"record {record.offset} in a batch that ends at {batch.next_offset}")
            if record.offset <= previous:
                raise CorruptRecordException(f"record {record.offset} after offset {previous}")
            previous = record.offset
            if record.offset < start:
                continue
            if len(record.headers) > MOST_HEADERS:
                raise CorruptRecordException(f"record {record.offset} has {len(record.headers)} headers")
            parsed = self._consumer_record(self._tp, record)
            self.next_fetch_offset = record.offset + 1
            yield parsed

    def _replacement(self, first: int, error: Exception) -> ConsumerRecord:
        last = self.next_fetch_offset - 1
        text = f"offsets {first} to {last}: {error!r}"[:_ERROR_LENGTH]
        return ConsumerRecord(
            topic=self._tp.topic,
            partition=self._tp.partition,
            offset=last,
            timestamp=time.time_ns() // 1_000_000,
            timestamp_type=None,
            key=None,
            value=None,
            checksum=None,
            serialized_key_size=-1,
            serialized_value_size=-1,
            headers=((UNREADABLE, text.encode()),),
        )
