"""Signatures of the audit log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import Code, Decimal128, Int64, ObjectId, Regex
from bson.datetime_ms import DatetimeMS

from job_orchestrator.domain.chain import ChainKeys, read_chain_keys

OLD, NEW = "the old key of the audit log, 32 and more", "the new key of the audit log, 32 and more"
RELEASED = "4fd49744:87e1a2176b73ee8938aba4d6ea76e8210561c92ddd95371814dab0c04d6d73f4"
CONTENT: dict[str, Any] = {"_id": "a/1", "time": datetime(2026, 1, 1, tzinfo=UTC), "count": 1, "none": None}


def test_verify_of_changed_content_fails() -> None:
    """A change, a removed or added field, another kind and another key make a signature void."""
    keys = ChainKeys([NEW])
    signature = keys.sign("entry", CONTENT)
    assert keys.verify("entry", dict(reversed(CONTENT.items())), signature)
    assert not keys.verify("block", CONTENT, signature)
    for changed in (
        {"count": 2},
        {"count": "1"},
        {"more": ""},
        {"time": CONTENT["time"] + timedelta(milliseconds=1)},
        {"none": b"bytes"},
    ):
        assert not keys.verify("entry", CONTENT | changed, signature)
    assert not keys.verify("entry", {"_id": "a/1"}, signature)
    assert not ChainKeys([OLD]).verify("entry", CONTENT, signature)
    for junk in (None, 1, "", "x", signature + "0", signature[:-1], "00000000" + signature[8:], signature + "\xe9"):
        assert not keys.verify("entry", CONTENT, junk)


@pytest.mark.proves("A26")
@pytest.mark.parametrize(
    ("name", "imitation"),
    [
        ("time", {"ms": 1767225600000}),
        ("time", 1767225600000),
        ("time", DatetimeMS(1767225600000)),
        ("_id", Code("a/1")),
        ("_id", b"a/1"),
        ("_id", ["a/1"]),
        ("count", 1.0),
        ("count", True),
        ("count", Decimal128("1")),
        ("none", "None"),
        ("none", []),
    ],
)
def test_verify_of_a_value_of_another_type_fails(name: str, imitation: object) -> None:
    """No value of another type has the signature of a text, a number, a time or null, whatever its representation."""
    keys = ChainKeys([NEW])
    signature = keys.sign("entry", CONTENT)
    assert not keys.verify("entry", CONTENT | {name: imitation}, signature)


@pytest.mark.parametrize("value", [b"bytes", 1.0, {"ms": 1}, [{"ms": 1}], ObjectId(), Code("x"), Regex("x")])
def test_sign_of_a_type_that_could_imitate_another_fails(value: object) -> None:
    """Only types with a distinct form are signed."""
    with pytest.raises(TypeError, match="a signed document cannot contain"):
        ChainKeys([NEW]).sign("entry", {"x": value})


def test_verify_accepts_signatures_of_release_0_2() -> None:
    """The form of what is signed does not change, so that stored signatures stay valid."""
    block = {"_id": 7, "entries": [{"id": "a/1", "mac": "x", "forget_at": CONTENT["time"]}], "more": None}
    assert ChainKeys([OLD]).verify("block", block, RELEASED)
    assert ChainKeys([OLD]).verify("block", block | {"_id": Int64(7)}, RELEASED)


def test_verify_after_a_rotation_accepts_both_keys() -> None:
    """The first key signs; what a replaced one has signed is verified as long as it is in the file."""
    before = ChainKeys([OLD]).sign("entry", CONTENT)
    both = ChainKeys([NEW, OLD])
    assert both.verify("entry", CONTENT, before)
    assert both.sign("entry", CONTENT) == ChainKeys([NEW]).sign("entry", CONTENT)


def test_sign_ignores_microseconds() -> None:
    """A time is signed to the millisecond, the resolution that MongoDB stores."""
    keys = ChainKeys([NEW])
    time = datetime(2026, 1, 1, 0, 0, 0, 123_999, UTC)
    assert keys.sign("entry", {"t": time}) == keys.sign("entry", {"t": time.replace(microsecond=123_000)})


@pytest.mark.parametrize("text", ["", "\n", "short", f"{'x' * 40}\nshort\n"])
def test_read_chain_keys_of_a_missing_or_short_key_fails(tmp_path: Path, text: str) -> None:
    """A file without a key, or with one that is too short, is refused."""
    file = tmp_path / "audit-key"
    file.write_text(text)
    with pytest.raises(ValueError, match="at least 32 characters"):
        read_chain_keys(file)
