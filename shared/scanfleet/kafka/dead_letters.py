"""Dead letters at an operator's desk: what there is, what is in one, and sending it back to where it was refused.

All that a letter says may be a stranger's: it is shown as printable text only, and it is sent nowhere but to the topic
whose dead letters it lies among. Nothing here removes a letter; that is left to the topic's retention.
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


class CannotReplayError(ScanfleetError):
    """This letter cannot be sent back; says why."""


class Broker(Protocol):
    """What is needed of the bus."""

    def past(self, topic: Topic, first: int = 0) -> AsyncGenerator[RawRecord, None]: ...

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

    def again(self) -> Outgoing:
        """The record as it was, and a header that says where it has been.

        Raises:
            CannotReplayError: it is not known as it was, or may not go where it says that it is from.
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
        DependencyError: the broker is away.
    """
    async for record in broker.past(_dead(topic)):
        yield Letter(topic, record)


async def letter(broker: Broker, id_: str) -> Letter:
    """The one of this id.

    Raises:
        LookupError: there is none.
        DependencyError: the broker is away.
    """
    name, _, place = id_.partition("/")
    partition, _, offset = place.partition("/")
    topic = next((topic for topic in TOPICS if topic.dead_letter == name), None)
    if topic is not None and partition == "0" and offset.isascii() and offset.isdigit():
        async with aclosing(broker.past(_dead(topic), int(offset))) as records:
            first = await anext(records, None)
        if first is not None and first.offset == int(offset):
            return Letter(topic, first)
    raise LookupError(f"there is no letter {id_}")


async def replay(broker: Broker, letter: Letter) -> None:
    """Send it back to the topic that it was refused on; returns when the broker has it.

    Raises:
        CannotReplayError: it was not sent.
        DependencyError: it may or may not have been sent. Twice does no harm: every reader knows what it has seen.
    """
    await broker.send(letter.topic.name, [letter.again()])


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
