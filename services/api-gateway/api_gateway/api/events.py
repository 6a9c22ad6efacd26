"""A job's states as Server-Sent Events: what is true now, then every change, until the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Final

import structlog
from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from api_gateway.api.state import Handed, State
from api_gateway.handlers.events import Watch
from api_gateway.upstream import in_time
from scanfleet.auth import authenticate
from scanfleet.errors import DependencyError, PublicError, UnavailableError
from scanfleet.rest import Snapshot
from scanfleet.service import PathId, ascii_json

_RETRY_MS: Final = 3_000  # after which a client connects again; a restarted gateway is back by then

_log = structlog.get_logger()


async def _watched(job_id: PathId, state: Handed) -> AsyncIterator[Watch]:
    if not state.events.ready:
        raise UnavailableError("job events cannot be read now; try again")
    with state.watches.watch(job_id) as watch:
        yield watch  # to the end of the answer


Watched = Annotated[Watch, Depends(_watched)]
"""Hears the events of the job in the path from before the route is called to the end of its answer."""


class EventStream(StreamingResponse):
    """States as they come, ended by a final one.

    An event may be lost, the tail fall behind and a token run out, and all of it looks like silence. So every
    `heartbeat_seconds` the orchestrator is asked again, in the caller's name, and what it says that was not heard is told.
    If it does not say, or events cannot be heard, the stream ends, and the client's next request is told why.

    Args:
        watch: that has begun.
        job_id: of the job.
        request: that asked for the stream.
        state: of the gateway.
    """

    media_type = "text/event-stream"

    def __init__(self, watch: Watch, job_id: int, request: Request, state: State) -> None:
        super().__init__(self._told(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._watch = watch
        self._job_id = job_id
        self._request = request
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, in_time(send, self._state.settings.stalled_seconds))

    async def _told(self) -> AsyncIterator[bytes]:
        time = asyncio.get_running_loop().time
        until = time() + self._state.settings.heartbeat_seconds
        while not self._watch.ended:
            if time() >= until:
                if (now := await self._ask()) is None:
                    return
                self._watch.hear(now)
                until = time() + self._state.settings.heartbeat_seconds
                yield KEEPALIVE_COMMENT
            elif (snapshot := await self._watch.next(until)) is not None:
                yield _event(snapshot)
                if snapshot.task.status.status.final:
                    return

    async def _ask(self) -> Snapshot | None:
        """What the orchestrator says, None if it does not or would not be enough."""
        if not self._state.events.ready:
            _log.warning("stream ended: job events cannot be heard", job_id=self._job_id)
            return None
        try:
            await authenticate(self._request)  # until now it may have ended, or be revoked
            caller = self._state.orchestrator.identity(self._request)
            answer = await self._state.orchestrator.latest(caller, self._job_id)
        except PublicError as error:
            _log.info("stream ended: the token is no longer accepted", job_id=self._job_id, error=error.message)
            return None
        except DependencyError as error:
            _log.warning("stream ended: nobody knows the job's state", job_id=self._job_id, error=str(error))
            return None
        if isinstance(answer, Response):
            _log.info(
                "stream ended: the caller may not watch it any more", job_id=self._job_id, status=answer.status_code
            )
            return None
        return answer


def _event(snapshot: Snapshot) -> bytes:
    return format_sse_event(
        event=snapshot.task.status.status,
        data_str=ascii_json(snapshot.task.model_dump(mode="json")),
        id=str(snapshot.seq),
        retry=_RETRY_MS,
    )
