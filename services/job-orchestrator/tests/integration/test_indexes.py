"""The store's queries on a real planner."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from job_orchestrator.domain.chunk import HELD, ChunkState
from job_orchestrator.domain.fairness import Clock, Credit
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator.domain.store import Command
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import chunk, scan_job
from job_orchestrator_testing.things import THEN
from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry, JobStatus
from scanfleet.mongo import Database

pytestmark = pytest.mark.integration

USERS = 20
CHUNKS = 2_000  # a hundred for each user, most of them queued
LATER = THEN + timedelta(seconds=1)


async def _chunks_of_job(store: MongoStore) -> None:
    assert len([each async for each in store.job_chunks(3)]) == CHUNKS // USERS


async def _part_of_job(store: MongoStore) -> None:
    assert len([each async for each in store.job_chunks(3, 10, 20)]) == 10


# What each may look at: index keys or documents, whichever are more.
QUERIES: dict[str, tuple[Callable[[MongoStore], Awaitable[Any]], int]] = {
    "commands": (lambda store: store.commands(["c-1", "c-2"]), 5),
    "commands_by_key": (lambda store: store.commands_by_key([(7, "k-7"), (8, "k-8")]), 5),
    "reject_command": (lambda store: store.reject_command("c-1", 400, "", ""), 2),
    "list_audit": (lambda store: store.list_audit(0, 10), 20),
    "list_audit by subject": (lambda store: store.list_audit(0, 10, subject="7"), 20),
    "list_audit by request": (lambda store: store.list_audit(0, 10, request_id="r-7"), 20),
    "list_audit by action": (lambda store: store.list_audit(0, 10, action="none"), 5),
    "list_audit by decision": (lambda store: store.list_audit(0, 10, decision="refused", since=LATER), 5),
    "list_audit by rule": (lambda store: store.list_audit(0, 10, rule="none"), 5),
    "list_audit by source": (lambda store: store.list_audit(0, 10, source="none"), 5),
    "exists": (lambda store: store.exists("subnets", 3), 2),
    "jobs": (lambda store: store.jobs([1, 2, 3]), 6),
    "list_jobs": (lambda store: store.list_jobs(7, set(), 0, 10), 20),
    "list_jobs by status": (lambda store: store.list_jobs(7, {JobStatus.PENDING, JobStatus.RUNNING}, 0, 10), 20),
    "list_jobs of a subnet": (lambda store: store.list_jobs(7, set(), 0, 10, subnet_id=7), 5),
    "list_jobs of a policy": (lambda store: store.list_jobs(7, set(), 0, 10, policy_id=99), 5),
    "list_jobs since": (lambda store: store.list_jobs(7, set(), 0, 10, since=LATER), 5),
    "unsettled_jobs of partitions": (lambda store: store.unsettled_jobs(0, 5, [3, 4]), USERS),
    "list_jobs of all": (lambda store: store.list_jobs(None, set(), 0, 10), 2 * USERS),
    "list_jobs of all by status": (lambda store: store.list_jobs(None, {JobStatus.RUNNING}, 0, 10), 5),
    "latest_jobs": (lambda store: store.latest_jobs(7, 0, 10), 20),
    "ended_jobs": (lambda store: store.ended_jobs(7, LATER, 10), 5),
    "latest_jobs of all": (lambda store: store.latest_jobs(None, 0, 5), 10),
    "unfinished_jobs": (lambda store: store.unfinished_jobs(7, 10, subnet_id=7), 5),
    "usage": (lambda store: store.usage([7, 8]), 6),
    "owned": (lambda store: store.owned("subnets", 3, 10), 5),
    "due_deletions": (lambda store: store.due_deletions(LATER, 10), 2),
    "expired_jobs": (lambda store: store.expired_jobs(THEN, 10), 2),
    "delete_chunks": (lambda store: store.delete_chunks(99, 10), 2),
    "chunk_counts": (lambda store: store.chunk_counts(3), CHUNKS // USERS + 5),
    "live_workers": (lambda store: store.live_workers(timedelta(minutes=1)), USERS),
    "seconds_left": (lambda store: store.seconds_left(), 2 * USERS),
    "unsettled_jobs": (lambda store: store.unsettled_jobs(10, 5), 10),
    "jobs_with_old_events": (lambda store: store.jobs_with_old_events(THEN, 10), 5),
    "has_unfinished_jobs": (lambda store: store.has_unfinished_jobs(3), 5),
    "subnets_of": (lambda store: store.subnets_of(7, ["127.9.8.0/24", "127.9.9.0/24"]), 5),
    "list_subnets": (lambda store: store.list_subnets(7, 0, 10), 5),
    "list_policies": (lambda store: store.list_policies(7, 0, 10), 5),
    "chunks": (lambda store: store.chunks(["3-0", "3-1"]), 5),
    "job_chunks": (_chunks_of_job, 200),
    "chunks_in": (lambda store: store.chunks_in(3, HELD, 5), 20),
    "job_chunks, a part": (_part_of_job, 30),
    "active_chunks": (lambda store: store.active_chunks(3, 0), 120),
    "standings": (lambda store: store.standings([3, 4]), 220),
    "watched_chunks": (lambda store: store.watched_chunks([3, 4]), 25),
    "overdue_chunks": (lambda store: store.overdue_chunks(LATER, 500, [3, 4]), 20),
    "waiting_users": (lambda store: store.waiting_users(raw=True), 4 * USERS),
    "waiting_users, not raw": (lambda store: store.waiting_users(raw=False), 4 * USERS),
    "queue": (lambda store: store.queue(3, 5, LATER, raw=True), 15),
    "queue, not raw": (lambda store: store.queue(3, 5, LATER, raw=False), 15),
    "queue without any of their jobs": (lambda store: store.queue(3, 5, LATER, raw=True, skip=[3]), CHUNKS // USERS),
    "first_turn": (lambda store: store.first_turn(3), 5),
    "held": (lambda store: store.held(), 3 * USERS),
    "clocks": (lambda store: store.clocks([3, 99]), USERS + 5),
    "deactivate_clocks": (lambda store: store.deactivate_clocks(), 8 * USERS),
    "wake_clocks": (lambda store: store.wake_clocks([Clock(3)], 1.0), 2),
    "charge": (lambda store: store.charge({3: 1.0}), 2),
    "seen_workers": (lambda store: store.seen_workers([Credit("w-3", "w-3", 2, raw=True, partition=1)]), 2),
    "census": (lambda store: store.census(), CHUNKS),
    "save_jobs": (lambda store: store.save_jobs([scan_job(3)]), 5),
    "save_chunks": (lambda store: store.save_chunks([chunk(id="3-0", rev=99)]), 5),
}


@pytest.fixture
async def filled(mongo_store: MongoStore) -> MongoStore:
    states = [ChunkState.RUNNING, ChunkState.DISPATCHED, ChunkState.SCANNED, ChunkState.STORED]
    for user in range(1, USERS + 1):
        await mongo_store.insert_jobs([scan_job(user, user_id=user, subnet_id=user, settled=user > 15)])
        await mongo_store.insert_chunks(
            [
                chunk(
                    id=f"{user}-{n}",
                    job_id=user,
                    user_id=user,
                    index=n,
                    turn=n,
                    state=states[n] if n < len(states) else ChunkState.QUEUED,
                    partition=user % 12,
                    worker_id=f"w-{user}",
                    needs_raw=n % 2 == 0,
                )
                for n in range(CHUNKS // USERS)
            ],
        )
        await mongo_store.insert_commands(
            [Command(id=f"c-{user}", user_id=user, state="accepted", idempotency_key=f"k-{user}")],
        )
        await mongo_store.add_audit(
            [
                AuditEntry(
                    id=f"{user}-{n}",
                    time=utc_now(),
                    service="job-orchestrator",
                    subject=str(user),
                    source="192.0.2.17",
                    action="create_subnet",
                    target="/api/v1/subnet/1",
                    decision="allowed",
                    rule="",
                    request_id=f"r-{user}",
                )
                for n in range(10)
            ],
        )
        await mongo_store.seen_workers([Credit(f"w-{user}", f"w-{user}", 2, raw=user % 2 == 0, partition=1)])
        await mongo_store.wake_clocks([Clock(user, 1.0)], 1.0)
    return mongo_store


async def test_every_query_has_its_index(filled: MongoStore, database: Database) -> None:
    """No query scans a collection, and each looks at about as much as it answers, whatever else is there."""
    wasteful: list[str] = []
    for name, (ask, bound) in QUERIES.items():
        before = utc_now()
        await database.command("profile", 2)
        await ask(filled)
        await database.command("profile", 0)
        operations = database["system.profile"].find(
            {"ns": {"$ne": f"{database.name}.system.profile"}, "ts": {"$gte": before}}
        )
        seen = 0
        async for each in operations:
            looked = max(each.get("keysExamined", 0), each.get("docsExamined", 0))
            if "COLLSCAN" in each.get("planSummary", "") or looked > bound:
                wasteful.append(f"{name}: {looked} for {each.get('planSummary')}")
            seen += "planSummary" in each
        assert seen, name
        await database["system.profile"].drop()
    assert wasteful == []


async def test_list_audit_counts_matching_entries_up_to_a_limit(
    filled: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit the total still leads a reader from page to page up to the last entry."""
    monkeypatch.setattr("job_orchestrator.repository.audit.MAX_COUNTED", 50)
    totals = [(await filled.list_audit(skip, 90, decision="allowed"))[1] for skip in (0, 90, 180)]
    assert totals == [91, 181, 10 * USERS]
    assert (await filled.list_audit(0, 10, decision="allowed"))[1] == 50
    assert (await filled.list_audit(0, 10, decision="none"))[1] == 0


async def test_queue_passes_over_skipped_jobs_in_the_index_alone(filled: MongoStore, database: Database) -> None:
    """Finding that all of a user's queued chunks are of skipped jobs reads no chunk."""
    await database.command("profile", 2)
    assert await filled.queue(3, 5, LATER, raw=True, skip=[3]) == []
    await database.command("profile", 0)
    (read,) = await database["system.profile"].find({"op": "query", "command.find": "chunks"}).to_list(None)
    assert read["docsExamined"] == 0


@pytest.mark.parametrize("user", [7, None])
async def test_a_page_of_ended_jobs_reads_its_own_keys(
    mongo_store: MongoStore, database: Database, user: int | None
) -> None:
    """A page costs a key for each of its jobs, however many ended before or after, or at the same time; and no document."""
    ended = [
        change(scan_job(n), JobTrigger.CANCEL, LATER + timedelta(seconds=n > 300), settled=True) for n in range(1, 401)
    ]
    await mongo_store.insert_jobs(ended)
    await database.command("profile", 2)
    found = await mongo_store.ended_jobs(user, THEN, 10, (LATER, 295))
    await database.command("profile", 0)
    assert [job_id for _, job_id in found] == list(range(296, 306))
    reads = await database["system.profile"].find({"op": "query", "command.find": "jobs"}).to_list(None)
    assert sum(each["docsExamined"] for each in reads) == 0
    assert sum(each["keysExamined"] for each in reads) <= 12


async def test_usage_of_a_user_is_read_from_the_index_alone(mongo_store: MongoStore, database: Database) -> None:
    """Summing the unfinished jobs of a user reads a key for each and no document."""
    await mongo_store.insert_jobs([scan_job(n, user_id=7) for n in range(1, 501)])
    await mongo_store.insert_jobs([scan_job(n, user_id=8) for n in range(501, 601)])
    await database.command("profile", 2)
    usage = await mongo_store.usage([7])
    await database.command("profile", 0)
    assert usage[7].jobs == 500
    (read,) = await database["system.profile"].find({"op": "command", "command.aggregate": "jobs"}).to_list(None)
    assert read["docsExamined"] == 0
    assert read["keysExamined"] <= 502
