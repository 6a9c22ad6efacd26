"""What operators are told to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("docs/operations.md", "docs/runbooks.md", "docs/security.md", "k8s/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_settings_that_there_are(page: str, known: frozenset[str]) -> None:
    """Every setting on the page is one that some service reads."""
    named = set(re.findall(r"\bSCANFLEET_[A-Z_]+", (ROOT / page).read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_there_are(page: str) -> None:
    """Every file and folder of the project on the page exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [Path(page).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = re.findall(r"`((?:k8s|docs|observability|overlays|components)/[\w./-]+)`", text)
    missing = [str(each) for each in [*links, *named] if not ((ROOT / each).exists() or (ROOT / "k8s" / each).exists())]
    assert missing == []
