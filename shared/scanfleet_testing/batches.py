"""Batches of records as any client with write access to a topic may compose them; the broker accepts all of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final, cast

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c, encode_varint

from scanfleet.contracts.messages.envelope import Outgoing

_HEADER_BYTES: Final = 61  # of a batch before its records, which alone are compressed
_GZIP: Final = 1  # in the attributes
_GZIP_STREAM: Final = 31  # in the terms of zlib
_STEP_BYTES: Final = 1_000_000  # that are compressed at a time


def encoded(records: Sequence[Outgoing], *, offsets: Sequence[int] | None = None) -> bytearray:
    """Return a batch, in which each record has the offset of its index unless `offsets` has another one."""
    size = sum(len(key) + len(value or b"") for key, value, _ in records)
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, size + (1 << 20))
    for index, (key, value, headers) in enumerate(records):
        if builder.append(index if offsets is None else offsets[index], 0, key, value, list(headers)) is None:
            raise ValueError("the headers have no room")
    return counted(cast(bytearray, builder.build()), len(records))


def unreadable(record: Outgoing) -> bytearray:
    """Return a batch of one record whose last header has a name that is not text."""
    key, value, headers = record
    data = encoded([(key, value, [*headers, ("name", b"")])])
    return sealed(data.replace(b"name", b"\xffame"))


def compressed(records: Sequence[Outgoing]) -> bytearray:
    data = encoded(records)
    return _compressed(data, [bytes(data[_HEADER_BYTES:])])


def damaged(records: Sequence[Outgoing]) -> bytearray:
    """Return a compressed batch with bytes behind the stream, which the broker ignores and Python's gzip rejects."""
    return sealed(compressed(records) + b"\xaa" * 64)


def expanding(size: int) -> bytearray:
    """Return a compressed batch of one record whose value has `size` bytes."""
    start = bytearray(b"\0\0\0\1")  # attributes, time, offset, no key
    encode_varint(size, start.append)
    length = bytearray()
    encode_varint(len(start) + size + 1, length.append)
    zeros = [bytes(_STEP_BYTES)] * (size // _STEP_BYTES) + [bytes(size % _STEP_BYTES)]
    return _compressed(encoded([(b"", None, [])]), [bytes(length + start), *zeros, b"\0"])


def counted(data: bytearray, count: int) -> bytearray:
    """Set the number of offsets of a batch."""
    struct.pack_into(">i", data, 23, count - 1)
    struct.pack_into(">i", data, 57, count)
    return sealed(data)


def sealed(data: bytearray) -> bytearray:
    """Correct the length and the checksum of a changed batch."""
    struct.pack_into(">i", data, 8, len(data) - 12)
    struct.pack_into(">I", data, 17, calc_crc32c(bytes(data[21:])))
    return data


def _compressed(batch: bytearray, records: Sequence[bytes]) -> bytearray:
    stream = zlib.compressobj(wbits=_GZIP_STREAM)
    data = batch[:_HEADER_BYTES] + b"".join([*map(stream.compress, records), stream.flush()])
    struct.pack_into(">h", data, 21, _GZIP)
    return sealed(data)
