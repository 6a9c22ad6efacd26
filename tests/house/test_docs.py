"""The pages that are made from the code."""

from __future__ import annotations

import pytest

from docs import generate


@pytest.mark.parametrize("page", generate.PAGES)
def test_a_page_says_what_the_code_says(page: str) -> None:
    """What `python docs/generate.py` would write is what is committed."""
    assert (generate.FOLDER / page).read_text(encoding="utf-8") == generate.PAGES[page]()
