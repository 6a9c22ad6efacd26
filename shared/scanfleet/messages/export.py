"""The contracts for those who do not read Python: a JSON Schema for each message, and a page about all of them.

Written by `python docs/generate.py`. The examples are written by hand: `current` shows every field that there is, and becomes
a folder of its release's name when that is published. Such a folder is what was once promised, and never changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from scanfleet.messages.base import Message
from scanfleet.messages.fields import MAX_BYTES
from scanfleet.messages.topics import DEAD_LETTER_RETENTION, TOPICS, Topic

EXAMPLES: Final = Path(__file__).parent / "examples"
CURRENT: Final = "current"
SCHEMAS: Final = Path(__file__).parent / "schemas"

_HOUR: Final = timedelta(hours=1)

_HEAD: Final = f"""\
# Messages

What crosses the walls between services, and what other services may read. Topics marked public are a contract with
everybody; the others are between Scanfleet's own services. The names of topics carry the prefix that is configured.

## Reading

Every record is a CloudEvents 1.0 event in Kafka's binary mode: the value is JSON, and the headers say what it is.

| header | value |
|---|---|
| `content-type` | `application/json` |
| `ce_specversion` | `1.0` |
| `ce_id` | the same for every copy of an event whose copies must be told from new ones: a job's event, a host, a command |
| `ce_source` | `/scanfleet/` and the service |
| `ce_type` | `scanfleet.<message>.v<version>` |
| `ce_time` | when it was sent, by the sender's clock; the broker's own stamp of the record (LogAppendTime) is the one to compare |
| `ce_subject` | what it is about, for example `job/41` |
| `traceparent` | W3C trace context, where there is one |

A message may come twice. Its contract grows by optional fields only: ignore what you do not know. A change of any other
kind is a new version with a type of its own. A value has at most {MAX_BYTES:,} bytes.

Job events hold the whole job. Those that tell of its life first appear in the order of `seq`, and none is left out;
skip a `seq` that is not above the last one that you have seen of a job. A late subscriber needs no history: what is older is in the API.

A record that holds no message of its topic, or that cannot be handled, goes to `<topic>-dlq`, as it is and with these headers beside its own.
Dead letters are kept for {DEAD_LETTER_RETENTION.days} days. One that an operator sends back keeps its own headers and gets another.

| header | value |
|---|---|
| `dlq_topic` | where it was, without the prefix |
| `dlq_partition`, `dlq_offset`, `dlq_timestamp` | where there, and since when |
| `dlq_group` | who refused it |
| `dlq_reason` | why |
| `dlq_replay_of` | the letter that this record was when it was sent back |
"""


def messages() -> list[type[Message]]:
    """Every message of every topic, once."""
    return list(dict.fromkeys(message for topic in TOPICS for message in topic.messages))


def file_name(message: type[Message]) -> str:
    """Of its example and of its schema."""
    return f"{message.__name__}.v{message.version}.json"


def schemas() -> dict[str, str]:
    """The JSON Schema of each message's value, by file name."""
    return {file_name(message): json.dumps(_schema(message), indent=2) + "\n" for message in messages()}


def page() -> str:
    """All topics and messages, in Markdown, with an example each."""
    parts: dict[str, Any] = {}
    lines = [_HEAD, "## Topics", ""]
    lines += ["| topic | key | messages | from | to | kept | public |", "|---|---|---|---|---|---|---|"]
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
    return "\n".join(lines) + "\n"


def _schema(message: type[Message]) -> dict[str, Any]:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{message.type_name()}"}
    return head | message.model_json_schema(mode="serialization")


def _topic(topic: Topic) -> str:
    links = ", ".join(f"[{message.__name__}](#{message.__name__.lower()})" for message in topic.messages)
    ends = f"{', '.join(topic.producers)} | {', '.join(topic.consumers)}"
    hours = topic.retention // _HOUR
    kept = f"{hours // 24} d" if hours >= 24 else f"{hours} h"  # noqa: PLR2004 # of a day
    return f"| `{topic.name}` | {topic.key} | {links} | {ends} | {kept} | {'yes' if topic.public else 'no'} |"


def _on(message: type[Message]) -> str:
    return " and ".join(f"`{topic.name}`" for topic in TOPICS if message in topic.messages)


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| field | type | always there | meaning |"
    yield "|---|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        there = "yes" if name in required else f"else `{json.dumps(field.get('default'))}`"
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
    """A docstring in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
