"""Valid JSON with hostile values that a compromised process may send in place of any part of a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_PLACE: Final = "\N{CROSS MARK}"
_LARGE_BYTES: Final = 100_000  # enough for a quadratic step to take seconds


def hostile_values(size: int = _LARGE_BYTES) -> dict[str, bytes]:
    """Return JSON texts of about `size` bytes, by name, that a parser must accept or reject quickly."""
    depth, items = min(size // 2, 50_000), size // 4
    return {
        "long text": b'"' + b"y" * size + b'"',
        "text like a token": b'"' + b"eyJ" * (size // 3) + b'"',
        "long number as text": b'"' + b"9" * size + b'"',
        "escapes": b'"' + b"\\u202e" * (size // 6) + b'"',
        "lone surrogates": b'"\\ud800\\udc00\\ud800"',
        "control characters": b'"\\u0000\\u001b[2J"',
        "zone": b'"fe80::1%' + b"z" * min(size, 10_000) + b'"',
        "other spelling of an address": b'"2001:0db8::0001"',
        "long integer": b"1" + b"0" * 400,
        "very long integer": b"9" * size,
        "above 64 bits": b"18446744073709551616",
        "below 64 bits": b"-9223372036854775809",
        "infinite": b"1e999",
        "long fraction": b"0." + b"3" * size,
        "deep nesting": b"[" * depth + b"]" * depth,
        "deep objects": b'{"a":' * (depth // 5) + b"1" + b"}" * (depth // 5),
        "long list of numbers": b"[" + b",".join([b"1"] * (size // 2)) + b"]",
        "long list of objects": b"[" + b",".join([b"{}"] * (size // 3)) + b"]",
        "long list of texts": b"[" + b",".join([b'""'] * (size // 3)) + b"]",
        "wide object": b"{" + b",".join(b'"%d":1' % number for number in range(items // 3)) + b"}",
        "null": b"null",
        "true": b"true",
    }


def hostile_messages(example: Any, size: int = _LARGE_BYTES) -> Iterator[tuple[str, bytes]]:
    """Yield descriptions and JSON texts of `example` with one part, at any depth, replaced by a hostile value."""
    values = hostile_values(size)
    for where, changed in _places(example, ""):
        before, after = (
            json.dumps(changed, ensure_ascii=False).encode().split(json.dumps(_PLACE, ensure_ascii=False).encode())
        )
        for name, value in values.items():
            yield f"{where}: {name}", before + value + after


def _places(part: Any, where: str) -> Iterator[tuple[str, Any]]:
    if where:
        yield where, _PLACE
    if isinstance(part, dict):
        for name, inner in part.items():
            for place, changed in _places(inner, f"{where}.{name}"):
                yield place, part | {name: changed}
    elif isinstance(part, list) and part:
        for place, changed in _places(part[0], f"{where}[0]"):
            yield place, [changed, *part[1:]]
