"""Letters as text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scanfleet.kafka.dead_letters import printable


@given(st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")))
def test_printable_any_bytes_returns_one_line_of_plain_text(data: bytes) -> None:
    """No byte reaches a terminal other than as a printable character."""
    assert printable(data).isprintable()


def test_printable_text_is_unchanged() -> None:
    """Letters of any script are shown unchanged."""
    assert printable("Grüße, 世界 {}\\".encode()) == "Grüße, 世界 {}\\"
