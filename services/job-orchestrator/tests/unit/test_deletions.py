"""Deletions: a deleted job is in no answer at once, nothing of it stays, and nothing brings it back."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from job_orchestrator.domain.chunk import OPEN, ChunkState
from job_orchestrator.domain.deletion import Deletion, Stage, request
from job_orchestrator.domain.job import JobTrigger, ScanJob, change
from job_orchestrator.handlers.jobs import deletions as deletions_handler
from job_orchestrator_testing import KEYS, MemoryStore, ResultStore, Simulation, chunk, scan_job
from job_orchestrator_testing.api import app_of, state_of
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import MemoryChunks, MemoryDeletions, MemoryJobs
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import CommandAccepted, DeleteResults, JobDeleted, Message, StopChunk
from scanfleet.contracts.messages.topics import SCAN_CHANGES, SCAN_COMMANDS, SCAN_DELETIONS, SCAN_TASKS, Topic
from scanfleet.errors import MessageError
from scanfleet.runtime.bus import Record
from scanfleet_testing.tokens import Issuer

ISSUER = Issuer()
HIDDEN = [
    ("GET", "/api/v1/task/1"),
    ("GET", "/api/v1/task/1/ledger"),
    ("GET", "/api/v1/task/1/waiting"),
    ("GET", "/api/v1/task/1/map"),
    ("GET", "/api/v1/task/1/snapshot"),
    ("GET", "/internal/jobs/1/owner"),
    ("GET", "/internal/jobs/1/owner/hosts"),
    ("GET", "/internal/jobs/1/export"),
    ("GET", "/internal/jobs/1/latest"),
    ("DELETE", "/api/v1/task/1"),
]


def client(simulation: Simulation) -> httpx2.AsyncClient:
    app = app_of(state_of(simulation), ISSUER.verifier)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")


async def delete(http: httpx2.AsyncClient, job_id: int = 1, user: int = 7, *, admin: bool = False) -> tuple[int, Any]:
    answer = await http.delete(f"/api/v1/task/{job_id}", headers=ISSUER.bearer(user, admin=admin))
    return answer.status_code, answer.json()


async def chunks_of(simulation: Simulation, job_id: int) -> int:
    return len([each async for each in simulation.store.chunks.of_job(job_id)])


async def assert_hidden(http: httpx2.AsyncClient) -> None:
    for admin in (False, True):
        for verb, path in HIDDEN:
            answer = await http.request(verb, path, headers=ISSUER.bearer(7, admin=admin))
            assert (answer.status_code, answer.json()) == (404, {"error": "Job not found"}), path


def stops(simulation: Simulation) -> list[StopChunk]:
    return [each for each in simulation.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)]


async def completed(simulation: Simulation) -> None:
    """Job 1 of user 7 has completed."""
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    assert (await simulation.store.jobs.get([1]))[1].settled


@pytest.mark.proves("G24")
async def test_deleted_job_is_hidden_at_once_and_then_removed(simulation: Simulation) -> None:
    """After the response each request is answered as if the job did not exist, for administrators too; then its chunks go."""
    await completed(simulation)
    simulation.results = None
    async with client(simulation) as http:
        assert await delete(http) == (200, {"message": "Job deleted successfully"})
        await assert_hidden(http)
        listed = await http.get("/api/v1/task", headers=ISSUER.bearer(7))
        assert (listed.json()["jobs"], listed.json()["total"]) == ([], 0)
        await simulation.wait(2)
        assert await chunks_of(simulation, 1) == 1, "the chunks are the last to go"
        simulation.results = ResultStore(simulation.bus)
        await simulation.wait(3, seconds=61)
        assert await chunks_of(simulation, 1) == 0
        await assert_hidden(http)
    assert (
        await simulation.store.deletions.due(simulation.only.commands._clock.now() + timedelta(days=9), 9, chunks=True)
        == []
    )


async def test_cancel_of_a_deleted_job_is_a_404(simulation: Simulation) -> None:
    """A cancel goes over the bus, and is answered as for a job that never existed, for administrators too."""
    await completed(simulation)
    await simulation.only.deletions.delete([1], "request")
    commands = [await simulation.cancel(1, admin=admin) for admin in (False, True)]
    await simulation.settle()
    for command in commands:
        assert [(each.status, each.error) for each in simulation.replies(command)] == [(404, "Job not found")]


async def deletions(http: httpx2.AsyncClient, user: int = 7, *, admin: bool = False, **query: Any) -> Any:
    answer = await http.get("/api/v1/deletion", params=query, headers=ISSUER.bearer(user, admin=admin))
    return answer.json() if answer.status_code == 200 else answer.status_code


async def test_receipt_shows_the_progress_and_counts_of_a_deletion(simulation: Simulation) -> None:
    """A deletion is listed from its acceptance on, with its state, who requested it, and counts once they are known."""
    await completed(simulation)
    simulation.results = None
    async with client(simulation) as http:
        assert (await deletions(http))["total"] == 0
        await delete(http, user=9, admin=True)
        [receipt] = (await deletions(http, state="open"))["deletions"]
        unknown = {"hosts": None, "rows": None, "chunks": None}
        assert receipt == {
            "job_id": 1,
            "user_id": 7,
            "subnet_id": 1,
            "reason": "request",
            "requested_by": 9,
            "requested_at": receipt["requested_at"],
            "state": "results",
            "completed_at": None,
            "deleted": unknown,
        }
        simulation.results = ResultStore(simulation.bus)
        await simulation.wait(3, seconds=61)
        [done] = (await deletions(http, state="done"))["deletions"]
        counts = {"hosts": 4, "rows": 9, "chunks": 1}
        assert done == receipt | {"state": "done", "completed_at": done["completed_at"], "deleted": counts}
        assert done["completed_at"].endswith("Z")
        assert (await deletions(http, state="open"))["deletions"] == []


@pytest.mark.proves("G13")
async def test_deletions_are_listed_for_the_owner_of_the_jobs_and_administrators(simulation: Simulation) -> None:
    """Each user sees their own, newest first and by pages; administrators see all, under audit."""
    ended = [change(scan_job(n, user_id=7 if n < 4 else 8), JobTrigger.CANCEL, THEN, settled=True) for n in range(1, 5)]
    await simulation.store.jobs.insert(ended)
    for n in range(1, 5):
        simulation.now += 1
        await simulation.only.deletions.delete([n], "retention")
    async with client(simulation) as http:
        page = await deletions(http, page=1, page_size=2)
        assert ([each["job_id"] for each in page["deletions"]], page["total"]) == ([3, 2], 3)
        assert [each["job_id"] for each in (await deletions(http, page=2, page_size=2))["deletions"]] == [1]
        assert [each["job_id"] for each in (await deletions(http, user=8))["deletions"]] == [4]
        assert await deletions(http, user_id="8") == 403
        assert await deletions(http, state="waiting") == 400
        every = await deletions(http, user=9, admin=True, user_id="all")
        assert [(each["job_id"], each["requested_by"]) for each in every["deletions"]] == [
            (n, None) for n in (4, 3, 2, 1)
        ]
    entries, _ = await simulation.store.audit.page(0, 10, subject="9")
    assert [(each.action, each.target, each.rule) for each in entries] == [
        ("list_deletions", "/api/v1/deletion?user_id=all", "role")
    ]


async def test_unfinished_job_is_not_deleted(simulation: Simulation) -> None:
    """Deleting a pending or running job is a 409 that names the remedy, and the job continues."""
    simulation.worker.hold = True
    await simulation.submit("127.9.8.0/30")
    async with client(simulation) as http:
        await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
        assert await delete(http) == (409, {"error": "Job is pending; cancel it first"})
        await simulation.settle()
        await simulation.worker.claim(simulation.worker.tasks[0])
        await simulation.settle()
        assert await delete(http) == (409, {"error": "Job is running; cancel it first"})
        await simulation.cancel(1)
        await simulation.settle()
        assert (await delete(http))[0] == 200


@pytest.mark.proves("G24")
async def test_cancelled_job_whose_chunks_still_stop_is_deleted(simulation: Simulation) -> None:
    """The delete is acknowledged and hides the job at once; its results are deleted when its workers have been stopped."""
    await simulation.store.jobs.insert([replace(change(scan_job(1, made=3), JobTrigger.CANCEL, THEN), outbox=())])
    held = chunk(state=ChunkState.RUNNING, attempt=1, worker_id="w-1", dispatched_at=THEN)
    await simulation.store.chunks.insert([held, *(chunk(id=f"1-{n}", index=n) for n in (1, 2))])
    async with client(simulation) as http:
        assert await delete(http) == (200, {"message": "Job deleted successfully"})
        await assert_hidden(http)
        assert [each["state"] for each in (await deletions(http, state="open"))["deletions"]] == ["waiting"]
        assert simulation.bus.messages(SCAN_DELETIONS) == []
        await simulation.only.deletions.step()
        assert [(each.chunk_id, each.attempt) for each in stops(simulation)] == [("1-0", 1)]
        assert await simulation.store.chunks.ids_in([1], OPEN, 9) == []
        await simulation.only.deletions.step()
        assert [each["state"] for each in (await deletions(http, state="open"))["deletions"]] == ["results"]
        await simulation.wait(3)
        assert [each["state"] for each in (await deletions(http))["deletions"]] == ["done"]
        await assert_hidden(http)
    assert (len(stops(simulation)), await chunks_of(simulation, 1)) == (1, 0)


async def test_queued_chunks_of_a_deleted_job_are_not_dispatched(simulation: Simulation) -> None:
    """After the delete of a cancelled job the dispatcher finds none of its queued chunks, and reports no skipped job."""
    await simulation.store.jobs.insert([replace(change(scan_job(1, made=3), JobTrigger.CANCEL, THEN), outbox=())])
    await simulation.store.chunks.insert([chunk(id=f"1-{n}", index=n) for n in range(3)])
    await simulation.only.deletions.delete([1], "request")
    with capture_logs() as logs:
        await simulation.worker.announce()
        await simulation.settle()
    assert [each for each in logs if each["event"] == "job_skipped"] == []
    [receipt], _ = await simulation.store.deletions.page(7, list(Stage), 0, 9)
    assert receipt.stage is Stage.WAITING


async def test_late_report_on_a_chunk_of_a_deleted_job_changes_nothing(simulation: Simulation) -> None:
    """The final report of a worker that was stopped for a delete arrives while the job has no document."""
    simulation.worker.hold = True
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    await simulation.worker.claim(simulation.worker.tasks[0])
    await simulation.settle()
    await simulation.cancel(1)
    await simulation.hand(SCAN_COMMANDS, simulation.take(SCAN_COMMANDS))
    assert len(stops(simulation)) == 1
    await simulation.only.deletions.delete([1], "request")
    await simulation.worker.release(simulation.worker.tasks[0])
    await simulation.wait(4)
    [receipt], _ = await simulation.store.deletions.page(7, list(Stage), 0, 9)
    assert (receipt.stage, await chunks_of(simulation, 1)) == (Stage.DONE, 0)


@pytest.mark.proves("G13")
async def test_delete_is_for_the_owner_and_administrators(simulation: Simulation) -> None:
    """Another user gets a 404 and the job stays; a deletion by an administrator is audited."""
    await completed(simulation)
    async with client(simulation) as http:
        assert await delete(http, user=8) == (404, {"error": "Job not found"})
        assert await delete(http, job_id=99) == (404, {"error": "Job not found"})
        assert (await delete(http, user=8, admin=True))[0] == 200
    entries, _ = await simulation.store.audit.page(0, 10, subject="8")
    assert [(each.action, each.target, each.rule) for each in entries] == [
        ("delete_task", "/api/v1/task/1 of user 7", "role")
    ]


class LosingDeletions(MemoryDeletions):
    """Loses every race for the deletion of a job."""

    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:  # noqa: ARG002 # the signature of the port
        return False


async def test_delete_of_a_job_that_changes_each_time_is_a_409() -> None:
    """A job that exists is not answered as if it did not."""
    store = MemoryStore()
    store.deletions = LosingDeletions(store.data)
    simulation = Simulation(store)
    await simulation.store.jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)])
    async with client(simulation) as http:
        assert await delete(http) == (409, {"error": "Job is still being changed; try again in a few seconds"})


async def test_concurrent_deletes_are_one_deletion(simulation: Simulation) -> None:
    """Of two requests one is answered 200, the other 404."""
    await completed(simulation)
    async with client(simulation) as http:
        answers = await asyncio.gather(delete(http), delete(http))
    assert sorted(status for status, _ in answers) == [200, 404]


@pytest.mark.proves("G2", "G24")
async def test_replayed_request_recreates_no_deleted_job(simulation: Simulation) -> None:
    """A redelivered submit, and a repeat under its key, are answered as before, and no job is made; ids go on."""
    policy_id, subnets = await simulation.add("127.9.8.0/30")
    first = await simulation.send(policy_id, subnets, key="k")
    records = simulation.take(SCAN_COMMANDS)
    await simulation.hand(SCAN_COMMANDS, records)
    await simulation.settle()
    assert await simulation.only.deletions.delete([1], "request") == {1}
    await simulation.hand(SCAN_COMMANDS, records)
    again = await simulation.send(policy_id, subnets, key="k")
    new = await simulation.send(policy_id, subnets)
    await simulation.wait(2)
    for command in (first, again):
        reply = simulation.replies(command)[-1]
        assert isinstance(reply, CommandAccepted)
        assert [job.id for job in reply.jobs] == [1]
    assert await simulation.store.jobs.get([1]) == {}
    assert simulation.accepted(new)[0].id == 2
    assert await chunks_of(simulation, 1) == 0


@pytest.mark.proves("G24")
async def test_deletion_continues_after_a_restart_and_an_outage(simulation: Simulation) -> None:
    """While result-store is unavailable it is asked again each minute, by any replica; then the rest follows."""
    await completed(simulation)
    simulation.results = None
    await simulation.only.deletions.delete([1], "request")
    for _ in range(3):
        await simulation.restart()
        await simulation.wait(2, seconds=61)
    asked = len([each for each in simulation.bus.messages(SCAN_DELETIONS) if isinstance(each, DeleteResults)])
    assert 3 <= asked <= 8
    assert await chunks_of(simulation, 1) == 1
    simulation.results = ResultStore(simulation.bus)
    await simulation.wait(2, seconds=61)
    await simulation.restart()
    await simulation.wait(1)
    assert await chunks_of(simulation, 1) == 0


async def test_request_to_a_partition_without_a_leader_delays_no_other_deletion(simulation: Simulation) -> None:
    """A deletion that cannot be requested is requested again later; the results and chunks of other jobs are deleted meanwhile."""
    for job_id in (1, 2):
        await simulation.store.jobs.insert([change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True)])
        await simulation.store.chunks.insert([chunk(id=f"{job_id}-0", job_id=job_id)])
    simulation.bus.broker.leaderless = {(SCAN_DELETIONS.name, SCAN_DELETIONS.partition_of("1"))}
    await simulation.only.deletions.delete([1, 2], "request")
    await simulation.wait(3)
    assert [await chunks_of(simulation, 1), await chunks_of(simulation, 2)] == [1, 0]
    simulation.bus.broker.leaderless.clear()
    await simulation.wait(3, seconds=61)
    assert await chunks_of(simulation, 1) == 0


@pytest.mark.proves("G24")
async def test_subscribers_are_notified_once_nothing_is_left_of_a_job(simulation: Simulation) -> None:
    """The event follows the last chunk; it has the owner, and the same id when a stored late chunk reopens the deletion."""
    await completed(simulation)
    simulation.results = None
    await simulation.only.deletions.delete([1], "request", requested_by=7)
    await simulation.wait(2)
    assert simulation.bus.messages(SCAN_CHANGES) == []
    simulation.results = ResultStore(simulation.bus)
    await simulation.wait(3, seconds=61)
    [receipt], _ = await simulation.store.deletions.page(7, [Stage.DONE], 0, 9)
    event = JobDeleted(job_id=1, user_id=7, subnet_id=1, reason="request", requested_at=receipt.requested_at)
    assert simulation.bus.messages(SCAN_CHANGES) == [event]
    await simulation.store.deletions.advance([1], Stage.DONE, Stage.CHUNKS, receipt.requested_at)
    await simulation.wait(2, seconds=61)
    again = simulation.bus.messages(SCAN_CHANGES)
    assert [each.event_id for each in again] == ["deleted-1", "deleted-1"]


async def test_event_to_a_partition_without_a_leader_delays_no_other_deletion(simulation: Simulation) -> None:
    """A deletion whose event is not acknowledged stays open, and its event is published again; others are completed meanwhile."""
    for job_id in (1, 2):
        await simulation.store.jobs.insert([change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True)])
    simulation.bus.broker.leaderless = {(SCAN_CHANGES.name, SCAN_CHANGES.partition_of("1"))}
    await simulation.only.deletions.delete([1, 2], "request")
    await simulation.wait(3)
    done, _ = await simulation.store.deletions.page(7, [Stage.DONE], 0, 9)
    assert [each.job_id for each in done] == [2]
    simulation.bus.broker.leaderless.clear()
    await simulation.wait(3, seconds=61)
    assert (await simulation.store.deletions.page(7, [Stage.DONE], 0, 9))[1] == 2
    assert {each.event_id for each in simulation.bus.messages(SCAN_CHANGES)} == {"deleted-1", "deleted-2"}


async def test_missing_topic_of_events_is_logged_once_per_partition(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletions whose events no broker acknowledges stay open; the log names the topic and the repair, in few lines."""
    jobs = range(1, 51)
    await simulation.store.jobs.insert(
        [change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True) for job_id in jobs]
    )
    await simulation.only.deletions.delete(jobs, "retention")
    publish = simulation.bus.publish

    async def wait_for_topic(topic: Topic, messages: Iterable[Message]) -> None:
        await (asyncio.Event().wait() if topic is SCAN_CHANGES else publish(topic, messages))

    monkeypatch.setattr(simulation.bus, "publish", wait_for_topic)
    with capture_logs() as logs:
        await simulation.wait(3)
    failed = [each for each in logs if each["event"] == "publish_failed"]
    assert sum(each["messages"] for each in failed) == len(jobs)
    assert len(failed) <= SCAN_CHANGES.partitions
    assert {each["error"] for each in failed} == {
        "no acknowledgement within 1 s; is the broker available, and does scan-changes exist?"
    }
    assert all("create-topics" in each["next_step"] for each in failed)
    assert (await simulation.store.deletions.page(7, [Stage.CHUNKS], 0, 9))[1] == len(jobs)
    monkeypatch.undo()
    await simulation.wait(3, seconds=61)
    assert (await simulation.store.deletions.page(7, [Stage.DONE], 0, 9))[1] == len(jobs)


async def test_chunks_are_deleted_in_bounded_steps(simulation: Simulation) -> None:
    """One step deletes at most 2,000 chunks, of all jobs together."""
    for job_id in (1, 2):
        job = change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True)
        await simulation.store.jobs.insert([job])
        await simulation.store.chunks.insert([chunk(id=f"{job_id}-{n}", job_id=job_id, index=n) for n in range(2_500)])
    await simulation.only.deletions.delete([1, 2], "request")
    await simulation.only.deletions.step()
    await simulation.settle()
    left = [await chunks_of(simulation, 1) + await chunks_of(simulation, 2)]
    while left[-1]:
        await simulation.only.deletions.step()
        left.append(await chunks_of(simulation, 1) + await chunks_of(simulation, 2))
    assert left == [5_000, 3_000, 1_000, 0]


async def test_last_event_is_published_before_the_job_is_deleted(simulation: Simulation) -> None:
    """Events in the outbox of a deleted job are published."""
    job = change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)
    await simulation.store.jobs.insert([job])
    await simulation.only.deletions.delete([1], "request")
    assert [event.seq for event in simulation.events(1)] == [1, 2]


def ended(id_: int, days: float, subnet_id: int = 1, trigger: JobTrigger = JobTrigger.COMPLETE) -> ScanJob:
    """A job that ended so many days before a simulation begins."""
    end_time = utc_now() - timedelta(days=days)
    job = scan_job(id_, subnet_id=subnet_id)
    if trigger is JobTrigger.COMPLETE:
        job = change(job, JobTrigger.START, THEN)
    return replace(change(job, trigger, THEN, settled=True), end_time=end_time, outbox=())


async def left_after_walk(simulation: Simulation, count: int) -> list[int]:
    """The ids of the jobs that a walk over the ended ones leaves."""
    simulation.now += 601
    for _ in range(20):
        await simulation.only.deletions.step()
    return sorted(await simulation.store.jobs.get(range(1, count + 1)))


async def test_expired_job_is_deleted_with_an_audit_entry() -> None:
    """A job that ended longer ago than the setting is deleted once, with an audit entry; a younger one stays."""
    simulation = Simulation(MemoryStore(), keep=timedelta(days=1))
    await simulation.start()
    await simulation.worker.announce()
    await completed(simulation)
    await simulation.store.subnets.delete(7, 1)
    await simulation.wait(1, seconds=86_000)
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    assert (await simulation.store.jobs.get([1, 2])).keys() == {1, 2}
    await simulation.wait(3, seconds=300)
    assert (await simulation.store.jobs.get([1, 2])).keys() == {2}
    entries, _ = await simulation.store.audit.page(0, 10, subject="")
    assert [(each.action, each.target, each.rule) for each in entries] == [
        ("delete_task", "/api/v1/task/1", "retention")
    ]
    assert await chunks_of(simulation, 1) == 0


async def test_two_newest_completed_jobs_of_a_subnet_are_kept() -> None:
    """Of three expired completed jobs only the oldest is deleted; failed jobs do not count and are deleted by age."""
    simulation = Simulation(MemoryStore(), keep=timedelta(days=365))
    await simulation.add("127.9.8.0/30")
    years = [ended(n, days) for n, days in enumerate((5 * 365, 4 * 365, 3 * 365), 1)]
    failed = [ended(4, 2 * 365, trigger=JobTrigger.FAIL), ended(5, 30, trigger=JobTrigger.FAIL)]
    await simulation.store.jobs.insert([*years, *failed])
    assert await left_after_walk(simulation, 5) == [2, 3, 5]
    await simulation.store.jobs.insert([ended(6, 10)])
    assert await left_after_walk(simulation, 6) == [3, 5, 6]
    await simulation.store.subnets.delete(7, 1)
    assert await left_after_walk(simulation, 6) == [5, 6]


@pytest.mark.parametrize(("keep", "left"), [(None, [3, 4, 5, 6]), (timedelta(days=365), [3, 4, 5])])
async def test_retention_of_a_subnet_overrides_the_setting(keep: timedelta | None, left: list[int]) -> None:
    """A shorter retention of a subnet deletes its jobs earlier and a longer one later; other jobs follow the setting."""
    simulation = Simulation(MemoryStore(), keep=keep)
    await simulation.add("127.9.8.0/30", "127.9.8.4/30", "127.9.8.8/30")
    assert await simulation.store.retention.set_days(1, 30)
    assert await simulation.store.retention.set_days(2, 3_650)
    cancelled = ((1, 40, 1), (2, 31, 1), (3, 29, 1), (4, 3_000, 2), (5, 360, 3), (6, 370, 3))
    await simulation.store.jobs.insert([ended(*each, trigger=JobTrigger.CANCEL) for each in cancelled])
    assert await left_after_walk(simulation, 6) == left
    await simulation.store.retention.set_days(1, None)
    await simulation.store.retention.set_days(2, None)
    assert 3 in await left_after_walk(simulation, 6)


async def test_retention_is_halted_by_a_jump_of_the_clock_until_it_is_resumed() -> None:
    """After a jump of the database's clock no replica deletes a job by age, and a request deletes one as before."""
    simulation = Simulation(MemoryStore(), replicas=2, keep=timedelta(days=365))
    await simulation.store.jobs.insert([ended(1, 400), ended(2, 400)])
    one, two = (replica.deletions for replica in simulation.replicas)
    simulation._clock.jump = timedelta(days=1)
    for deletions in (one, two, one):
        simulation.now += 601
        await deletions.step()
    assert (await simulation.store.jobs.get([1, 2])).keys() == {1, 2}
    assert await two.delete([2], "request") == {2}
    assert await simulation.store.retention.resume()
    simulation.now += 601
    await two.step()
    assert (await simulation.store.jobs.get([1, 2])).keys() == set()


def stop_for(simulation: Simulation, time: timedelta) -> None:
    """Step the clock while no replica observes it."""
    simulation.step_clock(time)
    simulation._clock.jump = None


async def test_jump_of_the_clock_while_no_orchestrator_runs_halts_retention() -> None:
    """If no walk began within the shortest retention, the next one deletes no job until an operator resumes deletion by age."""
    simulation = Simulation(MemoryStore(), keep=timedelta(days=365))
    await simulation.add("127.9.8.0/30")
    await simulation.store.retention.set_days(1, 30)
    assert await left_after_walk(simulation, 1) == []
    await simulation.store.jobs.insert([ended(1, 10, trigger=JobTrigger.CANCEL)])
    stop_for(simulation, timedelta(days=31))
    assert await left_after_walk(simulation, 1) == [1]
    assert (await simulation.store.retention.halted() or timedelta()) > timedelta(days=30)
    stop_for(simulation, timedelta(days=31))
    assert await left_after_walk(simulation, 1) == [1]
    await simulation.store.retention.resume()
    assert await left_after_walk(simulation, 1) == []


async def test_jump_of_the_clock_during_a_step_deletes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the clock jumps while a step reads whether deletion is halted, that step uses the time from before the jump."""
    simulation = Simulation(MemoryStore(), keep=timedelta(days=365))
    await simulation.store.jobs.insert([ended(1, 300)])

    async def halted() -> None:
        simulation.step_clock(timedelta(days=100))

    with monkeypatch.context() as patch:
        patch.setattr(simulation.store.retention, "halted", halted)
        await simulation.only.deletions.step()
    assert await left_after_walk(simulation, 1) == [1]
    assert await simulation.store.retention.halted() == timedelta(days=100)


async def test_walk_continues_after_jobs_that_are_kept() -> None:
    """More jobs than a step looks at may have to stay, and an expired one behind them is deleted."""
    simulation = Simulation(MemoryStore(), keep=timedelta(days=1))
    await simulation.add("127.9.8.0/30", "127.9.8.4/30")
    await simulation.store.retention.set_days(1, 3_650)
    stay = [ended(n, 100, 1, JobTrigger.CANCEL) for n in range(1, 1_201)]
    await simulation.store.jobs.insert([*stay, ended(1_201, 2, 2, JobTrigger.CANCEL)])
    assert await left_after_walk(simulation, 1_201) == list(range(1, 1_201))


class UnreadableJobs(MemoryJobs):
    """Cannot read the documents of the first hundred jobs."""

    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]:
        return {id_: job for id_, job in (await super().get(ids)).items() if id_ > 100}


async def test_expired_jobs_are_deleted_in_steps_and_unreadable_ones_skipped() -> None:
    """Each step deletes up to a hundred expired jobs, without a delay while there are more, and audits only those."""
    store = MemoryStore()
    store.jobs = UnreadableJobs(store.data)
    simulation = Simulation(store, keep=timedelta(days=1))
    await simulation.store.jobs.insert(
        [replace(change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True), outbox=()) for n in range(1, 351)]
    )
    left = []
    for _ in range(4):
        await simulation.only.deletions.step()
        left.append(len(await simulation.store.jobs.get(range(1, 351))))
    assert left == [250, 150, 50, 0]
    assert (await simulation.store.audit.page(0, 1))[1] == 250
    await simulation.only.deletions.step()
    assert (await simulation.store.audit.page(0, 1))[1] == 250


async def test_deletion_steps_woken_often_keep_their_interval(simulation: Simulation) -> None:
    """Steps that have more to delete pause between each other, which keeps the documented rate."""
    steps = 0

    async def step() -> None:
        nonlocal steps
        steps += 1
        simulation.only.deletions.loop.wake()

    simulation.only.deletions.loop._step = step
    await simulation.only.deletions.loop.start()
    await asyncio.sleep(0.2)
    await simulation.only.deletions.loop.stop()
    assert steps == 1


class CountedDeletions(MemoryDeletions):
    """Counts its reads of due deletions."""

    reads = 0

    async def due(self, *arguments: Any, **named: Any) -> list[Deletion]:
        self.reads += 1
        return await super().due(*arguments, **named)


async def test_deletions_without_any_that_is_due_are_not_read_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the interval of steps after the start, the idle loop has made only its first step."""
    monkeypatch.setattr(deletions_handler, "_STEP_SECONDS", 0.002)
    store = MemoryStore()
    store.deletions = counted = CountedDeletions(store.data)
    simulation = Simulation(store)
    await simulation.only.deletions.loop.start()
    await asyncio.sleep(0.2)
    await simulation.only.deletions.loop.stop()
    assert counted.reads == 2


@pytest.mark.parametrize("settled", [True, False])
async def test_begun_deletion_continues_in_every_step(monkeypatch: pytest.MonkeyPatch, *, settled: bool) -> None:
    """A job whose chunks take a hundred steps, stopped before or not, is deleted long before the next look."""
    monkeypatch.setattr(deletions_handler, "_STEP_SECONDS", 0.002)
    simulation = Simulation(MemoryStore(), deletes_per_second=1_000)
    await simulation.store.jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN, settled=settled)])
    await simulation.store.chunks.insert([chunk(id=f"1-{n}", job_id=1, index=n) for n in range(200)])
    await simulation.only.deletions.delete([1], "request")
    await simulation.only.deletions.loop.start()
    try:
        async with asyncio.timeout(5):
            while await chunks_of(simulation, 1):
                await simulation.settle()
                await asyncio.sleep(0.01)
    finally:
        await simulation.only.deletions.loop.stop()


async def test_chunks_are_deleted_at_the_set_rate() -> None:
    """A step, of which there is one per second, deletes no more chunks than the setting allows, and counts them."""
    simulation = Simulation(MemoryStore(), deletes_per_second=100)
    await simulation.store.jobs.insert([change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True) for n in (1, 2)])
    await simulation.store.chunks.insert([chunk(id=f"{n}-{i}", job_id=n, index=i) for n in (1, 2) for i in range(75)])
    before = REGISTRY.get_sample_value("scanfleet_deleted_chunks_total") or 0.0
    await simulation.only.deletions.delete([1, 2], "request")
    await simulation.settle()
    left = []
    for _ in range(3):
        left.append(await chunks_of(simulation, 1) + await chunks_of(simulation, 2))
        await simulation.only.deletions.step()
        await simulation.settle()
    assert left == [150, 150, 50]
    assert REGISTRY.get_sample_value("scanfleet_deleted_chunks_total") == before + 150


async def test_large_deletions_of_one_user_do_not_delay_those_of_others() -> None:
    """While the chunks of 150 large jobs are deleted, the results of another job are deleted at once, and its chunks in turn."""
    simulation = Simulation(MemoryStore(), deletes_per_second=10)
    large, small = range(1, 151), 151
    await simulation.store.jobs.insert([change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True) for n in large])
    await simulation.store.chunks.insert([chunk(id=f"{n}-{i}", job_id=n, index=i) for n in large for i in range(30)])
    await simulation.only.deletions.delete(large, "request")
    for _ in range(2):
        simulation.now += 1.0
        await simulation.only.deletions.step()
        await simulation.settle()
    await simulation.store.jobs.insert([change(scan_job(small, user_id=8), JobTrigger.CANCEL, THEN, settled=True)])
    await simulation.only.deletions.delete([small], "request")
    for _ in range(2):
        simulation.now += 1.0
        await simulation.only.deletions.step()
        await simulation.settle()
    [receipt], _ = await simulation.store.deletions.page(8, list(Stage), 0, 9)
    assert receipt.stage is Stage.CHUNKS
    assert [await chunks_of(simulation, n) for n in large[:5]] == [20, 20, 20, 30, 30]


class SlowChunks(MemoryChunks):
    """Lets others run while it deletes chunks."""

    async def delete(self, job_id: int, limit: int) -> int:
        deleted = await super().delete(job_id, limit)
        await asyncio.sleep(0)
        return deleted


async def test_concurrent_replicas_count_a_deleted_job_once() -> None:
    """Both find the deletion due, and only one of them moves it to its last stage."""
    store = MemoryStore()
    store.chunks = SlowChunks(store.data)
    simulation = Simulation(store, replicas=2)
    await simulation.store.jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)])
    reason = {"reason": "request"}
    before = REGISTRY.get_sample_value("scanfleet_deleted_jobs_total", reason) or 0.0
    await simulation.replicas[0].deletions.delete([1], "request")
    await simulation.settle()
    await asyncio.gather(*(replica.deletions.step() for replica in simulation.replicas))
    await simulation.settle()
    await asyncio.gather(*(replica.deletions.step() for replica in simulation.replicas))
    assert REGISTRY.get_sample_value("scanfleet_deleted_jobs_total", reason) == before + 1


async def test_chunks_stored_after_the_deletion_of_their_job_are_deleted(simulation: Simulation) -> None:
    """A stalled replica that inserts a window late leaves no chunk: the dispatcher has the deletion continue."""
    await completed(simulation)
    await simulation.only.deletions.delete([1], "request")
    await simulation.wait(3)
    assert await chunks_of(simulation, 1) == 0
    await simulation.store.chunks.insert([chunk(id="1-5", index=5)])
    await simulation.wait(3)
    assert await chunks_of(simulation, 1) == 0


@pytest.mark.proves("F38", "G24")
async def test_job_of_a_backup_is_deleted_again(simulation: Simulation) -> None:
    """When the topic is read again over a database that was set back, what was deleted since is deleted again."""
    await completed(simulation)
    (backup,) = (await simulation.store.jobs.get([1])).values()
    asked_at = simulation.time
    await simulation.only.deletions.delete([1], "request", requested_by=9)
    simulation.now += 100
    await simulation.only.deletions.step()
    records = simulation.take(SCAN_DELETIONS)
    simulation.store = MemoryStore()
    await simulation.restart()
    await simulation.store.jobs.insert([backup])
    await simulation.hand(SCAN_DELETIONS, records)
    assert await simulation.store.jobs.get([1]) == {}
    [again], _ = await simulation.store.deletions.page(7, list(Stage), 0, 9)
    assert (again.requested_by, again.requested_at) == (9, asked_at)
    entries, _ = await simulation.store.audit.page(0, 9, action="delete_task")
    assert [(each.subject, each.target, each.decision, each.rule) for each in entries] == [
        ("9", "/api/v1/task/1", "allowed", "restore")
    ]


@pytest.mark.proves("A25")
@pytest.mark.parametrize(
    "change",
    [
        {"signature": None},
        {"requested_by": 4242},
        {"job_id": 1},
        {"reason": "retention"},
        {"signature": "00000000:" + 64 * "0"},
    ],
    ids=str,
)
async def test_forged_deletion_deletes_no_job(simulation: Simulation, change: dict[str, Any]) -> None:
    """result-store may write to the topic: a request without the orchestrator's signature, or another's, is dead-lettered."""
    await completed(simulation)
    of_job = 2 if "job_id" in change else 1
    genuine = request(Deletion(job_id=of_job, user_id=7, subnet_id=1, reason="request", requested_at=THEN), KEYS)
    forged = genuine.model_copy(update=change)
    with pytest.raises(MessageError, match="job 1 is not deleted"):
        await simulation.hand(SCAN_DELETIONS, [Record(forged, SCAN_DELETIONS.name, 0, 0, THEN)])
    await simulation.wait(2)
    assert (await simulation.store.jobs.get([1])).keys() == {1}
    assert await simulation.store.deletions.page(7, list(Stage), 0, 9) == ([], 0)
    assert (await simulation.store.audit.page(0, 9, action="delete_task"))[1] == 0


async def test_unsigned_request_of_an_older_replica_is_ignored(simulation: Simulation) -> None:
    """During an upgrade replicas of release 0.2 publish requests without a signature, of jobs that no longer exist."""
    await completed(simulation)
    await simulation.only.deletions.delete([1], "request")
    await simulation.hand(SCAN_DELETIONS, [Record(DeleteResults(job_id=1), SCAN_DELETIONS.name, 0, 0, THEN)])
    await simulation.wait(3)
    assert await chunks_of(simulation, 1) == 0
