"""Store decisions on commands in MongoDB."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Final

from pymongo import IndexModel, UpdateOne

from job_orchestrator.domain.command import Command
from job_orchestrator.repository import documents
from scanfleet.runtime.mongo import Database, Document, dependency_errors, insert_missing, scan_by_id

INDEXES: Final = {
    "commands": [
        IndexModel(
            [("user_id", 1), ("idempotency_key", 1)],
            unique=True,
            partialFilterExpression={"idempotency_key": {"$exists": True}},
        ),
        # Clients retry within minutes; idempotency keys are kept as long as their commands.
        IndexModel([("at", 1)], expireAfterSeconds=int(timedelta(days=7).total_seconds())),
    ],
}


class MongoCommands:
    """`CommandRepository` on MongoDB; `now` returns the platform's time, by which commands expire."""

    def __init__(self, database: Database, now: Callable[[], datetime]) -> None:
        self._commands = database["commands"]
        self._now = now

    async def insert(self, commands: Sequence[Command]) -> dict[str, Command]:
        now = self._now()
        taken = await insert_missing(self._commands, [documents.write_command(command, now) for command in commands])
        stored = {command.id: command for command in commands}
        if taken:
            losers = [commands[index] for index in taken]
            first = await self.get([command.id for command in losers])
            keys = [(command.user_id, command.idempotency_key) for command in losers if command.idempotency_key]
            ids = {key: command.id for key, command in (await self.by_key(keys)).items()}
            by_id = await self.get(ids.values())
            for loser in losers:
                stored[loser.id] = first.get(loser.id) or by_id[ids[loser.user_id, loser.idempotency_key or ""]]
        return stored

    @dependency_errors()
    async def get(self, ids: Collection[str]) -> dict[str, Command]:
        found = self._commands.find({"_id": {"$in": list(ids)}})
        return {document["_id"]: await documents.read_command(document) async for document in found}

    @dependency_errors()
    async def expired(self, ids: Collection[str]) -> set[str]:
        found = self._commands.find({"_id": {"$in": list(ids)}, "state": "expired"}, {"_id": 1})
        return {document["_id"] async for document in found}

    @dependency_errors()
    async def by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        if not keys:
            return {}
        wanted: Document = {"$or": [{"user_id": user, "idempotency_key": key} for user, key in keys]}
        found = self._commands.find(wanted, {"jobs": 0})
        return {(each["user_id"], each["idempotency_key"]): await documents.read_command(each) async for each in found}

    @dependency_errors()
    async def reject(self, commands: Sequence[Command]) -> None:
        writes = [
            UpdateOne(
                {"_id": each.id, "state": "accepted"},
                {"$set": {"state": each.state, "status": each.status, "error": each.error, "rule": each.rule}},
            )
            for each in commands
        ]
        if writes:
            await self._commands.bulk_write(writes, ordered=False)

    async def accepted_submits(self) -> AsyncIterator[Command]:
        """Yield every command that created jobs."""
        async for each in scan_by_id(self._commands):
            if each.get("state") == "accepted" and each.get("jobs"):
                yield await documents.read_command(each)
