"""Check and plan one requested scan, for a submit, which creates a job from it, or for an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from job_orchestrator.domain import plan
from job_orchestrator.domain.job import Plan
from job_orchestrator.domain.quotas import QuotaError, Quotas
from scanfleet.contracts.user_grants import Admitted, GrantError, UserGrants
from scanfleet.errors import Rule
from scanfleet.scanning.nmap_options import nmap_options
from scanfleet.scanning.policy import PolicyError, ScanPolicy, executable
from scanfleet.scanning.targets import Target, TargetRules

Part = Literal["cidr", "exclude", "policy"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason to refuse a scan."""

    text: str
    rule: Rule
    status: int = 400
    part: Part | None = None
    """The invalid part of the request; None if it is not a single one."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A scan as its job would be created."""

    target: Target
    admitted: Admitted
    """If no grant permits the scan, the unchanged policy."""

    plan: Plan
    refusals: Sequence[Refusal]
    """Every reason to refuse it, in the order of the checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """The limits of scans on this platform."""

    rules: TargetRules
    scripts: AbstractSet[str]
    grants: UserGrants | None
    quotas: Quotas

    def propose(
        self, user_id: int, roles: AbstractSet[str], policy: ScanPolicy, target: Target, now: datetime
    ) -> Proposal:
        """Check and plan a scan. Its cost does not grow with the number of addresses or chunks."""
        refusals: list[Refusal] = []
        try:
            executable(policy, self.scripts)
        except PolicyError as error:
            text = f"must be changed before it can be used: {error}"
            refusals.append(Refusal(text, Rule.REQUEST, part="policy"))
        if refusal := self.rules.refusal(target.network):
            refusals.append(Refusal(refusal, Rule.TARGETS, part="cidr"))
        try:
            target = target.without_broadcast()
        except ValueError as error:
            refusals.append(Refusal(str(error), Rule.TARGETS, part="exclude"))
        admitted = Admitted("", policy)
        if self.grants is not None:
            try:
                admitted = self.grants.admit(user_id, roles, target.network, policy, now=now, nat64=self.rules.nat64)
            except GrantError as error:
                refusals.append(Refusal(str(error), Rule.GRANT, status=403))
        planned = plan.plan(admitted.policy, target)
        try:
            self.quotas.check_job(planned)
        except QuotaError as error:
            refusals.append(Refusal(str(error), Rule.QUOTA))
        return Proposal(target, admitted, planned, refusals)

    def nmap_options(self, proposal: Proposal) -> Sequence[str]:
        """Return nmap's options for the first chunk; none if the policy cannot be executed.

        The worker has no raw packets unless the chunk needs them.
        """
        try:
            policy = executable(proposal.admitted.policy, self.scripts)
        except PolicyError:
            return ()
        ports = policy.port_set.block(0, proposal.plan.chunk_ports)
        return nmap_options(
            policy,
            ports,
            addresses=min(proposal.plan.chunk_addresses, proposal.target.included),
            family=proposal.target.network.version,
            min_rate=plan.min_rate(policy, ports, proposal.plan.parallel),
            max_rate=plan.nmap_rate(policy, proposal.plan.parallel),
            raw=policy.needs_raw_for(ports),
        )
