"""Messages take what is really sent, and refuse hostile values in bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import HostScanned, Message, PortFound, export
from scanfleet.contracts.messages.envelope import RawRecord, decode, encode
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.contracts.messages.results import MAX_FOUND
from scanfleet.contracts.messages.topics import SCAN_RESULTS, TOPICS, Topic
from scanfleet.errors import MessageError
from scanfleet.scanning.ports import MAX_RANGES_TEXT
from scanfleet_testing.hostile import hostile_messages

CPU_SECONDS = 0.5  # for one record of 100 kB, on a loaded machine; a quadratic step takes seconds


def example(kind: type[Message]) -> Any:
    return json.loads((export.EXAMPLES / export.CURRENT / export.file_name(kind)).read_text(encoding="utf-8"))


def outcome(topic: Topic, record: RawRecord) -> str:
    """Why the record is refused; empty when it is accepted, and then it can be sent again."""
    try:
        message = decode(topic, record)
    except MessageError as error:
        return str(error)
    encode(topic, message, source="test")
    return ""


@pytest.mark.proves("A21", "G9")
@pytest.mark.parametrize("kind", export.messages(), ids=lambda kind: kind.__name__)
def test_decode_hostile_value_in_any_field_ends_in_bounded_time(kind: type[Message]) -> None:
    """A hostile value in any field of any message is refused with a short reason or accepted, within half a CPU second."""
    (topic, *_) = (topic for topic in TOPICS if kind in topic.messages)
    good = encode(topic, kind.model_validate(example(kind)), source="test")
    for what, value in hostile_messages(example(kind)):
        record = RawRecord(topic.name, 0, 0, utc_now(), good.key, value, good.headers)
        began = time.process_time()
        reason = outcome(topic, record)
        assert time.process_time() - began < CPU_SECONDS, what
        assert len(reason) <= 600, what


def host(**fields: Any) -> HostScanned:
    return HostScanned.model_validate(example(HostScanned) | fields)


def test_host_scanned_largest_real_host_fits() -> None:
    """A host with every port of a chunk open, ranges of all other UDP ports or kilobytes of text on each is accepted."""
    ports = [PortFound(port=number, raw_data="x" * 50) for number in range(MAX_FOUND)]
    talkative = [PortFound(port=number, raw_data="y" * 4_096, banner="z" * 200) for number in range(200)]
    ranges = ",".join(str(number) for number in range(1, 65_536, 2))
    assert len(ranges) <= MAX_RANGES_TEXT
    for each in (host(ports=ports), host(ports=talkative), host(open_filtered=ranges)):
        assert len(encode(SCAN_RESULTS, each, source="test").value) <= MAX_BYTES


@pytest.mark.proves("A21")
@pytest.mark.parametrize(
    "address",
    [
        "eyJ" * 300_000,
        "fe80::1%eth0",
        "2001:0db8::1",
        "127.0.0.1 ",
        "",
        "::FFFF",
        "127.9.8.1/32",
        "0x7f000001",
        "::ffff:127.0.0.01",
    ],
)
def test_host_scanned_address_not_canonical_is_refused(address: str) -> None:
    """An address that is long, spelled in another way or has a zone is no address of a host."""
    with pytest.raises(ValueError, match="address"):
        host(address=address)
