"""Responses in printable ASCII JSON, and the one format of all errors."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel


class AsciiJSON(JSONResponse):
    """A response of printable ASCII JSON: control, C1 and bidirectional characters of callers and hosts are escaped."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content).encode()


class ModelJSON(Response):
    """A model in the same form, encoded in one pass: for lists, whose encoding is a large part of their cost."""

    media_type = "application/json"

    def render(self, content: BaseModel) -> bytes:
        return _without_del(content.model_dump_json(ensure_ascii=True)).encode()


def ascii_json(content: Any) -> str:
    """Encode `content` as printable ASCII JSON."""
    return _without_del(json.dumps(content, allow_nan=False, separators=(",", ":")))


def _without_del(text: str) -> str:
    return text.replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response in the common format of all errors."""
    return AsciiJSON({"error": message}, status, headers)
