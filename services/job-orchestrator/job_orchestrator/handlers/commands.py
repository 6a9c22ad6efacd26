"""Handle commands from the gateway: one insert accepts a command, and any replica can finish an accepted one."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

import structlog

from job_orchestrator.domain import plan
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.job import JobTrigger, ScanJob, create
from job_orchestrator.domain.job import change as change_job
from job_orchestrator.domain.ports import (
    AuditRepository,
    CommandRepository,
    JobRepository,
    PolicyRepository,
    SubnetRepository,
)
from job_orchestrator.domain.quotas import QuotaError, Quotas, Request
from job_orchestrator.domain.resources import Policy, Subnet
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.outbox import Outbox
from job_orchestrator.handlers.reconciler import Reconciler
from job_orchestrator.handlers.usage import Usages
from job_orchestrator.metrics import count_transition
from scanfleet import tracing
from scanfleet.bus import Publisher, Record
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError, MessageError, Rule
from scanfleet.messages import AuditEntry, CancelJob, CommandAccepted, CommandRejected, JobStatus, SubmitJobs
from scanfleet.messages.audit import MAX_REASON_CHARS
from scanfleet.messages.topics import SCAN_PROGRESS, SCAN_REPLIES
from scanfleet.policy import ADMITTED_SCRIPTS, PolicyError, executable
from scanfleet.services import ORCHESTRATOR
from scanfleet.targets import Target, TargetRules
from scanfleet.user_grants import Admitted, GrantError, UserGrants

Reply = CommandAccepted | CommandRejected

_log = structlog.get_logger()

# The caller has timed out and may have sent another request. This check is only an optimisation: a late command is harmless
# because the gateway's `expired` was inserted first.
_TOO_OLD: Final = timedelta(seconds=60)
_MAX_NAMED_CHARS: Final = 200  # characters that an audit entry copies from a command
_ROUNDS: Final = 50  # each lost race is a change of the job, which has few changes
_MAX_EXCLUDES: Final = 100_000  # of all subnets of one command, so that its document stays below MongoDB's 16 MB


class _RefusedError(Exception):
    """The answer is `status` with this text, because of this rule."""

    def __init__(self, text: str, rule: Rule = Rule.REQUEST, status: int = 400) -> None:
        super().__init__(text)
        self.rule = rule
        self.status = status


class Commands:
    """Handles scan-commands."""

    def __init__(
        self,
        *,
        commands: CommandRepository,
        jobs: JobRepository,
        policies: PolicyRepository,
        subnets: SubnetRepository,
        audit: AuditRepository,
        publisher: Publisher,
        outbox: Outbox,
        reconciler: Reconciler,
        rules: TargetRules,
        clock: PlatformTime,
        scripts: AbstractSet[str] = ADMITTED_SCRIPTS,
        grants: UserGrants | None = None,
        quotas: Quotas,
    ) -> None:
        self._commands = commands
        self._jobs = jobs
        self._policies = policies
        self._subnets = subnets
        self._audit = audit
        self._publisher = publisher
        self._outbox = outbox
        self._reconciler = reconciler
        self._rules = rules
        self._scripts = scripts
        self._grants = grants
        self._quotas = quotas
        self._usages = Usages(jobs, clock)
        self._clock = clock
        self._caught_up: dict[int, float] = {}
        """When all records of each partition had last been read."""

    async def handle(self, records: Sequence[Record]) -> None:
        messages = {(message := _command(record)).command_id: message for record in records}
        traces = {id_: message.traceparent for id_, message in messages.items()}
        with tracing.spans(
            lambda id_: type(messages[id_]).__name__,
            traces,
            "consumer",
            "scanfleet.command.id",
        ):
            await self._carry_out(records, messages)

    async def _carry_out(self, records: Sequence[Record], messages: Mapping[str, SubmitJobs | CancelJob]) -> None:
        stands = await self._known(messages)
        too_old = {_command(record).command_id for record in records if self._too_old(record)}
        new: list[Command] = []
        submits: list[SubmitJobs] = []
        for id_, message in messages.items():
            if id_ in stands:
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
        new += await self._decide(submits)
        decided = await self._commands.insert(new)
        fresh = [job for command in new if decided[command.id] is command for job in command.jobs]
        for job in fresh:
            count_transition(job)
        await self._finish(stands | decided, messages, fresh)

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            self._caught_up.pop(partition, None)

    async def caught_up(self, partitions: Collection[int]) -> None:
        self._caught_up |= dict.fromkeys(partitions, self._clock.monotonic())

    async def expire(self, command_id: str, user_id: int) -> Reply | None:
        """Ensure that the command will never be accepted; if it was accepted already, finish it and return its reply.

        Returns:
            None if the command is expired and will have no effect.

        Raises:
            DependencyError: the outcome is unknown.
        """
        expired = Command(id=command_id, user_id=user_id, state="expired")
        stands = (await self._commands.insert([expired]))[command_id]
        if stands.state == "expired" or stands.user_id != user_id:
            return None
        answer = (await self._answers({command_id: stands}))[command_id]
        await self._outbox.relay(_jobs_of(stands))
        await self._reconciler.reconcile(_jobs_of(stands))
        return answer

    async def cancel(self, job_ids: Collection[int]) -> list[int]:
        """Cancel those of these jobs that have not ended, and return their ids.

        Raises:
            DependencyError: some are cancelled; calling again cancels the others.
        """
        before = await self._jobs.get(job_ids)
        unfinished = [job.id for job in before.values() if not job.final]
        ended = await self._end(dict.fromkeys(unfinished))
        cancelled = sorted(job.id for job in ended.values() if job.status is JobStatus.CANCELLED)
        try:
            await self._outbox.relay(cancelled)
        except DependencyError as error:  # the sweep publishes the events
            _log.warning("publishing of cancelled jobs delayed", jobs=len(cancelled), error=str(error))
        self._reconciler.begin(cancelled)
        return cancelled

    def _too_old(self, record: Record) -> bool:
        """Return whether the command was in the log for more than a minute.

        It was not if all records before it were read within that minute, regardless of any clock. How long it was in the
        log before that depends on the broker's timestamp, and on the clocks of broker and orchestrator.
        """
        caught_up = self._caught_up.get(record.partition)
        if caught_up is not None and self._clock.monotonic() - caught_up < _TOO_OLD.total_seconds():
            return False
        return record.timestamp < self._clock.now() - _TOO_OLD

    async def _known(self, messages: Mapping[str, SubmitJobs | CancelJob]) -> dict[str, Command]:
        """Return the decided commands of these ids: their own, or an earlier one with the same idempotency key."""
        keys = {
            id_: (message.user_id, message.idempotency_key)
            for id_, message in messages.items()
            if isinstance(message, SubmitJobs) and message.idempotency_key
        }
        by_id, by_key = await asyncio.gather(
            self._commands.get(messages),
            self._commands.by_key(keys.values()),
        )
        return {id_: by_key[key] for id_, key in keys.items() if key in by_key} | by_id

    async def _finish(
        self,
        stands: Mapping[str, Command],
        messages: Mapping[str, SubmitJobs | CancelJob],
        fresh: Collection[ScanJob],
    ) -> None:
        mismatched = {
            id_: _rejected(id_, 400, "Idempotency-Key was used for another request", Rule.REQUEST)
            for id_, command in stands.items()
            if isinstance(message := messages[id_], SubmitJobs) and command.id != id_ and command.body != _hash(message)
        }
        answers = mismatched | await self._answers(
            {id_: command for id_, command in stands.items() if id_ not in mismatched and command.state != "expired"},
        )
        entries = [_audit_entry(messages[id_], answer) for id_, answer in answers.items()]
        # In parallel, because the caller waits for the reply. All are idempotent if the batch is redelivered.
        await asyncio.gather(
            self._publisher.publish(SCAN_REPLIES, answers.values()),
            record(self._audit, entries),
            self._begin(fresh),
        )
        answered = {job_id for id_ in answers.keys() - mismatched.keys() for job_id in _jobs_of(stands[id_])}
        others = answered - {job.id for job in fresh}
        await self._outbox.relay(others)
        await self._reconciler.reconcile(others)

    async def _begin(self, fresh: Collection[ScanJob]) -> None:
        """Publish the first events of new jobs, and then create their chunks, which saves the jobs without these events."""
        await self._outbox.publish(fresh)
        self._reconciler.begin([job.id for job in fresh])

    async def _answers(self, commands: Mapping[str, Command]) -> dict[str, Reply]:
        """Finish each command, and return the replies by the requested id."""
        await self._jobs.insert([job for command in commands.values() for job in command.jobs])
        answers = await self._cancel(
            [command for command in commands.values() if command.state == "accepted" and command.cancels is not None]
        )
        for id_, command in commands.items():
            if id_ in answers:
                continue
            if command.state == "rejected":
                answers[id_] = _rejected(id_, command.status, command.error, command.rule)
            else:
                answers[id_] = CommandAccepted(command_id=id_, jobs=tuple(job.view for job in command.jobs))
        return answers

    async def _decide(self, submits: Sequence[SubmitJobs]) -> list[Command]:
        """Return the command to insert for each submit: accepted with all of its jobs, or rejected."""
        if not submits:
            return []
        # The ids are allocated before the submits are checked, so that those of rejected submits remain unused.
        policies, subnets, taken = await asyncio.gather(
            self._policies.get({(submit.user_id, submit.policy_id) for submit in submits}),
            self._subnets.get({(submit.user_id, id_) for submit in submits for id_ in submit.subnet_ids}),
            self._jobs.take_ids(sum(len(submit.subnet_ids) for submit in submits)),
        )
        decided = [await self._check(submit, policies, subnets) for submit in submits]
        ids = iter(taken)
        refusals = await self._refusals(submits, decided)
        return [
            each
            if isinstance(each, Command)
            else _refused(submit, 429 if refusal.temporary else 400, str(refusal), Rule.QUOTA)
            if refusal
            else _accepted(submit, [_numbered(job, next(ids)) for job in each])
            for submit, each, refusal in zip(submits, decided, refusals, strict=True)
        ]

    async def _refusals(
        self,
        submits: Sequence[SubmitJobs],
        decided: Sequence[Command | list[ScanJob]],
    ) -> Sequence[QuotaError | None]:
        """Return the quota error of each request. Cached usage may admit a request; a refusal uses a fresh read."""
        users = {submit.user_id for submit in submits}
        requests = [
            Request(submit.user_id, submit.idempotency_key, each)
            for submit, each in zip(submits, decided, strict=True)
            if not isinstance(each, Command)
        ]
        admission = self._quotas.admit(await self._usages.of(users), requests)
        if admission.temporary:
            admission = self._quotas.admit(await self._usages.of(users, fresh=True), requests)
        self._usages.note(admission.usage)
        refusals = iter(admission.refusals)
        return [None if isinstance(each, Command) else next(refusals) for each in decided]

    async def _check(
        self,
        submit: SubmitJobs,
        policies: Mapping[tuple[int, int], Policy],
        subnets: Mapping[tuple[int, int], Subnet],
    ) -> Command | list[ScanJob]:
        """The jobs, as yet without ids, or the rejection."""
        jobs: list[ScanJob] = []
        try:
            for policy, subnet in _resolved(submit, policies, subnets, self._scripts):
                target = _target(subnet, self._rules)
                admitted = self._admitted(submit, policy, subnet, target)
                job = _planned(submit, subnet, target, admitted, self._clock.now())
                try:
                    self._quotas.check_job(job)
                except QuotaError as error:
                    raise _RefusedError(f"Subnet {subnet.id}: {error}", Rule.QUOTA) from error
                jobs.append(job)
                await asyncio.sleep(0)  # planning a large network takes 30 ms: let other tasks run
        except _RefusedError as refusal:
            return _refused(submit, refusal.status, str(refusal), refusal.rule)
        return jobs

    def _admitted(self, submit: SubmitJobs, policy: Policy, subnet: Subnet, target: Target) -> Admitted:
        """By which of the caller's grants, and at which rate; all that the target rules allow if there are no grants."""
        if self._grants is None:
            return Admitted("", policy.scan)
        try:
            return self._grants.admit(
                submit.user_id,
                frozenset(submit.roles),
                target.network,
                policy.scan,
                now=self._clock.now(),
                nat64=self._rules.nat64,
            )
        except GrantError as error:
            raise _RefusedError(f"Subnet {subnet.id}: {error}", Rule.GRANT, status=403) from error

    async def _cancel(self, commands: Collection[Command]) -> dict[str, Reply]:
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
        answers: dict[str, Reply] = {}
        for command in commands:
            job = ended.get(allowed.get(command.id, 0))
            if job is None:
                rule = Rule.OWNER if jobs.get(command.cancels or 0) else Rule.REQUEST
                answers[command.id] = await self._too_late(command, 404, "Job not found", rule)
            elif job.cancel_command == command.id:
                answers[command.id] = CommandAccepted(command_id=command.id, jobs=(job.view,))
            else:
                answers[command.id] = await self._too_late(command, 400, f"Job is already {job.status}", Rule.STATE)
        return answers

    async def _end(self, commands: Mapping[int, str | None]) -> dict[int, ScanJob]:
        """Cancel those of these jobs that have not ended, each with its command if there is one; return all final jobs.

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
            cancelled = {
                job.id: change_job(job, JobTrigger.CANCEL, self._clock.now(), cancel_command=commands[job.id])
                for job in jobs.values()
                if not job.final
            }
            left = await self._jobs.save(list(cancelled.values()))
            for job in cancelled.values():
                if job.id not in left:
                    count_transition(job)
                    ended[job.id] = job
        raise DependencyError(f"jobs were changed by other replicas {_ROUNDS} times in a row: {sorted(left)[:5]}")

    async def _too_late(self, command: Command, status: int, error: str, rule: Rule) -> Reply:
        await self._commands.reject(command.id, status, error, rule)
        return _rejected(command.id, status, error, rule)


def _command(record: Record) -> SubmitJobs | CancelJob:
    if not isinstance(record.message, SubmitJobs | CancelJob):
        raise MessageError(f"unexpected message type {type(record.message).__name__} on scan-commands")
    return record.message


def _rejected(command_id: str, status: int, error: str, rule: str) -> CommandRejected:
    return CommandRejected(command_id=command_id, status=status, error=error, rule=rule)


def _audit_entry(message: SubmitJobs | CancelJob, answer: Reply) -> AuditEntry:
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
        id=message.command_id,
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


def _jobs_of(command: Command) -> set[int]:
    return {job.id for job in command.jobs} | ({command.cancels} if command.cancels is not None else set())


def _accepted(submit: SubmitJobs, jobs: Iterable[ScanJob]) -> Command:
    return Command(
        id=submit.command_id,
        user_id=submit.user_id,
        state="accepted",
        body=_hash(submit),
        idempotency_key=submit.idempotency_key,
        jobs=tuple(jobs),
    )


def _refused(submit: SubmitJobs, status: int, error: str, rule: Rule) -> Command:
    """Without its Idempotency-Key, which may be used again for the right request."""
    return Command(
        id=submit.command_id, user_id=submit.user_id, state="rejected", status=status, error=error, rule=rule
    )


def _resolved(
    submit: SubmitJobs,
    policies: Mapping[tuple[int, int], Policy],
    subnets: Mapping[tuple[int, int], Subnet],
    scripts: AbstractSet[str],
) -> list[tuple[Policy, Subnet]]:
    policy = policies.get((submit.user_id, submit.policy_id))
    if policy is None:
        raise _RefusedError(f"Policy {submit.policy_id} not found", Rule.OWNER)
    try:
        executable(policy.scan, scripts)
    except PolicyError as error:
        raise _RefusedError(f"Policy {submit.policy_id} must be changed before it can be used: {error}") from error
    if len(set(submit.subnet_ids)) < len(submit.subnet_ids):
        raise _RefusedError("The same subnet is given twice")
    found = [subnets.get((submit.user_id, id_)) for id_ in submit.subnet_ids]
    if missing := [str(id_) for id_, subnet in zip(submit.subnet_ids, found, strict=True) if subnet is None]:
        raise _RefusedError(f"Subnet {', '.join(missing[:10])} not found", Rule.OWNER)
    own = [subnet for subnet in found if subnet is not None]
    if (excludes := sum(len(subnet.exclude) for subnet in own)) > _MAX_EXCLUDES:
        raise _RefusedError(f"The subnets exclude {excludes} networks; those of one request at most {_MAX_EXCLUDES}")
    return [(policy, subnet) for subnet in own]


def _target(subnet: Subnet, rules: TargetRules) -> Target:
    target = Target.parse(subnet.cidr, subnet.exclude)
    if refusal := rules.refusal(target.network):
        raise _RefusedError(f"Subnet {subnet.id}: {refusal}", Rule.TARGETS)
    try:
        return target.without_broadcast()
    except ValueError as error:
        raise _RefusedError(f"Subnet {subnet.id}: {error}", Rule.TARGETS) from error


def _planned(submit: SubmitJobs, subnet: Subnet, target: Target, admitted: Admitted, now: datetime) -> ScanJob:
    planned = plan.plan(admitted.policy, target)
    return ScanJob(
        id=0,
        user_id=submit.user_id,
        policy_id=submit.policy_id,
        subnet_id=subnet.id,
        cidr=subnet.cidr,
        exclude=tuple(map(str, target.exclude)),
        policy=admitted.policy,
        plan=planned,
        seconds_left=planned.estimate,
        partition=-1,
        created_at=now,
        updated_at=now,
        command_id=submit.command_id,
        granted_by=admitted.grant,
        traceparent=submit.traceparent,
    )


def _numbered(job: ScanJob, id_: int) -> ScanJob:
    return create(replace(job, id=id_, partition=SCAN_PROGRESS.partition_of(str(id_))))


def _hash(submit: SubmitJobs) -> str:
    asked = json.dumps([submit.policy_id, submit.subnet_ids])
    return hashlib.sha256(asked.encode()).hexdigest()
