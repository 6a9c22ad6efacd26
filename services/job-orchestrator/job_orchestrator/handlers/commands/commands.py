"""Handle commands from the gateway: one insert accepts a command, and any replica can finish an accepted one."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from operator import itemgetter
from typing import Final

from job_orchestrator.domain.command import KEY_REUSED, Command
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import (
    AuditRepository,
    CommandRepository,
    JobRepository,
)
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.commands.cancels import Cancels
from job_orchestrator.handlers.commands.submits import Submits, body_hash
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.metrics import count_transition
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    AuditEntry,
    CancelJob,
    CommandAccepted,
    CommandRejected,
    CommandReply,
    SubmitJobs,
)
from scanfleet.contracts.messages.audit import MAX_REASON_CHARS
from scanfleet.contracts.messages.topics import SCAN_REPLIES
from scanfleet.errors import Rule
from scanfleet.runtime import tracing
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import PartitionListener, Publisher, Record
from scanfleet.services import ORCHESTRATOR

_Message = SubmitJobs | CancelJob
_Key = tuple[int, str]
"""A user and an Idempotency-Key."""

# The caller has timed out and may have sent another request. This check is only an optimisation: a late command is harmless
# because the gateway's `expired` was inserted first.
_TOO_OLD: Final = timedelta(seconds=60)
_MOST_JOBS: Final = 100  # at once: 0.3 s of CPU time if each excludes a thousand networks
_DELAYED: Final = timedelta(seconds=1)  # less than a gateway waits for a reply
_SWEPT: Final = timedelta(minutes=1)  # maximum time until a sweep publishes the events of each job and reconciles it
_MAX_NAMED_CHARS: Final = 200  # characters that an audit entry copies from a command


class Commands(PartitionListener):
    """Handles scan-commands."""

    def __init__(
        self,
        *,
        commands: CommandRepository,
        jobs: JobRepository,
        audit: AuditRepository,
        publisher: Publisher,
        outbox: Outbox,
        reconciler: Reconciler,
        submits: Submits,
        cancels: Cancels,
        clock: PlatformTime,
    ) -> None:
        self._commands = commands
        self._jobs = jobs
        self._audit = audit
        self._publisher = publisher
        self._outbox = outbox
        self._reconciler = reconciler
        self._submits = submits
        self._cancels = cancels
        self._clock = clock
        self._caught_up: dict[int, float] = {}
        """When all records of each partition had last been read."""
        self._finished: Mapping[_Key, Command] = {}
        """The submits of the previous group by Idempotency-Key, if records are left: a repeat is answered without another query."""

    async def handle(self, records: Sequence[Record[_Message]]) -> Sequence[Record[_Message]]:
        """Handle the cancels, one group of submits, and the oldest of the others; leave the rest.

        Newer commands of other users precede the rest, and in each batch its oldest one is handled.
        """
        waiting = await self._unexpired(records)
        cancels = [each for each in waiting if isinstance(each.message, CancelJob)]
        submits = [each for each in waiting if isinstance(each.message, SubmitJobs)]
        first = self._first(submits)
        ids = {each.message.command_id for each in first}
        others = [each for each in submits if each.message.command_id not in ids]
        oldest, left = others[:1], others[1:]
        for some in filter(None, (cancels, first, oldest)):
            names = {each.message.command_id: type(each.message).__name__ for each in some}
            traces = {each.message.command_id: each.message.traceparent for each in some}
            with tracing.spans(names.__getitem__, traces, "consumer", "scanfleet.command.id"):
                finished = await self._carry_out(some)
            self._finished = finished if left else {}
        return left

    async def _unexpired(self, records: Sequence[Record[_Message]]) -> Sequence[Record[_Message]]:
        """Return the distinct records, without those that waited until their gateway expired them."""
        distinct = {each.message.command_id: each for each in records}
        waited = self._waited(distinct.values())
        expired = await self._commands.expired(waited) if waited else set()
        return [each for id_, each in distinct.items() if id_ not in expired]

    def _waited(self, records: Iterable[Record[_Message]]) -> set[str]:
        """Return the commands that were in the log for so long that they may have been decided already."""
        delayed = self._clock.now() - _DELAYED
        return {each.message.command_id for each in records if each.timestamp < delayed}

    def _first(self, submits: Sequence[Record[_Message]]) -> Sequence[Record[_Message]]:
        """Return the submits to handle first, for at most `_MOST_JOBS` jobs.

        They are ordered by the number of jobs of their user up to and including their own: the small and the first ones of each
        user precede the rest of a user with many.
        """
        wanted: defaultdict[int, int] = defaultdict(int)
        ordered: list[tuple[int, int, Record[_Message]]] = []
        for each in submits:
            jobs = 0
            if isinstance(each.message, SubmitJobs) and not self._too_old(each):
                jobs = len(each.message.subnet_ids)
            wanted[each.message.user_id] += jobs
            ordered.append((wanted[each.message.user_id], jobs, each))
        ordered.sort(key=itemgetter(0))
        size = bisect_right(list(accumulate(jobs for _, jobs, _ in ordered)), _MOST_JOBS)
        return [each for _, _, each in ordered[:size]]

    async def _carry_out(self, records: Sequence[Record[_Message]]) -> Mapping[_Key, Command]:
        """Decide on a group of commands, finish and answer them; return its finished submits by Idempotency-Key."""
        messages = {each.message.command_id: each.message for each in records}
        too_old = {each.message.command_id for each in records if self._too_old(each)}
        stored = await self._known([each for each in records if each.message.command_id not in too_old])
        new: list[Command] = []
        submits: list[SubmitJobs] = []
        for id_, message in messages.items():
            if id_ in stored:
                continue
            if id_ in too_old:
                new.append(Command(id=id_, user_id=message.user_id, state="expired"))
            elif isinstance(message, CancelJob):
                new.append(
                    Command(
                        id=id_, user_id=message.user_id, state="accepted", cancels=message.job_id, admin=message.admin
                    )
                )
            else:
                submits.append(message)
        new += await self._submits.decide(submits)
        decided = await self._commands.insert(new)
        fresh = [job for command in new if decided[command.id] is command for job in command.jobs]
        for job in fresh:
            count_transition(job)
        stored |= decided
        mismatched = {id_ for id_, command in stored.items() if _is_mismatched(command, messages[id_])}
        matching = {id_: command for id_, command in stored.items() if id_ not in mismatched}
        await self._finish(matching, messages, mismatched=mismatched, fresh=fresh)
        keyed = ((command.idempotency_key, command) for command in matching.values())
        return {(command.user_id, key): command for key, command in keyed if key is not None}

    async def revoked(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            self._caught_up.pop(partition, None)
        self._finished = {}

    async def caught_up(self, partitions: Collection[int]) -> None:
        self._caught_up |= dict.fromkeys(partitions, self._clock.monotonic())

    async def expire(self, command_id: str, user_id: int) -> CommandReply | None:
        """Ensure that the command will never be accepted; if it was accepted already, finish it and return its reply.

        Returns:
            None if the command is expired and will have no effect.

        Raises:
            DependencyError: the outcome is unknown.
        """
        expired = Command(id=command_id, user_id=user_id, state="expired")
        stored = (await self._commands.insert([expired]))[command_id]
        if stored.state == "expired" or stored.user_id != user_id:
            return None
        others = await self._restore([stored])
        answer = (await self._answers({command_id: stored}))[command_id]
        await self._outbox.relay(others)
        await self._reconciler.reconcile(others)
        return answer

    def _too_old(self, record: Record) -> bool:
        """Return whether the command was in the log for more than a minute.

        It was not if all records before it were read within that minute, regardless of any clock. How long it was in the
        log before that depends on the broker's timestamp, and on the clocks of broker and orchestrator.
        """
        caught_up = self._caught_up.get(record.partition)
        if caught_up is not None and self._clock.monotonic() - caught_up < _TOO_OLD.total_seconds():
            return False
        return record.timestamp < self._clock.now() - _TOO_OLD

    async def _known(self, records: Sequence[Record[_Message]]) -> dict[str, Command]:
        """Return the decided ones of the commands that waited, and earlier submits with the same idempotency keys.

        An earlier submit is returned without jobs if its body differs. Commands that are redelivered sooner are decided again: the
        insert returns the earlier decision.
        """
        messages = {each.message.command_id: each.message for each in records}
        keys = {
            id_: (message.user_id, message.idempotency_key)
            for id_, message in messages.items()
            if isinstance(message, SubmitJobs) and message.idempotency_key
        }
        waited = self._waited(records)
        decided = await self._commands.get(waited) if waited else {}
        stored = await self._commands.by_key(set(keys.values()) - self._finished.keys())
        earlier = {id_: command for id_, key in keys.items() if (command := stored.get(key))}
        repeats = {id_: each.id for id_, each in earlier.items() if not _is_mismatched(each, messages[id_])}
        complete = await self._commands.get(set(repeats.values())) if repeats else {}
        return {
            **decided,
            **{id_: self._finished[key] for id_, key in keys.items() if key in self._finished},
            **{id_: command for id_, command in earlier.items() if id_ not in repeats},
            **{id_: complete[first] for id_, first in repeats.items() if first in complete},
        }

    async def _finish(
        self,
        stored: Mapping[str, Command],
        messages: Mapping[str, _Message],
        *,
        mismatched: Collection[str],
        fresh: Sequence[ScanJob],
    ) -> None:
        """Finish these commands, and answer their messages.

        Args:
            stored: the stored commands by message id.
            messages: the messages by their ids.
            mismatched: ids of further messages, which are refused.
            fresh: the jobs that this replica has just accepted.
        """
        await self._jobs.insert(fresh)
        finished = {command.id for command in self._finished.values()}
        done = {*finished, *(job.command_id for job in fresh)}
        others = await self._restore([command for command in stored.values() if command.id not in done])
        answers = await self._answers({id_: command for id_, command in stored.items() if command.state != "expired"})
        for id_ in mismatched:
            answers[id_] = CommandRejected(command_id=id_, status=400, error=KEY_REUSED, rule=Rule.REQUEST)
        entries = [_audit_entry(messages[id_], answer) for id_, answer in answers.items()]
        # In parallel, because the caller waits for the reply. All are idempotent if the batch is redelivered.
        await asyncio.gather(
            try_publish(self._publisher, SCAN_REPLIES, list(answers.values()), "the gateway requests the replies"),
            record(self._audit, entries),
            self._outbox.try_publish(fresh),
            self._reconciler.start(fresh),
        )
        if others:
            await self._outbox.relay(others)
            await self._reconciler.reconcile(others)

    async def _restore(self, commands: Collection[Command]) -> set[int]:
        """Insert the missing jobs of these commands; return the jobs to continue.

        Sweeps have continued the existing jobs of a command that is older than a minute.
        """
        jobs = {job.id: job for command in commands for job in command.jobs}
        swept = self._clock.now() - _SWEPT
        old = {job.id for job in jobs.values() if job.created_at < swept}
        left = (jobs.keys() - old) | (await self._jobs.missing(old) if old else set())
        if left:
            await self._jobs.insert([jobs[id_] for id_ in left])
        return left | {command.cancels for command in commands if command.cancels is not None}

    async def _answers(self, commands: Mapping[str, Command]) -> dict[str, CommandReply]:
        """Carry out the cancels, and return all replies by the requested id."""
        answers = await self._cancels.carry_out(
            [command for command in commands.values() if command.state == "accepted" and command.cancels is not None]
        )
        distinct = {command.id: command for command in commands.values()}
        views = {id_: tuple(job.view for job in command.jobs) for id_, command in distinct.items()}
        for id_, command in commands.items():
            if id_ in answers:
                continue
            if command.state == "rejected":
                answers[id_] = CommandRejected(
                    command_id=id_, status=command.status, error=command.error, rule=command.rule
                )
            else:
                answers[id_] = CommandAccepted(command_id=id_, jobs=views[command.id])
        return answers


def _is_mismatched(command: Command, message: _Message) -> bool:
    """Return whether another request has used the message's Idempotency-Key."""
    return isinstance(message, SubmitJobs) and command.id != message.command_id and command.body != body_hash(message)


def _audit_entry(message: SubmitJobs | CancelJob, answer: CommandReply) -> AuditEntry:
    """Return the audit entry, which is identical for every copy of the command, so that only the first is stored."""
    rule = "" if isinstance(answer, CommandAccepted) else answer.rule
    if isinstance(message, CancelJob):
        action, target = "cancel_task", f"/api/v1/task/{message.job_id}"
        if isinstance(answer, CommandAccepted) and answer.jobs[0].user_id != message.user_id:
            rule, target = Rule.ROLE, f"{target} of user {answer.jobs[0].user_id}"
    elif isinstance(answer, CommandAccepted):
        action, target = "create_tasks", f"/api/v1/task/{','.join(str(job.id) for job in answer.jobs)}"
    else:
        action, target = "create_tasks", f"/api/v1/subnet/{','.join(map(str, message.subnet_ids))}"
    return AuditEntry(
        id=f"command-{message.command_id}",  # the sender must not choose the id of another entry of this service
        time=utc_now(),
        service=ORCHESTRATOR,
        subject=str(message.user_id),
        source=message.source[:_MAX_NAMED_CHARS],
        action=action,
        target=target,
        decision="allowed" if isinstance(answer, CommandAccepted) else "refused",
        rule=rule,
        reason="" if isinstance(answer, CommandAccepted) else answer.error[:MAX_REASON_CHARS],
        request_id=message.request_id[:_MAX_NAMED_CHARS],
    )
