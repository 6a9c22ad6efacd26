"""Every guarantee has a test."""

from __future__ import annotations

import pytest

from docs import guarantees


@pytest.fixture(scope="module")
def proofs() -> dict[str, list[guarantees.Proof]]:
    return guarantees.proofs()


@pytest.mark.parametrize("id_", [*guarantees.PROMISES, *guarantees.FAULTS, *guarantees.ABUSE])
def test_guarantees_have_a_test(proofs: dict[str, list[guarantees.Proof]], id_: str) -> None:
    """Every guarantee, fault and abuse case has at least one test."""
    assert proofs[id_]


def test_proves_marks_have_known_ids(proofs: dict[str, list[guarantees.Proof]]) -> None:
    """Every id in a `proves` mark is on the page."""
    assert set(proofs) <= guarantees.KNOWN


def test_guarantees_page_is_up_to_date() -> None:
    """The committed page is the one that `python docs/guarantees.py` writes."""
    assert guarantees.PAGE.read_text(encoding="utf-8") == guarantees.page()


def test_readme_lists_the_guarantees() -> None:
    """The README lists every guarantee with the page's text."""
    readme = " ".join((guarantees.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [text for text in guarantees.PROMISES.values() if " ".join(text.split()) not in readme] == []
