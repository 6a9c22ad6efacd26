"""Export of the contracts for other languages: a JSON Schema per message, and a page about all of them.

`python docs/generate.py` writes them. The examples are written by hand: `current` has every field, and is copied to a
folder named after the release when that is published. The folder of a release never changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import DEFAULT_REF_TEMPLATE

from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import MAX_BYTES, MAX_EVENT_ID_CHARS
from scanfleet.contracts.messages.topics import (
    DEAD_LETTER_RETENTION,
    DEAD_LETTER_RETENTION_BYTES,
    MIB,
    TOPICS,
    Topic,
)

EXAMPLES: Final = Path(__file__).parent / "examples"
CURRENT: Final = "current"
SCHEMAS: Final = Path(__file__).parent / "schemas"

_HEADERS: Final = {
    "type": "object",
    "required": ["content-type", "ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject"],
    "properties": {
        "content-type": {"type": "string", "const": "application/json"},
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": {"type": "string", "description": "The same for every copy that readers deduplicate."},
        "ce_source": {"type": "string", "description": "`/scanfleet/<service>`"},
        "ce_type": {"type": "string", "description": "`scanfleet.<message>.v<version>`"},
        "ce_time": {"type": "string", "format": "date-time", "description": "By the sender's clock."},
        "ce_subject": {"type": "string", "description": "The object of the message, for example `job/41`."},
        "traceparent": {"type": "string", "description": "W3C trace context, where there is one."},
    },
}
_EVENT_ID: Final = {
    "default": "",
    "description": "The `ce_id`, on public topics: the same for every copy that readers deduplicate.",
    "maxLength": MAX_EVENT_ID_CHARS,
    "title": "Event Id",
    "type": "string",
}
_HOUR: Final = timedelta(hours=1)

_HEAD: Final = f"""\
# Messages

The messages between services, and those for external consumers. Public topics are a contract with external consumers;
the others are internal. Topic names have the configured prefix.

## Reading

Every record is a CloudEvents 1.0 event in Kafka's binary content mode: the value is JSON, and headers describe it.

| header | value |
|---|---|
| `content-type` | `application/json` |
| `ce_specversion` | `1.0` |
| `ce_id` | deduplication key: the same for every copy of a job's event, a host or a command |
| `ce_source` | `/scanfleet/<service>` |
| `ce_type` | `scanfleet.<message>.v<version>` |
| `ce_time` | time of sending by the sender's clock; compare the record's broker timestamp (LogAppendTime) instead |
| `ce_subject` | the object of the message, for example `job/41` |
| `traceparent` | W3C trace context, where there is one |

Values on public topics contain the `ce_id` as `event_id` too, for sinks that do not read headers. They contain every field; only
a value that would exceed the size limit omits fields with their default value.

Delivery is at least once, so deduplicate. A contract grows by optional fields only: ignore unknown fields. Any other
change is a new version with its own type. A value has at most {MAX_BYTES:,} bytes.

Job events contain the whole job. Its life-cycle events first appear in the order of `seq`, without gaps; skip an event
whose `seq` is not greater than the last one of that job. A late subscriber needs no history: the API has the earlier state.

A record that holds no message of its topic, or that cannot be handled, is sent unchanged to the dead-letter topic
`<topic>-dlq` with these additional headers. Dead letters are kept for {DEAD_LETTER_RETENTION.days} days, and at most
{DEAD_LETTER_RETENTION_BYTES // MIB} MiB of them per topic. A replayed record keeps its own headers and gets `dlq_replay_of`.

| header | value |
|---|---|
| `dlq_topic` | original topic, without the prefix |
| `dlq_partition`, `dlq_offset`, `dlq_timestamp` | original partition, offset and broker timestamp |
| `dlq_group` | consumer group that refused it |
| `dlq_reason` | reason |
| `dlq_replay_of` | id of the dead letter from which this record was replayed |
"""

_KEPT: Final = """\
Kafka deletes records after the time in *kept*, and the oldest ones earlier if a partition exceeds its size in *at most*
(number of partitions × size of each). It deletes whole segments only, so a partition may hold one segment more, and a record
may stay for a seventh of the time longer: 8 days in a topic that keeps 7.
"""


def messages() -> list[type[Message]]:
    """Return every message of every topic, once."""
    return list(dict.fromkeys(message for topic in TOPICS for message in topic.messages))


def file_name(message: type[Message]) -> str:
    """Return the file name of the message's example and schema."""
    return f"{message.__name__}.v{message.version}.json"


def schemas() -> dict[str, str]:
    """Return the JSON Schema of each message's value, by file name."""
    return {file_name(message): json.dumps(_schema(message), indent=2) + "\n" for message in messages()}


def page() -> str:
    """Return a Markdown page of all topics and messages, with an example of each."""
    parts: dict[str, Any] = {}
    lines = [_HEAD, "## Topics", ""]
    lines += [_flat(_KEPT), ""]
    lines += ["| topic | key | messages | from | to | kept | at most | public |", "|---|---|---|---|---|---|---|---|"]
    lines += [_topic(topic) for topic in TOPICS]
    for message in messages():
        schema = _schema(message)
        parts |= schema.get("$defs", {})
        lines += ["", f"## {message.__name__}", ""]
        lines += [f"`{message.type_name()}` on {_on(message)}. {_flat(schema.get('description', ''))}".rstrip(), ""]
        lines += _fields(schema)
        lines += ["", "```json", (EXAMPLES / CURRENT / file_name(message)).read_text(encoding="utf-8").rstrip(), "```"]
    lines += ["", "## Parts"]
    for name, schema in sorted(parts.items()):
        if "properties" in schema:
            lines += ["", f"### {name}", "", _flat(schema.get("description", "")), "", *_fields(schema)]
        else:
            lines += ["", f"### {name}", "", f"One of {_type(schema)}."]
    return "\n".join(lines) + "\n"


def _schema(message: type[Message]) -> dict[str, Any]:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{message.type_name()}"}
    return head | _value_schema(message)


def _value_schema(message: type[Message], ref_template: str = DEFAULT_REF_TEMPLATE) -> dict[str, Any]:
    schema = message.model_json_schema(mode="serialization", ref_template=ref_template)
    if any(topic.public for topic in TOPICS if message in topic.messages):
        schema["properties"] = {"event_id": _EVENT_ID} | schema["properties"]
    return schema


def asyncapi() -> dict[str, Any]:
    """Return the public topics as an AsyncAPI 3.0 document: the platform sends, others receive."""
    public = [topic for topic in TOPICS if topic.public]
    kinds = list(dict.fromkeys(kind for topic in public for kind in topic.messages))
    schemas: dict[str, Any] = {}
    for kind in kinds:
        schema = _value_schema(kind, "#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Scanfleet",
            "version": "1",
            "description": "CloudEvents 1.0 on Kafka, in binary content mode. Delivery is at least once: deduplicate by "
            "`event_id`. Contracts grow by optional fields only: ignore unknown fields.",
        },
        "defaultContentType": "application/json",
        "channels": {topic.name: _channel(topic) for topic in public},
        "operations": {
            f"send-{topic.name}": {"action": "send", "channel": {"$ref": f"#/channels/{topic.name}"}}
            for topic in public
        },
        "components": {
            "messages": {kind.__name__: _message(kind) for kind in kinds},
            "messageTraits": {"cloudEvent": {"headers": _HEADERS}},
            "schemas": dict(sorted(schemas.items())),
        },
    }


def _channel(topic: Topic) -> dict[str, Any]:
    return {
        "address": topic.name,
        "description": f"The key is the {topic.key}; records of one key are in order. The configured prefix comes before the "
        "topic's name.",
        "messages": {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in topic.messages},
        "bindings": {
            "kafka": {
                "partitions": topic.partitions,
                "topicConfiguration": {
                    "retention.ms": topic.retention // timedelta(milliseconds=1),
                    "retention.bytes": topic.retention_bytes,
                },
                "bindingVersion": "0.5.0",
            }
        },
    }


def _message(kind: type[Message]) -> dict[str, Any]:
    example = json.loads((EXAMPLES / CURRENT / file_name(kind)).read_text(encoding="utf-8"))
    example = {"event_id": kind.model_validate(example).event_id} | example
    return {
        "name": kind.type_name(),
        "contentType": "application/json",
        "description": _flat(_schema(kind).get("description", "")),
        "traits": [{"$ref": "#/components/messageTraits/cloudEvent"}],
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        "examples": [{"payload": example}],
    }


def _topic(topic: Topic) -> str:
    links = ", ".join(f"[{message.__name__}](#{message.__name__.lower()})" for message in topic.messages)
    ends = f"{', '.join(topic.producers)} | {', '.join(topic.consumers) or 'subscribers'}"
    hours = topic.retention // _HOUR
    kept = f"{hours // 24} d" if hours >= 24 else f"{hours} h"  # noqa: PLR2004 # hours of a day
    most = f"{topic.partitions} × {_size(topic.retention_bytes)}"
    return f"| `{topic.name}` | {topic.key} | {links} | {ends} | {kept} | {most} | {'yes' if topic.public else 'no'} |"


def _size(count: int) -> str:
    mebibytes = count // MIB
    return f"{mebibytes} MiB" if mebibytes % 1_024 else f"{mebibytes // 1_024} GiB"


def _on(message: type[Message]) -> str:
    return " and ".join(f"`{topic.name}`" for topic in TOPICS if message in topic.messages)


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| field | type | required | description |"
    yield "|---|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        there = "yes" if name in required else f"default `{json.dumps(field.get('default'))}`"
        yield f"| `{name}` | {_flat(_type(field))} | {there} | {_flat(field.get('description', ''))} |"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := schema.get("anyOf"):
        return " or ".join(map(_type, choices))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("format", schema["type"]))


def _flat(text: str) -> str:
    """Return a docstring for a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
