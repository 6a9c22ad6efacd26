"""User grants at the orchestrator: when a job is made and when its chunks are dispatched."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from job_orchestrator.api.tasks import read_waiting
from job_orchestrator.domain.fairness import Candidate
from job_orchestrator_testing import MemoryStore, Simulation, Worker, scan_policy
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


def hours(simulation: Simulation, begin: int, end: int) -> list[str]:
    """A window that begins and ends so many minutes from the simulation's now."""

    def clock(minutes: int) -> str:
        return f"{simulation.time + timedelta(minutes=minutes):%H:%M}"

    return [f"{clock(begin)}-{clock(end)}"]


async def rejection(simulation: Simulation, command: str) -> tuple[CommandRejected, AuditEntry]:
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandRejected)
    entries, _ = await simulation.store.audit.page(0, 10)
    return reply, entries[0]


def tasks(simulation: Simulation) -> list[ScanChunk]:
    return [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, ScanChunk)]


async def restart_with(simulation: Simulation, changed: UserGrants) -> None:
    simulation.grants = changed
    await simulation.restart()
    await simulation.worker.announce()
    await simulation.settle()


@pytest.mark.proves("G15")
async def test_submit_beyond_a_grant_is_403_and_audited_with_the_limit() -> None:
    """No job is made; answer and audit entry name subnet, limit and grant."""
    simulation = Simulation(MemoryStore(), grants=grants(max_timing=3))
    command = await simulation.submit("127.9.8.0/30", policy=scan_policy(timing=4))
    await simulation.settle()
    reply, entry = await rejection(simulation, command)
    assert (reply.status, reply.rule) == (403, "grant")
    assert reply.error == "Subnet 1: timing 4 is above 3, the highest of grant site"
    assert (entry.decision, entry.rule, entry.reason, entry.subject) == ("refused", "grant", reply.error, "7")
    assert await simulation.store.jobs.page(7, set(), 0, 10) == ([], 0)


async def test_submit_by_a_role_needs_the_role() -> None:
    """The same network is refused without the role in the command and accepted with it, and the job names the grant."""
    simulation = Simulation(MemoryStore(), grants=grants())
    refused = await simulation.submit("127.8.1.0/30")
    accepted = await simulation.submit("127.8.1.0/30", roles=("ops",))
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    assert (await rejection(simulation, refused))[0].status == 403
    job = (await simulation.store.jobs.get([simulation.accepted(accepted)[0].id])).popitem()[1]
    assert (job.granted_by, job.status) == ("ops", JobStatus.COMPLETED)


async def test_submit_without_a_rate_gets_the_rate_of_the_grant() -> None:
    """The job's policy and each of its nmap processes have the limit; the user's stored policy does not change."""
    simulation = Simulation(MemoryStore(), grants=grants(max_rate=400))
    command = await simulation.submit("127.9.8.0/30")
    await simulation.start()
    await simulation.worker.announce()
    await simulation.settle()
    job = (await simulation.store.jobs.get([simulation.accepted(command)[0].id])).popitem()[1]
    assert job.policy.max_rate == 400
    assert {(task.max_rate, task.policy.max_rate, task.granted_by) for task in tasks(simulation)} == {
        (400, 400, "site")
    }
    assert (await simulation.store.policies.get([(7, job.policy_id)]))[7, job.policy_id].content.max_rate is None


@pytest.mark.proves("G15")
async def test_dispatch_of_a_job_whose_grant_was_withdrawn_fails_it() -> None:
    """After a restart with other grants no chunk of the job goes to a worker; the job and the audit log contain the reason."""
    simulation = Simulation(MemoryStore(), grants=grants())
    command = await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    await restart_with(simulation, grants(networks=["127.7.0.0/16"]))
    job = (await simulation.store.jobs.get([simulation.accepted(command)[0].id])).popitem()[1]
    reason = "127.9.8.0/30 is not within the networks of grant site: 127.7.0.0/16"
    assert (job.status, job.error) == (JobStatus.FAILED, f"the user grants no longer allow the job: {reason}")
    assert not tasks(simulation)
    (entry, _), _ = await simulation.store.audit.page(0, 10)
    assert (entry.action, entry.decision, entry.rule, entry.reason) == ("dispatch_task", "refused", "grant", reason)


async def test_dispatch_waits_for_the_hours_of_the_grant() -> None:
    """Outside its hours a job waits and shows until when; within them its tasks contain the time left."""
    simulation = Simulation(MemoryStore(), grants=grants())
    command = await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    simulation.grants = grants(hours=hours(simulation, 2, 4))
    await simulation.restart()
    await simulation.wait(20)
    id_ = simulation.accepted(command)[0].id
    job = (await simulation.store.jobs.get([id_]))[id_]
    assert (job.status, job.waiting) == (JobStatus.PENDING, "window")
    assert not tasks(simulation)
    reason, next_start = await why(simulation, id_)
    assert (reason.kind, reason.until) == ("window", next_start)
    assert reason.detail.endswith(f"the hours of grant site are {simulation.grants.grants[0].hours[0].text}")  # type: ignore[index] # it has some
    assert next_start is not None
    await simulation.wait(round((next_start - simulation.time).total_seconds()) + 2)
    (task,) = tasks(simulation)
    assert task.stop_after_seconds is not None
    assert 0 < task.stop_after_seconds <= 120
    assert (await simulation.store.jobs.get([id_]))[id_].status is JobStatus.COMPLETED


async def test_sweep_gives_a_job_its_full_time_for_a_raw_worker_after_its_hours_begin() -> None:
    """A job that waited an hour for its hours fails only after it has waited as long as any other for raw packets."""
    simulation = Simulation(MemoryStore(), grants=grants())
    await simulation.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await simulation.settle()
    await restart_with(simulation, grants(hours=hours(simulation, 60, 120)))
    await simulation.wait(58, seconds=60.0)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.waiting) == (JobStatus.PENDING, "window")
    await simulation.wait(10, seconds=60.0)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.waiting, job.error) == (JobStatus.PENDING, "no_raw_worker", "")
    await simulation.wait(10, seconds=60.0)
    job = (await simulation.store.jobs.get([1]))[1]
    assert (job.status, job.error[:36]) == (JobStatus.FAILED, "no worker that may send raw packets ")


async def test_dispatch_leaves_users_outside_their_hours_out() -> None:
    """Another user's job is dispatched, whatever number of users wait for their hours."""
    simulation = Simulation(MemoryStore())
    for user in range(100, 200):
        await simulation.submit("127.9.8.0/30", user_id=user)
    await simulation.settle()
    closed = {"name": "day", "users": list(range(100, 200)), "hours": hours(simulation, 60, 120)}
    await restart_with(simulation, UserGrants.model_validate({"grants": [closed, {"name": "free", "users": [7]}]}))
    await simulation.submit("127.9.8.0/30", user_id=7)
    await simulation.wait(5)
    assert {task.user_id for task in tasks(simulation)} == {7}


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


async def resting(store: MemoryStore | None = None, jobs: int = 1) -> Simulation:
    """A simulation in which user 7 has this many jobs outside their hours, and the dispatcher leaves the user out."""
    simulation = Simulation(store or MemoryStore(), grants=two_grants())
    for _ in range(jobs):
        await simulation.submit("127.8.8.0/30")
    await simulation.settle()
    simulation.worker.hold = True
    await restart_with(simulation, two_grants(hours(simulation, 60, 120)))
    await simulation.wait(1)
    assert not tasks(simulation)
    return simulation


async def test_dispatch_queries_no_chunks_of_a_user_outside_their_hours() -> None:
    """The first job found waiting for the hours of a grant makes all jobs of the grant wait, so that no chunk is queried again."""
    store = MemoryStore()
    store.dispatch = counting = CountingDispatch(store.data)
    simulation = await resting(store, jobs=300)
    assert counting.queries <= 4
    counting.queries = 0
    await simulation.wait(60)
    assert counting.queries == 0


async def test_dispatch_of_a_new_job_does_not_wait_for_the_hours_of_others() -> None:
    """A job under an open grant starts at once, although its user was left out for jobs under a closed one."""
    simulation = await resting()
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    assert [task.granted_by for task in tasks(simulation)] == ["site"]


async def test_dispatch_to_a_raw_worker_does_not_wait_for_the_hours_of_others() -> None:
    """A user without chunks for workers without raw packets is still queried for those with them."""
    simulation = await resting()
    await simulation.submit("127.9.8.0/30", policy=scan_policy(technique="syn"))
    await simulation.wait(2)
    assert not tasks(simulation)
    raw = Worker(simulation.bus, "w-2", raw=True)
    simulation.workers.append(raw)
    await raw.announce()
    await simulation.settle()
    assert [task.granted_by for task in raw.tasks] == ["site"]


async def test_dispatch_of_a_retry_does_not_wait_for_the_hours_of_others() -> None:
    """A chunk that is retried after a pause goes to a worker within a second of it."""
    simulation = await resting()
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    (task,) = tasks(simulation)
    await simulation.worker.claim(task)
    await simulation.worker.fail(task)
    await simulation.settle()
    (chunk,) = (await simulation.store.chunks.get([task.chunk_id])).values()
    assert chunk.not_before is not None
    assert len(tasks(simulation)) == 1
    await simulation.wait(round((chunk.not_before - simulation.time).total_seconds()) + 2)
    assert len(tasks(simulation)) == 2


async def resting_during_check() -> tuple[Simulation, ScanChunk]:
    """A simulation as `resting`, in which user 7 has another job, whose only chunk result-store checks."""
    simulation = await resting()
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    simulation.results = None
    (task,) = tasks(simulation)
    await simulation.worker.claim(task)
    await simulation.worker.scanned(task)
    await simulation.wait(3)
    return simulation, task


async def test_dispatch_of_a_requeued_chunk_does_not_wait_for_the_hours_of_others() -> None:
    """While result-store checks the only chunk of a job, its user may be left out; the requeued chunk is sent within seconds."""
    simulation, task = await resting_during_check()
    token = {name: getattr(task, name) for name in ("job_id", "chunk_id", "attempt", "worker_id")}
    await simulation.bus.publish(SCAN_STORED, [ChunkIncomplete(**token, addresses=("127.9.8.1",))])
    await simulation.wait(3)
    assert len(tasks(simulation)) == 2


async def test_dispatch_does_not_count_closed_hours_as_waiting() -> None:
    """The account of a user who is left out is inactive, so that the closed hours give no priority later."""
    simulation = await resting()
    await simulation.wait(3)
    assert not (await simulation.store.dispatch.accounts([7])).users[7].active


async def test_dispatch_does_not_count_closed_hours_as_waiting_while_a_result_is_checked() -> None:
    """The same for a user whose job within the hours has no queued chunk."""
    simulation, _ = await resting_during_check()
    assert not (await simulation.store.dispatch.accounts([7])).users[7].active


async def why(simulation: Simulation, job_id: int) -> tuple[WaitingReason, datetime | None]:
    state = replace(state_of(simulation), grants=simulation.only.grants, now=lambda: simulation.time)
    answer = await read_waiting(job_id=job_id, caller=Principal(7), state=state, record=None)  # type: ignore[arg-type] # the owner's reads are not recorded
    return answer.reasons[0], answer.next_possible_start


@pytest.mark.proves("G17")
async def test_job_with_a_damaged_network_is_skipped_and_others_are_dispatched() -> None:
    """A stored network that is none ends neither the dispatch loop nor the jobs of others."""
    simulation = Simulation(MemoryStore(), grants=grants())
    simulation.worker.hold = True
    await simulation.start()
    await simulation.submit("127.9.8.0/30")
    await simulation.deliver()
    await simulation.only.reconciler.work()
    job = (await simulation.store.jobs.get([1]))[1]
    await simulation.store.jobs.save([replace(job, cidr="damaged")])
    await simulation.submit("127.9.9.0/30")
    await simulation.worker.announce()
    await simulation.settle()
    assert [task.job_id for task in tasks(simulation)] == [2]
