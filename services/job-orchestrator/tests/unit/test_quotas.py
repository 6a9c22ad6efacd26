"""Quotas: what exceeds one is refused by name, and nothing else is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import pytest

from job_orchestrator.domain.job import Plan
from job_orchestrator.domain.quotas import Quotas, Usage
from job_orchestrator_testing import MemoryStore, Simulation, scan_job, scan_policy
from job_orchestrator_testing.repository import MemoryJobs
from scanfleet.contracts.messages import CommandAccepted, CommandRejected
from scanfleet.contracts.messages.topics import SCAN_COMMANDS

SECONDS = 0.1 + 2 * (2 / 4_000)  # expected of `scan_policy` on a /31


ADDRESS_SECONDS = scan_job(cidr="127.9.8.0/32").seconds_left


class CountingJobs(MemoryJobs):
    """Counts how often usage was read."""

    reads = 0

    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        self.reads += 1
        return await super().usage(users)


async def simulation_with(*, store: MemoryStore | None = None, **quotas: Any) -> Simulation:
    simulation = Simulation(store or MemoryStore(), quotas=Quotas(**quotas))
    await simulation.start()
    return simulation


async def decided(simulation: Simulation, *commands: str) -> list[int]:
    """The status of the last reply to each of these commands, after all that was sent was handled in one batch."""
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    replies = [simulation.replies(command)[-1] for command in commands]
    return [201 if isinstance(reply, CommandAccepted) else reply.status for reply in replies]


def error(simulation: Simulation, command: str) -> str:
    reply = simulation.replies(command)[-1]
    assert isinstance(reply, CommandRejected)
    assert reply.rule == "quota"
    return reply.error


@pytest.mark.parametrize(
    ("quotas", "words"),
    [
        ({"probes_per_job": 7}, ["8 probes", "limit is 7", "SCANFLEET_PROBES_PER_JOB", "smaller subnet"]),
        ({"chunks_per_job": 1}, ["2 chunks", "limit is 1", "SCANFLEET_CHUNKS_PER_JOB", "higher timing"]),
    ],
)
@pytest.mark.proves("G20")
async def test_job_above_a_quota_is_refused_by_name(quotas: dict[str, Any], words: list[str]) -> None:
    """A job with too many probes or chunks is a 400 that names subnet, limit and way out, and no job is made."""
    simulation = await simulation_with(**quotas)
    policy = scan_policy(ports="1-2" if "probes_per_job" in quotas else "1-8193")
    command = await simulation.submit("127.9.9.0/32", "127.9.8.0/30", policy=policy)
    assert await decided(simulation, command) == [400]
    assert all(word in error(simulation, command) for word in ["Subnet", *words]), error(simulation, command)
    assert await simulation.store.jobs.page(7, set(), 0, 10) == ([], 0)


async def test_job_at_a_quota_is_accepted() -> None:
    """As many probes and chunks as the limits allow are a job; what is excluded does not count."""
    simulation = await simulation_with(probes_per_job=8, chunks_per_job=1)
    assert await decided(simulation, await simulation.submit("127.9.8.0/30")) == [201]


@pytest.mark.proves("G20")
async def test_unfinished_jobs_above_the_quota_are_refused_until_one_ends() -> None:
    """The first job above the quota is a 429 with the remedy; when one has ended it is accepted."""
    simulation = await simulation_with(unfinished_jobs_per_user=2)
    first = [await simulation.submit("127.9.8.0/32") for _ in range(3)]
    others = await simulation.submit("127.9.8.0/32", user_id=8)
    assert await decided(simulation, *first, others) == [201, 201, 429, 201]
    text = error(simulation, first[2])
    assert all(word in text for word in ("2 unfinished", "1 more", "limit is 2", "wait until some have ended")), text
    assert await decided(simulation, await simulation.submit("127.9.8.0/32")) == [429]
    await simulation.cancel(simulation.accepted(first[0])[0].id)
    await decided(simulation)
    assert await decided(simulation, await simulation.submit("127.9.8.0/32")) == [201]


async def test_request_that_can_never_fit_is_a_400() -> None:
    """Waiting does not help a request that alone asks for more than a quota, so it is no 429."""
    simulation = await simulation_with(unfinished_jobs_per_user=2)
    command = await simulation.submit("127.9.8.0/32", "127.9.8.1/32", "127.9.8.2/32")
    assert await decided(simulation, command) == [400]
    assert "name fewer subnets" in error(simulation, command)
    simulation = await simulation_with(queued_seconds_per_user=SECONDS)
    command = await simulation.submit("127.9.8.0/24", policy=scan_policy(ports="1-1000"))
    assert await decided(simulation, command) == [400]
    assert "SCANFLEET_QUEUED_SECONDS_PER_USER" in error(simulation, command)


async def test_queued_seconds_above_the_quota_are_refused() -> None:
    """Jobs that together are expected to take longer than the limit are a 429."""
    simulation = await simulation_with(queued_seconds_per_user=2.5 * SECONDS)
    commands = [await simulation.submit("127.9.8.0/31") for _ in range(3)]
    assert await decided(simulation, *commands) == [201, 201, 429]
    assert "cancel some" in error(simulation, commands[2])


@pytest.mark.proves("G2")
async def test_replay_of_an_accepted_request_is_never_refused() -> None:
    """At the quota, a redelivered command and a repeat under its key are answered with the jobs that exist."""
    simulation = await simulation_with(unfinished_jobs_per_user=1)
    policy_id, subnets = await simulation.add("127.9.8.0/32")
    same = [await simulation.send(policy_id, subnets, key="k") for _ in range(3)]
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.hand(SCAN_COMMANDS, records)
    same.append(await simulation.send(policy_id, subnets, key="k"))
    assert await decided(simulation, *same) == [201] * 4
    assert {simulation.replies(command)[-1].jobs[0].id for command in same} == {1}
    assert await decided(simulation, await simulation.send(policy_id, subnets, key="other")) == [429]


async def test_refused_request_keeps_its_key() -> None:
    """A request that was refused by a quota can be repeated under its key and is then accepted."""
    simulation = await simulation_with(unfinished_jobs_per_user=1)
    running = await simulation.submit("127.9.8.0/32")
    policy_id, subnets = await simulation.add("127.9.8.0/32")
    refused = await simulation.send(policy_id, subnets, key="k")
    assert await decided(simulation, running, refused) == [201, 429]
    await simulation.cancel(simulation.accepted(running)[0].id)
    await decided(simulation)
    assert await decided(simulation, await simulation.send(policy_id, subnets, key="k")) == [201]


async def test_usage_is_not_read_for_each_command() -> None:
    """A user who submits without a pause costs one read of their jobs a second."""
    store = MemoryStore()
    store.jobs = counting = CountingJobs(store.data)
    simulation = await simulation_with(store=store)
    policy_id, subnets = await simulation.add("127.9.8.0/32")
    for _ in range(20):
        assert await decided(simulation, await simulation.send(policy_id, subnets)) == [201]
    assert counting.reads == 1
    simulation.now += 1.5
    assert await decided(simulation, await simulation.send(policy_id, subnets)) == [201]
    assert counting.reads == 2


class PlanningQuotas(Quotas):
    """Counts the plans that were checked."""

    plans: ClassVar[list[Plan]] = []

    def check_job(self, plan: Plan) -> None:
        self.plans.append(plan)
        super().check_job(plan)


@pytest.mark.parametrize(
    "quota",
    [{"unfinished_jobs_per_user": 1_000}, {"queued_seconds_per_user": sum(1_000 * [ADDRESS_SECONDS])}],
)
async def test_submits_of_a_user_at_a_quota_are_refused_without_plans(quota: dict[str, Any]) -> None:
    """Requests for a thousand jobs each, of a user at the quota, cost no plan."""
    quotas = PlanningQuotas(**quota)
    simulation = Simulation(MemoryStore(), quotas=quotas)
    await simulation.start()
    policy_id, subnets = await simulation.add(*(f"127.9.{n >> 8}.{n & 255}/32" for n in range(1_000)))
    assert await decided(simulation, await simulation.send(policy_id, subnets)) == [201]
    commands = [await simulation.send(policy_id, subnets) for _ in range(20)]
    quotas.plans.clear()
    assert await decided(simulation, *commands) == [429] * 20
    assert quotas.plans == []
