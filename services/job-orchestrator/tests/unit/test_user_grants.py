"""User grants at the orchestrator: when a job is made and when its chunks are dispatched."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from job_orchestrator.api.tasks import read_waiting
from job_orchestrator.domain.fairness import Candidate
from job_orchestrator_testing import MemoryStore, Worker, World, scan_policy
from job_orchestrator_testing.api import state_of
from job_orchestrator_testing.repository import MemoryDispatch
from scanfleet.contracts.messages import AuditEntry, ChunkIncomplete, CommandRejected, JobStatus, ScanChunk
from scanfleet.contracts.messages.topics import SCAN_STORED, SCAN_TASKS
from scanfleet.contracts.rest import WaitingReason
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.security.auth import Principal


def grants(**limits: object) -> UserGrants:
    """User 7 may scan 127.9.0.0/16 within `limits`, and callers with the role `ops` all of 127.8.0.0/16."""
    own = {"name": "site", "users": [7], "networks": ["127.9.0.0/16"], **limits}
    return UserGrants.model_validate({"grants": [own, {"name": "ops", "roles": ["ops"], "networks": ["127.8.0.0/16"]}]})


def hours(world: World, begin: int, end: int) -> list[str]:
    """A window that begins and ends so many minutes from the world's now."""

    def clock(minutes: int) -> str:
        return f"{world.time + timedelta(minutes=minutes):%H:%M}"

    return [f"{clock(begin)}-{clock(end)}"]


async def rejection(world: World, command: str) -> tuple[CommandRejected, AuditEntry]:
    (reply,) = world.replies(command)
    assert isinstance(reply, CommandRejected)
    entries, _ = await world.store.audit.page(0, 10)
    return reply, entries[0]


def tasks(world: World) -> list[ScanChunk]:
    return [each for each in world.bus.messages(SCAN_TASKS) if isinstance(each, ScanChunk)]


async def restart_with(world: World, changed: UserGrants) -> None:
    world.grants = changed
    await world.restart()
    await world.worker.announce()
    await world.settle()


@pytest.mark.proves("G15")
async def test_submit_beyond_a_grant_is_403_and_audited_with_the_limit() -> None:
    """No job is made; answer and audit entry name subnet, limit and grant."""
    world = World(MemoryStore(), grants=grants(max_timing=3))
    command = await world.submit("127.9.8.0/30", policy=scan_policy(timing=4))
    await world.settle()
    reply, entry = await rejection(world, command)
    assert (reply.status, reply.rule) == (403, "grant")
    assert reply.error == "Subnet 1: timing 4 is above 3, the highest of grant site"
    assert (entry.decision, entry.rule, entry.reason, entry.subject) == ("refused", "grant", reply.error, "7")
    assert await world.store.jobs.page(7, set(), 0, 10) == ([], 0)


async def test_submit_by_a_role_needs_the_role() -> None:
    """The same network is refused without the role in the command and accepted with it, and the job names the grant."""
    world = World(MemoryStore(), grants=grants())
    refused = await world.submit("127.8.1.0/30")
    accepted = await world.submit("127.8.1.0/30", roles=("ops",))
    await world.start()
    await world.worker.announce()
    await world.settle()
    assert (await rejection(world, refused))[0].status == 403
    job = (await world.store.jobs.get([world.accepted(accepted)[0].id])).popitem()[1]
    assert (job.granted_by, job.status) == ("ops", JobStatus.COMPLETED)


async def test_submit_without_a_rate_gets_the_rate_of_the_grant() -> None:
    """The job's policy and each of its nmap processes have the limit; the user's stored policy does not change."""
    world = World(MemoryStore(), grants=grants(max_rate=400))
    command = await world.submit("127.9.8.0/30")
    await world.start()
    await world.worker.announce()
    await world.settle()
    job = (await world.store.jobs.get([world.accepted(command)[0].id])).popitem()[1]
    assert job.policy.max_rate == 400
    assert {(task.max_rate, task.policy.max_rate, task.granted_by) for task in tasks(world)} == {(400, 400, "site")}
    assert (await world.store.policies.get([(7, job.policy_id)]))[7, job.policy_id].content.max_rate is None


@pytest.mark.proves("G15")
async def test_dispatch_of_a_job_whose_grant_was_withdrawn_fails_it() -> None:
    """After a restart with other grants no chunk of the job goes to a worker; the job and the audit log contain the reason."""
    world = World(MemoryStore(), grants=grants())
    command = await world.submit("127.9.8.0/30")
    await world.settle()
    await restart_with(world, grants(networks=["127.7.0.0/16"]))
    job = (await world.store.jobs.get([world.accepted(command)[0].id])).popitem()[1]
    reason = "127.9.8.0/30 is not within the networks of grant site: 127.7.0.0/16"
    assert (job.status, job.error) == (JobStatus.FAILED, f"the user grants no longer allow the job: {reason}")
    assert not tasks(world)
    (entry, _), _ = await world.store.audit.page(0, 10)
    assert (entry.action, entry.decision, entry.rule, entry.reason) == ("dispatch_task", "refused", "grant", reason)


async def test_dispatch_waits_for_the_hours_of_the_grant() -> None:
    """Outside its hours a job waits and shows until when; within them its tasks contain the time left."""
    world = World(MemoryStore(), grants=grants())
    command = await world.submit("127.9.8.0/30")
    await world.settle()
    world.grants = grants(hours=hours(world, 2, 4))
    await world.restart()
    await world.wait(20)
    id_ = world.accepted(command)[0].id
    job = (await world.store.jobs.get([id_]))[id_]
    assert (job.status, job.waiting) == (JobStatus.PENDING, "window")
    assert not tasks(world)
    reason, next_start = await why(world, id_)
    assert (reason.kind, reason.until) == ("window", next_start)
    assert reason.detail.endswith(f"the hours of grant site are {world.grants.grants[0].hours[0].text}")  # type: ignore[index] # it has some
    assert next_start is not None
    await world.wait(round((next_start - world.time).total_seconds()) + 2)
    (task,) = tasks(world)
    assert task.stop_after_seconds is not None
    assert 0 < task.stop_after_seconds <= 120
    assert (await world.store.jobs.get([id_]))[id_].status is JobStatus.COMPLETED


async def test_sweep_gives_a_job_its_full_time_for_a_raw_worker_after_its_hours_begin() -> None:
    """A job that waited an hour for its hours fails only after it has waited as long as any other for raw packets."""
    world = World(MemoryStore(), grants=grants())
    await world.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await world.settle()
    await restart_with(world, grants(hours=hours(world, 60, 120)))
    await world.wait(58, seconds=60.0)
    job = (await world.store.jobs.get([1]))[1]
    assert (job.status, job.waiting) == (JobStatus.PENDING, "window")
    await world.wait(10, seconds=60.0)
    job = (await world.store.jobs.get([1]))[1]
    assert (job.status, job.waiting, job.error) == (JobStatus.PENDING, "no_raw_worker", "")
    await world.wait(10, seconds=60.0)
    job = (await world.store.jobs.get([1]))[1]
    assert (job.status, job.error[:36]) == (JobStatus.FAILED, "no worker that may send raw packets ")


async def test_dispatch_leaves_users_outside_their_hours_out() -> None:
    """Another user's job is dispatched, whatever number of users wait for their hours."""
    world = World(MemoryStore())
    for user in range(100, 200):
        await world.submit("127.9.8.0/30", user_id=user)
    await world.settle()
    closed = {"name": "day", "users": list(range(100, 200)), "hours": hours(world, 60, 120)}
    await restart_with(world, UserGrants.model_validate({"grants": [closed, {"name": "free", "users": [7]}]}))
    await world.submit("127.9.8.0/30", user_id=7)
    await world.wait(5)
    assert {task.user_id for task in tasks(world)} == {7}


def two_grants(closed: list[str] | None = None) -> UserGrants:
    """User 7 may scan 127.9.0.0/16 at any time, and 127.8.0.0/16 within these hours."""
    site = {"name": "site", "users": [7], "networks": ["127.9.0.0/16"]}
    day = {"name": "day", "users": [7], "networks": ["127.8.0.0/16"], **({"hours": closed} if closed else {})}
    return UserGrants.model_validate({"grants": [site, day]})


class CountingDispatch(MemoryDispatch):
    """Counts the queries for queued chunks of user 7."""

    queries = 0

    async def queue(self, user_id: int, *args: Any, **how: Any) -> list[Candidate]:
        self.queries += user_id == 7
        return await super().queue(user_id, *args, **how)


async def resting(store: MemoryStore | None = None, jobs: int = 1) -> World:
    """A world in which user 7 has this many jobs outside their hours, and the dispatcher leaves the user out."""
    world = World(store or MemoryStore(), grants=two_grants())
    for _ in range(jobs):
        await world.submit("127.8.8.0/30")
    await world.settle()
    world.worker.hold = True
    await restart_with(world, two_grants(hours(world, 60, 120)))
    await world.wait(1)
    assert not tasks(world)
    return world


async def test_dispatch_queries_no_chunks_of_a_user_outside_their_hours() -> None:
    """The first job found waiting for the hours of a grant makes all jobs of the grant wait, so that no chunk is queried again."""
    store = MemoryStore()
    store.dispatch = counting = CountingDispatch(store.data)
    world = await resting(store, jobs=300)
    assert counting.queries <= 4
    counting.queries = 0
    await world.wait(60)
    assert counting.queries == 0


async def test_dispatch_of_a_new_job_does_not_wait_for_the_hours_of_others() -> None:
    """A job under an open grant starts at once, although its user was left out for jobs under a closed one."""
    world = await resting()
    await world.submit("127.9.8.0/30")
    await world.settle()
    assert [task.granted_by for task in tasks(world)] == ["site"]


async def test_dispatch_to_a_raw_worker_does_not_wait_for_the_hours_of_others() -> None:
    """A user without chunks for workers without raw packets is still queried for those with them."""
    world = await resting()
    await world.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await world.wait(2)
    assert not tasks(world)
    raw = Worker(world.bus, "w-2", raw=True)
    world.workers.append(raw)
    await raw.announce()
    await world.settle()
    assert [task.granted_by for task in raw.tasks] == ["site"]


async def test_dispatch_of_a_retry_does_not_wait_for_the_hours_of_others() -> None:
    """A chunk that is retried after a pause goes to a worker within a second of it."""
    world = await resting()
    await world.submit("127.9.8.0/30")
    await world.settle()
    (task,) = tasks(world)
    await world.worker.claim(task)
    await world.worker.fail(task)
    await world.settle()
    (chunk,) = (await world.store.chunks.get([task.chunk_id])).values()
    assert chunk.not_before is not None
    assert len(tasks(world)) == 1
    await world.wait(round((chunk.not_before - world.time).total_seconds()) + 2)
    assert len(tasks(world)) == 2


async def resting_during_check() -> tuple[World, ScanChunk]:
    """A world as `resting`, in which user 7 has another job, whose only chunk result-store checks."""
    world = await resting()
    await world.submit("127.9.8.0/30")
    await world.settle()
    world.results = None
    (task,) = tasks(world)
    await world.worker.claim(task)
    await world.worker.scanned(task)
    await world.wait(3)
    return world, task


async def test_dispatch_of_a_requeued_chunk_does_not_wait_for_the_hours_of_others() -> None:
    """While result-store checks the only chunk of a job, its user may be left out; the requeued chunk is sent within seconds."""
    world, task = await resting_during_check()
    token = {name: getattr(task, name) for name in ("job_id", "chunk_id", "attempt", "worker_id")}
    await world.bus.publish(SCAN_STORED, [ChunkIncomplete(**token, addresses=("127.9.8.1",))])
    await world.wait(3)
    assert len(tasks(world)) == 2


async def test_dispatch_does_not_count_closed_hours_as_waiting() -> None:
    """The clock of a user who is left out is inactive, so that the closed hours give no priority later."""
    world = await resting()
    await world.wait(3)
    assert not (await world.store.dispatch.clocks([7])).users[7].active


async def test_dispatch_does_not_count_closed_hours_as_waiting_while_a_result_is_checked() -> None:
    """The same for a user whose job within the hours has no queued chunk."""
    world, _ = await resting_during_check()
    assert not (await world.store.dispatch.clocks([7])).users[7].active


async def why(world: World, job_id: int) -> tuple[WaitingReason, datetime | None]:
    state = replace(state_of(world), grants=world.only.grants, now=lambda: world.time)
    answer = await read_waiting(job_id=job_id, caller=Principal(7), state=state, record=None)  # type: ignore[arg-type] # the owner's reads are not recorded
    return answer.reasons[0], answer.next_possible_start


@pytest.mark.proves("G17")
async def test_job_with_a_damaged_network_is_skipped_and_others_are_dispatched() -> None:
    """A stored network that is none ends neither the dispatch loop nor the jobs of others."""
    world = World(MemoryStore(), grants=grants())
    world.worker.hold = True
    await world.start()
    await world.submit("127.9.8.0/30")
    await world.deliver()
    await world.only.reconciler.work()
    job = (await world.store.jobs.get([1]))[1]
    await world.store.jobs.save([replace(job, cidr="damaged")])
    await world.submit("127.9.9.0/30")
    await world.worker.announce()
    await world.settle()
    assert [task.job_id for task in tasks(world)] == [2]
