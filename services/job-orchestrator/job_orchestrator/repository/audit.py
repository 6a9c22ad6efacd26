"""Store the audit log in MongoDB: entries, and a chain of blocks that makes removals detectable.

Every entry is signed when it is inserted. Within seconds a replica seals new entries into a block, which lists them and
references the previous block. A block's number is its key in the database, so only one of two concurrent sealers succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from bson import MaxKey, MinKey
from pymongo import IndexModel

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.repository import documents
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry
from scanfleet.runtime.mongo import (
    Collection,
    Cursor,
    Database,
    Document,
    dependency_errors,
    insert_missing,
    scan_by_id,
)

MAX_COUNTED: Final = 10_000  # matching entries: counting millions would take longer than the query's timeout
MAX_BLOCK: Final = 1_000  # maximum entries per block, which then has 250 kB
MAX_FINDINGS: Final = 1_000  # maximum number of listed findings; further ones are only counted

UNSEALED: Final = 0
REJECTED: Final = -1
"""Replaces the block number in an entry whose signature was invalid when it was sealed."""

_OUTSIDE: Final = frozenset({"mac", "block"})  # fields that an entry's signature does not cover

_MAX_NUMBER: Final = 2**53
_NUMBERS: Final = {"$type": ["int", "long"], "$gte": 1, "$lt": _MAX_NUMBER}
"""Numbers of blocks: anyone with access to the database may have added blocks with other keys."""

_MAX_FORGED: Final = 100  # newest blocks among which a genuine one is searched

BY_BLOCK: Final = [("block", 1), ("received_at", 1), ("_id", 1)]
_Position = list[tuple[str, Any]]
"""A position in this index."""

INDEXES: Final = {
    "audit": [
        IndexModel([("received_at", -1), ("_id", -1)]),
        IndexModel([("subject", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("request_id", 1)]),
        IndexModel([("action", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("decision", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("rule", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("source", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("service", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel(BY_BLOCK),
        # Each entry has its own expiry, so that the retention setting may change.
        IndexModel([("forget_at", 1)], expireAfterSeconds=0),
    ],
    "audit_blocks": [IndexModel([("forget_at", 1)], expireAfterSeconds=0)],
}

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class Verification:
    """The result of verifying the whole chain.

    Attributes:
        blocks: number of blocks.
        sealed: number of entries in them that are present and unchanged.
        forgotten: number of entries in them that were deleted because of their age.
        waiting: number of signed entries that are not in a block yet.
        first: number of the first remaining block; 0 without one.
        head: number and signature of the last block; store it elsewhere to detect a truncated or replaced chain.
        findings: changed, removed and added entries and blocks.
        more: number of findings that are not listed.
    """

    blocks: int = 0
    sealed: int = 0
    forgotten: int = 0
    waiting: int = 0
    first: int = 0
    head: tuple[int, str] = (0, "")
    findings: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, finding: str) -> None:
        if finding in self.findings:  # of an entry that is found in several ranges of the index
            return
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)
        else:
            self.more += 1


@dataclass(frozen=True, slots=True)
class Exported:
    """A sealed entry, with the number and signature of its block."""

    entry: rest.AuditEntry
    block: int
    block_signature: str


class MongoAudit:
    """Inserts, lists, seals, verifies and exports entries.

    Args:
        database: the orchestrator's database.
        keys: the signing keys.
        keep: retention time of entries.
        now: returns the platform's time, by which entries are ordered and expire.
    """

    def __init__(self, database: Database, keys: ChainKeys, keep: timedelta, now: Callable[[], datetime]) -> None:
        self._entries = _exact(database["audit"])
        self._blocks = _exact(database["audit_blocks"])
        self._keys = keys
        self._keep = keep
        self._now = now

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        now = self._now()
        await insert_missing(
            self._entries, [self._signed(documents.write_audit(entry, now, now + self._keep)) for entry in entries]
        )

    @dependency_errors()
    async def page(
        self,
        skip: int,
        limit: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        **words: str | None,
    ) -> tuple[list[rest.AuditEntry], int]:
        wanted: Document = {name: value for name, value in words.items() if value is not None}
        received = {"$gte": since, "$lt": until}
        if bounds := {name: value for name, value in received.items() if value is not None}:
            wanted["received_at"] = bounds
        newest = self._entries.find(wanted).sort([("received_at", -1), ("_id", -1)]).skip(skip).limit(limit)
        # A large collection is counted by its metadata instead of one by one.
        counting = (
            self._entries.count_documents(wanted, limit=MAX_COUNTED)
            if wanted
            else self._entries.estimated_document_count()
        )
        found, total = await asyncio.gather(newest.to_list(limit), counting)
        if wanted and total == MAX_COUNTED:
            total = max(total, skip + len(found) + (len(found) == limit))
        return [entry for each in found if (entry := self._read(each)) is not None], total

    # Sealing

    async def seal(self) -> None:
        """Seal all entries that are not in a block yet.

        Raises:
            DependencyError: MongoDB is unavailable; the next call continues.
        """
        while await self._seal_some():
            pass

    @dependency_errors()
    async def _seal_some(self) -> bool:
        """Create one block, unless there is nothing to seal or another replica creates it; return whether to continue."""
        last = await self._last()
        if last is not None:
            await self._mark(last["_id"], self._listed(last))  # its replica may have crashed before
        oldest = self._entries.find({"block": UNSEALED}).sort([("received_at", 1), ("_id", 1)]).limit(MAX_BLOCK)
        found = await oldest.to_list(MAX_BLOCK)
        genuine = [each for each in found if self._is_genuine(each)]
        forged = [each["_id"] for each in found if not self._is_genuine(each)]
        marked = 0
        if genuine and (number := await self._append(last, genuine)):
            marked += await self._mark(number, (each["_id"] for each in genuine))
        if forged:
            marked += await self._mark(REJECTED, forged)
            _log.error(
                "audit_entries_rejected", entries=len(forged), first=forged[0], cause="they have no valid signature"
            )
        return marked > 0 and len(found) == MAX_BLOCK

    async def _last(self) -> Document | None:
        """Return the newest genuine block, or the newest one if none of the last `_MAX_FORGED` is genuine."""
        newest: Document | None = None
        below = _NUMBERS["$lt"]
        for _ in range(_MAX_FORGED):
            block = await self._blocks.find_one({"_id": _NUMBERS | {"$lt": below}}, sort=[("_id", -1)])
            if block is None or self._is_genuine_block(block):
                return block
            if newest is None:
                newest = block
                _log_forged(block["_id"])
            below = block["_id"]
        return newest

    async def _append(self, last: Document | None, entries: Sequence[Document]) -> int:
        """Create the block after `last`; return its number, 0 if another replica has created the next block."""
        number = last["_id"] + 1 if last else 1
        while True:
            block = self._block(number, last, entries)
            if not await insert_missing(self._blocks, [block]):
                _log.info("audit_log_sealed", block=number, entries=len(entries), signature=block["mac"])
                return number
            present = await self._blocks.find_one({"_id": number})
            if present is None or self._is_genuine_block(present):
                return 0
            _log_forged(number)
            number += 1

    def _block(self, number: int, last: Document | None, entries: Sequence[Document]) -> Document:
        now = self._now()
        forget_at = max(each["forget_at"] for each in entries)
        if last is None:
            previous = {"previous": "", "previous_forget_at": now}
        elif self._is_genuine_block(last):
            previous = {"previous": last["mac"], "previous_forget_at": last["forget_at"]}
            forget_at = max(forget_at, last["forget_at"])
        else:
            previous = {"previous": str(last.get("mac")), "previous_forget_at": now + self._keep}
        block = previous | {
            "_id": number,
            "entries": [{"id": each["_id"], "mac": each["mac"], "forget_at": each["forget_at"]} for each in entries],
            "sealed_at": now,
            "forget_at": forget_at,  # blocks expire in order, and not before their entries
        }
        return block | {"mac": self._keys.sign("block", block)}

    async def _mark(self, block: int, ids: Iterable[object]) -> int:
        marked = await self._entries.update_many(
            {"_id": {"$in": list(ids)}, "block": UNSEALED}, {"$set": {"block": block}}
        )
        return marked.modified_count

    def _signed(self, document: Document) -> Document:
        return document | {"mac": self._keys.sign("entry", document), "block": UNSEALED}

    def _is_genuine(self, document: Document) -> bool:
        content = {name: value for name, value in document.items() if name not in _OUTSIDE}
        return self._keys.verify("entry", content, document.get("mac"))

    def _is_genuine_block(self, block: Document) -> bool:
        content = {name: value for name, value in block.items() if name != "mac"}
        return self._keys.verify("block", content, block.get("mac"))

    def _listed(self, block: Document) -> dict[str, Document]:
        """Return id, signature and expiry of the entries that a genuine block lists, by id; none for another block."""
        return {each["id"]: each for each in block["entries"]} if self._is_genuine_block(block) else {}

    def _read(self, document: Document) -> rest.AuditEntry | None:
        read = partial(documents.read_audit, genuine=self._is_genuine(document))
        return documents.readable(read, document, "audit")

    async def adopt(self) -> int:
        """Sign the unsigned entries of an older release; return their number. Invalid documents are skipped.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        count = 0
        async with dependency_errors():
            async for each in scan_by_id(self._entries):
                if "mac" in each or self._read(each) is None or not isinstance(each.get("forget_at"), datetime):
                    continue
                try:
                    received_at = min(each["time"], self._now())  # the time of an unsigned entry is untrusted
                    signed = self._signed(each | {"received_at": received_at})
                except TypeError:  # it has a field, or a time as text, that no release has written
                    continue
                await self._entries.replace_one({"_id": each["_id"], "mac": {"$exists": False}}, signed)
                count += 1
        return count

    # Verification

    @dependency_errors()
    async def verify(self) -> Verification:
        """Verify all blocks and entries, with one block and the ids of unsealed entries in memory.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        found = Verification()
        last = await self._blocks.find_one({"_id": _NUMBERS}, sort=[("_id", -1)])
        first = await self._blocks.find_one({"_id": _NUMBERS}, sort=[("_id", 1)])
        # These ranges of the index and those of the blocks below contain all entries: also an array, by its elements.
        if first is None or last is None:
            outside = await self._outside(None, None, found)
        else:
            outside = await self._outside(None, _before(first["_id"]), found)
            outside |= await self._outside(_behind(last["_id"]), None, found)
        ids = [self._blocks.find({}, {"_id": 1}).hint([("_id", 1)]) for _ in range(2)]
        for others in (ids[0].max([("_id", 1)]), ids[1].min([("_id", _MAX_NUMBER)])):
            async for block in others:
                found.add(_no_number(block))
        previous: tuple[int, str] | None = None
        async for block in scan_by_id(self._blocks, 1, _MAX_NUMBER):
            if not isinstance(number := block["_id"], int):
                found.add(_no_number(block))
                continue
            genuine = self._is_genuine_block(block)
            found.blocks += 1
            found.first = found.first or number
            # Also fractions and numbers of removed blocks.
            marked = (_behind(previous[0]) if previous else _before(number), _behind(number))
            if genuine:
                self._verify_link(previous, block, found)
                found.head = (number, block["mac"])
                for id_ in await self._verify_entries(block, *marked, found):
                    outside.pop(id_, None)
            else:
                found.add(f"block {number}: added or changed: its signature is not the platform's")
                await self._outside(*marked, found)  # its list cannot be trusted, but each entry has its own signature
            previous = (number, block["mac"] if genuine else "")
        for id_, mark in outside.items():
            if mark == UNSEALED and mark is not False:
                found.waiting += 1
            else:
                found.add(_without_block(id_, mark))
        return found

    def _marked(self, first: _Position | None, end: _Position | None) -> Cursor:
        """Find the entries from `first` up to `end` in the index by block.

        These are bounds of the index: the conditions of a query would not restrict both ends once any entry has an array.
        """
        found = self._entries.find().hint(BY_BLOCK)
        if first is not None:
            found = found.min(first)
        return found if end is None else found.max(end)

    async def _outside(self, first: _Position | None, end: _Position | None, found: Verification) -> dict[str, object]:
        """Return the mark of each signed entry in a range of the index: the block of none of them is known."""
        now, outside = self._now(), {}
        async for each in self._marked(first, end):
            if not self._is_genuine(each):
                found.add(f"entry {_text(each['_id'])}: added or changed: its signature is not the platform's")
            elif each["forget_at"] > now or each.get("block") == UNSEALED:
                outside[each["_id"]] = each.get("block")
        return outside

    async def _verify_entries(
        self, block: Document, first: _Position, end: _Position, found: Verification
    ) -> Iterable[str]:
        """Compare the entries with the list in their genuine block; return the listed ids.

        Args:
            block: the block.
            first: the begin of the entries in the index that are marked with a number above the previous block's.
            end: the end of those that are marked with a number up to the block's.
            found: receives the findings.
        """
        listed, present = self._listed(block), set[str]()
        async for each in self._marked(first, end):
            id_, mark = each["_id"], each.get("block")
            if type(id_) is not str or id_ not in listed:
                unlisted = f"entry {_text(id_)}: added: block {block['_id']} does not list it"
                found.add(unlisted if mark == block["_id"] else _without_block(id_, mark))
        async for each in self._entries.find({"_id": {"$in": list(listed)}}):
            id_ = each["_id"]
            present.add(id_)
            if each.get("mac") == listed[id_]["mac"] and self._is_genuine(each):
                found.sealed += 1
            else:
                found.add(f"entry {id_}: changed")
        now = self._now()
        for id_, sealed in listed.items():
            if id_ not in present and sealed["forget_at"] > now:
                found.add(f"entry {id_}: removed")
            elif id_ not in present:
                found.forgotten += 1
        return listed

    def _verify_link(self, previous: tuple[int, str] | None, block: Document, found: Verification) -> None:
        """Compare a genuine block with number and signature of the block before it; "" for one that is not genuine."""
        number = block["_id"]
        if previous is None:
            if number > 1 and block["previous_forget_at"] > self._now():
                found.add(f"block {number - 1}: removed before its time, and every one before it that is not there")
        elif number != previous[0] + 1:
            found.add(f"blocks {previous[0] + 1} to {number - 1}: removed")
        elif previous[1] not in ("", block["previous"]):
            found.add(f"block {previous[0]}: changed: block {number} follows another block")

    # Export

    async def export(self, after: int = 0) -> AsyncIterator[Exported]:
        """Yield the entries of the blocks above `after`, in order, except those that were changed.

        Raises:
            DependencyError: MongoDB is unavailable; it can fail after some entries were yielded.
        """
        async with dependency_errors():
            async for block in scan_by_id(self._blocks, after + 1, _MAX_NUMBER):
                if not isinstance(block["_id"], int):
                    continue
                listed = self._listed(block)
                if not listed:
                    _log_forged(block["_id"])
                present = {each["_id"]: each async for each in self._entries.find({"_id": {"$in": list(listed)}})}
                for id_ in (each for each in listed if each in present):
                    entry = self._read(present[id_])
                    if entry is not None and entry.genuine:
                        yield Exported(entry, block["_id"], block["mac"])
                    else:
                        _log.error(
                            "audit_entry_changed",
                            entry=id_,
                            block=block["_id"],
                            next_step="run python -m job_orchestrator.audit verify",
                        )

    @dependency_errors()
    async def block_signature(self, number: int) -> str | None:
        """Return the signature of this block; None if it does not exist."""
        block = await self._blocks.find_one({"_id": number}, {"mac": 1})
        return str(block.get("mac")) if block else None


def _no_number(block: Document) -> str:
    return f"block {_text(block['_id'])}: added: this is not the number of a block"


def _without_block(id_: object, mark: object) -> str:
    return f"entry {_text(id_)}: added, or its block removed: it belongs to block {_text(mark)}, which does not exist"


def _exact(collection: Collection) -> Collection:
    """Return the collection with a decoder that reads no two texts as the same one, also those that are not UTF-8."""
    decoding = collection.codec_options.with_options(unicode_decode_error_handler="surrogateescape")
    return collection.with_options(decoding)


def _text(value: object) -> str:
    """Return the start of a value from a document that may be forged."""
    return f"{value!s:.200}"


def _before(number: int) -> _Position:
    """Return the position before the entries of this block."""
    return [("block", number), ("received_at", MinKey()), ("_id", MinKey())]


def _behind(number: int) -> _Position:
    """Return the position behind the entries of this block."""
    return [("block", number), ("received_at", MaxKey()), ("_id", MaxKey())]


def _log_forged(block: object) -> None:
    _log.error(
        "audit_block_changed",
        block=block,
        cause="this block of the audit log has no valid signature",
        next_step="run python -m job_orchestrator.audit verify",
    )
