"""Publish commands and wait for their replies; without a reply, have the orchestrator expire the command."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from api_gateway.domain.ports import Arbiter
from scanfleet.contracts.messages import CommandRejected, CommandReply, Job, SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_COMMANDS
from scanfleet.errors import DependencyError, PublicError, TooManyRequestsError, UnavailableError
from scanfleet.runtime.bus import Publisher, Record

_log = structlog.stdlib.get_logger(__name__)

_JOBS_END_SECONDS: Final = 30  # typical time until one of the unfinished jobs of a user ends


class Commands:
    """Matches replies to waiting requests. It reads all partitions of scan-replies, since a reply may be in any of them."""

    def __init__(self, bus: Publisher, *, reply_seconds: float) -> None:
        self._bus = bus
        self._reply_seconds = reply_seconds
        self._waiting: dict[str, asyncio.Future[CommandReply]] = {}
        """At most as many as there are concurrent requests."""

    def awaits(self, command_id: str) -> bool:
        """Return whether a request of this process waits for the reply to this command."""
        return command_id in self._waiting

    async def handle(self, records: Sequence[Record[CommandReply]]) -> None:
        for record in records:
            reply = record.message
            waiting = self._waiting.get(reply.command_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)

    async def send(
        self,
        command: SubmitJobs,
        arbiter: Arbiter,
        headers: Mapping[str, str],
    ) -> tuple[Job, ...]:
        """Publish the command, and return the jobs that it created.

        Args:
            command: with a unique id.
            arbiter: decides a command without a reply.
            headers: the caller's identity, for the arbiter.

        Raises:
            PublicError: the command was rejected or expired, or its outcome is unknown, as its message states.
        """
        structlog.contextvars.bind_contextvars(command_id=command.command_id)  # for the access log line
        reply = await self._ask(command) or await _expire(command.command_id, arbiter, headers)
        if isinstance(reply, CommandRejected):
            raise _refusal(reply)
        return reply.jobs

    async def _ask(self, command: SubmitJobs) -> CommandReply | None:
        """Return the reply, or None after the timeout."""
        waiting: asyncio.Future[CommandReply] = asyncio.get_running_loop().create_future()
        self._waiting[command.command_id] = waiting
        try:
            async with asyncio.timeout(self._reply_seconds):
                await self._bus.publish(SCAN_COMMANDS, [command])
                return await waiting
        except (DependencyError, TimeoutError) as error:
            _log.warning("reply_missing", error=repr(error))
            return None
        finally:
            del self._waiting[command.command_id]


async def _expire(command_id: str, arbiter: Arbiter, headers: Mapping[str, str]) -> CommandReply:
    try:
        reply = await arbiter.expire(command_id, headers)
    except DependencyError as error:
        _log.warning("outcome_unknown", error=str(error))
        raise UnavailableError(
            "the outcome of this request is unknown; repeat it, with the same Idempotency-Key if it creates something",
        ) from error
    if reply is None:
        raise UnavailableError("the request timed out and will not be executed; try again")
    return reply


def _refusal(reply: CommandRejected) -> PublicError:
    if reply.status == UnavailableError.status:
        return UnavailableError(reply.error)
    headers = {"Retry-After": str(_JOBS_END_SECONDS)} if reply.status == TooManyRequestsError.status else None
    error = PublicError(reply.error, headers=headers)
    error.status = reply.status
    return error
