"""Estimates have the numbers and errors of a submit, and store nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI

from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.resources import ScanTarget
from job_orchestrator_testing import MemoryStore, Simulation, scan_policy
from job_orchestrator_testing.api import app_of, state_of
from scanfleet.contracts.messages import CommandRejected
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.targets import TargetRules, parse_network
from scanfleet.security.auth import InternalTokens, InternalVerifier, Principal
from scanfleet.services import ORCHESTRATOR

CALLER = Principal(7)
KEY = Ed25519PrivateKey.generate()
TOKENS = InternalTokens(KEY, ORCHESTRATOR)
RULES = TargetRules((parse_network("127.0.0.0/8"), parse_network("10.0.0.0/8")), max_addresses=65_536)
GRANTS = UserGrants.model_validate(
    {
        "grants": [
            {
                "name": "site",
                "users": [7],
                "networks": ["127.9.0.0/16", "10.9.0.0/16"],
                "max_rate": 400,
                "max_timing": 4,
            },
            {"name": "ops", "roles": ["ops"], "networks": ["127.8.0.0/16"]},
        ]
    }
)
POLICY = {"preset": "quick", "ports": "T:22,80,U:53"}


def app(simulation: Simulation) -> FastAPI:
    return app_of(state_of(simulation), InternalVerifier([KEY.public_key()], ORCHESTRATOR))


async def estimate(
    simulation: Simulation, body: object, *, of: FastAPI | None = None, caller: Principal = CALLER, status: int = 200
) -> Any:
    """The answer to this body; of an error its text."""
    bearer = {"Authorization": TOKENS.bearer(caller, with_roles=True)}
    transport = httpx2.ASGITransport(of or app(simulation))
    async with httpx2.AsyncClient(transport=transport, base_url="http://orchestrator") as http:
        answer = await http.post("/api/v1/task/estimate", json=body, headers=bearer)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def simulation_with(**how: Any) -> Simulation:
    return Simulation(MemoryStore(), **{"rules": RULES} | how)


def reasons(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(each["rule"], each["field"]) for each in answer["refusals"]]


@pytest.mark.parametrize(
    ("cidr", "policy"),
    [
        ("127.9.8.0/24", scan_policy()),
        ("10.9.8.0/22", scan_policy(ports="1-10000", timing=2)),
        ("10.9.8.1/32", scan_policy(ports="T:1-9000,U:53", service_detection=True)),
    ],
)
async def test_estimate_is_the_plan_of_the_job_that_a_submit_makes(cidr: str, policy: ScanPolicy) -> None:
    """Numbers and excluded networks, the broadcast address among them, are those of the job, whose grant lowers its rate."""
    simulation = simulation_with(grants=GRANTS)
    policy_id, (subnet_id,) = await simulation.add(cidr, policy=policy)
    answer = await estimate(simulation, {"subnet_id": subnet_id, "policy_id": policy_id})
    command = await simulation.send(policy_id, [subnet_id])
    await simulation.settle()
    job = (await simulation.store.jobs.get([simulation.accepted(command)[0].id])).popitem()[1]
    ports = policy.port_set
    assert job.policy.max_rate == 400
    assert "--max-rate 400" in " ".join(answer.pop("nmap_options"))
    assert answer == {
        "addresses": job.plan.addresses,
        "excluded": job.plan.excluded,
        "exclude": list(job.exclude),
        "tcp_ports": ports.tcp_count,
        "udp_ports": ports.udp_count,
        "probes": (job.plan.addresses - job.plan.excluded) * job.plan.ports,
        "chunks": job.plan.chunk_count,
        "estimate_seconds": job.plan.estimate,
        "needs_raw_packets": bool(ports.udp_count),
        "refusals": [],
    }


async def test_estimate_has_the_options_of_the_first_nmap() -> None:
    """They are for the first chunk: the ports of its block, and raw packets only where it needs them."""
    body = {"cidr": "10.9.8.0/30", "policy": {"preset": "quick", "ports": "T:1-9000,U:53", "scripts": ["banner"]}}
    options = " ".join((await estimate(simulation_with(), body))["nmap_options"])
    assert options == (
        "-v -n -oX - --stats-every 1s --unprivileged -sT -p 1-8192 --script banner -T4 --min-rate 512 --max-retries 10 "
        "--host-timeout 900s --min-hostgroup 64 --max-hostgroup 64"
    )
    answer = await estimate(simulation_with(), {"cidr": "10.9.8.0/30", "policy": POLICY | {"ports": "U:53"}})
    assert answer["nmap_options"][6:10] == ["--privileged", "-sU", "-p", "U:53"]


async def test_estimate_of_networks_and_values_needs_no_stored_object() -> None:
    """A network with excludes and the values of a policy are estimated as they are given; nothing is stored or recorded."""
    simulation = simulation_with()
    exclude = ["10.9.8.128/25", "10.9.8.0/26", "10.9.8.64/26", "10.1.0.0/16"]
    answer = await estimate(simulation, {"cidr": "10.9.8.0/23", "exclude": exclude, "policy": POLICY})
    assert (answer["addresses"], answer["excluded"]) == (512, 257)
    assert answer["exclude"] == ["10.9.8.0/24", "10.9.9.255/32"]
    assert (answer["tcp_ports"], answer["udp_ports"], answer["probes"]) == (2, 1, 255 * 3)
    assert answer["needs_raw_packets"]
    assert await simulation.store.jobs.page(None, set(), 0, 10) == ([], 0)
    assert await simulation.store.audit.page(0, 10) == ([], 0)
    assert [*await simulation.store.jobs.take_ids(1), *await simulation.store.subnets.take_ids()] == [1, 1]


ALL_BUT_BROADCAST = ("10.9.8.0/31", "10.9.8.2/32")
REFUSED: dict[str, tuple[str, ScanPolicy, dict[str, Any]]] = {
    "targets": ("192.0.2.0/30", scan_policy(), {}),
    "exclude": ("10.9.8.0/30", scan_policy(), {}),
    "grant": ("127.9.8.0/30", scan_policy(timing=5), {"grants": GRANTS}),
    "policy": ("127.9.8.0/30", ScanPolicy(scripts=("brute",)), {}),
    "quota of a job": ("127.9.8.0/24", scan_policy(ports="1-1000"), {"quotas": Quotas(probes_per_job=1_000)}),
    "quota of a user": ("127.9.8.0/24", scan_policy(), {"quotas": Quotas(unfinished_jobs_per_user=0)}),
}
FIELDS = {"targets": "subnet_id", "exclude": "subnet_id", "policy": "policy_id"}


@pytest.mark.parametrize("which", REFUSED)
async def test_estimate_refuses_by_the_sentence_of_the_submit(which: str) -> None:
    """Rule and reason are those of the submit's rejection, with the invalid field."""
    cidr, policy, how = REFUSED[which]
    exclude = ALL_BUT_BROADCAST if which == "exclude" else ()
    simulation = simulation_with(**how)
    policy_id, (subnet_id,) = await simulation.add(cidr, policy=policy, exclude=exclude)
    (refusal,) = (await estimate(simulation, {"subnet_id": subnet_id, "policy_id": policy_id}))["refusals"]
    command = await simulation.send(policy_id, [subnet_id])
    await simulation.settle()
    (reply,) = simulation.replies(command)
    assert isinstance(reply, CommandRejected)
    assert refusal["rule"] == reply.rule
    assert reply.error.removeprefix(f"Subnet {subnet_id}: ").removeprefix(f"Policy {policy_id} ") == refusal["error"]
    assert refusal["field"] == FIELDS.get(which)


async def test_estimate_has_every_reason() -> None:
    """A scan that several rules refuse has all reasons in the order of the checks, and still its numbers."""
    simulation = simulation_with(grants=GRANTS, quotas=Quotas(probes_per_job=1_000, unfinished_jobs_per_user=0))
    answer = await estimate(simulation, {"cidr": "192.0.2.0/24", "policy": POLICY | {"timing": 5, "ports": "1-1000"}})
    assert reasons(answer) == [("targets", "cidr"), ("grant", None), ("quota", None), ("quota", None)]
    assert answer["probes"] == 255_000


async def test_estimate_uses_the_roles_of_the_token() -> None:
    """The grant of a role permits the scan of a caller whose token has the role, and of no other."""
    simulation, body = simulation_with(grants=GRANTS), {"cidr": "127.8.1.0/30", "policy": POLICY}
    assert reasons(await estimate(simulation, body)) == [("grant", None)]
    assert reasons(await estimate(simulation, body, caller=Principal(7, roles=frozenset({"ops"})))) == []


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({}, 400, "give either subnet_id or cidr"),
        ({"subnet_id": 1, "cidr": "127.9.8.0/30", "policy": POLICY}, 400, "give either subnet_id or cidr"),
        ({"cidr": "127.9.8.0/30"}, 400, "give either policy_id or policy"),
        ({"subnet_id": 1, "exclude": ["127.9.8.1"], "policy": POLICY}, 400, "exclude needs cidr: a subnet has its own"),
        ({"cidr": "127.9.8.0/30", "policy": POLICY | {"name": "x"}}, 400, "policy: unknown fields: name"),
        ({"cidr": "127.9.8.1/30", "policy": POLICY}, 400, "cidr: 127.9.8.1/30 has host bits set"),
        ({"cidr": "127.9.8.0/30", "exclude": ["x"], "policy": POLICY}, 400, "exclude: 'x' is not a network"),
        ({"cidr": "127.9.8.0/30", "exclude": ["127.9.8.0/29"], "policy": POLICY}, 400, "exclude: every address of"),
        ({"cidr": "127.9.8.0/30", "policy": {"scripts": ["brute"]}}, 400, "scripts.0: brute is not one of the allowed"),
        ({"subnet_id": 2, "policy": POLICY}, 404, "Subnet not found"),
        ({"cidr": "127.9.8.0/30", "policy_id": 2}, 404, "Policy not found"),
    ],
)
async def test_estimate_of_an_invalid_request_is_refused(body: object, status: int, error: str) -> None:
    """A malformed value is a 400 that begins with its field, and the id of an object of another user or none a 404."""
    simulation = simulation_with()
    await simulation.add("127.9.8.0/30")
    assert (await estimate(simulation, body, status=status)).startswith(error)


async def test_estimate_of_a_subnet_with_a_damaged_network_is_refused() -> None:
    """A stored network that cannot be parsed is an error of the request, as for a submit."""
    simulation = simulation_with()
    policy_id, (subnet_id,) = await simulation.add("127.9.8.0/24")
    key = 7, subnet_id
    subnet = (await simulation.store.subnets.get([key]))[key]
    await simulation.store.subnets.replace(replace(subnet, content=ScanTarget("127.9.8.0/33")))
    error = await estimate(simulation, {"subnet_id": subnet_id, "policy_id": policy_id}, status=400)
    assert error.startswith("cidr: ")


async def test_estimate_of_another_users_objects_is_404() -> None:
    """A caller learns nothing about subnets and policies of others."""
    simulation = simulation_with()
    policy_id, (subnet_id,) = await simulation.add("127.9.8.0/30")
    for body in ({"subnet_id": subnet_id, "policy": POLICY}, {"cidr": "127.9.8.0/30", "policy_id": policy_id}):
        await estimate(simulation, body, caller=Principal(8), status=404)


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "::/0"])
async def test_estimate_of_the_largest_scan_takes_less_than_a_tenth_of_a_second(cidr: str) -> None:
    """All ports of a /8, or of all of IPv6, with a thousand excludes are counted from the networks, whatever the rules allow."""
    simulation = simulation_with(rules=TargetRules((parse_network("10.0.0.0/8"),), max_addresses=2**24))
    exclude = [f"10.{second}.{third}.1" for second in range(10) for third in range(100)]
    body = {"cidr": cidr, "exclude": exclude, "policy": {"ports": "1-65535", "timing": 0}}
    whole, seconds = app(simulation), []
    for _ in range(4):  # the least, since other processes add to the rest
        began = time.process_time()
        answer = await estimate(simulation, body, of=whole)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1
    included = answer["addresses"] - answer["excluded"]
    assert (answer["tcp_ports"], answer["probes"]) == (65_535, included * 65_535)
    assert answer["excluded"] == (1_001 if cidr == "10.0.0.0/8" else 0)
    assert ("quota", None) in reasons(answer)
