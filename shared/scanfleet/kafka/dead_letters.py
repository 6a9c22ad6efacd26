"""Dead letters for operators: list them, show one, and replay them to the topic on which they were refused.

Any reader of a topic may write to its dead letters, so nothing in a letter is trusted. It is shown as printable text only, sent
only to the topic that its dead-letter topic belongs to, and only if that topic still holds the same record where the letter says
that it was. Nothing here removes a letter; the topic's retention does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, Protocol

from scanfleet.clock import rfc3339
from scanfleet.errors import ScanfleetError
from scanfleet.messages.envelope import Outgoing, RawRecord, split_dead_letter, weight
from scanfleet.messages.topics import TOPICS, Topic

REPLAY: Final = "dlq_replay_of"
"""Header of a record that was sent back: the letter that it was. If it is refused again, its new letter has it too."""

# What a topic takes by default is 1 MiB, the record's own framing within; a larger one came compressed, and is refused by
# its reader for its size anyway.
MOST_BYTES: Final = 1024 * 1024 - 1024
_REASON_LENGTH: Final = 120  # of a line in the list
_MAX_DIGITS: Final = 18  # of an offset, which has 64 bits


class CannotReplayError(ScanfleetError):
    """The letter was not sent; says why."""


class Broker(Protocol):
    """The part of the bus that dead letters need."""

    def past(
        self, topic: Topic, first: int = 0, *, partition: int | None = None
    ) -> AsyncGenerator[RawRecord, None]: ...

    async def send(self, topic: str, records: Iterable[Outgoing]) -> None: ...


@dataclass(frozen=True, slots=True)
class Letter:
    topic: Topic
    """Among whose dead letters it lies."""

    record: RawRecord

    @property
    def id(self) -> str:
        """Dead-letter topic, partition and offset."""
        return f"{self.record.topic}/{self.record.partition}/{self.record.offset}"

    @property
    def origin(self) -> Mapping[str, bytes]:
        """What the reader that refused it noted; empty when none did."""
        return split_dead_letter(self.record.headers)[1]

    def line(self) -> str:
        """Id, origin, who refused it, when, bytes of its value, the letter that it is a replay of, and why: between tabs."""
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
        """Everything in it."""
        yield f"letter: {self.id}"
        yield f"time: {rfc3339(self.record.timestamp)}"
        yield f"key: {printable(self.record.key)}"
        for name, value in self.record.headers:
            yield f"header {printable(name.encode())}: {printable(value)}"
        yield f"value: {printable(self.record.value)}"

    def is_copy_of(self, record: RawRecord) -> bool:
        """Whether it holds this record's key, value and headers, byte for byte."""
        own, _ = split_dead_letter(self.record.headers)
        copy = self.record.key or b"", self.record.value, tuple(own)
        return copy == (record.key or b"", record.value, tuple(record.headers))

    def again(self) -> Outgoing:
        """The record as it was, with a header that names this letter.

        Raises:
            CannotReplayError: the letter does not hold the record, or names another topic.
        """
        own, origin = split_dead_letter(self.record.headers)
        if origin.get("dlq_topic") != self.topic.name.encode():
            raise CannotReplayError(f"no reader of {self.topic.name} has put it there")
        if self.record.value is None:
            raise CannotReplayError("it has no value: there was none, or it could not be read or kept; see its origin")
        headers = (*((name, value) for name, value in own if name != REPLAY), (REPLAY, self.id.encode()))
        if len(self.record.key or b"") + weight(replace(self.record, headers=headers)) > MOST_BYTES:
            raise CannotReplayError("it is larger than any message may be")
        return self.record.key or b"", self.record.value, headers


async def letters(broker: Broker, topic: Topic) -> AsyncIterator[Letter]:
    """Those of `topic`, oldest first, up to the one that is the last now.

    Raises:
        DependencyError: the broker is unavailable.
    """
    async for record in broker.past(_dead(topic)):
        yield Letter(topic, record)


async def letter(broker: Broker, id_: str) -> Letter:
    """The one of this id.

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
            return Letter(topic, first)
    raise LookupError(f"there is no letter {id_}")


async def replay(broker: Broker, letter: Letter, *, verify: bool = True) -> None:
    """Send it to the topic on which it was refused; return when the broker has acknowledged it.

    With `verify` it is sent only if that topic still holds the same record at the letter's origin: a client that may write dead
    letters could otherwise have an administrator send what they may not.

    Raises:
        CannotReplayError: it was not sent.
        DependencyError: it may or may not have been sent. Twice does no harm: readers deduplicate.
    """
    again = letter.again()
    if verify:
        await _verify(broker, letter)
    await broker.send(letter.topic.name, [again])


async def _verify(broker: Broker, letter: Letter) -> None:
    """Compare the letter with the record that it says it is a copy of.

    Raises:
        CannotReplayError: the topic does not hold that record, or another one.
        DependencyError: the broker is unavailable.
    """
    partition, offset = (_number(letter.origin.get(f"dlq_{part}")) for part in ("partition", "offset"))
    if partition is None or offset is None or partition >= letter.topic.partitions:
        raise CannotReplayError("it names no partition and offset that it was refused at; it may be forged")
    origin = f"{letter.topic.name}/{partition}/{offset}"
    async with aclosing(broker.past(letter.topic, offset, partition=partition)) as records:
        record = await anext(records, None)
    if record is None or record.offset != offset:
        raise CannotReplayError(f"{origin} is not there (any more), so the letter cannot be verified")
    if not letter.is_copy_of(record):
        raise CannotReplayError(f"{origin} holds another record: the letter is forged")


def _number(text: bytes | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and len(text) <= _MAX_DIGITS else None


def printable(text: bytes | None) -> str:
    """`text` on one line, with everything escaped that a terminal could take for more than a character."""
    if text is None:
        return "-"
    decoded = text.decode(errors="backslashreplace")
    if decoded.isprintable():
        return decoded
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in decoded)


def _dead(topic: Topic) -> Topic:
    return replace(topic, name=topic.dead_letter, partitions=1)
