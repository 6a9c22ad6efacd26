"""Changes that a later release may make to a message or a stored document."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any


def with_unknown_fields(value: Any, mappings: Collection[str] = ()) -> Iterator[Any]:
    """Yield copies of `value`, each with an unknown field in a different object, at any depth.

    Args:
        value: a message or document.
        mappings: fields that hold a mapping, whose keys are values, instead of an object with fields.
    """
    if isinstance(value, dict):
        yield {**value, "added_by_a_later_release": {"deep": [1, None]}}
        for name, part in value.items():
            if name not in mappings:
                yield from ({**value, name: changed} for changed in with_unknown_fields(part, mappings))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from (
                [*value[:index], changed, *value[index + 1 :]] for changed in with_unknown_fields(part, mappings)
            )
