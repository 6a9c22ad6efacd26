"""The life of jobs through the real handlers, message by message, without I/O."""

from __future__ import annotations

import pytest

from job_orchestrator.testing import MemoryStore, World
from scanfleet.messages import CommandAccepted, JobStatus


@pytest.fixture
async def world() -> World:
    world = World(MemoryStore())
    await world.start()
    await world.worker.announce()
    return world


async def test_a_job_runs_to_completion(world: World) -> None:
    """A submitted job is answered, scanned, stored and completed, with one event for each change."""
    command = await world.submit("127.9.8.0/24")
    await world.settle()
    (reply,) = world.replies(command)
    assert isinstance(reply, CommandAccepted)
    job = (await world.store.jobs([reply.jobs[0].id]))[reply.jobs[0].id]
    assert (job.status, job.progress, job.settled) == (JobStatus.COMPLETED, 100, True)
    kinds = [type(event).__name__ for event in world.events(job.id) if type(event).__name__ != "JobProgressed"]
    assert kinds == ["JobCreated", "JobStarted", "JobCompleted"]
