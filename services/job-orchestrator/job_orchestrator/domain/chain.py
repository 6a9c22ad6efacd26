"""Sign the audit log with keys that are not in the database."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

MIN_KEY_CHARS: Final = 32

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_TIME: Final = "ms"  # the only name in the JSON object of a time; reserved, since an object in a document could have it


class ChainKeys:
    """Creates and verifies signatures (HMAC-SHA-256) of documents.

    Args:
        secrets: the first one signs; the others verify signatures from before a key rotation.

    Raises:
        ValueError: there is no key, or a key is too short.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        if not secrets or any(len(secret) < MIN_KEY_CHARS for secret in secrets):
            raise ValueError(f"the audit log needs a key with at least {MIN_KEY_CHARS} characters")
        self._secrets = {hashlib.sha256(secret.encode()).hexdigest()[:8]: secret.encode() for secret in secrets}
        self.key_id = next(iter(self._secrets))
        """The id of the key that signs."""

    def sign(self, kind: str, content: Mapping[str, Any]) -> str:
        """Return the signature of `content` as a document of this kind, with the id of the key.

        Raises:
            TypeError: the content has a value of a type that no signed document contains.
        """
        return self._sign(self.key_id, kind, content)

    def verify(self, kind: str, content: Mapping[str, Any], signature: object) -> bool:
        """Return whether `signature` is one of the keys' signature of exactly this content."""
        if type(signature) is not str:
            return False
        key, _, _ = signature.partition(":")
        if key not in self._secrets:
            return False
        try:
            return hmac.compare_digest(self._sign(key, kind, content).encode(), signature.encode(errors="replace"))
        except TypeError:  # the content was not signed by `sign`
            return False

    def _sign(self, key: str, kind: str, content: Mapping[str, Any]) -> str:
        text = json.dumps([kind, _plain(content)], sort_keys=True, separators=(",", ":"))
        return f"{key}:{hmac.new(self._secrets[key], text.encode(), hashlib.sha256).hexdigest()}"


def read_chain_keys(file: Path) -> ChainKeys:
    """Read the keys in `file`, one per line.

    Raises:
        ValueError: the file has no key, or a key is too short.
        OSError: the file cannot be read.
    """
    return ChainKeys(file.read_text(encoding="utf-8").split())


def _plain(value: object) -> object:
    """Return `value` as JSON values, such that no two different values have the same result.

    Raises:
        TypeError: its type is none of those that signed documents contain, so it could imitate one of them.
    """
    # Exact types: the driver decodes JavaScript code as a subclass of str. Subclasses of int are 64-bit numbers and booleans.
    if value is None or type(value) is str or isinstance(value, int):
        return value
    if type(value) is datetime:
        return {_TIME: (value - _EPOCH) // _MILLISECOND}  # MongoDB's resolution
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping) and _TIME not in value:
        return {name: _plain(each) for name, each in value.items()}
    raise TypeError(f"a signed document cannot contain the {type(value).__name__} {value!r:.100}")
