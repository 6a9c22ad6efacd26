"""The public API only grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "openapi"
RELEASES = sorted(path for path in FOLDER.glob("*.json") if path.stem != "current")

# Words, and bounds, which may become wider.
_FREE = {
    "description",
    "summary",
    "title",
    "default",
    "version",
    "maxLength",
    "minLength",
    "maximum",
    "minimum",
    "maxItems",
}
_FREE |= {"pattern", "additionalProperties", "example", "examples"}


def lost(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where `after` lacks what `before` has: a path, a field, a word of an enumeration, a field that was always there."""
    if isinstance(before, dict) and isinstance(after, dict):
        if ("anyOf" in before) != ("anyOf" in after):
            pairs = [(one, other) for one in before.get("anyOf", [before]) for other in after.get("anyOf", [after])]
            if all(any(lost(*pair, where)) for pair in pairs):
                yield where
        else:
            yield from _lost_names(before, after, where)
    elif isinstance(before, list) and isinstance(after, list):
        for each in before:
            if all(any(lost(each, other, where)) for other in after):
                yield f"{where}: {json.dumps(each)[:80]}"
    elif before != after:
        yield f"{where}: {before} is now {after}"


def _lost_names(before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
    for name, part in before.items():
        if name in _FREE and not where.endswith("/properties"):
            continue
        if name not in after:
            yield f"{where}/{name}"
        elif name == "required" and "/requestBody/" in where:
            yield from (f"{where}: {each} is now required" for each in set(after[name]) - set(part))
        else:
            yield from lost(part, after[name], f"{where}/{name}")


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: str(path.stem))
def test_the_api_of_a_release_is_part_of_the_current_one(release: Path) -> None:
    """Nothing that a published document promises a caller is missing from the current one."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (release, FOLDER / "current.json"))
    assert list(lost(before, after)) == []


def test_what_is_lost_is_found() -> None:
    """The comparison sees a path, a field, a word and a promise that are gone, and a new demand."""
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    assert list(lost(schema, {**schema, "properties": {}})) == ["/properties/title"]
    assert list(lost(schema, {**schema, "required": []})) == ['/required: "title"']
    assert list(lost({"enum": ["a", "b"]}, {"enum": ["a"]})) == ['/enum: "b"']
    assert list(lost({"/task": {"get": {}}}, {"/task": {}})) == ["//task/get"]
    demand = {"requestBody": {"schema": {"required": ["a"]}}}
    assert list(lost(demand, {"requestBody": {"schema": {"required": ["a", "b"]}}})) != []
    assert list(lost(schema, {"anyOf": [schema, {"type": "null"}]})) == []
