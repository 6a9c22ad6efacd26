"""One suite for both stores: the one in memory, and the one in MongoDB."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, ChunkState, cancel, dispatch
from job_orchestrator.domain.fairness import Clock, Credit
from job_orchestrator.domain.job import JobTrigger, ScanJob, change, create, published
from job_orchestrator.domain.store import Command, OpenChunks, Policy, Store, Subnet
from job_orchestrator.testing import chunk, scan_job, scan_policy
from job_orchestrator.testing.things import THEN
from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry, JobStatus

LATER = THEN + timedelta(seconds=1)


def subnet(id_: int = 1, **changed: Any) -> Subnet:
    fields: dict[str, Any] = {
        "user_id": 7,
        "name": "lab",
        "cidr": "127.9.8.0/24",
        "exclude": ("127.9.8.1/32",),
        "created_at": THEN,
        "updated_at": LATER,
    }
    return Subnet(id=id_, **(fields | changed))


def policy(id_: int = 1, **changed: Any) -> Policy:
    fields: dict[str, Any] = {
        "user_id": 7,
        "name": "lab",
        "scan": scan_policy(scripts=("banner", "default"), max_rate=100, host_timeout=None),
        "created_at": THEN,
        "updated_at": LATER,
    }
    return Policy(id=id_, **(fields | changed))


async def all_chunks(store: Store, job_id: int) -> list[Chunk]:
    return [each async for each in store.job_chunks(job_id)]


# Ids


async def test_ids_grow_from_one_and_are_never_given_twice(store: Store) -> None:
    """Ids of one name start at 1, parallel takers get different ones, and another name counts by itself."""
    assert await store.take_ids("jobs", 3) == range(1, 4)
    taken = await asyncio.gather(*(store.take_ids("jobs", 2) for _ in range(10)))
    assert sorted(id_ for block in taken for id_ in block) == list(range(4, 24))
    assert await store.take_ids("subnets") == range(1, 2)


# Subnets and policies


async def test_subnets_are_their_owners_alone(store: Store) -> None:
    """A subnet reads back whole for its user, and for nobody else is there, replaced or deleted."""
    await store.add_subnet(subnet(1))
    await store.add_subnet(subnet(2, user_id=8, exclude=()))
    assert await store.subnets(7, [1, 2, 3]) == [subnet(1)]
    assert await store.subnets(8, [1]) == []
    assert not await store.replace_subnet(subnet(1, user_id=8, name="mine now"))
    assert not await store.delete_subnet(8, 1)
    assert await store.replace_subnet(subnet(1, name="new", cidr="127.0.0.0/30", exclude=()))
    assert await store.subnets(7, [1]) == [subnet(1, name="new", cidr="127.0.0.0/30", exclude=())]
    assert await store.delete_subnet(7, 1)
    assert not await store.delete_subnet(7, 1)
    assert not await store.replace_subnet(subnet(1))
    assert await store.subnets(7, [1]) == []


async def test_policies_are_their_owners_alone(store: Store) -> None:
    """A policy reads back whole for its user, and for nobody else is there, replaced or deleted."""
    await store.add_policy(policy(1))
    assert await store.policies(7, [1, 2]) == [policy(1)]
    assert await store.policies(8, [1]) == []
    assert not await store.replace_policy(policy(1, user_id=8))
    assert not await store.delete_policy(8, 1)
    assert await store.replace_policy(policy(1, name="new"))
    assert await store.policies(7, [1]) == [policy(1, name="new")]
    assert await store.delete_policy(7, 1)
    assert await store.policies(7, [1]) == []


async def test_resources_are_listed_newest_first_by_page(store: Store) -> None:
    """A page holds the user's own, newest first, and the total counts them all."""
    for id_ in range(1, 6):
        await store.add_subnet(subnet(id_))
        await store.add_policy(policy(id_))
    await store.add_subnet(subnet(6, user_id=8))
    await store.add_policy(policy(6, user_id=8))
    assert await store.list_subnets(7, 1, 2) == ([subnet(4), subnet(3)], 5)
    assert await store.list_policies(7, 4, 2) == ([policy(1)], 5)
    assert await store.list_policies(7, 10**11, 100) == ([], 5)
    assert await store.list_subnets(9, 0, 10) == ([], 0)


async def test_a_resource_of_anybody_is_known_to_exist(store: Store) -> None:
    """A subnet or policy exists, whoever's it is, until it is deleted."""
    await store.add_subnet(subnet(1))
    await store.add_policy(policy(2))
    assert [await store.exists("subnets", id_) for id_ in (1, 2)] == [True, False]
    assert [await store.exists("policies", id_) for id_ in (1, 2)] == [False, True]
    await store.delete_subnet(7, 1)
    assert not await store.exists("subnets", 1)


# The audit log


def entry(id_: str, **changed: Any) -> AuditEntry:
    fields: dict[str, Any] = {
        "time": THEN,
        "service": "job-orchestrator",
        "subject": "7",
        "source": "192.0.2.17",
        "action": "create_subnet",
        "target": "/api/v1/subnet/1",
        "decision": "allowed",
        "rule": "",
        "request_id": "r-1",
    }
    return AuditEntry(id=id_, **(fields | changed))


async def test_the_audit_log_is_read_newest_first_and_never_changed(store: Store) -> None:
    """Entries come back whole, newest first, by page, subject and request; a second one of an id changes nothing."""
    a, b = entry("a"), entry("b", subject="", rule="token", decision="refused", count=9, request_id="r-2")
    c = entry("c", time=LATER, subject="8")
    await store.add_audit([a, c])
    await store.add_audit([b, entry("a", subject="9")])
    assert await store.list_audit(0, 10) == ([c, b, a], 3)
    assert await store.list_audit(1, 1) == ([b], 3)
    assert await store.list_audit(0, 10, subject="7") == ([a], 1)
    assert await store.list_audit(0, 10, subject="") == ([b], 1)
    assert await store.list_audit(0, 10, subject="7", request_id="r-2") == ([], 0)
    assert await store.list_audit(0, 10, request_id="r-1") == ([c, a], 2)


# Commands


def command(id_: str = "c-1", **changed: Any) -> Command:
    fields: dict[str, Any] = {"user_id": 7, "state": "accepted", "body": "hash", "jobs": (scan_job(1), scan_job(2))}
    return Command(id=id_, **(fields | changed))


@pytest.mark.parametrize(
    "given",
    [
        command(idempotency_key="k", jobs=(scan_job(1, exclude=("127.9.8.1/32",), traceparent="00-1"), scan_job(2))),
        command(jobs=(), cancels=3, body=""),
        command(state="rejected", jobs=(), status=400, error="no"),
        command(state="expired", jobs=(), body=""),
    ],
)
async def test_a_command_reads_back_whole(store: Store, given: Command) -> None:
    """Every field of a command, its jobs with their first events among them, is kept."""
    assert await store.insert_commands([given]) == {"c-1": given}
    assert await store.commands(["c-1", "c-2"]) == {"c-1": given}


async def test_the_largest_command_is_kept(store: Store) -> None:
    """A thousand subnets with a hundred thousand excludes among them, of a policy as long as one can be, fit."""
    excludes = tuple(f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:{number:x}/128" for number in range(100))
    ports = ",".join(str(port) for port in range(1, 4_000, 2))[:9_000].rpartition(",")[0]
    one = replace(scan_job(1, policy=scan_policy(ports=ports)), exclude=excludes)
    largest = command(jobs=tuple(replace(one, id=10**9 + number) for number in range(1_000)))
    await store.insert_commands([largest])
    assert await store.commands(["c-1"]) == {"c-1": largest}


async def test_the_first_insert_of_a_command_stands(store: Store) -> None:
    """Of acceptance and expiry under one id the first stands, whichever it is, and both callers are told it."""
    accepted, expired = command(), command(state="expired", jobs=(), body="")
    assert await store.insert_commands([accepted]) == {"c-1": accepted}
    assert await store.insert_commands([expired]) == {"c-1": accepted}
    other = replace(expired, id="c-2")
    assert await store.insert_commands([other]) == {"c-2": other}
    assert await store.insert_commands([replace(accepted, id="c-2")]) == {"c-2": other}


async def test_an_idempotency_key_is_taken_once_for_each_user(store: Store) -> None:
    """Of commands with one user and key the first stands, in one batch or two; other users and keyless ones are free."""
    first, second = command("c-1", idempotency_key="k"), command("c-2", idempotency_key="k", jobs=(scan_job(9),))
    stranger = command("c-3", idempotency_key="k", user_id=8)
    keyless = [command("c-4"), command("c-5")]
    stands = await store.insert_commands([first, second, stranger, *keyless])
    assert stands == {"c-1": first, "c-2": first, "c-3": stranger, "c-4": keyless[0], "c-5": keyless[1]}
    assert await store.insert_commands([replace(second, id="c-6")]) == {"c-6": first}
    assert await store.commands_by_key([(7, "k"), (8, "k"), (9, "k"), (7, "x")]) == {
        (7, "k"): first,
        (8, "k"): stranger,
    }
    assert await store.commands_by_key([]) == {}


async def test_parallel_inserts_of_one_key_leave_one_command(store: Store) -> None:
    """Fifty commands race for one key: one is inserted, and all are told of that one."""
    race = [command(f"c-{n}", idempotency_key="k", jobs=(scan_job(n),)) for n in range(1, 51)]
    answers = await asyncio.gather(*(store.insert_commands([each]) for each in race))
    stood = {answer[f"c-{n}"].id for n, answer in enumerate(answers, 1)}
    assert len(stood) == 1
    assert len(await store.commands([each.id for each in race])) == 1


async def test_a_cancel_that_came_too_late_is_rejected_for_good(store: Store) -> None:
    """Rejecting changes an accepted command once; what was decided before stays."""
    cancel_ = command(jobs=(), cancels=3, body="")
    await store.insert_commands([cancel_])
    await store.reject_command("c-1", 400, "too late", "state")
    await store.reject_command("c-1", 404, "other", "owner")
    rejected = replace(cancel_, state="rejected", status=400, error="too late", rule="state")
    assert (await store.commands(["c-1"]))["c-1"] == rejected


# Jobs


def running(job: ScanJob, at: Any = LATER) -> ScanJob:
    return change(published(job, {out.event.event_id for out in job.outbox}), JobTrigger.START, at)


async def test_a_job_reads_back_whole(store: Store) -> None:
    """Every field of a job is kept, its policy, times and outbox among them."""
    job = scan_job(
        1,
        exclude=("127.9.8.1/32", "127.9.8.2/32"),
        policy=scan_policy(ports="T:1-9,U:53", scripts=("banner",), host_timeout=5),
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        cancel_command="c-2",
    )
    job = change(job, JobTrigger.START, LATER)
    ended = change(job, JobTrigger.FAIL, LATER, progress=7, machines_found=3, error="nmap died")
    await store.insert_jobs([replace(ended, settled=True)])
    assert await store.jobs([1, 2]) == {1: replace(ended, settled=True)}
    assert [type(out.event).__name__ for out in ended.outbox] == ["JobCreated", "JobStarted", "JobFailed"]


async def test_inserting_a_job_again_changes_nothing(store: Store) -> None:
    """A job that is there stays as it is, and those beside it are inserted."""
    await store.insert_jobs([scan_job(1)])
    await store.insert_jobs([scan_job(1, user_id=8), scan_job(2)])
    assert await store.jobs([1, 2]) == {1: scan_job(1), 2: scan_job(2)}


async def test_saving_is_a_compare_and_set(store: Store) -> None:
    """A save counts if nobody saved since the read: it raises `rev`; whoever else saves is told that he lost."""
    await store.insert_jobs([scan_job(1, exclude=("127.9.8.1/32",)), scan_job(2)])
    read = await store.jobs([1, 2])
    first = replace(read[1], progress=1)
    assert await store.save_jobs([first]) == set()
    assert await store.save_jobs([replace(read[1], progress=2), replace(read[2], progress=3)]) == {1}
    stored = await store.jobs([1, 2])
    assert stored[1] == replace(first, rev=1)
    assert stored[2] == replace(read[2], progress=3, rev=1)
    assert await store.save_jobs([]) == set()
    assert await store.save_jobs([scan_job(99)]) == {99}


async def test_winners_beside_a_loser_are_no_losers(store: Store) -> None:
    """In a batch with one lost race every other job, whatever it holds, is known to be saved."""
    jobs = [scan_job(id_, exclude=("127.9.8.1/32",), policy=scan_policy(scripts=("banner",))) for id_ in (1, 2)]
    await store.insert_jobs(jobs)
    await store.save_jobs([jobs[0]])
    assert await store.save_jobs([running(job) for job in jobs]) == {1}


async def test_one_of_many_racing_saves_wins(store: Store) -> None:
    """Twenty writers change one job at once: exactly one of them does not lose."""
    await store.insert_jobs([scan_job(1)])
    job = (await store.jobs([1]))[1]
    results = await asyncio.gather(*(store.save_jobs([replace(job, progress=n)]) for n in range(1, 21)))
    winners = [n for n, losers in enumerate(results, 1) if not losers]
    assert len(winners) == 1
    assert (await store.jobs([1]))[1] == replace(job, progress=winners[0], rev=1)


async def test_jobs_are_listed_by_start_pending_first(store: Store) -> None:
    """Pending jobs come first, then the newest start, ties by id; one that never started stands where it ended."""
    never_started = change(scan_job(3), JobTrigger.CANCEL, LATER + timedelta(seconds=1))
    await store.insert_jobs(
        [
            scan_job(1),
            running(scan_job(2)),
            never_started,
            running(scan_job(4)),
            running(scan_job(5), LATER + timedelta(seconds=5)),
            scan_job(6),
            scan_job(7, user_id=8),
        ],
    )

    async def ids(statuses: set[JobStatus], skip: int = 0, limit: int = 10) -> tuple[list[int], int]:
        jobs, total = await store.list_jobs(7, statuses, skip, limit)
        return [job.id for job in jobs], total

    assert await ids(set()) == ([6, 1, 5, 3, 4, 2], 6)
    assert await ids(set(), 2, 3) == ([5, 3, 4], 6)
    assert await ids({JobStatus.RUNNING}) == ([5, 4, 2], 3)
    assert await ids({JobStatus.RUNNING, JobStatus.CANCELLED}, 1, 2) == ([3, 4], 4)
    assert await ids({JobStatus.FAILED}) == ([], 0)
    everyone, total = await store.list_jobs(None, set(), 0, 3)
    assert ([job.id for job in everyone], total) == ([7, 6, 1], 7)
    pending, total = await store.list_jobs(None, {JobStatus.PENDING}, 0, 10)
    assert ([job.id for job in pending], total) == ([7, 6, 1], 3)


async def test_unfinished_jobs_are_found_by_filter(store: Store) -> None:
    """Pending and running jobs of one user match by every filter that is given, at most so many."""
    await store.insert_jobs(
        [
            scan_job(1),
            running(scan_job(2, subnet_id=2)),
            scan_job(3, subnet_id=2, policy_id=5),
            change(scan_job(4, subnet_id=2), JobTrigger.CANCEL, LATER),
            scan_job(5, user_id=8, subnet_id=2),
        ]
    )
    assert sorted(await store.unfinished_jobs(7, 10)) == [1, 2, 3]
    assert sorted(await store.unfinished_jobs(7, 10, subnet_id=2)) == [2, 3]
    assert await store.unfinished_jobs(7, 10, subnet_id=2, statuses=[JobStatus.RUNNING]) == [2]
    assert await store.unfinished_jobs(7, 10, subnet_id=2, policy_id=5) == [3]
    assert await store.unfinished_jobs(7, 10, policy_id=6) == []
    assert len(await store.unfinished_jobs(7, 2)) == 2


async def test_unsettled_jobs_are_found_page_by_page(store: Store) -> None:
    """Only jobs that are not settled are found, in order of their ids, after the one given."""
    await store.insert_jobs([scan_job(id_, settled=id_ in {2, 4}) for id_ in range(1, 7)])
    assert await store.unsettled_jobs(0, 2) == [1, 3]
    assert await store.unsettled_jobs(3, 2) == [5, 6]
    assert await store.unsettled_jobs(6, 2) == []


async def test_jobs_with_old_events_are_found(store: Store) -> None:
    """A job is found while an event of an age stands in its outbox, and no longer."""
    await store.insert_jobs([scan_job(1), running(scan_job(2), LATER + timedelta(hours=1))])
    assert await store.jobs_with_old_events(LATER, 10) == [1]
    assert await store.jobs_with_old_events(THEN, 10) == []
    job = (await store.jobs([1]))[1]
    await store.save_jobs([published(job, {out.event.event_id for out in job.outbox})])
    assert await store.jobs_with_old_events(LATER, 10) == []
    assert set(await store.jobs_with_old_events(LATER + timedelta(hours=2), 10)) == {2}


async def test_a_subnet_knows_its_unfinished_jobs(store: Store) -> None:
    """Pending and running jobs hold a subnet; ended ones do not, settled or not."""
    await store.insert_jobs([scan_job(1, subnet_id=1), change(scan_job(2, subnet_id=2), JobTrigger.CANCEL, LATER)])
    assert await store.has_unfinished_jobs(1)
    assert not await store.has_unfinished_jobs(2)
    assert not await store.has_unfinished_jobs(3)


# Chunks


async def test_a_chunk_reads_back_whole(store: Store) -> None:
    """Every field of a chunk is kept, in every state."""
    chunks = [
        chunk(
            id=f"1-{index}",
            index=index,
            state=state,
            attempt=2,
            worker_id="w-1",
            failures=1,
            reason="r",
            partition=3,
            charged=1.5,
            technique="syn",
            scanned_at=THEN,
            outcomes="a.xs",
            rev=5,
        )
        for index, state in enumerate(ChunkState)
    ]
    await store.insert_chunks([*chunks, chunk(id="2-0", job_id=2)])
    assert await all_chunks(store, 1) == chunks
    assert await store.chunks(["1-3", "2-0", "9-9"]) == {"1-3": chunks[3], "2-0": chunk(id="2-0", job_id=2)}


async def test_inserting_chunks_again_changes_nothing(store: Store) -> None:
    """Chunks that are there stay as they are, those beside them are inserted, and all come in order of their index."""
    await store.insert_chunks([chunk(id="1-10", index=10), chunk(id="1-2", index=2)])
    await store.insert_chunks([chunk(id="1-2", index=2, user_id=8), chunk(id="1-0", index=0)])
    assert [(each.id, each.user_id) for each in await all_chunks(store, 1)] == [("1-0", 7), ("1-2", 7), ("1-10", 7)]
    await store.insert_chunks([])


async def test_saving_chunks_is_a_compare_and_set(store: Store) -> None:
    """Of two saves of one read of a chunk the second loses; the others of its batch do not."""
    await store.insert_chunks([chunk(), chunk(id="1-1", index=1)])
    taken = dispatch(chunk(), "w-1", 3)
    assert await store.save_chunks([taken]) == set()
    beside = dispatch(chunk(id="1-1", index=1), "w-2", 4)
    assert await store.save_chunks([dispatch(chunk(), "w-2", 4), beside]) == {"1-0"}
    assert await store.chunks(["1-0", "1-1"]) == {"1-0": replace(taken, rev=1), "1-1": replace(beside, rev=1)}
    assert await store.save_chunks([chunk(id="9-9")]) == {"9-9"}


async def test_chunks_are_counted_and_found_by_state(store: Store) -> None:
    """States are counted for each job asked for, one without chunks too, and ids found up to the limit."""
    states = [ChunkState.QUEUED, ChunkState.QUEUED, ChunkState.RUNNING, ChunkState.STORED]
    await store.insert_chunks([chunk(id=f"1-{n}", index=n, state=state) for n, state in enumerate(states)])
    await store.insert_chunks([chunk(id="3-0", job_id=3)])
    counts = await store.chunk_states([1, 2])
    assert counts == {
        1: Counter({ChunkState.QUEUED: 2, ChunkState.RUNNING: 1, ChunkState.STORED: 1}),
        2: Counter(),
    }
    assert await store.chunks_in(1, HELD, 10) == ["1-2"]
    assert len(await store.chunks_in(1, OPEN, 2)) == 2
    assert set(await store.chunks_in(1, OPEN, 10)) == {"1-0", "1-1", "1-2"}


async def test_counts_are_of_one_moment(store: Store) -> None:
    """However chunks move while they are counted, each is counted once."""
    chunks = [chunk(id=f"1-{n}", index=n) for n in range(5_000)]  # so many that a count lets writes go between
    await store.insert_chunks(chunks)
    stop = asyncio.Event()

    async def churn() -> None:
        current = {each.id: each for each in chunks}
        try:
            for state in (ChunkState.RUNNING, ChunkState.DISPATCHED, ChunkState.STORED, ChunkState.QUEUED):
                changed = [replace(each, state=state) for each in current.values()]
                for start in range(0, len(changed), 500):
                    assert await store.save_chunks(changed[start : start + 500]) == set()
                current = {each.id: replace(each, rev=each.rev + 1) for each in changed}
        finally:
            stop.set()

    moving = asyncio.create_task(churn())
    totals = set()
    while not stop.is_set():
        totals.add((await store.chunk_states([1]))[1].total())
        totals.add(len(await all_chunks(store, 1)))
        await asyncio.sleep(0)
    await moving
    assert totals == {5_000}


async def test_watched_chunks_are_those_of_state_and_partition(store: Store) -> None:
    """A watcher is told of the chunks in its state and partitions alone."""
    running_ = [
        chunk(id=f"1-{n}", index=n, state=ChunkState.RUNNING, partition=partition) for n, partition in enumerate((3, 4))
    ]
    await store.insert_chunks([*running_, chunk(id="1-2", index=2, state=ChunkState.DISPATCHED, partition=3)])
    assert await store.watched_chunks(ChunkState.RUNNING, [3, 5]) == [running_[0]]
    assert await store.watched_chunks(ChunkState.RUNNING, []) == []


async def test_overdue_chunks_are_scanned_and_were_not_asked_for_lately(store: Store) -> None:
    """Overdue is a scanned chunk that was never asked for, or not since a time; up to a limit."""
    scanned = ChunkState.SCANNED
    await store.insert_chunks(
        [
            chunk(id="1-0", index=0, state=scanned, scanned_at=None),
            chunk(id="1-1", index=1, state=scanned, scanned_at=THEN),
            chunk(id="1-2", index=2, state=scanned, scanned_at=LATER),
            chunk(id="1-3", index=3, state=ChunkState.STORED, scanned_at=THEN),
        ],
    )
    assert {each.id for each in await store.overdue_chunks(LATER, 10)} == {"1-0", "1-1"}
    assert len(await store.overdue_chunks(LATER, 1)) == 1


# Dispatch


async def test_the_queue_is_by_user_and_turn(store: Store) -> None:
    """A user's queued chunks come by turn, without those that need raw packets for a worker that has no right to."""
    await store.insert_chunks(
        [
            chunk(id="1-0", turn=5),
            chunk(id="1-1", index=1, turn=3, needs_raw=True),
            chunk(id="1-2", index=2, turn=4),
            chunk(id="1-3", index=3, turn=1, state=ChunkState.RUNNING),
            chunk(id="2-0", job_id=2, user_id=8, turn=0, needs_raw=True),
        ],
    )
    assert sorted(await store.waiting_users(raw=True)) == [7, 8]
    assert await store.waiting_users(raw=False) == [7]
    assert [each.id for each in await store.queue(7, 10, raw=True)] == ["1-1", "1-2", "1-0"]
    assert [each.id for each in await store.queue(7, 10, raw=False)] == ["1-2", "1-0"]
    assert [each.id for each in await store.queue(7, 1, raw=True)] == ["1-1"]
    assert await store.queue(8, 10, raw=False) == []
    assert await store.first_turn(7) == 3
    assert await store.first_turn(9) == 0


async def test_a_census_counts_what_is_unfinished(store: Store) -> None:
    """Jobs and chunks that are not final are counted by state, with the age of the oldest job and event, in seconds."""
    nothing = await store.census()
    assert (nothing.jobs, nothing.job_ages, nothing.chunks) == ({}, {}, {})
    assert (nothing.queued_seconds, nothing.outbox_age) == (0.0, 0.0)
    now = utc_now()
    created = {1: timedelta(hours=2), 2: timedelta(hours=3), 3: timedelta(hours=1), 4: -timedelta(hours=1)}
    jobs = [replace(scan_job(id_, created_at=now - age), outbox=()) for id_, age in created.items()]
    running = replace(jobs[3], status=JobStatus.RUNNING)
    said = create(replace(scan_job(5), outbox=(), created_at=now - timedelta(minutes=5)))
    over = [replace(change(said, JobTrigger.CANCEL, now), id=id_, settled=id_ == 7) for id_ in (6, 7)]
    await store.insert_jobs([*jobs[:3], running, *over])
    await store.insert_chunks([chunk(id=f"1-{n}", index=n, state=state) for n, state in enumerate(ChunkState)])
    await store.insert_chunks([chunk(id="2-0", job_id=2, user_id=8, needs_raw=True, estimate=4.0)])
    census = await store.census()
    assert census.jobs == {JobStatus.PENDING: 3, JobStatus.RUNNING: 1}
    assert census.job_ages == {JobStatus.PENDING: pytest.approx(3 * 3_600, abs=60), JobStatus.RUNNING: 0.0}
    assert census.chunks == dict.fromkeys(OPEN, 1) | {ChunkState.QUEUED: 2}
    assert census.queued_seconds == pytest.approx(4.5)
    assert census.outbox_age == pytest.approx(300, abs=60)


async def test_held_counts_what_each_worker_has(store: Store) -> None:
    """A worker's credit is filled in with its dispatched and running chunks; work beyond its slots is the shortest."""
    held = [
        chunk(id=f"1-{n}", index=n, state=state, worker_id=worker, estimate=estimate)
        for n, (state, worker, estimate) in enumerate(
            [
                (ChunkState.RUNNING, "w-1", 9.0),
                (ChunkState.DISPATCHED, "w-1", 0.25),
                (ChunkState.DISPATCHED, "w-1", 0.5),
                (ChunkState.SCANNED, "w-1", 4.0),
                (ChunkState.RUNNING, "w-2", 4.0),
            ],
        )
    ]
    await store.insert_chunks(held)
    one, three = Credit("w-1", 1, raw=False, partition=2), Credit("w-3", 2, raw=True, partition=3)
    assert await store.held([one, three]) == [replace(one, held=3, extra_seconds=0.75), three]


async def test_clocks_rest_without_work(store: Store) -> None:
    """A user without queued or held chunks is put to rest, but its time is kept; time is never set back by waking."""
    await store.insert_chunks([chunk(), chunk(id="2-0", job_id=2, user_id=8, state=ChunkState.RUNNING)])
    await store.wake_clocks([Clock(7, 5.0), Clock(8, 1.0), Clock(9, 2.0)])
    await store.rest_clocks()
    working = {7: Clock(7, 5.0, active=True), 8: Clock(8, 1.0, active=True)}
    assert await store.clocks([]) == working
    assert await store.clocks([9, 11]) == working | {9: Clock(9, 2.0, active=False)}
    await store.wake_clocks([Clock(7, 3.0)])
    await store.charge({7: 1.5, 8: -0.5, 10: 1.0})
    assert await store.clocks([10]) == {
        7: Clock(7, 6.5, active=True),
        8: Clock(8, 0.5, active=True),
        10: Clock(10, 1.0, active=False),
    }
    await store.wake_clocks([])
    await store.charge({})


async def test_open_chunks_of_a_job_are_counted(store: Store) -> None:
    """Queued chunks, those of them that need raw packets and their estimate, and held ones; no other job's, no ended ones."""
    assert await store.chunk_counts(1) == OpenChunks()
    await store.insert_chunks(
        [
            chunk(estimate=2.5),
            chunk(id="1-1", index=1, estimate=1.0, needs_raw=True),
            chunk(id="1-2", index=2, state=ChunkState.DISPATCHED),
            chunk(id="1-3", index=3, state=ChunkState.RUNNING),
            chunk(id="1-4", index=4, state=ChunkState.SCANNED),
            chunk(id="1-5", index=5, state=ChunkState.STORED),
            chunk(id="2-0", job_id=2, estimate=4.0),
        ]
    )
    assert await store.chunk_counts(1) == OpenChunks(queued=2, queued_raw=1, queued_seconds=3.5, held=2)
    assert await store.queued_seconds() == 7.5


async def test_live_workers_are_those_that_announced_slots_lately(store: Store) -> None:
    """A worker with slots is live for a while after it announced itself; one without slots is not."""
    minute = timedelta(minutes=1)
    assert await store.live_workers(minute) == []
    await store.seen_workers([Credit("w-1", 2, raw=False, partition=0), Credit("w-2", 3, raw=True, partition=0)])
    await store.seen_workers([Credit("w-3", 0, raw=True, partition=0)])
    assert sorted(await store.live_workers(minute)) == [(False, 2), (True, 3)]
    assert await store.live_workers(timedelta(seconds=-1)) == []


async def test_a_raw_worker_is_seen_for_a_while(store: Store) -> None:
    """A raw worker with slots counts as seen within a time; one without slots, or not raw, does not."""
    minute = timedelta(minutes=1)
    await store.seen_workers([Credit("w-1", 2, raw=False, partition=0), Credit("w-2", 0, raw=True, partition=0)])
    assert not await store.raw_worker_seen(minute)
    await store.seen_workers([Credit("w-3", 2, raw=True, partition=0)])
    assert await store.raw_worker_seen(minute)
    assert not await store.raw_worker_seen(timedelta(seconds=-1))
    await store.seen_workers([Credit("w-3", 0, raw=True, partition=0)])
    assert not await store.raw_worker_seen(minute)
    await store.seen_workers([])


async def test_plans_of_any_size_are_kept(store: Store) -> None:
    """All chunks of a job of thousands are stored once, though they are inserted twice."""
    job = scan_job(1, cidr="127.8.0.0/16", policy=scan_policy(ports="1-1000", timing=2))
    chunks = list(plan.chunks(job, 0))
    assert len(chunks) == job.chunk_count > 2_000
    await store.insert_chunks(chunks)
    await store.insert_chunks(chunks[:10])
    assert await all_chunks(store, 1) == chunks
    assert await store.save_chunks([cancel(each) for each in chunks]) == set()
