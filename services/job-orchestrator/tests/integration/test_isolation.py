"""One damaged document stops neither an orchestrator nor the other jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, NamedTuple

import pytest

from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.metrics import UNREADABLE
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import World, chunk, scan_job
from job_orchestrator_testing.things import THEN
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.runtime.mongo import Database


class _Damage(NamedTuple):
    """Fields that a document is given, and the state of the chunk 99-0 before it."""

    collection: str
    id_: Any
    state: ChunkState
    fields: dict[str, Any]

    @property
    def counted(self) -> str:
        """The name under which the document is counted: receipts are in the collection of jobs."""
        return "deletions" if "deletion" in self.fields else self.collection


_RECEIPT: Final = {"user_id": 8, "subnet_id": 1, "reason": "request", "requested_at": THEN, "stage": "results"}

_DAMAGES: Final = {
    "ports of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"ports": "foo"}),
    "address of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"first_address": "foo"}),
    "estimate of a queued chunk": _Damage("chunks", "99-0", ChunkState.QUEUED, {"estimate": None}),
    "estimate of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"estimate": None}),
    "worker of a held chunk": _Damage("chunks", "99-0", ChunkState.RUNNING, {"worker_id": None}),
    "address of a scanned chunk": _Damage("chunks", "99-0", ChunkState.SCANNED, {"first_address": "foo"}),
    "slices of a running job": _Damage("jobs", 99, ChunkState.STORED, {"chunk_addresses": 0}),
    "clock of a user": _Damage("clocks", 8, ChunkState.QUEUED, {"time": "foo", "active": True}),
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
    world = World(mongo_store)
    await world.start()
    await world.worker.announce()
    running = replace(scan_job(99, user_id=8, chunk_count=2, made=1), status=JobStatus.RUNNING, outbox=())
    await mongo_store.jobs.insert([running])
    partition = SCAN_PROGRESS.partition_of("99")
    damaged = chunk(id="99-0", job_id=99, user_id=8, partition=partition, turn=-5, state=damage.state, worker_id="w-1")
    await mongo_store.chunks.insert([damaged])
    before = UNREADABLE.labels(damage.counted)._value.get()
    seen = {"$currentDate": {"seen": True}} if damage.collection == "workers" else {}
    await database[damage.collection].update_one({"_id": damage.id_}, {"$set": damage.fields} | seen, upsert=True)

    await world.submit(user_id=7)
    await world.submit(user_id=8)
    await world.wait(12)
    others = {job.user_id: job.status for id_, job in (await mongo_store.jobs.get([1, 2])).items()}
    assert others == {7: JobStatus.COMPLETED, 8: JobStatus.COMPLETED}
    assert UNREADABLE.labels(damage.counted)._value.get() > before
