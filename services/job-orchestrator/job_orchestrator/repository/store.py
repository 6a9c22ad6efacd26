"""Every query of the orchestrator, and the indexes that it needs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal, TypeVar

from pymongo import IndexModel, ReplaceOne, UpdateOne
from pymongo.read_concern import ReadConcern

from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, ChunkState
from job_orchestrator.domain.fairness import Clock, Credit
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.store import UNFINISHED, Census, Command, Policy, Subnet
from job_orchestrator.repository import documents
from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry, JobStatus
from scanfleet.mongo import Collection as MongoCollection
from scanfleet.mongo import Database, Document, Ids, advance_ids, bad_days, insert_missing, make_indexes

_Owned = TypeVar("_Owned", Subnet, Policy)
_Revised = TypeVar("_Revised", ScanJob, Chunk)

_BATCH: Final = 1_000  # documents read at once: about a megabyte, and 20 ms of turning them into chunks

SEQUENCES: Final = ("jobs", "subnets", "policies", "users", "revocations")

_INDEXES: Final = {
    "subnets": [IndexModel([("user_id", 1), ("_id", -1)])],
    "policies": [IndexModel([("user_id", 1), ("_id", -1)])],
    "commands": [
        IndexModel(
            [("user_id", 1), ("idempotency_key", 1)],
            unique=True,
            partialFilterExpression={"idempotency_key": {"$exists": True}},
        ),
        # An answer is asked for again within minutes or never; the keys that clients may repeat live as long.
        IndexModel([("at", 1)], expireAfterSeconds=int(timedelta(days=7).total_seconds())),
    ],
    "jobs": [
        IndexModel([("user_id", 1), ("sort_time", -1), ("_id", -1)]),
        IndexModel([("user_id", 1), ("status", 1), ("sort_time", -1), ("_id", -1)]),
        # With status and age the unfinished jobs are counted from the index alone.
        IndexModel(
            [("settled", 1), ("_id", 1), ("status", 1), ("created_at", 1)],
            partialFilterExpression={"settled": False},
        ),
        IndexModel([("outbox.at", 1)], sparse=True),
        IndexModel([("subnet_id", 1)], partialFilterExpression={"settled": False}),
    ],
    "chunks": [
        IndexModel([("job_id", 1), ("index", 1)]),
        IndexModel([("job_id", 1), ("state", 1)]),
        # With the estimate the chunks are counted and the queued seconds summed from the index alone.
        IndexModel([("state", 1), ("user_id", 1), ("needs_raw", 1), ("turn", 1), ("estimate", 1)]),
        IndexModel([("worker_id", 1), ("state", 1)], partialFilterExpression={"held": True}),
        IndexModel([("state", 1), ("partition", 1)], partialFilterExpression={"held": True}),
        IndexModel([("scanned_at", 1)], partialFilterExpression={"state": ChunkState.SCANNED.value}),
    ],
    "audit": [
        IndexModel([("time", -1), ("_id", -1)]),
        IndexModel([("subject", 1), ("time", -1), ("_id", -1)]),
        IndexModel([("request_id", 1)]),
        # Each entry says itself when it is to be forgotten, so that the setting may change.
        IndexModel([("forget_at", 1)], expireAfterSeconds=0),
    ],
    "clocks": [IndexModel([("active", 1)], partialFilterExpression={"active": True})],
    # A worker that was not heard of for an hour is gone: a new process has a new id.
    "workers": [IndexModel([("seen", 1)], expireAfterSeconds=3_600), IndexModel([("raw", 1), ("slots", 1)])],
}


class MongoStore:
    """`Store` on MongoDB.

    Every stored change of a job or chunk replaces the document if its `rev` is still the one that was read.
    """

    def __init__(self, database: Database, *, keep_audit: timedelta = timedelta(days=365)) -> None:
        self._audit = database["audit"]
        self._keep_audit = keep_audit
        self._subnets = database["subnets"]
        self._policies = database["policies"]
        self._commands = database["commands"]
        self._jobs = database["jobs"]
        self._chunks = database["chunks"]
        self._clocks = database["clocks"]
        self._workers = database["workers"]
        self._database = database
        self._ids: dict[str, Ids] = {}

    async def prepare(self) -> None:
        """Make the indexes what they are to be."""
        await make_indexes(self._database, _INDEXES)

    async def advance_ids(self, above: int) -> None:
        """Let every sequence go on above `above`. Nobody else may be taking ids."""
        await advance_ids(self._database, SEQUENCES, above)

    async def take_ids(self, name: str, count: int = 1) -> range:
        return await self._ids.setdefault(name, Ids(self._database, name)).take(count)

    # Subnets and policies

    @bad_days()
    async def exists(self, kind: Literal["subnets", "policies"], id_: int) -> bool:
        return await self._database[kind].find_one({"_id": id_}, {"_id": 1}) is not None

    async def add_subnet(self, subnet: Subnet) -> None:
        await insert_missing(self._subnets, [documents.write_subnet(subnet)])

    async def subnets(self, user_id: int, ids: Collection[int]) -> list[Subnet]:
        return await _owned(self._subnets, documents.read_subnet, user_id, ids)

    async def list_subnets(self, user_id: int, skip: int, limit: int) -> tuple[list[Subnet], int]:
        return await _page(self._subnets, documents.read_subnet, user_id, skip, limit)

    async def replace_subnet(self, subnet: Subnet) -> bool:
        return await _replace(self._subnets, documents.write_subnet(subnet))

    async def delete_subnet(self, user_id: int, subnet_id: int) -> bool:
        return await _delete(self._subnets, user_id, subnet_id)

    async def add_policy(self, policy: Policy) -> None:
        await insert_missing(self._policies, [documents.write_policy(policy)])

    async def policies(self, user_id: int, ids: Collection[int]) -> list[Policy]:
        return await _owned(self._policies, documents.read_policy, user_id, ids)

    async def list_policies(self, user_id: int, skip: int, limit: int) -> tuple[list[Policy], int]:
        return await _page(self._policies, documents.read_policy, user_id, skip, limit)

    async def replace_policy(self, policy: Policy) -> bool:
        return await _replace(self._policies, documents.write_policy(policy))

    async def delete_policy(self, user_id: int, policy_id: int) -> bool:
        return await _delete(self._policies, user_id, policy_id)

    # Commands

    async def insert_commands(self, commands: Sequence[Command]) -> dict[str, Command]:
        taken = await insert_missing(self._commands, [documents.write_command(command) for command in commands])
        stands = {command.id: command for command in commands}
        if taken:
            losers = [commands[index] for index in taken]
            first = await self.commands([command.id for command in losers])
            keys = [(command.user_id, command.idempotency_key) for command in losers if command.idempotency_key]
            by_key = await self.commands_by_key(keys)
            for loser in losers:
                stands[loser.id] = first.get(loser.id) or by_key[loser.user_id, loser.idempotency_key or ""]
        return stands

    @bad_days()
    async def commands(self, ids: Collection[str]) -> dict[str, Command]:
        found = self._commands.find({"_id": {"$in": list(ids)}})
        return {document["_id"]: documents.read_command(document) async for document in found}

    async def accepted_submits(self) -> AsyncIterator[Command]:
        """Every command that made jobs."""
        async with bad_days():
            async for each in self._commands.find({"state": "accepted", "jobs": {"$ne": []}}):
                yield documents.read_command(each)

    @bad_days()
    async def commands_by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        if not keys:
            return {}
        found = self._commands.find({"$or": [{"user_id": user, "idempotency_key": key} for user, key in keys]})
        return {(each["user_id"], each["idempotency_key"]): documents.read_command(each) async for each in found}

    @bad_days()
    async def reject_command(self, command_id: str, status: int, error: str, rule: str) -> None:
        told = {"state": "rejected", "status": status, "error": error, "rule": rule}
        await self._commands.update_one({"_id": command_id, "state": "accepted"}, {"$set": told})

    # The audit log

    async def add_audit(self, entries: Sequence[AuditEntry]) -> None:
        forget_at = utc_now() + self._keep_audit
        await insert_missing(
            self._audit, [documents.write_audit(entry) | {"forget_at": forget_at} for entry in entries]
        )

    @bad_days()
    async def list_audit(
        self,
        skip: int,
        limit: int,
        *,
        subject: str | None = None,
        request_id: str | None = None,
    ) -> tuple[list[AuditEntry], int]:
        asked = {"subject": subject, "request_id": request_id}
        wanted: Document = {name: value for name, value in asked.items() if value is not None}
        newest = self._audit.find(wanted).sort([("time", -1), ("_id", -1)]).skip(skip).limit(limit)
        # All of a large collection are not counted one by one.
        counted = self._audit.count_documents(wanted) if wanted else self._audit.estimated_document_count()
        found, total = await asyncio.gather(newest.to_list(limit), counted)
        return [documents.read_audit(each) for each in found], total

    # Jobs

    async def insert_jobs(self, jobs: Sequence[ScanJob]) -> None:
        await insert_missing(self._jobs, [documents.write_job(job) for job in jobs])

    @bad_days()
    async def jobs(self, ids: Collection[int]) -> dict[int, ScanJob]:
        if not ids:
            return {}
        return {each["_id"]: documents.read_job(each) async for each in self._jobs.find({"_id": {"$in": list(ids)}})}

    async def save_jobs(self, jobs: Sequence[ScanJob]) -> set[int]:
        return await _save(self._jobs, jobs, documents.write_job, documents.read_job)

    @bad_days()
    async def list_jobs(
        self,
        user_id: int,
        statuses: Collection[JobStatus],
        skip: int,
        limit: int,
    ) -> tuple[list[ScanJob], int]:
        wanted: Document = {"user_id": user_id}
        if statuses:
            wanted["status"] = {"$in": [status.value for status in statuses]}
        newest = self._jobs.find(wanted).sort([("sort_time", -1), ("_id", -1)]).skip(skip).limit(limit)
        return [documents.read_job(each) async for each in newest], await self._jobs.count_documents(wanted)

    @bad_days()
    async def unsettled_jobs(self, after: int, limit: int) -> list[int]:
        found = self._jobs.find({"settled": False, "_id": {"$gt": after}}, {"_id": 1}).sort("_id", 1).limit(limit)
        return [each["_id"] async for each in found]

    @bad_days()
    async def jobs_with_old_events(self, before: datetime, limit: int) -> list[int]:
        found = self._jobs.find({"outbox.at": {"$lt": before}}, {"_id": 1}).limit(limit)
        return [each["_id"] async for each in found]

    @bad_days()
    async def has_unfinished_jobs(self, subnet_id: int) -> bool:
        unfinished = [JobStatus.PENDING.value, JobStatus.RUNNING.value]
        wanted = {"subnet_id": subnet_id, "settled": False, "status": {"$in": unfinished}}
        return await self._jobs.find_one(wanted, {"_id": 1}) is not None

    # Chunks

    async def insert_chunks(self, chunks: Sequence[Chunk]) -> None:
        await insert_missing(self._chunks, [documents.write_chunk(chunk) for chunk in chunks])

    async def chunks(self, ids: Collection[str]) -> dict[str, Chunk]:
        if not ids:
            return {}
        return {chunk.id: chunk for chunk in await self._find_chunks({"_id": {"$in": list(ids)}})}

    async def job_chunks(self, job_id: int) -> AsyncIterator[Chunk]:
        # The order of an index whose keys never change: no chunk is seen twice or missed because it moves meanwhile.
        async with bad_days():
            async for each in self._chunks.find({"job_id": job_id}).sort("index", 1).batch_size(_BATCH):
                yield documents.read_chunk(each)

    @bad_days()
    async def chunks_in(self, job_id: int, states: Collection[ChunkState], limit: int) -> list[str]:
        wanted = {"job_id": job_id, "state": {"$in": [state.value for state in states]}}
        return [each["_id"] async for each in self._chunks.find(wanted, {"_id": 1}).limit(limit)]

    async def save_chunks(self, chunks: Sequence[Chunk]) -> set[str]:
        return await _save(self._chunks, chunks, documents.write_chunk, documents.read_chunk)

    @bad_days()
    async def chunk_states(self, job_ids: Collection[int]) -> dict[int, Counter[ChunkState]]:
        states: dict[int, Counter[ChunkState]] = {job_id: Counter() for job_id in job_ids}
        at_one_moment = self._chunks.with_options(read_concern=ReadConcern("snapshot"))
        groups = at_one_moment.aggregate(
            [
                {"$match": {"job_id": {"$in": list(job_ids)}}},
                {"$group": {"_id": {"job": "$job_id", "state": "$state"}, "n": {"$sum": 1}}},
            ],
        )
        async for group in groups:
            states[group["_id"]["job"]][ChunkState(group["_id"]["state"])] = group["n"]
        return states

    async def watched_chunks(self, state: ChunkState, partitions: Collection[int]) -> list[Chunk]:
        return await self._find_chunks({"state": state.value, "partition": {"$in": list(partitions)}, "held": True})

    async def overdue_chunks(self, before: datetime, limit: int) -> list[Chunk]:
        asked = {"$or": [{"scanned_at": None}, {"scanned_at": {"$lt": before}}]}
        return await self._find_chunks({"state": ChunkState.SCANNED.value} | asked, limit)

    # Dispatch

    @bad_days()
    async def waiting_users(self, *, raw: bool) -> list[int]:
        found: list[int] = await self._chunks.distinct("user_id", _queued(raw=raw))
        return found

    @bad_days()
    async def queue(self, user_id: int, limit: int, *, raw: bool) -> list[Chunk]:
        found = self._chunks.find(_queued(raw=raw) | {"user_id": user_id}).sort("turn", 1).limit(limit)
        return [documents.read_chunk(each) async for each in found]

    @bad_days()
    async def first_turn(self, user_id: int) -> int:
        first = await self._chunks.find_one(_queued(raw=True) | {"user_id": user_id}, {"turn": 1}, sort=[("turn", 1)])
        return first["turn"] if first else 0

    async def held(self, announced: Iterable[Credit]) -> list[Credit]:
        by_worker = {credit.worker_id: credit for credit in announced}
        wanted = {
            "worker_id": {"$in": list(by_worker)},
            "state": {"$in": [state.value for state in HELD]},
            "held": True,
        }
        estimates: dict[str, list[float]] = {}
        for chunk in await self._find_chunks(wanted):
            estimates.setdefault(chunk.worker_id, []).append(chunk.estimate)
        return [
            replace(credit, held=len(mine), extra_seconds=sum(sorted(mine)[: max(0, len(mine) - credit.slots)]))
            for credit in by_worker.values()
            for mine in [estimates.get(credit.worker_id, [])]
        ]

    @bad_days()
    async def clocks(self, users: Collection[int]) -> dict[int, Clock]:
        found = self._clocks.find({"$or": [{"active": True}, {"_id": {"$in": list(users)}}]})
        return {each["_id"]: documents.read_clock(each) async for each in found}

    @bad_days()
    async def rest_clocks(self) -> None:
        active = [each["_id"] async for each in self._clocks.find({"active": True}, {"_id": 1})]
        busy = {"state": {"$in": [ChunkState.QUEUED.value, *(state.value for state in HELD)]}}
        idle = set(active) - set(await self._chunks.distinct("user_id", busy))
        if idle:
            await self._clocks.update_many({"_id": {"$in": list(idle)}}, {"$set": {"active": False}})

    @bad_days()
    async def wake_clocks(self, clocks: Iterable[Clock]) -> None:
        writes = [
            UpdateOne({"_id": clock.user_id}, {"$max": {"time": clock.time}, "$set": {"active": True}}, upsert=True)
            for clock in clocks
        ]
        if writes:
            await self._clocks.bulk_write(writes, ordered=False)

    @bad_days()
    async def charge(self, seconds: Mapping[int, float]) -> None:
        writes = [UpdateOne({"_id": user}, {"$inc": {"time": time}}, upsert=True) for user, time in seconds.items()]
        if writes:
            await self._clocks.bulk_write(writes, ordered=False)

    @bad_days()
    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        writes = [
            UpdateOne(
                {"_id": worker.worker_id},
                {"$set": {"slots": worker.slots, "raw": worker.raw}, "$currentDate": {"seen": True}},
                upsert=True,
            )
            for worker in workers
        ]
        if writes:
            await self._workers.bulk_write(writes, ordered=False)

    @bad_days()
    async def raw_worker_seen(self, within: timedelta) -> bool:
        since = {"$gt": ["$seen", {"$subtract": ["$$NOW", int(within.total_seconds() * 1_000)]}]}
        return await self._workers.find_one({"raw": True, "slots": {"$gt": 0}, "$expr": since}) is not None

    # What is going on

    @bad_days()
    async def census(self) -> Census:
        jobs = self._jobs.aggregate(
            [
                {"$match": {"settled": False, "status": {"$in": [status.value for status in UNFINISHED]}}},
                {"$group": {"_id": "$status", "n": {"$sum": 1}, "oldest": {"$min": "$created_at"}}},
                {"$set": {"age": _age("$oldest")}},
            ],
        )
        chunks = self._chunks.aggregate(
            [
                {"$match": {"state": {"$in": [state.value for state in OPEN]}}},
                {"$group": {"_id": "$state", "n": {"$sum": 1}, "seconds": {"$sum": "$estimate"}}},
            ],
        )
        unsent = self._jobs.aggregate(
            [
                {"$match": {"outbox.at": {"$exists": True}}},
                {"$sort": {"outbox.at": 1}},
                {"$limit": 1},
                {"$project": {"age": _age({"$min": "$outbox.at"})}},
            ],
        )
        by_status = {JobStatus(each["_id"]): each async for each in jobs}
        by_state = {ChunkState(each["_id"]): each async for each in chunks}
        return Census(
            jobs=Counter({status: each["n"] for status, each in by_status.items()}),
            job_ages={status: each["age"] for status, each in by_status.items()},
            chunks=Counter({state: each["n"] for state, each in by_state.items()}),
            queued_seconds=float(by_state.get(ChunkState.QUEUED, {}).get("seconds", 0.0)),
            outbox_age=max([each["age"] async for each in unsent], default=0.0),
        )

    @bad_days()
    async def _find_chunks(self, wanted: Document, limit: int = 0) -> list[Chunk]:
        return [documents.read_chunk(each) async for each in self._chunks.find(wanted).limit(limit)]


def _age(time: Any) -> Document:
    """Seconds from `time`, which somebody else's clock may have put into the future, to the database's now."""
    return {"$max": [0.0, {"$divide": [{"$subtract": ["$$NOW", time]}, 1_000]}]}


def _queued(*, raw: bool) -> Document:
    return {"state": ChunkState.QUEUED.value, "needs_raw": {"$in": [False, True] if raw else [False]}}


@bad_days()
async def _save(
    collection: MongoCollection,
    changed: Sequence[_Revised],
    write: Callable[[_Revised], Document],
    read: Callable[[Document], _Revised],
) -> set[Any]:
    if not changed:
        return set()
    new = [replace(each, rev=each.rev + 1) for each in changed]
    writes = [ReplaceOne({"_id": each.id, "rev": each.rev - 1}, write(each)) for each in new]
    result = await collection.bulk_write(writes, ordered=False)
    if result.matched_count == len(changed):
        return set()
    # Which ones lost is not in the answer. A retried write can also find its own first try: then it did not lose.
    found = collection.find({"_id": {"$in": [each.id for each in new]}})
    stored = {each["_id"]: read(each) async for each in found}
    return {each.id for each in new if stored.get(each.id) != each}


@bad_days()
async def _owned(
    collection: MongoCollection,
    read: Callable[[Document], _Owned],
    user_id: int,
    ids: Collection[int],
) -> list[_Owned]:
    return [read(each) async for each in collection.find({"user_id": user_id, "_id": {"$in": list(ids)}})]


@bad_days()
async def _page(
    collection: MongoCollection,
    read: Callable[[Document], _Owned],
    user_id: int,
    skip: int,
    limit: int,
) -> tuple[list[_Owned], int]:
    wanted = {"user_id": user_id}
    newest = collection.find(wanted).sort("_id", -1).skip(skip).limit(limit)
    found, total = await asyncio.gather(newest.to_list(limit), collection.count_documents(wanted))
    return [read(each) for each in found], total


@bad_days()
async def _replace(collection: MongoCollection, document: Document) -> bool:
    wanted = {"_id": document["_id"], "user_id": document["user_id"]}
    return (await collection.replace_one(wanted, document)).matched_count == 1


@bad_days()
async def _delete(collection: MongoCollection, user_id: int, resource_id: int) -> bool:
    return (await collection.delete_one({"_id": resource_id, "user_id": user_id})).deleted_count == 1
