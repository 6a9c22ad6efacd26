"""The description of the public topics is a valid AsyncAPI document."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "page" / "node_modules" / "@asyncapi" / "specs" / "schemas"


def test_asyncapi_document_is_valid_by_the_official_schema() -> None:
    """The published document conforms to the JSON schema of its version of AsyncAPI, bindings of Kafka included."""
    document = json.loads((ROOT / "docs" / "asyncapi.json").read_text(encoding="utf-8"))
    schema = json.loads((SCHEMAS / f"{document['asyncapi']}.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(document)
