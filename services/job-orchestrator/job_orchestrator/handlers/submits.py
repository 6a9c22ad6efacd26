"""Decide on requests for jobs: plan the jobs, or reject the request."""

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
from job_orchestrator.domain.ports import JobRepository, PolicyRepository, SubnetRepository
from job_orchestrator.domain.quotas import QuotaError, Quotas, Request
from job_orchestrator.domain.resources import Policy, Subnet
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.usage import Usages
from scanfleet.contracts.messages import SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.contracts.user_grants import Admitted, GrantError, UserGrants
from scanfleet.errors import Rule
from scanfleet.scanning.policy import PolicyError, executable
from scanfleet.scanning.targets import Target, TargetRules

_MAX_EXCLUDES: Final = 100_000  # of all subnets of one command, so that its document stays below MongoDB's 16 MB


class _RefusedError(Exception):
    """The answer is `status` with this text, because of this rule."""

    def __init__(self, text: str, rule: Rule = Rule.REQUEST, status: int = 400) -> None:
        super().__init__(text)
        self.rule = rule
        self.status = status


class Submits:
    """Decides on submits by what their users may scan and how much they have."""

    def __init__(
        self,
        *,
        jobs: JobRepository,
        policies: PolicyRepository,
        subnets: SubnetRepository,
        rules: TargetRules,
        scripts: AbstractSet[str],
        grants: UserGrants | None,
        quotas: Quotas,
        clock: PlatformTime,
    ) -> None:
        self._jobs = jobs
        self._policies = policies
        self._subnets = subnets
        self._rules = rules
        self._scripts = scripts
        self._grants = grants
        self._quotas = quotas
        self._usages = Usages(jobs, clock)
        self._clock = clock

    async def decide(self, submits: Sequence[SubmitJobs]) -> list[Command]:
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


def _accepted(submit: SubmitJobs, jobs: Iterable[ScanJob]) -> Command:
    return Command(
        id=submit.command_id,
        user_id=submit.user_id,
        state="accepted",
        body=body_hash(submit),
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


def body_hash(submit: SubmitJobs) -> str:
    asked = json.dumps([submit.policy_id, submit.subnet_ids])
    return hashlib.sha256(asked.encode()).hexdigest()
