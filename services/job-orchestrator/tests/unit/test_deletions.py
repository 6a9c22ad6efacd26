"""Deletions: a deleted job is in no answer at once, nothing of it stays, and nothing brings it back."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
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
from job_orchestrator_testing import KEYS, MemoryStore, ResultStore, World, chunk, scan_job
from job_orchestrator_testing.api import app_of, state_of
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.repository import MemoryChunks, MemoryDeletions, MemoryJobs
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import CommandAccepted, DeleteResults, StopChunk
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_DELETIONS, SCAN_TASKS
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


def client(world: World) -> httpx2.AsyncClient:
    app = app_of(state_of(world), ISSUER.verifier)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://orchestrator")


async def delete(http: httpx2.AsyncClient, job_id: int = 1, user: int = 7, *, admin: bool = False) -> tuple[int, Any]:
    answer = await http.delete(f"/api/v1/task/{job_id}", headers=ISSUER.bearer(user, admin=admin))
    return answer.status_code, answer.json()


async def chunks_of(world: World, job_id: int) -> int:
    return len([each async for each in world.store.chunks.of_job(job_id)])


async def assert_hidden(http: httpx2.AsyncClient) -> None:
    for admin in (False, True):
        for verb, path in HIDDEN:
            answer = await http.request(verb, path, headers=ISSUER.bearer(7, admin=admin))
            assert (answer.status_code, answer.json()) == (404, {"error": "Job not found"}), path


def stops(world: World) -> list[StopChunk]:
    return [each for each in world.bus.messages(SCAN_TASKS) if isinstance(each, StopChunk)]


async def completed(world: World) -> None:
    """Job 1 of user 7 has completed."""
    await world.submit("127.9.8.0/30")
    await world.settle()
    assert (await world.store.jobs.get([1]))[1].settled


@pytest.mark.proves("G24")
async def test_deleted_job_is_hidden_at_once_and_then_removed(world: World) -> None:
    """After the response each request is answered as if the job did not exist, for administrators too; then its chunks go."""
    await completed(world)
    world.results = None
    async with client(world) as http:
        assert await delete(http) == (200, {"message": "Job deleted successfully"})
        await assert_hidden(http)
        listed = await http.get("/api/v1/task", headers=ISSUER.bearer(7))
        assert (listed.json()["jobs"], listed.json()["total"]) == ([], 0)
        await world.wait(2)
        assert await chunks_of(world, 1) == 1, "the chunks are the last to go"
        world.results = ResultStore(world.bus)
        await world.wait(3, seconds=61)
        assert await chunks_of(world, 1) == 0
        await assert_hidden(http)
    assert await world.store.deletions.due(world.only.commands._clock.now() + timedelta(days=9), 9, chunks=True) == []


async def test_cancel_of_a_deleted_job_is_a_404(world: World) -> None:
    """A cancel goes over the bus, and is answered as for a job that never existed, for administrators too."""
    await completed(world)
    await world.only.deletions.delete([1], "request")
    commands = [await world.cancel(1, admin=admin) for admin in (False, True)]
    await world.settle()
    for command in commands:
        assert [(each.status, each.error) for each in world.replies(command)] == [(404, "Job not found")]


async def deletions(http: httpx2.AsyncClient, user: int = 7, *, admin: bool = False, **query: Any) -> Any:
    answer = await http.get("/api/v1/deletion", params=query, headers=ISSUER.bearer(user, admin=admin))
    return answer.json() if answer.status_code == 200 else answer.status_code


async def test_receipt_shows_the_progress_of_a_deletion_and_what_was_deleted(world: World) -> None:
    """A deletion is listed from its acceptance on, with its state, who requested it, and counts once they are known."""
    await completed(world)
    world.results = None
    async with client(world) as http:
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
        world.results = ResultStore(world.bus)
        await world.wait(3, seconds=61)
        [done] = (await deletions(http, state="done"))["deletions"]
        counts = {"hosts": 4, "rows": 9, "chunks": 1}
        assert done == receipt | {"state": "done", "completed_at": done["completed_at"], "deleted": counts}
        assert done["completed_at"].endswith("Z")
        assert (await deletions(http, state="open"))["deletions"] == []


@pytest.mark.proves("G13")
async def test_deletions_are_listed_for_the_owner_of_the_jobs_and_administrators(world: World) -> None:
    """Each user sees their own, newest first and by pages; administrators see all, under audit."""
    ended = [change(scan_job(n, user_id=7 if n < 4 else 8), JobTrigger.CANCEL, THEN, settled=True) for n in range(1, 5)]
    await world.store.jobs.insert(ended)
    for n in range(1, 5):
        world.now += 1
        await world.only.deletions.delete([n], "retention")
    async with client(world) as http:
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
    entries, _ = await world.store.audit.page(0, 10, subject="9")
    assert [(each.action, each.target, each.rule) for each in entries] == [
        ("list_deletions", "/api/v1/deletion?user_id=all", "role")
    ]


async def test_unfinished_job_is_not_deleted(world: World) -> None:
    """Deleting a pending or running job is a 409 that names the remedy, and the job continues."""
    world.worker.hold = True
    await world.submit("127.9.8.0/30")
    async with client(world) as http:
        await world.hand(SCAN_COMMANDS, world.take(SCAN_COMMANDS))
        assert await delete(http) == (409, {"error": "Job is pending; cancel it first"})
        await world.settle()
        await world.worker.claim(world.worker.tasks[0])
        await world.settle()
        assert await delete(http) == (409, {"error": "Job is running; cancel it first"})
        await world.cancel(1)
        await world.settle()
        assert (await delete(http))[0] == 200


@pytest.mark.proves("G24")
async def test_cancelled_job_whose_chunks_still_stop_is_deleted(world: World) -> None:
    """The delete is acknowledged and hides the job at once; its results are deleted when its workers have been stopped."""
    await world.store.jobs.insert([replace(change(scan_job(1, made=3), JobTrigger.CANCEL, THEN), outbox=())])
    held = chunk(state=ChunkState.RUNNING, attempt=1, worker_id="w-1", dispatched_at=THEN)
    await world.store.chunks.insert([held, *(chunk(id=f"1-{n}", index=n) for n in (1, 2))])
    async with client(world) as http:
        assert await delete(http) == (200, {"message": "Job deleted successfully"})
        await assert_hidden(http)
        assert [each["state"] for each in (await deletions(http, state="open"))["deletions"]] == ["waiting"]
        assert world.bus.messages(SCAN_DELETIONS) == []
        await world.only.deletions.step()
        assert [(each.chunk_id, each.attempt) for each in stops(world)] == [("1-0", 1)]
        assert await world.store.chunks.ids_in([1], OPEN, 9) == []
        await world.only.deletions.step()
        assert [each["state"] for each in (await deletions(http, state="open"))["deletions"]] == ["results"]
        await world.wait(3)
        assert [each["state"] for each in (await deletions(http))["deletions"]] == ["done"]
        await assert_hidden(http)
    assert (len(stops(world)), await chunks_of(world, 1)) == (1, 0)


async def test_queued_chunks_of_a_deleted_job_are_not_dispatched(world: World) -> None:
    """After the delete of a cancelled job the dispatcher finds none of its queued chunks, and reports no skipped job."""
    await world.store.jobs.insert([replace(change(scan_job(1, made=3), JobTrigger.CANCEL, THEN), outbox=())])
    await world.store.chunks.insert([chunk(id=f"1-{n}", index=n) for n in range(3)])
    await world.only.deletions.delete([1], "request")
    with capture_logs() as logs:
        await world.worker.announce()
        await world.settle()
    assert [each for each in logs if each["event"] == "job_skipped"] == []
    [receipt], _ = await world.store.deletions.page(7, list(Stage), 0, 9)
    assert receipt.stage is Stage.WAITING


async def test_late_report_on_a_chunk_of_a_deleted_job_changes_nothing(world: World) -> None:
    """The final report of a worker that was stopped for a delete arrives while the job has no document."""
    world.worker.hold = True
    await world.submit("127.9.8.0/30")
    await world.settle()
    await world.worker.claim(world.worker.tasks[0])
    await world.settle()
    await world.cancel(1)
    await world.hand(SCAN_COMMANDS, world.take(SCAN_COMMANDS))
    assert len(stops(world)) == 1
    await world.only.deletions.delete([1], "request")
    await world.worker.release(world.worker.tasks[0])
    await world.wait(4)
    [receipt], _ = await world.store.deletions.page(7, list(Stage), 0, 9)
    assert (receipt.stage, await chunks_of(world, 1)) == (Stage.DONE, 0)


@pytest.mark.proves("G13")
async def test_delete_is_for_the_owner_and_administrators(world: World) -> None:
    """Another user gets a 404 and the job stays; a deletion by an administrator is audited."""
    await completed(world)
    async with client(world) as http:
        assert await delete(http, user=8) == (404, {"error": "Job not found"})
        assert await delete(http, job_id=99) == (404, {"error": "Job not found"})
        assert (await delete(http, user=8, admin=True))[0] == 200
    entries, _ = await world.store.audit.page(0, 10, subject="8")
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
    world = World(store)
    await world.store.jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)])
    async with client(world) as http:
        assert await delete(http) == (409, {"error": "Job is still being changed; try again in a few seconds"})


async def test_concurrent_deletes_are_one_deletion(world: World) -> None:
    """Of two requests one is answered 200, the other 404."""
    await completed(world)
    async with client(world) as http:
        answers = await asyncio.gather(delete(http), delete(http))
    assert sorted(status for status, _ in answers) == [200, 404]


@pytest.mark.proves("G2", "G24")
async def test_replayed_request_recreates_no_deleted_job(world: World) -> None:
    """A redelivered submit, and a repeat under its key, are answered as before, and no job is made; ids go on."""
    policy_id, subnets = await world.add("127.9.8.0/30")
    first = await world.send(policy_id, subnets, key="k")
    records = world.take(SCAN_COMMANDS)
    await world.hand(SCAN_COMMANDS, records)
    await world.settle()
    assert await world.only.deletions.delete([1], "request") == {1}
    await world.hand(SCAN_COMMANDS, records)
    again = await world.send(policy_id, subnets, key="k")
    new = await world.send(policy_id, subnets)
    await world.wait(2)
    for command in (first, again):
        reply = world.replies(command)[-1]
        assert isinstance(reply, CommandAccepted)
        assert [job.id for job in reply.jobs] == [1]
    assert await world.store.jobs.get([1]) == {}
    assert world.accepted(new)[0].id == 2
    assert await chunks_of(world, 1) == 0


@pytest.mark.proves("G24")
async def test_deletion_continues_after_a_restart_and_an_outage(world: World) -> None:
    """While result-store is unavailable it is asked again each minute, by any replica; then the rest follows."""
    await completed(world)
    world.results = None
    await world.only.deletions.delete([1], "request")
    for _ in range(3):
        await world.restart()
        await world.wait(2, seconds=61)
    asked = len([each for each in world.bus.messages(SCAN_DELETIONS) if isinstance(each, DeleteResults)])
    assert 3 <= asked <= 8
    assert await chunks_of(world, 1) == 1
    world.results = ResultStore(world.bus)
    await world.wait(2, seconds=61)
    await world.restart()
    await world.wait(1)
    assert await chunks_of(world, 1) == 0


async def test_request_to_a_partition_without_a_leader_delays_no_other_deletion(world: World) -> None:
    """A deletion that cannot be requested is requested again later; the results and chunks of other jobs are deleted meanwhile."""
    for job_id in (1, 2):
        await world.store.jobs.insert([change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True)])
        await world.store.chunks.insert([chunk(id=f"{job_id}-0", job_id=job_id)])
    world.bus.broker.leaderless = {(SCAN_DELETIONS.name, SCAN_DELETIONS.partition_of("1"))}
    await world.only.deletions.delete([1, 2], "request")
    await world.wait(3)
    assert [await chunks_of(world, 1), await chunks_of(world, 2)] == [1, 0]
    world.bus.broker.leaderless.clear()
    await world.wait(3, seconds=61)
    assert await chunks_of(world, 1) == 0


async def test_chunks_are_deleted_in_bounded_steps(world: World) -> None:
    """One step deletes at most 2,000 chunks, of all jobs together."""
    for job_id in (1, 2):
        job = change(scan_job(job_id), JobTrigger.CANCEL, THEN, settled=True)
        await world.store.jobs.insert([job])
        await world.store.chunks.insert([chunk(id=f"{job_id}-{n}", job_id=job_id, index=n) for n in range(2_500)])
    await world.only.deletions.delete([1, 2], "request")
    await world.only.deletions.step()
    await world.settle()
    left = [await chunks_of(world, 1) + await chunks_of(world, 2)]
    while left[-1]:
        await world.only.deletions.step()
        left.append(await chunks_of(world, 1) + await chunks_of(world, 2))
    assert left == [5_000, 3_000, 1_000, 0]


async def test_last_event_is_published_before_the_job_is_deleted(world: World) -> None:
    """Events in the outbox of a deleted job are published."""
    job = change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)
    await world.store.jobs.insert([job])
    await world.only.deletions.delete([1], "request")
    assert [event.seq for event in world.events(1)] == [1, 2]


def ended(id_: int, days: float, subnet_id: int = 1, trigger: JobTrigger = JobTrigger.COMPLETE) -> ScanJob:
    """A job that ended so many days before a world begins."""
    end_time = utc_now() - timedelta(days=days)
    job = scan_job(id_, subnet_id=subnet_id)
    if trigger is JobTrigger.COMPLETE:
        job = change(job, JobTrigger.START, THEN)
    return replace(change(job, trigger, THEN, settled=True), end_time=end_time, outbox=())


async def left_after_walk(world: World, count: int) -> list[int]:
    """The ids of the jobs that a walk over the ended ones leaves."""
    world.now += 601
    for _ in range(20):
        await world.only.deletions.step()
    return sorted(await world.store.jobs.get(range(1, count + 1)))


async def test_expired_job_is_deleted_with_an_audit_entry() -> None:
    """A job that ended longer ago than the setting is deleted once, with an audit entry; a younger one stays."""
    world = World(MemoryStore(), keep=timedelta(days=1))
    await world.start()
    await world.worker.announce()
    await completed(world)
    await world.store.subnets.delete(7, 1)
    await world.wait(1, seconds=86_000)
    await world.submit("127.9.8.0/30")
    await world.settle()
    assert (await world.store.jobs.get([1, 2])).keys() == {1, 2}
    await world.wait(3, seconds=300)
    assert (await world.store.jobs.get([1, 2])).keys() == {2}
    entries, _ = await world.store.audit.page(0, 10, subject="")
    assert [(each.action, each.target, each.rule) for each in entries] == [
        ("delete_task", "/api/v1/task/1", "retention")
    ]
    assert await chunks_of(world, 1) == 0


async def test_two_newest_completed_jobs_of_a_subnet_are_kept() -> None:
    """Of three expired completed jobs only the oldest is deleted; failed jobs do not count and are deleted by age."""
    world = World(MemoryStore(), keep=timedelta(days=365))
    await world.add("127.9.8.0/30")
    years = [ended(n, days) for n, days in enumerate((5 * 365, 4 * 365, 3 * 365), 1)]
    failed = [ended(4, 2 * 365, trigger=JobTrigger.FAIL), ended(5, 30, trigger=JobTrigger.FAIL)]
    await world.store.jobs.insert([*years, *failed])
    assert await left_after_walk(world, 5) == [2, 3, 5]
    await world.store.jobs.insert([ended(6, 10)])
    assert await left_after_walk(world, 6) == [3, 5, 6]
    await world.store.subnets.delete(7, 1)
    assert await left_after_walk(world, 6) == [5, 6]


@pytest.mark.parametrize(("keep", "left"), [(None, [3, 4, 5, 6]), (timedelta(days=365), [3, 4, 5])])
async def test_retention_of_a_subnet_overrides_the_setting(keep: timedelta | None, left: list[int]) -> None:
    """Jobs of a subnet with a shorter retention are deleted earlier and those with a longer one later; other jobs follow the setting."""
    world = World(MemoryStore(), keep=keep)
    await world.add("127.9.8.0/30", "127.9.8.4/30", "127.9.8.8/30")
    assert await world.store.retention.set_days(1, 30)
    assert await world.store.retention.set_days(2, 3_650)
    cancelled = ((1, 40, 1), (2, 31, 1), (3, 29, 1), (4, 3_000, 2), (5, 360, 3), (6, 370, 3))
    await world.store.jobs.insert([ended(*each, trigger=JobTrigger.CANCEL) for each in cancelled])
    assert await left_after_walk(world, 6) == left
    await world.store.retention.set_days(1, None)
    await world.store.retention.set_days(2, None)
    assert 3 in await left_after_walk(world, 6)


async def test_retention_is_halted_by_a_jump_of_the_clock_until_it_is_resumed() -> None:
    """After a jump of the database's clock no replica deletes a job by age, and a request deletes one as before."""
    world = World(MemoryStore(), replicas=2, keep=timedelta(days=365))
    await world.store.jobs.insert([ended(1, 400), ended(2, 400)])
    one, two = (replica.deletions for replica in world.replicas)
    world._clock.jump = timedelta(days=1)
    for deletions in (one, two, one):
        world.now += 601
        await deletions.step()
    assert (await world.store.jobs.get([1, 2])).keys() == {1, 2}
    assert await two.delete([2], "request") == {2}
    assert await world.store.retention.resume()
    world.now += 601
    await two.step()
    assert (await world.store.jobs.get([1, 2])).keys() == set()


def stop_for(world: World, time: timedelta) -> None:
    """Step the clock while no replica observes it."""
    world.step_clock(time)
    world._clock.jump = None


async def test_jump_of_the_clock_while_no_orchestrator_runs_halts_retention() -> None:
    """If no walk began within the shortest retention, the next one deletes no job until an operator resumes deletion by age."""
    world = World(MemoryStore(), keep=timedelta(days=365))
    await world.add("127.9.8.0/30")
    await world.store.retention.set_days(1, 30)
    assert await left_after_walk(world, 1) == []
    await world.store.jobs.insert([ended(1, 10, trigger=JobTrigger.CANCEL)])
    stop_for(world, timedelta(days=31))
    assert await left_after_walk(world, 1) == [1]
    assert (await world.store.retention.halted() or timedelta()) > timedelta(days=30)
    stop_for(world, timedelta(days=31))
    assert await left_after_walk(world, 1) == [1]
    await world.store.retention.resume()
    assert await left_after_walk(world, 1) == []


async def test_jump_of_the_clock_during_a_step_deletes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the clock jumps while a step reads whether deletion is halted, that step uses the time from before the jump."""
    world = World(MemoryStore(), keep=timedelta(days=365))
    await world.store.jobs.insert([ended(1, 300)])

    async def halted() -> None:
        world.step_clock(timedelta(days=100))

    with monkeypatch.context() as patch:
        patch.setattr(world.store.retention, "halted", halted)
        await world.only.deletions.step()
    assert await left_after_walk(world, 1) == [1]
    assert await world.store.retention.halted() == timedelta(days=100)


async def test_walk_continues_after_jobs_that_are_kept() -> None:
    """More jobs than a step looks at may have to stay, and an expired one behind them is deleted."""
    world = World(MemoryStore(), keep=timedelta(days=1))
    await world.add("127.9.8.0/30", "127.9.8.4/30")
    await world.store.retention.set_days(1, 3_650)
    stay = [ended(n, 100, 1, JobTrigger.CANCEL) for n in range(1, 1_201)]
    await world.store.jobs.insert([*stay, ended(1_201, 2, 2, JobTrigger.CANCEL)])
    assert await left_after_walk(world, 1_201) == list(range(1, 1_201))


class UnreadableJobs(MemoryJobs):
    """Cannot read the documents of the first hundred jobs."""

    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]:
        return {id_: job for id_, job in (await super().get(ids)).items() if id_ > 100}


async def test_expired_jobs_are_deleted_in_steps_and_unreadable_ones_skipped() -> None:
    """Each step deletes up to a hundred expired jobs, without a delay while there are more, and audits only those."""
    store = MemoryStore()
    store.jobs = UnreadableJobs(store.data)
    world = World(store, keep=timedelta(days=1))
    await world.store.jobs.insert(
        [replace(change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True), outbox=()) for n in range(1, 351)]
    )
    left = []
    for _ in range(4):
        await world.only.deletions.step()
        left.append(len(await world.store.jobs.get(range(1, 351))))
    assert left == [250, 150, 50, 0]
    assert (await world.store.audit.page(0, 1))[1] == 250
    await world.only.deletions.step()
    assert (await world.store.audit.page(0, 1))[1] == 250


async def test_deletion_steps_keep_their_interval_however_often_they_are_woken(world: World) -> None:
    """Steps that have more to delete pause between each other, which keeps the documented rate."""
    steps = 0

    async def step() -> None:
        nonlocal steps
        steps += 1
        world.only.deletions.loop.wake()

    world.only.deletions.loop._step = step
    await world.only.deletions.loop.start()
    await asyncio.sleep(0.2)
    await world.only.deletions.loop.stop()
    assert steps == 1


async def test_chunks_are_deleted_at_the_set_rate() -> None:
    """A step, of which there is one per second, deletes no more chunks than the setting allows, and counts them."""
    world = World(MemoryStore(), deletes_per_second=100)
    await world.store.jobs.insert([change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True) for n in (1, 2)])
    await world.store.chunks.insert([chunk(id=f"{n}-{i}", job_id=n, index=i) for n in (1, 2) for i in range(75)])
    before = REGISTRY.get_sample_value("scanfleet_deleted_chunks_total") or 0.0
    await world.only.deletions.delete([1, 2], "request")
    await world.settle()
    left = []
    for _ in range(3):
        left.append(await chunks_of(world, 1) + await chunks_of(world, 2))
        await world.only.deletions.step()
        await world.settle()
    assert left == [150, 150, 50]
    assert REGISTRY.get_sample_value("scanfleet_deleted_chunks_total") == before + 150


async def test_large_deletions_of_one_user_do_not_delay_those_of_others() -> None:
    """While the chunks of 150 large jobs are deleted, the results of another job are deleted at once, and its chunks in turn."""
    world = World(MemoryStore(), deletes_per_second=10)
    large, small = range(1, 151), 151
    await world.store.jobs.insert([change(scan_job(n), JobTrigger.CANCEL, THEN, settled=True) for n in large])
    await world.store.chunks.insert([chunk(id=f"{n}-{i}", job_id=n, index=i) for n in large for i in range(30)])
    await world.only.deletions.delete(large, "request")
    for _ in range(2):
        world.now += 1.0
        await world.only.deletions.step()
        await world.settle()
    await world.store.jobs.insert([change(scan_job(small, user_id=8), JobTrigger.CANCEL, THEN, settled=True)])
    await world.only.deletions.delete([small], "request")
    for _ in range(2):
        world.now += 1.0
        await world.only.deletions.step()
        await world.settle()
    [receipt], _ = await world.store.deletions.page(8, list(Stage), 0, 9)
    assert receipt.stage is Stage.CHUNKS
    assert [await chunks_of(world, n) for n in large[:5]] == [20, 20, 20, 30, 30]


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
    world = World(store, replicas=2)
    await world.store.jobs.insert([change(scan_job(1), JobTrigger.CANCEL, THEN, settled=True)])
    reason = {"reason": "request"}
    before = REGISTRY.get_sample_value("scanfleet_deleted_jobs_total", reason) or 0.0
    await world.replicas[0].deletions.delete([1], "request")
    await world.settle()
    await asyncio.gather(*(replica.deletions.step() for replica in world.replicas))
    await world.settle()
    await asyncio.gather(*(replica.deletions.step() for replica in world.replicas))
    assert REGISTRY.get_sample_value("scanfleet_deleted_jobs_total", reason) == before + 1


async def test_chunks_stored_after_the_deletion_of_their_job_are_deleted(world: World) -> None:
    """A stalled replica that inserts a window late leaves no chunk: the dispatcher has the deletion continue."""
    await completed(world)
    await world.only.deletions.delete([1], "request")
    await world.wait(3)
    assert await chunks_of(world, 1) == 0
    await world.store.chunks.insert([chunk(id="1-5", index=5)])
    await world.wait(3)
    assert await chunks_of(world, 1) == 0


@pytest.mark.proves("F38", "G24")
async def test_job_of_a_backup_is_deleted_again(world: World) -> None:
    """When the topic is read again over a database that was set back, what was deleted since is deleted again."""
    await completed(world)
    (backup,) = (await world.store.jobs.get([1])).values()
    asked_at = world.time
    await world.only.deletions.delete([1], "request", requested_by=9)
    world.now += 100
    await world.only.deletions.step()
    records = world.take(SCAN_DELETIONS)
    world.store = MemoryStore()
    await world.restart()
    await world.store.jobs.insert([backup])
    await world.hand(SCAN_DELETIONS, records)
    assert await world.store.jobs.get([1]) == {}
    [again], _ = await world.store.deletions.page(7, list(Stage), 0, 9)
    assert (again.requested_by, again.requested_at) == (9, asked_at)
    entries, _ = await world.store.audit.page(0, 9, action="delete_task")
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
async def test_forged_deletion_deletes_no_job(world: World, change: dict[str, Any]) -> None:
    """result-store may write to the topic: a request without the orchestrator's signature, or another's, is dead-lettered."""
    await completed(world)
    of_job = 2 if "job_id" in change else 1
    genuine = request(Deletion(job_id=of_job, user_id=7, subnet_id=1, reason="request", requested_at=THEN), KEYS)
    forged = genuine.model_copy(update=change)
    with pytest.raises(MessageError, match="job 1 is not deleted"):
        await world.hand(SCAN_DELETIONS, [Record(forged, SCAN_DELETIONS.name, 0, 0, THEN)])
    await world.wait(2)
    assert (await world.store.jobs.get([1])).keys() == {1}
    assert await world.store.deletions.page(7, list(Stage), 0, 9) == ([], 0)
    assert (await world.store.audit.page(0, 9, action="delete_task"))[1] == 0


async def test_unsigned_request_of_an_older_replica_is_ignored(world: World) -> None:
    """During an upgrade replicas of release 0.2 publish requests without a signature, of jobs that no longer exist."""
    await completed(world)
    await world.only.deletions.delete([1], "request")
    await world.hand(SCAN_DELETIONS, [Record(DeleteResults(job_id=1), SCAN_DELETIONS.name, 0, 0, THEN)])
    await world.wait(3)
    assert await chunks_of(world, 1) == 0
