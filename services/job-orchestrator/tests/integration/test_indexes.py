"""The store's queries on a real planner."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from fastapi import Request

from job_orchestrator.api.coverage import read_map
from job_orchestrator.api.state import Recorder
from job_orchestrator.api.tasks import read_ledger, read_waiting
from job_orchestrator.domain import plan
from job_orchestrator.domain.attempts import Attempt
from job_orchestrator.domain.census import MAX_COUNTED
from job_orchestrator.domain.chunk import HELD, OPEN, ChunkState
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.deletion import Deletion, Stage
from job_orchestrator.domain.fairness import Account, Credit
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator.domain.ledger import Tally
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import Simulation, chunk, replanned, scan_job, scan_policy
from job_orchestrator_testing.api import state_of
from job_orchestrator_testing.builders import THEN
from scanfleet.clock import utc_now
from scanfleet.contracts import queries
from scanfleet.contracts.messages import AuditEntry, JobStatus
from scanfleet.runtime.mongo import Database
from scanfleet.scanning.outcomes import address_at
from scanfleet.security.auth import Principal

pytestmark = pytest.mark.integration

USERS = 20
ENDED = 300  # jobs of one more user
CHUNKS = 2_000  # a hundred for each user, most of them queued
LATER = THEN + timedelta(seconds=1)


async def _chunks_of_job(store: MongoStore) -> None:
    assert len([each async for each in store.chunks.of_job(3)]) == CHUNKS // USERS


async def _part_of_job(store: MongoStore) -> None:
    assert len([each async for each in store.chunks.of_job(3, 10, 20)]) == 10


# Maximum number that each may read: of index keys or of documents, whichever is larger.
QUERIES: dict[str, tuple[Callable[[MongoStore], Awaitable[Any]], int]] = {
    "prepare": (lambda store: store.prepare(), 2 * USERS),
    "commands.get": (lambda store: store.commands.get(["c-1", "c-2"]), 5),
    "commands.expired": (lambda store: store.commands.expired(["c-1", "c-2"]), 5),
    "commands.by_key": (lambda store: store.commands.by_key([(7, "k-7"), (8, "k-8")]), 5),
    "commands.reject": (lambda store: store.commands.reject([Command(id="c-1", user_id=1, state="rejected")]), 2),
    "audit.page": (lambda store: store.audit.page(0, 10), 20),
    "audit.page by subject": (lambda store: store.audit.page(0, 10, subject="7"), 20),
    "audit.page by request": (lambda store: store.audit.page(0, 10, request_id="r-7"), 20),
    "audit.page by action": (lambda store: store.audit.page(0, 10, action="none"), 5),
    "audit.page by decision": (lambda store: store.audit.page(0, 10, decision="refused", since=LATER), 5),
    "audit.page by rule": (lambda store: store.audit.page(0, 10, rule="none"), 5),
    "audit.page by source": (lambda store: store.audit.page(0, 10, source="none"), 5),
    "audit.page by service": (lambda store: store.audit.page(0, 10, service="none"), 5),
    "subnets.exists": (lambda store: store.subnets.exists(3), 2),
    "jobs.get": (lambda store: store.jobs.get([1, 2, 3]), 6),
    "jobs.page": (lambda store: store.jobs.page(7, set(), 0, 10), 20),
    "jobs.page by status": (lambda store: store.jobs.page(7, {JobStatus.PENDING, JobStatus.RUNNING}, 0, 10), 20),
    "jobs.page of a subnet": (lambda store: store.jobs.page(7, set(), 0, 10, subnet_id=7), 5),
    "jobs.page of a policy": (lambda store: store.jobs.page(7, set(), 0, 10, policy_id=99), 5),
    "jobs.page since": (lambda store: store.jobs.page(7, set(), 0, 10, since=LATER), 5),
    "jobs.unsettled of partitions": (lambda store: store.jobs.unsettled(0, 5, [3, 4]), USERS),
    "jobs.page of all": (lambda store: store.jobs.page(None, set(), 0, 10), 2 * USERS + ENDED),  # counts them all
    "jobs.page of all by status": (lambda store: store.jobs.page(None, {JobStatus.RUNNING}, 0, 10), 5),
    "jobs.latest": (lambda store: store.jobs.latest(7, 0, 10), 20),
    "jobs.ended": (lambda store: store.jobs.ended(7, LATER, 10), 5),
    "jobs.latest of all": (lambda store: store.jobs.latest(None, 0, 5), 10),
    "jobs.unfinished": (lambda store: store.jobs.unfinished(7, 10, subnet_id=7), 5),
    "jobs.usage": (lambda store: store.jobs.usage([7, 8]), 6),
    "subnets.count": (lambda store: store.subnets.count(3, 10), 5),
    "deletions.due": (lambda store: store.deletions.due(LATER, 10, chunks=False), 2),
    "deletions.due of chunks": (lambda store: store.deletions.due(LATER, 10, chunks=True), 2),
    "deletions.page": (lambda store: store.deletions.page(7, list(Stage), 0, 10), 2),
    "deletions.page of all": (lambda store: store.deletions.page(None, [Stage.DONE], 0, 10), 2),
    "chunks.count": (lambda store: store.chunks.count(99), 2),
    "retention.shortest": (lambda store: store.retention.shortest(), 2),
    "retention.of": (lambda store: store.retention.of([3, 4]), 8),
    "jobs.expired": (lambda store: store.jobs.expired(THEN, 10), 2),
    "chunks.delete": (lambda store: store.chunks.delete(99, 10), 2),
    "chunks.count_open": (lambda store: store.chunks.count_open(3), CHUNKS // USERS + 5),
    "dispatch.live_workers": (lambda store: store.dispatch.live_workers(timedelta(minutes=1)), USERS),
    "jobs.seconds_left": (lambda store: store.jobs.seconds_left(), 2 * USERS),
    "jobs.unsettled": (lambda store: store.jobs.unsettled(10, 5), 10),
    "jobs.with_old_events": (lambda store: store.jobs.with_old_events(THEN, 10, [3]), 2),
    "jobs.has_unfinished": (lambda store: store.jobs.has_unfinished(3), 5),
    "subnets.equal_to": (lambda store: store.subnets.equal_to(7, [("lab", ScanTarget("127.9.8.0/24"))]), 5),
    "subnets.named": (lambda store: store.subnets.named(7, ["lab"]), 5),
    "subnets.count_excludes": (lambda store: store.subnets.count_excludes(7, [1, 2, 3]), 6),
    # Before the first id is assigned: a key for each subject of the audit log.
    "access.user_id": (lambda store: store.access.user_id("https://a.test", "x"), 20),
    "subnets.page": (lambda store: store.subnets.page(7, 0, 10), 5),
    "policies.page": (lambda store: store.policies.page(7, 0, 10), 5),
    "chunks.get": (lambda store: store.chunks.get(["3-0", "3-1"]), 5),
    "chunks.of_job": (_chunks_of_job, 200),
    "chunks.ids_in": (lambda store: store.chunks.ids_in([3], HELD, 5), 20),
    "chunks.ids_in of several jobs": (lambda store: store.chunks.ids_in([3, 4, 5], HELD, 5), 60),
    "chunks.of_job, a part": (_part_of_job, 30),
    "chunks.queued": (lambda store: store.chunks.queued(3, 10, 30), 21),
    "chunks.standings": (lambda store: store.chunks.standings([3, 4]), 220),
    "dispatch.held of partitions": (lambda store: store.dispatch.held([3, 4]), 25),
    "chunks.overdue": (lambda store: store.chunks.overdue(LATER, 500, [3, 4]), 20),
    "dispatch.waiting_users": (lambda store: store.dispatch.waiting_users(raw=True), 4 * USERS),
    "dispatch.waiting_users, not raw": (lambda store: store.dispatch.waiting_users(raw=False), 4 * USERS),
    "dispatch.queue": (lambda store: store.dispatch.queue(3, 5, LATER, raw=True), 15),
    "dispatch.queue, not raw": (lambda store: store.dispatch.queue(3, 5, LATER, raw=False), 15),
    "dispatch.queue without any of their jobs": (
        lambda store: store.dispatch.queue(3, 5, LATER, raw=True, jobs=[99]),
        5,
    ),
    "dispatch.first_turns": (lambda store: store.dispatch.first_turns({3, 4}), 6),
    "dispatch.first_turns without queued chunks": (lambda store: store.dispatch.first_turns({98, 99}), 2),
    "dispatch.held": (lambda store: store.dispatch.held(), 3 * USERS),
    "dispatch.accounts": (lambda store: store.dispatch.accounts([3, 99]), USERS + 5),
    "dispatch.deactivate_accounts": (lambda store: store.dispatch.deactivate_accounts(), 8 * USERS),
    "dispatch.activate_accounts": (lambda store: store.dispatch.activate_accounts([Account(3)], 1.0), 2),
    "dispatch.charge": (lambda store: store.dispatch.charge({3: 1.0}), 2),
    "dispatch.seen_workers": (
        lambda store: store.dispatch.seen_workers([Credit("w-3", "w-3", 2, raw=True, partition=1)]),
        2,
    ),
    "jobs.census": (lambda store: store.jobs.census(), 2 * USERS),
    "jobs.outbox_age": (lambda store: store.jobs.outbox_age(), 2),
    "deletions.census": (lambda store: store.deletions.census(), 2),
    "chunks.census": (lambda store: store.chunks.census(), CHUNKS),
    "jobs.save": (lambda store: store.jobs.save([scan_job(3)]), 5),
    "jobs.empty_outboxes": (lambda store: store.jobs.empty_outboxes({3: 1}), 5),
    "chunks.save": (lambda store: store.chunks.save([chunk(id="3-0", rev=99)]), 5),
}


@pytest.fixture
async def filled(mongo_store: MongoStore) -> MongoStore:
    states = [ChunkState.RUNNING, ChunkState.DISPATCHED, ChunkState.SCANNED, ChunkState.STORED]
    old = [scan_job(1_000 + n, user_id=USERS + 1, subnet_id=USERS + 1) for n in range(ENDED)]
    ended = [change(each, JobTrigger.CANCEL, LATER, settled=True) for each in old]
    await mongo_store.jobs.insert([replace(each, outbox=()) for each in ended])
    for user in range(1, USERS + 1):
        await mongo_store.jobs.insert([scan_job(user, user_id=user, subnet_id=user, settled=user > 15)])
        await mongo_store.chunks.insert(
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
        await mongo_store.commands.insert(
            [Command(id=f"c-{user}", user_id=user, state="accepted", idempotency_key=f"k-{user}")],
        )
        await mongo_store.audit.add(
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
        await mongo_store.dispatch.seen_workers([Credit(f"w-{user}", f"w-{user}", 2, raw=user % 2 == 0, partition=1)])
        await mongo_store.dispatch.activate_accounts([Account(user, 1.0)], 1.0)
    return mongo_store


async def test_newest_completed_jobs_are_found_without_reading_the_others(
    mongo_store: MongoStore, database: Database
) -> None:
    """The cost of a subnet's retention does not grow with its jobs."""
    target = ScanTarget("127.9.8.0/30")
    await mongo_store.subnets.add(Owned(id=1, user_id=7, name="x", content=target, created_at=THEN, updated_at=THEN))
    running = [change(scan_job(n), JobTrigger.START, THEN) for n in range(1, 201)]
    triggers = (JobTrigger.COMPLETE, JobTrigger.FAIL)
    await mongo_store.jobs.insert(
        [change(job, triggers[job.id % 2], THEN + timedelta(seconds=job.id), settled=True) for job in running]
    )
    await database.command("profile", 2)
    assert (await mongo_store.retention.of([1]))[1].newest == {198, 200}
    await database.command("profile", 0)
    found = database["system.profile"].find({"op": "command", "command.aggregate": "subnets"})
    assert [each["docsExamined"] + each["keysExamined"] <= 10 async for each in found] == [True]


async def test_total_of_a_list_is_counted_by_keys_alone(filled: MongoStore, database: Database) -> None:
    """The total of a user with many jobs is most of a list's cost: it takes the cheapest command and plan."""
    await database.command("profile", 2)
    jobs, total = await filled.jobs.page(USERS + 1, set(), 0, 10)
    await database.command("profile", 0)
    assert (len(jobs), total) == (10, ENDED)
    counts = await database["system.profile"].find({"command.count": "jobs"}).to_list(None)
    assert [each["planSummary"].split()[0] for each in counts] == ["COUNT_SCAN"]


async def test_queries_use_indexes(filled: MongoStore, database: Database) -> None:
    """No query scans a collection, and each reads about as much as it returns, whatever else is stored."""
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
            seen += "keysExamined" in each  # a $lookup of no collection has no summary of its plan
        assert seen, name
        await database["system.profile"].drop()
    assert wasteful == []


async def test_list_audit_counts_matching_entries_up_to_a_limit(
    filled: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit the total still leads a reader from page to page up to the last entry."""
    monkeypatch.setattr("job_orchestrator.repository.audit.MAX_COUNTED", 50)
    totals = [(await filled.audit.page(skip, 90, decision="allowed"))[1] for skip in (0, 90, 180)]
    assert totals == [91, 181, 10 * USERS]
    assert (await filled.audit.page(0, 10, decision="allowed"))[1] == 50
    assert (await filled.audit.page(0, 10, decision="none"))[1] == 0


async def test_queue_of_one_job_reads_no_chunk_of_the_others(mongo_store: MongoStore, database: Database) -> None:
    """The chunks of a job are found without going through those of forty others of its user, which come before them."""
    ids = [(job, n, 1_000 + n if job == 40 else n) for job in range(41) for n in range(50)]
    await mongo_store.chunks.insert(
        [chunk(id=f"{job}-{n}", job_id=job, user_id=7, index=n, turn=turn) for job, n, turn in ids]
    )
    await database.command("profile", 2)
    found = await mongo_store.dispatch.queue(7, 5, LATER, raw=True, jobs=[40])
    await database.command("profile", 0)
    assert [each.chunk_id for each in found] == [f"40-{n}" for n in range(5)]
    (read,) = await database["system.profile"].find({"op": "query", "command.find": "chunks"}).to_list(None)
    assert max(read["docsExamined"], read["keysExamined"]) <= 60


@pytest.mark.parametrize("user", [7, None])
async def test_page_of_ended_jobs_reads_only_its_own_keys(
    mongo_store: MongoStore, database: Database, user: int | None
) -> None:
    """A page reads one key for each of its jobs and no document, whatever number ended before, after or at the same time."""
    ended = [
        change(scan_job(n), JobTrigger.CANCEL, LATER + timedelta(seconds=n > 300), settled=True) for n in range(1, 401)
    ]
    await mongo_store.jobs.insert(ended)
    await database.command("profile", 2)
    found = await mongo_store.jobs.ended(user, THEN, 10, (LATER, 295))
    await database.command("profile", 0)
    assert [job_id for _, job_id in found] == list(range(296, 306))
    reads = await database["system.profile"].find({"op": "query", "command.find": "jobs"}).to_list(None)
    assert sum(each["docsExamined"] for each in reads) == 0
    assert sum(each["keysExamined"] for each in reads) <= 12


async def test_usage_of_a_user_is_read_from_the_index_only(mongo_store: MongoStore, database: Database) -> None:
    """Summing the unfinished jobs of a user reads a key for each and no document."""
    await mongo_store.jobs.insert([scan_job(n, user_id=7) for n in range(1, 501)])
    await mongo_store.jobs.insert([scan_job(n, user_id=8) for n in range(501, 601)])
    await database.command("profile", 2)
    usage = await mongo_store.jobs.usage([7])
    await database.command("profile", 0)
    assert usage[7].jobs == 500
    (read,) = await database["system.profile"].find({"op": "command", "command.aggregate": "jobs"}).to_list(None)
    assert read["docsExamined"] == 0
    assert read["keysExamined"] <= 502


async def test_census_counts_chunks_up_to_a_limit(
    filled: MongoStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a census does not grow with the backlog: it reads a limited number of keys of each state, and no chunk."""
    monkeypatch.setattr("job_orchestrator.repository.chunks.MAX_COUNTED", 50)
    await database.command("profile", 2)
    census = await filled.chunks.census()
    await database.command("profile", 0)
    assert census == dict.fromkeys([ChunkState.RUNNING, ChunkState.DISPATCHED, ChunkState.SCANNED], USERS) | {
        ChunkState.QUEUED: 50
    }
    reads = await database["system.profile"].find({"op": "command", "command.aggregate": "chunks"}).to_list(None)
    assert [each["docsExamined"] for each in reads] == [0] * len(OPEN)
    assert max(each["keysExamined"] for each in reads) <= 51


async def test_outboxes_with_the_same_last_event_are_emptied_by_one_update(
    mongo_store: MongoStore, database: Database
) -> None:
    """The clean-up costs an update for each `seq`, not for each job."""
    await mongo_store.jobs.insert([scan_job(n) for n in range(1, 51)])
    await mongo_store.jobs.save([change(scan_job(50), JobTrigger.CANCEL, LATER)])
    await database.command("profile", 2)
    await mongo_store.jobs.empty_outboxes(dict.fromkeys(range(1, 50), 1) | {50: 2})
    await database.command("profile", 0)
    updates = await database["system.profile"].find({"op": "update"}).to_list(None)
    assert sorted(each["nModified"] for each in updates) == [1, 49]


async def _read_by(database: Database, ask: Awaitable[Any], collection: str = "jobs") -> int:
    """Return the number of keys and documents that the queries on the collection examined."""
    await database.command("profile", 2)
    await ask
    await database.command("profile", 0)
    of_reads = {"ns": f"{database.name}.{collection}", "op": {"$in": ["query", "getmore"]}}
    reads = database["system.profile"].find(of_reads)
    examined: int = sum([each["keysExamined"] + each["docsExamined"] async for each in reads])
    await database["system.profile"].drop()
    return examined


async def test_report_reads_ended_chunks_once(mongo_store: MongoStore, database: Database) -> None:
    """While the first chunk is slow, a report reads the open chunks and those that ended since the last report."""
    ended = 4_000
    job = scan_job(1, cidr="127.0.0.0/16", policy=scan_policy(ports="1-100"), chunk_addresses=4, chunk_count=16_384)
    job = replace(change(job, JobTrigger.START, THEN), made=ended + 256, outbox=())
    await mongo_store.jobs.insert([job])
    chunks = list(plan.chunks(job, 0, job.made))
    states = [ChunkState.RUNNING, *[ChunkState.STORED] * ended, *[ChunkState.QUEUED] * 255]
    outcomes = {ChunkState.STORED: "ssss"}
    await mongo_store.chunks.insert(
        [
            replace(each, state=state, outcomes=outcomes.get(state, "...."))
            for each, state in zip(chunks, states, strict=True)
        ]
    )
    simulation = Simulation(mongo_store)
    reports: list[tuple[int, int]] = []
    for begun in (0, 1, 11):
        dispatched = (await mongo_store.chunks.get([f"1-{ended + 1 + n}" for n in range(begun)])).values()
        await mongo_store.chunks.save([replace(each, state=ChunkState.STORED, outcomes="aaaa") for each in dispatched])
        simulation.only.reporter.note([1])
        read = await _read_by(database, simulation.only.reporter.report(), "chunks")
        stored = (await mongo_store.jobs.get([1]))[1]
        reports.append((read, stored.machines_found))
        simulation.now += 1.1
    assert [found for _, found in reports] == [0, 4, 44]
    assert reports[0][0] > ended
    assert max(read for read, _ in reports[1:]) <= 300


async def test_old_events_are_read_of_one_partition_only(mongo_store: MongoStore, database: Database) -> None:
    """A partition without a leader, which keeps its events, costs the query of another partition nothing."""
    await mongo_store.jobs.insert([replace(scan_job(n), partition=3) for n in range(1, 301)])
    await mongo_store.jobs.insert([replace(scan_job(n), partition=4) for n in range(301, 401)])
    await mongo_store.jobs.insert([replace(scan_job(401), partition=5)])
    assert await _read_by(database, mongo_store.jobs.with_old_events(LATER, 10, [5])) <= 3
    assert await _read_by(database, mongo_store.jobs.with_old_events(LATER, 10, [4])) <= 25


async def test_sweep_with_nothing_to_repair_sends_two_queries(mongo_store: MongoStore, database: Database) -> None:
    """A sweep asks for overdue chunks and for old events, once for all partitions, although jobs have recent events."""
    simulation = Simulation(mongo_store)
    await simulation.start()
    await mongo_store.jobs.insert([scan_job(n, created_at=utc_now()) for n in range(1, 51)])
    await simulation.only.sweeper.sweep()  # reconciles all jobs and counts them, and again in ten seconds
    simulation.now += 1.0
    await database.command("profile", 2)
    await simulation.only.sweeper.sweep()
    await database.command("profile", 0)
    reads = database["system.profile"].find({"keysExamined": {"$exists": True}})
    sent = [each["ns"].rpartition(".")[2] async for each in reads]
    assert sorted(sent) == ["chunks", "jobs"]


@pytest.mark.parametrize("user", [7, None])
async def test_changed_jobs_are_found_without_reading_the_unchanged(
    mongo_store: MongoStore, database: Database, user: int | None
) -> None:
    """A heartbeat of a stream of all jobs reads a key for each changed job, and no document."""
    await mongo_store.jobs.insert([scan_job(n, user_id=7, updated_at=THEN) for n in range(1, 501)])
    await mongo_store.jobs.insert([scan_job(n, user_id=7, updated_at=LATER) for n in range(501, 506)])
    found: list[int] = []

    async def ask() -> None:
        found.extend(await mongo_store.jobs.latest(user, 0, 200, changed_since=LATER))

    assert await _read_by(database, ask()) <= 8
    assert found == list(range(501, 506))


async def test_sweep_reads_each_waiting_job_and_each_of_its_open_chunks_once(
    mongo_store: MongoStore, database: Database
) -> None:
    """Of two pages of jobs that wait for a worker with raw packets; held chunks and workers are read once for all pages."""
    jobs = [scan_job(n, policy=scan_policy(technique="syn"), chunk_count=1, made=1, outbox=()) for n in range(1, 701)]
    jobs = [replace(each, waiting="no_worker", waiting_since=THEN) for each in jobs]
    await mongo_store.jobs.insert(jobs)
    await mongo_store.chunks.insert([next(iter(plan.chunks(job, 0, 1))) for job in jobs])
    simulation = Simulation(mongo_store)
    await simulation.start()
    sweep = simulation.only.sweeper._reconcile_all
    await database.command("profile", 2)
    await sweep()
    await database.command("profile", 0)
    profile = database["system.profile"]
    read: dict[str, int] = {}
    held = 0
    async for each in profile.find({"op": {"$in": ["query", "getmore", "command"]}, "keysExamined": {"$exists": True}}):
        collection = each["ns"].rpartition(".")[2]
        read[collection] = read.get(collection, 0) + each["keysExamined"] + each["docsExamined"]
        held += "held" in each["command"].get("filter", {})
    assert held == 1
    assert read["chunks"] <= 1.1 * len(jobs)
    assert read["jobs"] <= 3.2 * len(jobs)  # two keys of two indexes and the document


async def test_due_deletions_are_read_of_their_stages_only(mongo_store: MongoStore, database: Database) -> None:
    """Deletions in the stage of chunks, which can be many, cost the query of the others nothing."""
    jobs = [change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True) for n in range(1, 301)]
    await mongo_store.jobs.insert(jobs)
    stages = {299: Stage.RESULTS, 300: Stage.WAITING}
    for job in jobs:
        stage = stages.get(job.id, Stage.CHUNKS)
        receipt = Deletion(job_id=job.id, user_id=7, subnet_id=1, reason="request", requested_at=THEN, stage=stage)
        assert await mongo_store.deletions.begin(job, receipt)
    assert await _read_by(database, mongo_store.deletions.due(LATER, 10, chunks=False)) <= 10
    assert await _read_by(database, mongo_store.deletions.due(LATER, 10, chunks=True)) <= 25


async def test_ledger_page_after_a_position_reads_four_chunks_for_each_of_its_addresses(
    mongo_store: MongoStore, database: Database
) -> None:
    """Its pages are the whole list, whether few or all of the addresses of 32,768 chunks are on it."""
    count = 32_768
    job = scan_job(1, cidr="127.0.0.0/16", policy=scan_policy(ports="1-100"), chunk_addresses=2, chunk_count=count)
    job = change(replace(job, made=count), JobTrigger.START, THEN)
    sparse, dense = Tally(job), Tally(job)
    for start in range(0, count, 1_024):
        stored = [replace(each, state=ChunkState.STORED) for each in plan.chunks(job, start, start + 1_024)]
        few = [replace(each, outcomes="sl" if each.index % 128 == 5 else "ss") for each in stored]
        for each in few:
            sparse.end(each)
            dense.end(replace(each, outcomes="ll"))
        await mongo_store.chunks.insert(few)
    job = change(replace(job, totals=sparse.totals), JobTrigger.FAIL, THEN, settled=True)
    await mongo_store.jobs.insert([job])
    state = state_of(Simulation(mongo_store))
    record = Recorder(Request({"type": "http"}), mongo_store.audit)

    async def listed(size: int) -> list[str]:
        found: list[str] = []
        after: int | None = 0
        while after is not None:
            await database.command("profile", 2)
            query = queries.Ledger(page_size=size, after=after)
            answer = await read_ledger(job_id=1, caller=Principal(7), state=state, record=record, query=query)
            await database.command("profile", 0)
            reads = database["system.profile"].find({"ns": f"{database.name}.chunks"})
            assert sum([each["docsExamined"] async for each in reads]) <= 4 * size
            await database["system.profile"].drop()
            found += [each.address for each in answer.not_probed.addresses]
            assert answer.not_probed.total == answer.counts.lost // 100
            after = answer.not_probed.next
        return found

    few_lost = [str(address_at("127.0.0.0", 2 * index + 1)) for index in range(5, count, 128)]
    assert await listed(100) == await listed(1_000) == few_lost
    await database["chunks"].update_many({}, {"$set": {"outcomes": "ll"}})
    assert not await mongo_store.jobs.save([replace(job, totals=dense.totals)])
    assert await listed(1_000) == [str(address_at("127.0.0.0", index)) for index in range(2 * count)]


async def test_page_of_jobs_reads_no_document_of_other_pages(mongo_store: MongoStore, database: Database) -> None:
    """Whatever the filter, jobs before the page are skipped, and matching ones counted, by their keys in one index."""
    jobs = [
        scan_job(
            n,
            user_id=7 if n <= 800 else 8,
            subnet_id=5 + n % 2 if n <= 800 else 7,
            policy_id=3 + n % 4 // 2 if n <= 800 else 5,
            created_at=THEN + timedelta(seconds=n),
        )
        for n in range(1, 1_001)
    ]
    await mongo_store.jobs.insert(
        [job if job.id % 3 else change(job, JobTrigger.CANCEL, job.created_at, settled=True) for job in jobs]
    )
    half = THEN + timedelta(seconds=400)
    keys = {7: 800, None: 1_000}
    filters: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"since": half}, None),
        ({"subnet_id": 5}, 400),
        ({"policy_id": 3}, 400),
        ({"subnet_id": 5, "policy_id": 3, "since": half}, 400),
    ]
    statuses = [(), (JobStatus.PENDING, JobStatus.CANCELLED)]
    skip, limit = 40, 10
    for user, asked, (wanted, most) in product(keys, statuses, filters):
        await database.command("profile", 2)
        page, total = await mongo_store.jobs.page(user, asked, skip, limit, **wanted)
        await database.command("profile", 0)
        reads = await database["system.profile"].find({"ns": f"{database.name}.jobs"}).to_list(None)
        await database["system.profile"].drop()
        case = (user, asked, wanted)
        assert (len(page), len(reads)) == (limit, 2), case
        assert total > skip + limit, case
        assert sum(each["docsExamined"] for each in reads) <= limit, case
        # The jobs to count, and about half of the jobs to skip can have been created earlier.
        assert sum(each["keysExamined"] for each in reads) <= (most or keys[user]) + 3 * (skip + limit), case


async def test_waiting_of_many_jobs_reads_the_backlog_once_a_second(
    mongo_store: MongoStore, database: Database
) -> None:
    """Fifty requests within a second share one sum over the keys of all unfinished jobs, and read no other job."""
    jobs = 500
    await mongo_store.jobs.insert([scan_job(n, user_id=7) for n in range(1, jobs + 1)])
    simulation = Simulation(mongo_store)
    await mongo_store.dispatch.seen_workers([Credit("w-1", "w-1", 2, raw=True, partition=1)])
    state = state_of(simulation)
    record = Recorder(Request({"type": "http"}), mongo_store.audit)

    async def ask(job_id: int) -> str:
        answer = await read_waiting(job_id=job_id, caller=Principal(7), state=state, record=record)
        return answer.reasons[0].kind

    await database.command("profile", 2)
    assert set(await asyncio.gather(*map(ask, range(1, 51)))) == {"queue"}
    assert await ask(51) == "queue"
    simulation.now += 1.1
    assert await ask(52) == "queue"
    await mongo_store.jobs.census()
    await database.command("profile", 0)
    sums = await database["system.profile"].find({"op": "command", "command.aggregate": "jobs"}).to_list(None)
    assert [each["docsExamined"] for each in sums] == [0, 0, 0]  # the third one is the census
    assert max(each["keysExamined"] for each in sums) <= jobs + 2
    reads = database["system.profile"].find({"op": "query", "command.find": "jobs"})
    assert sum([each["docsExamined"] async for each in reads]) == 52


async def test_map_reads_only_the_shown_fields_of_each_chunk(mongo_store: MongoStore, database: Database) -> None:
    """Neither attempts nor ports of a chunk are transferred, which can be a hundred times its outcomes."""
    job = scan_job(1, cidr="127.9.0.0/21", policy=scan_policy(ports=",".join(map(str, range(1, 1_000, 2)))))
    job = change(
        replace(job, plan=replace(job.plan, chunk_addresses=4, chunk_count=512), made=512), JobTrigger.START, THEN
    )
    await mongo_store.jobs.insert([job])
    attempts = tuple(Attempt(n=n, worker=f"w-{n}", at=THEN) for n in range(1, 21))
    await mongo_store.chunks.insert(
        [
            replace(each, state=ChunkState.STORED, outcomes="asas", attempts=attempts)
            for each in plan.chunks(job, 0, 512)
        ]
    )
    state = state_of(Simulation(mongo_store))
    request = Request({"type": "http", "headers": []})
    record = Recorder(request, mongo_store.audit)
    await database.command("profile", 2)
    answer = await read_map(
        request=request, job_id=1, caller=Principal(7), state=state, record=record, query=queries.Map()
    )
    await database.command("profile", 0)
    assert json.loads(bytes(answer.body))["blocks"][0]["letters"] == "asas" * 512
    reads = await database["system.profile"].find({"ns": f"{database.name}.chunks"}).to_list(None)
    assert sum(each["docsExamined"] for each in reads) == 512
    assert sum(each["responseLength"] for each in reads) <= 200 * 512


@pytest.mark.proves("F34", "G20")
async def test_sweep_of_many_large_waiting_jobs_has_bounded_cost(mongo_store: MongoStore, database: Database) -> None:
    """Of 500 waiting jobs of a /16 each later sweep reads a key each and a sixth of documents and keys of chunks."""
    count = 500
    first = replanned(scan_job(1, cidr="127.9.0.0/16", policy=scan_policy(ports="1-65535")))
    waiting = replace(first, made=plan.WINDOW, outbox=(), waiting="no_worker", waiting_since=THEN)
    jobs = [replace(waiting, id=n, user_id=n % 20 + 1) for n in range(1, count + 1)]
    await mongo_store.jobs.insert(jobs)
    for job in jobs:
        await mongo_store.chunks.insert(list(plan.chunks(job, 0, job.made)))
    simulation = Simulation(mongo_store)
    await simulation.start()
    blocked = [0.0]

    async def measure() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            blocked.append(time.thread_time() - before)

    for checked in (count, count // 6 + 1):
        measuring = asyncio.create_task(measure())
        await database.command("profile", 2)
        try:
            await simulation.only.sweeper.sweep()
        finally:
            measuring.cancel()
        await database.command("profile", 0)
        reads = await database["system.profile"].find({"keysExamined": {"$exists": True}}).to_list(None)
        await database["system.profile"].drop()
        of = {name: [each for each in reads if each["ns"] == f"{database.name}.{name}"] for name in ("jobs", "chunks")}
        assert sum(each["docsExamined"] for each in of["chunks"]) == 0
        assert sum(each["docsExamined"] for each in of["jobs"]) <= checked
        # A key of each job for the sweep and two for the census, and one for each document.
        assert sum(each["keysExamined"] for each in of["jobs"]) <= 3.1 * count + checked
        # The chunks of the checked jobs once, and those of the census up to its limit.
        assert sum(each["keysExamined"] for each in of["chunks"]) <= 1.01 * checked * plan.WINDOW + MAX_COUNTED
        assert len(reads) <= 50
        simulation.now += 11
    assert max(blocked) < 0.1


@pytest.mark.proves("F34", "G20")
async def test_held_chunks_are_read_once(mongo_store: MongoStore, database: Database) -> None:
    """Of 400 held chunks the checks of workers and of leases each read those that were dispatched since the last one."""
    first = chunk(id="1-0", state=ChunkState.RUNNING, attempt=1, worker_id="w-1", dispatched_at=THEN)
    simulation = Simulation(mongo_store)
    await simulation.start()
    for job_id, new in ((1, 400), (2, 0), (3, 3)):
        dispatched = [replace(first, id=f"{job_id}-{n}", job_id=job_id, index=n) for n in range(new)]
        await mongo_store.chunks.insert(dispatched)
        await database.command("profile", 2)
        await simulation.catch_up()
        await database.command("profile", 0)
        reads = await database["system.profile"].find({"ns": f"{database.name}.chunks"}).to_list(None)
        await database["system.profile"].drop()
        assert sum(each["docsExamined"] for each in reads) == 2 * new
        assert sum(each["keysExamined"] for each in reads) <= 2 * 430


async def test_idle_accounts_cost_one_query_while_none_is_active(mongo_store: MongoStore, database: Database) -> None:
    """Without an active account there is none to deactivate, so no chunk is queried."""
    await mongo_store.dispatch.charge({7: 1.0})
    await database.command("profile", 2)
    await mongo_store.dispatch.deactivate_accounts()
    await database.command("profile", 0)
    reads = database["system.profile"].find({"keysExamined": {"$exists": True}})
    assert [each["ns"].rpartition(".")[2] async for each in reads] == ["clocks"]
