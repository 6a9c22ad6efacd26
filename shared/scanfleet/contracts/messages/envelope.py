"""Encoding of messages as Kafka records: CloudEvents 1.0, binary content mode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from pydantic import ValidationError

from scanfleet.clock import utc_now
from scanfleet.contracts.messages.base import TRACEPARENT, Message
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import MessageError

M = TypeVar("M", bound=Message)

Headers = Sequence[tuple[str, bytes | None]]
Outgoing = tuple[bytes, bytes | None, Headers]
"""Key, value and headers of a record to send."""

CONTENT_TYPE: Final = "application/json"

_READ: Final = frozenset({"content-type", "ce_specversion", "ce_type", "traceparent"})
_ADDED: Final = ("dlq_topic", "dlq_partition", "dlq_offset", "dlq_timestamp", "dlq_group", "dlq_reason")
_REASON_LENGTH: Final = 500  # per validation report: enough to see the fault, and a bound for hostile values


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message encoded for a producer."""

    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record as received from the broker, not validated yet."""

    topic: str
    """Topic name without the configured prefix."""

    partition: int
    offset: int
    timestamp: datetime
    key: bytes | None
    value: bytes | None
    headers: Headers


def encode(topic: Topic, message: Message, *, source: str, traceparent: str | None = None) -> Envelope:
    """Encode `message` for `topic`.

    Args:
        topic: the message's topic.
        message: the value.
        source: the publishing service.
        traceparent: the current trace, for a message that has none of its own.

    Raises:
        MessageError: the message does not belong to this topic, or is too large.
    """
    if type(message) not in topic.messages:
        raise MessageError(f"{type(message).__name__} is not a message of {topic.name}")
    event_id = message.event_id
    named = {"event_id": event_id} if topic.public else {}
    value = _value(message, named)
    if len(value) > MAX_BYTES:
        value = _value(message, named, exclude_defaults=True)
    if len(value) > MAX_BYTES:
        raise MessageError(f"{type(message).__name__} has {len(value)} bytes; {MAX_BYTES} is the limit")
    headers = [
        ("content-type", CONTENT_TYPE),
        ("ce_specversion", "1.0"),
        ("ce_id", event_id),
        ("ce_source", f"/scanfleet/{source}"),
        ("ce_type", message.type_name()),
        ("ce_time", utc_now().isoformat()),
        ("ce_subject", message.subject),
    ]
    if trace := message.traceparent or traceparent:
        headers.append(("traceparent", trace))
    return Envelope(topic.key_of(message).encode(), value, tuple((name, text.encode()) for name, text in headers))


def _value(message: Message, named: Mapping[str, str], *, exclude_defaults: bool = False) -> bytes:
    """Return the JSON of the message with the fields of `named` before its own."""
    text = message.model_dump_json(exclude_defaults=exclude_defaults).encode()
    return json.dumps(named, separators=(",", ":")).encode()[:-1] + b"," + text[1:] if named else text


def decode(topic: Topic[M], record: RawRecord) -> M:
    """Decode the message in `record`. An invalid traceparent is ignored.

    Raises:
        MessageError: it holds no message of this topic; the text has the reason.
    """
    headers = {name: _text(name, value) for name, value in record.headers if name in _READ}
    kinds = {kind.type_name(): kind for kind in topic.messages}
    if headers.get("ce_specversion") != "1.0":
        raise MessageError("not a CloudEvents 1.0 record")
    kind = kinds.get(headers.get("ce_type", ""))
    if kind is None:
        raise MessageError(f"no message of {topic.name}: ce_type is {headers.get('ce_type', '')[:_REASON_LENGTH]!r}")
    if headers.get("content-type", "").split(";")[0].strip() != CONTENT_TYPE:
        raise MessageError(f"content-type is not {CONTENT_TYPE}")
    if record.value is None:
        raise MessageError("the record has no value")
    if len(record.value) > MAX_BYTES:
        raise MessageError(f"{len(record.value)} bytes; {MAX_BYTES} is the limit")
    try:
        message = kind.model_validate_json(record.value)
    except ValidationError as error:
        raise MessageError(f"no {kind.__name__}: {error}"[:_REASON_LENGTH]) from error
    if record.key != topic.key_of(message).encode():
        raise MessageError(f"the key is not the {topic.key}")  # such a record may be out of order
    traceparent = headers.get("traceparent", "")
    # Only the header counts: a field of that name in the value is an unknown field.
    return message.model_copy(update={"traceparent": traceparent if TRACEPARENT.fullmatch(traceparent) else None})


def dead_letter_headers(record: RawRecord, *, group: str, reason: str) -> Headers:
    """Return the record's own headers, followed by its origin, the refusing group and the reason."""
    origin = record.topic, str(record.partition), str(record.offset), record.timestamp.isoformat()
    values = (*origin, group, reason[:_REASON_LENGTH])
    added = [(name, value.encode(errors="replace")) for name, value in zip(_ADDED, values, strict=True)]
    return (*record.headers, *added)


def split_dead_letter(headers: Headers) -> tuple[Headers, Mapping[str, bytes]]:
    """Split the headers into the record's own and those of `dead_letter_headers`, which are empty if invalid."""
    own, added = headers[: -len(_ADDED)], headers[-len(_ADDED) :]
    if tuple(name for name, _ in added) != _ADDED:
        return headers, {}
    return own, {name: value or b"" for name, value in added}


def weight(record: RawRecord) -> int:
    """Return an upper bound of the size of key, value and headers in bytes."""
    framing = 12  # per header: two length fields
    headers = sum(len(name.encode()) + len(value or b"") + framing for name, value in record.headers)
    return len(record.key or b"") + len(record.value or b"") + headers


def _text(name: str, value: bytes | None) -> str:
    try:
        return (value or b"").decode()
    except UnicodeDecodeError as error:
        raise MessageError(f"header {name} is not text") from error
