"""The SDK: retries, streams, and every operation of the API."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import calls
from scanfleet_cli.client import AsyncClient, Client, Patience, Watching
from scanfleet_cli.errors import ApiError, CommandError, UnavailableError
from scanfleet_cli_testing.api import TOKEN, FakeApi
from scanfleet_cli_testing.jobs import NOW, result

SOON = Patience(timeout_seconds=5, first_pause_seconds=0.001, poll_seconds=0.001)
RESET = httpx2.ReadError("connection reset")
BUSY = httpx2.Response(503, json={"error": "busy"}, headers={"Retry-After": "0"})
BODY = rest.SubnetBody(name="lab", cidr="127.9.8.0/24")
WITHOUT_KEY = replace(calls.create_subnet(BODY), repeatable=False)

Watch = Callable[[list[str]], list[rest.TaskStatus]]
WatchJobs = Callable[[list[int], list[str]], list[rest.TaskStatus]]


@pytest.fixture
def client(api: FakeApi) -> Client:
    return Client("http://scanfleet.test", TOKEN, patience=SOON, transport=api)


@pytest.fixture
def watch_jobs(api: FakeApi) -> WatchJobs:
    """Watches several jobs of user 7; the second argument gets its notices."""

    def read(job_ids: list[int], notices: list[str]) -> list[rest.TaskStatus]:
        async def read() -> list[rest.TaskStatus]:
            async with AsyncClient("http://scanfleet.test", TOKEN, patience=SOON, transport=api) as other:
                return [task async for task in other.watch_jobs(job_ids, notices.append, owner=7)]

        return asyncio.run(read())

    return read


@pytest.fixture(params=["sync", "async"])
def watch(api: FakeApi, client: Client, request: pytest.FixtureRequest) -> Watch:
    """Watches job 41 by either client; the argument gets its notices."""

    def by_thread(notices: list[str]) -> list[rest.TaskStatus]:
        return list(client.watch(41, notices.append))

    def by_loop(notices: list[str]) -> list[rest.TaskStatus]:
        async def read() -> list[rest.TaskStatus]:
            async with AsyncClient("http://scanfleet.test", TOKEN, patience=SOON, transport=api) as other:
                return [task async for task in other.watch(41, notices.append)]

        return asyncio.run(read())

    return by_thread if request.param == "sync" else by_loop


def make_job(client: Client) -> int:
    subnet, policy = (
        client.send(calls.create_subnet(BODY)),
        client.send(calls.create_policy(rest.PolicyBody(name="web"))),
    )
    return client.send(calls.create_tasks([subnet.id], policy.id)).jobs[0].id


@pytest.mark.parametrize(
    "fault", [RESET, BUSY, httpx2.ConnectError("refused"), httpx2.Response(429, json={"error": "slow"})]
)
def test_call_that_is_safe_to_repeat_is_repeated(api: FakeApi, client: Client, fault: Any) -> None:
    """A cut, a busy and an unreachable service, and a limit, are followed by the same request again."""
    api.faults = [fault, fault]
    assert client.send(calls.list_subnets()).total == 0
    assert len(api.requests) == 3


@pytest.mark.parametrize(("fault", "repeated"), [(RESET, False), (BUSY, False), (httpx2.ConnectError("refused"), True)])
def test_post_without_a_key_is_repeated_only_if_it_was_not_sent(
    api: FakeApi, client: Client, fault: Any, repeated: bool
) -> None:
    """A request that may have been executed is not sent again."""
    api.faults = [fault]
    if repeated:
        assert client.send(WITHOUT_KEY).name == "lab"
        return
    with pytest.raises((UnavailableError, ApiError)) as raised:
        client.send(WITHOUT_KEY)
    assert len(api.requests) == 1
    assert getattr(raised.value, "unsure", True)


def test_retries_end_with_the_time(api: FakeApi) -> None:
    """An unavailable service is asked until the time ends, and then the error names the address and the cause."""
    client = Client(
        "http://scanfleet.test", TOKEN, patience=Patience(timeout_seconds=2, first_pause_seconds=0.2), transport=api
    )
    api.fault_of = lambda _request: RESET
    with pytest.raises(UnavailableError, match=r"no response from http://scanfleet\.test: connection reset"):
        client.send(calls.list_subnets())
    assert 2 <= len(api.requests) <= 6


def test_request_that_http_does_not_allow_is_not_repeated_and_not_quoted() -> None:
    """The library's error quotes the header, which may contain a token."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(f"http://127.0.0.1:{server.getsockname()[1]}", "two\nlines", patience=SOON)
        began = time.monotonic()
        with pytest.raises(CommandError) as raised:
            client.send(calls.list_subnets())
    assert time.monotonic() - began < SOON.timeout_seconds / 2
    assert "lines" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("failures", [1, 1_026, 100_000])
def test_pause_after_many_failures_is_the_longest_one(failures: int) -> None:
    """The doubling of the pause has an end."""
    assert 0 < Patience().pause(failures) <= Patience().longest_pause_seconds


class Open(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that records whether it was closed."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b'{"error": "expired"}'

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"error": "expired"}'

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("asynchronous", [False, True])
def test_refused_stream_is_closed_if_the_token_source_raises(api: FakeApi, asynchronous: bool) -> None:
    """The connection of a 401 is released before the next token is requested."""
    body = Open()
    api.faults = [httpx2.Response(401, stream=body)]
    tokens = iter([TOKEN])

    def token() -> str:
        for each in tokens:
            return each
        raise CommandError("the token command failed")

    async def read() -> None:
        other = AsyncClient("http://scanfleet.test", token, transport=api)
        async with other.stream(calls.watch_tasks()):
            raise AssertionError("not refused")

    def read_by_thread() -> None:
        with Client("http://scanfleet.test", token, transport=api).stream(calls.watch_tasks()):
            raise AssertionError("not refused")

    with pytest.raises(CommandError, match="the token command failed"):
        asyncio.run(read()) if asynchronous else read_by_thread()
    assert body.closed


def test_watch_yields_each_state(client: Client, watch: Watch) -> None:
    """A watch yields every state and ends with the final one."""
    make_job(client)
    notices: list[str] = []
    assert [task.status.progress for task in watch(notices)] == [0, 62, 100]
    assert notices == []


def test_watch_with_a_cut_stream_reconnects(api: FakeApi, client: Client, watch: Watch) -> None:
    """A stream that breaks off is reported once, opened again from the last event, and reported back."""
    make_job(client)
    api.cut_after = 1
    notices: list[str] = []
    tasks = watch(notices)
    assert [task.status.status for task in tasks][-1] is JobStatus.COMPLETED
    assert [notice.split(" (")[0] for notice in notices] == ["connection lost", "reconnected"]
    streams = [each for each in api.requests if each.url.path.endswith("/events")]
    assert [each.headers.get("last-event-id") for each in streams] == [None, "1"]


def test_watch_with_failing_streams_polls(api: FakeApi, client: Client, watch: Watch) -> None:
    """After three consecutive failed streams the job is polled to its final state."""
    job = api.jobs[make_job(client)]

    def fault(request: httpx2.Request) -> Exception | None:
        if request.url.path.endswith("/events"):
            return RESET
        job.seq = min(job.seq + 1, len(job.states))
        return None

    api.fault_of = fault
    assert [task.status.progress for task in watch([])] == [62, 100]
    assert sum(each.url.path.endswith("/events") for each in api.requests) == 3


def test_watch_of_another_users_job_raises(api: FakeApi, watch: Watch) -> None:
    """An error that no retry can change is raised."""
    with pytest.raises(ApiError, match="Job not found"):
        watch([])
    assert len(api.requests) == 1


def final(tasks: list[rest.TaskStatus]) -> list[int]:
    return sorted(task.job.id for task in tasks if task.status.status.final)


def streams(api: FakeApi) -> list[str]:
    return [request.url.path for request in api.requests if request.url.path.endswith("/events")]


def test_several_jobs_are_watched_over_one_stream(api: FakeApi, client: Client, watch_jobs: WatchJobs) -> None:
    """Each state of each watched job is yielded once, whatever else the stream carries and whether a job had ended before."""
    for _ in range(4):
        make_job(client)
    api.jobs[42].seq = 3
    tasks = watch_jobs([41, 42, 43], [])
    assert final(tasks) == [41, 42, 43]
    assert {task.job.id for task in tasks} == {41, 42, 43}
    assert streams(api) == ["/api/v1/events"]
    (stream,) = [request for request in api.requests if request.url.path == "/api/v1/events"]
    assert stream.url.params["user_id"] == "7"


def test_job_that_ends_while_the_stream_is_cut_is_not_missed(
    api: FakeApi, client: Client, watch_jobs: WatchJobs
) -> None:
    """After a cut the jobs are read again, since the new stream begins with unfinished jobs only."""
    make_job(client), make_job(client)
    api.cut_after = 1
    opened = [0]

    def fault(request: httpx2.Request) -> None:
        if request.url.path == "/api/v1/events":
            opened[0] += 1
            if opened[0] == 2:
                api.jobs[41].seq = 3

    api.fault_of = fault
    notices: list[str] = []
    assert final(watch_jobs([41, 42], notices)) == [41, 42]
    assert [notice.split(" (")[0] for notice in notices] == ["connection lost", "reconnected"]


def test_state_that_is_older_than_the_last_one_is_skipped(api: FakeApi, client: Client) -> None:
    """An event that was sent before a state was read does not set the job back."""
    job = api.jobs[make_job(client)]
    watching = Watching([41], SOON)
    job.seq = 2
    newer = job.task.model_copy(update={"job": job.job.model_copy(update={"updated_at": NOW + timedelta(seconds=1)})})
    assert watching.polled(newer) == [newer]
    older = httpx2.ServerSentEvent(data=job.task.model_dump_json(), id="1")
    assert watching.received(older) == []
    assert watching.polled(newer) == [newer]


def test_watch_of_several_jobs_with_failing_streams_polls(api: FakeApi, client: Client, watch_jobs: WatchJobs) -> None:
    """After three failed streams in a row the jobs are read instead, to their ends."""
    make_job(client), make_job(client)
    reads = [0]

    def fault(request: httpx2.Request) -> Exception | None:
        if request.url.path == "/api/v1/events":
            return RESET
        reads[0] += 1
        if reads[0] > 4:
            for job in api.jobs.values():
                job.seq = min(job.seq + 1, len(job.states))
        return None

    api.fault_of = fault
    assert final(watch_jobs([41, 42], [])) == [41, 42]
    assert len(streams(api)) == 3


def test_several_jobs_are_read_once_at_the_start(api: FakeApi, client: Client, watch_jobs: WatchJobs) -> None:
    """The stream is opened before the first read, so that no end is missed."""
    make_job(client), make_job(client)
    api.requests.clear()
    assert final(watch_jobs([41, 42], [])) == [41, 42]
    assert [request.url.path.removeprefix("/api/v1/") for request in api.requests] == ["events", "task/41", "task/42"]


def test_watch_of_all_jobs_calls_back_whenever_the_stream_is_open(api: FakeApi, client: Client) -> None:
    """`opened` is called before the first state of each connection."""
    make_job(client)
    api.cut_after = 1
    seen: list[str] = []
    for task in client.watch_all(opened=lambda: seen.append("opened")):
        seen.append(task.status.status)
        if task.status.status.final:
            break
    assert seen == ["opened", "pending", "opened", "running", "completed"]


def test_watch_of_several_jobs_with_an_unknown_one_raises(client: Client, watch_jobs: WatchJobs) -> None:
    """An error that no retry can change is raised."""
    make_job(client)
    with pytest.raises(ApiError, match="Job not found"):
        watch_jobs([41, 42], [])


def test_results_that_are_cut_raise(api: FakeApi, client: Client) -> None:
    """A cut stream of results raises; it never ends as a short list."""
    job = api.jobs[make_job(client)]
    job.results = [result(1, "127.9.8.1", 22)]
    assert [each.port for each in client.results(41)] == [22]

    class Cut(httpx2.SyncByteStream):
        def __iter__(self) -> Any:
            yield json.dumps(job.results[0]).encode() + b"\n"
            raise httpx2.RemoteProtocolError("incomplete chunked read")

    api.answers["GET", "/api/v1/task/41/results"] = httpx2.Response(200, stream=Cut())
    with pytest.raises(UnavailableError, match="incomplete chunked read"):
        list(client.results(41))


def test_pages_are_followed_to_the_end(client: Client) -> None:
    """A list is read page by page."""
    for number in range(5):
        client.send(calls.create_subnet(rest.SubnetBody(name=f"lab{number}", cidr="127.9.8.0/24")))
    pages = list(client.pages(calls.list_subnets(), size=2))
    assert [len(page.subnets) for page in pages] == [2, 2, 1]


class CutBody(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that breaks off."""

    def __iter__(self) -> Iterator[bytes]:
        yield b'{"message": "Scan jobs cre'
        raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def carried_out_then_cut(api: FakeApi, method: str) -> Callable[[httpx2.Request], httpx2.Response | None]:
    """The first request of this method is carried out, and its answer breaks off in its body."""

    def fault(request: httpx2.Request) -> httpx2.Response | None:
        if request.method != method:
            return None
        api.fault_of = lambda _request: None
        return httpx2.Response(api.carry_out(request).status_code, stream=CutBody())

    return fault


@pytest.mark.parametrize("asynchronous", [False, True])
def test_post_of_jobs_with_a_cut_body_is_repeated_with_its_key(
    api: FakeApi, client: Client, asynchronous: bool
) -> None:
    """The retries cover the body of the answer, so that the Idempotency-Key does too."""
    make_job(client)
    api.fault_of = carried_out_then_cut(api, "POST")
    call = calls.create_tasks([5], 3)

    async def send() -> rest.JobsCreated:
        async with AsyncClient("http://scanfleet.test", TOKEN, patience=SOON, transport=api) as other:
            return await other.send(call)

    created = asyncio.run(send()) if asynchronous else client.send(call)
    assert [job.id for job in created.jobs] == [42]
    assert list(api.jobs) == [41, 42]


@pytest.mark.parametrize(
    "call", [calls.create_subnet(BODY), calls.create_policy(rest.PolicyBody(name="web"))], ids=["subnet", "policy"]
)
def test_post_of_a_resource_with_a_cut_body_creates_one(api: FakeApi, client: Client, call: calls.Call[Any]) -> None:
    """The request is repeated with its Idempotency-Key, and the first answer is the result."""
    api.fault_of = carried_out_then_cut(api, "POST")
    created = client.send(call)
    assert [*api.subnets, *api.policies] == [created.id]
    first, second = api.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_post_without_a_key_with_a_cut_body_is_not_repeated(api: FakeApi, client: Client) -> None:
    """A call that may have been executed is not repeated, and the error states this."""
    api.fault_of = carried_out_then_cut(api, "POST")
    with pytest.raises(UnavailableError) as raised:
        client.send(WITHOUT_KEY)
    assert (raised.value.unsure, raised.value.repeatable) == (True, False)
    assert len(api.subnets) == 1


def test_delete_repeated_after_a_cut_counts_a_404_as_done(api: FakeApi, client: Client) -> None:
    """When the repeated DELETE finds nothing, the attempt that was cut deleted the object."""
    client.send(calls.create_subnet(BODY))
    api.fault_of = carried_out_then_cut(api, "DELETE")
    assert "deleted" in client.send(calls.delete_subnet(5)).message
    with pytest.raises(ApiError, match="Subnet not found"):
        client.send(calls.delete_subnet(5))


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[]", "\xff"])
def test_answer_that_is_not_json_of_the_api_raises_api_error(api: FakeApi, client: Client, body: str) -> None:
    """Another server behind the address is reported as such."""
    api.fault_of = lambda _request: httpx2.Response(200, content=body.encode("latin-1"))
    for ask in (
        lambda: client.send(calls.read_task(41)),
        lambda: list(client.replies(calls.list_subnets())),
        lambda: list(client.results(41)),
        lambda: list(client.watch(41)),
    ):
        with pytest.raises(ApiError, match="the response"):
            ask()
