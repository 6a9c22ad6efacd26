"""How jobs are cut."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import IPv4Network, collapse_addresses, ip_address, ip_network
from itertools import accumulate, pairwise
from typing import TypeVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from job_orchestrator.domain import plan
from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.totals import NO_EFFORT, Totals
from job_orchestrator_testing import replanned, scan_job, scan_policy
from scanfleet.scanning.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.scanning.policy import Preset, ScanPolicy, fill_in
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Target

Worked = TypeVar("Worked")

PORTS = ["80", "1-100", "T:1-20000,U:53", "1-65535", "top:1000", "top:8192", "U:1-30", "T:1-3000,U:1-3000"]
LONGEST_SECONDS = 65.0  # of an attempt on several addresses
_FEW = 400  # chunks that are made quickly


@st.composite
def policies(draw: st.DrawFn) -> ScanPolicy:
    max_rate = draw(st.sampled_from([None, 1, 499, 500, 1_000, 7_777, 10_000_000]))
    min_rate = draw(st.sampled_from([None, 1, 300, 5_000]))
    return fill_in(
        draw(st.sampled_from(Preset)),
        {
            "ports": draw(st.sampled_from(PORTS)),
            "technique": draw(st.sampled_from(["auto", "connect", "syn"])),
            "discovery": draw(st.sampled_from(["default", "none"])),
            "service_detection": draw(st.booleans()),
            "os_detection": draw(st.booleans()),
            "timing": draw(st.integers(0, 5)),
            "host_timeout": draw(st.sampled_from([1, 60, 900, 86_400])),
            "max_rate": max_rate,
            "min_rate": min_rate if max_rate is None or min_rate is None or min_rate <= max_rate else None,
        },
    )


@st.composite
def targets(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> Target:
    length = draw(lengths)
    whole = IPv4Network((int(ip_network("127.9.0.0/16").network_address), length))
    excludable = [sub for new in range(length + 1, min(length + 6, 33)) for sub in whole.subnets(new_prefix=new)]
    chosen = draw(st.lists(st.sampled_from(excludable), max_size=6)) if excludable else []
    kept: list[IPv4Network] = []
    for each in chosen:
        if not any(each.overlaps(other) for other in kept):
            kept.append(each)
    if sum(each.num_addresses for each in kept) == whole.num_addresses:
        kept = []
    return Target.parse(str(whole), map(str, kept))


def job_of(policy: ScanPolicy, target: Target) -> ScanJob:
    return scan_job(cidr=str(target.network), exclude=target.exclude, policy=policy)


@st.composite
def jobs(draw: st.DrawFn) -> ScanJob:
    """A job of at most some hundred chunks."""
    policy = draw(policies())
    job = job_of(policy, draw(targets(st.integers(23, 32))))
    return job if job.plan.chunk_count <= _FEW else job_of(policy, Target.parse("127.9.8.8/30", ["127.9.8.9/32"]))


def made(job: ScanJob) -> list[Chunk]:
    return list(plan.chunks(job, 0, min(job.plan.chunk_count, _FEW)))


@settings(max_examples=30, deadline=None)
@given(jobs())
def test_plan_covers_the_request_and_nothing_else(job: ScanJob) -> None:
    """Every address that is not excluded is blank in one chunk for each port block, and the blocks are the ports."""
    chunks = made(job)
    if len(chunks) < job.plan.chunk_count:
        return
    blocks: defaultdict[str, set[str]] = defaultdict(set)
    for each in chunks:
        base = ip_address(each.first_address)
        for index, code in enumerate(each.outcomes):
            address = str(base + index)
            if code == Outcome.BLANK:
                assert address not in blocks[each.ports]
                blocks[each.ports].add(address)
            else:
                assert code == Outcome.EXCLUDED
    target = Target.parse(job.cidr, job.exclude)
    wanted = {str(each) for each in target.network} - {str(each) for net in target.exclude for each in ip_network(net)}
    assert all(addresses == wanted for addresses in blocks.values())
    assert len(blocks) == job.plan.blocks
    assert probed(PortSet.parse(text) for text in blocks) == probed([job.policy.port_set])


def probed(sets: Iterable[PortSet]) -> list[tuple[str, int]]:
    """Each port that is probed, as often as it is; of `top` sets the ranks."""
    found: list[tuple[str, int]] = []
    for each in sets:
        found += [("top", rank) for rank in range(each.above + 1, each.top + 1)]
        found += [("T", port) for low, high in each.tcp for port in range(low, high + 1)]
        found += [("U", port) for low, high in each.udp for port in range(low, high + 1)]
    return sorted(found)


@settings(max_examples=30, deadline=None)
@given(jobs())
def test_blocks_never_mix_protocols(job: ScanJob) -> None:
    """A chunk has TCP ports or UDP ports, TCP first, and needs raw packets for its own ports alone."""
    blocks = list(job.policy.port_set.blocks(job.plan.chunk_ports))
    assert all(not (each.tcp_count and each.udp_count) for each in blocks)
    assert [bool(each.udp_count) for each in blocks] == sorted(bool(each.udp_count) for each in blocks)
    assert len(blocks) == job.plan.blocks
    for each in plan.chunks(job, 0, min(job.plan.chunk_count, 200)):
        assert each.needs_raw == job.policy.needs_raw_for(PortSet.parse(each.ports))


def test_top_ports_are_cut_by_rank() -> None:
    """Blocks of top:N are runs of ranks, and together they are top:N."""
    job = job_of(scan_policy(ports="top:1000", timing=1, host_timeout=900), Target.parse("127.9.8.8/32"))
    blocks = [PortSet.parse(each.ports) for each in made(job)]
    assert len(blocks) > 1
    assert str(blocks[0]) == f"top:{job.plan.chunk_ports}"
    assert str(blocks[1]) == f"top:{job.plan.chunk_ports + 1}-{2 * job.plan.chunk_ports}"
    assert (blocks[0].above, blocks[-1].top) == (0, 1_000)
    assert all(one.top == other.above for one, other in pairwise(blocks))


@pytest.mark.parametrize(("host_timeout", "ports"), [(900, 1), (86_400, 16)])
def test_slowest_timing_has_chunks_within_the_host_timeout(host_timeout: int, ports: int) -> None:
    """At timing 0 a chunk has one address, and one port where discovery alone takes longer than the host timeout."""
    policy = scan_policy(ports="1-16", timing=0, host_timeout=host_timeout)
    job = job_of(policy, Target.parse("127.9.8.8/31"))
    assert [(each.blank, each.port_count) for each in made(job)] == [(1, ports)] * (2 * 16 // ports)
    assert (plan.longest_seconds(policy, PortSet.parse("1"), 1) > host_timeout) is (ports == 1)


@settings(max_examples=50, deadline=None)
@given(policies(), targets(st.integers(16, 32)))
def test_chunks_are_short_even_where_nothing_answers(policy: ScanPolicy, target: Target) -> None:
    """Several addresses take 65 s at most, one no more than that or most of its host timeout, unless it is one port."""
    planned = plan.plan(policy, target)
    for block in policy.port_set.blocks(planned.chunk_ports):
        if planned.chunk_addresses > 1:
            assert plan.longest_seconds(policy, block, planned.chunk_addresses) <= LONGEST_SECONDS
        elif planned.chunk_ports > 1:
            assert plan.longest_seconds(policy, block, 1) <= max(LONGEST_SECONDS, 0.7 * policy.host_timeout)


@settings(max_examples=50, deadline=None)
@given(policies())
def test_rates_of_all_nmaps_stay_within_the_policys(policy: ScanPolicy) -> None:
    """The rates of all nmaps at once add up to max_rate, less a remainder, and no floor is above the limit of its nmap."""
    assert 1 <= plan.width(policy) <= plan.WINDOW
    for parallel in (1, 3, plan.WINDOW):
        rate = plan.nmap_rate(policy, parallel)
        assert (rate is None) is (policy.max_rate is None)
        if policy.max_rate and rate:
            nmaps = min(plan.width(policy), parallel)
            assert policy.max_rate - nmaps < nmaps * rate <= policy.max_rate
        for block in policy.port_set.blocks(plan.MAX_PORTS):
            floor = plan.min_rate(policy, block, parallel)
            assert floor is None or 1 <= floor <= (rate or floor)


@pytest.mark.parametrize("timing", range(6))
def test_udp_has_no_rate_floor_of_its_timing(timing: int) -> None:
    """Probes to UDP ports are never forced, since hosts limit their answers; a policy's min_rate is followed."""
    ports = PortSet.parse("U:1-100")
    assert plan.min_rate(scan_policy(ports="U:1-100", timing=timing), ports) is None
    assert plan.min_rate(scan_policy(ports="U:1-100", timing=timing, min_rate=70), ports) == 70
    assert plan.min_rate(scan_policy(timing=timing), PortSet.parse("1-100")) == plan.FLOORS[timing]


def test_min_rate_is_shared_by_the_nmaps_of_a_job() -> None:
    """Concurrent nmap processes share the job's min_rate; a share is at least the floor of its timing, or all of it."""
    expected = {100: (100, 100), 1_999: (1_999, 1_999), 200_000: (200_000, 2_000), 1_024_000: (1_024_000, 4_000)}
    for rate, (of_one, of_many) in expected.items():
        policy = scan_policy(min_rate=rate)
        assert plan.width(policy) == plan.WINDOW
        assert [plan.min_rate(policy, policy.port_set, slices) for slices in (1, 1_000)] == [of_one, of_many]


@settings(max_examples=100, deadline=None)
@given(policies(), targets(st.integers(22, 32)))
def test_attempts_are_short_at_the_floor_of_their_own_nmap(policy: ScanPolicy, target: Target) -> None:
    """With the `min_rate` that its task carries, a silent chunk of TCP ports takes no longer than planned."""
    job = job_of(policy, target)
    for block in policy.port_set.blocks(job.plan.chunk_ports):
        floor = plan.min_rate(policy, block, job.plan.slice_count)
        if policy.min_rate and floor and policy.timing > 2 and not block.udp_count:
            silent = job.plan.chunk_addresses * 2 * block.tcp_count / floor
            short = LONGEST_SECONDS if job.plan.chunk_addresses > 1 else max(LONGEST_SECONDS, 0.7 * policy.host_timeout)
            assert silent <= short or block.tcp_count == 1


@settings(max_examples=30, deadline=None)
@given(jobs())
def test_chunks_have_fixed_ids_and_bounded_sizes(job: ScanJob) -> None:
    """A plan made again is the same, its ids count from 0, and no chunk is larger than the job's own sizes."""
    chunks = made(job)
    assert chunks == made(job)
    assert [each.id for each in chunks] == [f"1-{index}" for index in range(len(chunks))]
    assert [each.turn for each in chunks] == list(range(len(chunks)))
    assert job.plan.addresses - job.plan.excluded == Target.parse(job.cidr, job.exclude).included
    for each in chunks:
        assert 0 < len(each.outcomes) <= min(MAX_ADDRESSES, job.plan.chunk_addresses)
        assert 0 < each.port_count <= job.plan.chunk_ports <= plan.MAX_PORTS
        assert each.port_count == PortSet.parse(each.ports).count
        assert each.estimate > 0
        assert each.partition == job.partition


@settings(max_examples=30, deadline=None)
@given(jobs())
def test_chunks_take_about_five_to_thirty_seconds(job: ScanJob) -> None:
    """A chunk is expected to take longer than thirty seconds only if one address does."""
    assert all(each.estimate <= 30 or len(each.outcomes) == 1 for each in made(job))


@settings(max_examples=30, deadline=None)
@given(jobs(), st.data())
def test_chunks_of_any_range_equal_those_of_the_whole_plan(job: ScanJob, data: st.DataObject) -> None:
    """Chunks from any index to any other are those of the whole plan, and so are the counts of blanks."""
    chunks = made(job)
    first = data.draw(st.integers(0, len(chunks)))
    end = data.draw(st.integers(first, len(chunks)))
    part = chunks[first:end]
    assert list(plan.chunks(job, first, end)) == part
    assert plan.blanks(job, first, end) == sum(each.blank for each in part)
    wanted = data.draw(st.integers(0, 2_000))
    after = plan.index_after(job, first, wanted)
    if after < len(chunks):
        assert sum(each.blank for each in chunks[first:after]) <= wanted
    if wanted and after + 1 < len(chunks):
        assert sum(each.blank for each in chunks[first : after + 1]) > wanted


# The window


@settings(max_examples=50, deadline=None)
@given(jobs(), st.integers(1, 400), st.integers())
def test_blocks_of_a_slice_are_never_open_together(job: ScanJob, burst: int, seed: int) -> None:
    """In any order of ends, no address is in two open chunks, the window is kept, and each chunk is created once."""
    chance = random.Random(seed)  # noqa: S311 # an order, not a secret
    width = plan.width(job.policy)
    open_: dict[int, Chunk] = {}
    for _ in range(60):
        end = plan.made_up_to(job, len(open_), min(open_, default=None))
        assert job.made <= end <= job.plan.chunk_count
        open_ |= {each.index: each for each in plan.chunks(job, job.made, end)}
        job = replace(job, made=end)
        assert len(open_) <= width
        slices = [each.first_address for each in open_.values()]
        assert len(slices) == len(set(slices))
        if not open_:
            assert job.made == job.plan.chunk_count
            break
        indices = sorted(open_)
        chance.shuffle(indices)
        for index in indices[:burst]:
            del open_[index]


def test_window_is_filled_again_as_chunks_end() -> None:
    """The first window is as wide as it may be, and each chunk that ends makes room for one more."""
    job = job_of(scan_policy(ports="1-1000", service_detection=True), Target.parse("127.9.0.0/16"))
    assert job.plan.chunk_count > 2 * plan.WINDOW
    assert plan.made_up_to(job, 0, None) == plan.WINDOW
    job = replace(job, made=plan.WINDOW)
    assert plan.made_up_to(job, plan.WINDOW, 0) == plan.WINDOW
    assert plan.made_up_to(job, plan.WINDOW - 3, 0) == plan.WINDOW + 3


def test_open_chunk_limits_the_window() -> None:
    """Chunks are created at most 4,096 beyond the first open one, whatever number of others have ended."""
    job = replace(job_of(scan_policy(ports="1-65535"), Target.parse("127.9.0.0/16")), made=4_090)
    assert job.plan.chunk_count > 10_000
    assert plan.made_up_to(job, 1, 0) == min(4_096, job.plan.chunk_count // job.plan.blocks)


@pytest.mark.parametrize(("max_rate", "width"), [(1, 1), (999, 1), (1_000, 2), (5_000, 10), (10_000_000, 256)])
def test_rate_limits_the_width(max_rate: int, width: int) -> None:
    """A job has one nmap for each 500 packets a second of its max_rate, one at least and a window at most."""
    assert plan.width(scan_policy(max_rate=max_rate)) == width


def test_rest_of_a_job_needs_raw_packets_once_its_tcp_ports_are_done() -> None:
    """Chunks of TCP ports go first, so a job needs raw packets from its first UDP chunk on."""
    job = job_of(scan_policy(ports="T:80,U:53"), Target.parse("127.9.8.0/30"))
    assert [each.needs_raw for each in made(job)] == [False, True]
    done = [replace(job, totals=replace(job.totals, done=number)) for number in range(3)]
    assert [plan.needs_raw(each) for each in done] == [False, True, True]


def runs(target: Target, size: int) -> list[tuple[int, str]]:
    """Return the offset and map of each run of addresses that is not completely excluded, by going through all addresses."""
    excluded = {position for start, end in target.holes for position in range(start, end)}
    letters = "".join("x" if position in excluded else "." for position in range(target.network.num_addresses))
    cut = ((offset, letters[offset : offset + size]) for offset in range(0, len(letters), size))
    return [(offset, outcomes) for offset, outcomes in cut if "." in outcomes]


@given(
    st.integers(0, 10),
    st.lists(st.tuples(st.integers(0, 1_023), st.integers(0, 9)), max_size=6),
)
def test_slice_is_cut_from_its_number(size: int, excluded: list[tuple[int, int]]) -> None:
    """Each slice has the offset, the map and the number of addresses before it that going through all addresses finds."""
    base = int(ip_address("127.9.0.0"))
    exclude = [IPv4Network((base + place, 32 - bits), strict=False) for place, bits in excluded]
    assume(sum(each.num_addresses for each in collapse_addresses(exclude)) < 1_024)
    target = Target.parse("127.9.0.0/22", map(str, exclude))
    cut = runs(target, 2**size)
    slices = plan._Slices(target, 2**size)
    assert slices.count == len(cut)
    assert [slices[number] for number in range(len(cut))] == cut
    blanks = [outcomes.count(Outcome.BLANK) for _, outcomes in cut]
    assert [slices.blanks_before(number) for number in range(len(cut) + 1)] == [0, *accumulate(blanks)]


@pytest.mark.proves("G20")
def test_chunks_of_many_large_jobs_cost_little_each() -> None:
    """One chunk of each of 256 jobs on distinct /16 networks, and what it needs, take less than a millisecond each."""
    jobs = [
        job_of(scan_policy(ports="1-1000"), Target.parse(f"10.{number}.0.0/16", [f"10.{number}.9.0/24"]))
        for number in range(256)
    ]
    began = time.process_time()
    for job in jobs:
        (chunk,) = plan.chunks(job, 300, 301)
        assert not plan.needs_raw(replace(job, totals=replace(job.totals, done=chunk.index)))
    assert time.process_time() - began < 0.001 * len(jobs)


def test_chunks_of_a_long_port_list_cost_little_each() -> None:
    """A chunk of the longest list, created alone as another one ends, takes less than a fifth of a millisecond."""
    ports = ",".join(str(port) for port in range(10_001, 14_980, 3))
    job = job_of(scan_policy(ports=ports), Target.parse("127.9.0.0/16"))
    seconds, window = cheapest(lambda: [next(plan.chunks(job, index, index + 1)) for index in range(plan.WINDOW)])
    assert {each.ports for each in window} == {ports}
    assert seconds < 0.0002 * len(window)


# Measured pace


def measured(job: ScanJob, probed: int, seconds: float, *, udp: bool = False) -> ScanJob:
    """The job after a chunk of so many probes of addresses that are up."""
    effort = NO_EFFORT.plus(probed, probed, seconds)
    return replace(job, totals=Totals(done=1, udp=effort) if udp else Totals(done=1, tcp=effort))


def test_finished_chunks_replace_the_estimate() -> None:
    """With a thousand probes done, slot seconds per probe decide what chunks are expected to take, and attempts get."""
    job = job_of(scan_policy(ports="1-100"), Target.parse("127.9.8.0/24"))
    ports = job.policy.port_set
    assert plan.expected(job, ports, 10) == plan.estimate(job.policy, ports, 10)
    few = measured(job, 999, 99.9)
    assert plan.expected(few, ports, 10) == plan.estimate(job.policy, ports, 10)
    known = measured(job, 1_000, 10.0)
    assert plan.expected(known, ports, 10) == pytest.approx(0.1 + 0.01 * 100 * 10)
    chunk = made(known)[0]
    assert plan.attempt_size(known, replace(chunk, outcomes="." * 128)) == 65
    assert plan.attempt_size(measured(job, 1_000, 1e6), chunk) == 1


def test_pace_of_one_protocol_does_not_change_the_estimates_of_the_other() -> None:
    """Fast TCP chunks change neither what UDP chunks are expected to take nor their attempts, and the other way round."""
    job = job_of(scan_policy(ports="T:1-1000,U:1-600", timing=3, discovery="none"), Target.parse("127.9.9.0/29"))
    tcp, udp = (each for each in made(job) if each.index in {0, job.plan.slice_count})
    fast, slow = measured(job, 8_000, 4.0), measured(job, 4_800, 1e6, udp=True)
    for other, chunk in ((fast, udp), (slow, tcp)):
        ports = PortSet.parse(chunk.ports)
        assert plan.expected(other, ports, 8) == plan.estimate(job.policy, ports, 8)
        assert plan.attempt_size(other, replace(chunk, outcomes="." * 8)) == 8


@pytest.mark.parametrize("seconds", [1e-6, 0.01])
def test_expected_seconds_are_at_least_a_tenth_of_the_estimate(seconds: float) -> None:
    """However fast the finished chunks were, a chunk is expected to take a tenth of its estimate: hosts differ."""
    job = measured(job_of(scan_policy(ports="1-1000"), Target.parse("127.9.8.0/24")), 100_000, seconds)
    ports = job.policy.port_set
    assert plan.expected(job, ports, 16) == plan.estimate(job.policy, ports, 16) / 10


def test_attempt_is_as_large_as_the_chunks_limit() -> None:
    """Without a limit an attempt gets all blanks, with one so many."""
    job = job_of(scan_policy(), Target.parse("127.9.8.0/28"))
    (chunk,) = made(job)
    assert plan.attempt_size(job, chunk) == 16
    assert plan.attempt_size(job, replace(chunk, limit=3)) == 3
    assert plan.attempt_size(job, replace(chunk, limit=30)) == 16


# Single plans


def test_both_families_are_cut() -> None:
    """An IPv6 network is planned like an IPv4 one."""
    chunks = made(job_of(scan_policy(ports="1-1000"), Target.parse("::1/128")))
    assert [(each.first_address, each.outcomes) for each in chunks] == [("::1", ".")]
    wide = made(job_of(scan_policy(), Target.parse("2001:db8::/118")))
    assert sum(len(each.outcomes) for each in wide) == 1024
    assert all(ip_address(each.first_address).version == 6 for each in wide)


def test_slice_that_is_all_excluded_makes_no_chunk() -> None:
    """A slice without blanks is left out, and ids still have no gaps."""
    policy = scan_policy(ports="1-1000", service_detection=True)
    chunks = made(job_of(policy, Target.parse("127.9.0.0/20", ["127.9.0.0/21"])))
    assert {each.outcomes for each in chunks} == {Outcome.BLANK * len(chunks[0].outcomes)}
    assert sum(len(each.outcomes) for each in chunks) == 2048
    assert chunks[-1].id == f"1-{len(chunks) - 1}"


def test_plan_of_a_job_is_kept() -> None:
    """The sizes of a chunk come from the job, so a release with another algorithm creates the same chunks."""
    job = scan_job(cidr="127.9.8.0/29", chunk_addresses=2, chunk_count=4)
    addresses = ["127.9.8.0", "127.9.8.2", "127.9.8.4", "127.9.8.6"]
    assert [each.first_address for each in plan.chunks(job, 0, 4)] == addresses
    blockwise = replanned(job, chunk_addresses=4, chunk_ports=1, blocks=2)
    cut = [(each.first_address, each.ports) for each in plan.chunks(blockwise, 0, 4)]
    assert cut == [("127.9.8.0", "22"), ("127.9.8.4", "22"), ("127.9.8.0", "80"), ("127.9.8.4", "80")]
    old = [(each.first_address, each.ports) for each in plan.chunks(replanned(blockwise, blockwise=False), 0, 4)]
    assert old == [("127.9.8.0", "22"), ("127.9.8.0", "80"), ("127.9.8.4", "22"), ("127.9.8.4", "80")]


def test_turns_begin_at_the_jobs() -> None:
    """The first chunk has the turn of its job, and each next one the next."""
    job = scan_job(cidr="127.9.8.0/30", chunk_addresses=1, chunk_count=4, turn=40)
    assert [each.turn for each in plan.chunks(job, 0, 4)] == [40, 41, 42, 43]


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
def test_estimate_grows_with_the_work(less: dict[str, object], more: dict[str, object]) -> None:
    """More ports, detection, scripts, UDP, lower rates and slower timings raise the estimate, and so do more addresses."""
    one, other = scan_policy(**less), scan_policy(**more)
    assert plan.estimate(other, other.port_set, 10) > plan.estimate(one, one.port_set, 10)
    assert plan.estimate(one, one.port_set, 20) > plan.estimate(one, one.port_set, 10)


@pytest.mark.parametrize("max_rate", [100, 600, 5_000, 1_000_000])
def test_estimate_uses_the_rate_of_each_nmap(max_rate: int) -> None:
    """The nmap processes of a job share its `max_rate`, so none is expected to be faster than its share."""
    policy = scan_policy(ports="1-1000", max_rate=max_rate)
    nmap_rate = plan.nmap_rate(policy)
    assert nmap_rate is not None
    assert plan.estimate(policy, policy.port_set, 10) >= 10 * 1_000 / nmap_rate


@pytest.mark.parametrize(("timing", "delay"), [(0, 300.0), (1, 15.0), (2, 0.4)])
def test_slow_timing_is_estimated_with_its_waits(timing: int, delay: float) -> None:
    """The estimate includes nmap's delay between two probes to an address, once for all addresses probed in parallel."""
    policy = scan_policy(ports="1-100", timing=timing)
    assert 100 * delay <= plan.estimate(policy, policy.port_set, 32) <= 100 * delay + 30


@pytest.mark.parametrize(("cidr", "ports", "timing"), [("127.9.8.0/24", "top:1000", 3), ("127.9.8.0/24", "top:100", 4)])
def test_job_is_shared_by_a_few_workers(cidr: str, ports: str, timing: int) -> None:
    """A job makes sixteen chunks or more, unless they would be shorter than 5 seconds."""
    policy = scan_policy(ports=ports, timing=timing)
    planned = plan.plan(policy, Target.parse(cidr, ()))
    assert planned.chunk_count >= 16 or plan.estimate(policy, policy.port_set, planned.chunk_addresses) <= 5


@settings(max_examples=60, deadline=None)
@given(targets(st.integers(20, 32)), st.integers(0, 12))
def test_number_of_slices_equals_the_runs_of_addresses(target: Target, power: int) -> None:
    """The number of slices follows from the networks as it does from the outcome map, also for slices larger than the subnet."""
    merged = Target.parse(str(target.network), target.exclude)
    assert plan._Slices(merged, 2**power).count == len(runs(merged, 2**power))


@settings(max_examples=60, deadline=None)
@given(targets(st.integers(20, 32)), st.integers(0, 6), st.integers(-1, 5_000))
def test_slices_before_an_offset_are_those_that_begin_before_it(target: Target, power: int, offset: int) -> None:
    """The number of slices before an offset follows from the networks as it does from the outcome map."""
    merged = Target.parse(str(target.network), target.exclude)
    slices = plan._Slices(merged, 2**power)
    assert slices.before(offset) == sum(begin < offset for begin, _ in runs(merged, 2**power))


def cheapest(work: Callable[[], Worked]) -> tuple[float, Worked]:
    """Run `work` three times without caches; return the least CPU seconds and the result. Other processes add to the rest."""
    seconds = []
    for _ in range(3):
        plan._slices_of.cache_clear()
        plan._block.cache_clear()
        began = time.process_time()
        worked = work()
        seconds.append(time.process_time() - began)
    return min(seconds), worked


def test_plan_largest_job_takes_less_than_a_tenth_of_a_second() -> None:
    """A /16 with every port at timing 0 and a thousand excludes is planned from its map alone, and so is its window."""
    excludes = [f"127.9.{third}.{fourth}/32" for third in range(100) for fourth in range(1, 11)]
    policy, target = fill_in(Preset.FULL, {"timing": 0}), Target.parse("127.9.0.0/16", excludes)
    seconds, planned = cheapest(lambda: plan.plan(policy, target))
    assert seconds < 0.1
    assert (planned.addresses, planned.excluded, planned.ports) == (65_536, 1_000, 65_535)
    assert planned.chunk_count > 100_000
    job = job_of(policy, target)
    seconds, window = cheapest(lambda: list(plan.chunks(job, 0, plan.made_up_to(job, 0, None))))
    assert seconds < 0.1
    assert len(window) == plan.WINDOW
