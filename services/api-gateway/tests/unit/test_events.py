"""A stream sends the current state and every later change, ends with the job, and never misses a final state."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any

import httpx2
import pytest
from prometheus_client import REGISTRY
from starlette.types import Message

from api_gateway.handlers.events import KEPT_JOBS, MAX_WAITING, Subscription, Subscriptions
from api_gateway_testing.gateway import Client, Gateway, Running
from api_gateway_testing.replies import job
from api_gateway_testing.services import Stream
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    JobCancelled,
    JobCompleted,
    JobCreated,
    JobEvent,
    JobFailed,
    JobProgressed,
    JobStarted,
    JobStatus,
)
from scanfleet.contracts.messages.topics import SCAN_EVENTS
from scanfleet.contracts.rest import Revoked, Snapshot
from scanfleet.security.auth import Principal
from scanfleet.services import ORCHESTRATOR
from scanfleet_testing.bus import MemoryBus

EVENTS = "/api/v1/task/41/events"
LATEST = "http://orchestrator/internal/jobs/41/latest"
FINAL = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)
THEN = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT_SECONDS = 10.0  # a missing event fails the test instead of blocking it

PENDING, RUNNING, COMPLETED = JobStatus.PENDING, JobStatus.RUNNING, JobStatus.COMPLETED
KINDS: dict[JobStatus, type[JobEvent]] = {
    PENDING: JobCreated,
    RUNNING: JobProgressed,
    COMPLETED: JobCompleted,
    JobStatus.FAILED: JobFailed,
    JobStatus.CANCELLED: JobCancelled,
}


def task(status: JobStatus, progress: int = 0, job_id: int = 41) -> dict[str, Any]:
    """Return the response to a GET of the task."""
    state = {"status": status, "progress": progress, "machines_found": progress, "error": ""}
    return {"job_id": str(job_id), "status": state, "job": SHOWN[status].model_dump(mode="json") | {"id": job_id}}


SHOWN = {status: job(41, status) for status in JobStatus}


def latest(seq: int, status: JobStatus, progress: int = 0, job_id: int = 41) -> httpx2.Response:
    """Return the orchestrator's response for the job."""
    return httpx2.Response(200, json={"seq": seq, "task": task(status, progress, job_id)})


def event(seq: int, status: JobStatus, progress: int = 0, *, job_id: int = 41) -> JobEvent:
    return (JobStarted if status is RUNNING and not progress else KINDS[status])(
        user_id=7,
        seq=seq,
        job=SHOWN[status].model_copy(update={"id": job_id}),
        progress=progress,
        machines_found=progress,
        error="",
    )


class Watcher:
    """A client that reads a stream."""

    def __init__(self, gateway: Running, job_id: int = 41) -> None:
        self.job_id = job_id
        self.client = Client(gateway, f"/api/v1/task/{job_id}/events")
        self.running = asyncio.create_task(self.client.run())

    async def status(self) -> int:
        """Return the status of the response."""
        async with asyncio.timeout(LIMIT_SECONDS):
            status: int = (await self.client.messages.get())["status"]
        return status

    async def next(self) -> tuple[int, str, int] | str:
        """Return number, status and progress of the next state; `heartbeat`; or `end`."""
        async with asyncio.timeout(LIMIT_SECONDS):
            message = await self.client.messages.get()
        if not message["more_body"]:
            return "end"
        lines = message["body"].decode().splitlines()
        if lines[0].startswith(":"):
            return "heartbeat"
        fields = dict(line.split(": ", 1) for line in lines if line)
        data = json.loads(fields["data"])
        assert data == task(JobStatus(fields["event"]), data["status"]["progress"], self.job_id)
        return int(fields["id"]), fields["event"], data["status"]["progress"]

    async def news(self) -> tuple[int, str, int] | str:
        """Return the next item that is not a heartbeat."""
        async with asyncio.timeout(LIMIT_SECONDS):
            while (item := await self.next()) == "heartbeat":
                pass
        return item

    async def rest(self) -> list[tuple[int, str, int] | str]:
        """Return all items up to the end, except heartbeats."""
        items = []
        async with asyncio.timeout(LIMIT_SECONDS):
            while (each := await self.next()) != "end":
                if each != "heartbeat":
                    items.append(each)
            await self.running
        return items


def streams() -> float | None:
    """Return the number of open streams."""
    return REGISTRY.get_sample_value("scanfleet_gateway_streams")


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    """No subscription remains after a stream, however it ended."""
    yield
    assert streams() == 0


@asynccontextmanager
async def streaming(**settings: Any) -> AsyncIterator[tuple[Running, MemoryBus]]:
    """A gateway, and the bus on which an orchestrator publishes job events."""
    async with Gateway().run(**settings) as gateway:
        yield gateway, MemoryBus(gateway.broker, source=ORCHESTRATOR)


@pytest.fixture
async def running() -> AsyncIterator[tuple[Running, MemoryBus]]:
    async with streaming() as both:
        yield both


@pytest.mark.parametrize("final", FINAL)
async def test_stream_sends_all_states_up_to_the_final_one(
    running: tuple[Running, MemoryBus], final: JobStatus
) -> None:
    """A stream sends the current job, then each change in the form of a GET, and ends after the final state."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(1, PENDING))
    watcher = Watcher(gateway)
    start = await asyncio.wait_for(watcher.client.messages.get(), LIMIT_SECONDS)
    headers = dict(start["headers"])
    assert (start["status"], headers[b"content-type"]) == (200, b"text/event-stream; charset=utf-8")
    assert headers[b"cache-control"] == b"no-store"
    assert await watcher.next() == (1, "pending", 0)
    await bus.publish(SCAN_EVENTS, [event(2, RUNNING)])
    assert await watcher.next() == (2, "running", 0)
    await bus.publish(SCAN_EVENTS, [event(3, RUNNING, 40)])
    assert await watcher.next() == (3, "running", 40)
    await bus.publish(SCAN_EVENTS, [event(4, final, 40)])
    assert await watcher.rest() == [(4, final, 40)]


@pytest.mark.proves("A29")
async def test_stream_of_a_hostile_error_is_printable_ascii(running: tuple[Running, MemoryBus]) -> None:
    """Control, C1 and bidirectional characters of an error are escaped in an event, and parsed unchanged."""
    gateway, _ = running
    hostile = "\x1b[31m\x7f\x9b31m\u202e\u2066\u2028\r\nevent: completed"
    failed = task(JobStatus.FAILED)
    failed["status"]["error"] = hostile
    gateway.services.on("GET", LATEST, httpx2.Response(200, json={"seq": 5, "task": failed}))
    client = Client(gateway, EVENTS)
    await asyncio.wait_for(client.run(), LIMIT_SECONDS)
    body = b"".join(client.messages.get_nowait().get("body", b"") for _ in range(client.messages.qsize()))
    assert re.fullmatch(rb"[\x20-\x7e\n]+", body), body
    (data,) = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    assert json.loads(data)["status"]["error"] == hostile


async def test_streams_send_only_their_own_job(running: tuple[Running, MemoryBus]) -> None:
    """Each of several streams sends the states of its own job only."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(1, PENDING))
    gateway.services.on("GET", LATEST.replace("41", "42"), latest(1, PENDING, job_id=42))
    watchers = [Watcher(gateway), Watcher(gateway), Watcher(gateway, 42)]
    for watcher in watchers:
        assert await watcher.status() == 200
        await watcher.next()
    await bus.publish(SCAN_EVENTS, [event(2, COMPLETED, 10, job_id=42), event(3, COMPLETED, 20)])
    assert [await watcher.rest() for watcher in watchers] == [
        [(3, "completed", 20)],
        [(3, "completed", 20)],
        [(2, "completed", 10)],
    ]


@pytest.mark.parametrize("final", FINAL)
async def test_stream_of_a_finished_job_ends_at_once(running: tuple[Running, MemoryBus], final: JobStatus) -> None:
    """The stream of a finished job sends its state and ends."""
    gateway, _ = running
    gateway.services.on("GET", LATEST, latest(5, final, 40))
    watcher = Watcher(gateway)
    assert await watcher.status() == 200
    assert await watcher.rest() == [(5, final, 40)]


async def test_events_during_the_query_are_sent_after_its_state(running: tuple[Running, MemoryBus]) -> None:
    """Events that arrive during the query are sent if they are newer than its response, and dropped otherwise."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(1, PENDING))
    other = Watcher(gateway)
    assert await other.status() == 200
    await other.next()
    answer = Stream(latest(3, RUNNING, 10).content)
    asked = asyncio.Event()

    def respond(_request: httpx2.Request) -> httpx2.Response:
        asked.set()
        return httpx2.Response(200, stream=answer)

    gateway.services.on("GET", LATEST, respond)
    watcher = Watcher(gateway)
    await asyncio.wait_for(asked.wait(), LIMIT_SECONDS)
    await bus.publish(SCAN_EVENTS, [event(1, PENDING)])
    for each in (event(2, RUNNING), event(3, RUNNING, 10), event(4, COMPLETED, 100)):
        await bus.publish(SCAN_EVENTS, [each])
        await other.next()  # so it was read
    answer.go.release()
    assert await watcher.status() == 200
    assert await watcher.rest() == [(3, "running", 10), (4, "completed", 100)]
    assert await other.rest() == []


async def test_old_and_duplicate_events_are_dropped(running: tuple[Running, MemoryBus]) -> None:
    """Of duplicate, late or reordered events only those newer than the last one are sent: no state goes backwards."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(5, RUNNING, 50))
    watcher = Watcher(gateway)
    assert await watcher.status() == 200
    assert await watcher.next() == (5, "running", 50)
    await bus.publish(SCAN_EVENTS, [event(1, PENDING), event(4, RUNNING, 40), event(5, RUNNING, 50)])
    await bus.publish(SCAN_EVENTS, [event(7, RUNNING, 70)])
    assert await watcher.next() == (7, "running", 70)
    await bus.publish(SCAN_EVENTS, [event(6, RUNNING, 60), event(7, RUNNING, 70), event(8, COMPLETED, 100)])
    assert await watcher.rest() == [(8, "completed", 100)]


@pytest.mark.proves("G11")
async def test_slow_client_gets_every_status_and_the_latest_progress(running: tuple[Running, MemoryBus]) -> None:
    """While a client reads nothing, newer progress replaces older; then it gets the latest one and every status."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(1, PENDING))
    watcher, other = Watcher(gateway), Watcher(gateway)
    for each in (watcher, other):
        assert await each.status() == 200
        assert await each.next() == (1, "pending", 0)
    watcher.client.takes.clear()
    await bus.publish(SCAN_EVENTS, [event(2, RUNNING)])
    await other.next()  # and the slow one's is on its way
    for progress in range(1, 100):
        await bus.publish(SCAN_EVENTS, [event(2 + progress, RUNNING, progress)])
        await other.next()
    await bus.publish(SCAN_EVENTS, [event(102, COMPLETED, 100)])
    assert await other.rest() == [(102, "completed", 100)]
    watcher.client.takes.set()
    assert await watcher.rest() == [(2, "running", 0), (101, "running", 99), (102, "completed", 100)]


async def test_client_that_reads_nothing_is_disconnected() -> None:
    """A stream whose client stalls for too long is closed."""
    async with streaming(stalled_seconds=0.02) as (gateway, bus):
        gateway.services.on("GET", LATEST, latest(1, PENDING))
        watcher = Watcher(gateway)
        assert await watcher.status() == 200
        await watcher.next()
        watcher.client.takes.clear()
        await bus.publish(SCAN_EVENTS, [event(2, RUNNING)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(watcher.running), LIMIT_SECONDS)
        assert watcher.running.done()


@pytest.mark.proves("A10", "G13")
@pytest.mark.parametrize("status", [403, 404, 503])
async def test_stream_refused_by_the_orchestrator_returns_its_error(
    running: tuple[Running, MemoryBus], status: int
) -> None:
    """The orchestrator's refusal is the response, and no event is sent."""
    gateway, _ = running
    headers = {"Retry-After": "1"} if status == 503 else {}
    gateway.services.on("GET", LATEST, httpx2.Response(status, json={"error": "not yours"}, headers=headers))
    answer = await gateway.client.get(EVENTS)
    assert (answer.status_code, answer.json()) == (status, {"error": "not yours"})
    assert ("Retry-After" in answer.headers) == (status == 503)
    (asked,) = gateway.services.requests
    assert await gateway.caller(asked) == Principal(7)


@pytest.mark.parametrize("content", [b"{}", b"no"])
async def test_stream_without_the_current_state_is_503(running: tuple[Running, MemoryBus], content: bytes) -> None:
    """While the orchestrator is unavailable, or its response is invalid, the response is 503 with Retry-After."""
    gateway, _ = running
    gateway.services.on("GET", LATEST, httpx2.Response(200, content=content))
    answers = [await gateway.client.get(EVENTS)]
    gateway.services.unavailable.add("orchestrator")
    answers.append(await gateway.client.get(EVENTS))
    assert [(answer.status_code, "Retry-After" in answer.headers) for answer in answers] == [(503, True)] * 2


async def unready(gateway: Running) -> None:
    """Make the broker unavailable, and wait until the gateway has noticed."""
    gateway.broker.unavailable = True
    async with asyncio.timeout(LIMIT_SECONDS):
        while gateway.app.state.gateway.events.ready:
            gateway.broker.notify()
            await asyncio.sleep(0.01)


async def test_stream_without_the_broker_is_503(running: tuple[Running, MemoryBus]) -> None:
    """While the broker is unavailable the response is 503 with Retry-After, and the orchestrator is not queried."""
    gateway, _ = running
    gateway.services.on("GET", LATEST, latest(1, PENDING))
    await unready(gateway)
    answer = await gateway.client.get(EVENTS)
    assert (answer.status_code, set(answer.json())) == (503, {"error"})
    assert int(answer.headers["Retry-After"]) >= 1
    assert not gateway.services.requests


@pytest.mark.proves("A28", "G14")
@pytest.mark.parametrize("loss", ["broker", "orchestrator", "token"])
async def test_stream_that_loses_a_dependency_or_its_token_ends(loss: str) -> None:
    """Without the broker or the orchestrator, or after a revocation of the token, a stream ends within a heartbeat."""
    async with streaming(heartbeat_seconds=0.02) as (gateway, _):
        gateway.services.on("GET", LATEST, latest(2, RUNNING))
        watcher = Watcher(gateway)
        assert await watcher.status() == 200
        assert await watcher.next() == (2, "running", 0)
        assert await watcher.next() == "heartbeat"
        if loss == "broker":
            await unready(gateway)
        elif loss == "orchestrator":
            gateway.services.unavailable.add("orchestrator")
        else:
            gateway.services.revoked.append(Revoked(jti=None, sub=None, user_id=7, issued_before=utc_now()))
            await gateway.app.state.verifier._revoked.refresh()
        assert await watcher.rest() == []


@pytest.mark.parametrize("path", ["task/41/events", "events"])
@pytest.mark.parametrize(
    ("status", "level", "cause"),
    [
        (404, "info", "the caller may no longer watch"),
        (503, "warning", "the state of the jobs is unknown"),
    ],
)
async def test_stream_ended_by_an_error_of_the_orchestrator_logs_refusal_or_outage(
    path: str, status: int, level: str, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A 503 is an outage of the orchestrator and not a refusal of the caller."""
    async with streaming(heartbeat_seconds=0.02) as (gateway, _):
        gateway.services.on("GET", LATEST, latest(2, RUNNING))
        gateway.services.on("GET", PAGE, page((1, 1, RUNNING)))
        client = Client(gateway, f"/api/v1/{path}")
        running = asyncio.create_task(client.run())
        async with asyncio.timeout(LIMIT_SECONDS):
            while b"event: running" not in (await client.messages.get()).get("body", b""):
                pass
        for url in (LATEST, PAGE):
            gateway.services.on("GET", url, httpx2.Response(status, json={"error": "no"}))
        await asyncio.wait_for(running, LIMIT_SECONDS)
    logs = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    ends = [(log["level"], log["cause"]) for log in logs if log["event"] == "stream_ended"]
    assert ends == [(level, cause)]


async def test_state_of_a_lost_event_is_sent_within_a_heartbeat() -> None:
    """A state whose event was lost is sent within a heartbeat, once; so no stream stays open after its job's end."""
    async with streaming(heartbeat_seconds=0.02) as (gateway, bus):
        gateway.services.on("GET", LATEST, latest(2, RUNNING))
        watcher = Watcher(gateway)
        assert await watcher.status() == 200
        assert await watcher.next() == (2, "running", 0)
        gateway.services.on("GET", LATEST, latest(4, RUNNING, 40))
        assert await watcher.news() == (4, "running", 40)
        await bus.publish(SCAN_EVENTS, [event(3, RUNNING, 30), event(4, RUNNING, 40)])
        gateway.services.on("GET", LATEST, latest(5, COMPLETED, 100))
        assert await watcher.rest() == [(5, "completed", 100)]


@pytest.mark.proves("G11")
async def test_streams_of_a_user_have_a_separate_limit() -> None:
    """A user's streams have a separate limit, which the error names, and do not count as requests."""
    async with streaming(streams_at_once_per_user=2, requests_at_once_per_user=1, requests_at_once=1) as (gateway, _):
        gateway.services.on("GET", LATEST, latest(1, PENDING))
        watchers = [Watcher(gateway), Watcher(gateway)]
        for watcher in watchers:
            assert await watcher.status() == 200
            await watcher.next()
        assert streams() == 2
        refused = await asyncio.wait_for(gateway.client.get(EVENTS), LIMIT_SECONDS)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"].startswith("2 of your event streams are in progress, which is the limit")
        assert (await gateway.client.get("/api/v1/task")).status_code == 404  # not 429
        watchers[0].client.leaves.set()
        await asyncio.wait_for(watchers[0].running, LIMIT_SECONDS)
        assert streams() == 1
        again = Watcher(gateway)
        assert await again.status() == 200
        for watcher in (watchers[1], again):
            watcher.client.leaves.set()
            await asyncio.wait_for(watcher.running, LIMIT_SECONDS)


async def test_streams_are_bounded_overall() -> None:
    """Above the limit of all streams the next one of any user is a 503 that names the limit; requests are still answered."""
    async with streaming(streams_at_once=1) as (gateway, _):
        gateway.services.on("GET", LATEST, latest(1, PENDING))
        watcher = Watcher(gateway)
        assert await watcher.status() == 200
        other = gateway.issuer.bearer(8)
        refused = await asyncio.wait_for(gateway.client.get(EVENTS, headers=other), LIMIT_SECONDS)
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        assert refused.json()["error"].startswith("1 event streams are in progress, which is the limit of this replica")
        assert (await gateway.client.get("/api/v1/task", headers=other)).status_code == 404
        watcher.client.leaves.set()
        await asyncio.wait_for(watcher.running, LIMIT_SECONDS)


# All jobs of a user

ALL = "/api/v1/events"
PAGE = "http://orchestrator/internal/jobs/latest"
_ID = re.compile(r"[0-9]{1,14}-[0-9]+-[0-9]+")


def page(
    *jobs: tuple[int, int, JobStatus], after: int | None = None, ended_after: str | None = None, time: datetime = THEN
) -> httpx2.Response:
    """Return the orchestrator's response for several jobs: id, number of the state and status of each."""
    snapshots = [{"seq": seq, "task": task(status, 0, job_id)} for job_id, seq, status in jobs]
    answer = {"snapshots": snapshots, "next": after, "next_ended": ended_after, "time": time.isoformat()}
    return httpx2.Response(200, json=answer)


class SlowClient(Client):
    """A client that reads one message for each `release` of `permits`."""

    def __init__(self, gateway: Running, path: str) -> None:
        super().__init__(gateway, path)
        self.permits = asyncio.Semaphore(0)

    async def _send(self, message: Message) -> None:
        await self.permits.acquire()
        await super()._send(message)


class JobsWatcher:
    """A client that reads the stream of all jobs."""

    def __init__(self, gateway: Running, query: str = "", seen: str = "", client: Client | None = None) -> None:
        self.client = client or Client(gateway, ALL)
        self.last_id = ""
        self.received = (
            datetime.fromtimestamp(int(seen.split("-", maxsplit=1)[0]) / 1_000, UTC) if _ID.fullmatch(seen) else THEN
        )
        """The time in the ids of events."""

        self.client.scope["query_string"] = query.encode()
        if seen:
            self.client.scope["headers"] = [*self.client.scope["headers"], (b"last-event-id", seen.encode())]
        self.running = asyncio.create_task(self.client.run())

    async def begin(self) -> None:
        async with asyncio.timeout(LIMIT_SECONDS):
            assert (await self.client.messages.get())["status"] == 200
            assert (await self.client.messages.get())["body"] == b"retry: 3000\n\n"

    async def next(self) -> tuple[int, int, str] | str:
        """Return job, number and status of the next state; `heartbeat`; or `end`."""
        async with asyncio.timeout(LIMIT_SECONDS):
            message = await self.client.messages.get()
        if not message["more_body"]:
            return "end"
        text = message["body"].decode()
        if text.startswith(":"):
            return "heartbeat"
        fields = dict(line.split(": ", 1) for line in text.splitlines() if line)
        data = json.loads(fields["data"])
        self.last_id = fields["id"]
        moment, job_id, seq = fields["id"].split("-")
        assert int(moment) == int(self.received.timestamp() * 1_000)
        assert data["job_id"] == job_id
        return int(job_id), int(seq), fields["event"]

    async def news(self) -> tuple[int, int, str] | str:
        """Return the next item that is not a heartbeat."""
        while (item := await self.next()) == "heartbeat":
            pass
        return item

    async def leave(self) -> None:
        self.client.leaves.set()
        await asyncio.wait_for(self.running, LIMIT_SECONDS)


def asked(gateway: Running) -> list[dict[str, str]]:
    """Return the query of each requested page."""
    return [dict(each.url.params) for each in gateway.services.requests if each.url.path == "/internal/jobs/latest"]


async def test_stream_of_all_jobs_sends_current_states_then_changes(running: tuple[Running, MemoryBus]) -> None:
    """The stream sends the caller's current jobs page by page, then every change, and does not end with a job."""
    gateway, bus = running
    first, second = page((1, 3, RUNNING), (2, 1, PENDING), after=2), page((5, 1, PENDING), ended_after="9-5")
    pages = iter([first, second, page((4, 7, COMPLETED))])
    gateway.services.on("GET", PAGE, lambda _request: next(pages))
    watcher = JobsWatcher(gateway)
    await watcher.begin()
    assert [await watcher.next() for _ in range(5)] == [
        (1, 3, "running"),
        (2, 1, "pending"),
        (5, 1, "pending"),
        (4, 7, "completed"),
        "heartbeat",
    ]
    assert asked(gateway) == [{}, {"after": "2"}, {"ended_after": "9-5"}]
    others = event(9, RUNNING, 10, job_id=3).model_copy(update={"user_id": 8})
    await bus.publish(SCAN_EVENTS, [event(3, RUNNING, job_id=1), others, event(4, COMPLETED, job_id=1)])
    await bus.publish(SCAN_EVENTS, [event(1, PENDING, job_id=7)])
    assert {await watcher.next() for _ in range(2)} == {(1, 4, "completed"), (7, 1, "pending")}
    await watcher.leave()


async def test_stream_of_all_jobs_resumes_after_the_last_event(running: tuple[Running, MemoryBus]) -> None:
    """A client that reconnects with an `id` gets the jobs that ended since, with a minute's overlap; malformed ids are ignored."""
    gateway, _ = running
    gateway.services.on("GET", PAGE, page((1, 4, COMPLETED)))
    seen = datetime(2026, 1, 1, tzinfo=UTC)
    for last, queries in (
        (f"{int(seen.timestamp() * 1_000)}-1-3", {"ended_since": "2025-12-31T23:59:00Z"}),
        ("3", {}),
        ("x-1-3", {}),
        ("9" * 400 + "-1-1", {}),
    ):
        gateway.services.requests.clear()
        watcher = JobsWatcher(gateway, seen=last)
        await watcher.begin()
        assert await watcher.next() == (1, 4, "completed")
        assert asked(gateway) == [queries]
        await watcher.leave()


@pytest.mark.parametrize("seen", ["", "1767139200000-9-9"])
async def test_stream_of_all_jobs_cut_during_its_first_look_resumes_from_the_same_time(
    running: tuple[Running, MemoryBus], seen: str
) -> None:
    """A job whose final state was not sent before the cut is requested again, whichever jobs were sent before it."""
    gateway, _ = running
    pages = iter([page((1, 9, RUNNING), after=1)])
    gateway.services.on("GET", PAGE, lambda _request: next(pages, httpx2.Response(503, json={"error": "unavailable"})))
    watcher = JobsWatcher(gateway, seen=seen)
    await watcher.begin()
    assert await watcher.next() == (1, 9, "running")
    assert await watcher.next() == "end"
    await watcher.running
    gateway.services.requests.clear()
    gateway.services.on("GET", PAGE, page((2, 4, COMPLETED)))
    again = JobsWatcher(gateway, seen=watcher.last_id)
    await again.begin()
    assert await again.next() == (2, 4, "completed")
    assert asked(gateway) == [{"ended_since": f"{watcher.received - timedelta(minutes=1):%FT%TZ}"}]
    await again.leave()


async def test_stream_of_all_jobs_after_a_complete_look_has_its_time_in_ids() -> None:
    """The time in an `id` is that of the last look whose states are all sent, so a later resumption repeats little."""
    async with streaming(heartbeat_seconds=0.02) as (gateway, _):
        later = THEN + timedelta(hours=1)
        pages = iter([page((1, 1, RUNNING)), page((1, 2, RUNNING), time=later)])
        gateway.services.on("GET", PAGE, lambda _request: next(pages, page((1, 3, COMPLETED), time=later)))
        watcher = JobsWatcher(gateway)
        await watcher.begin()
        assert [await watcher.news() for _ in range(2)] == [(1, 1, "running"), (1, 2, "running")]
        watcher.received = later
        assert await watcher.news() == (1, 3, "completed")
        await watcher.leave()


async def test_stream_of_all_jobs_sends_the_state_of_a_lost_event() -> None:
    """At each heartbeat the gateway queries the changes since the last one, and sends missed states once."""
    async with streaming(heartbeat_seconds=0.02) as (gateway, _):
        gateway.services.on("GET", PAGE, page((1, 1, RUNNING)))
        watcher = JobsWatcher(gateway)
        await watcher.begin()
        assert await watcher.next() == (1, 1, "running")
        gateway.services.on("GET", PAGE, page((1, 2, COMPLETED)))
        assert await watcher.news() == (1, 2, "completed")
        assert await watcher.next() == "heartbeat"
        assert await watcher.next() == "heartbeat"
        since = f"{THEN - timedelta(minutes=1):%FT%TZ}"
        assert asked(gateway)[1] == {"changed_since": since, "ended_since": since}
        gateway.services.unavailable.add("orchestrator")
        assert await watcher.news() == "end"
        await watcher.running


@pytest.mark.proves("A28", "G14")
async def test_stream_of_a_slow_client_ends_once_its_token_is_revoked() -> None:
    """A client that reads each state later than a heartbeat gets no further page of states after the token is revoked."""
    async with streaming(heartbeat_seconds=1e-6) as (gateway, _):
        gateway.services.on("GET", PAGE, page(*((job_id, 1, RUNNING) for job_id in range(1, 11))))
        client = SlowClient(gateway, ALL)
        watcher = JobsWatcher(gateway, client=client)
        for _ in range(3):
            client.permits.release()
        await watcher.begin()
        assert await watcher.next() == (1, 1, "running")
        gateway.services.revoked.append(Revoked(jti=None, sub=None, user_id=7, issued_before=utc_now()))
        await gateway.app.state.verifier._revoked.refresh()
        for _ in range(20):
            client.permits.release()
        assert await watcher.next() == (2, 1, "running")  # it was being sent when the token was revoked
        assert await watcher.next() == "end"
        await watcher.running


@pytest.mark.proves("A24", "G13")
async def test_stream_of_other_users_jobs_is_for_administrators(running: tuple[Running, MemoryBus]) -> None:
    """The orchestrator decides about `user_id`, and its refusal is the response; a malformed one is a 400."""
    gateway, bus = running
    gateway.services.on("GET", PAGE, page())
    for whose, events in (("8", [(3, 1, "pending")]), ("all", [(3, 1, "pending"), (4, 1, "pending")])):
        watcher = JobsWatcher(gateway, f"user_id={whose}")
        await watcher.begin()
        assert await watcher.next() == "heartbeat"
        others = event(1, PENDING, job_id=3).model_copy(update={"user_id": 8})
        await bus.publish(SCAN_EVENTS, [others, event(1, PENDING, job_id=4)])
        assert sorted([await watcher.next() for _ in events]) == events
        await watcher.leave()
    assert asked(gateway) == [{"user_id": "8"}, {"user_id": "all"}]
    gateway.services.on("GET", PAGE, httpx2.Response(403, json={"error": "for administrators"}))
    refused = await gateway.client.get(f"{ALL}?user_id=8")
    assert (refused.status_code, refused.json()) == (403, {"error": "for administrators"})
    for junk in ("0", "x", "ALL", "", "7,8"):
        assert (await gateway.client.get(f"{ALL}?user_id={junk}")).status_code == 400


def test_events_are_wanted_only_while_there_is_a_watch() -> None:
    """Events are decoded from the first subscription of any job to the end of the last one."""
    subscriptions = Subscriptions()
    assert not subscriptions.wants("41")
    with subscriptions.open(("user", 7)):
        with subscriptions.open(("job", 42)):
            assert subscriptions.wants("41")
        assert subscriptions.wants("41")
    assert not subscriptions.wants("41")


@pytest.mark.proves("G11")
def test_watch_with_too_many_waiting_states_ends() -> None:
    """The subscription of a client that reads nothing ends at a maximum number of states; the client reconnects."""
    subscription = Subscription()
    for job_id in range(1, MAX_WAITING + 1):
        subscription.add(snapshot(job_id))
    assert not subscription.ended
    subscription.add(snapshot(MAX_WAITING + 1))
    assert (subscription.ended, subscription.take()) == (True, None)


@pytest.mark.proves("G20", "A22")
def test_streams_of_a_user_use_bounded_memory_for_any_number_of_jobs() -> None:
    """A stream takes at most half a megabyte for 30,000 jobs, so 64 take 32 MB, and sends no recent state twice."""
    subscriptions = [Subscription() for _ in range(8)]
    base = snapshot(1)
    tracemalloc.start()
    try:
        for job_id in range(1, 30_001):
            task = base.task.model_copy(update={"job": base.task.job.model_copy(update={"id": job_id})})
            changed = Snapshot.model_construct(seq=1, task=task)
            for subscription in subscriptions:
                subscription.add(changed)
                assert subscription.take() is not None
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 500_000 * len(subscriptions)
    for job_id in range(30_001 - KEPT_JOBS, 30_001):
        subscriptions[0].add(snapshot(job_id))
    assert subscriptions[0].take() is None


@pytest.mark.proves("G20", "A22")
def test_streams_of_a_user_use_bounded_memory_for_unread_states() -> None:
    """All streams that a user may open take at most 64 MB together for states that their clients do not read."""
    subscriptions = [Subscription() for _ in range(64)]
    tracemalloc.start()
    try:
        for job_id in range(1, MAX_WAITING + 1):
            shared = snapshot(job_id)
            for subscription in subscriptions:
                subscription.add(shared)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 64_000_000
    assert not any(subscription.ended for subscription in subscriptions)


def test_take_waiting_with_states_that_arrive_meanwhile_leaves_those() -> None:
    """A query's states are sent completely before states that arrive meanwhile, however many those are."""
    subscription = Subscription()
    for job_id in (1, 2):
        subscription.add(snapshot(job_id))
    taken = []
    for each in subscription.take_waiting():
        taken.append(each.task.job.id)
        subscription.add(snapshot(each.task.job.id + 10))
    assert taken == [1, 2]
    assert [each.task.job.id for each in subscription.take_waiting()] == [11, 12]


def snapshot(job_id: int) -> Snapshot:
    return Snapshot.model_validate({"seq": 1, "task": task(PENDING, 0, job_id)})


@pytest.mark.parametrize("final", FINAL)
async def test_client_that_received_the_final_state_gets_204(
    running: tuple[Running, MemoryBus], final: JobStatus
) -> None:
    """A client that reconnects with the `id` of a final state gets a 204, which ends an EventSource; others get the state."""
    gateway, _ = running
    gateway.services.on("GET", LATEST, latest(5, final, 40))
    for seen in ("5", "6", "0005"):
        answer = await gateway.client.get(EVENTS, headers={"Last-Event-ID": seen})
        assert (answer.status_code, answer.content) == (204, b"")
    for seen in ("4", "", "x", "-5", "5.0", "9" * 5_000, "\u0665".encode().decode("latin-1")):
        answer = await gateway.client.get(EVENTS, headers=[(b"Last-Event-ID", seen.encode("latin-1"))])
        assert answer.status_code == 200
        assert f"event: {final}" in answer.text


async def test_client_that_reconnects_to_a_running_job_gets_its_state(running: tuple[Running, MemoryBus]) -> None:
    """A stream of a running job begins with its state, whatever the client has received, and has the reconnection delay."""
    gateway, bus = running
    gateway.services.on("GET", LATEST, latest(3, RUNNING))
    client = Client(gateway, EVENTS)
    client.scope["headers"] = [*client.scope["headers"], (b"last-event-id", b"3")]
    task_ = asyncio.create_task(client.run())
    async with asyncio.timeout(LIMIT_SECONDS):
        assert (await client.messages.get())["status"] == 200
        first = (await client.messages.get())["body"].decode()
        await bus.publish(SCAN_EVENTS, [event(4, COMPLETED, 100)])
        await task_
    assert "id: 3\n" in first
    assert "retry: 3000\n" in first


async def test_streams_end_on_sigterm() -> None:
    """On SIGTERM the previous handler is called too, open streams end as complete responses, and no new one begins."""
    signals = []

    def server(number: int, _frame: FrameType | None) -> None:
        signals.append(number)

    before = signal.signal(signal.SIGTERM, server)
    try:
        async with streaming() as (gateway, _):
            gateway.services.on("GET", LATEST, latest(1, PENDING))
            watcher = Watcher(gateway)
            assert await watcher.status() == 200
            await watcher.next()
            signal.raise_signal(signal.SIGTERM)
            assert await watcher.rest() == []
            answer = await asyncio.wait_for(gateway.client.get(EVENTS), LIMIT_SECONDS)
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is server
    finally:
        signal.signal(signal.SIGTERM, before)
