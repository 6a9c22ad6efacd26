"""This release reads the documents that earlier releases wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from bson import json_util

from result_store import repository
from scanfleet_testing.contracts import with_unknown_fields

FOLDER: Final = Path(__file__).parents[1] / "documents"

every_document = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{path.parent.name} {path.stem}") for path in sorted(FOLDER.glob("*/*.json"))],
)


def stored(path: Path) -> Any:
    return json_util.loads(path.read_text(encoding="utf-8"), json_options=json_util.JSONOptions(tz_aware=True))


def read(path: Path, document: Any) -> Any:
    if path.stem == "port-set":
        return document["text"]
    return repository._host(document) if path.stem.startswith("host") else repository._chunk(document)


@pytest.mark.proves("F28")
@every_document
def test_documents_of_earlier_releases_are_read(path: Path) -> None:
    """A document of any release is read, and unknown fields are ignored."""
    known = read(path, stored(path))
    for changed in with_unknown_fields(stored(path)):
        assert read(path, changed) == known


def test_host_of_first_release_has_its_results() -> None:
    """Ports, texts and ids of results are those that were stored."""
    document = stored(FOLDER / "0.1.0" / "host.json")
    results = list(repository._host(document).results(document["first_id"]))
    assert [(each.id, each.port, each.service, each.protocol) for each in results] == [
        (100, 22, "ssh", "tcp"),
        (101, 80, "http", "tcp"),
    ]


def test_closed_chunk_ports_are_read_inline_or_by_set_id() -> None:
    """Release 0.2 stored the text in each chunk; a long one is found by its id."""
    assert repository._chunk(stored(FOLDER / "0.2.0" / "chunk.json")).ports == "22,80"
    port_set = stored(FOLDER / "current" / "port-set.json")
    chunk = stored(FOLDER / "current" / "chunk-many-ports.json")
    assert repository._chunk(chunk, {port_set["_id"]: port_set["text"]}).ports == port_set["text"]
    assert repository._chunk(chunk).ports == ""


def test_closed_chunk_of_first_release_has_its_map() -> None:
    """The final map of a chunk is the one that was stored."""
    chunk = repository._chunk(stored(FOLDER / "0.1.0" / "chunk.json"))
    assert (chunk.chunk_id, chunk.first_address, chunk.outcomes) == ("41-0", "127.9.8.0", "aadsddta")
