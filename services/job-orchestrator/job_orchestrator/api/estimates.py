"""Estimate scans before they are requested."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter

from job_orchestrator.api.resource_rules import POLICIES, SUBNETS, parsed_target
from job_orchestrator.api.state import State, StateDep, TurnDep, mine
from job_orchestrator.domain.proposal import Part, Proposal
from scanfleet.contracts import rest
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.targets import Target
from scanfleet.security.auth import AuthenticatedRoute, Caller, Principal

router = APIRouter(prefix="/api/v1/task", route_class=AuthenticatedRoute)


@router.post("/estimate")
async def estimate_task(body: rest.EstimateBody, caller: Caller, state: StateDep, _turn: TurnDep) -> rest.Estimate:
    policy, target = await _policy(body, caller, state), await _target(body, caller, state)
    proposal = await state.submits.estimate(caller.user_id, caller.roles, policy, target)
    return _view(body, proposal, state.checks.nmap_options(proposal))


async def _policy(body: rest.EstimateBody, caller: Principal, state: State) -> ScanPolicy:
    if body.policy is not None:
        return body.policy.scan(state.checks.scripts)
    return (await mine(state, POLICIES, caller.user_id, body.policy_id or 0)).content


async def _target(body: rest.EstimateBody, caller: Principal, state: State) -> Target:
    if body.cidr is not None:
        return parsed_target(body.cidr, body.exclude)
    subnet = await mine(state, SUBNETS, caller.user_id, body.subnet_id or 0)
    return parsed_target(subnet.content.cidr, subnet.content.exclude)  # a damaged one is a 400 too, as for a submit


def _field(body: rest.EstimateBody, part: Part | None) -> str | None:
    if part is None:
        return None
    if part == "policy":
        return "policy_id" if body.policy is None else "policy"
    return "subnet_id" if body.cidr is None else part


def _view(body: rest.EstimateBody, proposal: Proposal, nmap_options: Sequence[str]) -> rest.Estimate:
    target, ports = proposal.target, proposal.admitted.policy.port_set
    return rest.Estimate(
        addresses=target.network.num_addresses,
        excluded=proposal.plan.excluded,
        exclude=list(target.exclude),
        tcp_ports=ports.tcp_count,
        udp_ports=ports.udp_count,
        probes=target.included * ports.count,
        chunks=proposal.plan.chunk_count,
        estimate_seconds=proposal.plan.estimate,
        needs_raw_packets=proposal.admitted.policy.needs_raw,
        nmap_options=list(nmap_options),
        refusals=[
            rest.EstimateRefusal(rule=each.rule, field=_field(body, each.part), error=each.text)
            for each in proposal.refusals
        ],
    )
