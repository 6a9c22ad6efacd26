"""How jobs are cut."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.testing import scan_job, scan_policy
from scanfleet.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.policy import Preset, ScanPolicy, fill_in
from scanfleet.ports import PortSet
from scanfleet.targets import Target

PORTS = ["80", "1-100", "T:1-20000,U:53", "1-65535", "top:1000", "U:1-30"]


@st.composite
def requests(draw: st.DrawFn) -> tuple[ScanPolicy, Target]:
    policy = fill_in(
        draw(st.sampled_from(Preset)),
        {
            "ports": draw(st.sampled_from(PORTS)),
            "service_detection": draw(st.booleans()),
            "os_detection": draw(st.booleans()),
            "max_rate": draw(st.sampled_from([None, 1, 500])),
        },
    )
    length = draw(st.integers(20, 32))
    network = ip_network("127.9.0.0/16").network_address
    whole = IPv4Network((int(network), length))
    excludable = [sub for new in range(length + 1, min(length + 6, 33)) for sub in whole.subnets(new_prefix=new)]
    chosen = draw(st.lists(st.sampled_from(excludable), max_size=6)) if excludable else []
    kept: list[IPv4Network] = []
    for each in chosen:
        if not any(each.overlaps(other) for other in kept):
            kept.append(each)
    if sum(each.num_addresses for each in kept) == whole.num_addresses:
        kept = []
    return policy, Target(whole, tuple(kept))


def planned(policy: ScanPolicy, target: Target) -> list[Chunk]:
    job = scan_job(cidr=str(target.network), exclude=tuple(map(str, target.exclude)), policy=policy)
    return list(plan.chunks(job, 0))


@settings(max_examples=60, deadline=None)
@given(requests())
def test_the_plan_covers_the_request_and_nothing_else(request_: tuple[ScanPolicy, Target]) -> None:
    """Every address that is not excluded is blank in one chunk for each port block, and the port blocks are the ports."""
    policy, target = request_
    chunks = planned(policy, target)
    blocks: dict[str, set[str]] = {}
    for each in chunks:
        addresses = blocks.setdefault(each.ports, set())
        for index, letter in enumerate(each.outcomes):
            address = str(ip_address(each.first_address) + index)
            if letter == Outcome.BLANK:
                assert address not in addresses
                addresses.add(address)
            else:
                assert letter == Outcome.EXCLUDED
    wanted = {str(each) for each in target.network} - {str(each) for net in target.exclude for each in net}
    assert all(addresses == wanted for addresses in blocks.values())
    sets = [PortSet.parse(text) for text in blocks]
    if policy.port_set.top:
        assert sets == [policy.port_set]
    else:
        probed = [("T", port) for each in sets for low, high in each.tcp for port in range(low, high + 1)]
        probed += [("U", port) for each in sets for low, high in each.udp for port in range(low, high + 1)]
        assert len(probed) == len(set(probed)) == policy.port_set.count
        assert PortSet(*(policy.port_set.tcp, policy.port_set.udp)).count == len(probed)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_chunks_have_fixed_ids_and_bounded_sizes(request_: tuple[ScanPolicy, Target]) -> None:
    """A plan made again is the same, its ids count from 0, its size is what the job says, and no chunk is too large."""
    policy, target = request_
    chunks = planned(policy, target)
    assert chunks == planned(policy, target)
    told = plan.plan(policy, target)
    assert [each.id for each in chunks] == [f"1-{index}" for index in range(told.chunk_count)]
    assert [each.turn for each in chunks] == list(range(told.chunk_count))
    assert told.addresses - told.excluded == target.included
    for each in chunks:
        assert 0 < len(each.outcomes) <= min(MAX_ADDRESSES, told.chunk_addresses)
        assert 0 < each.port_count <= plan.MAX_PORTS
        assert each.port_count == PortSet.parse(each.ports).count
        assert each.estimate > 0
        assert each.needs_raw == policy.needs_raw


@settings(max_examples=60, deadline=None)
@given(requests())
def test_chunks_take_about_five_to_thirty_seconds(request_: tuple[ScanPolicy, Target]) -> None:
    """A chunk is longer than thirty seconds only if one address is, and no shorter than a job's sixteenth needs."""
    policy, target = request_
    for each in planned(policy, target):
        assert each.estimate <= 30 or len(each.outcomes) == 1


def test_both_families_are_cut() -> None:
    """An IPv6 network is planned like an IPv4 one."""
    chunks = planned(scan_policy(ports="1-1000"), Target.parse("::1/128"))
    assert [(each.first_address, each.outcomes) for each in chunks] == [("::1", ".")]
    wide = planned(scan_policy(), Target.parse("2001:db8::/118"))
    assert sum(len(each.outcomes) for each in wide) == 1024
    assert all(ip_address(each.first_address).version == 6 for each in wide)


def test_a_slice_that_is_all_excluded_is_no_chunk() -> None:
    """Nobody is sent to scan nothing, and ids still have no gaps."""
    policy = scan_policy(ports="1-1000", service_detection=True)
    half = Target.parse("127.9.0.0/20", ["127.9.0.0/21"])
    chunks = planned(policy, half)
    assert {each.outcomes for each in chunks} == {Outcome.BLANK * len(chunks[0].outcomes)}
    assert sum(len(each.outcomes) for each in chunks) == 2048
    assert chunks[-1].id == f"1-{len(chunks) - 1}"


def test_a_job_keeps_how_it_was_cut() -> None:
    """The size of a chunk comes from the job, so a release that would cut otherwise makes the same chunks."""
    job = replace(scan_job(cidr="127.9.8.0/29"), chunk_addresses=2)
    assert [each.first_address for each in plan.chunks(job, 0)] == ["127.9.8.0", "127.9.8.2", "127.9.8.4", "127.9.8.6"]


def test_turns_begin_where_they_are_told() -> None:
    """The first chunk has the turn given, and each next one the next."""
    job = replace(scan_job(cidr="127.9.8.0/30"), chunk_addresses=1)
    assert [each.turn for each in plan.chunks(job, 40)] == [40, 41, 42, 43]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"ports": "1-500"}),
        ({}, {"service_detection": True}),
        ({}, {"scripts": ("banner",)}),
        ({}, {"os_detection": True}),
        ({"ports": "1-30"}, {"ports": "U:1-30"}),
        ({"ports": "1-30"}, {"ports": "1-30", "max_rate": 10}),
        ({"timing": 4}, {"timing": 3}),
        ({"timing": 3}, {"timing": 2}),
    ],
)
def test_what_takes_longer_is_estimated_longer(less: dict[str, object], more: dict[str, object]) -> None:
    """More ports, detection, scripts, UDP, lower rates and slower timings raise the estimate, and so do more addresses."""
    one, other = scan_policy(**less), scan_policy(**more)
    assert plan.estimate(other, other.port_set, 10) > plan.estimate(one, one.port_set, 10)
    assert plan.estimate(one, one.port_set, 20) > plan.estimate(one, one.port_set, 10)


@pytest.mark.parametrize(("timing", "delay"), [(0, 300.0), (1, 15.0), (2, 0.4)])
def test_a_slow_timing_gets_the_time_that_it_waits(timing: int, delay: float) -> None:
    """What nmap waits between two probes to one address is in the estimate, once for all that it probes side by side."""
    policy = scan_policy(ports="1-100", timing=timing)
    (chunk, *others) = planned(policy, Target.parse("127.9.8.0/27"))
    assert not others
    assert 100 * delay <= chunk.estimate <= 100 * delay + 30


def test_planning_the_largest_job_makes_no_chunk() -> None:
    """A /16 with every port and a thousand excludes is planned from its map alone."""
    excludes = [f"127.9.{third}.{fourth}/32" for third in range(100) for fourth in range(1, 11)]
    told = plan.plan(fill_in(Preset.FULL, {"timing": 2}), Target.parse("127.9.0.0/16", excludes))
    assert (told.addresses, told.excluded, told.ports) == (65_536, 1_000, 65_535)
    assert told.chunk_count > 100_000


@pytest.mark.parametrize(
    ("cidr", "ports", "timing", "chunks"),
    [
        ("127.9.8.0/24", "top:1000", 3, 16),  # a chunk of 8 s
        ("127.9.8.0/24", "top:100", 4, 2),  # of less than 5 s: more of them would only start nmap more often
        ("127.9.0.0/16", "top:1000", 3, 2048),  # of 16 s: twice as much would be more than 30
    ],
)
def test_a_job_is_shared_by_a_few_workers(cidr: str, ports: str, timing: int, chunks: int) -> None:
    """A job makes sixteen chunks unless they would be shorter than 5 seconds or longer than 30."""
    policy = scan_policy(ports=ports, timing=timing)
    assert plan.plan(policy, Target.parse(cidr, ())).chunk_count == chunks
