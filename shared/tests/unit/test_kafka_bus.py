"""The Kafka bus without a broker."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from pathlib import Path

import pytest

from local.credentials import Credentials
from scanfleet.clock import utc_now
from scanfleet.contracts.messages.envelope import Headers, Outgoing, RawRecord
from scanfleet.contracts.messages.topics import SCAN_WORKERS
from scanfleet.errors import DependencyError
from scanfleet.kafka import KafkaBus, bus
from scanfleet.kafka.batches import MOST_HEADERS
from scanfleet.kafka.topics import DEAD_LETTER_BYTES
from scanfleet.runtime.consumer import ConsumerLoop
from scanfleet.runtime.settings import KafkaSettings
from scanfleet_testing.consumers import Recorder


class Sending(KafkaBus):
    """Keeps what it should send."""

    def __init__(self) -> None:
        super().__init__(KafkaSettings(kafka="127.0.0.1:1"), source="test", instance="one")
        self.sent: list[tuple[str, list[Outgoing]]] = []

    async def send(self, topic: str, records: Iterable[Outgoing]) -> None:
        self.sent.append((topic, list(records)))

    async def dead_letter(self, *records: RawRecord) -> list[list[Outgoing]]:
        """Dead-letter the records as a consumer of this bus does; return the letters of each send."""
        consumer = self.consume(SCAN_WORKERS, "test", Recorder())
        assert isinstance(consumer, ConsumerLoop)
        assert consumer._dead_letter is not None
        await consumer._dead_letter([(record, "junk") for record in records])
        assert {topic for topic, _ in self.sent} == {SCAN_WORKERS.dead_letter}
        return [letters for _, letters in self.sent]


def junk(size: int = 1, headers: Headers = ()) -> RawRecord:
    return RawRecord(SCAN_WORKERS.name, 0, 0, utc_now(), b"", bytes(size), headers)


@pytest.mark.parametrize(
    ("sizes", "sends"),
    [
        ((1, 1, 1), [3]),
        ((1, DEAD_LETTER_BYTES - 100_000), [2]),
        ((200_000, DEAD_LETTER_BYTES - 100_000), [1, 1]),
        ((1, DEAD_LETTER_BYTES + 1, 1), [3]),
    ],
    ids=["small", "fitting", "large", "too large"],
)
async def test_dead_letters_of_one_batch_are_sent_in_bounded_parts(sizes: Iterable[int], sends: list[int]) -> None:
    """Dead letters are sent together up to the maximum size of one of them."""
    sent = await Sending().dead_letter(*map(junk, sizes))
    assert list(map(len, sent)) == sends


@pytest.mark.parametrize("count", [MOST_HEADERS - 6, MOST_HEADERS])
async def test_dead_letter_has_no_more_headers_than_its_readers_accept(count: int) -> None:
    """A record whose origin would exceed the headers of a readable record is dead-lettered without its content."""
    ((letter,),) = await Sending().dead_letter(junk(headers=[("name", b"")] * count))
    _, value, headers = letter
    assert len(headers) == (MOST_HEADERS if value is not None else 6)
    assert (value is None) == (count > MOST_HEADERS - 6)


async def test_start_with_an_untrusted_broker_reports_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a start that found no broker has the reason of the last connection, not only the timeout."""
    monkeypatch.setattr(bus, "START_SECONDS", 0.1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Credentials(tmp_path / "broker").server)
    async with await asyncio.start_server(
        lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context
    ) as broker:
        _, port = broker.sockets[0].getsockname()
        settings = KafkaSettings(kafka=f"127.0.0.1:{port}", kafka_ca_file=Credentials(tmp_path / "other").authority)
        with pytest.raises(DependencyError, match=f"no broker at 127.0.0.1:{port}: .*CERTIFICATE_VERIFY_FAILED"):
            await KafkaBus(settings, source="test", instance="one").start()
