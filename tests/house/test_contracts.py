"""Every field of a message is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from scanfleet.contracts.messages import Message, export

RANGES = [{low, high} for low in ("minimum", "exclusiveMinimum") for high in ("maximum", "exclusiveMaximum")]
LIMITS: dict[Any, list[set[str]]] = {
    "string": [{"maxLength"}, {"format"}],  # the parser of a format bounds its length
    "integer": RANGES,
    "number": RANGES,
    "array": [{"maxItems"}],
    "object": [{"properties"}],
}


def unbounded(schema: Any, where: str = "") -> Iterator[str]:
    """Yield the paths in a JSON schema that accept an unbounded text, number, list or object."""
    if schema.keys() & {"$ref", "const", "enum"} or schema.get("type") in {"boolean", "null"}:
        return
    inner = {f"{where}.{name}": part for name, part in schema.get("properties", {}).items()}
    inner |= {f"{where}[]": schema["items"]} if "items" in schema else {}
    for place, part in inner.items():
        yield from unbounded(part, place)
    for each in schema.get("anyOf", ()):
        yield from unbounded(each, where)
    if "anyOf" not in schema and not any(limits <= schema.keys() for limits in LIMITS.get(schema.get("type"), ())):
        yield f"{where}: {schema.get('type')} without a maximum"


def unbounded_fields(model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema(mode="validation")
    parts = {model.__name__: schema, **schema.get("$defs", {})}
    return [place for name, part in parts.items() for place in unbounded(part, name)]


@pytest.mark.proves("A21", "G9")
@pytest.mark.parametrize("kind", export.messages(), ids=lambda kind: kind.__name__)
def test_message_fields_are_bounded(kind: type[Message]) -> None:
    """Each field of each message, at every depth, has a maximum: length, number of items, or range."""
    assert unbounded_fields(kind) == []


def test_unbounded_fields_are_found() -> None:
    """The check finds unbounded fields in nested models, lists, tuples, dictionaries and optional fields."""

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
