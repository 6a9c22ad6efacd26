"""One damaged document stops neither an orchestrator nor the other jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, NamedTuple

import pytest
from bson.datetime_ms import DatetimeMS

from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator.metrics import UNREADABLE
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import Simulation, chunk, scan_job
from job_orchestrator_testing.builders import THEN
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.runtime.mongo import Database


class _Damage(NamedTuple):
    """Fields that a document is given, as an update's pipeline sets them, and the state of the chunk 99-0 before it."""

    collection: str
    id_: Any
    state: ChunkState
    fields: dict[str, Any]
    unreadable: bool = True

    @property
    def counted(self) -> str:
        """The name under which the document is counted: receipts are in the collection of jobs."""
        return "deletions" if "deletion" in self.fields else self.collection


_RECEIPT: Final = {"user_id": 8, "subnet_id": 1, "reason": "request", "requested_at": THEN, "stage": "results"}
_ENDED: Final = {"status": JobStatus.COMPLETED.value, "settled": True, "end_time": THEN}

_DAMAGES: Final = {
    "ports of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"ports": "foo"}),
    "address of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"first_address": "foo"}),
    "estimate of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"estimate": None}),
    "estimate of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"estimate": None}),
    "worker of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"worker_id": None}),
    "address of a scanned chunk": _Damage("chunks", "99-0", ChunkState.SCANNED, {"first_address": "foo"}),
    "worker of a scanned chunk": _Damage("chunks", "99-0", ChunkState.SCANNED, {"worker_id": ""}, unreadable=False),
    "turn of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"turn": None}),
    "missing turn of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"turn": "$$REMOVE"}),
    "user of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"user_id": {"id": 8}}, unreadable=False),
    "time of a held chunk without a zone": _Damage(
        "chunks", "99-0", ChunkState.RUNNING, {"dispatched_at": "2026-11-29T14:00:00"}
    ),
    "revision of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"rev": "3"}),
    "missing revision of a scanned chunk": _Damage("chunks", "99-0", ChunkState.SCANNED, {"rev": "$$REMOVE"}),
    "checks of a scanned chunk": _Damage("chunks", "99-0", ChunkState.SCANNED, {"asked": 2_000}, unreadable=False),
    "user of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"user_id": {"id": 8}}),
    "time of a job": _Damage("jobs", 99, ChunkState.QUEUED, {"created_at": "yesterday"}),
    "time of a job beyond the year 9999": _Damage("jobs", 99, ChunkState.QUEUED, {"created_at": DatetimeMS(2**61)}),
    "missing revision of a job": _Damage("jobs", 99, ChunkState.QUEUED, {"rev": "$$REMOVE"}),
    "revision of a job": _Damage("jobs", 99, ChunkState.QUEUED, {"rev": "3"}),
    "time of an event": _Damage("jobs", 99, ChunkState.QUEUED, {"outbox": [{"at": "yesterday"}]}),
    "subnet of an ended job": _Damage("jobs", 99, ChunkState.STORED, _ENDED | {"subnet_id": [1]}),
    "time of an ended job": _Damage("jobs", 99, ChunkState.STORED, _ENDED | {"end_time": [THEN], "subnet_id": 98}),
    "machines of a running job": _Damage("jobs", 99, ChunkState.QUEUED, {"machines_found": -1}, unreadable=False),
    "slices of a running job": _Damage("jobs", 99, ChunkState.STORED, {"chunk_addresses": 0}),
    "account of a user": _Damage("clocks", 8, ChunkState.QUEUED, {"time": "foo", "active": True}),
    "text in the account of a user": _Damage(
        "clocks", 8, ChunkState.QUEUED, {"time": "5.5", "active": True}, unreadable=False
    ),
    "global virtual time": _Damage("clocks", "virtual", ChunkState.QUEUED, {"time": "foo"}),
    "time of a receipt": _Damage(
        "jobs", 98, ChunkState.QUEUED, {"due": THEN, "deletion": _RECEIPT | {"requested_at": "yesterday"}}
    ),
    "counts of a receipt": _Damage(
        "jobs", 98, ChunkState.QUEUED, {"due": THEN, "deletion": _RECEIPT | {"counts": {"rows": "foo"}}}
    ),
    "announcement of a worker": _Damage("workers", "w-9", ChunkState.QUEUED, {"slots": 2, "raw": "foo"}),
}


@pytest.mark.integration
@pytest.mark.proves("F27", "G17")
@pytest.mark.parametrize("damage", _DAMAGES.values(), ids=_DAMAGES)
async def test_damaged_document_does_not_block_other_jobs(
    mongo_store: MongoStore, database: Database, damage: _Damage
) -> None:
    """Other jobs of the same user and of others complete, while the damaged document is counted."""
    simulation = Simulation(mongo_store, keep=timedelta(days=1))
    await simulation.start()
    await simulation.worker.announce()
    running = replace(
        scan_job(99, user_id=8, chunk_addresses=2, chunk_count=2, made=1), status=JobStatus.RUNNING, outbox=()
    )
    await mongo_store.jobs.insert([running])
    partition = SCAN_PROGRESS.partition_of("99")
    common: dict[str, Any] = {"job_id": 99, "user_id": 8, "partition": partition, "turn": -5, "outcomes": ".."}
    damaged = chunk(id="99-0", state=damage.state, worker_id="w-1", **common)
    await mongo_store.chunks.insert([damaged])
    before = UNREADABLE.labels(damage.counted)._value.get()
    seen = {"seen": "$$NOW"} if damage.collection == "workers" else {}
    await database[damage.collection].update_one({"_id": damage.id_}, [{"$set": damage.fields | seen}], upsert=True)

    await simulation.submit(user_id=7)
    await simulation.submit(user_id=8)
    await simulation.wait(12)
    others = {job.user_id: job.status for id_, job in (await mongo_store.jobs.get([1, 2])).items()}
    assert others == {7: JobStatus.COMPLETED, 8: JobStatus.COMPLETED}
    assert (UNREADABLE.labels(damage.counted)._value.get() > before) is damage.unreadable


async def _damage(database: Database, ids: Iterable[int], **fields: Any) -> None:
    await database["jobs"].update_many({"_id": {"$in": list(ids)}}, {"$set": fields})


@pytest.mark.integration
async def test_census_with_damaged_times_counts_the_others(mongo_store: MongoStore, database: Database) -> None:
    """The ages are those of the oldest readable job and event."""
    await mongo_store.jobs.insert([scan_job(id_) for id_ in (1, 2, 3, 4)])
    await _damage(database, [4], outbox={"at": THEN - timedelta(days=9)})  # sorts first, and is no array
    await _damage(database, [1, 2], created_at="yesterday", outbox=[{"at": "yesterday"}])
    await _damage(database, [2], outbox=[{"at": "yesterday"}, {"at": THEN}])
    await _damage(database, [3], **{"outbox.0.at": THEN - timedelta(days=1)})
    census = await mongo_store.jobs.census()
    age = (utc_now() - THEN).total_seconds()
    assert census.numbers[JobStatus.PENDING] == 4
    assert census.ages_seconds[JobStatus.PENDING] == pytest.approx(age, abs=60)
    assert await mongo_store.jobs.outbox_age() == pytest.approx(age + 86_400, abs=60)


@pytest.mark.integration
async def test_page_of_expired_jobs_contains_the_readable_ones(mongo_store: MongoStore, database: Database) -> None:
    """A full page of damaged jobs does not end the walk."""
    running = [change(scan_job(id_), JobTrigger.START, THEN) for id_ in range(1, 6)]
    await mongo_store.jobs.insert([change(job, JobTrigger.COMPLETE, THEN, settled=True) for job in running])
    await _damage(database, [1, 2, 4], subnet_id=[1])
    expired = await mongo_store.jobs.expired(THEN + timedelta(seconds=1), 2)
    assert [job.id for job in expired] == [3, 5]


@pytest.mark.integration
async def test_old_events_behind_damaged_jobs_are_found(mongo_store: MongoStore, database: Database) -> None:
    """A full page of damaged jobs does not hide the events of another job."""
    await mongo_store.jobs.insert([scan_job(id_) for id_ in range(1, 5)])
    await _damage(database, [1, 2, 3], chunk_addresses=0)
    old = await mongo_store.jobs.with_old_events(THEN + timedelta(seconds=1), 2, range(SCAN_PROGRESS.partitions))
    assert [job.id for job in old] == [4]


@pytest.mark.integration
async def test_damaged_jobs_with_old_events_are_not_read_one_by_one(
    mongo_store: MongoStore, database: Database
) -> None:
    """Also a sweep that asks for one job reads ten at once."""
    await mongo_store.jobs.insert([scan_job(id_) for id_ in range(1, 42)])
    await _damage(database, range(1, 41), chunk_addresses=0)
    await database.command("profile", 2)
    [job] = await mongo_store.jobs.with_old_events(THEN + timedelta(seconds=1), 1, range(SCAN_PROGRESS.partitions))
    await database.command("profile", 0)
    assert job.id == 41
    assert 1 < await database["system.profile"].count_documents({"op": {"$in": ["query", "getmore"]}}) <= 6
