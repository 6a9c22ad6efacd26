"""Write the pages and schemas that are made from the code: `python docs/generate.py`.

Tests compare them with the code, so what has drifted is red until this is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from pydantic_settings import BaseSettings

from api_gateway.main import create_app
from api_gateway.testing import Gateway
from job_orchestrator.domain import chunk, job
from scanfleet.kafka.topics import TopicSettings
from scanfleet.messages import export
from scanfleet.messages.acls import SERVICES, acls_of
from scanfleet.testing.bus import MemoryBus

FOLDER: Final = Path(__file__).parent
HEAD: Final = "<!-- Written by `python docs/generate.py`; change the code, not this page. -->"


def settings() -> str:
    """Every setting of every service, under the class that defines it."""
    lines = [
        HEAD,
        "# Settings",
        "",
        "Every setting is an environment variable, read once at start; a service does not start with a bad one.",
    ]
    by_service: dict[str, Any] = {
        file.parts[-3]: import_module(f"{file.parts[-2]}.settings").Settings
        for file in sorted(FOLDER.parent.glob("services/*/*/settings.py"))
    } | {"create-topics": TopicSettings}
    bases = dict.fromkeys(base for cls in by_service.values() for base in cls.__mro__ if issubclass(base, BaseSettings))
    defining_classes = [cls for cls in bases if cls is not BaseSettings and cls.__annotations__]
    for defining in sorted(defining_classes, key=lambda cls: cls in by_service.values()):  # what is shared comes first
        services = [name for name, cls in by_service.items() if issubclass(cls, defining)]
        if defining in by_service.values():
            lines += ["", f"## {services[0]}", ""]
        else:
            title = (defining.__doc__ or "").partition(".")[0]
            lines += ["", f"## {title}", "", f"Read by {', '.join(services)}.", ""]
        lines += ["| variable | value | default | meaning |", "|---|---|---|---|"]
        lines += _rows(defining)
    return "\n".join(lines) + "\n"


def _rows(cls: type[BaseSettings]) -> Iterator[str]:
    schema = cls.model_json_schema()
    prefix = cls.model_config["env_prefix"].upper()
    for name, field in cls.model_fields.items():
        if name not in cls.__annotations__:
            continue
        of_field = schema["properties"][name]
        if field.is_required():
            default = "required"
        elif field.default_factory is not None:
            default = f"`{field.default_factory.__name__}()`"
        elif field.default in (None, "", ()):
            default = "none"
        else:
            value = of_field["default"]
            default = f"`{','.join(value) if isinstance(value, list) else value}`"
        yield f"| `{prefix}{name.upper()}` | {_value(of_field)} | {default} | {of_field['description']} |"


def _value(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in words."""
    if choices := [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]:
        return " or ".join(dict.fromkeys(map(_value, choices)))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_value(schema['items'])}"
    kind = schema.get("format", schema["type"])
    words = {"string": "text", "ipv4network": "CIDR", "ipv6network": "CIDR", "uri": "URL", "password": "secret"}
    text = words.get(kind, kind)
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    return ", ".join([text, *(f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema)])


def states() -> str:
    """The lives of jobs and chunks, as diagrams."""
    return f"""{HEAD}
# States

## A job

{_diagram(job.TABLE)}

## A chunk

{_diagram(chunk.TABLE)}
"""


def _diagram(table: Mapping[Any, Mapping[Any, Any]]) -> str:
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table))}"]
    for state, ways in table.items():
        for trigger, ends in ways.items():
            lines += [f"    {state} --> {end}: {trigger}" for end in _ends(ends, table)]
        if not ways:
            lines.append(f"    {state} --> [*]")
    return "\n".join([*lines, "```"])


def _ends(ends: StrEnum | Collection[StrEnum], table: Mapping[Any, Any]) -> list[StrEnum]:
    """In the table's order, since a set has none."""
    return [state for state in table if state == ends or (not isinstance(ends, StrEnum) and state in ends)]


def events() -> str:
    """Topics and messages."""
    return f"{HEAD}\n{export.page()}"


def security() -> str:
    """The threat model, whose table of rights follows from the code."""
    page = (FOLDER / "security.md").read_text(encoding="utf-8")
    before, begin, rest = page.partition("<!-- rights: written by `python docs/generate.py` -->\n")
    _, end, after = rest.partition("<!-- /rights -->")
    return "".join([before, begin, *_rights(), end, after])


def _rights() -> Iterator[str]:
    yield "| service | writes | reads | in groups that begin with |\n|---|---|---|---|\n"
    for service in SERVICES:
        acls = acls_of(service)
        cells = [
            ", ".join(f"`{acl.name}`" for acl in acls if (acl.operation, acl.resource) == kind) or "none"
            for kind in (("Write", "topic"), ("Read", "topic"), ("Read", "group"))
        ]
        yield f"| {service} | {' | '.join(cells)} |\n"


def openapi() -> str:
    """The public API, as the gateway itself publishes it."""
    app = create_app(Gateway().settings(), bus=MemoryBus())
    return json.dumps(app.openapi(), indent=1) + "\n"


PAGES: Final[dict[str, Callable[[], str]]] = {
    "events.md": events,
    "openapi/current.json": openapi,
    "security.md": security,
    "settings.md": settings,
    "states.md": states,
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (FOLDER / page).write_text(text(), encoding="utf-8")
    for name, schema in export.schemas().items():
        (export.SCHEMAS / name).write_text(schema, encoding="utf-8")
