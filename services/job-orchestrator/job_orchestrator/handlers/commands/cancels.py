"""Cancel jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from job_orchestrator.domain.command import Command
from job_orchestrator.domain.job import JobTrigger, ScanJob
from job_orchestrator.domain.job import change as change_job
from job_orchestrator.domain.ports import CommandRepository, JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.canceller import ChunkCanceller, reasons
from job_orchestrator.handlers.jobs.faults import Faults
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.metrics import count_transition
from scanfleet.contracts.messages import CommandAccepted, CommandRejected, CommandReply, JobStatus
from scanfleet.errors import DependencyError, Rule

_ROUNDS: Final = 50  # each lost race is a change of the job, which has few changes


class Cancels:
    """Carries out cancel commands, and requests that cancel many jobs."""

    def __init__(
        self,
        *,
        commands: CommandRepository,
        jobs: JobRepository,
        canceller: ChunkCanceller,
        outbox: Outbox,
        reconciler: Reconciler,
        faults: Faults,
        clock: PlatformTime,
    ) -> None:
        self._commands = commands
        self._jobs = jobs
        self._canceller = canceller
        self._outbox = outbox
        self._reconciler = reconciler
        self._faults = faults
        self._clock = clock

    async def carry_out(self, commands: Collection[Command]) -> dict[str, CommandReply]:
        """Cancel the job of each command unless it has ended; a retry of the command that cancelled it gets the same reply."""
        if not commands:
            return {}
        jobs = await self._jobs.get({command.cancels or 0 for command in commands})
        allowed = {
            command.id: job.id
            for command in commands
            if (job := jobs.get(command.cancels or 0)) and (command.admin or job.user_id == command.user_id)
        }
        # The first of several commands for one job cancels it.
        ended = await self._end({job_id: id_ for id_, job_id in reversed(allowed.items())})
        # Before the reply, so that packets usually end even if every orchestrator stops then; the reconciler repeats what failed.
        await self._canceller.stop_scans(reasons(ended.values()))
        answers: dict[str, CommandReply] = {}
        rejected: list[Command] = []
        for command in commands:
            job = ended.get(allowed.get(command.id, 0))
            if job is None and command.id in allowed:
                rejected.append(_refuse(command, 503, "The job cannot be changed now", Rule.STATE))
            elif job is None:
                theirs = command.cancels in jobs
                rejected.append(_refuse(command, 404, "Job not found", Rule.OWNER if theirs else Rule.REQUEST))
            elif job.cancel_command == command.id:
                answers[command.id] = CommandAccepted(command_id=command.id, jobs=(job.view,))
            else:
                rejected.append(_refuse(command, 400, f"Job is already {job.status}", Rule.STATE))
        await self._commands.reject(rejected)
        return answers | {
            each.id: CommandRejected(command_id=each.id, status=each.status, error=each.error, rule=each.rule)
            for each in rejected
        }

    async def cancel(self, job_ids: Collection[int]) -> list[int]:
        """Cancel those of these jobs that have not ended, stop their scans, and return their ids.

        Raises:
            DependencyError: some are cancelled, whose scans the reconciler stops; calling again cancels the others.
        """
        before = await self._jobs.get(job_ids)
        unfinished = [job.id for job in before.values() if not job.final]
        ended = await self._end(dict.fromkeys(unfinished))
        cancelled = sorted(job.id for job in ended.values() if job.status is JobStatus.CANCELLED)
        try:
            await self._canceller.stop_scans(reasons(ended.values()))
        finally:
            self._reconciler.begin(ended[id_] for id_ in cancelled)  # they have ended: no repeated call finds them
        await self._outbox.try_publish(ended[id_] for id_ in cancelled)
        return cancelled

    async def _end(self, commands: Mapping[int, str | None]) -> dict[int, ScanJob]:
        """Cancel those of these jobs that have not ended, each with its command if there is one; return all final jobs.

        A job that raises an unexpected error is left out.

        Raises:
            DependencyError: some are cancelled; calling again cancels the others.
        """
        ended: dict[int, ScanJob] = {}
        left = set(commands)
        for _ in range(_ROUNDS):
            if not left:
                return ended
            jobs = await self._jobs.get(left)
            ended |= {job.id: job for job in jobs.values() if job.final}
            cancelled: dict[int, ScanJob] = {}
            for job in jobs.values():
                if not job.final:
                    with self._faults.isolated(job):
                        cancelled[job.id] = change_job(
                            job, JobTrigger.CANCEL, self._clock.now(), cancel_command=commands[job.id]
                        )
            left = await self._jobs.save(list(cancelled.values()))
            for job in cancelled.values():
                if job.id not in left:
                    count_transition(job)
                    ended[job.id] = job
        raise DependencyError(f"jobs were changed by other replicas {_ROUNDS} times in a row: {sorted(left)[:5]}")


def _refuse(command: Command, status: int, error: str, rule: Rule) -> Command:
    return replace(command, state="rejected", status=status, error=error, rule=rule)
