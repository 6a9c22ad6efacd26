"""No message has room without an end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from scanfleet.messages import Message, export

# Formats whose texts the parser bounds: longer ones are none.
BOUNDED_FORMATS = {"date-time"}


def unbounded(schema: Any, where: str = "") -> Iterator[str]:
    """The places of a JSON schema that take a text, number, list or object without a maximum."""
    if "$ref" in schema or "const" in schema or "enum" in schema:
        return
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from unbounded(each, where)
        return
    match schema.get("type"):
        case "string" if "maxLength" not in schema and schema.get("format") not in BOUNDED_FORMATS:
            yield f"{where}: a text without maxLength"
        case "integer" | "number" as kind:
            if not (
                {"minimum", "exclusiveMinimum"} & schema.keys() and {"maximum", "exclusiveMaximum"} & schema.keys()
            ):
                yield f"{where}: {kind} without minimum and maximum"
        case "array":
            if "maxItems" not in schema:
                yield f"{where}: a list without maxItems"
            yield from unbounded(schema.get("items", {}), f"{where}[]")
        case "object" if "properties" in schema:
            for name, inner in schema["properties"].items():
                yield from unbounded(inner, f"{where}.{name}")
        case "string" | "boolean" | "null":
            return
        case other:
            yield f"{where}: {other} of any size"


def unbounded_fields(model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema(mode="validation")
    parts = {model.__name__: schema, **schema.get("$defs", {})}
    return [place for name, part in parts.items() for place in unbounded(part, name)]


@pytest.mark.proves("A21", "G9")
@pytest.mark.parametrize("kind", export.messages(), ids=lambda kind: kind.__name__)
def test_every_field_of_a_message_has_a_maximum(kind: type[Message]) -> None:
    """Each field of each message, at every depth, has a maximum: length, number of items, or range."""
    assert unbounded_fields(kind) == []


def test_a_field_without_a_maximum_is_found() -> None:
    """The walk names fields without a maximum in nested models, lists, tuples, dictionaries and optional fields."""

    class Part(BaseModel):
        text: str
        number: int | None

    class Whole(BaseModel):
        part: Part
        parts: list[Part]
        pairs: dict[str, int]
        amount: float
        anything: Any

    assert {place.partition(":")[0] for place in unbounded_fields(Whole)} == {
        "Part.text",
        "Part.number",
        "Whole.parts",
        "Whole.pairs",
        "Whole.amount",
        "Whole.anything",
    }
