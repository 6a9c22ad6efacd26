"""The audit log in MongoDB: entries, and the blocks that make a removed one noticeable.

Every entry is signed as it is inserted. A few seconds later any replica seals the new entries into a block, which names each of
them and the block before. The number of a block is its key in the database, so of two replicas that seal at once one succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import structlog

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.repository import documents
from scanfleet import rest
from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry
from scanfleet.mongo import Database, Document, dependency_errors, insert_missing

MAX_BLOCK: Final = 1_000  # entries of a block, which is then 250 kB
MAX_FINDINGS: Final = 1_000  # that a verification names; more are counted

UNSEALED: Final = 0
REJECTED: Final = -1
"""Instead of a block's number: of an entry whose signature the sealing replica did not accept."""

_OUTSIDE: Final = frozenset({"mac", "block"})  # what an entry's signature does not cover

_NUMBERED: Final = {"_id": {"$gte": 1}}
"""Blocks whose key is a number: anyone with access to the database may have added others."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Verification:
    """What a walk over the whole chain has found.

    Attributes:
        blocks: how many it has.
        sealed: entries in them that are there, unchanged.
        forgotten: entries in them that are gone because of their age.
        waiting: signed entries that no block names yet.
        first: number of the first block that is left; 0 without one.
        head: number and signature of the last block; keep it elsewhere to notice a chain that was cut short or replaced.
        findings: what was changed, removed or added, by id.
        more: findings that are not named.
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
        database: the orchestrator's.
        keys: that sign.
        keep: how long an entry is kept.
    """

    def __init__(self, database: Database, keys: ChainKeys, keep: timedelta) -> None:
        self._entries = database["audit"]
        self._blocks = database["audit_blocks"]
        self._keys = keys
        self._keep = keep

    async def add_audit(self, entries: Sequence[AuditEntry]) -> None:
        now = utc_now()
        await insert_missing(
            self._entries, [self._signed(documents.write_audit(entry, now, now + self._keep)) for entry in entries]
        )

    @dependency_errors()
    async def list_audit(
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
        # All of a large collection are not counted one by one.
        counted = self._entries.count_documents(wanted) if wanted else self._entries.estimated_document_count()
        found, total = await asyncio.gather(newest.to_list(limit), counted)
        return [entry for each in found if (entry := _read(each)) is not None], total

    # Sealing

    async def seal(self) -> None:
        """Seal all entries that no block names yet.

        Raises:
            DependencyError: MongoDB is unavailable; the next call goes on from there.
        """
        while await self._seal_some() == MAX_BLOCK:
            pass

    @dependency_errors()
    async def _seal_some(self) -> int:
        """Make one block, unless there is nothing to seal or another replica makes it; answer how many entries were read."""
        last = await self._blocks.find_one(_NUMBERED, sort=[("_id", -1)])
        if last is not None:
            await self._mark(last["_id"], (each["id"] for each in _named(last)))  # its replica may have died before
        oldest = self._entries.find({"block": UNSEALED}).sort([("received_at", 1), ("_id", 1)]).limit(MAX_BLOCK)
        found = await oldest.to_list(MAX_BLOCK)
        genuine = [each for each in found if self._is_genuine(each)]
        if forged := [each["_id"] for each in found if not self._is_genuine(each)]:
            await self._mark(REJECTED, forged)
            _log.error("audit entries without a valid signature are not sealed", entries=len(forged), first=forged[0])
        if genuine:
            block = self._block(last, genuine)
            if not await insert_missing(self._blocks, [block]):
                await self._mark(block["_id"], (each["_id"] for each in genuine))
                _log.info("audit log sealed", block=block["_id"], entries=len(genuine), signature=block["mac"])
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
            _log.error("the last block of the audit log was changed; run the verification", block=last["_id"])
            previous = {"previous": str(last.get("mac")), "previous_forget_at": now + self._keep}
        block = previous | {
            "_id": last["_id"] + 1 if last else 1,
            "entries": [{"id": each["_id"], "mac": each["mac"], "forget_at": each["forget_at"]} for each in entries],
            "sealed_at": now,
            "forget_at": forget_at,  # blocks are forgotten in their order, and none before its entries
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
        """Sign the entries of a release that signed none, as they are now; answer how many. What is no entry is left out.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        count = 0
        async with dependency_errors():
            async for each in self._entries.find({"mac": {"$exists": False}}):
                if _read(each) is None:
                    continue
                received_at = min(each["time"], utc_now())  # a stranger may have put any time there
                signed = self._signed(each | {"received_at": received_at})
                await self._entries.replace_one({"_id": each["_id"], "mac": {"$exists": False}}, signed)
                count += 1
        return count

    # Verification

    @dependency_errors()
    async def verify(self) -> Verification:
        """Walk over all blocks and entries; memory holds one block and the ids of what is not sealed.

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
                    f"entry {id_}: added, or its block removed: it is marked as of block {marked}, which is not there"
                )
        return found

    async def _outside(self, first: int, last: int, found: Verification) -> dict[str, object]:
        """The block that each entry of no known block is marked with, if it is signed."""
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
            found.add(f"block {previous['_id']}: changed: block {number} was made after another one")

    async def _verify_entries(self, block: Document, found: Verification) -> list[str]:
        """Compare the entries with what their block says; answer the ids that it names."""
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
            found.add(f"entry {id_}: added: block {block['_id']} does not name it")
        return list(named)

    # Export

    async def export(self, after: int = 0) -> AsyncIterator[Exported]:
        """The sealed entries of the blocks above `after`, in their order.

        Raises:
            DependencyError: MongoDB is unavailable, maybe halfway.
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
        """The signature of this block; none when it is not there."""
        block = await self._blocks.find_one({"_id": number}, {"mac": 1})
        return str(block.get("mac")) if block else None


def _read(document: Document) -> rest.AuditEntry | None:
    return documents.readable(documents.read_audit, document, "audit")


def _named(block: Document) -> list[dict[str, Any]]:
    """The entries that it names; of a block that is not ours none."""
    entries = block.get("entries")
    if not isinstance(entries, list):
        return []
    return [each for each in entries if isinstance(each, dict) and {"id", "mac", "forget_at"} <= each.keys()]
