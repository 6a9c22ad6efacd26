"""One suite for both stores: the one in memory, and the one in MongoDB."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from job_orchestrator.api.resource_rules import POLICIES, SUBNETS, ResourceRules
from job_orchestrator.api.tasks import task_status
from job_orchestrator.domain import plan
from job_orchestrator.domain.attempts import Attempt, Probed
from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.census import DeletionCensus, OpenChunks, Standing
from job_orchestrator.domain.chunk import HELD, MAX_PAUSE, OPEN, Chunk, ChunkState, cancel, dispatch
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.fairness import Account, Accounts, Candidate, Credit, Held, wake
from job_orchestrator.domain.job import JobTrigger, ScanJob, change, create, published, restored_from_backup
from job_orchestrator.domain.ports import Store
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.domain.retention import EndedJob, SubnetRetention
from job_orchestrator.domain.totals import Effort, Totals
from job_orchestrator.metrics import UNREADABLE
from job_orchestrator.repository import MongoStore, documents
from job_orchestrator_testing import KEYS, chunk, replanned, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN, audit_entry
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.contracts.messages import FencingToken, JobStatus, Run
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.runtime.mongo import Database

LATER = THEN + timedelta(seconds=1)


def owned(id_: int = 1, **changed: Any) -> Owned[Any]:
    fields: dict[str, Any] = {"user_id": 7, "name": "lab", "created_at": THEN, "updated_at": LATER}
    return Owned(id=id_, **(fields | changed))


subnet = partial(owned, content=ScanTarget("127.9.8.0/24", ("127.9.8.1/32",)))
policy = partial(
    owned, content=scan_policy(scripts=("banner", "ssl-cert"), max_rate=100, min_rate=50, host_timeout=None)
)


@dataclass(frozen=True)
class Kind:
    """A resource, an object of it, and another content."""

    rules: ResourceRules[Any, Any, Any, Any]
    make: Callable[..., Owned[Any]]
    other: Any


KINDS = [Kind(SUBNETS, subnet, ScanTarget("127.0.0.0/30")), Kind(POLICIES, policy, scan_policy())]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.rules.resource.plural)


async def all_chunks(store: Store, job_id: int) -> list[Chunk]:
    return [each async for each in store.chunks.of_job(job_id)]


# Ids


async def test_ids_start_at_one_and_are_unique(store: Store) -> None:
    """Ids of one sequence start at 1, parallel callers get different ones, and sequences are independent."""
    assert await store.jobs.take_ids(3) == range(1, 4)
    taken = await asyncio.gather(*(store.jobs.take_ids(2) for _ in range(10)))
    assert sorted(id_ for block in taken for id_ in block) == list(range(4, 24))
    assert await store.subnets.take_ids() == range(1, 2)


# Subnets and policies


def test_suite_has_every_resource() -> None:
    """The suite tests the repository of each declared resource."""
    assert [kind.rules.resource for kind in KINDS] == list(rest.RESOURCES)


@every_kind
async def test_resources_are_private_to_their_owner(store: Store, kind: Kind) -> None:
    """An object reads back whole for its user; for other users it does not exist and is neither replaced nor deleted."""
    repository, make = kind.rules.repository(store), kind.make
    await repository.add(make(1))
    await repository.add(make(2, user_id=8, content=kind.other))
    assert await repository.get([(7, 1), (7, 2), (7, 3), (8, 1)]) == {(7, 1): make(1)}
    assert not await repository.replace(make(1, user_id=8, name="mine now"))
    assert not await repository.delete(8, 1)
    assert await repository.replace(make(1, name="new", content=kind.other))
    assert await repository.get([(7, 1)]) == {(7, 1): make(1, name="new", content=kind.other)}
    assert await repository.delete(7, 1)
    assert not await repository.delete(7, 1)
    assert not await repository.replace(make(1))
    assert await repository.get([(7, 1)]) == {}


@every_kind
async def test_deleted_resource_is_not_added_again(store: Store, kind: Kind) -> None:
    """A delayed insert of a request that was finished elsewhere does not create its object again."""
    repository, make = kind.rules.repository(store), kind.make
    await repository.add(make(1))
    assert await repository.delete(7, 1)
    await repository.add(make(1), make(2))
    assert await repository.page(7, 0, 10) == ([make(2)], 1)
    assert await repository.count(7, 10) == 1
    assert not await repository.replace_all([make(1)])


@every_kind
def test_resource_view_contains_the_complete_object(kind: Kind) -> None:
    """An object can be read from its view, which requests with an Idempotency-Key store."""
    assert kind.rules.viewed(kind.rules.view(kind.make(1))) == kind.make(1)


@every_kind
async def test_resources_are_replaced_together(store: Store, kind: Kind) -> None:
    """Objects of their user are replaced although others do not exist or belong to another user, which is reported."""
    repository, make = kind.rules.repository(store), kind.make
    await repository.add(make(1), make(2), make(3, user_id=8))
    assert await repository.replace_all([])
    assert await repository.replace_all([make(1, name="new"), make(2, name="new")])
    assert not await repository.replace_all([make(1, name="newer"), make(3, name="newer"), make(4)])
    found = await repository.get([(7, 1), (7, 2), (8, 3), (7, 4)])
    assert {key: each.name for key, each in found.items()} == {(7, 1): "newer", (7, 2): "new", (8, 3): "lab"}


@every_kind
async def test_resources_are_listed_newest_first_by_page(store: Store, kind: Kind) -> None:
    """A page holds the user's own, newest first, and the total counts them all."""
    repository, make = kind.rules.repository(store), kind.make
    for id_ in range(1, 6):
        await repository.add(make(id_))
    await repository.add(make(6, user_id=8))
    assert await repository.page(7, 1, 2) == ([make(4), make(3)], 5)
    assert await repository.page(7, 4, 2) == ([make(1)], 5)
    assert await repository.page(7, 10**11, 100) == ([], 5)
    assert await repository.page(9, 0, 10) == ([], 0)


@every_kind
async def test_resources_are_counted_up_to_a_limit(store: Store, kind: Kind) -> None:
    """The user's own objects are counted, and no further than asked."""
    repository, make = kind.rules.repository(store), kind.make
    for id_ in range(1, 4):
        await repository.add(make(id_))
    await repository.add(make(4, user_id=8))
    assert [await repository.count(7, limit) for limit in (2, 3, 4)] == [2, 3, 3]
    assert [await repository.count(user, 10) for user in (8, 9)] == [1, 0]


@every_kind
async def test_resource_of_any_user_exists(store: Store, kind: Kind) -> None:
    """An object of any user exists until it is deleted, and only in its own resource."""
    repository, make = kind.rules.repository(store), kind.make
    await repository.add(make(1))
    await repository.add(make(2, user_id=8))
    assert [await repository.exists(id_) for id_ in (1, 2, 3)] == [True, True, False]
    others = [each.rules.repository(store) for each in KINDS if each is not kind]
    assert not any([await other.exists(1) for other in others])
    await repository.delete(7, 1)
    assert not await repository.exists(1)


# The audit log


@pytest.mark.proves("G15", "A26")
async def test_list_audit_is_ordered_by_the_time_received(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are complete, the last received first whatever their time is; a second one with the same id is ignored."""
    begin = utc_now()
    added = [
        audit_entry("a", time=datetime(9999, 1, 1, tzinfo=UTC)),
        audit_entry("b", subject="", rule="token", decision="refused", count=9, request_id="r-2"),
        audit_entry("c", subject="8"),
    ]
    kept = []
    for number, each in enumerate(added):
        now = begin + timedelta(seconds=number)
        stop_clock(store, now, monkeypatch)
        await store.audit.add([each, audit_entry("a", subject="9")])
        kept.append(rest.AuditEntry(**each.model_dump() | {"id": f"job-orchestrator/{each.id}", "received_at": now}))
    a, b, c = kept
    assert await store.audit.page(0, 10) == ([c, b, a], 3)
    assert await store.audit.page(1, 1) == ([b], 3)
    assert await store.audit.page(0, 10, subject="7") == ([a], 1)
    assert await store.audit.page(0, 10, subject="") == ([b], 1)
    assert await store.audit.page(0, 10, subject="7", request_id="r-2") == ([], 0)
    assert await store.audit.page(0, 10, request_id="r-1") == ([c, a], 2)
    assert await store.audit.page(
        0, 10, request_id="r-1", action=a.action, source=a.source, service=a.service, rule=None
    ) == ([c, a], 2)
    assert await store.audit.page(0, 10, since=b.received_at) == ([c, b], 2)
    assert await store.audit.page(0, 10, until=b.received_at) == ([a], 1)
    assert await store.audit.page(0, 10, since=b.received_at, until=c.received_at, decision=b.decision) == ([b], 1)


async def test_add_audit_of_an_id_that_another_service_has_keeps_both(store: Store) -> None:
    """Ids are in the namespace of their service: none suppresses the entry of another."""
    await store.audit.add([audit_entry("a", service="api-gateway", decision="refused")])
    await store.audit.add([audit_entry("a")])
    entries, total = await store.audit.page(0, 10)
    assert total == 2
    assert {each.id for each in entries} == {"api-gateway/a", "job-orchestrator/a"}


def stop_clock(store: Store, now: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock that stamps the received entries show this time."""
    monkeypatch.setattr(store.audit, "_now", lambda: now)


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
async def test_command_round_trips(store: Store, given: Command) -> None:
    """Every field of a command is kept, including its jobs with their first events."""
    assert await store.commands.insert([given]) == {"c-1": given}
    assert await store.commands.get(["c-1", "c-2"]) == {"c-1": given}


async def test_largest_command_fits_in_a_document(store: Store) -> None:
    """A thousand subnets with a hundred thousand excludes among them, of a policy as long as one can be, fit."""
    excludes = tuple(f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:{number:x}/128" for number in range(100))
    ports = ",".join(str(port) for port in range(1, 4_000, 2))[:9_000].rpartition(",")[0]
    one = replace(scan_job(1, policy=scan_policy(ports=ports)), exclude=excludes)
    largest = command(jobs=tuple(replace(one, id=10**9 + number) for number in range(1_000)))
    await store.commands.insert([largest])
    assert await store.commands.get(["c-1"]) == {"c-1": largest}


async def test_first_insert_of_a_command_wins(store: Store) -> None:
    """Of acceptance and expiry under one id the first one is stored, and both callers get it."""
    accepted, expired = command(), command(state="expired", jobs=(), body="")
    assert await store.commands.insert([accepted]) == {"c-1": accepted}
    assert await store.commands.insert([expired]) == {"c-1": accepted}
    other = replace(expired, id="c-2")
    assert await store.commands.insert([other]) == {"c-2": other}
    assert await store.commands.insert([replace(accepted, id="c-2")]) == {"c-2": other}
    assert await store.commands.expired(["c-1", "c-2", "c-3"]) == {"c-2"}


async def test_idempotency_key_is_unique_per_user(store: Store) -> None:
    """Of commands with the same user and key the first wins, in one batch or two; other users and no key do not conflict."""
    first, second = command("c-1", idempotency_key="k"), command("c-2", idempotency_key="k", jobs=(scan_job(9),))
    stranger = command("c-3", idempotency_key="k", user_id=8)
    keyless = [command("c-4"), command("c-5")]
    stands = await store.commands.insert([first, second, stranger, *keyless])
    assert stands == {"c-1": first, "c-2": first, "c-3": stranger, "c-4": keyless[0], "c-5": keyless[1]}
    assert await store.commands.insert([replace(second, id="c-6")]) == {"c-6": first}
    assert await store.commands.by_key([(7, "k"), (8, "k"), (9, "k"), (7, "x")]) == {
        (7, "k"): replace(first, jobs=()),
        (8, "k"): replace(stranger, jobs=()),
    }
    assert await store.commands.by_key([]) == {}


async def test_parallel_inserts_of_one_key_leave_one_command(store: Store) -> None:
    """Fifty commands race for one key: one is inserted, and all callers get that one."""
    race = [command(f"c-{n}", idempotency_key="k", jobs=(scan_job(n),)) for n in range(1, 51)]
    answers = await asyncio.gather(*(store.commands.insert([each]) for each in race))
    stood = {answer[f"c-{n}"].id for n, answer in enumerate(answers, 1)}
    assert len(stood) == 1
    assert len(await store.commands.get([each.id for each in race])) == 1


async def test_reject_changes_an_accepted_command_once(store: Store) -> None:
    """Rejecting changes an accepted command once; an earlier decision stays."""
    cancel_ = command(jobs=(), cancels=3, body="")
    await store.commands.insert([cancel_])
    rejected = replace(cancel_, state="rejected", status=400, error="too late", rule="state")
    await store.commands.reject([rejected])
    await store.commands.reject([replace(rejected, status=404, error="other", rule="owner")])
    await store.commands.reject([])
    assert (await store.commands.get(["c-1"]))["c-1"] == rejected


# Jobs


def running(job: ScanJob, at: Any = LATER) -> ScanJob:
    return change(published(job, job.seq), JobTrigger.START, at)


TOTALS = Totals(
    done=2,
    probes={"answered": 3, "silent": 997},
    addresses={"answered": 2},
    places={"answered": b"\x03\x00"},
    reasons=("nmap died",),
    tcp=Effort(probes=1_000, seconds=4.5, probed=900, probed_seconds=4.0),
    udp=Effort(probes=2, seconds=600.0, probed=2, probed_seconds=600.0),
    unprobed=(0, 3),
)


async def test_job_round_trips(store: Store) -> None:
    """Every field of a job is kept, including its policy, times and outbox."""
    job = scan_job(
        1,
        exclude=("127.9.8.1/32", "127.9.8.2/32"),
        policy=scan_policy(ports="T:1-9,U:53", scripts=("banner",), host_timeout=5),
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        cancel_command="c-2",
        turn=4,
        made=2,
        totals=TOTALS,
        seconds_left=2.5,
        waiting="no_worker",
        waiting_since=LATER,
        eta_seconds=7.5,
    )
    job = change(job, JobTrigger.START, LATER)
    ended = change(job, JobTrigger.FAIL, LATER, progress=7, machines_found=3, error="nmap died")
    await store.jobs.insert([replace(ended, settled=True)])
    assert await store.jobs.get([1, 2]) == {1: replace(ended, settled=True)}
    assert [type(out.event).__name__ for out in ended.outbox] == ["JobCreated", "JobStarted", "JobFailed"]


async def test_inserting_a_job_again_changes_nothing(store: Store) -> None:
    """An existing job does not change, and the other jobs of the call are inserted."""
    await store.jobs.insert([scan_job(1)])
    await store.jobs.insert([scan_job(1, user_id=8), scan_job(2)])
    assert await store.jobs.get([1, 2]) == {1: scan_job(1), 2: scan_job(2)}


async def test_saving_is_a_compare_and_set(store: Store) -> None:
    """A save succeeds if the document is as it was read, and raises `rev`; any other save is reported as lost."""
    await store.jobs.insert([scan_job(1, exclude=("127.9.8.1/32",)), scan_job(2)])
    read = await store.jobs.get([1, 2])
    first = replace(read[1], progress=1)
    assert await store.jobs.save([first]) == set()
    assert await store.jobs.save([replace(read[1], progress=2), replace(read[2], progress=3)]) == {1}
    stored = await store.jobs.get([1, 2])
    assert stored[1] == replace(first, rev=1)
    assert stored[2] == replace(read[2], progress=3, rev=1)
    assert await store.jobs.save([]) == set()
    assert await store.jobs.save([scan_job(99)]) == {99}


async def test_save_with_a_lost_race_stores_the_other_jobs(store: Store) -> None:
    """In a batch with one lost race every other job, whatever its content, is reported as saved."""
    jobs = [scan_job(id_, exclude=("127.9.8.1/32",), policy=scan_policy(scripts=("banner",))) for id_ in (1, 2)]
    await store.jobs.insert(jobs)
    await store.jobs.save([jobs[0]])
    assert await store.jobs.save([running(job) for job in jobs]) == {1}


async def test_concurrent_saves_have_one_winner(store: Store) -> None:
    """If twenty writers change one job at the same time, exactly one succeeds."""
    await store.jobs.insert([scan_job(1)])
    job = (await store.jobs.get([1]))[1]
    results = await asyncio.gather(*(store.jobs.save([replace(job, progress=n)]) for n in range(1, 21)))
    winners = [n for n, losers in enumerate(results, 1) if not losers]
    assert len(winners) == 1
    assert (await store.jobs.get([1]))[1] == replace(job, progress=winners[0], rev=1)


async def test_jobs_are_listed_by_start_pending_first(store: Store) -> None:
    """Pending jobs are first, then the latest start, ties by id; a job that never started is sorted by its end."""
    never_started = change(scan_job(3), JobTrigger.CANCEL, LATER + timedelta(seconds=1))
    await store.jobs.insert(
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
        jobs, total = await store.jobs.page(7, statuses, skip, limit)
        return [job.id for job in jobs], total

    assert await ids(set()) == ([6, 1, 5, 3, 4, 2], 6)
    assert await ids(set(), 2, 3) == ([5, 3, 4], 6)
    assert await ids({JobStatus.RUNNING}) == ([5, 4, 2], 3)
    assert await ids({JobStatus.RUNNING, JobStatus.CANCELLED}, 1, 2) == ([3, 4], 4)
    assert await ids({JobStatus.FAILED}) == ([], 0)
    everyone, total = await store.jobs.page(None, set(), 0, 3)
    assert ([job.id for job in everyone], total) == ([7, 6, 1], 7)
    stored = await store.jobs.get([7, 6, 1])
    assert everyone == [stored[id_].view for id_ in (7, 6, 1)]
    pending, total = await store.jobs.page(None, {JobStatus.PENDING}, 0, 10)
    assert ([job.id for job in pending], total) == ([7, 6, 1], 3)


async def test_snapshots_of_jobs_are_their_states(store: Store) -> None:
    """By id, those that exist, each with the number of its state."""
    failed = change(running(scan_job(2)), JobTrigger.FAIL, LATER, progress=40, machines_found=3, error="no route")
    await store.jobs.insert([failed, scan_job(1), scan_job(3)])
    assert await store.jobs.snapshots([2, 1, 9]) == [
        rest.Snapshot(seq=job.seq, task=task_status(job)) for job in (scan_job(1), failed)
    ]
    assert await store.jobs.snapshots([]) == []


async def test_latest_jobs_are_unfinished(store: Store) -> None:
    """Ids come in order, page by page: every unfinished job, or those that changed since."""
    ended = LATER + timedelta(seconds=5)
    await store.jobs.insert(
        [
            scan_job(1),
            running(scan_job(2)),
            change(scan_job(3), JobTrigger.CANCEL, LATER),
            replace(change(scan_job(4), JobTrigger.CANCEL, ended), settled=True),
            scan_job(5, user_id=8),
        ]
    )
    assert await store.jobs.latest(7, 0, 10) == [1, 2]
    assert await store.jobs.latest(7, 1, 10) == [2]
    assert await store.jobs.latest(None, 0, 2) == [1, 2]
    assert await store.jobs.latest(None, 0, 10) == [1, 2, 5]
    assert await store.jobs.latest(7, 0, 10, changed_since=LATER) == [2]
    assert await store.jobs.latest(7, 0, 10, changed_since=ended) == []


async def test_ended_jobs_come_by_their_end(store: Store) -> None:
    """Jobs that ended then or later come page by page in the order of their ends, those of the same time by id."""
    ends = {1: LATER, 2: THEN, 3: LATER, 4: LATER + timedelta(seconds=5), 5: LATER}
    await store.jobs.insert([change(scan_job(id_), JobTrigger.CANCEL, at) for id_, at in ends.items()])
    await store.jobs.insert([scan_job(6), change(scan_job(7, user_id=8), JobTrigger.CANCEL, LATER)])
    mine = [(ends[id_], id_) for id_ in (1, 3, 5, 4)]
    assert await store.jobs.ended(7, LATER, 10) == mine
    assert await store.jobs.ended(7, LATER, 2) == mine[:2]
    assert await store.jobs.ended(7, LATER, 2, mine[1]) == mine[2:]
    assert await store.jobs.ended(7, LATER, 1, mine[0]) == mine[1:2]
    assert await store.jobs.ended(7, LATER, 10, mine[3]) == []
    assert await store.jobs.ended(None, LATER, 10, mine[2]) == [(LATER, 7), mine[3]]
    assert await store.jobs.ended(None, THEN, 1) == [(THEN, 2)]


async def test_unfinished_jobs_are_found_by_filter(store: Store) -> None:
    """Pending and running jobs of one user match by every filter that is given, at most so many."""
    await store.jobs.insert(
        [
            scan_job(1),
            running(scan_job(2, subnet_id=2)),
            scan_job(3, subnet_id=2, policy_id=5, granted_by="site"),
            change(scan_job(4, subnet_id=2), JobTrigger.CANCEL, LATER),
            scan_job(5, user_id=8, subnet_id=2),
        ]
    )
    assert sorted(await store.jobs.unfinished(7, 10)) == [1, 2, 3]
    assert sorted(await store.jobs.unfinished(7, 10, subnet_id=2)) == [2, 3]
    assert await store.jobs.unfinished(7, 10, subnet_id=2, statuses=[JobStatus.RUNNING]) == [2]
    assert await store.jobs.unfinished(7, 10, subnet_id=2, policy_id=5) == [3]
    assert await store.jobs.unfinished(7, 10, policy_id=6) == []
    assert await store.jobs.unfinished(7, 10, granted_by="site") == [3]
    assert len(await store.jobs.unfinished(7, 2)) == 2


async def test_unsettled_jobs_are_found_page_by_page(store: Store) -> None:
    """Only jobs that are not settled are found, in order of their ids, after the one given, with their states."""
    jobs = [scan_job(id_, settled=id_ in {2, 4}) for id_ in range(1, 7)]
    await store.jobs.insert(
        [*jobs[:4], replace(jobs[4], waiting="no_worker"), change(jobs[5], JobTrigger.CANCEL, THEN)]
    )
    assert list(await store.jobs.unsettled(0, 2)) == [1, 3]
    assert await store.jobs.unsettled(3, 2) == {5: ("pending", "no_worker"), 6: ("cancelled", "")}
    assert await store.jobs.unsettled(6, 2) == {}
    mine = scan_job(3).partition
    assert set(await store.jobs.unsettled(0, 10, [mine])) == {
        id_ for id_ in (1, 3, 5, 6) if scan_job(id_).partition == mine
    }
    assert await store.jobs.unsettled(0, 10, []) == {}


async def test_missing_jobs_are_neither_stored_nor_deleted(store: Store) -> None:
    """Of some ids those are missing that no job and no receipt has."""
    ended = change(scan_job(2), JobTrigger.CANCEL, LATER, settled=True)
    await store.jobs.insert([scan_job(1), ended])
    await store.deletions.begin(ended, Deletion(job_id=2, user_id=7, subnet_id=1, reason="request", requested_at=LATER))
    assert await store.jobs.missing([1, 2, 3]) == {3}


async def test_jobs_with_old_events_are_found(store: Store) -> None:
    """A job of the given partitions is found only while its outbox has an old event, or one from a clock that was ahead."""
    every = set(range(SCAN_PROGRESS.partitions))

    async def found(before: datetime, partitions: Collection[int] = every) -> list[int]:
        return [job.id for job in await store.jobs.with_old_events(before, 10, partitions)]

    await store.jobs.insert([scan_job(1), running(scan_job(2), LATER + timedelta(seconds=50))])
    assert await found(LATER) == [1]
    assert await found(LATER, every - {scan_job(1).partition}) == []
    assert await found(THEN) == []
    job = (await store.jobs.get([1]))[1]
    await store.jobs.save([published(job, job.seq)])
    assert await found(LATER) == []
    assert await found(LATER + timedelta(minutes=1)) == [2]
    await store.jobs.insert([running(scan_job(3), LATER + timedelta(hours=2))])
    assert await found(LATER) == [3]


async def test_outboxes_of_unchanged_jobs_are_emptied_once(store: Store) -> None:
    """Emptying an outbox is a change of its job; a job with a later event keeps all events."""
    await store.jobs.insert([scan_job(id_) for id_ in (1, 2)])
    await store.jobs.save([change(scan_job(2), JobTrigger.CANCEL, LATER)])
    for _ in range(2):
        await store.jobs.empty_outboxes({1: 1, 2: 1, 3: 1})
    jobs = await store.jobs.get([1, 2, 3])
    assert {id_: (len(job.outbox), job.seq, job.rev) for id_, job in jobs.items()} == {1: (0, 1, 1), 2: (2, 2, 1)}
    assert await store.jobs.save([scan_job(1)]) == {1}
    await store.jobs.empty_outboxes({})


async def test_outboxes_of_restored_jobs_are_emptied(store: Store) -> None:
    """An outbox is emptied up to its last event also if the `seq` of its job was raised after a restore."""
    later = change(scan_job(2), JobTrigger.CANCEL, LATER)
    await store.jobs.insert([restored_from_backup(job, 1_000) for job in (scan_job(1), later, scan_job(3))])
    await store.jobs.empty_outboxes({1: 1, 2: 1, 3: 5})
    jobs = await store.jobs.get([1, 2, 3])
    assert {id_: (len(job.outbox), job.seq) for id_, job in jobs.items()} == {
        1: (0, 1_000),
        2: (2, 1_000),
        3: (0, 1_000),
    }


async def test_usage_sums_the_unfinished_jobs_of_users(store: Store) -> None:
    """The jobs that have not ended, and the slot seconds that are left of them, are summed by user."""
    pending, running, ended = (scan_job(id_, seconds_left=float(id_)) for id_ in (1, 2, 3))
    running = change(running, JobTrigger.START, LATER)
    ended = replace(change(ended, JobTrigger.CANCEL, LATER), seconds_left=3.0)
    await store.jobs.insert([pending, running, ended, replace(ended, id=5, settled=True)])
    await store.jobs.insert([scan_job(4, user_id=8, seconds_left=4.0)])
    assert await store.jobs.usage([7, 9]) == {7: Usage(2, 3.0)}
    assert await store.jobs.usage([7, 8]) == {7: Usage(2, 3.0), 8: Usage(1, 4.0)}


async def test_has_unfinished_jobs_of_a_subnet(store: Store) -> None:
    """Pending and running jobs hold a subnet; ended ones do not, settled or not."""
    await store.jobs.insert([scan_job(1, subnet_id=1), change(scan_job(2, subnet_id=2), JobTrigger.CANCEL, LATER)])
    assert await store.jobs.has_unfinished(1)
    assert not await store.jobs.has_unfinished(2)
    assert not await store.jobs.has_unfinished(3)


# Deletions


async def test_receipt_replaces_its_job(store: Store) -> None:
    """A deleted job is found by no query, cannot be saved or inserted again, and its receipt advances through the stages."""
    job = replace(change(scan_job(1), JobTrigger.CANCEL, LATER), settled=True, outbox=())
    other = replace(change(scan_job(2), JobTrigger.CANCEL, THEN), settled=True, outbox=())
    await store.jobs.insert([job, other, scan_job(3)])
    first, second = EndedJob(2, THEN, 1), EndedJob(1, LATER, 1)
    assert await store.jobs.expired(LATER, 9) == [first]
    assert await store.jobs.expired(LATER + timedelta(seconds=1), 9) == [first, second]
    assert await store.jobs.expired(LATER + timedelta(seconds=1), 1) == [first]
    assert await store.jobs.expired(LATER + timedelta(seconds=1), 9, (THEN, 1)) == [first, second]
    assert await store.jobs.expired(LATER + timedelta(seconds=1), 9, (THEN, 2)) == [second]
    receipt = Deletion(job_id=1, user_id=7, subnet_id=1, reason="request", requested_at=LATER, requested_by=9)
    assert not await store.deletions.begin(replace(job, rev=5), receipt)
    assert await store.deletions.begin(job, receipt)
    assert not await store.deletions.begin(job, receipt)
    await store.jobs.insert([job])
    assert await store.jobs.save([job, other]) == {1}
    assert (await store.jobs.get([1, 2])).keys() == {2}
    assert [each.id for each in (await store.jobs.page(7, set(), 0, 9))[0]] == [3, 2]
    assert await store.jobs.expired(LATER + timedelta(seconds=1), 9) == [first]
    assert await store.deletions.due(THEN, 9, chunks=False) == []
    assert await store.deletions.due(LATER, 9, chunks=False) == [receipt]
    assert await store.deletions.advance([], Stage.CHUNKS, Stage.DONE, None) == 0
    assert await store.deletions.advance([1], Stage.CHUNKS, Stage.DONE, None) == 0  # it is not there yet
    assert await store.deletions.advance([1, 2], Stage.RESULTS, Stage.RESULTS, LATER + timedelta(seconds=60)) == 1
    assert await store.deletions.due(LATER, 9, chunks=False) == []
    counts = Counts(hosts=3, rows=5, chunks=1)
    assert await store.deletions.advance([1], Stage.RESULTS, Stage.CHUNKS, LATER, counts) == 1
    assert await store.deletions.due(LATER, 9, chunks=True) == [replace(receipt, stage=Stage.CHUNKS, counts=counts)]
    assert await store.deletions.due(LATER, 9, chunks=False) == []
    assert await store.deletions.advance([1], Stage.CHUNKS, Stage.DONE, None) == 1
    assert await store.deletions.advance([1], Stage.CHUNKS, Stage.DONE, None) == 0
    assert await store.deletions.due(LATER + timedelta(days=9), 9, chunks=True) == []
    [done], _ = await store.deletions.page(7, [Stage.DONE], 0, 9)
    assert done.completed_at is not None
    assert done == replace(receipt, stage=Stage.DONE, counts=counts, completed_at=done.completed_at)
    await store.jobs.insert([job])
    assert await store.jobs.get([1]) == {}


async def test_retention_walk_returns_the_time_of_the_one_before(store: Store) -> None:
    """Each walk is recorded, and the first has none before it."""
    assert await store.retention.begin_walk(THEN) is None
    assert await store.retention.begin_walk(THEN + timedelta(days=1)) == THEN
    assert await store.retention.begin_walk(THEN) == THEN + timedelta(days=1)
    await store.retention.resume()
    assert await store.retention.begin_walk(THEN) is None


async def test_retention_halted_stays_halted_until_it_is_resumed(store: Store) -> None:
    """The first jump is kept; a second resume reports that nothing was halted."""
    assert await store.retention.halted() is None
    await store.retention.halt(timedelta(days=1))
    await store.retention.halt(timedelta(hours=-2))
    assert await store.retention.halted() == timedelta(days=1)
    assert [await store.retention.resume(), await store.retention.resume()] == [True, False]
    assert await store.retention.halted() is None


async def test_retention_of_a_subnet_survives_its_replacement_and_not_its_deletion(store: Store) -> None:
    """A subnet has its own number of days until it is unset or deleted; replacing its other fields keeps it."""
    await store.subnets.add(subnet(1), subnet(2))
    assert await store.retention.shortest() is None
    assert await store.retention.days(1) is None
    assert await store.retention.set_days(1, 30)
    assert await store.retention.set_days(2, 40)
    assert not await store.retention.set_days(3, 10)
    assert await store.subnets.replace(replace(subnet(1), name="other"))
    assert [await store.retention.days(n) for n in (1, 2, 3)] == [30, 40, None]
    assert await store.retention.shortest() == 30
    assert await store.retention.of([1, 2, 3]) == {1: SubnetRetention(30), 2: SubnetRetention(40)}
    assert await store.subnets.delete(7, 1)
    assert await store.retention.shortest() == 40
    assert await store.retention.set_days(2, None)
    assert await store.retention.shortest() is None
    assert await store.retention.of([1, 2]) == {2: SubnetRetention()}


@pytest.mark.integration
@pytest.mark.parametrize("damage", [-3, 0, 4_000_000, None, "9", 1.5, True])
async def test_damaged_retention_of_a_subnet_counts_as_none(
    mongo_store: MongoStore, database: Database, damage: Any
) -> None:
    """A number of days that the API does not accept neither deletes jobs nor hides the retention of other subnets."""
    await mongo_store.subnets.add(subnet(1), subnet(2))
    assert await mongo_store.retention.set_days(2, 40)
    await database["subnets"].update_one({"_id": 1}, {"$set": {"keep_results_days": damage}})
    assert await mongo_store.retention.days(1) is None
    assert await mongo_store.retention.of([1, 2]) == {1: SubnetRetention(), 2: SubnetRetention(40)}
    assert await mongo_store.retention.shortest() == 40


async def test_newest_completed_jobs_of_a_subnet_are_those_that_ended_last(store: Store) -> None:
    """Two of them, ties by id; jobs with another status, of other subnets, unfinished and deleted ones do not count."""
    await store.subnets.add(subnet(1), subnet(2), subnet(3))

    def completed(id_: int, at: datetime, subnet_id: int = 1) -> ScanJob:
        running = change(scan_job(id_, subnet_id=subnet_id), JobTrigger.START, THEN)
        return replace(change(running, JobTrigger.COMPLETE, at), settled=True, outbox=())

    later = LATER + timedelta(seconds=1)
    jobs = [completed(1, LATER), completed(2, later), completed(3, LATER), completed(4, THEN)]
    others = [change(scan_job(5), JobTrigger.CANCEL, later), completed(6, later, 2), scan_job(7), completed(8, later)]
    await store.jobs.insert([*jobs, *others])
    receipt = Deletion(job_id=8, user_id=7, subnet_id=1, reason="request", requested_at=later)
    assert await store.deletions.begin(others[3], receipt)
    assert await store.retention.of([1, 2, 3]) == {
        1: SubnetRetention(newest=frozenset({2, 3})),
        2: SubnetRetention(newest=frozenset({6})),
        3: SubnetRetention(),
    }


async def test_receipts_are_listed_by_user_and_stage_the_newest_first(store: Store) -> None:
    """A page has the last requested first, ties by id; jobs that are not deleted are in none."""
    jobs = [
        replace(change(scan_job(n, user_id=7 if n < 4 else 8), JobTrigger.CANCEL, THEN), settled=True, outbox=())
        for n in range(1, 6)
    ]
    await store.jobs.insert(jobs)
    for job, requested_at in zip(jobs[:4], (LATER, THEN, LATER, LATER), strict=True):
        receipt = Deletion(
            job_id=job.id, user_id=job.user_id, subnet_id=1, reason="retention", requested_at=requested_at
        )
        assert await store.deletions.begin(job, receipt)
    await store.deletions.advance([1], Stage.RESULTS, Stage.CHUNKS, LATER)

    async def page(user_id: int | None, *stages: Stage, skip: int = 0, limit: int = 9) -> tuple[list[int], int]:
        found, total = await store.deletions.page(user_id, stages or list(Stage), skip, limit)
        return [each.job_id for each in found], total

    assert await page(7) == ([3, 1, 2], 3)
    assert await page(7, skip=1, limit=1) == ([1], 3)
    assert await page(7, Stage.RESULTS) == ([3, 2], 2)
    assert await page(7, Stage.DONE) == ([], 0)
    assert await page(None) == ([4, 3, 1, 2], 4)
    assert await page(None, Stage.CHUNKS, Stage.DONE) == ([1], 1)


async def test_chunks_of_a_job_are_deleted_up_to_a_limit(store: Store) -> None:
    """So many chunks of the job go, and none of another."""
    await store.chunks.insert([chunk(id=f"1-{n}", index=n) for n in range(5)])
    await store.chunks.insert([chunk(id="10-0", job_id=10)])
    assert [await store.chunks.count(n) for n in (1, 10, 2)] == [5, 1, 0]
    assert [await store.chunks.delete(1, 3) for _ in range(3)] == [3, 2, 0]
    assert [each.id for each in await all_chunks(store, 10)] == ["10-0"]


# Chunks


@pytest.mark.integration
async def test_attempts_of_deleted_chunks_are_kept(mongo_store: MongoStore, database: Database) -> None:
    """Which worker may have probed which address and port and when is kept for three years, without what was found."""
    queued = chunk(outcomes=".......x", ports="top:3")
    attempted = dispatch(queued, "w-1", THEN, size=4, share=1.0, estimate=0.5)
    probed = replace(attempted, outcomes="asdtl.rx", probed=Probed(common_ports="22,80,443", detection="sV7"))
    await mongo_store.chunks.insert([probed, chunk(id="1-1", index=1)])
    before = utc_now()
    assert await mongo_store.chunks.delete(1, 9) == 2
    ended = replace(probed, attempts=tuple(replace(each, ended=LATER) for each in probed.attempts))
    await mongo_store.chunks.insert([ended])  # the attempt ends after an archive whose deletion failed
    assert await mongo_store.chunks.delete(1, 9) == 1
    [kept] = await database["attempts"].find().to_list(None)
    forget_at = kept.pop("forget_at")
    assert timedelta(days=1_094) < forget_at - before < timedelta(days=1_096)
    stored = documents.write_chunk(ended)
    names = ("_id", "zone", "key", "job_id", "user_id", "first_address", "ports", "attempts", "dropped")
    assert kept == {name: stored[name] for name in names} | {"probed": "ppppp.rx", "common_ports": "22,80,443"}


async def test_chunk_round_trips(store: Store) -> None:
    """Every field of a chunk is kept, in every state."""
    run = Run(nmap="7.93", arguments="a" * 64, source="10.0.0.5", egress="192.0.2.1", rules="b" * 64, began=1.5)
    ended = Attempt(n=1, worker="w-0", at=THEN, claimed=THEN, ended=LATER, how="released", run=run)
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
            technique="syn",
            reach=2,
            share=0.25,
            attempt_estimate=0.125,
            dispatched_at=THEN,
            not_before=LATER,
            limit=3,
            failed_by=("w-1", "w-2"),
            no_route=("w-2",),
            fruitless=4,
            seconds=1.5,
            ask_at=LATER,
            asked=5,
            outcomes="a.xs",
            rev=5,
            attempts=(ended, Attempt(n=62, worker="w-1", at=LATER)),
            dropped=60,
            probed=Probed(common_ports="22", scripts=("banner",), detection="sV7/O/banner", discovery="none"),
        )
        for index, state in enumerate(ChunkState)
    ]
    await store.chunks.insert([*chunks, chunk(id="2-0", job_id=2)])
    assert await all_chunks(store, 1) == chunks
    assert await store.chunks.get(["1-3", "2-0", "9-9"]) == {"1-3": chunks[3], "2-0": chunk(id="2-0", job_id=2)}


async def test_inserting_chunks_again_changes_nothing(store: Store) -> None:
    """Existing chunks do not change, the others of the call are inserted, and all are read in order of their index."""
    await store.chunks.insert([chunk(id="1-10", index=10), chunk(id="1-2", index=2)])
    await store.chunks.insert([chunk(id="1-2", index=2, user_id=8), chunk(id="1-0", index=0)])
    assert [(each.id, each.user_id) for each in await all_chunks(store, 1)] == [("1-0", 7), ("1-2", 7), ("1-10", 7)]
    await store.chunks.insert([])


async def test_saving_chunks_is_a_compare_and_set(store: Store) -> None:
    """Of two saves of one read of a chunk the second loses; the others of its batch do not."""
    await store.chunks.insert([chunk(), chunk(id="1-1", index=1)])
    taken = dispatch(chunk(), "w-1", LATER, size=4, share=1.0, estimate=1.5)
    assert await store.chunks.save([taken]) == set()
    beside = dispatch(chunk(id="1-1", index=1), "w-2", LATER, size=4, share=0.5, estimate=1.5)
    assert await store.chunks.save([dispatch(chunk(), "w-2", LATER, size=4, share=1.0, estimate=1.5), beside]) == {
        "1-0"
    }
    assert await store.chunks.get(["1-0", "1-1"]) == {"1-0": replace(taken, rev=1), "1-1": replace(beside, rev=1)}
    assert await store.chunks.save([chunk(id="9-9")]) == {"9-9"}


async def test_chunks_are_found_by_state(store: Store) -> None:
    """Ids of a job's chunks in some states are found up to the limit, and the indexes of queued ones in a range."""
    states = [ChunkState.QUEUED, ChunkState.QUEUED, ChunkState.RUNNING, ChunkState.STORED]
    chunks = [chunk(id=f"1-{n}", index=n, state=state) for n, state in enumerate(states)]
    await store.chunks.insert([*chunks, chunk(id="3-0", job_id=3)])
    assert await store.chunks.ids_in([1], HELD, 10) == ["1-2"]
    assert len(await store.chunks.ids_in([1], OPEN, 2)) == 2
    assert set(await store.chunks.ids_in([1], OPEN, 10)) == {"1-0", "1-1", "1-2"}
    assert set(await store.chunks.ids_in([1, 3], {ChunkState.QUEUED}, 10)) == {"1-0", "1-1", "3-0"}
    assert await store.chunks.ids_in([], OPEN, 10) == []
    assert sorted(await store.chunks.queued(1, 0, 4)) == [0, 1]
    assert await store.chunks.queued(1, 1, 4) == [1]
    assert await store.chunks.queued(1, 0, 1) == [0]


async def test_chunks_are_read_from_an_index_to_another(store: Store) -> None:
    """A part of a job's chunks comes in order, from the first index up to the end."""
    await store.chunks.insert([chunk(id=f"1-{n}", index=n) for n in range(6)])
    assert [each.index async for each in store.chunks.of_job(1, 2, 5)] == [2, 3, 4]
    assert [each.index async for each in store.chunks.of_job(1, 4)] == [4, 5]
    assert [each.index async for each in store.chunks.of_job(1, 3, 3)] == []


@pytest.mark.parametrize(
    ("states", "standing"),
    [
        ([], Standing()),
        ([ChunkState.STORED, ChunkState.CANCELLED, ChunkState.FAILED], Standing()),
        ([ChunkState.STORED, ChunkState.QUEUED, ChunkState.DISPATCHED], Standing(2, begun=False, lowest=1)),
        ([ChunkState.QUEUED, ChunkState.RUNNING], Standing(2, begun=True, lowest=0)),
        ([ChunkState.STORED, ChunkState.STORED, ChunkState.SCANNED], Standing(1, begun=True, lowest=2)),
    ],
)
async def test_standing_of_a_job_counts_its_open_chunks(
    store: Store, states: list[ChunkState], standing: Standing
) -> None:
    """A job's standing has its open chunks, with the first of them and whether one has started."""
    await store.chunks.insert([chunk(id=f"1-{n}", index=n, state=state) for n, state in enumerate(states)])
    await store.chunks.insert([chunk(id="3-0", job_id=3)])
    assert await store.chunks.standings([1, 2]) == {1: standing, 2: Standing()}
    assert await store.chunks.standings([]) == {}


async def test_standings_are_consistent_with_concurrent_changes(store: Store) -> None:
    """Each chunk is counted once although chunks change between open states meanwhile."""
    chunks = [chunk(id=f"1-{n}", index=n) for n in range(5_000)]  # so many that a count lets writes go between
    await store.chunks.insert(chunks)
    stop = asyncio.Event()

    async def churn() -> None:
        current = {each.id: each for each in chunks}
        try:
            for state in (ChunkState.RUNNING, ChunkState.DISPATCHED, ChunkState.SCANNED, ChunkState.QUEUED):
                changed = [replace(each, state=state) for each in current.values()]
                for start in range(0, len(changed), 500):
                    assert await store.chunks.save(changed[start : start + 500]) == set()
                current = {each.id: replace(each, rev=each.rev + 1) for each in changed}
        finally:
            stop.set()

    moving = asyncio.create_task(churn())
    totals = set()
    while not stop.is_set():
        standing = (await store.chunks.standings([1]))[1]
        totals.add((standing.open, standing.lowest))
        totals.add((len(await all_chunks(store, 1)), 0))
        await asyncio.sleep(0)
    await moving
    assert totals == {(5_000, 0)}


async def test_held_chunks_are_found_by_partition(store: Store) -> None:
    """Held chunks are found for all or the given partitions, with the estimate of the attempt if it has one."""
    chunks = [
        chunk(id=f"1-{n}", index=n, state=state, partition=partition, attempt=2, worker_id="w-1", share=0.5)
        for n, (state, partition) in enumerate(
            [(ChunkState.RUNNING, 3), (ChunkState.DISPATCHED, 4), (ChunkState.QUEUED, 3), (ChunkState.SCANNED, 3)]
        )
    ]
    chunks[0] = replace(chunks[0], dispatched_at=THEN, attempt_estimate=0.125)
    await store.chunks.insert(chunks)
    first = Held(FencingToken(1, "1-0", 2, "w-1"), 7, 3, 0.125, 0.5, THEN)
    second = Held(FencingToken(1, "1-1", 2, "w-1"), 7, 4, 0.5, 0.5, None)
    assert sorted(await store.dispatch.held(), key=lambda each: each.token) == [first, second]
    assert await store.dispatch.held([3, 5]) == [first]
    assert await store.dispatch.held([]) == []


async def test_known_held_chunks_are_the_same_as_read_ones(store: Store) -> None:
    """With known attempts the held chunks are the same as without: an ended one is gone, and another attempt is read."""
    dispatched = [
        replace(
            chunk(id=f"1-{n}", index=n, state=ChunkState.DISPATCHED, attempt=1, worker_id="w-1"), dispatched_at=THEN
        )
        for n in range(4)
    ]
    known = {each.id: Held.of(each) for each in dispatched}
    await store.chunks.insert(
        [
            dispatched[0],
            replace(dispatched[1], attempt=2, worker_id="w-2"),
            replace(dispatched[2], state=ChunkState.QUEUED),
            replace(dispatched[3], id="1-4", index=4),
        ]
    )
    held = await store.dispatch.held(known=known)
    assert sorted(each.token for each in held) == [
        FencingToken(1, "1-0", 1, "w-1"),
        FencingToken(1, "1-1", 2, "w-2"),
        FencingToken(1, "1-4", 1, "w-1"),
    ]
    assert sorted(held, key=lambda each: each.token) == sorted(await store.dispatch.held(), key=lambda each: each.token)
    assert await store.dispatch.held(known={each.token.chunk_id: each for each in held}) == held


async def test_overdue_returns_scanned_chunks_whose_check_is_due(store: Store) -> None:
    """Overdue are the scanned chunks of the partitions whose check was due before, or is due after a longer time than any pause."""
    scanned = ChunkState.SCANNED
    await store.chunks.insert(
        [
            chunk(id="1-0", index=0, state=scanned, partition=3, ask_at=None),
            chunk(id="1-1", index=1, state=scanned, partition=3, ask_at=THEN),
            chunk(id="1-2", index=2, state=scanned, partition=3, ask_at=LATER),
            chunk(id="1-3", index=3, state=ChunkState.STORED, partition=3, ask_at=THEN),
            chunk(id="1-4", index=4, state=scanned, partition=5, ask_at=THEN),
            chunk(id="1-5", index=5, state=scanned, partition=6, ask_at=LATER + MAX_PAUSE),
            chunk(id="1-6", index=6, state=scanned, partition=6, ask_at=LATER + MAX_PAUSE + timedelta(seconds=1)),
        ],
    )
    assert {each.id for each in await store.chunks.overdue(LATER, 10, [6])} == {"1-6"}
    assert {each.id for each in await store.chunks.overdue(LATER, 10, [3])} == {"1-0", "1-1"}
    assert {each.id for each in await store.chunks.overdue(LATER, 10, [3, 5])} == {"1-0", "1-1", "1-4"}
    assert len(await store.chunks.overdue(LATER, 1, [3])) == 1
    assert await store.chunks.overdue(LATER, 10, []) == []


# Dispatch


async def test_queue_is_ordered_by_user_and_turn(store: Store) -> None:
    """A user's queued chunks are in order of turn, without raw or delayed ones or other jobs; no delay exceeds a minute."""
    await store.chunks.insert(
        [
            chunk(id="1-0", turn=5, failed_by=("w-1",), no_route=("w-1",)),
            chunk(id="1-1", index=1, turn=3, needs_raw=True),
            chunk(id="1-2", index=2, turn=4),
            chunk(id="1-3", index=3, turn=1, state=ChunkState.RUNNING),
            chunk(id="1-4", index=4, turn=6, not_before=LATER),
            chunk(id="1-5", index=5, turn=9, not_before=THEN + timedelta(seconds=61)),
            chunk(id="2-0", job_id=2, user_id=8, turn=0, needs_raw=True),
            chunk(id="3-0", job_id=3, user_id=9, turn=0, not_before=LATER),
        ],
    )

    async def ids(user: int, limit: int = 10, now: Any = THEN, *, raw: bool, **of: Any) -> list[str]:
        return [each.chunk_id for each in await store.dispatch.queue(user, limit, now, raw=raw, **of)]

    assert sorted(await store.dispatch.waiting_users(raw=True)) == [7, 8, 9]
    assert sorted(await store.dispatch.waiting_users(raw=False)) == [7, 9]
    assert await ids(9, raw=True) == []
    assert await ids(7, raw=True) == ["1-1", "1-2", "1-0", "1-5"]
    assert await ids(7, now=LATER, raw=True) == ["1-1", "1-2", "1-0", "1-4"]
    assert await ids(7, raw=False) == ["1-2", "1-0", "1-5"]
    assert await ids(7, 1, raw=True) == ["1-1"]
    assert await ids(7, raw=True, jobs=[2]) == []
    assert await ids(7, raw=True, skip=[1]) == []
    assert await ids(7, raw=False, jobs=[1, 2]) == ["1-2", "1-0", "1-5"]
    assert await ids(8, raw=False) == []
    assert (await store.dispatch.queue(7, 10, THEN, raw=False))[1] == Candidate(
        "1-0",
        7,
        1,
        0.5,
        needs_raw=False,
        failed_by=("w-1",),
        no_route=("w-1",),
        first_address="127.9.8.0",
        addresses=4,
        port_count=chunk().port_count,
    )


async def test_first_turn_is_of_queued_chunks_or_else_of_other_open_ones(store: Store) -> None:
    """Chunks that a worker holds or that are checked count only without queued ones; those that have ended never do."""
    turns = {
        7: {ChunkState.RUNNING: 1, ChunkState.QUEUED: 3},
        8: {ChunkState.STORED: 4, ChunkState.SCANNED: 5, ChunkState.RUNNING: 6, ChunkState.DISPATCHED: 7},
        9: {ChunkState.STORED: 2},
    }
    await store.chunks.insert(
        [
            chunk(
                id=f"{user}-{turn}", job_id=user, user_id=user, index=turn, turn=turn, state=state, needs_raw=user == 8
            )
            for user, by_state in turns.items()
            for state, turn in by_state.items()
        ]
    )
    assert await store.dispatch.first_turns({7, 8, 9, 99}) == {7: 3, 8: 5}


async def test_census_counts_unfinished_jobs_and_chunks(store: Store) -> None:
    """Unfinished jobs and chunks are counted by state; a job outside its hours is neither old nor work for more workers."""
    nothing = await store.jobs.census()
    assert (nothing.numbers, nothing.ages_seconds, await store.chunks.census()) == ({}, {}, {})
    assert (nothing.slot_seconds, await store.jobs.outbox_age()) == (0.0, 0.0)
    now = utc_now()
    created = {1: timedelta(hours=2), 2: timedelta(hours=3), 3: timedelta(hours=1), 4: -timedelta(hours=1)}
    jobs = [replace(scan_job(id_, created_at=now - age), outbox=()) for id_, age in created.items()]
    running = replace(jobs[3], status=JobStatus.RUNNING)
    created_ = create(replace(scan_job(5), outbox=(), created_at=now - timedelta(minutes=5)))
    over = [replace(change(created_, JobTrigger.CANCEL, now), id=id_, settled=id_ == 7) for id_ in (6, 7)]
    closed = replace(scan_job(8, created_at=now - timedelta(days=1)), outbox=(), waiting="window")
    await store.jobs.insert([*jobs[:3], running, *over, closed])
    await store.chunks.insert([chunk(id=f"1-{n}", index=n, state=state) for n, state in enumerate(ChunkState)])
    await store.chunks.insert([chunk(id="2-0", job_id=2, user_id=8, needs_raw=True, estimate=4.0)])
    census = await store.jobs.census()
    assert census.numbers == {JobStatus.PENDING: 4, JobStatus.RUNNING: 1}
    assert census.ages_seconds == {JobStatus.PENDING: pytest.approx(3 * 3_600, abs=60), JobStatus.RUNNING: 0.0}
    assert await store.chunks.census() == dict.fromkeys(OPEN, 1) | {ChunkState.QUEUED: 2}
    assert census.slot_seconds == pytest.approx(sum(job.seconds_left for job in [*jobs[:3], running]))
    assert await store.jobs.seconds_left() == pytest.approx(census.slot_seconds)
    assert await store.jobs.outbox_age() == pytest.approx(300, abs=60)


async def test_census_counts_open_deletions(store: Store) -> None:
    """Deletions count from their acceptance until they are complete, with the time since the oldest was requested."""
    assert await store.deletions.census() == DeletionCensus()
    now = utc_now()
    jobs = [replace(change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True), outbox=()) for n in range(1, 5)]
    await store.jobs.insert(jobs)
    for job in jobs:
        asked = now - timedelta(hours=5 - job.id)
        receipt = Deletion(job_id=job.id, user_id=7, subnet_id=1, reason="request", requested_at=asked)
        assert await store.deletions.begin(job, receipt)
    assert await store.deletions.advance([1, 2], Stage.RESULTS, Stage.CHUNKS, now) == 2
    assert await store.deletions.advance([1], Stage.CHUNKS, Stage.DONE, None) == 1
    census = await store.deletions.census()
    assert census.open == 3
    assert census.age_seconds == pytest.approx(3 * 3_600, abs=60)


async def test_clocks_rest_without_work(store: Store) -> None:
    """A user without queued or held chunks becomes idle and keeps its time; neither time nor virtual time falls."""
    await store.chunks.insert([chunk(), chunk(id="2-0", job_id=2, user_id=8, state=ChunkState.RUNNING)])
    await store.dispatch.activate_accounts([Account(7, 5.0), Account(8, 1.0), Account(9, 2.0)], 4.0)
    await store.dispatch.deactivate_accounts()
    working = {7: Account(7, 5.0, active=True), 8: Account(8, 1.0, active=True)}
    assert await store.dispatch.accounts([]) == Accounts(working, 4.0)
    assert await store.dispatch.accounts([9, 11]) == Accounts(working | {9: Account(9, 2.0, active=False)}, 4.0)
    await store.dispatch.activate_accounts([Account(7, 3.0)], 3.0)
    await store.dispatch.charge({7: 1.5, 8: 0.5, 10: 1.0})
    known = {7: Account(7, 6.5, active=True), 8: Account(8, 1.5, active=True), 10: Account(10, 1.0, active=False)}
    assert await store.dispatch.accounts([10]) == Accounts(known, 4.0)
    await store.dispatch.activate_accounts([], 8.0)
    await store.dispatch.charge({})
    assert (await store.dispatch.accounts([])).virtual == 8.0
    await store.dispatch.deactivate_accounts([7, 8])  # who wait for their hours: 8 still holds a chunk
    assert (await store.dispatch.accounts([])).users == {8: Account(8, 1.5, active=True)}


async def test_map_parts_are_those_of_the_jobs_chunks(store: Store) -> None:
    """In the order of the index, from the first up to the end."""
    chunks = [
        chunk(id=f"1-{n}", index=n, first_address=f"127.9.8.{n}", outcomes="a.", reach=n, state=state)
        for n, state in enumerate([ChunkState.STORED, ChunkState.RUNNING, ChunkState.QUEUED, ChunkState.QUEUED])
    ]
    await store.chunks.insert([*reversed(chunks), chunk(id="2-1", job_id=2, index=1)])
    assert [each async for each in store.chunks.map_parts(1, 1, 3)] == [
        MapPart(1, "127.9.8.1", ChunkState.RUNNING, "a.", 1),
        MapPart(2, "127.9.8.2", ChunkState.QUEUED, "a.", 2),
    ]


@pytest.mark.parametrize("seed", range(3))
async def test_deleted_clocks_change_no_start(store: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any arrivals, users start at the times that they would have if every account were kept; few accounts are stored."""
    for repository in ("job_orchestrator.repository", "job_orchestrator_testing.repository"):
        monkeypatch.setattr(f"{repository}.dispatch.KEEP_IDLE", timedelta(seconds=-1))
    chance = random.Random(seed)  # noqa: S311 # no secret
    kept: dict[int, Account] = {}
    virtual = 0.0
    busy: dict[int, Chunk] = {}
    for number in range(120):
        user = chance.randrange(1, 30)
        if working := busy.pop(user, None):  # a chunk of up to a minute ends, the user's last one
            seconds = chance.choice([0.5, 5.0, 60.0])
            await store.dispatch.charge({user: seconds})
            kept[user] = replace(kept[user], time=kept[user].time + seconds, active=False)
            assert not await store.chunks.save([replace(working, state=ChunkState.STORED)])
            await store.dispatch.deactivate_accounts()
        else:
            found = wake(await store.dispatch.accounts([user]), [user])
            assert found == wake(Accounts(kept, virtual), [user]), number
            kept |= found
            if chance.random() < 0.5:  # the user is served, rather than that others are
                virtual = max(virtual, found[user].time)
            await store.dispatch.activate_accounts(found.values(), virtual)
            busy[user] = chunk(id=f"{number}-0", job_id=number, user_id=user, state=ChunkState.RUNNING)
            await store.chunks.insert([busy[user]])
    stored = (await store.dispatch.accounts(kept)).users
    assert set(stored) == busy.keys() | {user for user, account in kept.items() if account.time > virtual}
    assert len(stored) < len(kept)


async def test_clock_of_a_user_who_was_just_active_is_kept(store: Store) -> None:
    """Time that the user has spent may be charged seconds later."""
    await store.dispatch.activate_accounts([Account(7, 5.0), Account(8, 5.0)], 9.0)
    await store.dispatch.deactivate_accounts()
    await store.dispatch.charge({7: 5.0})
    assert (await store.dispatch.accounts([7, 8])).users == {7: Account(7, 10.0), 8: Account(8, 5.0)}


async def test_open_chunks_of_a_job_are_counted(store: Store) -> None:
    """Queued chunks, those of them that need raw packets, and held ones; no other job's, no ended ones."""
    assert await store.chunks.count_open(1) == OpenChunks()
    await store.chunks.insert(
        [
            chunk(),
            chunk(id="1-1", index=1, estimate=1.0, needs_raw=True),
            chunk(id="1-2", index=2, state=ChunkState.DISPATCHED),
            chunk(id="1-3", index=3, state=ChunkState.RUNNING),
            chunk(id="1-4", index=4, state=ChunkState.SCANNED),
            chunk(id="1-5", index=5, state=ChunkState.STORED),
            chunk(id="2-0", job_id=2, estimate=4.0),
        ]
    )
    assert await store.chunks.count_open(1) == OpenChunks(queued=2, queued_raw=1, held=2)


def worker(name: str, slots: int = 2, *, raw: bool = False) -> Credit:
    return Credit(f"{name}-0000000a", name, slots, raw=raw, partition=3)


@pytest.mark.integration
async def test_live_workers_omits_announcements_of_a_clock_that_was_ahead(
    mongo_store: MongoStore, database: Database
) -> None:
    """A worker that was seen in an hour, by the time of the database now, is not live."""
    await mongo_store.dispatch.seen_workers([worker("w-1"), worker("w-2")])
    await database["workers"].update_one({"_id": "w-2"}, [{"$set": {"seen": {"$add": ["$seen", 3_600_000]}}}])
    assert [each.instance for each in await mongo_store.dispatch.live_workers(timedelta(minutes=1))] == ["w-1"]


async def test_live_workers_returns_workers_with_recent_announcements(store: Store) -> None:
    """A worker with slots that announced itself within a time is live; one without slots is not."""
    minute = timedelta(minutes=1)
    await store.dispatch.seen_workers([worker("w-1"), worker("w-2", 0), worker("w-3", raw=True)])
    live = sorted(await store.dispatch.live_workers(minute), key=lambda each: each.instance)
    assert live == [replace(worker("w-1"), partition=-1), replace(worker("w-3", raw=True), partition=-1)]
    assert await store.dispatch.live_workers(timedelta(seconds=-1)) == []
    await store.dispatch.seen_workers([worker("w-3", 0, raw=True)])
    assert [each.instance for each in await store.dispatch.live_workers(minute)] == ["w-1"]
    await store.dispatch.seen_workers([Credit("w-1-00000002", "w-1", 3, raw=True, partition=2)])
    assert await store.dispatch.live_workers(minute) == [Credit("w-1-00000002", "w-1", 3, raw=True, partition=-1)]
    await store.dispatch.seen_workers([])


async def test_time_is_the_databases(store: Store) -> None:
    """The store answers its database's time, in UTC, and it does not go back."""
    first, second = await store.time(), await store.time()
    assert first.utcoffset() == timedelta(0)
    assert first <= second
    assert abs(second - utc_now()) < timedelta(minutes=1)


async def test_plans_of_any_size_are_kept(store: Store) -> None:
    """All chunks of a job of thousands are stored once, though they are inserted twice."""
    job = scan_job(1, cidr="127.8.0.0/22", policy=scan_policy(ports="1-1000", timing=2))
    chunks = list(plan.chunks(job, 0, job.plan.chunk_count))
    assert len(chunks) == job.plan.chunk_count > 2_000
    await store.chunks.insert(chunks)
    await store.chunks.insert(chunks[:10])
    assert await all_chunks(store, 1) == chunks
    assert await store.chunks.save([cancel(each) for each in chunks]) == set()


# Documents of other releases

OLD_JOB_LACKS = {
    "chunk_ports",
    "blocks",
    "estimate",
    "partition",
    "blockwise",
    "turn",
    "made",
    "totals",
    "seconds_left",
    "eta_seconds",
    "waiting",
    "waiting_since",
}
OLD_CHUNK_LACKS = {
    "reach",
    "share",
    "attempt_estimate",
    "dispatched_at",
    "not_before",
    "limit",
    "failed_by",
    "no_route",
    "fruitless",
    "seconds",
    "ask_at",
    "asked",
    "held",
}


async def insert_old(database: Database, job: ScanJob) -> None:
    """A job with its chunks as release 0.1 wrote them."""
    document = documents.write_job(job)
    await database["jobs"].insert_one({name: document[name] for name in document if name not in OLD_JOB_LACKS})
    for each in plan.chunks(replanned(job, blockwise=False), 0, job.plan.chunk_count):
        lies = documents.write_chunk(each) | {"charged": 0.5, "scanned_at": None, "partition": -1}
        await database["chunks"].insert_one({name: lies[name] for name in lies if name not in OLD_CHUNK_LACKS})


@pytest.mark.integration
async def test_documents_of_release_0_1_are_read_and_adopted(mongo_store: MongoStore, database: Database) -> None:
    """A job without window, totals and partition has all of its chunks made; its partition is named in both documents."""
    job = scan_job(1, policy=scan_policy(ports="1-20000"), chunk_ports=8_192, blocks=3, chunk_count=3)
    await insert_old(database, job)
    await insert_old(database, replace(job, id=2, settled=True, outbox=()))
    old = (await mongo_store.jobs.get([1]))[1]
    assert (old.made, old.plan.blocks, old.plan.chunk_ports, old.plan.blockwise) == (3, 3, 8_192, False)
    assert (old.partition, old.totals, old.waiting, old.eta_seconds) == (job.partition, Totals(), "", None)
    assert await mongo_store.jobs.unsettled(0, 10, [job.partition]) == {}
    await mongo_store.prepare()
    assert await mongo_store.jobs.unsettled(0, 10, [job.partition]) == {1: ("pending", "")}
    chunks = await all_chunks(mongo_store, 1)
    assert {each.partition for each in chunks} == {job.partition}
    assert chunks == list(plan.chunks(old, 0, 3))
    assert {each.partition for each in await all_chunks(mongo_store, 2)} == {-1}


@pytest.mark.integration
async def test_saves_keep_fields_of_newer_releases(mongo_store: MongoStore, database: Database) -> None:
    """An unknown field survives a save of the job or chunk, and the document can still be read."""
    job, one = scan_job(1), chunk()
    await mongo_store.jobs.insert([job])
    await mongo_store.chunks.insert([one])
    for name in ("jobs", "chunks"):
        await database[name].update_one({}, {"$set": {"newer": {"deep": 1}}})
    await database["jobs"].update_one({}, {"$set": {"totals.newer": 5}})
    assert await mongo_store.jobs.save([running(job)]) == set()
    assert await mongo_store.chunks.save([dispatch(one, "w-1", LATER, size=4, share=1.0, estimate=1.5)]) == set()
    for name in ("jobs", "chunks"):
        document = await database[name].find_one({})
        assert document is not None
        assert (document["newer"], document["rev"]) == ({"deep": 1}, 1)
    emptied = published((await mongo_store.jobs.get([1]))[1], 2)
    assert await mongo_store.jobs.save([emptied]) == set()
    document = await database["jobs"].find_one({})
    assert document is not None
    assert "outbox" not in document
    assert (document["newer"], document["totals"]["newer"]) == ({"deep": 1}, 5)


@pytest.mark.integration
@pytest.mark.parametrize("broken", [{"state": "unknown"}, {"failed_by": 7}])
async def test_unreadable_chunks_are_left_out_counted_and_named(
    mongo_store: MongoStore, database: Database, broken: dict[str, Any]
) -> None:
    """A chunk that cannot be read stops no other; it is counted, and the log names it."""
    await mongo_store.chunks.insert([chunk(), chunk(id="1-1", index=1)])
    await database["chunks"].update_one({"_id": "1-0"}, {"$set": broken})
    before = UNREADABLE.labels("chunks")._value.get()
    with capture_logs() as logs:
        assert [each.id for each in await all_chunks(mongo_store, 1)] == ["1-1"]
        assert set(await mongo_store.chunks.get(["1-0", "1-1"])) == {"1-1"}
    assert UNREADABLE.labels("chunks")._value.get() == before + 2
    assert {(line["event"], line["id"]) for line in logs} == {("document_unreadable", "1-0")}


async def test_subnets_equal_to_lines_are_found_once_with_their_exclusions(store: Store) -> None:
    """Of equal subnets one is found, and none that differs in name, network, exclusions or user."""
    lines = [(f"lan {n}", ScanTarget(f"127.7.{n}.0/24", (f"127.7.{n}.9/32",))) for n in range(250)]
    await store.subnets.add(
        *(replace(subnet(n), name=name, content=target) for n, (name, target) in enumerate([*lines, *lines[:5]], 1)),
        replace(subnet(501), name="other", content=lines[0][1]),
        replace(subnet(502), name="lan 0", content=ScanTarget("127.7.0.0/24")),
        replace(subnet(503), user_id=8, name="lan 0", content=lines[0][1]),
    )
    found = await store.subnets.equal_to(7, [*lines, ("lan 250", lines[0][1])])
    assert sorted((each.name, each.content) for each in found) == sorted(lines)
    named = await store.subnets.named(7, ["lan 0", "lan 249", "none"])
    assert sorted(each.name for each in named) == ["lan 0"] * 3 + ["lan 249"]
    assert {each.content.exclude for each in named} == {()}
    assert await store.subnets.count_excludes(7, [1, 2, 2, 502, 503, 999]) == 2


@pytest.mark.integration
async def test_documents_expire_by_the_platforms_time(database: Database) -> None:
    """Commands and audit entries do not expire early because the clock of a replica is slow."""
    later = utc_now() + timedelta(days=900)
    store = MongoStore(database, KEYS, now=lambda: later, keep_audit=timedelta(days=1))
    await store.commands.insert([Command(id="c-1", user_id=7, state="expired")])
    await store.audit.add([own_entry("e-1", "use_key", "", "allowed", "")])
    command, entry = await database["commands"].find_one({}), await database["audit"].find_one({})
    assert command is not None
    assert entry is not None
    assert abs(command["at"] - later) < timedelta(seconds=1)
    assert abs(entry["received_at"] - later) < timedelta(seconds=1)
    assert abs(entry["forget_at"] - later - timedelta(days=1)) < timedelta(seconds=1)


@pytest.mark.integration
async def test_events_of_ended_jobs_of_the_first_release_are_found(mongo_store: MongoStore, database: Database) -> None:
    """An ended job without a partition whose events were not published gets one."""
    await mongo_store.jobs.insert([scan_job(1, settled=True)])
    await database["jobs"].update_one({"_id": 1}, {"$unset": {"partition": 1}})
    await mongo_store.prepare()
    found = await mongo_store.jobs.with_old_events(LATER, 10, range(SCAN_PROGRESS.partitions))
    assert [job.id for job in found] == [1]


@pytest.mark.integration
async def test_accepted_submits_of_many_pages_are_all_found(mongo_store: MongoStore) -> None:
    """A restore finds every command with jobs, page by page, among those without."""
    submits = [Command(id=f"s-{n}", user_id=7, state="accepted", jobs=(scan_job(n),)) for n in range(1, 251)]
    await mongo_store.commands.insert(
        [*submits, *(Command(id=f"c-{n}", user_id=7, state="accepted", cancels=n) for n in range(1, 99))]
    )
    assert sorted([each.id async for each in mongo_store.commands.accepted_submits()]) == sorted(
        each.id for each in submits
    )


@pytest.mark.integration
@pytest.mark.parametrize("broken", [{"$unset": {"created_at": 1}}, {"$set": {"updated_at": "yesterday"}}])
async def test_unreadable_resources_are_omitted_and_counted(
    mongo_store: MongoStore, database: Database, broken: dict[str, Any]
) -> None:
    """A subnet that cannot be read hides no other, neither by id, nor by network or name, nor in a list."""
    await mongo_store.subnets.add(
        subnet(1), replace(subnet(2), name=subnet(1).name, content=ScanTarget("127.7.7.0/24"))
    )
    await database["subnets"].update_one({"_id": 1}, broken)
    before = UNREADABLE.labels("subnets")._value.get()
    assert set(await mongo_store.subnets.get([(7, 1), (7, 2)])) == {(7, 2)}
    assert [each.id for each in (await mongo_store.subnets.page(7, 0, 9))[0]] == [2]
    lines = [(subnet(1).name, content) for content in (subnet(1).content, ScanTarget("127.7.7.0/24"))]
    assert [each.id for each in await mongo_store.subnets.equal_to(7, lines)] == [2]
    assert [each.id for each in await mongo_store.subnets.named(7, [subnet(1).name])] == [2]
    assert UNREADABLE.labels("subnets")._value.get() == before + 4


@pytest.mark.integration
@pytest.mark.proves("G17")
@pytest.mark.parametrize("jobs", [1, 30])
async def test_unreadable_queued_chunks_do_not_delay_the_other_jobs_of_their_user(
    mongo_store: MongoStore, database: Database, jobs: int
) -> None:
    """Thirty unreadable chunks with the lowest turns, of one job or of thirty, hide none of another job."""
    damaged = [chunk(id=f"c-{n}", job_id=1 + n % jobs, index=n, turn=n) for n in range(30)]
    await mongo_store.chunks.insert([*damaged, chunk(id="99-0", job_id=99, turn=99)])
    await database["chunks"].update_many({"turn": {"$lt": 30}}, {"$set": {"estimate": None}})
    for of in (None, range(100)):
        found = await mongo_store.dispatch.queue(7, 10, LATER, raw=True, jobs=of)
        assert [each.chunk_id for each in found] == ["99-0"]


@pytest.mark.integration
@pytest.mark.proves("G17")
async def test_queue_chunk_with_a_damaged_map_hides_no_other(mongo_store: MongoStore, database: Database) -> None:
    """The length of a map that is no text does not fail the query of the user's other chunks."""
    await mongo_store.chunks.insert([chunk(), chunk(id="1-1", index=1, turn=1)])
    await database["chunks"].update_one({"_id": "1-0"}, {"$set": {"outcomes": 7}})
    found = await mongo_store.dispatch.queue(7, 10, LATER, raw=True)
    assert {each.chunk_id: each.addresses for each in found} == {"1-0": 1, "1-1": 4}


@pytest.mark.integration
async def test_unreadable_jobs_are_left_out_counted_and_named(mongo_store: MongoStore, database: Database) -> None:
    """A job whose policy no longer parses, or a list's fields, stops no other; it is counted, and the log names it."""
    await mongo_store.jobs.insert([scan_job(1), scan_job(2)])
    await database["jobs"].update_one({"_id": 1}, {"$set": {"policy.timing": "fast"}})
    before = UNREADABLE.labels("jobs")._value.get()
    with capture_logs() as logs:
        assert set(await mongo_store.jobs.get([1, 2])) == {2}
        assert UNREADABLE.labels("jobs")._value.get() == before + 1
        await database["jobs"].update_one({"_id": 1}, {"$set": {"created_at": "once"}})
        assert [job.id for job in (await mongo_store.jobs.page(7, set(), 0, 10))[0]] == [2]
    assert UNREADABLE.labels("jobs")._value.get() == before + 2
    assert {(line["event"], line["id"]) for line in logs} == {("document_unreadable", "1")}


@pytest.mark.integration
@pytest.mark.proves("G17")
async def test_unreadable_receipts_do_not_delay_other_deletions(mongo_store: MongoStore, database: Database) -> None:
    """Unreadable receipts, also for the event that completes a deletion, do not fill a query: they are named, and retried later."""
    jobs = [replace(change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True), outbox=()) for n in range(1, 5)]
    await mongo_store.jobs.insert(jobs)
    for job in jobs:
        asked = THEN + timedelta(seconds=job.id)
        receipt = Deletion(job_id=job.id, user_id=7, subnet_id=1, reason="request", requested_at=asked)
        assert await mongo_store.deletions.begin(job, receipt)
    await database["jobs"].update_many({"_id": {"$lt": 3}}, {"$set": {"deletion.reason": "unknown"}})
    await database["jobs"].update_one({"_id": 3}, {"$set": {"deletion.user_id": 2**60}})
    now = THEN + timedelta(minutes=1)
    before = UNREADABLE.labels("deletions")._value.get()
    with capture_logs() as logs:
        assert await mongo_store.deletions.due(now, 3, chunks=False) == []
    assert {line["collection"] for line in logs} == {"deletions"}
    assert UNREADABLE.labels("deletions")._value.get() == before + 3
    assert [(line["event"], line["id"]) for line in logs] == [("document_unreadable", str(n)) for n in (1, 2, 3)]
    assert [each.job_id for each in await mongo_store.deletions.due(now, 3, chunks=False)] == [4]
    await database["jobs"].update_one({"_id": 2}, {"$set": {"deletion.reason": "request"}})
    assert [each.job_id for each in await mongo_store.deletions.due(now + timedelta(hours=1), 9, chunks=False)] == [
        4,
        2,
    ]


@pytest.mark.integration
async def test_receipt_in_an_unknown_stage_is_counted_and_retried_later(
    mongo_store: MongoStore, database: Database
) -> None:
    """A stage of another release is reported once an hour, until a release that reads it has advanced the receipt."""
    job = replace(change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True), outbox=())
    await mongo_store.jobs.insert([job])
    receipt = Deletion(job_id=1, user_id=7, subnet_id=1, reason="request", requested_at=THEN)
    assert await mongo_store.deletions.begin(job, receipt)
    await database["jobs"].update_one({"_id": 1}, {"$set": {"deletion.stage": "unknown"}})
    before = UNREADABLE.labels("deletions")._value.get()
    for hours in (0, 0, 1):
        assert await mongo_store.deletions.due(LATER + timedelta(hours=hours), 3, chunks=False) == []
    assert UNREADABLE.labels("deletions")._value.get() == before + 2
