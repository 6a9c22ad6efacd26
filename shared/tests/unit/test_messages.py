"""The contracts: examples, schemas, the registry, and the envelope as others read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import HostScanned, Message, PortFound, export
from scanfleet.contracts.messages.envelope import RawRecord, decode, encode
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.contracts.messages.results import MAX_FOUND
from scanfleet.contracts.messages.topics import OPERATOR, SCAN_AUDIT_OPERATOR, SCAN_RESULTS, TOPICS, Topic
from scanfleet.services import SERVICES
from scanfleet_testing.contracts import with_unknown_fields

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

every_message = pytest.mark.parametrize("kind", export.messages(), ids=lambda kind: kind.__name__)
every_topic = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
every_pair = pytest.mark.parametrize(
    ("topic", "kind"),
    [pytest.param(topic, kind, id=f"{topic.name} {kind.__name__}") for topic in TOPICS for kind in topic.messages],
)


every_example = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{path.parent.name} {path.stem}") for path in sorted(export.EXAMPLES.glob("*/*.json"))],
)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def example(kind: type[Message]) -> dict[str, Any]:
    return read(export.EXAMPLES / export.CURRENT / export.file_name(kind))


def kind_of(path: Path) -> type[Message]:
    """The message that an example of any release is of; that it is still there is part of the contract."""
    (kind,) = (kind for kind in export.messages() if export.file_name(kind) == path.name)
    return kind


def leaves(kind: type[Message]) -> Iterator[type[Message]]:
    below = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("scanfleet.")]
    for sub in below:
        yield from leaves(sub)
    if not below:
        yield kind


def test_registry_contains_every_message() -> None:
    """Every message that is defined is in the registry."""
    assert {leaf for kind in Message.__subclasses__() for leaf in leaves(kind)} == set(export.messages())


@pytest.mark.parametrize(
    "folder", [export.EXAMPLES / export.CURRENT, export.SCHEMAS], ids=lambda folder: str(folder.name)
)
def test_messages_have_one_example_and_schema_per_version(folder: Any) -> None:
    """There is one file for each version of each message, and no other."""
    assert {path.name for path in folder.iterdir()} == {export.file_name(kind) for kind in export.messages()}


@every_example
def test_examples_of_every_release_round_trip(path: Path) -> None:
    """An example of any release parses, and the message is serialised to the same JSON."""
    message = kind_of(path).model_validate_json(json.dumps(read(path)))
    assert json.loads(message.model_dump_json(exclude_unset=True)) == read(path)


@every_message
def test_current_examples_have_every_field(kind: type[Message]) -> None:
    """The example of the unreleased version has every field, at any depth."""
    assert json.loads(kind.model_validate(example(kind)).model_dump_json()) == example(kind)


@pytest.mark.proves("F28")
@every_example
def test_unknown_field_is_ignored_at_any_depth(path: Path) -> None:
    """An optional field that a later release adds to any part of a message does not change the message."""
    kind, known = kind_of(path), kind_of(path).model_validate(read(path))
    (topic, *_) = (topic for topic in TOPICS if kind in topic.messages)
    envelope = encode(topic, known, source="test")
    for changed in with_unknown_fields(read(path)):
        value = json.dumps(changed).encode()
        record = RawRecord(topic.name, 0, 0, utc_now(), envelope.key, value, envelope.headers)
        assert decode(topic, record) == known


@every_message
def test_schemas_match_their_messages(kind: type[Message]) -> None:
    """The committed schema matches the code, and the examples of all releases conform to it."""
    text = (export.SCHEMAS / export.file_name(kind)).read_text(encoding="utf-8")
    assert text == export.schemas()[export.file_name(kind)]
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    for path in export.EXAMPLES.glob(f"*/{export.file_name(kind)}"):
        jsonschema.Draft202012Validator(json.loads(text)).validate(read(path))


def test_topic_names_are_hyphenated_words_and_unique() -> None:
    """No two topics share a name, and no topic has the name of another's dead letters."""
    names = [name for topic in TOPICS for name in (topic.name, topic.dead_letter)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in names)


@every_topic
def test_topics_have_messages_services_and_retention(topic: Topic) -> None:
    """A topic has messages, existing services as producers and, unless it is public, consumers, and a retention time."""
    services = set(SERVICES)
    operators = {OPERATOR} if topic is SCAN_AUDIT_OPERATOR else set()
    assert topic.messages
    assert set(topic.producers) <= services | operators
    assert set(topic.consumers) <= services
    assert topic.producers
    assert topic.consumers or topic.public
    assert topic.retention >= timedelta(hours=1)
    assert topic.partitions >= 1


@every_pair
def test_messages_have_key_and_subject(topic: Topic, kind: type[Message]) -> None:
    """Key and subject of a message come from its own fields."""
    message = kind.model_validate(example(kind))
    assert topic.key_of(message)
    assert re.fullmatch(r"[a-z]+/.+", message.subject)


@every_pair
def test_records_are_read_by_the_cloudevents_library(topic: Topic, kind: type[Message]) -> None:
    """The CloudEvents project's own library reads the same event from a record."""
    message = kind.model_validate(example(kind) | {"traceparent": TRACEPARENT})
    envelope = encode(topic, message, source="job-orchestrator")
    event = from_binary_event(KafkaMessage(dict(envelope.headers), envelope.key, envelope.value))
    assert event.get_specversion() == "1.0"
    assert event.get_type() == f"scanfleet.{kind.__name__}.v1"
    assert event.get_source() == "/scanfleet/job-orchestrator"
    assert event.get_subject() == message.subject
    assert event.get_id()
    assert event.get_datacontenttype() == "application/json"
    assert event.get_extension("partitionkey") == topic.key_of(message)
    time = event.get_time()
    assert time is not None
    assert time.tzinfo is not None
    assert time <= utc_now()
    assert kind.model_validate(event.get_data()) == kind.model_validate(example(kind))


@every_pair
def test_decode_is_the_inverse_of_encode(topic: Topic, kind: type[Message]) -> None:
    """A decoded message is equal to the encoded one; its traceparent is from the header, not from the value."""
    message = kind.model_validate(example(kind) | {"traceparent": TRACEPARENT})
    envelope = encode(topic, message, source="test")
    assert TRACEPARENT.encode() not in envelope.value
    record = RawRecord(topic.name, 0, 0, utc_now().astimezone(UTC), envelope.key, envelope.value, envelope.headers)
    assert decode(topic, record) == message


@pytest.mark.parametrize(
    "name", ["SubmitJobs", "CancelJob", "JobCreated", "JobProgressed", "HostScanned", "ChunkScanned", "JobDeleted"]
)
def test_copies_of_a_message_have_one_event_id(name: str) -> None:
    """Messages that readers deduplicate have the same event id in every copy."""
    (kind,) = (kind for kind in export.messages() if kind.__name__ == name)
    assert kind.model_validate(example(kind)).event_id == kind.model_validate(example(kind)).event_id


def test_host_scanned_id_is_the_same_in_every_attempt() -> None:
    """Two attempts that find the same address use one event id: the first in the log wins."""
    (kind,) = (kind for kind in export.messages() if kind.__name__ == "HostScanned")
    again = example(kind) | {"attempt": 2, "worker_id": "another"}
    assert kind.model_validate(again).event_id == kind.model_validate(example(kind)).event_id


@every_pair
def test_public_values_have_event_id_and_every_field(topic: Topic, kind: type[Message]) -> None:
    """A sink that reads only values can deduplicate public events, and gets fields with default values too."""
    bare = {name: value for name, value in example(kind).items() if kind.model_fields[name].is_required()}
    message = kind.model_validate(bare)
    envelope = encode(topic, message, source="test")
    value = json.loads(envelope.value)
    assert value.pop("event_id", None) == (dict(envelope.headers)["ce_id"].decode() if topic.public else None)
    assert value == json.loads(message.model_dump_json())


def test_oversized_host_omits_fields_with_default_values() -> None:
    """Only a value that would exceed the limit omits default values, and it decodes to an equal message."""
    found = tuple(PortFound(port=port, service="tcpwrapped-service") for port in range(MAX_FOUND))
    host = HostScanned.model_validate(example(HostScanned)).model_copy(update={"ports": found})
    envelope = encode(SCAN_RESULTS, host, source="test")
    assert len(host.model_dump_json()) > MAX_BYTES >= len(envelope.value)
    value = json.loads(envelope.value)
    assert (value["event_id"], value["ports"][0]) == (host.event_id, {"port": 0, "service": "tcpwrapped-service"})


def test_asyncapi_document_describes_the_public_topics() -> None:
    """Every reference resolves, every public topic and message is present, and the examples conform to their schemas."""
    document = export.asyncapi()
    for path in re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(document)):
        found: Any = document
        for name in path.split("/"):
            found = found[name]
    public = [topic for topic in TOPICS if topic.public]
    assert {name: set(channel["messages"]) for name, channel in document["channels"].items()} == {
        topic.name: {kind.__name__ for kind in topic.messages} for topic in public
    }
    for name, message in document["components"]["messages"].items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        for each in message["examples"]:
            jsonschema.Draft202012Validator(schema).validate(each["payload"])
