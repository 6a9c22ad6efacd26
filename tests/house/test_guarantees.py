"""What is promised is proved."""

from __future__ import annotations

import pytest

from docs import guarantees


@pytest.fixture(scope="module")
def proofs() -> dict[str, list[guarantees.Proof]]:
    return guarantees.proofs()


@pytest.mark.parametrize("id_", [*guarantees.PROMISES, *guarantees.FAULTS, *guarantees.ABUSE])
def test_whatever_is_promised_has_a_test(proofs: dict[str, list[guarantees.Proof]], id_: str) -> None:
    """Every promise, fault and abuse is proved by a test at least."""
    assert proofs[id_]


def test_no_test_proves_what_nobody_promised(proofs: dict[str, list[guarantees.Proof]]) -> None:
    """Every id that a test wears is on the page."""
    assert set(proofs) <= guarantees.KNOWN


def test_the_page_is_up_to_date() -> None:
    """What `python docs/guarantees.py` would write is what is committed."""
    assert guarantees.PAGE.read_text(encoding="utf-8") == guarantees.page()


def test_the_readme_lists_the_promises() -> None:
    """Every promise is in the README in the words of the page."""
    readme = " ".join((guarantees.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [text for text in guarantees.PROMISES.values() if " ".join(text.split()) not in readme] == []
