"""The signed documents of the audit log: entries, and the blocks that list them."""

from __future__ import annotations

from typing import Final

from job_orchestrator.domain.chain import ChainKeys
from scanfleet.runtime.mongo import Collection, Database, Document

UNSEALED: Final = 0
"""The block number of an entry that is in no block yet."""

BY_BLOCK: Final = [("block", 1), ("received_at", 1), ("_id", 1)]
"""The index by block."""

MAX_NUMBER: Final = 2**53
NUMBERS: Final = {"$type": ["int", "long"], "$gte": 1, "$lt": MAX_NUMBER}
"""Numbers of blocks: anyone with access to the database may have added blocks with other keys."""

_OUTSIDE: Final = frozenset({"mac", "block"})  # fields that an entry's signature does not cover


class SignedLog:
    """The two collections, and the signatures of their documents.

    Attributes:
        entries: the entries, each with its own signature.
        blocks: the chain; a block's number is its key.
    """

    def __init__(self, database: Database, keys: ChainKeys) -> None:
        self.entries = _exact(database["audit"])
        self.blocks = _exact(database["audit_blocks"])
        self._keys = keys

    def signed_entry(self, document: Document) -> Document:
        return document | {"mac": self._keys.sign("entry", document), "block": UNSEALED}

    def signed_block(self, block: Document) -> Document:
        return block | {"mac": self._keys.sign("block", block)}

    def is_genuine(self, document: Document) -> bool:
        content = {name: value for name, value in document.items() if name not in _OUTSIDE}
        return self._keys.verify("entry", content, document.get("mac"))

    def is_genuine_block(self, block: Document) -> bool:
        content = {name: value for name, value in block.items() if name != "mac"}
        return self._keys.verify("block", content, block.get("mac"))

    def listed(self, block: Document) -> dict[str, Document]:
        """Return id, signature and expiry of the entries that a genuine block lists, by id; none for another block."""
        return {each["id"]: each for each in block["entries"]} if self.is_genuine_block(block) else {}


def _exact(collection: Collection) -> Collection:
    """Return the collection with a decoder that reads no two texts as the same one, also those that are not UTF-8."""
    decoding = collection.codec_options.with_options(unicode_decode_error_handler="surrogateescape")
    return collection.with_options(decoding)
