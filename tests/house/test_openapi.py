"""The public API stays backwards compatible."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "openapi"
RELEASES = sorted(path for path in FOLDER.glob("*.json") if path.stem != "current")

# Enumerations, and bounds, which may be widened.
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
    """Yield the paths where `after` lacks a path, field, enumeration value or required response field of `before`."""
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


def test_api_page_lists_every_operation() -> None:
    """The table of endpoints in docs/api.md names the operations of the OpenAPI document, and no others."""
    rows = re.findall(r"^\| (`[A-Z].*?`) \|", (FOLDER.parent / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed: list[tuple[str, str]] = []
    for row in rows:
        verbs: list[str] = []
        for verb, path in re.findall(r"`([A-Z]+)(?: (/\S+))?`", row):
            verbs.append(verb)
            if path:
                listed += [(verb, path) for verb in verbs]
                verbs = []
        assert verbs == [], row
    paths = json.loads((FOLDER / "current.json").read_text(encoding="utf-8"))["paths"]
    served = [(verb.upper(), re.sub(r"{\w+}", "{id}", path)) for path, verbs in paths.items() for verb in verbs]
    assert sorted(listed) == sorted(served)


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: str(path.stem))
def test_api_is_backwards_compatible(release: Path) -> None:
    """The current document is backwards compatible with every published one."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (release, FOLDER / "current.json"))
    assert list(lost(before, after)) == []


def test_api_comparison_finds_removals() -> None:
    """The comparison finds removed paths, fields, values and guarantees, and new required fields."""
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    assert list(lost(schema, {**schema, "properties": {}})) == ["/properties/title"]
    assert list(lost(schema, {**schema, "required": []})) == ['/required: "title"']
    assert list(lost({"enum": ["a", "b"]}, {"enum": ["a"]})) == ['/enum: "b"']
    assert list(lost({"/task": {"get": {}}}, {"/task": {}})) == ["//task/get"]
    demand = {"requestBody": {"schema": {"required": ["a"]}}}
    assert list(lost(demand, {"requestBody": {"schema": {"required": ["a", "b"]}}})) != []
    assert list(lost(schema, {"anyOf": [schema, {"type": "null"}]})) == []
