"""Verify the audit log: find entries and blocks that were changed, removed or added in the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from bson import MaxKey, MinKey

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.repository.signed_log import BY_BLOCK, MAX_NUMBER, NUMBERS, UNSEALED, SignedLog
from scanfleet.runtime.mongo import Cursor, Database, Document, dependency_errors, scan_by_id

MAX_FINDINGS: Final = 1_000  # maximum number of listed findings; further ones are only counted

_Position = list[tuple[str, Any]]
"""A position in the index by block."""


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


class AuditVerifier:
    """Verifies the chain and its entries.

    Args:
        database: the orchestrator's database.
        keys: the keys of the signatures.
        now: returns the platform's time, by which entries expire.
    """

    def __init__(self, database: Database, keys: ChainKeys, now: Callable[[], datetime]) -> None:
        self._signed = SignedLog(database, keys)
        self._now = now

    @dependency_errors()
    async def verify(self) -> Verification:
        """Verify all blocks and entries, with one block and the ids of unsealed entries in memory.

        Raises:
            DependencyError: MongoDB is unavailable; call again.
        """
        found = Verification()
        last = await self._signed.blocks.find_one({"_id": NUMBERS}, sort=[("_id", -1)])
        first = await self._signed.blocks.find_one({"_id": NUMBERS}, sort=[("_id", 1)])
        # These ranges of the index and those of the blocks below contain all entries: also an array, by its elements.
        if first is None or last is None:
            outside = await self._outside(None, None, found)
        else:
            outside = await self._outside(None, _before(first["_id"]), found)
            outside |= await self._outside(_behind(last["_id"]), None, found)
        ids = [self._signed.blocks.find({}, {"_id": 1}).hint([("_id", 1)]) for _ in range(2)]
        for others in (ids[0].max([("_id", 1)]), ids[1].min([("_id", MAX_NUMBER)])):
            async for block in others:
                found.add(_no_number(block))
        previous: tuple[int, str] | None = None
        async for block in scan_by_id(self._signed.blocks, 1, MAX_NUMBER):
            if not isinstance(number := block["_id"], int):
                found.add(_no_number(block))
                continue
            genuine = self._signed.is_genuine_block(block)
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
        found = self._signed.entries.find().hint(BY_BLOCK)
        if first is not None:
            found = found.min(first)
        return found if end is None else found.max(end)

    async def _outside(self, first: _Position | None, end: _Position | None, found: Verification) -> dict[str, object]:
        """Return the mark of each signed entry in a range of the index: the block of none of them is known."""
        now, outside = self._now(), {}
        async for each in self._marked(first, end):
            if not self._signed.is_genuine(each):
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
        listed, present = self._signed.listed(block), set[str]()
        async for each in self._marked(first, end):
            id_, mark = each["_id"], each.get("block")
            if type(id_) is not str or id_ not in listed:
                unlisted = f"entry {_text(id_)}: added: block {block['_id']} does not list it"
                found.add(unlisted if mark == block["_id"] else _without_block(id_, mark))
        async for each in self._signed.entries.find({"_id": {"$in": list(listed)}}):
            id_ = each["_id"]
            present.add(id_)
            if each.get("mac") == listed[id_]["mac"] and self._signed.is_genuine(each):
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

    @dependency_errors()
    async def block_signature(self, number: int) -> str | None:
        """Return the signature of this block; None if it does not exist."""
        block = await self._signed.blocks.find_one({"_id": number}, {"mac": 1})
        return str(block.get("mac")) if block else None


def _no_number(block: Document) -> str:
    return f"block {_text(block['_id'])}: added: this is not the number of a block"


def _without_block(id_: object, mark: object) -> str:
    return f"entry {_text(id_)}: added, or its block removed: it belongs to block {_text(mark)}, which does not exist"


def _text(value: object) -> str:
    """Return the start of a value from a document that may be forged."""
    return f"{value!s:.200}"


def _before(number: int) -> _Position:
    """Return the position before the entries of this block."""
    return [("block", number), ("received_at", MinKey()), ("_id", MinKey())]


def _behind(number: int) -> _Position:
    """Return the position behind the entries of this block."""
    return [("block", number), ("received_at", MaxKey()), ("_id", MaxKey())]
