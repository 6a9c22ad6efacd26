"""All queries of the orchestrator, and the indexes that they need."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal, TypeVar

import structlog
from pymongo import IndexModel, UpdateOne
from pymongo.read_concern import ReadConcern

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, ChunkState
from job_orchestrator.domain.deletion import KEEP_RECEIPTS, Deletion, Stage
from job_orchestrator.domain.fairness import Candidate, Clock, Clocks, Credit, Held
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.store import UNFINISHED, Census, Command, OpenChunks, Policy, Standing, Subnet
from job_orchestrator.repository import documents
from job_orchestrator.repository.audit import MongoAudit
from scanfleet.messages import Job, JobStatus
from scanfleet.messages.topics import SCAN_PROGRESS
from scanfleet.mongo import Collection as MongoCollection
from scanfleet.mongo import Database, Document, Ids, advance_ids, dependency_errors, insert_missing, make_indexes

_Owned = TypeVar("_Owned", Subnet, Policy)
_Revised = TypeVar("_Revised", ScanJob, Chunk)

_log = structlog.get_logger()

_VIRTUAL: Final = "virtual"  # the document of the global virtual time, among the users' clocks

_BATCH: Final = 1_000  # documents per read: about a megabyte, and 20 ms of conversion

SEQUENCES: Final = ("jobs", "subnets", "policies", "users", "revocations")

_NO_RECEIPT: Final = {"deletion": {"$exists": False}}  # of a deleted job

_ENDED: Final = [("end_time", 1), ("_id", 1)]
_ENDED_OF_USER: Final = [("user_id", 1), *_ENDED]

_INDEXES: Final = {
    "subnets": [IndexModel([("user_id", 1), ("_id", -1)]), IndexModel([("user_id", 1), ("cidr", 1)])],
    "policies": [IndexModel([("user_id", 1), ("_id", -1)])],
    "commands": [
        IndexModel(
            [("user_id", 1), ("idempotency_key", 1)],
            unique=True,
            partialFilterExpression={"idempotency_key": {"$exists": True}},
        ),
        # Clients retry within minutes; idempotency keys are kept as long as their commands.
        IndexModel([("at", 1)], expireAfterSeconds=int(timedelta(days=7).total_seconds())),
    ],
    "jobs": [
        IndexModel([("user_id", 1), ("sort_time", -1), ("_id", -1)]),
        IndexModel([("user_id", 1), ("status", 1), ("sort_time", -1), ("_id", -1)]),
        IndexModel([("subnet_id", 1), ("sort_time", -1), ("_id", -1)]),
        IndexModel([("policy_id", 1), ("sort_time", -1), ("_id", -1)]),
        IndexModel([("status", 1), ("sort_time", -1), ("_id", -1)]),  # for administrators, who list every user's
        # With status and age, unfinished jobs are counted from the index alone.
        IndexModel(
            [("settled", 1), ("_id", 1), ("partition", 1), ("status", 1), ("created_at", 1), ("seconds_left", 1)],
            partialFilterExpression={"settled": False},
        ),
        # Jobs of a user that ended while a stream was interrupted.
        IndexModel(_ENDED_OF_USER, name="end_time_1_user_id_1_v2"),
        IndexModel(_ENDED),  # the same of all users, and expired jobs page by page
        # With it the unfinished jobs of a user are counted from the index alone.
        IndexModel(
            [("user_id", 1), ("settled", 1), ("status", 1), ("seconds_left", 1)],
            partialFilterExpression={"settled": False},
        ),
        IndexModel([("due", 1)], sparse=True),  # deletions to go on with
        IndexModel([("forget_at", 1)], expireAfterSeconds=0, sparse=True),
        IndexModel([("outbox.at", 1)], sparse=True),
        IndexModel([("subnet_id", 1)], partialFilterExpression={"settled": False}),
    ],
    "chunks": [
        IndexModel([("job_id", 1), ("index", 1)]),
        IndexModel([("job_id", 1), ("state", 1), ("index", 1)]),
        # With job and time, the chunks of skipped jobs and those that are not due yet are passed over without reading them.
        IndexModel(
            [("state", 1), ("user_id", 1), ("needs_raw", 1), ("turn", 1), ("job_id", 1), ("not_before", 1)],
            name="state_1_user_id_1_needs_raw_1_turn_1_v2",
        ),
        IndexModel([("held", 1), ("partition", 1)], partialFilterExpression={"held": True}),
        IndexModel([("partition", 1), ("ask_at", 1)], partialFilterExpression={"state": ChunkState.SCANNED.value}),
    ],
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
    "clocks": [IndexModel([("active", 1)], partialFilterExpression={"active": True})],
    # A worker without announcements for an hour has ended: a new process has a new id.
    "workers": [
        IndexModel([("seen", 1)], expireAfterSeconds=3_600),
    ],
}


class MongoStore(MongoAudit):
    """`Store` on MongoDB.

    Every change of a job or chunk is stored only if the document's `rev` is still the one that was read.
    """

    def __init__(self, database: Database, keys: ChainKeys, *, keep_audit: timedelta = timedelta(days=365)) -> None:
        super().__init__(database, keys, keep_audit)
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
        """Create or replace the indexes, and migrate unfinished jobs of release 0.1."""
        await make_indexes(self._database, _INDEXES)
        await self._adopt()

    @dependency_errors()
    async def _adopt(self) -> None:
        """Set the partition of unfinished jobs that were created before jobs had one."""
        async for job in self._jobs.find({"settled": False, "partition": {"$exists": False}}, {"_id": 1}):
            partition = {"$set": {"partition": SCAN_PROGRESS.partition_of(str(job["_id"]))}}
            await self._chunks.update_many({"job_id": job["_id"]}, partition)
            await self._jobs.update_one({"_id": job["_id"]}, partition)

    async def advance_ids(self, above: int) -> None:
        """Raise every sequence above `above`. No other process may be allocating ids."""
        await advance_ids(self._database, SEQUENCES, above)

    @dependency_errors()
    async def time(self) -> datetime:
        hello = await self._database.command("hello", codec_options=self._database.codec_options)
        now: datetime = hello["localTime"]
        return now

    async def take_ids(self, name: str, count: int = 1) -> range:
        return await self._ids.setdefault(name, Ids(self._database, name)).take(count)

    # Subnets and policies

    @dependency_errors()
    async def exists(self, kind: Literal["subnets", "policies"], id_: int) -> bool:
        return await self._database[kind].find_one({"_id": id_}, {"_id": 1}) is not None

    @dependency_errors()
    async def owned(self, kind: Literal["subnets", "policies"], user_id: int, limit: int) -> int:
        return await self._database[kind].count_documents({"user_id": user_id}, limit=limit)

    async def add_subnet(self, subnet: Subnet) -> None:
        await self.add_subnets([subnet])

    async def add_subnets(self, subnets: Sequence[Subnet]) -> None:
        await insert_missing(self._subnets, [documents.write_subnet(subnet) for subnet in subnets])

    @dependency_errors()
    async def subnets_of(self, user_id: int, cidrs: Collection[str]) -> list[Subnet]:
        found = self._subnets.find({"user_id": user_id, "cidr": {"$in": list(cidrs)}})
        return [documents.read_subnet(each) async for each in found]

    async def subnets(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Subnet]:
        return await _owned(self._subnets, documents.read_subnet, keys)

    async def list_subnets(self, user_id: int, skip: int, limit: int) -> tuple[list[Subnet], int]:
        return await _page(self._subnets, documents.read_subnet, user_id, skip, limit)

    async def replace_subnet(self, subnet: Subnet, *, unchanged_since: datetime | None = None) -> bool:
        return await _replace(self._subnets, documents.write_subnet(subnet), unchanged_since)

    async def delete_subnet(self, user_id: int, subnet_id: int) -> bool:
        return await _delete(self._subnets, user_id, subnet_id)

    async def add_policy(self, policy: Policy) -> None:
        await insert_missing(self._policies, [documents.write_policy(policy)])

    async def policies(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Policy]:
        return await _owned(self._policies, documents.read_policy, keys)

    async def list_policies(self, user_id: int, skip: int, limit: int) -> tuple[list[Policy], int]:
        return await _page(self._policies, documents.read_policy, user_id, skip, limit)

    async def replace_policy(self, policy: Policy, *, unchanged_since: datetime | None = None) -> bool:
        return await _replace(self._policies, documents.write_policy(policy), unchanged_since)

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

    @dependency_errors()
    async def commands(self, ids: Collection[str]) -> dict[str, Command]:
        found = self._commands.find({"_id": {"$in": list(ids)}})
        return {document["_id"]: documents.read_command(document) async for document in found}

    async def accepted_submits(self) -> AsyncIterator[Command]:
        """Yield every command that created jobs."""
        async with dependency_errors():
            async for each in self._commands.find({"state": "accepted", "jobs": {"$ne": []}}):
                yield documents.read_command(each)

    @dependency_errors()
    async def commands_by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        if not keys:
            return {}
        found = self._commands.find({"$or": [{"user_id": user, "idempotency_key": key} for user, key in keys]})
        return {(each["user_id"], each["idempotency_key"]): documents.read_command(each) async for each in found}

    @dependency_errors()
    async def reject_command(self, command_id: str, status: int, error: str, rule: str) -> None:
        rejection = {"state": "rejected", "status": status, "error": error, "rule": rule}
        await self._commands.update_one({"_id": command_id, "state": "accepted"}, {"$set": rejection})

    # Jobs

    async def insert_jobs(self, jobs: Sequence[ScanJob]) -> None:
        await insert_missing(self._jobs, [documents.write_job(job) for job in jobs])

    @dependency_errors()
    async def jobs(self, ids: Collection[int]) -> dict[int, ScanJob]:
        if not ids:
            return {}
        found = self._jobs.find({"_id": {"$in": list(ids)}} | _NO_RECEIPT)
        return {
            job.id: job
            async for each in found
            if (job := documents.readable(documents.read_job, each, "jobs")) is not None
        }

    async def save_jobs(self, jobs: Sequence[ScanJob]) -> set[int]:
        return await _save(self._jobs, jobs, documents.write_job, documents.read_job, documents.JOB_CONSTANTS)

    @dependency_errors()
    async def list_jobs(
        self,
        user_id: int | None,
        statuses: Collection[JobStatus],
        skip: int,
        limit: int,
        *,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        since: datetime | None = None,
    ) -> tuple[list[Job], int]:
        wanted: Document = {} if user_id is None else {"user_id": user_id}
        if user_id is None:
            statuses = statuses or tuple(JobStatus)  # the index starts with the status
        if statuses:
            wanted["status"] = {"$in": [status.value for status in statuses]}
        asked = {"subnet_id": subnet_id, "policy_id": policy_id}
        wanted |= {name: value for name, value in asked.items() if value is not None}
        if since is not None:
            wanted["created_at"] = {"$gte": since}
            wanted["sort_time"] = {"$gte": since}  # never before it was created: bounds what is read of an index
        newest = self._jobs.find(wanted, documents.VIEW_FIELDS)
        page = newest.sort([("sort_time", -1), ("_id", -1)]).skip(skip).limit(limit)
        jobs = [
            job async for each in page if (job := documents.readable(documents.read_view, each, "jobs")) is not None
        ]
        return jobs, await self._jobs.count_documents(wanted)

    @dependency_errors()
    async def latest_jobs(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        wanted: Document = {"_id": {"$gt": after}, "settled": False}
        wanted["status"] = {"$in": [status.value for status in UNFINISHED]}
        if user_id is not None:
            wanted["user_id"] = user_id
        if changed_since is not None:
            wanted["updated_at"] = {"$gte": changed_since}
        return [each["_id"] async for each in self._jobs.find(wanted, {"_id": 1}).sort("_id", 1).limit(limit)]

    @dependency_errors()
    async def ended_jobs(
        self, user_id: int | None, since: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        # One range of an index each: many jobs that are cancelled together end at the same time.
        ranges: list[Document] = [{"end_time": {"$gte": since}}]
        if after is not None:
            ranges = [{"end_time": after[0], "_id": {"$gt": after[1]}}, {"end_time": {"$gt": after[0]}}]
        whose, keys = ({}, _ENDED) if user_id is None else ({"user_id": user_id}, _ENDED_OF_USER)
        found: list[tuple[datetime, int]] = []
        for each in ranges:
            if room := limit - len(found):
                page = self._jobs.find(whose | each, {"end_time": 1}).hint(keys).sort(_ENDED).limit(room)
                found += [(job["end_time"], job["_id"]) async for job in page]
        return found

    @dependency_errors()
    async def unsettled_jobs(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> list[int]:
        wanted: Document = {"settled": False, "_id": {"$gt": after}}
        if partitions is not None:
            wanted["partition"] = {"$in": list(partitions)}
        found = self._jobs.find(wanted, {"_id": 1}).sort("_id", 1).limit(limit)
        return [each["_id"] async for each in found]

    @dependency_errors()
    async def jobs_with_old_events(self, before: datetime, limit: int) -> list[int]:
        found = self._jobs.find({"outbox.at": {"$lt": before}}, {"_id": 1}).limit(limit)
        return [each["_id"] async for each in found]

    @dependency_errors()
    async def has_unfinished_jobs(self, subnet_id: int) -> bool:
        unfinished = [JobStatus.PENDING.value, JobStatus.RUNNING.value]
        wanted = {"subnet_id": subnet_id, "settled": False, "status": {"$in": unfinished}}
        return await self._jobs.find_one(wanted, {"_id": 1}) is not None

    @dependency_errors()
    async def unfinished_jobs(
        self,
        user_id: int,
        limit: int,
        *,
        statuses: Collection[JobStatus] = UNFINISHED,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        granted_by: str | None = None,
    ) -> list[int]:
        wanted: Document = {"user_id": user_id, "status": {"$in": [status.value for status in statuses]}}
        asked = {"subnet_id": subnet_id, "policy_id": policy_id, "granted_by": granted_by}
        wanted |= {name: value for name, value in asked.items() if value is not None}
        return [each["_id"] async for each in self._jobs.find(wanted, {"_id": 1}).limit(limit)]

    @dependency_errors()
    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        unfinished = {"settled": False, "status": {"$in": [status.value for status in UNFINISHED]}}
        groups = self._jobs.aggregate(
            [
                {"$match": {"user_id": {"$in": list(users)}} | unfinished},
                {"$group": {"_id": "$user_id", "jobs": {"$sum": 1}, "seconds": {"$sum": "$seconds_left"}}},
            ],
        )
        return {each["_id"]: Usage(each["jobs"], float(each["seconds"])) async for each in groups}

    # Deletions

    @dependency_errors()
    async def delete_job(self, job: ScanJob, receipt: Deletion) -> bool:
        document = documents.write_deletion(receipt) | {"due": receipt.requested_at}
        wanted = {"_id": job.id, "rev": job.rev} | _NO_RECEIPT
        return (await self._jobs.replace_one(wanted, document)).matched_count == 1

    @dependency_errors()
    async def due_deletions(self, now: datetime, limit: int) -> list[Deletion]:
        found = self._jobs.find({"due": {"$lte": now}}).sort("due", 1).limit(limit)
        return [
            receipt
            async for each in found
            if (receipt := documents.readable(documents.read_deletion, each, "jobs")) is not None
        ]

    @dependency_errors()
    async def advance_deletions(self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None) -> int:
        if not job_ids:
            return 0
        forget_at = {"$add": ["$$NOW", int(KEEP_RECEIPTS.total_seconds() * 1_000)]}
        at: Document = {"due": "$$REMOVE", "forget_at": forget_at} if due is None else {"due": due}
        moved = await self._jobs.update_many(
            {"_id": {"$in": list(job_ids)}, "deletion.stage": stage.value},
            [{"$set": {"deletion.stage": to.value} | at}],
        )
        return moved.matched_count

    @dependency_errors()
    async def delete_chunks(self, job_id: int, limit: int) -> int:
        deleted = 0
        while deleted < limit:
            page = self._chunks.find({"job_id": job_id}, {"_id": 1}).limit(min(_BATCH, limit - deleted))
            ids = [each["_id"] async for each in page]
            if not ids:
                break
            await self._chunks.delete_many({"_id": {"$in": ids}})
            deleted += len(ids)
        return deleted

    @dependency_errors()
    async def expired_jobs(
        self, before: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        ended: Document = {"end_time": {"$lt": before}, "settled": True}
        if after is not None:  # one range of the index, which begins with the jobs of the same millisecond
            ended["end_time"]["$gte"] = after[0]
            ended["$nor"] = [{"end_time": after[0], "_id": {"$lte": after[1]}}]
        found = self._jobs.find(ended, {"end_time": 1}).sort([("end_time", 1), ("_id", 1)]).limit(limit)
        return [(each["end_time"], each["_id"]) async for each in found]

    # Chunks

    async def insert_chunks(self, chunks: Sequence[Chunk]) -> None:
        await insert_missing(self._chunks, [documents.write_chunk(chunk) for chunk in chunks])

    async def chunks(self, ids: Collection[str]) -> dict[str, Chunk]:
        if not ids:
            return {}
        return {chunk.id: chunk for chunk in await self._find_chunks({"_id": {"$in": list(ids)}})}

    async def job_chunks(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        # Page by page, so that each page has its own timeout, in the order of an index whose keys never change: no chunk is
        # returned twice or missed because it changes its state meanwhile.
        while end is None or first < end:
            index = {"$gte": first} if end is None else {"$gte": first, "$lt": end}
            page = await self._job_page({"job_id": job_id, "index": index})
            for document in page:
                if (chunk := documents.readable(documents.read_chunk, document, "chunks")) is not None:
                    yield chunk
            if len(page) < _BATCH:
                return
            first = page[-1]["index"] + 1

    @dependency_errors()
    async def _job_page(self, wanted: Document) -> list[Document]:
        return await self._chunks.find(wanted).sort("index", 1).to_list(_BATCH)

    async def active_chunks(self, job_id: int, first: int) -> list[Chunk]:
        queued = {"$ne": ChunkState.QUEUED.value}
        return await self._find_chunks({"job_id": job_id, "index": {"$gte": first}, "state": queued})

    @dependency_errors()
    async def chunks_in(self, job_id: int, states: Collection[ChunkState], limit: int) -> list[str]:
        wanted = {"job_id": job_id, "state": {"$in": [state.value for state in states]}}
        return [each["_id"] async for each in self._chunks.find(wanted, {"_id": 1}).limit(limit)]

    async def save_chunks(self, chunks: Sequence[Chunk]) -> set[str]:
        return await _save(self._chunks, chunks, documents.write_chunk, documents.read_chunk, documents.CHUNK_CONSTANTS)

    @dependency_errors()
    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        # In one snapshot: a chunk that changes between two states could otherwise be missed in both.
        at_one_moment = self._chunks.with_options(read_concern=ReadConcern("snapshot"))
        begun = {"$in": ["$state", [ChunkState.RUNNING.value, ChunkState.SCANNED.value]]}
        groups = at_one_moment.aggregate(
            [
                {"$match": {"job_id": {"$in": list(job_ids)}, "state": {"$in": [state.value for state in OPEN]}}},
                {
                    "$group": {
                        "_id": "$job_id",
                        "open": {"$sum": 1},
                        "begun": {"$max": begun},
                        "lowest": {"$min": "$index"},
                    },
                },
            ],
        )
        found = {each["_id"]: Standing(each["open"], each["begun"], each["lowest"]) async for each in groups}
        return {job_id: found.get(job_id, Standing()) for job_id in job_ids}

    @dependency_errors()
    async def watched_chunks(self, partitions: Collection[int]) -> list[Held]:
        found = self._chunks.find(
            {"partition": {"$in": list(partitions)}, "held": True},
            documents.HELD_FIELDS,
        )
        return [documents.read_held(each) async for each in found]

    async def overdue_chunks(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        due = {"$or": [{"ask_at": None}, {"ask_at": {"$lt": now}}]}
        mine = {"partition": {"$in": list(partitions)}}
        return await self._find_chunks({"state": ChunkState.SCANNED.value} | mine | due, limit)

    @dependency_errors()
    async def chunk_counts(self, job_id: int) -> OpenChunks:
        states = [ChunkState.QUEUED.value, *(state.value for state in HELD)]
        groups = self._chunks.aggregate(
            [
                {"$match": {"job_id": job_id, "state": {"$in": states}}},
                {
                    "$group": {
                        "_id": {"$eq": ["$state", ChunkState.QUEUED.value]},
                        "n": {"$sum": 1},
                        "raw": {"$sum": {"$cond": ["$needs_raw", 1, 0]}},
                    },
                },
            ],
        )
        found = {each["_id"]: each async for each in groups}
        queued = found.get(True, {"n": 0, "raw": 0})
        return OpenChunks(
            queued=queued["n"],
            queued_raw=queued["raw"],
            held=found[False]["n"] if False in found else 0,
        )

    # Dispatch

    @dependency_errors()
    async def waiting_users(self, *, raw: bool) -> list[int]:
        found: list[int] = await self._chunks.distinct("user_id", _queued(raw=raw))
        return found

    @dependency_errors()
    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        may_go = {"$or": [{"not_before": None}, {"not_before": {"$lte": now}}]}
        wanted = _queued(raw=raw) | {"user_id": user_id} | may_go
        if skip:
            wanted["job_id"] = {"$nin": list(skip)}
        found = self._chunks.find(wanted, documents.CANDIDATE).sort("turn", 1).limit(limit)
        return [documents.read_candidate(each) async for each in found]

    @dependency_errors()
    async def first_turn(self, user_id: int) -> int:
        queued = {"state": ChunkState.QUEUED.value, "user_id": user_id, "needs_raw": {"$in": [False, True]}}
        first = await self._chunks.find_one(queued, {"turn": 1}, sort=[("turn", 1)])
        return first["turn"] if first else 0

    @dependency_errors()
    async def held(self) -> list[Held]:
        return [documents.read_held(each) async for each in self._chunks.find({"held": True}, documents.HELD_FIELDS)]

    @dependency_errors()
    async def clocks(self, users: Collection[int]) -> Clocks:
        found = self._clocks.find({"$or": [{"active": True}, {"_id": {"$in": [*users, _VIRTUAL]}}]})
        by_id = {each["_id"]: each async for each in found}
        virtual = by_id.pop(_VIRTUAL, {}).get("time", 0.0)
        return Clocks({user: documents.read_clock(each) for user, each in by_id.items()}, virtual)

    @dependency_errors()
    async def deactivate_clocks(self, left_out: Collection[int] = ()) -> None:
        active = [each["_id"] async for each in self._clocks.find({"active": True}, {"_id": 1})]
        # In this order: a chunk that is dispatched meanwhile counts in one of them.
        waiting = await self._chunks.distinct("user_id", {"state": ChunkState.QUEUED.value})
        busy = await self._chunks.distinct("user_id", {"state": {"$in": [state.value for state in HELD]}})
        idle = set(active) - (set(waiting) - set(left_out)) - set(busy)
        if idle:
            await self._clocks.update_many({"_id": {"$in": list(idle)}}, {"$set": {"active": False}})

    @dependency_errors()
    async def wake_clocks(self, clocks: Iterable[Clock], virtual: float) -> None:
        writes = [
            UpdateOne({"_id": clock.user_id}, {"$max": {"time": clock.time}, "$set": {"active": True}}, upsert=True)
            for clock in clocks
        ]
        writes.append(UpdateOne({"_id": _VIRTUAL}, {"$max": {"time": virtual}}, upsert=True))
        await self._clocks.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def charge(self, seconds: Mapping[int, float]) -> None:
        writes = [UpdateOne({"_id": user}, {"$inc": {"time": time}}, upsert=True) for user, time in seconds.items()]
        if writes:
            await self._clocks.bulk_write(writes, ordered=False)

    @dependency_errors()
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

    @dependency_errors()
    async def live_workers(self, within: timedelta) -> list[Credit]:
        since = {"$gt": ["$seen", {"$subtract": ["$$NOW", int(within.total_seconds() * 1_000)]}]}
        found = self._workers.find({"slots": {"$gt": 0}, "$expr": since})
        return [documents.read_worker(each) async for each in found]

    # Monitoring

    @dependency_errors()
    async def seconds_left(self) -> float:
        unfinished = {"settled": False, "status": {"$in": [status.value for status in UNFINISHED]}}
        total = self._jobs.aggregate(
            [{"$match": unfinished}, {"$group": {"_id": None, "seconds": {"$sum": "$seconds_left"}}}],
        )
        return sum([float(each["seconds"]) async for each in total])

    @dependency_errors()
    async def census(self) -> Census:
        jobs = self._jobs.aggregate(
            [
                {"$match": {"settled": False, "status": {"$in": [status.value for status in UNFINISHED]}}},
                {
                    "$group": {
                        "_id": "$status",
                        "n": {"$sum": 1},
                        "oldest": {"$min": "$created_at"},
                        "seconds": {"$sum": "$seconds_left"},
                    },
                },
                {"$set": {"age": _age("$oldest")}},
            ],
        )
        chunks = self._chunks.aggregate(
            [
                {"$match": {"state": {"$in": [state.value for state in OPEN]}}},
                {"$group": {"_id": "$state", "n": {"$sum": 1}}},
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
            slot_seconds=float(sum(each["seconds"] for each in by_status.values())),
            outbox_age=max([each["age"] async for each in unsent], default=0.0),
        )

    @dependency_errors()
    async def _find_chunks(self, wanted: Document, limit: int = 0) -> list[Chunk]:
        found = [
            documents.readable(documents.read_chunk, each, "chunks")
            async for each in self._chunks.find(wanted).limit(limit)
        ]
        return [chunk for chunk in found if chunk is not None]


def _age(time: Any) -> Document:
    """Return the seconds from `time` to the database's current time; `time` can be in the future due to clock skew."""
    return {"$max": [0.0, {"$divide": [{"$subtract": ["$$NOW", time]}, 1_000]}]}


def _queued(*, raw: bool) -> Document:
    return {"state": ChunkState.QUEUED.value, "needs_raw": {"$in": [False, True] if raw else [False]}}


@dependency_errors()
async def _save(
    collection: MongoCollection,
    changed: Sequence[_Revised],
    write: Callable[[_Revised], Document],
    read: Callable[[Document], _Revised],
    constants: AbstractSet[str],
) -> set[Any]:
    if not changed:
        return set()
    new = [replace(each, rev=each.rev + 1) for each in changed]
    result = await collection.bulk_write(
        [UpdateOne({"_id": each.id, "rev": each.rev - 1}, _update(write(each), constants)) for each in new],
        ordered=False,
    )
    if result.matched_count == len(changed):
        return set()
    # The response does not list the losers. A retried write can find its own first attempt, which is a success.
    found = collection.find({"_id": {"$in": [each.id for each in new]}} | _NO_RECEIPT)
    stored = {each["_id"]: read(each) async for each in found}
    return {each.id for each in new if stored.get(each.id) != each}


def _update(document: Document, constants: AbstractSet[str]) -> Document:
    """Return an update of the fields that can change, so that fields of a newer release are kept."""
    update: Document = {"$set": {name: value for name, value in document.items() if name not in constants}}
    if "rev" in document and "outbox" not in document and "seq" in document:
        update["$unset"] = {"outbox": ""}
    return update


async def _owned(
    collection: MongoCollection,
    read: Callable[[Document], _Owned],
    keys: Collection[tuple[int, int]],
) -> dict[tuple[int, int], _Owned]:
    found: dict[tuple[int, int], _Owned] = {}
    ordered = sorted(set(keys))
    for start in range(0, len(ordered), _BATCH):
        by_user: defaultdict[int, list[int]] = defaultdict(list)
        for user_id, id_ in ordered[start : start + _BATCH]:
            by_user[user_id].append(id_)
        wanted = {"$or": [{"user_id": user_id, "_id": {"$in": ids}} for user_id, ids in by_user.items()]}
        async with dependency_errors():
            found |= {(each["user_id"], each["_id"]): read(each) async for each in collection.find(wanted)}
    return found


@dependency_errors()
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


@dependency_errors()
async def _replace(collection: MongoCollection, document: Document, unchanged_since: datetime | None) -> bool:
    wanted = {"_id": document["_id"], "user_id": document["user_id"]}
    if unchanged_since is not None:
        wanted["updated_at"] = unchanged_since
    fields = {name: value for name, value in document.items() if name != "_id"}  # others are not this request's
    return (await collection.update_one(wanted, {"$set": fields})).matched_count == 1


@dependency_errors()
async def _delete(collection: MongoCollection, user_id: int, resource_id: int) -> bool:
    return (await collection.delete_one({"_id": resource_id, "user_id": user_id})).deleted_count == 1
