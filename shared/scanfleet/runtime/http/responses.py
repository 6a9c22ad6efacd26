"""Responses in printable ASCII JSON, and the one format of all errors."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse


class AsciiJSON(JSONResponse):
    """A response of printable ASCII JSON: control, C1 and bidirectional characters of callers and hosts are escaped."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content).encode()


def ascii_json(content: Any) -> str:
    """Encode `content` as printable ASCII JSON."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response in the common format of all errors."""
    return AsciiJSON({"error": message}, status, headers)
