"""Dead letters for operators: list them, show one, and replay them to the topic on which they were refused.

Every reader of a topic may write to its dead-letter topic, so the content of a dead letter is not trusted. It is shown
as printable text only, and replayed only to the topic of its dead-letter topic, if that topic still holds the same
record at the origin that the dead letter names. Dead letters are removed only by the topic's retention.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, Protocol

from scanfleet.clock import rfc3339
from scanfleet.contracts.messages.envelope import Outgoing, RawRecord, split_dead_letter, weight
from scanfleet.contracts.messages.topics import TOPICS, Topic
from scanfleet.errors import ScanfleetError

REPLAY: Final = "dlq_replay_of"
"""Header of a replayed record with the id of its dead letter; a dead letter of the replay has it too."""

# A topic's default limit is 1 MiB including the record's framing; a reader would reject a larger record for its size
# anyway.
MOST_BYTES: Final = 1024 * 1024 - 1024
_REASON_LENGTH: Final = 120  # characters of a reason in the list
_MAX_DIGITS: Final = 18  # of an offset, which has 64 bits


class CannotReplayError(ScanfleetError):
    """The dead letter was not sent; the message has the reason."""


class Broker(Protocol):
    """The methods of the bus needed for dead letters."""

    def past(
        self, topic: Topic, first: int = 0, *, partition: int | None = None
    ) -> AsyncGenerator[RawRecord, None]: ...

    async def send(self, topic: str, records: Iterable[Outgoing]) -> None: ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    topic: Topic
    """The original topic."""

    record: RawRecord

    @property
    def id(self) -> str:
        """The id: dead-letter topic, partition and offset."""
        return f"{self.record.topic}/{self.record.partition}/{self.record.offset}"

    @property
    def origin(self) -> Mapping[str, bytes]:
        """The headers added by the reader that refused the record; empty if there are none."""
        return split_dead_letter(self.record.headers)[1]

    def line(self) -> str:
        """Return id, origin, group, time, bytes of the value, replayed dead letter and reason, separated by tabs."""
        origin = self.origin
        place = "/".join(printable(origin.get(f"dlq_{part}")) for part in ("topic", "partition", "offset"))
        columns = [
            self.id,
            place,
            printable(origin.get("dlq_group")),
            rfc3339(self.record.timestamp),
            "-" if self.record.value is None else str(len(self.record.value)),
            printable(dict(self.record.headers).get(REPLAY)),
            printable(origin.get("dlq_reason"))[:_REASON_LENGTH],
        ]
        return "\t".join(columns)

    def lines(self) -> Iterator[str]:
        """Yield the complete content as text."""
        yield f"dead letter: {self.id}"
        yield f"time: {rfc3339(self.record.timestamp)}"
        yield f"key: {printable(self.record.key)}"
        for name, value in self.record.headers:
            yield f"header {printable(name.encode())}: {printable(value)}"
        yield f"value: {printable(self.record.value)}"

    def is_copy_of(self, record: RawRecord) -> bool:
        """Return whether it has this record's key, value and headers, byte for byte."""
        own, _ = split_dead_letter(self.record.headers)
        copy = self.record.key or b"", self.record.value, tuple(own)
        return copy == (record.key or b"", record.value, tuple(record.headers))

    def again(self) -> Outgoing:
        """Return the original record with a header that names this dead letter.

        Raises:
            CannotReplayError: the dead letter does not hold the record, or names another topic.
        """
        own, origin = split_dead_letter(self.record.headers)
        if origin.get("dlq_topic") != self.topic.name.encode():
            raise CannotReplayError(f"it was not dead-lettered by a reader of {self.topic.name}")
        if self.record.value is None:
            raise CannotReplayError("it has no value, or one that could not be read or stored; see its origin")
        headers = (*((name, value) for name, value in own if name != REPLAY), (REPLAY, self.id.encode()))
        if weight(replace(self.record, headers=headers)) > MOST_BYTES:
            raise CannotReplayError("it exceeds the maximum size of a message")
        return self.record.key or b"", self.record.value, headers


async def dead_letters(broker: Broker, topic: Topic) -> AsyncIterator[DeadLetter]:
    """Yield the present dead letters of `topic`, oldest first.

    Raises:
        DependencyError: the broker is unavailable.
    """
    async for record in broker.past(_dead(topic)):
        yield DeadLetter(topic, record)


async def dead_letter(broker: Broker, id_: str) -> DeadLetter:
    """Return the dead letter with this id.

    Raises:
        LookupError: there is none.
        DependencyError: the broker is unavailable.
    """
    name, _, place = id_.partition("/")
    partition, _, offset = place.partition("/")
    topic = next((topic for topic in TOPICS if topic.dead_letter == name), None)
    number = _number(offset.encode())
    if topic is not None and partition == "0" and number is not None:
        async with aclosing(broker.past(_dead(topic), number)) as records:
            first = await anext(records, None)
        if first is not None and first.offset == number:
            return DeadLetter(topic, first)
    raise LookupError(f"there is no dead letter {id_}")


async def check(broker: Broker, letter: DeadLetter, *, verify: bool) -> None:
    """Return if the dead letter may be replayed.

    With `verify` it may be only if the original topic still holds the same record at the dead letter's origin. Otherwise a
    client that may write dead letters could have an administrator send records that the client may not send.

    Raises:
        CannotReplayError: it may not.
        DependencyError: the broker is unavailable.
    """
    letter.again()
    if verify:
        await _verify(broker, letter)


async def replay(broker: Broker, letter: DeadLetter) -> None:
    """Send the record of a checked dead letter to its original topic and wait for the acknowledgement.

    Raises:
        CannotReplayError: it was not sent.
        DependencyError: it may or may not have been sent. A retry is safe: readers deduplicate.
    """
    await broker.send(letter.topic.name, [letter.again()])


async def _verify(broker: Broker, letter: DeadLetter) -> None:
    """Compare the dead letter with the record at its origin.

    Raises:
        CannotReplayError: the topic no longer holds that record, or holds another one.
        DependencyError: the broker is unavailable.
    """
    partition, offset = (_number(letter.origin.get(f"dlq_{part}")) for part in ("partition", "offset"))
    if partition is None or offset is None or partition >= letter.topic.partitions:
        raise CannotReplayError("it names no partition and offset of origin; it may be forged")
    origin = f"{letter.topic.name}/{partition}/{offset}"
    async with aclosing(broker.past(letter.topic, offset, partition=partition)) as records:
        record = await anext(records, None)
    if record is None or record.offset != offset:
        raise CannotReplayError(f"{origin} no longer exists, or never existed, so the dead letter cannot be verified")
    if not letter.is_copy_of(record):
        raise CannotReplayError(f"{origin} holds another record: the dead letter is forged")


def _number(text: bytes | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and len(text) <= _MAX_DIGITS else None


def printable(text: bytes | None) -> str:
    """Return `text` on one line, with every character escaped that a terminal could interpret."""
    if text is None:
        return "-"
    decoded = text.decode(errors="backslashreplace")
    if decoded.isprintable():
        return decoded
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in decoded)


def _dead(topic: Topic) -> Topic:
    return replace(topic, name=topic.dead_letter, partitions=1)
