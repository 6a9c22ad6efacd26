"""How a job is cut into chunks: by its snapshot alone, so that whoever finds it half made makes the same chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import ScanJob
from scanfleet.outcomes import MAX_ADDRESSES, Outcome
from scanfleet.policy import GROUP_HOSTS, ScanPolicy
from scanfleet.ports import PortSet
from scanfleet.targets import Target

MAX_PORTS: Final = 8_192  # of a chunk: all of them open on one host still fit in one message

# Slot seconds. They need not be right, only in proportion: they size chunks and order users, and a user's clock is
# corrected to the real time at the end.
_START: Final = 0.1  # nmap reading its tables; less where small chunks share one
_PER_SECOND: Final = (1_000, 1_000, 1_000, 2_000, 4_000, 6_000)  # TCP probes by timing, on a network that answers some
_DELAYS: Final = (
    300.0,
    15.0,
    0.4,
    0.0,
    0.0,
    0.0,
)  # between two probes to one address by timing, as nmap's manual has it
_UDP_PER_SECOND: Final = 50  # closed UDP ports answer at the rate that their host limits ICMP to
_SERVICE: Final = 0.1  # of an address: version probes wait for banners
_SCRIPTS: Final = 0.2
_OS: Final = 0.1

_SHORTEST: Final = 5.0  # of a planned chunk: less, and starting nmap is felt
_LONGEST: Final = 30.0  # more, and a lost worker loses much
_SHARES: Final = 16  # of a job at least, between these two: enough for a handful of workers to share it evenly


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job keeps of it, so that a release that cuts otherwise makes the same chunks of a job that it finds.

    `chunk_count` is what the job promises; a chunk whose every address is excluded is never made.
    """

    addresses: int
    excluded: int
    ports: int
    chunk_addresses: int
    chunk_count: int


def estimate(policy: ScanPolicy, ports: PortSet, addresses: int) -> float:
    """Slot seconds that one nmap will need for `addresses` × `ports`."""
    # The slow timings wait between two probes to one address, and meanwhile probe the others of its host group.
    groups = -(-addresses // GROUP_HOSTS)
    return _work(policy, ports, addresses) + groups * ports.count * _DELAYS[policy.timing]


def _work(policy: ScanPolicy, ports: PortSet, addresses: int) -> float:
    """What of it grows with the addresses: all but the waiting of slow timings."""
    fastest = _PER_SECOND[policy.timing]
    rate = min(fastest, policy.max_rate or fastest)
    udp_rate = min(_UDP_PER_SECOND, rate)
    per_address = ports.tcp_count / rate + ports.udp_count / udp_rate
    per_address += _SERVICE * policy.service_detection + _SCRIPTS * bool(policy.scripts) + _OS * policy.os_detection
    return _START + addresses * per_address


def plan(policy: ScanPolicy, target: Target) -> Plan:
    """What a job of this policy on this target will be."""
    ports = policy.port_set
    size = _slice_size(policy, target)
    return Plan(
        addresses=target.network.num_addresses,
        excluded=target.network.num_addresses - target.included,
        ports=ports.count,
        chunk_addresses=size,
        chunk_count=sum(1 for _ in _slices(target, size)) * sum(1 for _ in ports.blocks(MAX_PORTS)),
    )


def chunks(job: ScanJob, turn: int) -> Iterator[Chunk]:
    """The job's chunks under their fixed ids, taking turns from `turn` on."""
    target = Target.parse(job.cidr, job.exclude)
    blocks = list(job.policy.port_set.blocks(MAX_PORTS))
    index = 0
    for offset, outcomes in _slices(target, job.chunk_addresses):
        first = str(target.network.network_address + offset)
        for ports in blocks:
            yield Chunk(
                id=f"{job.id}-{index}",
                job_id=job.id,
                user_id=job.user_id,
                index=index,
                turn=turn + index,
                first_address=first,
                outcomes=outcomes,
                ports=str(ports),
                port_count=ports.count,
                estimate=estimate(job.policy, ports, outcomes.count(Outcome.BLANK)),
                needs_raw=job.policy.needs_raw,
            )
            index += 1


def _slices(target: Target, size: int) -> Iterator[tuple[int, str]]:
    """Offset and outcome map of each run of addresses that has something to scan."""
    whole = target.outcomes()
    for offset in range(0, len(whole), size):
        outcomes = whole[offset : offset + size]
        if Outcome.BLANK in outcomes:
            yield offset, outcomes


def _slice_size(policy: ScanPolicy, target: Target) -> int:
    """Addresses of a chunk: the largest power of two that keeps it as long as it should be."""
    block = next(policy.port_set.blocks(MAX_PORTS))

    def fits(size: int) -> bool:
        seconds = _work(policy, block, size)
        return seconds <= _SHORTEST or (seconds <= _LONGEST and size * _SHARES <= target.included)

    size = 1
    while size < MAX_ADDRESSES and fits(size * 2):
        size *= 2
    return size
