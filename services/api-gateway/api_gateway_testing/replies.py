"""The orchestrator's side of the bus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import CommandAccepted, CommandReply, Job, JobStatus, SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_REPLIES
from scanfleet.runtime.bus import Bus, Record


class Replier:
    """The orchestrator's side of the bus: answers each command with the result of `reply`, or not at all if it is None."""

    def __init__(self, bus: Bus) -> None:
        self.commands: list[SubmitJobs] = []
        self.reply: Callable[[SubmitJobs], Awaitable[Sequence[CommandReply]]] = accept
        self._bus = bus

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            command = record.message
            if isinstance(command, SubmitJobs):
                self.commands.append(command)
                await self._bus.publish(SCAN_REPLIES, await self.reply(command))


async def accept(command: SubmitJobs) -> Sequence[CommandReply]:
    """Accept every command."""
    jobs = tuple(job(number, subnet_id=subnet) for number, subnet in enumerate(command.subnet_ids, 1))
    return [CommandAccepted(command_id=command.command_id, jobs=jobs)]


async def silence(_command: SubmitJobs) -> Sequence[CommandReply]:
    """Send no reply, like an unavailable orchestrator."""
    return []


def job(id_: int, status: JobStatus = JobStatus.PENDING, *, subnet_id: int = 5) -> Job:
    now = utc_now()
    return Job(
        id=id_,
        user_id=7,
        policy_id=3,
        subnet_id=subnet_id,
        status=status,
        start_time=None,
        end_time=now if status is JobStatus.CANCELLED else None,
        created_at=now,
        updated_at=now,
    )
