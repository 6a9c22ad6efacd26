"""Split a job into chunks: a pure function of its snapshot, so that every replica creates the same chunks.

A chunk is one block of the policy's ports on one slice of the subnet's addresses. Chunks are numbered block by block: all
slices of the first block, then all of the second. `made_up_to` ensures that two blocks of one slice are never open together,
so that no address is scanned by two nmap processes of its job at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import Plan, ScanJob
from scanfleet.scanning.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.scanning.policy import FLOOR_OF_ADDRESS, GROUP_HOSTS, ScanPolicy
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Target

MAX_PORTS: Final = 8_192  # per chunk: all of them open on one host still fit in one message
WINDOW: Final = 256  # maximum number of open chunks per job: enough for every slot of a large fleet
AHEAD: Final = 4_096  # maximum distance between the first open chunk and the last created one: bounds progress queries

# Measured with nmap 7.93 in network namespaces. `FLOORS` are minimum probe rates per second by timing, which nmap keeps
# although hosts do not answer: 99 % of open ports are found if 75 % of hosts drop, 2 % of packets are lost or hosts limit
# resets or ICMP errors (ADR 41). UDP has none, since hosts rate-limit the answers of closed ports, which would be found
# open|filtered.
FLOORS: Final = (None, None, None, 500, 2_000, 2_500)
_TRIES: Final = 2  # probes to a port that does not answer
_DISCOVERY_TRIES: Final = 8  # probes of raw host discovery to an address that does not answer; 4 without raw packets
_SILENT_WAIT_SECONDS: Final = (300.0, 15.0, 1.0)  # after each such probe of timings 0 to 2, which send one at a time
_DELAY_SECONDS: Final = (300.0, 15.0, 0.4)  # between two probes of these timings to an address that answers
_SILENT_UDP_PER_SECOND: Final = (10, 10, 10, 10, 20, 37)  # probes by timing if no port answers
_LIMITED_UDP_PER_SECOND: Final = 1  # closed ports of a host that rate-limits ICMP, as Linux does

# Expected slot seconds on a network that answers, until the job's own chunks of the protocol give measurements.
START_SECONDS: Final = 0.1  # start of nmap; less if small chunks share one
_PER_SECOND: Final = (1_000, 1_000, 1_000, 2_000, 4_000, 6_000)  # TCP probes by timing
_UDP_PER_SECOND: Final = 50
_SERVICE_SECONDS: Final = 0.1  # per address: version probes wait for banners
_SCRIPT_SECONDS: Final = 0.2
_OS_SECONDS: Final = 0.1

_LEAST: Final = 0.1  # fraction of the estimate that a chunk is expected to take at least: hosts of one job differ

ATTEMPT_SECONDS: Final = 65.0  # maximum duration of an attempt on several addresses, even if all are silent
_OF_HOST_TIMEOUT: Final = 0.7  # maximum planned fraction of the host timeout for an attempt on one address
_SHORTEST_SECONDS: Final = 5.0  # minimum expected duration of a chunk: below it, the start of nmap dominates
_LONGEST_SECONDS: Final = 30.0  # maximum expected duration of a chunk: limits the loss with a failed worker
_SHARES: Final = 16  # minimum number of chunks per job between these two: enough to spread it evenly over a few workers
_RATE_OF_NMAP: Final = 500  # packets per second: a job with a lower limit or minimum has one nmap at a time


def estimate(policy: ScanPolicy, ports: PortSet, addresses: int, parallel: int = WINDOW) -> float:
    """Return the expected slot seconds of one nmap for `addresses` × `ports`, of a job with up to `parallel` chunks at once."""
    fastest = _PER_SECOND[policy.timing]
    rate = min(fastest, nmap_rate(policy, parallel) or fastest)
    udp_rate = min(_UDP_PER_SECOND, rate)
    per_address = ports.tcp_count / rate + ports.udp_count / udp_rate
    per_address += (
        _SERVICE_SECONDS * policy.service_detection
        + _SCRIPT_SECONDS * bool(policy.scripts)
        + _OS_SECONDS * policy.os_detection
    )
    # The slow timings wait between two probes to one address, and meanwhile probe the others of its host group.
    groups = -(-addresses // GROUP_HOSTS)
    waits = groups * ports.count * _DELAY_SECONDS[policy.timing] if policy.timing < len(_DELAY_SECONDS) else 0.0
    return START_SECONDS + addresses * per_address + waits


def longest_seconds(policy: ScanPolicy, ports: PortSet, addresses: int) -> float:
    """Return the seconds that one nmap needs for `addresses` × `ports` if nothing answers."""
    discovery = _DISCOVERY_TRIES if policy.discovery == "default" else 0
    limit = nmap_rate(policy) or _PER_SECOND[-1]
    if policy.timing < len(_SILENT_WAIT_SECONDS):
        wait = max(_SILENT_WAIT_SECONDS[policy.timing], 1 / limit)
        return START_SECONDS + addresses * (ports.count * _TRIES + discovery) * wait
    floor = min_rate(policy, ports)
    rate = min(floor or _PER_SECOND[policy.timing], limit)
    if policy.min_rate is None and not ports.udp_count:
        rate = min(rate, FLOOR_OF_ADDRESS * addresses)
    udp_rate = min(floor or _SILENT_UDP_PER_SECOND[policy.timing], limit)
    silent = (ports.tcp_count * _TRIES + discovery) / rate + ports.udp_count * _TRIES / udp_rate
    return START_SECONDS + max(addresses * silent, ports.udp_count / _LIMITED_UDP_PER_SECOND)


def width(policy: ScanPolicy) -> int:
    """Return the maximum number of open chunks of a job, so that its nmap processes together keep to its `max_rate`.

    They share it, and a share that is too low would not end a chunk in time.
    """
    return min(WINDOW, max(1, policy.max_rate // _RATE_OF_NMAP)) if policy.max_rate else WINDOW


def nmap_rate(policy: ScanPolicy, parallel: int = WINDOW) -> int | None:
    """Return the maximum probes per second of each nmap of a job with a `max_rate` and up to `parallel` chunks at once."""
    return policy.max_rate // min(width(policy), parallel) if policy.max_rate else None


def min_rate(policy: ScanPolicy, ports: PortSet, parallel: int = WINDOW) -> int | None:
    """Return the minimum probes per second of each nmap, kept even if nothing answers, with up to `parallel` chunks at once.

    It is the nmap's share of the policy's `min_rate`, but no less than without one, unless that is all of it: fewer nmap processes
    than expected may run, and a minimum may be exceeded.
    """
    floor = None if ports.udp_count else FLOORS[policy.timing]
    if policy.min_rate:
        share = policy.min_rate // min(width(policy), parallel)
        floor = max(share, min(policy.min_rate, max(_RATE_OF_NMAP, floor or 0)))
    limit = nmap_rate(policy, parallel)
    return min(floor, limit) if floor and limit else floor


def plan(policy: ScanPolicy, target: Target) -> Plan:
    """Plan a job of this policy on this target."""
    ports = policy.port_set
    block, size = _chunk_size(policy, target.included)
    blocks = -(-ports.tcp_count // block) + -(-ports.udp_count // block)
    slices = _Slices(target, size).count
    return Plan(
        addresses=target.network.num_addresses,
        excluded=target.network.num_addresses - target.included,
        ports=ports.count,
        chunk_addresses=size,
        chunk_ports=block,
        blocks=blocks,
        chunk_count=slices * blocks,
        estimate=estimate(policy, ports, target.included, slices),
    )


def made_up_to(job: ScanJob, open_: int, lowest: int | None) -> int:
    """Return the index up to which the job's chunks should be created.

    Args:
        job: the job; its chunks before `job.made` exist.
        open_: number of these that have not ended.
        lowest: index of the first of these; None if there is none.
    """
    lowest = job.made if lowest is None else lowest
    up_to = min(job.made + width(job.policy) - open_, lowest + min(AHEAD, job.plan.slice_count), job.plan.chunk_count)
    return max(job.made, up_to)


def chunks(job: ScanJob, first: int, end: int) -> Iterator[Chunk]:
    """Yield the job's chunks from index `first` up to `end`, with their fixed ids."""
    slices = _slices(job)
    first_address = slices.first_address
    for index in range(first, end):
        if job.plan.blockwise:
            block, slice_ = divmod(index, slices.count)
        else:
            slice_, block = divmod(index, job.plan.blocks)
        offset, outcomes = slices[slice_]
        ports, text = _block(job.policy.ports, block, job.plan.chunk_ports)
        blank = outcomes.count(Outcome.BLANK)
        yield Chunk(
            id=chunk_id(job, index),
            job_id=job.id,
            user_id=job.user_id,
            zone=job.zone,
            index=index,
            turn=job.turn + index,
            partition=job.partition,
            first_address=str(first_address + offset),
            outcomes=outcomes,
            ports=text,
            port_count=ports.count,
            estimate=expected(job, ports, blank),
            needs_raw=job.policy.needs_raw_for(ports),
        )


def block_of(job: ScanJob, index: int) -> int:
    """Return the number of the port block of the chunk with this index."""
    return index // job.plan.slice_count if job.plan.blockwise else index % job.plan.blocks


def indexes(job: ScanJob, blocks: Iterable[int], first: int, end: int) -> list[tuple[int, int]]:
    """Return the indexes of the chunks of these blocks that contain positions from `first` up to `end` of the job's network.

    Returns:
        Half-open ranges, in order; they may contain other chunks between the requested ones.
    """
    slices = _slices(job)
    low, high = slices.before(first - job.plan.chunk_addresses + 1), slices.before(end)
    if not job.plan.blockwise:
        return [(low * job.plan.blocks, high * job.plan.blocks)]
    ranges: list[tuple[int, int]] = []
    for block in sorted(blocks):
        begin = block * slices.count + low
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, block * slices.count + high))
    return ranges


def chunk_id(job: ScanJob, index: int) -> str:
    return f"{job.id}-{index}"


def needs_raw(job: ScanJob) -> bool:
    """Return whether all chunks from the first that has not ended need raw packets: TCP ports come before UDP ports."""
    first = min(job.totals.done, job.plan.chunk_count - 1)
    ports, _ = _block(job.policy.ports, block_of(job, first), job.plan.chunk_ports)
    return job.policy.needs_raw_for(ports)


def expected(job: ScanJob, ports: PortSet, addresses: int) -> float:
    """Return the expected slot seconds for `addresses` × `ports` of one protocol: as in chunks with hosts, or else estimated."""
    table = estimate(job.policy, ports, addresses, job.plan.parallel)
    pace = _pace(job, udp=bool(ports.udp_count))
    return table if pace is None else max(START_SECONDS + pace * ports.count * addresses, _LEAST * table)


def expected_of(job: ScanJob, chunk: Chunk) -> float:
    """Return the expected slot seconds of the chunk: as in the job's chunks that have ended, or else as when it was created."""
    if _pace(job, udp=chunk.udp) is None:
        return chunk.estimate
    return expected(job, PortSet.parse(chunk.ports), chunk.blank)


def attempt_size(job: ScanJob, chunk: Chunk) -> int:
    """Return how many of the chunk's blanks its next attempt should scan."""
    size = min(chunk.blank, chunk.limit or chunk.blank)
    if pace := _pace(job, udp=chunk.udp):
        size = min(size, max(1, int(ATTEMPT_SECONDS / max(pace * chunk.port_count, 1e-9))))
    return size


def _pace(job: ScanJob, *, udp: bool) -> float | None:
    return (job.totals.udp if udp else job.totals.tcp).pace


def blanks(job: ScanJob, first: int, end: int) -> int:
    """Return the addresses to scan in the chunks from index `first` up to `end`, each once per block of ports."""
    return _blanks_before(job, end) - _blanks_before(job, first) if first < end else 0


def index_after(job: ScanJob, first: int, addresses: int) -> int:
    """Return the highest index for which the chunks from `first` have at most this many addresses to scan."""
    if not addresses or first >= job.plan.chunk_count:
        return first
    return (
        first + bisect_right(range(first, job.plan.chunk_count), addresses, key=lambda end: blanks(job, first, end)) - 1
    )


def _blanks_before(job: ScanJob, end: int) -> int:
    slices = _slices(job)
    blocks, number = divmod(end, slices.count)
    return blocks * slices.blanks_before(slices.count) + slices.blanks_before(number)


@lru_cache(maxsize=1_000)  # subnets of the same size that are scanned with the same policy
def _chunk_size(policy: ScanPolicy, included: int) -> tuple[int, int]:
    """Return the ports and the addresses of a chunk."""
    ports = policy.port_set
    block = _block_size(policy, ports)
    return block, min(_slice_size(policy, each, included) for each in _first_blocks(ports, block))


def _block_size(policy: ScanPolicy, ports: PortSet) -> int:
    """Return the ports of a chunk: the maximum that one address can be probed for within one attempt."""
    allowed = max(ATTEMPT_SECONDS, _OF_HOST_TIMEOUT * policy.host_timeout)

    size = min(MAX_PORTS, ports.count)
    while size > 1 and any(longest_seconds(policy, block, 1) > allowed for block in _first_blocks(ports, size)):
        size = -(-size // 2)
    return size


def _first_blocks(ports: PortSet, size: int) -> list[PortSet]:
    """Return the first block of each protocol; no other block is larger."""
    parts = (PortSet(tcp=ports.tcp, top=ports.top), PortSet(udp=ports.udp))
    return [part.block(0, size) for part in parts if part.count]


def _slice_size(policy: ScanPolicy, ports: PortSet, included: int) -> int:
    """Return the addresses of a chunk: the largest power of two within the planned duration."""

    def fits(size: int) -> bool:
        seconds = estimate(policy, ports, size)
        short = seconds <= _SHORTEST_SECONDS or (seconds <= _LONGEST_SECONDS and size * _SHARES <= included)
        return short and longest_seconds(policy, ports, size) <= ATTEMPT_SECONDS

    size = 1
    while size < MAX_ADDRESSES and fits(size * 2):
        size *= 2
    return size


@lru_cache(maxsize=64)  # a part of a long list takes a millisecond, and all slices of the network have the same
def _block(text: str, number: int, size: int) -> tuple[PortSet, str]:
    """Return one of the blocks of a policy's ports, and its text."""
    ports = PortSet.parse(text).block(number, size)
    return ports, str(ports)


def _slices(job: ScanJob) -> _Slices:
    return _slices_of(job.cidr, job.exclude, job.plan.chunk_addresses)


@lru_cache(maxsize=256)  # jobs whose chunks are being created or listed: a thousand excluded networks take 300 kB
def _slices_of(cidr: str, exclude: tuple[str, ...], size: int) -> _Slices:
    return _Slices(Target.parse(cidr, exclude), size)


class _Slices:
    """The runs of `size` addresses, a power of two, that are not completely excluded, by their numbers.

    Excluded networks are merged and runs are aligned, so a completely excluded run is a part of one of them. No operation goes
    through the addresses.
    """

    def __init__(self, target: Target, size: int) -> None:
        self.first_address = target.network.network_address
        self._size = size
        self._addresses = target.network.num_addresses
        self._holes = target.holes
        self._excluded = (0, *accumulate(end - start for start, end in target.holes))
        self._skips: list[int] = []
        """The numbers of the slices before which some are completely excluded, which have no number."""
        self._skipped = [0]
        for start, end in self._holes:
            if end - start >= size:
                self._skips.append(start // size - self._skipped[-1])
                self._skipped.append(self._skipped[-1] + (end - start) // size)
        # Not the length of a container, which has 63 bits: ::/0 is estimated too.
        self.count = -(-self._addresses // size) - self._skipped[-1]

    def __getitem__(self, number: int) -> tuple[int, str]:
        """Return the offset and outcome map."""
        offset = self._offset(number)
        after = min(self._addresses, offset + self._size)
        letters = bytearray(Outcome.BLANK.encode() * (after - offset))
        hole = bisect_right(self._holes, offset, key=itemgetter(1))
        while hole < len(self._holes) and self._holes[hole][0] < after:
            low, high = max(self._holes[hole][0], offset), min(self._holes[hole][1], after)
            letters[low - offset : high - offset] = Outcome.EXCLUDED.encode() * (high - low)
            hole += 1
        return offset, letters.decode()

    def before(self, offset: int) -> int:
        """Return the number of slices that begin before this offset."""
        return bisect_left(range(self.count), offset, key=self._offset)

    def blanks_before(self, number: int) -> int:
        """Return the number of addresses to scan in the slices before this one; with the number of slices, in all."""
        offset = min(self._addresses, self._offset(number))
        return offset - self._excluded[bisect_left(self._holes, offset, key=itemgetter(0))]

    def _offset(self, number: int) -> int:
        return (number + self._skipped[bisect_right(self._skips, number)]) * self._size
