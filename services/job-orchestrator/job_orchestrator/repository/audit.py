"""Store the audit log in MongoDB: entries, and a chain of blocks that makes removals detectable.

Every entry is signed when it is inserted. Within seconds a replica seals new entries into a block, which lists them and
references the previous block. A block's number is its key in the database, so only one of two concurrent sealers succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from pymongo import IndexModel

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.repository import documents
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry
from scanfleet.runtime.mongo import Database, Document, dependency_errors, insert_missing

MAX_COUNTED: Final = 10_000  # matching entries: counting millions would take longer than the query's timeout
MAX_BLOCK: Final = 1_000  # maximum entries per block, which then has 250 kB
MAX_FINDINGS: Final = 1_000  # findings that a verification lists; further ones are only counted

UNSEALED: Final = 0
REJECTED: Final = -1
"""Replaces the block number in an entry whose signature was invalid when it was sealed."""

_OUTSIDE: Final = frozenset({"mac", "block"})  # fields that an entry's signature does not cover

_NUMBERED: Final = {"_id": {"$gte": 1}}
"""Blocks with a numeric key: anyone with access to the database may have added others."""

INDEXES: Final = {
    "audit": [
        IndexModel([("received_at", -1), ("_id", -1)]),
        IndexModel([("subject", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("request_id", 1)]),
        IndexModel([("action", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("decision", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("rule", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("source", 1), ("received_at", -1), ("_id", -1)]),
        IndexModel([("block", 1), ("received_at", 1), ("_id", 1)]),
        # Each entry has its own expiry, so that the retention setting may change.
        IndexModel([("forget_at", 1)], expireAfterSeconds=0),
    ],
    "audit_blocks": [IndexModel([("forget_at", 1)], expireAfterSeconds=0)],
}

_log = structlog.get_logger()


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
    """

    def __init__(self, database: Database, keys: ChainKeys, keep: timedelta) -> None:
        self._entries = database["audit"]
        self._blocks = database["audit_blocks"]
        self._keys = keys
        self._keep = keep

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        now = utc_now()
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
        return [entry for each in found if (entry := _read(each)) is not None], total

    # Sealing

    async def seal(self) -> None:
        """Seal all entries that are not in a block yet.

        Raises:
            DependencyError: MongoDB is unavailable; the next call continues.
        """
        while await self._seal_some() == MAX_BLOCK:
            pass

    @dependency_errors()
    async def _seal_some(self) -> int:
        """Create one block, unless there is nothing to seal or another replica creates it; return the number of entries read."""
        last = await self._blocks.find_one(_NUMBERED, sort=[("_id", -1)])
        if last is not None:
            await self._mark(last["_id"], (each["id"] for each in _named(last)))  # its replica may have crashed before
        oldest = self._entries.find({"block": UNSEALED}).sort([("received_at", 1), ("_id", 1)]).limit(MAX_BLOCK)
        found = await oldest.to_list(MAX_BLOCK)
        genuine = [each for each in found if self._is_genuine(each)]
        if forged := [each["_id"] for each in found if not self._is_genuine(each)]:
            await self._mark(REJECTED, forged)
            _log.error(
                "audit_entries_rejected", entries=len(forged), first=forged[0], cause="they have no valid signature"
            )
        if genuine:
            block = self._block(last, genuine)
            if not await insert_missing(self._blocks, [block]):
                await self._mark(block["_id"], (each["_id"] for each in genuine))
                _log.info("audit_log_sealed", block=block["_id"], entries=len(genuine), signature=block["mac"])
        return len(found)

    def _block(self, last: Document | None, entries: Sequence[Document]) -> Document:
        now = utc_now()
        forget_at = max(each["forget_at"] for each in entries)
        if last is None:
            previous = {"previous": "", "previous_forget_at": now}
        elif self._is_genuine_block(last):
            previous = {"previous": last["mac"], "previous_forget_at": last["forget_at"]}
            forget_at = max(forget_at, last["forget_at"])
        else:
            _log.error(
                "audit_block_changed",
                block=last["_id"],
                cause="the last block of the audit log has no valid signature",
                next_step="run python -m job_orchestrator.audit verify",
            )
            previous = {"previous": str(last.get("mac")), "previous_forget_at": now + self._keep}
        block = previous | {
            "_id": last["_id"] + 1 if last else 1,
            "entries": [{"id": each["_id"], "mac": each["mac"], "forget_at": each["forget_at"]} for each in entries],
            "sealed_at": now,
            "forget_at": forget_at,  # blocks expire in order, and not before their entries
        }
        return block | {"mac": self._keys.sign("block", block)}

    async def _mark(self, block: int, ids: Iterable[str]) -> None:
        await self._entries.update_many({"_id": {"$in": list(ids)}, "block": UNSEALED}, {"$set": {"block": block}})

    def _signed(self, document: Document) -> Document:
        return document | {"mac": self._keys.sign("entry", document), "block": UNSEALED}

    def _is_genuine(self, document: Document) -> bool:
        content = {name: value for name, value in document.items() if name not in _OUTSIDE}
        return self._keys.verify("entry", content, document.get("mac"))

    def _is_genuine_block(self, block: Document) -> bool:
        content = {name: value for name, value in block.items() if name != "mac"}
        return self._keys.verify("block", content, block.get("mac"))

    async def adopt(self) -> int:
        """Sign the unsigned entries of an older release; return their number. Invalid documents are skipped.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        count = 0
        async with dependency_errors():
            async for each in self._entries.find({"mac": {"$exists": False}}):
                if _read(each) is None:
                    continue
                received_at = min(each["time"], utc_now())  # the time of an unsigned entry is untrusted
                signed = self._signed(each | {"received_at": received_at})
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
        last = await self._blocks.find_one(_NUMBERED, sort=[("_id", -1)])
        first = await self._blocks.find_one(_NUMBERED, sort=[("_id", 1)])
        outside = await self._outside(first["_id"] if first else 1, last["_id"] if last else 0, found)
        previous: Document | None = None
        async for block in self._blocks.find({"_id": {"$not": _NUMBERED["_id"]}}, {"_id": 1}):
            found.add(f"block {block['_id']}: added: it has no number")
        async for block in self._blocks.find(_NUMBERED).sort("_id", 1):
            self._verify_link(previous, block, found)
            for id_ in await self._verify_entries(block, found):
                outside.pop(id_, None)
            previous = block
            found.blocks += 1
            found.first = found.first or block["_id"]
            found.head = (block["_id"], str(block.get("mac")))
        for id_, marked in outside.items():
            if marked == UNSEALED:
                found.waiting += 1
            else:
                found.add(
                    f"entry {id_}: added, or its block removed: it belongs to block {marked}, which does not exist"
                )
        return found

    async def _outside(self, first: int, last: int, found: Verification) -> dict[str, object]:
        """Return the block of each signed entry that is in none of the known blocks."""
        now, outside = utc_now(), {}
        async for each in self._entries.find({"block": {"$not": {"$gte": first, "$lte": last}}}):
            if not self._is_genuine(each):
                found.add(f"entry {each['_id']}: added or changed: its signature is not the platform's")
            elif each["forget_at"] > now or each.get("block") == UNSEALED:
                outside[each["_id"]] = each.get("block")
        return outside

    def _verify_link(self, previous: Document | None, block: Document, found: Verification) -> None:
        number = block["_id"]
        if not self._is_genuine_block(block):
            found.add(f"block {number}: added or changed: its signature is not the platform's")
        elif previous is None:
            if number > 1 and block["previous_forget_at"] > utc_now():
                found.add(f"block {number - 1}: removed before its time, and every one before it that is not there")
        elif number != previous["_id"] + 1:
            found.add(f"blocks {previous['_id'] + 1} to {number - 1}: removed")
        elif block["previous"] != previous.get("mac"):
            found.add(f"block {previous['_id']}: changed: block {number} follows another block")

    async def _verify_entries(self, block: Document, found: Verification) -> list[str]:
        """Compare the entries with the list in their block; return the listed ids."""
        named = {each["id"]: each for each in _named(block)}
        of_block = {"$or": [{"_id": {"$in": list(named)}}, {"block": block["_id"]}]}
        present = {each["_id"]: each async for each in self._entries.find(of_block)}
        now = utc_now()
        for id_, sealed in named.items():
            entry = present.pop(id_, None)
            if entry is None:
                if sealed["forget_at"] > now:
                    found.add(f"entry {id_}: removed")
                else:
                    found.forgotten += 1
            elif entry.get("mac") != sealed["mac"] or not self._is_genuine(entry):
                found.add(f"entry {id_}: changed")
            else:
                found.sealed += 1
        for id_ in present:
            found.add(f"entry {id_}: added: block {block['_id']} does not list it")
        return list(named)

    # Export

    async def export(self, after: int = 0) -> AsyncIterator[Exported]:
        """Yield the sealed entries of the blocks above `after`, in order.

        Raises:
            DependencyError: MongoDB is unavailable; it can fail after some entries were yielded.
        """
        async with dependency_errors():
            async for block in self._blocks.find({"_id": {"$gt": after}}).sort("_id", 1):
                ids = [each["id"] for each in _named(block)]
                present = {each["_id"]: each async for each in self._entries.find({"_id": {"$in": ids}})}
                for id_ in ids:
                    if id_ in present and (entry := _read(present[id_])) is not None:
                        yield Exported(entry, block["_id"], str(block.get("mac")))

    @dependency_errors()
    async def block_signature(self, number: int) -> str | None:
        """Return the signature of this block; None if it does not exist."""
        block = await self._blocks.find_one({"_id": number}, {"mac": 1})
        return str(block.get("mac")) if block else None


def _read(document: Document) -> rest.AuditEntry | None:
    return documents.readable(documents.read_audit, document, "audit")


def _named(block: Document) -> list[dict[str, Any]]:
    """Return the entries that the block lists; none if the block is malformed."""
    entries = block.get("entries")
    if not isinstance(entries, list):
        return []
    return [each for each in entries if isinstance(each, dict) and {"id", "mac", "forget_at"} <= each.keys()]
