"""Store users and revocations in MongoDB."""

from __future__ import annotations

from typing import Final

from pymongo import IndexModel

from job_orchestrator.domain.access import MAX_REVOCATIONS, Revocation
from job_orchestrator.repository import documents
from job_orchestrator.repository.compare_and_set import RECEIPT
from scanfleet.contracts import rest
from scanfleet.contracts.messages.fields import is_id
from scanfleet.runtime.mongo import Database, Document, Ids, advance_ids, dependency_errors, insert_missing

_OWNED: Final = ("jobs", *(each.plural for each in rest.RESOURCES))

INDEXES: Final = {
    "users": [IndexModel([("issuer", 1), ("subject", 1)], unique=True)],
    "revocations": [IndexModel([("expires_at", 1)], expireAfterSeconds=0)],
}


class MongoAccess:
    """`AccessRepository` on MongoDB."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._users = database["users"]
        self._revocations = database["revocations"]
        self._user_ids = Ids(database, "users")
        self._revocation_ids = Ids(database, "revocations")

    async def user_id(self, issuer: str, subject: str) -> int:
        found = await self._find_user(issuer, subject)
        if found is None:
            await self._skip_claimed_ids()
            (id_,) = await self._user_ids.take()
            # The unique index decides between two concurrent first uses; the id of the other one stays unused.
            await insert_missing(self._users, [{"_id": id_, "issuer": issuer, "subject": subject}])
            found = await self._find_user(issuer, subject)
        if found is None:
            raise RuntimeError("a user document disappeared although no code deletes users")
        return found

    @dependency_errors()
    async def _find_user(self, issuer: str, subject: str) -> int | None:
        found = await self._users.find_one({"issuer": issuer, "subject": subject}, {"_id": 1})
        return found["_id"] if found else None

    @dependency_errors()
    async def _skip_claimed_ids(self) -> None:
        """Start above every id that tokens claimed before ids were assigned.

        So no user gets another's resources, entries in the audit log, or revocations.
        """
        if await self._users.find_one({}, {"_id": 1}, sort=[("_id", 1)]) is None:
            claimed = [await self._highest(name, "user_id", {"user_id": {"$exists": True}}) for name in _OWNED]
            claimed.append(await self._highest("jobs", "deletion.user_id", RECEIPT))
            claimed += [each.user_id or 0 for each in await self.revocations()]
            # Every command has an entry too. Subjects are texts, so that the highest one is not the last by their index.
            subjects = self._database["audit"].aggregate([{"$sort": {"subject": 1}}, {"$group": {"_id": "$subject"}}])
            claimed += [int(each["_id"]) async for each in subjects if is_id(each["_id"] or "")]
            await advance_ids(self._database, ["users"], max(claimed))

    async def _highest(self, collection: str, field: str, wanted: Document) -> int:
        """Return the highest user id, stored in `field`, of these documents; 0 if there are none."""
        found = await self._database[collection].find_one(wanted, {field: 1}, sort=[(field, -1)])
        user_id: int = found.get("deletion", found)["user_id"] if found else 0
        return user_id

    async def take_revocation_id(self) -> int:
        (id_,) = await self._revocation_ids.take()
        return id_

    async def add_revocation(self, revocation: Revocation) -> bool:
        async with dependency_errors():
            if await self._revocations.count_documents({}) >= MAX_REVOCATIONS:
                return False
        await insert_missing(self._revocations, [documents.write_revocation(revocation)])
        return True

    @dependency_errors()
    async def revocations(self) -> list[Revocation]:
        newest = self._revocations.find().sort("_id", -1)
        return await documents.read_all(documents.read_revocation, newest, "revocations")

    @dependency_errors()
    async def has_revocation(self, id_: int) -> bool:
        return await self._revocations.find_one({"_id": id_}, {"_id": 1}) is not None

    @dependency_errors()
    async def delete_revocation(self, id_: int) -> bool:
        return (await self._revocations.delete_one({"_id": id_})).deleted_count == 1
