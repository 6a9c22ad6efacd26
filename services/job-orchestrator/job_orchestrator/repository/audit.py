"""Store the audit log in MongoDB: entries, and a chain of blocks that makes removals detectable.

Every entry is signed when it is inserted. Within seconds a replica seals new entries into a block, which lists them and
references the previous block. A block's number is its key in the database, so only one of two concurrent sealers succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog
from pymongo import IndexModel

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.repository import documents
from job_orchestrator.repository.signed_log import BY_BLOCK, MAX_NUMBER, NUMBERS, UNSEALED, SignedLog
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry
from scanfleet.runtime.mongo import (
    Database,
    Document,
    dependency_errors,
    insert_missing,
    scan_by_id,
)

MAX_COUNTED: Final = 10_000  # matching entries: counting millions would take longer than the query's timeout
MAX_BLOCK: Final = 1_000  # maximum entries per block, which then has 250 kB

REJECTED: Final = -1
"""Replaces the block number in an entry whose signature was invalid when it was sealed."""

_MAX_FORGED: Final = 100  # newest blocks among which a genuine one is searched

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


@dataclass(frozen=True, slots=True)
class Exported:
    """A sealed entry, with the number and signature of its block."""

    entry: rest.AuditEntry
    block: int
    block_signature: str


class MongoAudit:
    """Inserts, lists, seals and exports entries.

    Args:
        database: the orchestrator's database.
        keys: the signing keys.
        keep: retention time of entries.
        now: returns the platform's time, by which entries are ordered and expire.
    """

    def __init__(self, database: Database, keys: ChainKeys, keep: timedelta, now: Callable[[], datetime]) -> None:
        self._signed = SignedLog(database, keys)
        self._keep = keep
        self._now = now
        self._marked: object = None
        """Signature of the newest block that this replica has marked in its entries."""

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        now = self._now()
        await insert_missing(
            self._signed.entries,
            [self._signed.signed_entry(documents.write_audit(entry, now, now + self._keep)) for entry in entries],
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
        newest = self._signed.entries.find(wanted).sort([("received_at", -1), ("_id", -1)]).skip(skip).limit(limit)
        # A large collection is counted by its metadata instead of one by one.
        counting = (
            self._signed.entries.count_documents(wanted, limit=MAX_COUNTED)
            if wanted
            else self._signed.entries.estimated_document_count()
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
        if last is not None and last.get("mac") != self._marked:  # its replica may have crashed before
            await self._mark(last["_id"], self._signed.listed(last))
            self._marked = last.get("mac")
        oldest = self._signed.entries.find({"block": UNSEALED}).sort([("received_at", 1), ("_id", 1)]).limit(MAX_BLOCK)
        found = await oldest.to_list(MAX_BLOCK)
        checked = [(each, self._signed.is_genuine(each)) for each in found]
        genuine = [each for each, is_genuine in checked if is_genuine]
        forged = [each["_id"] for each, is_genuine in checked if not is_genuine]
        marked = 0
        if genuine and (block := await self._append(last, genuine)):
            marked += await self._mark(block["_id"], (each["_id"] for each in genuine))
            self._marked = block["mac"]
        if forged:
            marked += await self._mark(REJECTED, forged)
            _log.error(
                "audit_entries_rejected", entries=len(forged), first=forged[0], cause="they have no valid signature"
            )
        return marked > 0 and len(found) == MAX_BLOCK

    async def _last(self) -> Document | None:
        """Return the newest genuine block, or the newest one if none of the last `_MAX_FORGED` is genuine."""
        newest: Document | None = None
        below = NUMBERS["$lt"]
        for _ in range(_MAX_FORGED):
            block = await self._signed.blocks.find_one({"_id": NUMBERS | {"$lt": below}}, sort=[("_id", -1)])
            if block is None or self._signed.is_genuine_block(block):
                return block
            if newest is None:
                newest = block
                _log_forged(block["_id"])
            below = block["_id"]
        return newest

    async def _append(self, last: Document | None, entries: Sequence[Document]) -> Document | None:
        """Create the block after `last` and return it, or None if another replica has created the next block."""
        number = last["_id"] + 1 if last else 1
        while True:
            block = self._block(number, last, entries)
            if not await insert_missing(self._signed.blocks, [block]):
                _log.info("audit_log_sealed", block=number, entries=len(entries), signature=block["mac"])
                return block
            present = await self._signed.blocks.find_one({"_id": number})
            if present is None or self._signed.is_genuine_block(present):
                return None
            _log_forged(number)
            number += 1

    def _block(self, number: int, last: Document | None, entries: Sequence[Document]) -> Document:
        now = self._now()
        forget_at = max(each["forget_at"] for each in entries)
        if last is None:
            previous = {"previous": "", "previous_forget_at": now}
        elif self._signed.is_genuine_block(last):
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
        return self._signed.signed_block(block)

    async def _mark(self, block: int, ids: Iterable[object]) -> int:
        marked = await self._signed.entries.update_many(
            {"_id": {"$in": list(ids)}, "block": UNSEALED}, {"$set": {"block": block}}
        )
        return marked.modified_count

    def _read(self, document: Document) -> rest.AuditEntry | None:
        read = partial(documents.read_audit, genuine=self._signed.is_genuine(document))
        return documents.readable(read, document, "audit")

    async def adopt(self) -> int:
        """Sign the unsigned entries of an older release; return their number. Invalid documents are skipped.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        count = 0
        async with dependency_errors():
            async for each in scan_by_id(self._signed.entries):
                if "mac" in each or self._read(each) is None or not isinstance(each.get("forget_at"), datetime):
                    continue
                try:
                    received_at = min(each["time"], self._now())  # the time of an unsigned entry is untrusted
                    signed = self._signed.signed_entry(each | {"received_at": received_at})
                except TypeError:  # it has a field, or a time as text, that no release has written
                    continue
                await self._signed.entries.replace_one({"_id": each["_id"], "mac": {"$exists": False}}, signed)
                count += 1
        return count

    # Export

    async def export(self, after: int = 0) -> AsyncIterator[Exported]:
        """Yield the entries of the blocks above `after`, in order, except those that were changed.

        Raises:
            DependencyError: MongoDB is unavailable; it can fail after some entries were yielded.
        """
        async with dependency_errors():
            async for block in scan_by_id(self._signed.blocks, after + 1, MAX_NUMBER):
                if not isinstance(block["_id"], int):
                    continue
                listed = self._signed.listed(block)
                if not listed:
                    _log_forged(block["_id"])
                present = {
                    each["_id"]: each async for each in self._signed.entries.find({"_id": {"$in": list(listed)}})
                }
                for id_ in (each for each in listed if each in present):
                    entry = self._read(present[id_])
                    if entry is not None and entry.genuine:
                        yield Exported(entry, block["_id"], block["mac"])
                    else:
                        _log.error(
                            "audit_entry_changed",
                            entry=id_,
                            block=block["_id"],
                            next_step="run python -m job_orchestrator.operator.audit verify",
                        )


def _log_forged(block: object) -> None:
    _log.error(
        "audit_block_changed",
        block=block,
        cause="this block of the audit log has no valid signature",
        next_step="run python -m job_orchestrator.operator.audit verify",
    )
