"""Decide on requests for jobs: plan the jobs, or reject the request; and estimate them beforehand."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime
from typing import Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.job import ScanJob, create
from job_orchestrator.domain.ports import DispatchRepository, JobRepository, PolicyRepository, SubnetRepository
from job_orchestrator.domain.proposal import Checks, Proposal, Refusal
from job_orchestrator.domain.quotas import QuotaError, Request, Usage
from job_orchestrator.domain.resources import Policy, Subnet
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.commands.user_cache import UserCache
from scanfleet.contracts.messages import SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.contracts.rest import MAX_EXCLUDES
from scanfleet.errors import Rule
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.targets import Target

_MAX_CHUNKS: Final = 1_000  # created together with the jobs of a batch: about 50 ms; the rest is created afterwards
_MAX_EXCLUDES: Final = 100_000  # of all subnets of one command, so that its document stays below MongoDB's 16 MB


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


class Submits:
    """Decides on submits by the limits and quotas of their users."""

    def __init__(
        self,
        *,
        jobs: JobRepository,
        dispatch: DispatchRepository,
        policies: PolicyRepository,
        subnets: SubnetRepository,
        checks: Checks,
        clock: PlatformTime,
    ) -> None:
        self._jobs = jobs
        self._policies = policies
        self._subnets = subnets
        self._checks = checks
        self._usages = UserCache(jobs.usage, Usage(), clock)
        self._first_turns = UserCache(dispatch.first_turns, 0, clock)  # they order only the jobs of one user
        self._clock = clock

    async def decide(self, submits: Sequence[SubmitJobs]) -> list[Command]:
        """Return the command to insert for each submit: accepted with all of its jobs, or rejected."""
        if not submits:
            return []
        refused = {id_: _over_quota(error) for id_, error in (await self._too_many(submits)).items()}
        refused |= await self._too_large([each for each in submits if each.command_id not in refused])
        within = [submit for submit in submits if submit.command_id not in refused]
        above = [submit for submit in submits if submit.command_id in refused]
        return [*await self._decide(within), *(_refused(each, refused[each.command_id]) for each in above)]

    async def _decide(self, submits: Sequence[SubmitJobs]) -> list[Command]:
        if not submits:
            return []
        users = {submit.user_id for submit in submits}
        # The ids are allocated before the submits are checked, so that those of rejected submits remain unused.
        policies, subnets, taken, turns = await asyncio.gather(
            self._policies.get({(submit.user_id, submit.policy_id) for submit in submits}),
            self._subnets.get({(submit.user_id, id_) for submit in submits for id_ in submit.subnet_ids}),
            self._jobs.take_ids(sum(len(submit.subnet_ids) for submit in submits)),
            self._first_turns.of(users),
        )
        decided = [await self._check(submit, policies, subnets) for submit in submits]
        ids = iter(taken)
        refusals = await self._refusals(submits, decided)
        commands: list[Command] = []
        left = _MAX_CHUNKS
        for submit, each, refusal in zip(submits, decided, refusals, strict=True):
            if isinstance(each, Command):
                commands.append(each)
            elif refusal:
                commands.append(_refused(submit, _over_quota(refusal)))
            else:
                jobs: list[ScanJob] = []
                for job in each:
                    jobs.append(_numbered(job, next(ids), turns[job.user_id], left))
                    left -= jobs[-1].made
                commands.append(_accepted(submit, jobs))
        return commands

    async def _too_many(self, submits: Sequence[SubmitJobs]) -> Mapping[str, QuotaError]:
        """Return the quota error of each submit of a user without room for its jobs, before any of them is planned."""
        errors = self._jobs_above(submits, await self._usages.of({submit.user_id for submit in submits}))
        again = [submit for submit in submits if submit.command_id in errors]
        if not any(error.temporary for error in errors.values()):
            return errors
        return self._jobs_above(again, await self._usages.of({submit.user_id for submit in again}, fresh=True))

    def _jobs_above(self, submits: Iterable[SubmitJobs], usage: Mapping[int, Usage]) -> Mapping[str, QuotaError]:
        errors: dict[str, QuotaError] = {}
        for submit in submits:
            try:
                self._checks.quotas.check_jobs(usage[submit.user_id], len(submit.subnet_ids))
            except QuotaError as error:
                errors[submit.command_id] = error
        return errors

    async def _too_large(self, submits: Iterable[SubmitJobs]) -> Mapping[str, Refusal]:
        """Return the refusal of each submit that excludes too many networks, before its subnets, up to 20 MB, are read."""
        large = [submit for submit in submits if len(submit.subnet_ids) * MAX_EXCLUDES > _MAX_EXCLUDES]
        counts = await asyncio.gather(
            *(self._subnets.count_excludes(submit.user_id, submit.subnet_ids) for submit in large)
        )
        return {
            submit.command_id: _too_many_excludes(count)
            for submit, count in zip(large, counts, strict=True)
            if count > _MAX_EXCLUDES
        }

    async def estimate(self, user_id: int, roles: AbstractSet[str], policy: ScanPolicy, target: Target) -> Proposal:
        """Return the result that a submit of this scan would have, with every reason to refuse it; store nothing.

        Raises:
            DependencyError: the database is unavailable.
        """
        proposal = self._checks.propose(user_id, roles, policy, target, self._clock.now())
        usage = await self._jobs.usage({user_id})
        try:
            self._checks.quotas.check_user(usage.get(user_id, Usage()), [proposal.plan])
        except QuotaError as error:
            return replace(proposal, refusals=[*proposal.refusals, _over_quota(error)])
        return proposal

    async def _refusals(
        self,
        submits: Sequence[SubmitJobs],
        decided: Sequence[Command | list[ScanJob]],
    ) -> Sequence[QuotaError | None]:
        """Return the quota error of each request. Cached usage may admit a request; a refusal uses a fresh read."""
        users = {submit.user_id for submit in submits}
        requests = [
            Request(submit.user_id, submit.idempotency_key, [job.plan for job in each])
            for submit, each in zip(submits, decided, strict=True)
            if not isinstance(each, Command)
        ]
        quotas = self._checks.quotas
        admission = quotas.admit(await self._usages.of(users), requests)
        if admission.temporary:
            admission = quotas.admit(await self._usages.of(users, fresh=True), requests)
        self._usages.note(admission.usage)
        refusals = iter(admission.refusals)
        return [None if isinstance(each, Command) else next(refusals) for each in decided]

    async def _check(
        self,
        submit: SubmitJobs,
        policies: Mapping[tuple[int, int], Policy],
        subnets: Mapping[tuple[int, int], Subnet],
    ) -> Command | list[ScanJob]:
        """Return the jobs, which do not have ids yet, or the rejection."""
        jobs: list[ScanJob] = []
        roles, now = frozenset(submit.roles), self._clock.now()
        try:
            for policy, subnet in _resolved(submit, policies, subnets):
                proposal = self._checks.propose(submit.user_id, roles, policy.content, _target(subnet), now)
                jobs.append(_planned(submit, subnet, proposal, now))
                await asyncio.sleep(0)  # a command may have a thousand subnets: let other tasks run
        except _RefusedError as error:
            return _refused(submit, error.refusal)
        return jobs


def _over_quota(error: QuotaError) -> Refusal:
    return Refusal(str(error), Rule.QUOTA, status=429 if error.temporary else 400)


def _too_many_excludes(count: int) -> Refusal:
    text = f"The subnets exclude {count} networks; those of one request at most {_MAX_EXCLUDES}"
    return Refusal(text, Rule.REQUEST)


def _accepted(submit: SubmitJobs, jobs: Iterable[ScanJob]) -> Command:
    return Command(
        id=submit.command_id,
        user_id=submit.user_id,
        state="accepted",
        body=body_hash(submit),
        idempotency_key=submit.idempotency_key,
        jobs=tuple(jobs),
    )


def _refused(submit: SubmitJobs, refusal: Refusal) -> Command:
    """Return the rejection, without the Idempotency-Key, which may be used again for the corrected request."""
    return Command(
        id=submit.command_id,
        user_id=submit.user_id,
        state="rejected",
        status=refusal.status,
        error=refusal.text,
        rule=refusal.rule,
    )


def _resolved(
    submit: SubmitJobs,
    policies: Mapping[tuple[int, int], Policy],
    subnets: Mapping[tuple[int, int], Subnet],
) -> list[tuple[Policy, Subnet]]:
    policy = policies.get((submit.user_id, submit.policy_id))
    if policy is None:
        raise _RefusedError(Refusal(f"Policy {submit.policy_id} not found", Rule.OWNER))
    if len(set(submit.subnet_ids)) < len(submit.subnet_ids):
        raise _RefusedError(Refusal("The same subnet is given twice", Rule.REQUEST))
    found = [subnets.get((submit.user_id, id_)) for id_ in submit.subnet_ids]
    if missing := [str(id_) for id_, subnet in zip(submit.subnet_ids, found, strict=True) if subnet is None]:
        raise _RefusedError(Refusal(f"Subnet {', '.join(missing[:10])} not found", Rule.OWNER))
    own = [subnet for subnet in found if subnet is not None]
    if (excludes := sum(len(subnet.content.exclude) for subnet in own)) > _MAX_EXCLUDES:
        raise _RefusedError(_too_many_excludes(excludes))
    return [(policy, subnet) for subnet in own]


def _target(subnet: Subnet) -> Target:
    try:
        return Target.parse(subnet.content.cidr, subnet.content.exclude)
    except ValueError as error:  # a damaged subnet must not stop the other submits
        raise _RefusedError(Refusal(f"Subnet {subnet.id} must be corrected: {error}", Rule.TARGETS)) from error


def _planned(submit: SubmitJobs, subnet: Subnet, proposal: Proposal, now: datetime) -> ScanJob:
    if proposal.refusals:
        refusal = proposal.refusals[0]
        about = f"Policy {submit.policy_id} " if refusal.part == "policy" else f"Subnet {subnet.id}: "
        raise _RefusedError(replace(refusal, text=about + refusal.text))
    return ScanJob(
        id=0,
        user_id=submit.user_id,
        policy_id=submit.policy_id,
        subnet_id=subnet.id,
        cidr=subnet.content.cidr,
        exclude=proposal.target.exclude,
        policy=proposal.admitted.policy,
        plan=proposal.plan,
        seconds_left=proposal.plan.estimate,
        partition=-1,
        created_at=now,
        updated_at=now,
        command_id=submit.command_id,
        granted_by=proposal.admitted.grant,
        traceparent=submit.traceparent,
    )


def _numbered(job: ScanJob, id_: int, turn: int, most: int) -> ScanJob:
    """Return the job with its id, and its first chunks counted as created unless there are more than `most`.

    They are not counted either if a second window would do harm, which a replica of release 0.2 creates if it reads the
    job before its chunks exist: if the window keeps the job to its `max_rate`, or blocks of an address apart.
    """
    partition, window = SCAN_PROGRESS.partition_of(str(id_)), plan.made_up_to(job, 0, None)
    may_grow = job.policy.max_rate is None and job.plan.blocks == 1
    made = window if window <= most and may_grow else 0
    return create(replace(job, id=id_, partition=partition, turn=turn, made=made))


def body_hash(submit: SubmitJobs) -> str:
    asked = json.dumps([submit.policy_id, submit.subnet_ids])
    return hashlib.sha256(asked.encode()).hexdigest()
