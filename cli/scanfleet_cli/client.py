"""The SDK: synchronous and asynchronous clients that send the calls of `scanfleet_cli.calls`; docs/cli.md has an example."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from scanfleet import VERSION
from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import Job
from scanfleet_cli import calls
from scanfleet_cli.calls import Call, ListCall
from scanfleet_cli.errors import ApiError, CommandError, ScanfleetError, UnavailableError

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
Token = str | Callable[[], str] | None
"""A bearer token, or a function that returns the current one; None for calls without authentication."""

HEARTBEAT_TIMEOUT_SECONDS: Final = 45.0  # of a stream: three heartbeats of the service
MAX_STREAM_FAILURES: Final = 3  # consecutive failures after which jobs are polled

_TIMEOUTS: Final = httpx2.Timeout(30.0, connect=5.0)
_STREAM_TIMEOUTS: Final = httpx2.Timeout(30.0, connect=5.0, read=HEARTBEAT_TIMEOUT_SECONDS)
_BUSY: Final = frozenset({502, 503, 504})
_UNSENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, UnavailableError)
_MAX_DOUBLINGS: Final = 30
_MAX_ERROR_CHARS: Final = 300  # of an error from another server, for example a proxy


@dataclass(frozen=True, slots=True)
class Patience:
    """Retry policy while the service is unavailable or busy."""

    timeout_seconds: float = 60.0
    """Time limit of the retries of a call that is safe to repeat."""

    first_pause_seconds: float = 0.5
    """Pause before the first retry; it doubles up to `longest_pause_seconds`."""

    longest_pause_seconds: float = 5.0
    poll_seconds: float = 5.0
    """Polling interval of a job whose streams fail."""

    def pause(self, failures: int) -> float:
        """Return the pause before the next attempt after this number of consecutive failures."""
        if not failures:
            return 0.0
        doublings = min(failures - 1, _MAX_DOUBLINGS)  # a float overflows at 1,024
        longest: float = min(self.first_pause_seconds * 2**doublings, self.longest_pause_seconds)
        return longest * random.uniform(0.75, 1.0)  # noqa: S311 # spreads the load of clients; not for security


PATIENT: Final = Patience()


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ApiError: it is not JSON.
        """
        return parse_json(self.content)

    def read(self, call: Call[T]) -> T:
        """Return the body as the model of the response to `call`.

        Raises:
            ApiError: it does not match the model.
        """
        try:
            return call.read(self.content)
        except ValidationError as error:
            raise _unreadable(f"does not match the API of this release ({error.error_count()} errors)") from error

    @property
    def etag(self) -> str:
        return self.headers.get("etag", "")


Outcome = httpx2.Response | httpx2.RequestError | UnavailableError
"""Of one attempt: a response, a failed connection, or no token because the issuer is unavailable."""

Notice = Callable[[str], None]
"""Receives messages: the connection of a watch is lost, or restored; a call is repeated."""


def _ignore(_text: str) -> None: ...


def _nothing() -> None: ...


class Client:
    """A client of the gateway at `url`; safe to use from several threads.

    Args:
        url: of the gateway.
        token: of the caller.
        refused: called with a token that the service rejected with 401; the call is repeated once if `token` then returns another.
        patience: retry policy while the service is unavailable or busy.
        notice: receives a message when a call has failed for the first time and is repeated.
        transport: HTTP transport; the network by default.
    """

    def __init__(
        self,
        url: str,
        token: Token = None,
        *,
        refused: Callable[[str], None] = _ignore,
        patience: Patience = PATIENT,
        notice: Notice = _ignore,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url
        self._token = token
        self._refused = refused
        self._patience = patience
        self._notice = notice
        self._http = httpx2.Client(base_url=url, headers=_headers(), timeout=_TIMEOUTS, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a call and return the model of its response.

        Raises:
            ApiError: the service returned an error.
            UnavailableError: there was no response in time, or no token because the issuer is unavailable.
            CommandError: the request is not valid, or there is no valid token.
        """
        return self.ask(call).read(call)

    def ask(self, call: Call[Any], timeout: float | None = None) -> Reply:
        """Send a call and return its raw response; the retries cover the body."""
        with self._answered(call, timeout, whole=True) as response:
            return Reply(response.status_code, response.headers, response.content)

    def pages(self, call: ListCall[T], size: int = calls.PAGE_SIZE) -> Iterator[T]:
        """Yield each page of a list."""
        for reply in self.replies(call, size):
            yield reply.read(call)

    def replies(self, call: ListCall[Any], size: int = calls.PAGE_SIZE) -> Iterator[Reply]:
        """Yield each page of a list as a raw response."""
        number, more = 1, True
        while more:
            reply = self.ask(call.page(number, size))
            yield reply
            more = number * size < page_of(reply)["total"]
            number += 1

    def stream(self, call: Call[Any], timeout: float | None = None) -> AbstractContextManager[httpx2.Response]:
        """Send a call whose body the caller streams; the retries cover the response up to its headers.

        Args:
            call: to send.
            timeout: time limit of retries in seconds; by default that of the client.

        Raises:
            ApiError: the service returned an error.
            UnavailableError: as for `send`, or the body was cut.
            CommandError: as for `send`.
        """
        return self._answered(call, timeout, whole=False)

    @contextmanager
    def _answered(self, call: Call[Any], timeout: float | None, *, whole: bool) -> Iterator[httpx2.Response]:
        """Open the response to a call; if `whole`, with its body, which the retries then cover too."""
        retries = _Retries(self.url, call, self._patience, timeout, self._notice)
        while True:
            outcome = self._once(call, whole=whole)
            if (pause := retries.pause(outcome)) is None:
                break
            if isinstance(outcome, httpx2.Response):
                outcome.close()
            time.sleep(pause)
        response = retries.settled(outcome)
        try:
            yield response
        except httpx2.RequestError as error:
            raise retries.no_answer(error) from error
        finally:
            response.close()

    def events(self, call: Call[Any]) -> Iterator[httpx2.ServerSentEvent]:
        """Yield the events of one connection to a stream.

        Raises:
            ApiError: the service returned an error.
            UnavailableError: the connection failed or was cut.
        """
        with self.stream(call, timeout=0) as response:
            if response.status_code != httpx2.codes.NO_CONTENT:
                yield from httpx2.EventSource(response)

    def watch(self, job_id: int, notice: Notice = _ignore) -> Iterator[rest.TaskStatus]:
        """Yield each state of a job up to its final one; reconnect after a cut, and poll if streams keep failing.

        Raises:
            ApiError: the caller may not watch it.
        """
        watching = Watching({job_id}, self._patience, notice)
        while not watching.over:
            time.sleep(watching.pause)
            try:
                if watching.polling:
                    yield from watching.polled(self.ask(call := calls.read_task(job_id), timeout=0).read(call))
                else:
                    for event in self.events(calls.watch_task(job_id, watching.last_event_id)):
                        yield from watching.received(event)
                    watching.ended()
            except (ApiError, UnavailableError) as error:
                watching.failed(error)

    def watch_all(
        self,
        user_id: int | str | None = None,
        notice: Notice = _ignore,
        opened: Callable[[], None] = _nothing,
    ) -> Iterator[rest.TaskStatus]:
        """Yield the caller's unfinished jobs (administrators: those of a user or "all"), then each state of any job, without end.

        Args:
            user_id: of the owner of the jobs.
            notice: as for `watch`.
            opened: called whenever the stream is open, before its first state. What it reads misses no state: a job that ends
                afterwards is in the stream.

        Raises:
            ApiError: the caller may not watch them.
        """
        watching = Watching(None, self._patience, notice)
        while True:
            time.sleep(watching.pause)
            try:
                with self.stream(calls.watch_tasks(user_id, watching.last_event_id), timeout=0) as response:
                    opened()
                    for event in httpx2.EventSource(response):
                        yield from watching.received(event)
                watching.ended()
            except (ApiError, UnavailableError) as error:
                watching.failed(error)

    def results(self, job_id: int) -> Iterator[rest.Result]:
        """Stream the results of a job; a cut raises instead of ending a partial list.

        Raises:
            ApiError: the caller may not read them.
            UnavailableError: the connection was cut; the results so far are incomplete.
        """
        with self.stream(calls.read_results(job_id)) as response:
            for line in response.iter_lines():
                if not line.isspace():  # sent while a long search finds nothing
                    yield _parse(rest.Result, line)

    def _once(self, call: Call[Any], *, whole: bool) -> Outcome:
        try:
            token = self._current_token()
            response = self._http.send(_request(self._http, call, token), stream=True)
            if token and response.status_code == httpx2.codes.UNAUTHORIZED:
                response.read()  # releases the connection, also if the source of the token fails
                self._refused(token)
                if (renewed := self._current_token()) != token:
                    response = self._http.send(_request(self._http, call, renewed), stream=True)
            if whole or not response.is_success:
                response.read()
        except (httpx2.RequestError, UnavailableError) as error:
            return error
        return response

    def _current_token(self) -> str | None:
        return self._token() if callable(self._token) else self._token


class AsyncClient:
    """`Client` for asyncio; instead of `watch_all` it has `watch_jobs`."""

    def __init__(
        self,
        url: str,
        token: Token = None,
        *,
        refused: Callable[[str], None] = _ignore,
        patience: Patience = PATIENT,
        notice: Notice = _ignore,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url
        self._token = token
        self._refused = refused
        self._patience = patience
        self._notice = notice
        self._http = httpx2.AsyncClient(base_url=url, headers=_headers(), timeout=_TIMEOUTS, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """As `Client.send`."""
        return (await self.ask(call)).read(call)

    async def ask(self, call: Call[Any], timeout: float | None = None) -> Reply:  # noqa: ASYNC109 # of retries, not a scope
        """As `Client.ask`."""
        async with self._answered(call, timeout, whole=True) as response:
            return Reply(response.status_code, response.headers, response.content)

    async def pages(self, call: ListCall[T], size: int = calls.PAGE_SIZE) -> AsyncIterator[T]:
        """As `Client.pages`."""
        number, more = 1, True
        while more:
            reply = await self.ask(call.page(number, size))
            yield reply.read(call)
            more = number * size < page_of(reply)["total"]
            number += 1

    def stream(self, call: Call[Any], timeout: float | None = None) -> AbstractAsyncContextManager[httpx2.Response]:
        """As `Client.stream`."""
        return self._answered(call, timeout, whole=False)

    @asynccontextmanager
    async def _answered(
        self,
        call: Call[Any],
        timeout: float | None,  # noqa: ASYNC109 # as above
        *,
        whole: bool,
    ) -> AsyncIterator[httpx2.Response]:
        retries = _Retries(self.url, call, self._patience, timeout, self._notice)
        while True:
            outcome = await self._once(call, whole=whole)
            if (pause := retries.pause(outcome)) is None:
                break
            if isinstance(outcome, httpx2.Response):
                await outcome.aclose()
            await asyncio.sleep(pause)
        response = retries.settled(outcome)
        try:
            yield response
        except httpx2.RequestError as error:
            raise retries.no_answer(error) from error
        finally:
            await response.aclose()

    async def events(self, call: Call[Any]) -> AsyncIterator[httpx2.ServerSentEvent]:
        """As `Client.events`."""
        async with self.stream(call, timeout=0) as response:
            if response.status_code != httpx2.codes.NO_CONTENT:
                async for event in httpx2.EventSource(response):
                    yield event

    async def watch(self, job_id: int, notice: Notice = _ignore) -> AsyncIterator[rest.TaskStatus]:
        """As `Client.watch`."""
        watching = Watching({job_id}, self._patience, notice)
        while not watching.over:
            await asyncio.sleep(watching.pause)
            try:
                if watching.polling:
                    reply = await self.ask(call := calls.read_task(job_id), timeout=0)
                    for task in watching.polled(reply.read(call)):
                        yield task
                else:
                    async for event in self.events(calls.watch_task(job_id, watching.last_event_id)):
                        for task in watching.received(event):
                            yield task
                    watching.ended()
            except (ApiError, UnavailableError) as error:
                watching.failed(error)

    async def watch_jobs(
        self, job_ids: Collection[int], notice: Notice = _ignore, owner: int | str | None = None
    ) -> AsyncIterator[rest.TaskStatus]:
        """Yield each state of several jobs until all are final, over one stream; otherwise as `watch`.

        Args:
            job_ids: of the jobs.
            notice: as for `Client.watch`.
            owner: user id of the owner of the jobs, or "all" for administrators; by default all that the caller may watch.

        Raises:
            ApiError: the caller may not watch one of them.
        """
        watching = Watching(job_ids, self._patience, notice)
        while not watching.over:
            await asyncio.sleep(watching.pause)
            try:
                async with AsyncExitStack() as opened:
                    stream = None
                    if not watching.polling:
                        owner = await self._widest() if owner is None else owner
                        stream = await opened.enter_async_context(self.stream(calls.watch_tasks(owner), timeout=0))
                    for job_id in watching.open_jobs:  # the stream starts with unfinished jobs only
                        reply = await self.ask(call := calls.read_task(job_id))
                        for task in watching.polled(reply.read(call)):
                            yield task
                    if stream is not None and not watching.over:
                        async for event in httpx2.EventSource(stream):
                            for task in watching.received(event):
                                yield task
                            if watching.over:  # the stream itself does not end
                                return
                        watching.ended()
            except (ApiError, UnavailableError) as error:
                watching.failed(error)

    async def _widest(self) -> int | str | None:
        """Return the owner of all jobs that the caller may watch: the caller, or "all" for administrators; None if unknown."""
        try:
            me = (await self.ask(call := calls.read_me(), timeout=0)).read(call)
        except ApiError as error:
            if error.status != httpx2.codes.NOT_FOUND:  # of an older service
                raise
            return None
        return queries.ALL_USERS if me.admin else me.user_id

    async def results(self, job_id: int) -> AsyncIterator[rest.Result]:
        """As `Client.results`."""
        async with self.stream(calls.read_results(job_id)) as response:
            async for line in response.aiter_lines():
                if not line.isspace():
                    yield _parse(rest.Result, line)

    async def _once(self, call: Call[Any], *, whole: bool) -> Outcome:
        try:
            token = await self._current_token()
            response = await self._http.send(_request(self._http, call, token), stream=True)
            if token and response.status_code == httpx2.codes.UNAUTHORIZED:
                await response.aread()  # as in `Client`
                await asyncio.to_thread(self._refused, token)
                if (renewed := await self._current_token()) != token:
                    response = await self._http.send(_request(self._http, call, renewed), stream=True)
            if whole or not response.is_success:
                await response.aread()
        except (httpx2.RequestError, UnavailableError) as error:
            return error
        return response

    async def _current_token(self) -> str | None:
        return await asyncio.to_thread(self._token) if callable(self._token) else self._token


class Watching:
    """State of a watch of jobs: it reconnects after a pause, and polls after three consecutive failures.

    Args:
        job_ids: of the jobs; None for all, without end.
        patience: of the client.
        notice: receives one message when the connection is lost, and one when it is restored.
    """

    def __init__(self, job_ids: Collection[int] | None, patience: Patience, notice: Notice = _ignore) -> None:
        self.last_event_id = ""
        self._endless = job_ids is None
        self._open = set(job_ids or ())
        self._jobs: dict[int, Job] = {}
        self._patience = patience
        self._notice = notice
        self._failures = 0
        self._lost = False
        self._unreachable = False

    @property
    def over(self) -> bool:
        """Whether every job has reached its final state."""
        return not self._open and not self._endless

    @property
    def open_jobs(self) -> list[int]:
        """The jobs without a final state yet."""
        return sorted(self._open)

    @property
    def polling(self) -> bool:
        """Whether the jobs are polled because streams keep failing."""
        return self._failures >= MAX_STREAM_FAILURES

    @property
    def pause(self) -> float:
        """Seconds before the next attempt."""
        return self._patience.poll_seconds if self.polling else self._patience.pause(self._failures)

    def received(self, event: httpx2.ServerSentEvent) -> list[rest.TaskStatus]:
        """Return the state of an event of the stream, unless it is outdated or of another job."""
        if not event.data:  # only a `retry` field
            return []
        task = _parse(rest.TaskStatus, event.data)
        self._failures = 0
        self.last_event_id = event.id
        return self._new(task)

    def polled(self, task: rest.TaskStatus) -> list[rest.TaskStatus]:
        """Return the state that was read, unless it is outdated."""
        if self._unreachable:  # the service was down, not only the stream: try a stream again
            self._failures = 0
        return self._new(task)

    def ended(self) -> None:
        """Handle the end of a stream without an error."""
        if not self.over:
            self.failed(UnavailableError("the stream ended before the job"))

    def failed(self, error: ApiError | UnavailableError) -> None:
        """Handle a failed attempt.

        Raises:
            ApiError: no later attempt can succeed.
        """
        if isinstance(error, ApiError) and error.status not in _BUSY | {429}:
            raise error
        self._failures += 1
        self._unreachable = isinstance(error, UnavailableError) and not error.reached
        if not self._lost:
            self._lost = True
            self._notice(f"connection lost ({error}); reconnecting")

    def _new(self, task: rest.TaskStatus) -> list[rest.TaskStatus]:
        if self._lost:
            self._lost = False
            self._notice("reconnected")
        job = task.job
        if self._endless:
            return [task]
        known = self._jobs.get(job.id)
        if job.id not in self._open or (known is not None and job.updated_at < known.updated_at):
            return []  # of another job, or older than the last state
        self._jobs[job.id] = job
        if job.status.final:
            self._open.discard(job.id)
        return [task]


class _Retries:
    """Retries of one call: as long as it is safe to repeat, for up to `timeout` seconds (by default that of the client)."""

    def __init__(self, url: str, call: Call[Any], patience: Patience, timeout: float | None, notice: Notice) -> None:
        self._url = url
        self._call = call
        self._patience = patience
        self._limit = patience.timeout_seconds if timeout is None else timeout
        self._until = time.monotonic() + self._limit
        self._notice = notice
        self._failures = 0
        self._reached = False
        self._unsure = False

    def pause(self, outcome: Outcome) -> float | None:
        """Return the seconds until the next attempt; None if `outcome` is final."""
        if isinstance(outcome, httpx2.LocalProtocolError):
            return None
        if isinstance(outcome, httpx2.Response):
            self._reached = True
            refused = outcome.status_code == httpx2.codes.TOO_MANY_REQUESTS  # rejected before any effect
            busy = outcome.status_code in _BUSY
            self._unsure |= busy
            again = refused or (busy and self._call.repeatable)
            asked = _seconds(outcome.headers.get("retry-after", ""))
        else:
            unsent = isinstance(outcome, _UNSENT)
            self._reached |= not unsent
            self._unsure |= not unsent
            again = unsent or self._call.repeatable
            asked = 0.0
        self._failures += 1
        pause = max(asked, self._patience.pause(self._failures))
        if not again or time.monotonic() + pause >= self._until:
            return None
        if self._failures == 1:
            try:
                self.settled(outcome)
            except ScanfleetError as error:
                self._notice(f"{error}; repeating the request for up to {self._limit:g} s")
        return pause

    def settled(self, outcome: Outcome) -> httpx2.Response:
        """Return the final `outcome` as a successful response.

        Raises:
            ApiError: the service returned an error.
            UnavailableError: there was no response, or no token to send.
            CommandError: the request is not valid, so it was not sent.
        """
        if isinstance(outcome, httpx2.LocalProtocolError):  # its text quotes the header, which may contain the token
            raise CommandError("the request is not valid: HTTP does not allow one of its headers") from None
        if isinstance(outcome, UnavailableError):  # an earlier attempt may have been sent
            raise UnavailableError(
                str(outcome), unsure=self._unsure, repeatable=self._call.repeatable, reached=False
            ) from outcome
        if not isinstance(outcome, httpx2.Response):
            raise self.no_answer(outcome) from outcome
        if outcome.is_success:
            return outcome
        if self._call.method == "DELETE" and outcome.status_code == httpx2.codes.NOT_FOUND and self._unsure:
            return httpx2.Response(httpx2.codes.OK, json={"message": "deleted by an attempt whose response was lost"})
        raise _refusal(outcome, unsure=self._unsure, repeatable=self._call.repeatable)

    def no_answer(self, error: httpx2.RequestError) -> UnavailableError:
        """Return the error of a call whose connection failed."""
        return UnavailableError(
            f"no response from {self._url}: {str(error) or type(error).__name__}",
            unsure=self._unsure or self._reached,
            repeatable=self._call.repeatable,
            reached=self._reached,
        )


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _request(http: httpx2.Client | httpx2.AsyncClient, call: Call[Any], token: str | None) -> httpx2.Request:
    headers = dict(call.headers) | ({"Authorization": f"Bearer {token}"} if token else {})
    stream = call.headers.get("Accept") == "text/event-stream"
    try:
        return http.build_request(
            call.method,
            call.path,
            params=call.query or None,
            json=call.body,
            content=call.csv,
            headers=headers,
            timeout=_STREAM_TIMEOUTS if stream else _TIMEOUTS,
        )
    except (httpx2.InvalidURL, UnicodeEncodeError) as error:  # neither contains more than a character of the request
        raise CommandError(f"the request is not valid: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of the service.

    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise _unreadable("is not JSON") from error


def page_of(reply: Reply, items: str | None = None) -> dict[str, Any]:
    """Parse a page of a list.

    Args:
        reply: response to a `ListCall`.
        items: field of the objects, if it is to be checked.

    Raises:
        ApiError: it is not such a page.
    """
    page = reply.json
    if not (
        isinstance(page, dict)
        and isinstance(page.get("total"), int)
        and (items is None or isinstance(page.get(items), list))
    ):
        raise _unreadable("is not a page of a list")
    return page


def _parse(model: type[Model], text: str) -> Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _unreadable(f"does not match the API of this release ({error.error_count()} errors)") from error


def _unreadable(problem: str) -> ApiError:
    return ApiError(200, f"the response {problem}: not a gateway, or another version; see `scanfleet doctor`")


def _refusal(response: httpx2.Response, *, unsure: bool, repeatable: bool) -> ApiError:
    request_id = response.headers.get("x-request-id", "")
    try:
        message = rest.Error.model_validate_json(response.content).error
    except ValidationError:  # from a proxy or another server
        text = " ".join(response.text.split())[:_MAX_ERROR_CHARS]
        message = f"HTTP {response.status_code} {response.reason_phrase}: {text}"
    return ApiError(response.status_code, message, request_id, unsure=unsure, repeatable=repeatable)


def _headers() -> dict[str, str]:
    return {"User-Agent": f"scanfleet-cli/{VERSION}"}
