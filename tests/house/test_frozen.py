"""Published golden messages and documents are never edited."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = sorted(path for path in ROOT.glob("*/**/frozen.sha256") if ".venv" not in path.parts)

_RELEASE = re.compile(r"^\d+\.\d+\.\d+(/|\.json$)")


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_files_of_a_published_release_are_unchanged(record: Path) -> None:
    """Each file in a release's folder has the hash that was recorded when it was published, and none is missing or added."""
    lines = (line.split("  ", 1) for line in record.read_text(encoding="utf-8").splitlines())
    recorded = {name: digest for digest, name in lines}
    present = {
        path.relative_to(record.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(record.parent.rglob("*.json"))
        if _RELEASE.search(path.relative_to(record.parent).as_posix())
    }
    assert present == recorded


def test_release_folders_have_a_record() -> None:
    """The API, the golden messages and the golden documents of both databases are recorded."""
    assert [record.parent.relative_to(ROOT).as_posix() for record in RECORDS] == [
        "docs/openapi",
        "services/job-orchestrator/tests/documents",
        "services/result-store/tests/documents",
        "shared/scanfleet/contracts/messages/examples",
    ]
