"""Pages generated from the code."""

from __future__ import annotations

import pytest

from docs import cli_page, generate
from scanner_worker.scanner.process import MIN_VERSION


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_pages_are_up_to_date(page: str) -> None:
    """The committed pages are those that `python docs/generate.py` writes."""
    assert (generate.FOLDER / page).read_text(encoding="utf-8") == generate.PAGES[page]()


def test_golden_documents_are_up_to_date() -> None:
    """The committed documents are those that this release writes, so that a release keeps what it has stored."""
    written = dict(generate.documents())
    folders = {path.parent for path in written}
    committed = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.json")}
    assert committed == written


def test_page_of_the_command_line_is_up_to_date() -> None:
    """The committed page is the one that `python docs/cli_page.py` writes."""
    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page()


def test_readme_has_the_minimum_nmap_version() -> None:
    """The README has the minimum version of nmap."""
    oldest = ".".join(map(str, MIN_VERSION))
    assert f"nmap {oldest} or newer" in (generate.FOLDER.parent / "README.md").read_text(encoding="utf-8")
