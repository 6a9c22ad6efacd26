"""Store jobs in MongoDB."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import IndexModel, UpdateMany

from job_orchestrator.domain.census import JobCensus
from job_orchestrator.domain.job import MAX_AHEAD, UNFINISHED, ScanJob
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.retention import EndedJob
from job_orchestrator.repository import documents
from job_orchestrator.repository.compare_and_set import NO_RECEIPT, save
from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job, JobStatus
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.runtime.mongo import Database, Document, Ids, count, dependency_errors, insert_missing

_ENDED: Final = [("end_time", 1), ("_id", 1)]
_ENDED_OF_USER: Final = [("user_id", 1), *_ENDED]
_CHANGED: Final = [("settled", 1), ("updated_at", 1), ("status", 1), ("_id", 1)]
_CHANGED_OF_USER: Final = [("user_id", 1), *_CHANGED]
_OUTBOX: Final = [("partition", 1), ("outbox.at", 1)]

_NEWEST: Final = [("sort_time", -1), ("_id", -1)]


def _listed(*selected: str, also: Sequence[str]) -> IndexModel:
    """Return the index of lists of jobs, newest first, with given values of the fields `selected`.

    Filters on the fields `also` apply to its keys: jobs are skipped and counted without their documents.
    """
    keys = [*((field, 1) for field in selected), *_NEWEST]
    name = "_".join(f"{field}_{direction}" for field, direction in keys)
    return IndexModel([*keys, *((field, 1) for field in also)], name=f"{name}_v2")


INDEXES: Final = {
    "jobs": [
        _listed("user_id", also=["status", "created_at"]),
        _listed("user_id", "status", also=["created_at"]),
        _listed("subnet_id", also=["user_id", "policy_id", "status", "created_at"]),
        _listed("policy_id", also=["user_id", "subnet_id", "status", "created_at"]),
        _listed("status", also=["created_at"]),  # for administrators, who list all users' jobs
        # With status and age, unfinished jobs are counted from the index alone, and the sweep finds those that have changed.
        IndexModel(
            [
                ("settled", 1),
                ("_id", 1),
                ("partition", 1),
                ("status", 1),
                ("created_at", 1),
                ("seconds_left", 1),
                ("waiting", 1),
            ],
            partialFilterExpression={"settled": False},
            name="settled_1__id_1_partition_1_status_1_created_at_1_seconds_left_1_v2",
        ),
        # Jobs of a user that ended while a stream was interrupted.
        IndexModel(_ENDED_OF_USER, name="end_time_1_user_id_1_v2"),
        IndexModel(_ENDED),  # the same of all users, and expired jobs page by page
        # With it the unfinished jobs of a user are counted from the index alone.
        IndexModel(
            [("user_id", 1), ("settled", 1), ("status", 1), ("seconds_left", 1)],
            partialFilterExpression={"settled": False},
        ),
        # Heartbeats of the streams of all jobs read those that changed since the last one, from the index alone.
        IndexModel(_CHANGED, partialFilterExpression={"settled": False}),
        IndexModel(_CHANGED_OF_USER, partialFilterExpression={"settled": False}),
        IndexModel([("forget_at", 1)], expireAfterSeconds=0, sparse=True),
        IndexModel(_OUTBOX, partialFilterExpression={"outbox.at": {"$exists": True}}, name="outbox.at_1_v2"),
        IndexModel([("subnet_id", 1)], partialFilterExpression={"settled": False}),
    ],
}

_UNFINISHED: Final = {"settled": False, "status": {"$in": [status.value for status in UNFINISHED]}}

_DUE: Final = {"$ne": ["$waiting", "window"]}  # jobs outside the hours of their grant are no work for now
_SECONDS_DUE: Final = {"$cond": [_DUE, "$seconds_left", 0]}


class MongoJobs:
    """`JobRepository` on MongoDB."""

    def __init__(self, database: Database) -> None:
        self._jobs = database["jobs"]
        self._ids = Ids(database, "jobs")

    async def take_ids(self, count: int = 1) -> range:
        return await self._ids.take(count)

    async def insert(self, jobs: Sequence[ScanJob]) -> None:
        await insert_missing(self._jobs, [documents.write_job(job) for job in jobs])

    @dependency_errors()
    async def missing(self, ids: Collection[int]) -> set[int]:
        found = self._jobs.find({"_id": {"$in": list(ids)}}, {"_id": 1})
        return set(ids) - {each["_id"] async for each in found}

    @dependency_errors()
    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]:
        if not ids:
            return {}
        found = self._jobs.find({"_id": {"$in": list(ids)}} | NO_RECEIPT)
        return {job.id: job for job in await documents.read_all(documents.read_job, found, "jobs")}

    @dependency_errors()
    async def snapshots(self, ids: Collection[int]) -> list[rest.Snapshot]:
        found = self._jobs.find({"_id": {"$in": list(ids)}} | NO_RECEIPT, documents.SNAPSHOT_FIELDS).sort("_id", 1)
        return await documents.read_all(documents.read_snapshot, found, "jobs") if ids else []

    async def save(self, jobs: Sequence[ScanJob]) -> set[int]:
        return await save(self._jobs, jobs, documents.update_job, documents.read_job)

    @dependency_errors()
    async def page(
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
            wanted["sort_time"] = {"$gte": since}  # never before `created_at`; bounds the range of the index
        newest = self._jobs.find(wanted, documents.VIEW_FIELDS)
        page = newest.sort(_NEWEST).skip(skip).limit(limit)
        jobs, total = await asyncio.gather(
            documents.read_all(documents.read_view, page, "jobs"), count(self._jobs, wanted)
        )
        return jobs, total

    @dependency_errors()
    async def latest(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        wanted: Document = {"_id": {"$gt": after}} | _UNFINISHED
        if user_id is not None:
            wanted["user_id"] = user_id
        if changed_since is not None:
            wanted["updated_at"] = {"$gte": changed_since}
        found = self._jobs.find(wanted, {"_id": 1}).sort("_id", 1).limit(limit)
        if changed_since is not None:
            found = found.hint(_CHANGED if user_id is None else _CHANGED_OF_USER)
        return [each["_id"] async for each in found]

    @dependency_errors()
    async def ended(
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
                # Without times beyond the year 9999, which sort last.
                found += [(time, job["_id"]) async for job in page if isinstance(time := job["end_time"], datetime)]
        return found

    @dependency_errors()
    async def unsettled(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> dict[int, tuple[str, str]]:
        wanted: Document = {"settled": False, "_id": {"$gt": after}}
        if partitions is not None:
            wanted["partition"] = {"$in": list(partitions)}
        found = self._jobs.find(wanted, {"status": 1, "waiting": 1}).sort("_id", 1).limit(limit)
        return {each["_id"]: (each.get("status", ""), each.get("waiting") or "") for each in await found.to_list(limit)}

    @dependency_errors()
    async def with_old_events(self, before: datetime, limit: int, partitions: Collection[int]) -> list[ScanJob]:
        mine = {"partition": {"$in": list(partitions)}}
        old = [mine | {"outbox.at": at} for at in ({"$lt": before}, {"$gt": before + MAX_AHEAD})]
        found = self._jobs.find({"$or": old}).batch_size(max(limit, 10))  # damaged jobs may be before a readable one
        return await documents.read_all(documents.read_job, found, "jobs", limit)

    @dependency_errors()
    async def empty_outboxes(self, seqs: Mapping[int, int]) -> None:
        ids: defaultdict[int, list[int]] = defaultdict(list)
        for id_, seq in seqs.items():
            ids[seq].append(id_)
        emptied = {"$unset": {"outbox": ""}, "$inc": {"rev": 1}}
        full = {"outbox": {"$exists": True}}
        # Most jobs have the same `seq`, and one update of many documents takes less than half the time of one of each.
        writes = [
            UpdateMany({"_id": {"$in": some}, "outbox.event.seq": {"$not": {"$gt": seq}}} | full, emptied)
            for seq, some in ids.items()
        ]
        if writes:
            await self._jobs.bulk_write(writes, ordered=False)

    @dependency_errors()
    async def has_unfinished(self, subnet_id: int) -> bool:
        wanted = {"subnet_id": subnet_id} | _UNFINISHED
        return await self._jobs.find_one(wanted, {"_id": 1}) is not None

    @dependency_errors()
    async def unfinished(
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
    async def expired(self, before: datetime, limit: int, after: tuple[datetime, int] | None = None) -> list[EndedJob]:
        ended: Document = {"end_time": {"$lt": before}, "settled": True}
        if after is not None:  # one range of the index, which begins with the jobs of the same millisecond
            ended["end_time"]["$gte"] = after[0]
            ended["$nor"] = [{"end_time": after[0], "_id": {"$lte": after[1]}}]
        # A damaged job must not stop the others, nor shorten the page; it is kept.
        found = self._jobs.find(ended, {"end_time": 1, "subnet_id": 1}).sort(_ENDED).batch_size(limit)
        return await documents.read_all(documents.read_ended, found, "jobs", limit)

    @dependency_errors()
    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        groups = self._jobs.aggregate(
            [
                {"$match": {"user_id": {"$in": list(users)}} | _UNFINISHED},
                {"$group": {"_id": "$user_id", "jobs": {"$sum": 1}, "seconds": {"$sum": "$seconds_left"}}},
            ],
        )
        return {each["_id"]: Usage(each["jobs"], float(each["seconds"])) async for each in groups}

    @dependency_errors()
    async def seconds_left(self) -> float:
        total = self._jobs.aggregate(
            [{"$match": _UNFINISHED}, {"$group": {"_id": None, "seconds": {"$sum": _SECONDS_DUE}}}]
        )
        return sum([float(each["seconds"]) async for each in total])

    @dependency_errors()
    async def census(self) -> JobCensus:
        jobs = self._jobs.aggregate(
            [
                {"$match": _UNFINISHED},
                {
                    "$group": {
                        "_id": "$status",
                        "n": {"$sum": 1},
                        "oldest": {"$min": {"$cond": [_DUE, date("$created_at"), None]}},
                        "seconds": {"$sum": _SECONDS_DUE},
                    },
                },
                {"$set": {"age": age("$oldest")}},
            ],
        )
        by_status = {JobStatus(each["_id"]): each async for each in jobs}
        return JobCensus(
            numbers=Counter({status: each["n"] for status, each in by_status.items()}),
            ages_seconds={status: each["age"] for status, each in by_status.items()},
            slot_seconds=float(sum(each["seconds"] for each in by_status.values())),
        )

    @dependency_errors()
    async def outbox_age(self) -> float:
        return max(await asyncio.gather(*map(self._outbox_age, range(SCAN_PROGRESS.partitions))))

    async def _outbox_age(self, partition: int) -> float:
        # Without a hint: a process of another release may have replaced the index. It is the only one that begins with the
        # partition, in the order of time.
        oldest = self._jobs.aggregate(
            [
                {"$match": {"partition": partition, "outbox.at": {"$type": "date"}, "$expr": {"$isArray": "$outbox"}}},
                {"$limit": 1},
                {"$project": {"age": age({"$min": {"$map": {"input": "$outbox.at", "in": date("$$this")}}})}},
            ],
        )
        return max([each["age"] async for each in oldest], default=0.0)


def age(time: Any) -> Document:
    """Return the seconds from `time` to the database's current time; `time` can be in the future due to clock skew."""
    return {"$max": [0.0, {"$divide": [{"$subtract": ["$$NOW", time]}, 1_000]}]}


def date(value: Any) -> Document:
    """Return `value` if it is a date, otherwise null: a damaged document must not end a census of all."""
    return {"$cond": [{"$eq": [{"$type": value}, "date"]}, value, None]}


def from_now(period: timedelta) -> Document:
    """Return the time that is `period` after the database's current time."""
    return {"$add": ["$$NOW", int(period.total_seconds() * 1_000)]}
