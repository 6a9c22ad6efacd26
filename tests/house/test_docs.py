"""The pages that are made from the code."""

from __future__ import annotations

import pytest

from docs import generate
from scanner_worker.scanner.process import MIN_VERSION


@pytest.mark.parametrize("page", generate.PAGES)
def test_a_page_says_what_the_code_says(page: str) -> None:
    """What `python docs/generate.py` would write is what is committed."""
    assert (generate.FOLDER / page).read_text(encoding="utf-8") == generate.PAGES[page]()


def test_the_readme_names_the_oldest_nmap() -> None:
    """The README says which nmap a worker needs."""
    oldest = ".".join(map(str, MIN_VERSION))
    assert f"nmap {oldest} or newer" in (generate.FOLDER.parent / "README.md").read_text(encoding="utf-8")
