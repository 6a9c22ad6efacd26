"""Metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from job_orchestrator.domain.census import DeletionCensus, JobCensus
from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.metrics import CHUNK_CENSUS, DELETION_CENSUS, JOB_CENSUS, OUTBOX_AGE, CensusGauges
from job_orchestrator_testing import MemoryStore, Simulation, chunk, scan_job
from job_orchestrator_testing.repository import MemoryJobs
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import JobStatus
from scanfleet.errors import DependencyError


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"scanfleet_{name}", labels)


def counted(name: str, **labels: str) -> float:
    return shown(name, **labels) or 0.0


@pytest.mark.parametrize(
    "collection",
    ["jobs", "chunks", "clocks", "workers", "audit", "deletions", "subnets", "policies", "revocations"],
)
def test_unreadable_documents_are_exported_from_the_start(collection: str) -> None:
    """The first unreadable document of any collection is an increase, which an alert can see."""
    labels = {"collection": collection}
    assert REGISTRY.get_sample_value("scanfleet_unreadable_documents_total", labels) is not None


def test_census_is_exported_for_half_a_minute() -> None:
    """Its numbers, including zeros, are exported for half a minute and then omitted: they would be outdated."""
    now = 100.0
    registry = CollectorRegistry()
    gauges = CensusGauges(JOB_CENSUS._gauges, monotonic=lambda: now)
    registry.register(gauges)

    def shown(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"scanfleet_{name}", labels)

    assert shown("queued_slot_seconds") is None
    numbers, ages = Counter({JobStatus.PENDING: 3}), {JobStatus.PENDING: 40.0}
    gauges.show(JobCensus(numbers=numbers, ages_seconds=ages, slot_seconds=2.5))
    now += 29.0
    assert (shown("jobs", status="pending"), shown("jobs", status="running")) == (3.0, 0.0)
    assert shown("queued_slot_seconds") == 2.5
    assert shown("oldest_job_age_seconds", status="pending") == 40.0
    now += 2.0
    assert [sample for metric in registry.collect() for sample in metric.samples] == []


def test_every_part_of_a_census_has_its_gauges() -> None:
    """Chunks, deletions and the age of the oldest event are exported, zeros too."""
    CHUNK_CENSUS.show(Counter({ChunkState.QUEUED: 5}))
    DELETION_CENSUS.show(DeletionCensus(2, 7.5))
    OUTBOX_AGE.show(0.0)
    assert (counted("chunks", state="queued"), shown("chunks", state="scanned")) == (5.0, 0.0)
    assert (counted("deletions_open"), counted("deletion_oldest_seconds")) == (2.0, 7.5)
    assert shown("outbox_age_seconds") == 0.0


async def test_sweep_takes_a_census_every_ten_seconds(simulation: Simulation) -> None:
    """Exported numbers are at most ten seconds old, and the database is queried no more often."""
    await simulation.only.sweeper.sweep()
    await simulation.store.jobs.insert([replace(scan_job(9, created_at=utc_now() - timedelta(hours=1)), outbox=())])
    simulation.now += 9.0
    await simulation.only.sweeper.sweep()
    assert counted("jobs", status="pending") == 0
    simulation.now += 2.0
    await simulation.only.sweeper.sweep()
    assert counted("jobs", status="pending") == 1
    assert 3_600 <= counted("oldest_job_age_seconds", status="pending") < 3_700


async def test_transitions_and_probes_are_counted_once(simulation: Simulation) -> None:
    """A scan is counted once at each status and state that it was stored in, with its probes by outcome and its times."""

    def numbers() -> Counter[str]:
        return Counter(
            {f"{status} jobs": int(counted("job_transitions_total", status=status)) for status in JobStatus}
            | {f"{state} chunks": int(counted("chunk_transitions_total", state=state)) for state in ChunkState}
            | {
                f"{outcome} probes": int(counted("job_probes_total", outcome=outcome))
                for outcome in ("silent", "answered", "excluded", "lost")
            }
            | {"waits": int(counted("job_wait_seconds_count")), "runs": int(counted("job_run_seconds_count"))},
        )

    before = numbers()
    await simulation.submit("127.9.8.0/30")
    await simulation.wait(2)
    await simulation.cancel(1)
    await simulation.settle()
    assert numbers() - before == {
        "pending jobs": 1,
        "running jobs": 1,
        "completed jobs": 1,
        "dispatched chunks": 1,
        "scanned chunks": 1,
        "stored chunks": 1,
        "silent probes": 8,
        "waits": 1,
        "runs": 1,
    }


async def test_cancelled_job_is_counted_once(simulation: Simulation) -> None:
    """A cancel counts one job, however often it is delivered, and no probes."""
    simulation.workers = []
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    before = counted("job_transitions_total", status="cancelled"), counted("job_probes_total", outcome="cancelled")
    await simulation.cancel(1)
    await simulation.cancel(1)
    await simulation.wait(2)
    after = counted("job_transitions_total", status="cancelled"), counted("job_probes_total", outcome="cancelled")
    assert after == (before[0] + 1, before[1])


class Refusing(MemoryJobs):
    """Takes no census of jobs."""

    asked = 0

    async def census(self) -> JobCensus:
        self.asked += 1
        raise DependencyError("the database is unavailable")


async def test_failed_census_is_retried_after_ten_seconds() -> None:
    """A failed census is retried ten seconds later, and repairs continue meanwhile."""
    store = MemoryStore()
    store.jobs = refusing = Refusing(store.data)
    simulation = Simulation(store)
    await simulation.start()
    await store.jobs.insert([scan_job(9)])
    with pytest.raises(DependencyError):
        await simulation.only.sweeper.sweep()
    await simulation.only.sweeper.sweep()
    await simulation.settle()
    assert (refusing.asked, (await store.chunks.standings([9]))[9].open) == (1, 1)


async def test_failed_census_of_jobs_hides_no_other_gauges() -> None:
    """A query that fails, for whatever cause, ends only its own gauges."""
    store = MemoryStore()
    store.jobs = Refusing(store.data)
    simulation = Simulation(store)
    await simulation.start()
    for gauges in (CHUNK_CENSUS, DELETION_CENSUS, OUTBOX_AGE):
        gauges._taken = float("-inf")
    await store.chunks.insert([chunk(id=f"9-{n}", job_id=9, index=n) for n in range(3)])
    with pytest.raises(DependencyError):
        await simulation.only.sweeper.sweep()
    assert (shown("chunks", state="queued"), shown("deletions_open")) == (3.0, 0.0)
    assert shown("outbox_age_seconds") == 0.0
