"""How a job is cut into chunks: a pure function of its snapshot, so that every replica makes the same chunks.

A chunk is one block of the policy's ports on one slice of the subnet's addresses. They are numbered block by block: all
slices of the first block, then all of the second. `made_up_to` keeps two blocks of one slice from being open together, so
that no address is scanned by two nmaps of its job at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import ScanJob
from scanfleet.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.policy import FLOOR_OF_ADDRESS, GROUP_HOSTS, ScanPolicy
from scanfleet.ports import PortSet
from scanfleet.targets import Target, parse_network

MAX_PORTS: Final = 8_192  # of a chunk: all of them open on one host still fit in one message
WINDOW: Final = 256  # chunks of a job that are made and not yet ended: enough for every slot of a large fleet
_AHEAD: Final = 4_096  # chunks between the first that has not ended and the last made: what a look at progress may read

# Measured with nmap 7.93 in network namespaces. `FLOORS` are the probes a second by timing below which silence must not
# slow an nmap: all open ports are found where 75 % of hosts drop, 2 % of packets are lost or answers are limited. UDP has
# none, since a host limits the answers of its closed ports, and probes that come faster would find them open|filtered.
FLOORS: Final = (None, None, None, 500, 2_000, 2_500)
_TRIES: Final = 2  # probes to a port that does not answer
_DISCOVERY_TRIES: Final = 8  # probes to an address that does not answer, of raw host discovery; without raw packets 4
_SILENT_WAITS: Final = (300.0, 15.0, 1.0)  # seconds after each such probe of timings 0 to 2, which have one under way
_DELAYS: Final = (300.0, 15.0, 0.4)  # seconds between two probes of these to an address that answers
_SILENT_UDP_PER_SECOND: Final = (10, 10, 10, 10, 20, 37)  # probes by timing where no port answers
_LIMITED_UDP_PER_SECOND: Final = 1  # closed ports of a host that limits ICMP, as Linux does

# Slot seconds that are expected on a network that answers, until the job's own chunks have shown better.
_START: Final = 0.1  # nmap reading its tables; less where small chunks share one
_PER_SECOND: Final = (1_000, 1_000, 1_000, 2_000, 4_000, 6_000)  # TCP probes by timing
_UDP_PER_SECOND: Final = 50
_SERVICE: Final = 0.1  # of an address: version probes wait for banners
_SCRIPTS: Final = 0.2
_OS: Final = 0.1

ATTEMPT_SECONDS: Final = 65.0  # of an attempt on several addresses, even where nothing answers
_OF_HOST_TIMEOUT: Final = 0.7  # of an attempt on one address: nmap itself ends it after the whole
_SHORTEST: Final = 5.0  # expected of a chunk: less, and starting nmap is felt
_LONGEST: Final = 30.0  # more, and a lost worker loses much
_SHARES: Final = 16  # of a job at least, between these two: enough for a handful of workers to share it evenly
_RATE_OF_NMAP: Final = 500  # packets a second: a job limited to fewer has one nmap at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job keeps of it, so that a release that cuts otherwise makes the same chunks of a job that it finds.

    `chunk_count` is what the job promises; a slice whose every address is excluded makes no chunk.
    """

    addresses: int
    excluded: int
    ports: int
    chunk_addresses: int
    chunk_ports: int
    blocks: int
    """Of ports."""
    chunk_count: int
    estimate: float
    """Slot seconds for the whole job."""


def estimate(policy: ScanPolicy, ports: PortSet, addresses: int) -> float:
    """Slot seconds that one nmap is expected to need for `addresses` × `ports`."""
    fastest = _PER_SECOND[policy.timing]
    rate = min(fastest, policy.max_rate or fastest)
    udp_rate = min(_UDP_PER_SECOND, rate)
    per_address = ports.tcp_count / rate + ports.udp_count / udp_rate
    per_address += _SERVICE * policy.service_detection + _SCRIPTS * bool(policy.scripts) + _OS * policy.os_detection
    # The slow timings wait between two probes to one address, and meanwhile probe the others of its host group.
    groups = -(-addresses // GROUP_HOSTS)
    waits = groups * ports.count * _DELAYS[policy.timing] if policy.timing < len(_DELAYS) else 0.0
    return _START + addresses * per_address + waits


def longest(policy: ScanPolicy, ports: PortSet, addresses: int) -> float:
    """Seconds that one nmap needs for `addresses` × `ports` where nothing answers."""
    discovery = _DISCOVERY_TRIES if policy.discovery == "default" else 0
    limit = nmap_rate(policy) or _PER_SECOND[-1]
    if policy.timing < len(_SILENT_WAITS):
        wait = max(_SILENT_WAITS[policy.timing], 1 / limit)
        return _START + addresses * (ports.count * _TRIES + discovery) * wait
    rate = min(min_rate(policy, ports) or _PER_SECOND[policy.timing], limit)
    if policy.min_rate is None and not ports.udp_count:
        rate = min(rate, FLOOR_OF_ADDRESS * addresses)
    udp_rate = min(policy.min_rate or _SILENT_UDP_PER_SECOND[policy.timing], limit)
    silent = (ports.tcp_count * _TRIES + discovery) / rate + ports.udp_count * _TRIES / udp_rate
    return _START + max(addresses * silent, ports.udp_count / _LIMITED_UDP_PER_SECOND)


def width(policy: ScanPolicy) -> int:
    """How many chunks of a job may be open at once, so that the rates of its nmaps add up to its `max_rate` at most."""
    return min(WINDOW, max(1, policy.max_rate // _RATE_OF_NMAP)) if policy.max_rate else WINDOW


def nmap_rate(policy: ScanPolicy) -> int | None:
    """Probes a second of each nmap of a job with a `max_rate`."""
    return policy.max_rate // width(policy) if policy.max_rate else None


def min_rate(policy: ScanPolicy, ports: PortSet, nmaps: int = 1) -> int | None:
    """Probes a second below which silence must not slow an nmap of a job that has `nmaps` of them at once."""
    floor = None if ports.udp_count else FLOORS[policy.timing]
    if policy.min_rate:
        floor = max(1, policy.min_rate // nmaps)
    limit = nmap_rate(policy)
    return min(floor, limit) if floor and limit else floor


def plan(policy: ScanPolicy, target: Target) -> Plan:
    """What a job of this policy on this target will be."""
    ports = policy.port_set
    block = _block_size(policy, ports)
    blocks = -(-ports.tcp_count // block) + -(-ports.udp_count // block)
    size = min(_slice_size(policy, each, target) for each in _first_blocks(ports, block))
    return Plan(
        addresses=target.network.num_addresses,
        excluded=target.network.num_addresses - target.included,
        ports=ports.count,
        chunk_addresses=size,
        chunk_ports=block,
        blocks=blocks,
        chunk_count=sum(1 for _ in _cut(target, size)) * blocks,
        estimate=estimate(policy, ports, target.included),
    )


def made_up_to(job: ScanJob, open_: int, lowest: int | None) -> int:
    """Up to which index the job's chunks should be made.

    Args:
        job: with the chunks before `job.made` made.
        open_: how many of these have not ended.
        lowest: index of the first of these, None when there is none.
    """
    lowest = job.made if lowest is None else lowest
    up_to = min(job.made + width(job.policy) - open_, lowest + min(_AHEAD, _slice_count(job)), job.chunk_count)
    return max(job.made, up_to)


def chunks(job: ScanJob, first: int, end: int) -> Iterator[Chunk]:
    """The job's chunks from index `first` up to `end`, under their fixed ids."""
    slices = _slices(job.cidr, job.exclude, job.chunk_addresses)
    all_ports = job.policy.port_set
    first_address = parse_network(job.cidr).network_address
    for index in range(first, end):
        if job.blockwise:
            block, slice_ = divmod(index, len(slices))
        else:
            slice_, block = divmod(index, job.blocks)
        offset, outcomes = slices[slice_]
        ports = all_ports.block(block, job.chunk_ports)
        blank = outcomes.count(Outcome.BLANK)
        yield Chunk(
            id=chunk_id(job, index),
            job_id=job.id,
            user_id=job.user_id,
            index=index,
            turn=job.turn + index,
            partition=job.partition,
            first_address=str(first_address + offset),
            outcomes=outcomes,
            ports=str(ports),
            port_count=ports.count,
            estimate=expected(job, ports, blank),
            needs_raw=job.policy.needs_raw_for(ports),
        )


def block_of(job: ScanJob, index: int) -> int:
    """The block of ports of the chunk with this index."""
    return index // _slice_count(job) if job.blockwise else index % job.blocks


def block_ports(job: ScanJob, block: int) -> PortSet:
    """The ports of a block, by its number from 0."""
    return job.policy.port_set.block(block, job.chunk_ports)


def indexes(job: ScanJob, blocks: Iterable[int], first: int, end: int) -> list[tuple[int, int]]:
    """Indexes of the chunks of these blocks that hold places from `first` up to `end` of the job's network.

    Returns:
        Ranges, each without its end, in order; between the chunks that are asked for they may hold others.
    """
    offsets = [offset for offset, _ in _slices(job.cidr, job.exclude, job.chunk_addresses)]
    low, high = bisect_right(offsets, first - job.chunk_addresses), bisect_left(offsets, end)
    if not job.blockwise:
        return [(low * job.blocks, high * job.blocks)]
    ranges: list[tuple[int, int]] = []
    for block in sorted(blocks):
        begin = block * len(offsets) + low
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, block * len(offsets) + high))
    return ranges


def chunk_id(job: ScanJob, index: int) -> str:
    return f"{job.id}-{index}"


def needs_raw(job: ScanJob, lowest: int | None) -> bool:
    """Whether all chunks from index `lowest` on need raw packets: TCP ports come before UDP ports."""
    first = min(job.made if lowest is None else lowest, job.chunk_count - 1)
    return next(chunks(job, first, first + 1)).needs_raw


def expected(job: ScanJob, ports: PortSet, addresses: int) -> float:
    """Slot seconds for `addresses` × `ports` of this job: as its finished chunks took, or as the policy is estimated."""
    if job.pace is not None:
        return _START + job.pace * ports.count * addresses
    return estimate(job.policy, ports, addresses)


def attempt_size(job: ScanJob, chunk: Chunk) -> int:
    """How many of the chunk's blanks its next attempt should scan."""
    size = min(chunk.blank, chunk.limit or chunk.blank)
    if job.pace is not None:
        size = min(size, max(1, int(ATTEMPT_SECONDS / max(job.pace * chunk.port_count, 1e-9))))
    return size


def blanks(job: ScanJob, first: int, end: int) -> int:
    """Addresses to scan in the chunks from index `first` up to `end`, each once for each block of ports."""
    return _blanks_before(job, end) - _blanks_before(job, first) if first < end else 0


def index_after(job: ScanJob, first: int, addresses: int) -> int:
    """The last index, from `first` on, with at most so many addresses to scan in the chunks between."""
    if not addresses or first >= job.chunk_count:
        return first
    return first + bisect_right(range(first, job.chunk_count), addresses, key=lambda end: blanks(job, first, end)) - 1


def _blanks_before(job: ScanJob, end: int) -> int:
    sums = _sums(job.cidr, job.exclude, job.chunk_addresses)
    blocks, slices = divmod(end, len(sums) - 1)
    return blocks * sums[-1] + sums[slices]


def _slice_count(job: ScanJob) -> int:
    return job.chunk_count // job.blocks


def _block_size(policy: ScanPolicy, ports: PortSet) -> int:
    """Ports of a chunk: the most that one address can be asked within the time of an attempt on it."""
    allowed = max(ATTEMPT_SECONDS, _OF_HOST_TIMEOUT * policy.host_timeout)

    size = min(MAX_PORTS, ports.count)
    while size > 1 and any(longest(policy, block, 1) > allowed for block in _first_blocks(ports, size)):
        size = -(-size // 2)
    return size


def _first_blocks(ports: PortSet, size: int) -> list[PortSet]:
    """The first block of each protocol; none is larger."""
    parts = (PortSet(tcp=ports.tcp, top=ports.top), PortSet(udp=ports.udp))
    return [part.block(0, size) for part in parts if part.count]


def _slice_size(policy: ScanPolicy, ports: PortSet, target: Target) -> int:
    """Addresses of a chunk: the largest power of two that keeps it as short as it should be."""

    def fits(size: int) -> bool:
        seconds = estimate(policy, ports, size)
        short = seconds <= _SHORTEST or (seconds <= _LONGEST and size * _SHARES <= target.included)
        return short and longest(policy, ports, size) <= ATTEMPT_SECONDS

    size = 1
    while size < MAX_ADDRESSES and fits(size * 2):
        size *= 2
    return size


@lru_cache(maxsize=64)  # of jobs whose chunks are being made: a /16's slices are 100 kB
def _slices(cidr: str, exclude: tuple[str, ...], size: int) -> tuple[tuple[int, str], ...]:
    return tuple(_cut(Target.parse(cidr, exclude), size))


@lru_cache(maxsize=64)
def _sums(cidr: str, exclude: tuple[str, ...], size: int) -> tuple[int, ...]:
    """Addresses to scan before each slice, and in all."""
    return (0, *accumulate(outcomes.count(Outcome.BLANK) for _, outcomes in _slices(cidr, exclude, size)))


def _cut(target: Target, size: int) -> Iterator[tuple[int, str]]:
    """Offset and outcome map of each run of addresses that has something to scan."""
    whole = target.outcomes()
    for offset in range(0, len(whole), size):
        outcomes = whole[offset : offset + size]
        if Outcome.BLANK in outcomes:
            yield offset, outcomes
