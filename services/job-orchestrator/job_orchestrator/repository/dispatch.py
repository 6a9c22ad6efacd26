"""Query queued and held chunks in MongoDB, and store users' accounts and workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import IndexModel, UpdateOne

from job_orchestrator.domain.chunk import HELD, MAX_DELAY, OPEN, ChunkState
from job_orchestrator.domain.fairness import KEEP_IDLE, Account, Accounts, Candidate, Credit, Held
from job_orchestrator.repository import documents
from scanfleet.runtime.mongo import Database, Document, dependency_errors

_VIRTUAL: Final = "virtual"  # the document of the global virtual time, among the users' accounts

INDEXES: Final = {
    "clocks": [IndexModel([("active", 1), ("time", 1)], name="active_1_v2")],
    # Only the announcements of the last seconds count.
    "workers": [
        IndexModel([("seen", 1)], name="seen_1_v2", expireAfterSeconds=60),
    ],
}


class MongoDispatch:
    """`DispatchRepository` on MongoDB. The indexes of the chunks are those of their own repository."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._chunks = database["chunks"]
        self._accounts = database["clocks"]  # the name in version 0.1
        self._workers = database["workers"]

    @dependency_errors()
    async def waiting_users(self, *, raw: bool) -> list[int]:
        return list(await self._users(_queued(raw=raw)))

    @dependency_errors()
    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        jobs: Collection[int] | None = None,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        may_go = {
            "$or": [{"not_before": None}, {"not_before": {"$lte": now}}, {"not_before": {"$gt": now + MAX_DELAY}}]
        }
        wanted = _queued(raw=raw) | {"user_id": user_id} | may_go
        of_jobs = {} if jobs is None else {"$in": list(jobs)}
        without: list[Any] = list(skip)
        while True:
            if ids := of_jobs | ({"$nin": without} if without else {}):
                wanted["job_id"] = ids
            found = await self._chunks.find(wanted, documents.CANDIDATE).sort("turn", 1).limit(limit).to_list(limit)
            read = [documents.readable(documents.read_candidate, each, "chunks") for each in found]
            unreadable = [each.get("job_id") for each, candidate in zip(found, read, strict=True) if candidate is None]
            if not (new := [id_ for id_ in unreadable if id_ not in without]):
                return [candidate for candidate in read if candidate is not None]
            without += new  # otherwise they could fill every result

    @dependency_errors()
    async def first_turns(self, users: Collection[int]) -> dict[int, int]:
        turns = await self._lowest_turns(users, [ChunkState.QUEUED])
        if others := set(users) - turns.keys():
            turns |= await self._lowest_turns(others, OPEN - {ChunkState.QUEUED})
        return turns

    @dependency_errors()
    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        wanted: Document = {"held": True}
        if partitions is not None:
            wanted["partition"] = {"$in": list(partitions)}
        same: list[Held] = []
        if known:
            held = await self._chunks.find(wanted, {"attempt": 1}).to_list(None)  # from the index alone
            attempts = {each["_id"]: each.get("attempt") for each in held}
            same = [each for id_, each in known.items() if attempts.get(id_) == each.token.attempt]
            wanted["_id"] = {"$in": list(attempts.keys() - {each.token.chunk_id for each in same})}
            if not wanted["_id"]["$in"]:
                return same
        found = self._chunks.find(wanted, documents.HELD_FIELDS)
        return same + await documents.read_all(documents.read_held, found, "chunks")

    @dependency_errors()
    async def accounts(self, users: Collection[int]) -> Accounts:
        found = self._accounts.find({"$or": [{"active": True}, {"_id": {"$in": [*users, _VIRTUAL]}}]})
        by_id = {
            each["_id"]: documents.readable(
                documents.read_virtual if each["_id"] == _VIRTUAL else documents.read_account, each, "clocks"
            )
            async for each in found
        }
        if unreadable := [id_ for id_, account in by_id.items() if account is None]:
            # Its time can neither be read nor advanced. Without one, the account starts again at the global virtual time.
            await self._accounts.delete_many({"_id": {"$in": unreadable}})
        accounts = {id_: account for id_, account in by_id.items() if account is not None}
        virtual = accounts.pop(_VIRTUAL, Account(0))
        return Accounts(accounts, virtual.time)

    @dependency_errors()
    async def deactivate_accounts(self, left_out: Collection[int] = ()) -> None:
        active = [each["_id"] async for each in self._accounts.find({"active": True}, {"_id": 1})]
        if not active:
            return
        # In this order: a chunk that is dispatched meanwhile counts in one of them.
        waiting = await self._users({"state": ChunkState.QUEUED.value})
        busy = await self._users({"state": {"$in": [state.value for state in HELD]}})
        idle = set(active) - (waiting - set(left_out)) - busy
        if idle:
            rest = {"$set": {"active": False}, "$currentDate": {"idle_since": True}}
            await self._accounts.update_many({"_id": {"$in": list(idle)}}, rest)
            virtual = await self._accounts.find_one({"_id": _VIRTUAL}) or {}
            long_ago = {"$lt": ["$idle_since", {"$subtract": ["$$NOW", int(KEEP_IDLE.total_seconds() * 1_000)]}]}
            await self._accounts.delete_many(
                {"active": False, "time": {"$lte": virtual.get("time")}, "$expr": long_ago}
            )

    @dependency_errors()
    async def activate_accounts(self, accounts: Iterable[Account], virtual: float) -> None:
        writes = [
            UpdateOne({"_id": account.user_id}, {"$max": {"time": account.time}, "$set": {"active": True}}, upsert=True)
            for account in accounts
        ]
        writes.append(UpdateOne({"_id": _VIRTUAL}, {"$max": {"time": virtual}}, upsert=True))
        await self._accounts.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def charge(self, seconds: Mapping[int, float]) -> None:
        # `$inc` fails for a damaged account.
        before = {"$cond": [{"$isNumber": "$time"}, "$time", 0]}
        active = {"$ifNull": ["$active", False]}
        writes = [
            UpdateOne({"_id": user}, [{"$set": {"time": {"$add": [before, time]}, "active": active}}], upsert=True)
            for user, time in seconds.items()
        ]
        if writes:
            await self._accounts.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        writes = [
            UpdateOne(
                {"_id": worker.instance},
                {
                    "$set": {"worker_id": worker.worker_id, "slots": worker.slots, "raw": worker.raw},
                    "$currentDate": {"seen": True},
                },
                upsert=True,
            )
            for worker in workers
        ]
        if writes:
            await self._workers.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def live_workers(self, within: timedelta) -> list[Credit]:
        milliseconds = int(within.total_seconds() * 1_000)
        since = {"$gt": ["$seen", {"$subtract": ["$$NOW", milliseconds]}]}
        until = {"$lt": ["$seen", {"$add": ["$$NOW", milliseconds]}]}  # a later time is from a clock that was ahead
        found = self._workers.find({"slots": {"$gt": 0}, "$expr": {"$and": [since, until]}})
        return await documents.read_all(documents.read_worker, found, "workers")

    async def _lowest_turns(self, users: Collection[int], states: Iterable[ChunkState]) -> dict[int, int]:
        """Return the lowest turn of the chunks in these states, for each of these users with such chunks."""
        # Without a chunk whose turn is damaged, which would be the first.
        wanted = {
            "state": {"$in": [state.value for state in states]},
            "needs_raw": {"$in": [False, True]},
            "turn": {"$type": ["int", "long"]},
        }
        # Two keys of the index for each user and state, whereas `$group` would read all keys of their chunks.
        found = self._database.aggregate(
            [
                {"$documents": [{"_id": user} for user in users]},
                {
                    "$lookup": {
                        "from": self._chunks.name,
                        "localField": "_id",
                        "foreignField": "user_id",
                        "pipeline": [
                            {"$match": wanted},
                            {"$sort": {"turn": 1}},
                            {"$limit": 1},
                            {"$project": {"turn": 1}},
                        ],
                        "as": "first",
                    },
                },
                {"$unwind": "$first"},
            ],
        )
        return {each["_id"]: each["first"]["turn"] async for each in found}

    async def _users(self, wanted: Document) -> set[int]:
        """Return the users of these chunks; the value in a damaged chunk may have any type."""
        return {user for user in await self._chunks.distinct("user_id", wanted) if isinstance(user, int)}


def _queued(*, raw: bool) -> Document:
    return {"state": ChunkState.QUEUED.value, "needs_raw": {"$in": [False, True] if raw else [False]}}
