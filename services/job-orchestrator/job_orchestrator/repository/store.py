"""All repositories of the orchestrator's database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.domain.deletion import KEEP_RECEIPTS
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.repository import (
    access,
    audit,
    chunks,
    commands,
    deletions,
    dispatch,
    documents,
    jobs,
    resources,
    retention,
)
from job_orchestrator.repository.access import MongoAccess
from job_orchestrator.repository.audit import MongoAudit
from job_orchestrator.repository.chunks import MongoChunks
from job_orchestrator.repository.commands import MongoCommands
from job_orchestrator.repository.deletions import MongoDeletions
from job_orchestrator.repository.dispatch import MongoDispatch
from job_orchestrator.repository.jobs import MongoJobs
from job_orchestrator.repository.resources import MongoResources, MongoSubnets
from job_orchestrator.repository.retention import MongoRetention
from scanfleet.contracts import rest
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.runtime.mongo import Database, advance_ids, dependency_errors, make_indexes

SEQUENCES: Final = ("jobs", *(each.plural for each in rest.RESOURCES), "users", "revocations")


class MongoStore:
    """`Store` on MongoDB; `now` returns the platform's time."""

    def __init__(
        self,
        database: Database,
        keys: ChainKeys,
        *,
        now: Callable[[], datetime],
        keep_audit: timedelta = timedelta(days=365),
        keep_receipts: timedelta = KEEP_RECEIPTS,
    ) -> None:
        self.subnets = MongoSubnets(database)
        self.policies = MongoResources(database, rest.POLICIES.plural, documents.write_policy, documents.read_policy)
        self.audit = MongoAudit(database, keys, keep_audit, now)
        self.access = MongoAccess(database)
        self.commands = MongoCommands(database, now)
        self.jobs = MongoJobs(database)
        self.deletions = MongoDeletions(database, keep_receipts)
        self.retention = MongoRetention(database)
        self.chunks = MongoChunks(database, keep_receipts)
        self.dispatch = MongoDispatch(database)
        self._database = database

    async def prepare(self) -> None:
        """Create or replace the indexes, and migrate unfinished jobs of release 0.1."""
        for module in (resources, audit, access, commands, jobs, deletions, retention, chunks, dispatch):
            await make_indexes(self._database, module.INDEXES)
        await self._adopt()

    @dependency_errors()
    async def _adopt(self) -> None:
        """Set the partition of unfinished jobs, and of those with events, that were created before jobs had one."""
        jobs_, chunks_ = self._database["jobs"], self._database["chunks"]
        for needed in ({"settled": False}, {"outbox.at": {"$exists": True}}):  # each by its own partial index
            async for job in jobs_.find(needed | {"partition": {"$exists": False}}, {"_id": 1}):
                partition = {"$set": {"partition": SCAN_PROGRESS.partition_of(str(job["_id"]))}}
                await chunks_.update_many({"job_id": job["_id"]}, partition)
                await jobs_.update_one({"_id": job["_id"]}, partition)

    async def advance_ids(self, above: int) -> None:
        """Raise every sequence above `above`. No other process may be allocating ids."""
        await advance_ids(self._database, SEQUENCES, above)

    async def time(self) -> datetime:
        return await read_time(self._database)


async def platform_time(database: Database) -> PlatformTime:
    """Return the platform's time for a command that ends soon: it is read once."""
    clock = PlatformTime(partial(read_time, database))
    await clock.refresh()
    return clock


@dependency_errors()
async def read_time(database: Database) -> datetime:
    """Return the time of the database."""
    hello = await database.command("hello", codec_options=database.codec_options)
    now: datetime = hello["localTime"]
    return now
