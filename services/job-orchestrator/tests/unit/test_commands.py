"""Commands: accepted once, answered always, finished by any replica."""

from __future__ import annotations

import asyncio
import inspect
import tracemalloc
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import Store
from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.resources import Owned, ScanTarget, Subnet
from job_orchestrator_testing import MemoryStore, Simulation, scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import MemoryJobs, MemorySubnets
from job_orchestrator_testing.repository.data import Data
from scanfleet.contracts.messages import CommandAccepted, CommandRejected, JobEvent, JobStatus, Message, StopChunk
from scanfleet.contracts.messages.envelope import encode
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_EVENTS, SCAN_REPLIES, SCAN_TASKS, Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.targets import TargetRules, parse_network
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.tracing import ids, recording


async def jobs_of(simulation: Simulation) -> list[int]:
    jobs, _ = await simulation.store.jobs.page(7, set(), 0, 100)
    return sorted(job.id for job in jobs)


async def test_submit_creates_a_job_for_each_subnet(simulation: Simulation) -> None:
    """One reply names a pending job for each subnet, in the order asked for, and they are stored when it is sent."""
    command = await simulation.submit("127.9.8.0/30", "127.9.9.0/30")
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandAccepted)
    assert [(job.id, job.subnet_id, job.user_id, job.status) for job in reply.jobs] == [
        (1, 1, 7, JobStatus.PENDING),
        (2, 2, 7, JobStatus.PENDING),
    ]
    stored = await simulation.store.jobs.get([1, 2])
    assert [stored[1].view, stored[2].view] == list(reply.jobs)
    assert [event.seq for event in simulation.events(1)] == [1]


@pytest.mark.parametrize(
    ("policy", "made"),
    [
        (scan_policy(ports="22"), 1),
        (scan_policy(ports="22", max_rate=100), 0),
        (scan_policy(ports="T:22,U:53", discovery="none"), 0),
    ],
)
async def test_job_whose_window_must_hold_is_inserted_without_chunks(policy: ScanPolicy, made: int) -> None:
    """A job with a `max_rate` or several blocks of ports counts no chunk as created before they exist."""
    store = MemoryStore()
    simulation = Simulation(store)
    await simulation.start()
    command = await simulation.submit("127.9.8.0/30", policy=policy)
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert [job.made for job in store.data.commands[command].jobs] == [made]


async def test_job_keeps_its_snapshot_of_subnet_and_policy(simulation: Simulation) -> None:
    """Changing or deleting subnet and policy after the submit does not change the job."""
    command = await simulation.submit("127.9.8.0/30", policy=scan_policy(ports="22"))
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    await simulation.store.subnets.delete(7, 1)
    await simulation.store.policies.delete(7, 1)
    await simulation.settle()
    job = (await simulation.store.jobs.get([simulation.accepted(command)[0].id]))[1]
    assert (job.status, job.cidr, job.policy.ports) == (JobStatus.COMPLETED, "127.9.8.0/30", "22")


async def test_redelivered_command_is_answered_again_without_new_jobs(simulation: Simulation) -> None:
    """The same record handled three times, alone or twice in a batch, leaves one set of jobs and the same answer."""
    command = await simulation.submit("127.9.8.0/30", "127.9.9.0/30")
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.hand(SCAN_COMMANDS, records + records)
    await simulation.settle()
    await simulation.hand(SCAN_COMMANDS, records)
    assert await jobs_of(simulation) == [1, 2]
    assert {tuple(job.id for job in reply.jobs) for reply in simulation.replies(command)} == {(1, 2)}
    assert len(simulation.replies(command)) == 3


async def test_idempotency_key_creates_jobs_once(simulation: Simulation) -> None:
    """Commands under one key and body, in one batch or later, are all answered with the first one's jobs."""
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    commands = [await simulation.send(policy_id, subnets, key="k") for _ in range(50)]
    await simulation.settle()
    commands.append(await simulation.send(policy_id, subnets, key="k"))
    await simulation.settle()
    assert await jobs_of(simulation) == [1]
    assert {simulation.accepted(command)[0].id for command in commands} == {1}


class InsertedJobs(MemoryJobs):
    """Counts how often each job was inserted."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.inserted: Counter[int] = Counter()

    async def insert(self, jobs: Sequence[ScanJob]) -> None:
        self.inserted.update(job.id for job in jobs)
        await super().insert(jobs)


class EncodingBus(MemoryBus):
    """Encodes messages and stores only the number of replies."""

    replies = 0

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        envelopes = [encode(topic, message, source="test") for message in messages]
        self.replies += len(envelopes) * (topic is SCAN_REPLIES)


@pytest.fixture
async def large() -> Simulation:
    """A simulation with a policy, and a thousand subnets of user 7."""
    simulation = Simulation(MemoryStore())
    await simulation.start()
    await simulation.add(*(f"127.9.{n >> 8}.{n & 255}/32" for n in range(1_000)))
    return simulation


@pytest.mark.proves("A22")
async def test_repeats_of_a_large_command_in_one_batch_use_bounded_memory(large: Simulation) -> None:
    """Repeats of a command for a thousand jobs insert each job once, and need no more memory than a few of them."""
    store, bus = large.store, EncodingBus()
    assert isinstance(store, MemoryStore)
    store.jobs = jobs = InsertedJobs(store.data)
    replica = large.replica(store, bus)
    await large.send(1, range(1, 1_001), key="k")
    await replica.handlers[SCAN_COMMANDS].handle(large.take(SCAN_COMMANDS))
    for _ in range(16):
        await large.send(1, range(1, 1_001), key="k")
    records = large.take(SCAN_COMMANDS)
    jobs.inserted.clear()
    tracemalloc.start()
    while records:
        records = list(await replica.handlers[SCAN_COMMANDS].handle(records) or ())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(jobs.inserted.values()) == {1}
    assert bus.replies == 17
    assert peak < 10_000_000


async def test_finished_submits_are_forgotten_when_their_partitions_are_revoked(large: Simulation) -> None:
    """The jobs of a repeated command, which may be a thousand, do not stay in memory without records to repeat it."""
    replica = large.only
    for _ in range(3):
        await large.send(1, range(1, 1_001), key="k")
    assert await replica.handlers[SCAN_COMMANDS].handle(large.take(SCAN_COMMANDS))
    assert replica.commands._finished
    await replica.commands.revoked(range(12))
    assert not replica.commands._finished


async def test_repeat_behind_a_mismatched_one_gets_the_jobs(large: Simulation) -> None:
    """In a batch of several groups, another body under a key does not change the answer to the next repeat."""
    await large.send(1, range(1, 1_001), key="k")
    await large.hand(SCAN_COMMANDS, large.take(SCAN_COMMANDS))
    mismatched, repeat = await large.send(1, [1], key="k"), await large.send(1, range(1, 1_001), key="k")
    await large.hand(SCAN_COMMANDS, large.take(SCAN_COMMANDS))
    assert isinstance(large.replies(mismatched)[0], CommandRejected)
    assert len(large.accepted(repeat)) == 1_000


@pytest.mark.proves("G11")
async def test_commands_of_other_users_precede_the_rest_of_a_user_with_many(large: Simulation) -> None:
    """A batch carries out cancels, small submits and the oldest large one; newer ones of other users precede what it leaves."""
    handler = large.only.handlers[SCAN_COMMANDS]
    many = [await large.send(1, range(1, 1_001)) for _ in range(5)]
    policy_id, subnets = await large.add("127.8.0.0/30", user_id=8)
    cancel, small = await large.cancel(1), await large.send(policy_id, subnets, user_id=8)
    left = await handler.handle(large.take(SCAN_COMMANDS))
    assert [len(large.replies(command)) for command in (cancel, small, *many)] == [1, 1, 1, 0, 0, 0, 0]
    newer = await large.send(policy_id, subnets, user_id=8)
    left = await handler.handle([*(left or ()), *large.take(SCAN_COMMANDS)])
    assert [len(large.replies(command)) for command in (newer, *many)] == [1, 1, 1, 0, 0, 0]
    while left:
        left = await handler.handle(list(left))
    assert [len(large.replies(command)) for command in many] == [1, 1, 1, 1, 1]


@pytest.mark.proves("G11")
async def test_submits_of_many_jobs_are_carried_out_while_other_users_submit(large: Simulation) -> None:
    """A large submit, and a small one of its user behind it, do not wait until the submits of others end."""
    handler = large.only.handlers[SCAN_COMMANDS]
    others = {user_id: await large.add("127.8.0.0/30", user_id=user_id) for user_id in range(8, 12)}
    waiting = [await large.send(1, range(1, 1_001)), await large.send(1, [1])]
    left: Collection[Record[Any]] = []
    for user_id, (policy_id, subnets) in others.items():
        new = await large.send(policy_id, subnets, user_id=user_id)
        left = await handler.handle([*left, *large.take(SCAN_COMMANDS)]) or ()
        assert len(large.replies(new)) == 1
    assert [len(large.replies(command)) for command in waiting] == [1, 1]


@pytest.mark.proves("G11")
async def test_expired_submits_do_not_delay_the_next_one_of_their_user(large: Simulation) -> None:
    """A retry after a timeout is carried out in the first batch, although expired submits of its user precede it."""
    handler = large.only.handlers[SCAN_COMMANDS]
    for _ in range(3):
        await large.only.commands.expire(await large.send(1, range(1, 51)), 7)
    old = [replace(each, timestamp=each.timestamp - timedelta(seconds=2)) for each in large.take(SCAN_COMMANDS)]
    retry = await large.send(1, range(1, 51))
    assert not await handler.handle([*old, *large.take(SCAN_COMMANDS)])
    assert len(large.replies(retry)) == 1


@pytest.mark.proves("A22", "G20")
async def test_command_that_was_expired_is_not_planned() -> None:
    """A submit that waited, and that its gateway has expired meanwhile, reads neither its policy nor its subnets."""
    store, simulation = await counting_simulation()
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    expired, waited = [await simulation.send(policy_id, subnets) for _ in range(2)]
    assert await simulation.only.commands.expire(expired, 7) is None
    records = [
        replace(each, timestamp=each.timestamp - timedelta(seconds=2)) for each in simulation.take(SCAN_COMMANDS)
    ]
    await simulation.hand(SCAN_COMMANDS, records[1:])
    assert len(simulation.accepted(waited)) == 1
    store.calls.clear()
    await simulation.hand(SCAN_COMMANDS, records[:1])
    assert store.calls["policies.get"] == store.calls["subnets.get"] == 0
    assert simulation.replies(expired) == []


async def test_redelivered_submit_that_waited_counts_once_in_the_quota() -> None:
    """Behind an accepted submit that a new replica reads again, another within the quota of jobs is accepted."""
    simulation = Simulation(MemoryStore(), quotas=Quotas(unfinished_jobs_per_user=10))
    await simulation.start()
    policy_id, subnets = await simulation.add(*(f"127.9.8.{host}/32" for host in range(5)))
    accepted = await simulation.send(policy_id, subnets)
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    simulation.now += 5
    await simulation.restart()
    late = [replace(record, timestamp=record.timestamp - timedelta(seconds=5)) for record in records]
    second = await simulation.send(policy_id, subnets)
    await simulation.hand(SCAN_COMMANDS, [*late, *simulation.take(SCAN_COMMANDS)])
    assert len(simulation.accepted(second)) == 5
    assert len(simulation.accepted(accepted)) == 5
    assert len(await simulation.store.jobs.get(range(1, 100))) == 10


async def test_keys_of_other_requests_read_no_jobs() -> None:
    """Requests under the keys of other ones, which may have a thousand jobs each, are refused without reading these."""
    store, simulation = await counting_simulation()
    policy_id, subnets = await simulation.add("127.9.8.0/30", "127.9.8.4/30")
    for n in range(3):
        await simulation.send(policy_id, subnets, key=f"k-{n}")
    await simulation.settle()
    store.calls.clear()
    commands = [await simulation.send(policy_id, subnets[:1], key=f"k-{n}") for n in range(3)]
    await simulation.settle()
    assert [type(simulation.replies(command)[0]) for command in commands] == [CommandRejected] * 3
    assert store.calls["commands.get"] == 0


async def test_late_repeat_of_a_key_expires(simulation: Simulation) -> None:
    """A repeat that was in the log for more than a minute gets no reply, as any other command."""
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    await simulation.send(policy_id, subnets, key="k")
    await simulation.settle()
    simulation.now += 61
    repeat = await simulation.send(policy_id, subnets, key="k")
    old = [replace(each, timestamp=each.timestamp - timedelta(seconds=61)) for each in simulation.take(SCAN_COMMANDS)]
    await simulation.hand(SCAN_COMMANDS, old)
    assert simulation.replies(repeat) == []


async def test_repeat_after_a_minute_reads_and_inserts_no_existing_job(simulation: Simulation) -> None:
    """A repeat of an older command is answered from the command, and only a job that is missing is inserted."""
    store = simulation.store
    assert isinstance(store, MemoryStore)
    store.jobs = jobs = InsertedJobs(store.data)
    await simulation.restart()
    policy_id, subnets = await simulation.add("127.9.8.0/30", "127.9.8.4/30")
    await simulation.send(policy_id, subnets, key="k")
    await simulation.settle()
    simulation.now += 61
    await simulation.catch_up()
    jobs.inserted.clear()
    repeat = await simulation.send(policy_id, subnets, key="k")
    await simulation.settle()
    assert [job.id for job in simulation.accepted(repeat)] == [1, 2]
    assert jobs.inserted == {}
    del store.data.jobs[2]
    await simulation.send(policy_id, subnets, key="k")
    await simulation.settle()
    assert jobs.inserted == {2: 1}
    assert (await store.jobs.get([2]))[2].status is JobStatus.COMPLETED


class UnavailableJobIds(MemoryJobs):
    """Fails before jobs are planned."""

    async def take_ids(self, count: int = 1) -> range:
        raise DependencyError(f"no {count} ids")


@pytest.mark.proves("A22")
async def test_cancel_is_answered_before_the_submits_of_its_batch() -> None:
    """A cancel is carried out and answered although the submits that were sent before it cannot even be decided."""
    store = MemoryStore()
    simulation = Simulation(store)
    await simulation.start()
    submitted = await simulation.submit()
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    store.jobs = UnavailableJobIds(store.data)
    await simulation.restart()
    await simulation.submit()
    cancel = await simulation.cancel(simulation.accepted(submitted)[0].id)
    with pytest.raises(DependencyError, match="no 1 ids"):
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert isinstance(simulation.replies(cancel)[0], CommandAccepted)


async def test_idempotency_key_with_another_body_is_refused(simulation: Simulation) -> None:
    """The same key with another policy or subnet is a 400; for another user it is another key."""
    policy_id, (one, other) = await simulation.add("127.9.8.0/30", "127.9.9.0/30")
    await simulation.send(policy_id, [one], key="k")
    mismatched = [
        await simulation.send(policy_id, [other], key="k"),
        await simulation.send(policy_id, [one, other], key="k"),
    ]
    theirs = await simulation.submit("127.9.8.0/30", user_id=8, key="k")
    await simulation.settle()
    for command in mismatched:
        (reply,) = simulation.replies(command)
        assert isinstance(reply, CommandRejected)
        assert (reply.status, "Idempotency-Key" in reply.error) == (400, True)
    assert await jobs_of(simulation) == [1]
    assert simulation.accepted(theirs)[0].user_id == 8


async def test_refused_command_leaves_its_key_unused(simulation: Simulation) -> None:
    """After a 400 the same key can be sent again once the request is right."""
    policy_id, _ = await simulation.add()
    first = await simulation.send(policy_id, [1], key="k")
    await simulation.settle()
    await simulation.add("127.9.8.0/30")
    second = await simulation.send(policy_id, [1], key="k")
    await simulation.settle()
    assert isinstance(simulation.replies(first)[0], CommandRejected)
    assert isinstance(simulation.replies(second)[0], CommandAccepted)


@pytest.mark.parametrize(
    ("policy", "subnets", "error"),
    [
        (99, [1], "Policy 99 not found"),
        (2, [1], "Policy 2 not found"),
        (1, [1, 99, 98], "Subnet 99, 98 not found"),
        (1, [1, 2], "Subnet 2 not found"),
        (1, [1, 1], "The same subnet is given twice"),
        (1, [3], "Subnet 3: 10.0.0.0/30 is not within the networks that this platform allows"),
    ],
)
async def test_submit_is_checked_before_any_job_is_created(
    simulation: Simulation,
    policy: int,
    subnets: list[int],
    error: str,
) -> None:
    """A policy or subnet that is unknown, another user's, given twice or denied is a 400 that names it; no job is made."""
    await simulation.add("127.9.8.0/30")
    await simulation.add("127.9.8.0/30", user_id=8)
    await simulation.add("10.0.0.0/30")
    command = await simulation.send(policy, subnets)
    await simulation.settle()
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandRejected)
    assert (reply.status, reply.error) == (400, error)
    assert await jobs_of(simulation) == []


@pytest.mark.proves("A23", "G12")
async def test_policy_of_an_older_release_with_categories_is_refused(simulation: Simulation) -> None:
    """A stored policy that names a category of scripts creates no job, and the answer names the change to make."""
    await simulation.add("127.9.8.0/30")
    (stored,) = (await simulation.store.policies.get([(7, 1)])).values()
    await simulation.store.policies.replace(
        replace(stored, content=stored.content.model_copy(update={"scripts": ("default",)}))
    )
    command = await simulation.send(1, [1])
    await simulation.settle()
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandRejected)
    assert reply.status == 400
    assert (
        "Policy 1 must be changed before it can be used: scripts.0: default is not one of the allowed scripts"
        in reply.error
    )
    assert await jobs_of(simulation) == []


@pytest.mark.proves("G17")
async def test_submit_of_a_damaged_subnet_is_refused_without_delaying_others(simulation: Simulation) -> None:
    """A stored network that cannot be read refuses its own submit, and the others of the batch are accepted."""
    _, (damaged, intact) = await simulation.add("127.9.8.0/30", "127.9.9.0/30")
    (stored,) = (await simulation.store.subnets.get([(7, damaged)])).values()
    await simulation.store.subnets.replace(replace(stored, content=ScanTarget("foo")))
    refused, accepted = await simulation.send(1, [damaged]), await simulation.send(1, [intact])
    await simulation.settle()
    (reply,) = simulation.replies(refused)
    assert isinstance(reply, CommandRejected)
    assert reply.status == 400
    assert f"Subnet {damaged} must be corrected: " in reply.error
    assert [type(each) for each in simulation.replies(accepted)] == [CommandAccepted]


async def test_job_excludes_the_broadcast_address_of_its_subnet() -> None:
    """The job excludes one address more than its subnet, which does not change, and the plan counts it."""
    simulation = Simulation(MemoryStore(), rules=TargetRules((parse_network("10.0.0.0/8"),)))
    await simulation.start()
    command = await simulation.submit("10.0.0.0/29")
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    (accepted,) = simulation.accepted(command)
    job = (await simulation.store.jobs.get([accepted.id]))[accepted.id]
    assert (job.exclude, job.plan.addresses, job.plan.excluded) == (("10.0.0.7/32",), 8, 1)
    (subnet,) = (await simulation.store.subnets.get([(7, job.subnet_id)])).values()
    assert subnet.content.exclude == ()


class Growing(MemorySubnets):
    """Subnets that get more excludes after they were counted."""

    missed = 0
    read = 0

    async def get(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Subnet]:
        self.read += len(keys)
        return await super().get(keys)

    async def count_excludes(self, user_id: int, ids: Collection[int]) -> int:
        return await super().count_excludes(user_id, ids) - self.missed


@pytest.mark.parametrize(("missed", "read"), [(0, 0), (1_001, 101)])
async def test_submit_too_large_for_a_document_is_a_400(missed: int, read: int) -> None:
    """A thousand subnets with a thousand excludes each are a 400, without reading them, and not an error of the service."""
    store = MemoryStore()
    store.subnets = subnets = Growing(store.data, "subnets")
    subnets.missed = missed
    simulation = Simulation(store)
    await simulation.start()
    policy_id, _ = await simulation.add()
    excludes = tuple(f"127.{n >> 8}.{n & 255}.1/32" for n in range(1_000))
    for id_ in range(1, 102):
        await simulation.store.subnets.add(
            Owned(
                id=id_,
                user_id=7,
                name="x",
                content=ScanTarget("127.0.0.0/8", excludes),
                created_at=THEN,
                updated_at=THEN,
            ),
        )
    command = await simulation.send(policy_id, range(1, 102))
    await simulation.settle()
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandRejected)
    assert (reply.status, "exclude 101000 networks" in reply.error) == (400, True)
    assert subnets.read == read


async def test_late_command_expires(simulation: Simulation) -> None:
    """A command that was in the log for more than a minute expires: no jobs and no reply, after a redelivery either."""
    command = await simulation.submit()
    simulation.now += 61  # in which nothing was read
    old = [replace(each, timestamp=each.timestamp - timedelta(seconds=61)) for each in simulation.take(SCAN_COMMANDS)]
    await simulation.hand(SCAN_COMMANDS, old)
    fresh = [replace(each, timestamp=each.timestamp + timedelta(seconds=61)) for each in old]
    await simulation.hand(SCAN_COMMANDS, fresh)
    await simulation.settle()
    assert simulation.replies(command) == []
    assert await jobs_of(simulation) == []


async def test_command_at_a_caught_up_replica_is_accepted_at_any_clock_time(simulation: Simulation) -> None:
    """A replica that has read everything within the last minute accepts each new command, even one an hour old by its clock."""
    command = await simulation.submit()
    records = [replace(each, timestamp=each.timestamp - timedelta(hours=1)) for each in simulation.take(SCAN_COMMANDS)]
    simulation.now += 59
    await simulation.hand(SCAN_COMMANDS, records)
    assert isinstance(simulation.replies(command)[0], CommandAccepted)


async def test_age_of_a_command_after_a_rebalance_is_by_its_timestamp(simulation: Simulation) -> None:
    """After a rebalance, an earlier read of the partition does not count: an old command expires."""
    await simulation.only.commands.revoked(range(SCAN_COMMANDS.partitions))
    command = await simulation.submit()
    records = [replace(each, timestamp=each.timestamp - timedelta(hours=1)) for each in simulation.take(SCAN_COMMANDS)]
    await simulation.hand(SCAN_COMMANDS, records)
    assert simulation.replies(command) == []
    assert await jobs_of(simulation) == []


async def test_redelivery_of_an_accepted_command_after_a_minute_is_answered(simulation: Simulation) -> None:
    """A command that was accepted in time stays accepted, however late its record is redelivered."""
    command = await simulation.submit()
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.hand(
        SCAN_COMMANDS, [replace(each, timestamp=each.timestamp - timedelta(hours=1)) for each in records]
    )
    assert [type(reply) for reply in simulation.replies(command)] == [CommandAccepted] * 2


async def test_expired_command_is_never_accepted(simulation: Simulation) -> None:
    """After the gateway was answered that a command is expired, its record creates no job and gets no reply."""
    command = await simulation.submit()
    assert await simulation.only.commands.expire(command, 7) is None
    await simulation.settle()
    assert simulation.replies(command) == []
    assert await jobs_of(simulation) == []


async def test_expire_of_a_decided_command_returns_its_reply(simulation: Simulation) -> None:
    """Expiring an accepted or rejected command returns its reply, however often, and the jobs continue."""
    accepted = await simulation.submit()
    rejected = await simulation.send(99, [1])
    await simulation.settle()
    for _ in range(2):
        answer = await simulation.only.commands.expire(accepted, 7)
        assert isinstance(answer, CommandAccepted)
        assert [job.id for job in answer.jobs] == [1]
        assert isinstance(await simulation.only.commands.expire(rejected, 7), CommandRejected)
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED


async def test_expire_finishes_a_command_of_a_crashed_replica(simulation: Simulation) -> None:
    """A command that was accepted by a replica that crashed before creating the jobs is finished by the replica that is asked."""
    await simulation.submit()
    await simulation.settle()
    (job,) = (await simulation.store.jobs.get([1])).values()
    half = Command(id="half", user_id=7, state="accepted", jobs=(replace(job, id=99, command_id="half"),))
    await simulation.store.commands.insert([half])
    answer = await simulation.only.commands.expire("half", 7)
    assert isinstance(answer, CommandAccepted)
    assert list(await simulation.store.jobs.get([99])) == [99]


async def test_expire_of_another_users_command_reveals_and_changes_nothing(simulation: Simulation) -> None:
    """Expiring another user's command is answered as for an unknown one, and changes nothing."""
    command = await simulation.submit()
    await simulation.settle()
    assert await simulation.only.commands.expire(command, 8) is None
    assert (await simulation.store.commands.get([command]))[command].state == "accepted"


async def test_cancel_ends_a_pending_job(simulation: Simulation) -> None:
    """A cancel of a pending job ends it without a start, and its chunks are never dispatched."""
    simulation.workers = []
    submitted = await simulation.submit()
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    await simulation.only.reconciler.work()
    cancelled = await simulation.cancel(simulation.accepted(submitted)[0].id)
    await simulation.settle()
    (reply,) = simulation.replies(cancelled)
    assert isinstance(reply, CommandAccepted)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.start_time, job.settled) == (JobStatus.CANCELLED, None, True)
    assert reply.jobs == (job.view,)
    assert job.end_time is not None
    assert [chunk.state async for chunk in simulation.store.chunks.of_job(1)] == [ChunkState.CANCELLED]
    assert [type(event).__name__ for event in simulation.events(1)] == ["JobCreated", "JobCancelled"]
    assert simulation.bus.messages(SCAN_TASKS) == []


class RecordingPublisher:
    """Records the types of the published messages."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.kinds: list[str] = []

    async def publish(self, topic: Topic[Message], messages: Iterable[Message]) -> None:
        messages = list(messages)
        self.kinds += [type(each).__name__ for each in messages]
        await self._publisher.publish(topic, messages)


async def recorded_scan(simulation: Simulation) -> RecordingPublisher:
    """Start a scan that does not end, and return what records the messages of its orchestrator."""
    publisher = RecordingPublisher(simulation.bus)
    simulation.replicas = [simulation.replica(publisher=publisher)]
    simulation.worker.hold = True
    await simulation.start_scan()
    return publisher


async def test_reply_to_a_cancel_follows_the_stops(simulation: Simulation) -> None:
    """Workers are sent the stop before the caller gets the reply, so no later failure of an orchestrator delays it."""
    publisher = await recorded_scan(simulation)
    await simulation.cancel(1)
    await simulation.settle()
    kinds = [kind for kind in publisher.kinds if kind in {"ScanChunk", "StopChunk", "CommandAccepted"}]
    assert kinds == ["CommandAccepted", "ScanChunk", "StopChunk", "CommandAccepted"]


async def test_bulk_cancel_that_fails_stops_the_scans_all_the_same(simulation: Simulation) -> None:
    """A bulk cancel that cannot read the chunks fails, and the work loop stops the scans of the jobs that it has ended."""
    simulation.worker.hold = True
    await simulation.start_scan("127.9.8.0/30")

    async def unavailable(*_: object, **__: object) -> None:
        raise DependencyError("unavailable")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(simulation.store.chunks, "ids_in", unavailable)
        with pytest.raises(DependencyError):
            await simulation.only.cancels.cancel([1])
    assert await simulation.only.cancels.cancel([1]) == []
    await simulation.only.reconciler.work()
    assert [each.chunk_id for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)] == ["1-0"]


async def test_bulk_cancel_returns_after_the_stops(simulation: Simulation) -> None:
    """Workers are sent the stops of all jobs before the caller gets the response, also while events cannot be published."""
    publisher = await recorded_scan(simulation)
    publisher.kinds.clear()
    simulation.bus.broker.leaderless = {(SCAN_EVENTS.name, partition) for partition in range(SCAN_EVENTS.partitions)}
    assert await simulation.only.cancels.cancel([1]) == [1]
    assert publisher.kinds[0] == "StopChunk"


async def test_cancel_of_a_running_job_stops_its_workers(simulation: Simulation) -> None:
    """A cancel of a running job stops the holder of each chunk at once, and the last map is kept."""
    simulation.worker.hold = True
    await simulation.submit()
    await simulation.settle()
    (task,) = simulation.worker.tasks
    await simulation.worker.claim(task)
    await simulation.settle()
    await simulation.cancel(1)
    await simulation.settle()
    assert [(stop.chunk_id, stop.attempt) for stop in simulation.worker.stops] == [(task.chunk_id, task.attempt)]
    await simulation.worker.release(task, "as..")
    await simulation.settle()
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.settled) == (JobStatus.CANCELLED, True)
    [chunk] = [each async for each in simulation.store.chunks.of_job(1)]
    assert (chunk.state, chunk.outcomes) == (ChunkState.CANCELLED, "as..")


async def test_redelivered_cancel_is_accepted_again(simulation: Simulation) -> None:
    """Every redelivery of the cancel is answered with success; another cancel is answered that the job is cancelled."""
    simulation.workers = []
    await simulation.submit()
    await simulation.settle()
    first = await simulation.cancel(1)
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.hand(SCAN_COMMANDS, records)
    second = await simulation.cancel(1)
    await simulation.settle()
    assert [type(reply) for reply in simulation.replies(first)] == [CommandAccepted] * 2
    assert simulation.replies(second) == [
        CommandRejected(command_id=second, status=400, error="Job is already cancelled", rule="state"),
    ]


async def test_cancel_of_an_ended_job_is_refused(simulation: Simulation) -> None:
    """A cancel after completion is a 400 with that reason, and the job stays completed."""
    await simulation.submit()
    await simulation.settle()
    late = await simulation.cancel(1)
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.hand(SCAN_COMMANDS, records)
    rejected = CommandRejected(command_id=late, status=400, error="Job is already completed", rule="state")
    assert simulation.replies(late) == [rejected, rejected]
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED


async def test_spans_of_a_job_are_in_the_trace_of_its_request(simulation: Simulation) -> None:
    """The command, each dispatch and each life-cycle event are spans of the request's trace; a worker continues its dispatch."""
    trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    await simulation.submit()
    records = simulation.take(SCAN_COMMANDS)
    traced = [replace(each, message=each.message.model_copy(update={"traceparent": trace})) for each in records]
    simulation.worker.hold = True
    await simulation.worker.announce()
    with recording() as exporter:
        await simulation.hand(SCAN_COMMANDS, traced)
        await simulation.settle()
        (task,) = simulation.worker.tasks
        await simulation.worker.claim(task)
        await simulation.settle()
        await simulation.worker.scanned(task)
        await simulation.settle()
    spans = exporter.get_finished_spans()
    assert {span.name for span in spans} == {"SubmitJobs", "JobCreated", "dispatch chunk", "JobStarted", "JobCompleted"}
    assert {f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" for span in spans if span.parent} == {trace[3:-3]}
    (dispatched,) = (span for span in spans if span.name == "dispatch chunk")
    assert (task.traceparent or "")[36:52] == f"{ids(dispatched).span_id:016x}"


async def test_cancel_of_another_users_job_is_a_404(simulation: Simulation) -> None:
    """A cancel of another user's job, or of none, is a 404 and changes nothing."""
    simulation.workers = []
    await simulation.submit()
    await simulation.settle()
    for command in (await simulation.cancel(1, user_id=8), await simulation.cancel(99)):
        await simulation.settle()
        assert [(each.status, each.error) for each in simulation.replies(command)] == [(404, "Job not found")]
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.PENDING


@pytest.mark.proves("A24", "G13")
async def test_administrator_cancels_the_job_of_another_user(simulation: Simulation) -> None:
    """A cancel by an administrator ends any job, with the same reply as for the owner; an unknown job is a 404."""
    simulation.workers = []
    await simulation.submit()
    await simulation.settle()
    cancelled, unknown = (
        await simulation.cancel(1, user_id=9, admin=True),
        await simulation.cancel(99, user_id=9, admin=True),
    )
    await simulation.settle()
    assert simulation.accepted(cancelled)[0].status is JobStatus.CANCELLED
    assert [each.status for each in simulation.replies(unknown)] == [404]
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.CANCELLED


async def test_cancels_in_one_batch_are_answered_in_order(simulation: Simulation) -> None:
    """Cancels of one job in one batch are answered as if sent one after the other; another user's has no effect."""
    simulation.workers = []
    await simulation.submit()
    await simulation.settle()
    stranger, first, second = [await simulation.cancel(1, user_id=user) for user in (8, 7, 7)]
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert [each.status for each in simulation.replies(stranger)] == [404]
    assert simulation.accepted(first)[0].status is JobStatus.CANCELLED
    assert [(each.status, each.error) for each in simulation.replies(second)] == [(400, "Job is already cancelled")]


async def test_batch_of_cancels_costs_a_fixed_number_of_writes(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred cancels need as many saves of jobs as one, so that none waits for the others."""
    await simulation.store.jobs.insert([scan_job(id_) for id_ in range(1, 102)])
    saves: list[int] = []
    save = simulation.store.jobs.save

    async def counted(jobs: Sequence[ScanJob]) -> set[int]:
        saves.append(len(jobs))
        return await save(jobs)

    monkeypatch.setattr(simulation.store.jobs, "save", counted)
    await simulation.cancel(101)
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    alone = len(saves)
    commands = [await simulation.cancel(id_) for id_ in range(1, 101)]
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert len(saves) == 2 * alone
    assert {simulation.accepted(command)[0].status for command in commands} == {JobStatus.CANCELLED}


async def test_command_is_answered_after_the_broker_was_unavailable(simulation: Simulation) -> None:
    """A command whose reply cannot be published is carried out, and the reply is returned when the gateway requests it."""
    command = await simulation.submit()
    simulation.bus.broker.unavailable = True
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert await jobs_of(simulation) == [1]
    simulation.bus.broker.unavailable = False
    reply = await simulation.only.commands.expire(command, 7)
    assert isinstance(reply, CommandAccepted)
    assert [job.id for job in reply.jobs] == [1]
    assert [event.seq for event in simulation.events(1)] == [1]


@pytest.mark.proves("F27", "G17")
async def test_job_whose_events_are_invalid_stops_no_other_cancel(simulation: Simulation) -> None:
    """Beside a damaged job the others are cancelled, by a command or all at once."""
    damaged = replace(scan_job(1), machines_found=-1)
    await simulation.store.jobs.insert([damaged, scan_job(2), scan_job(3)])
    commands = [await simulation.cancel(id_) for id_ in (1, 2)]
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert [type(simulation.replies(command)[0]) for command in commands] == [CommandRejected, CommandAccepted]
    assert (simulation.replies(commands[0])[0].status, simulation.replies(commands[0])[0].rule) == (503, "state")
    assert await simulation.only.cancels.cancel([1, 2, 3]) == [3]


@pytest.mark.parametrize("topic", [SCAN_EVENTS, SCAN_REPLIES])
async def test_partition_without_a_leader_blocks_no_other_command(simulation: Simulation, topic: Topic) -> None:
    """Commands whose replies or events cannot be published are carried out, and those behind them are answered."""
    simulation.worker.hold = True
    simulation.bus.broker.leaderless = {(topic.name, topic.partition_of("1" if topic is SCAN_EVENTS else "command-1"))}
    await simulation.submit("127.9.8.0/30")
    other = await simulation.submit("127.9.9.0/30")
    await simulation.settle()
    await simulation.cancel(1)
    cancel = await simulation.cancel(2)
    await simulation.settle()
    assert {job.status for job in (await simulation.store.jobs.get([1, 2])).values()} == {JobStatus.CANCELLED}
    assert [len(simulation.replies(command)) for command in (other, cancel)] == [1, 1]
    assert [event.seq for event in simulation.events(2)] == [1, 2]
    simulation.bus.broker.leaderless.clear()
    await simulation.wait(10)
    assert [event.seq for event in simulation.events(1)] == [1, 2]


class StalledBus(MemoryBus):
    """Never publishes events of job 1, and fails after ten seconds."""

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        sent = list(messages)
        if any(isinstance(each, JobEvent) and each.job.id == 1 for each in sent):
            await asyncio.sleep(10)
            raise DependencyError("no leader")
        await super().publish(topic, sent)


async def test_stalled_partition_does_not_delay_replies() -> None:
    """Behind a submit whose events cannot be published, a cancel and a repair are answered before the gateway gives up."""
    simulation = Simulation(MemoryStore(), bus=StalledBus())
    simulation.worker.hold = True
    await simulation.start()
    stalled = await simulation.submit("127.9.8.0/30")
    other = await simulation.submit("127.9.9.0/30")
    async with asyncio.timeout(4):  # a gateway waits for 5 seconds
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
        cancel = await simulation.cancel(2)
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert [len(simulation.replies(command)) for command in (other, cancel)] == [1, 1]
    async with asyncio.timeout(4):
        assert isinstance(await simulation.only.commands.expire(stalled, 7), CommandAccepted)


async def test_traceparent_of_a_request_is_in_events_and_tasks(simulation: Simulation) -> None:
    """Events and tasks of a job have the traceparent of the request that created it."""
    trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    await simulation.submit()
    records = simulation.take(SCAN_COMMANDS)
    traced = [replace(each, message=each.message.model_copy(update={"traceparent": trace})) for each in records]
    await simulation.hand(SCAN_COMMANDS, traced)
    await simulation.settle()
    assert {event.traceparent for event in simulation.events(1)} == {trace}
    assert {task.traceparent for task in simulation.worker.tasks} == {trace}


class CountingStore:
    """Counts the calls of each method of the repositories."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> object:
        return _CountingRepository(name, getattr(self._store, name), self.calls)


class _CountingRepository:
    def __init__(self, name: str, repository: object, calls: Counter[str]) -> None:
        self._name = name
        self._repository = repository
        self._calls = calls

    def __getattr__(self, name: str) -> object:
        found = getattr(self._repository, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def counted(*arguments: Any, **named: Any) -> Any:
            self._calls[f"{self._name}.{name}"] += 1
            return await found(*arguments, **named)

        return counted


async def counting_simulation() -> tuple[CountingStore, Simulation]:
    store = CountingStore(MemoryStore())
    simulation = Simulation(cast(Store, store))
    await simulation.start()
    return store, simulation


async def test_round_trips_of_a_batch_do_not_grow_with_its_commands() -> None:
    """Submits in one batch cost as many calls of the store as one submit, their first chunks included; so for other users."""
    for users, count in ((1, 1), (1, 100), (50, 1)):
        store, simulation = await counting_simulation()
        for user_id in range(1, users + 1):
            policy_id, subnets = await simulation.add("127.9.8.0/30", user_id=user_id)
            for _ in range(count):
                await simulation.send(policy_id, subnets, user_id=user_id)
        store.calls.clear()
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
        await simulation.only.reconciler.work()
        reads = {
            "commands.by_key",
            "policies.get",
            "subnets.get",
            "jobs.take_ids",
            "jobs.usage",
            "dispatch.first_turns",
        }
        writes = {"commands.insert", "jobs.insert", "chunks.insert", "audit.add"}
        assert {name: calls for name, calls in store.calls.items() if calls} == dict.fromkeys(reads | writes, 1)


async def test_first_chunks_of_a_job_are_dispatched_without_a_read() -> None:
    """The replica that creates the chunks of a new job does not read them to dispatch them."""
    store, simulation = await counting_simulation()
    simulation.worker.hold = True
    await simulation.worker.announce()
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    await simulation.send(policy_id, subnets)
    store.calls.clear()
    await simulation.settle()
    assert len(simulation.worker.tasks) == 1
    assert store.calls["chunks.get"] == 0


async def test_late_cancels_of_a_batch_are_rejected_in_one_write() -> None:
    """Fifty cancels of ended jobs in one batch cost as many calls of the store as one."""
    costs = []
    for count in (1, 50):
        store, simulation = await counting_simulation()
        ended = [replace(scan_job(id_), status=JobStatus.COMPLETED) for id_ in range(1, count + 1)]
        await simulation.store.jobs.insert(ended)
        commands = [await simulation.cancel(job.id) for job in ended]
        store.calls.clear()
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
        assert {simulation.replies(command)[0].error for command in commands} == {"Job is already completed"}
        assert store.calls["commands.reject"] == 1
        costs.append(store.calls.total())
    assert costs[0] == costs[1]


async def test_first_turn_is_not_read_for_each_command() -> None:
    """A user who submits without a pause costs one read of their queue a second."""
    store, simulation = await counting_simulation()
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    store.calls.clear()
    for seconds, reads in ((0.0, 1), (0.9, 1), (0.1, 2)):
        simulation.now += seconds
        await simulation.send(policy_id, subnets)
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
        assert store.calls["dispatch.first_turns"] == reads


async def test_small_job_costs_few_round_trips_and_records() -> None:
    """A job of one chunk is saved once, at its end, and read once; nothing reads or counts its chunks."""
    store, simulation = await counting_simulation()
    await simulation.submit("127.9.8.1/32")
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    simulation.worker.hold = True
    await simulation.worker.announce()
    await simulation.settle()
    (task,) = simulation.worker.tasks
    store.calls.clear()
    await simulation.worker.scanned(task)
    await simulation.settle()
    assert (await simulation.store.jobs.get([1]))[1].status is JobStatus.COMPLETED
    wanted = {"jobs.get": 2, "jobs.save": 1, "chunks.get": 0, "chunks.save": 2, "chunks.standings": 0}
    assert {name: store.calls[name] for name in wanted} == wanted
    records = {topic.name: len(simulation.bus.messages(topic)) for topic in (SCAN_EVENTS, SCAN_TASKS, SCAN_REPLIES)}
    assert records == {"scan-events": 3, "scan-tasks": 1, "scan-replies": 1}
