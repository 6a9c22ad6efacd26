"""Stream states of jobs as Server-Sent Events: the current state, then every change; of one job until its final state."""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import structlog
from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from httpx2 import codes
from starlette.types import Receive, Scope, Send

from api_gateway.api.state import State, StateDep
from api_gateway.handlers.events import ALL_JOBS, Subscribed, Subscription
from api_gateway.upstream import in_time
from scanfleet.contracts import queries
from scanfleet.contracts.rest import Snapshot, Snapshots
from scanfleet.errors import DependencyError, NotFoundError, PublicError, UnavailableError
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.runtime.http.responses import ascii_json
from scanfleet.security.auth import Caller, authenticate

_RETRY_MS: Final = 3_000  # reconnection delay of clients; a gateway restarts faster
_OVERLAP: Final = timedelta(minutes=1)  # of two queries: finds changes that were stored late or with another clock
_OF_JOB: Final = re.compile(r"[0-9]{1,16}")
# The time in milliseconds up to which every change was sent, a job, the number of its state.
_OF_JOBS: Final = re.compile(r"([0-9]{1,14})-[0-9]{1,16}-[0-9]{1,16}")

_log = structlog.stdlib.get_logger(__name__)


async def _job_subscription(job_id: PathId, state: StateDep) -> AsyncIterator[Subscription]:
    with _subscription(("job", job_id), state) as subscription:
        yield subscription  # to the end of the answer


JobSubscription = Annotated[Subscription, Depends(_job_subscription)]
"""Receives the events of the job in the path, from before the route is called to the end of its response."""


async def _jobs_subscription(
    caller: Caller, state: StateDep, selected: Annotated[queries.Events, parsed(queries.Events)]
) -> AsyncIterator[Subscription]:
    whose = selected.user_id
    subscribed = ALL_JOBS if whose == queries.ALL_USERS else ("user", int(whose or caller.user_id))
    with _subscription(subscribed, state) as subscription:
        yield subscription


JobsSubscription = Annotated[Subscription, Depends(_jobs_subscription)]
"""The same for all jobs of the caller, of another user, or of all users."""


@contextmanager
def _subscription(subscribed: Subscribed, state: State) -> Iterator[Subscription]:
    if not state.events.ready:
        raise UnavailableError("job events are temporarily unavailable; try again")
    with state.subscriptions.open(subscribed) as subscription:
        yield subscription


class _EventStream(StreamingResponse):
    """Sends states as they arrive.

    A lost event, a lagging tail and an expired token all look like a stream without changes. Therefore the orchestrator is
    queried every `heartbeat_seconds` with the caller's identity, and states that were not received as events are sent.
    If the query fails, or events are unavailable, the stream ends, and the client's next request gets the error.

    Args:
        subscription: of the jobs.
        request: the request for the stream.
        state: of the gateway.
        job_id: of the one job, for the log.
    """

    media_type = "text/event-stream"

    def __init__(
        self, subscription: Subscription, request: Request, state: State, *, job_id: int | None = None
    ) -> None:
        super().__init__(self._pieces(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._subscription = subscription
        self._request = request
        self._state = state
        self._log = _log.bind(job_id=job_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, in_time(send, self._state.settings.stalled_seconds))

    @abstractmethod
    def _pieces(self) -> AsyncIterator[bytes]:
        """Yield the body of the response."""

    @abstractmethod
    def _look(self) -> AsyncIterator[None]:
        """Query the orchestrator page by page, and pass its answers to the subscription.

        Raises:
            PublicError: the caller may no longer watch.
            DependencyError: the orchestrator is unavailable.
        """

    @abstractmethod
    def _id(self, snapshot: Snapshot) -> str: ...

    async def _events(self, first_look: float) -> AsyncIterator[tuple[bytes, Snapshot | None]]:
        """Yield each event with its state, and heartbeats.

        Args:
            first_look: seconds until the orchestrator is first queried.
        """
        time = asyncio.get_running_loop().time
        until = time() + first_look
        while not self._subscription.ended:
            if time() < until:
                if (snapshot := await self._subscription.next(until)) is not None:
                    yield self._event(snapshot), snapshot
                continue
            try:
                async for _ in self._look():
                    authenticated = time()
                    for snapshot in self._subscription.take_waiting():
                        if time() - authenticated > self._state.settings.heartbeat_seconds:  # the client reads slowly
                            await self._caller()
                            authenticated = time()
                        yield self._event(snapshot), snapshot
            except PublicError as error:
                self._log.info("stream_ended", cause="the caller may no longer watch", error=error.message)
                return
            except DependencyError as error:
                self._log.warning("stream_ended", cause="the state of the jobs is unknown", error=str(error))
                return
            until = time() + self._state.settings.heartbeat_seconds
            yield KEEPALIVE_COMMENT, None

    async def _caller(self) -> dict[str, str]:
        """Return the caller; raises the same errors as `_look`."""
        if not self._state.events.ready:
            raise DependencyError("job events cannot be read")
        await authenticate(self._request)  # meanwhile the token may have expired or been revoked
        return self._state.orchestrator.identity(self._request)

    def _event(self, snapshot: Snapshot) -> bytes:
        return format_sse_event(
            event=snapshot.task.status.status,
            data_str=ascii_json(snapshot.task.model_dump(mode="json")),
            id=self._id(snapshot),
            retry=_RETRY_MS,
        )


class JobStream(_EventStream):
    """Streams one job, from the first state of its subscription to its final state."""

    def __init__(self, subscription: Subscription, job_id: int, request: Request, state: State) -> None:
        super().__init__(subscription, request, state, job_id=job_id)
        self._job_id = job_id

    async def _pieces(self) -> AsyncIterator[bytes]:
        async for piece, snapshot in self._events(self._state.settings.heartbeat_seconds):
            yield piece
            if snapshot is not None and snapshot.task.status.status.final:
                return

    async def _look(self) -> AsyncIterator[None]:
        answer = await self._state.orchestrator.latest(await self._caller(), self._job_id)
        if isinstance(answer, Response):
            raise _refused(answer)
        self._subscription.add(answer)
        yield

    def _id(self, snapshot: Snapshot) -> str:
        return str(snapshot.seq)


class JobsStream(_EventStream):
    """Many jobs: first each that is unfinished or has ended since the client last received an event, then each change.

    The states of a page are sent in the order of their jobs. The id of an event therefore carries the time up to which the
    client has received every change, which advances once all states of a look are sent.

    Args:
        subscription: of the jobs.
        first: the first page of them.
        whose: the requested user.
        request: the request for the stream.
        state: of the gateway.
    """

    def __init__(
        self, subscription: Subscription, first: Snapshots, whose: str | None, request: Request, state: State
    ) -> None:
        super().__init__(subscription, request, state)
        resumed = last_received(request.headers.get("last-event-id"))
        self._page: Snapshots | None = first
        self._whose = whose
        self._received = resumed or first.time
        self._changed_since: datetime | None = None
        self._ended_since = overlapping(resumed)

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield b"retry: %d\n\n" % _RETRY_MS  # the first event may be hours away
        async for piece, _ in self._events(0):
            yield piece

    async def _look(self) -> AsyncIterator[None]:
        page = self._page or await self._ask()
        self._page, looked_at = None, page.time
        while True:
            for snapshot in page.snapshots:
                self._subscription.add(snapshot)
            yield
            if page.next is None and page.next_ended is None:
                break
            page = await self._ask(after=page.next, ended_after=page.next_ended)
        self._received = looked_at
        self._changed_since = self._ended_since = overlapping(looked_at)

    async def _ask(self, *, after: int | None = None, ended_after: str | None = None) -> Snapshots:
        answer = await self._state.orchestrator.latest_of(
            await self._caller(),
            queries.LatestJobs(
                user_id=self._whose,
                after=after or 0,
                ended_after=ended_after,
                changed_since=self._changed_since,
                ended_since=self._ended_since,
            ),
        )
        if isinstance(answer, Response):
            raise _refused(answer)
        return answer

    def _id(self, snapshot: Snapshot) -> str:
        return f"{int(self._received.timestamp() * 1_000)}-{snapshot.task.job.id}-{snapshot.seq}"


def _refused(answer: Response) -> PublicError | DependencyError:
    """Return the error for this error response of the orchestrator."""
    message = f"the orchestrator answered {answer.status_code}"
    return DependencyError(message) if answer.status_code >= codes.INTERNAL_SERVER_ERROR else NotFoundError(message)


def last_seq(last_event_id: str | None) -> int:
    """Return the number of the last state of a job that the client received; 0 if the id is missing or malformed."""
    return int(last_event_id) if last_event_id and _OF_JOB.fullmatch(last_event_id) else 0


def last_received(last_event_id: str | None) -> datetime | None:
    """Return the time up to which the client has received every change of many jobs; None if the id is missing or malformed."""
    match = _OF_JOBS.fullmatch(last_event_id or "")
    return datetime.fromtimestamp(int(match[1]) / 1_000, UTC) if match else None


def overlapping(received: datetime | None) -> datetime | None:
    """Return the time from which to query for changes after `received`."""
    return received - _OVERLAP if received else None
