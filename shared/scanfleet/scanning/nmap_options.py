"""nmap's options for a policy: built here for the worker that runs nmap, and for estimates that show them."""

from __future__ import annotations

from typing import Final, Literal

from scanfleet.scanning.policy import FLOOR_OF_ADDRESS, GROUP_HOSTS, ExecutablePolicy, ScanPolicy
from scanfleet.scanning.ports import PortSet

_GROUP_PROBES: Final = 1024  # minimum number of probes in a host group, as in nmap itself
_SILENT_GROUP_HOSTS: Final = 16  # size of a host group whose addresses may all be silent
_TECHNIQUES: Final = {"connect": "-sT", "syn": "-sS"}
# At timings 4 and 5 nmap makes 6 and 2 retries by itself, and misses open ports of hosts that limit their answers (ADR 41).
_FAST: Final = 4
_FAST_TCP_RETRIES: Final = 10  # made only where earlier ones had an answer: a silent port still takes two probes


def technique(policy: ScanPolicy, *, raw: bool) -> Literal["connect", "syn"]:
    """Return the TCP technique of the policy; auto is SYN if raw packets may be sent, else connect."""
    return "syn" if policy.technique == "syn" or (policy.technique == "auto" and raw) else "connect"


def nmap_options(
    policy: ExecutablePolicy,
    ports: PortSet,
    *,
    addresses: int,
    family: int,
    min_rate: int | None,
    max_rate: int | None,
    raw: bool,
) -> list[str]:
    """Return the options of one nmap, numbers and fixed words, before `--` and its targets.

    Args:
        policy: the policy of the scan.
        ports: a part of the policy's ports.
        addresses: number of addresses.
        family: of the addresses, 4 or 6.
        min_rate: this nmap's part of the job's minimum rate, or the floor of the timing.
        max_rate: this nmap's part of the job's maximum rate.
        raw: whether raw packets may be sent.
    """
    min_rate = min_rate and min(min_rate, max_rate or min_rate)
    if min_rate and policy.min_rate is None:  # the floor of the timing
        min_rate = min(min_rate, FLOOR_OF_ADDRESS * addresses)
    fast_tcp = policy.timing >= _FAST and ports.tcp_count > 0
    group = str(_group(policy, ports.count))
    return [
        *("-v", "-n", "-oX", "-", "--stats-every", "1s"),
        # By default nmap assumes that only root is privileged, regardless of capabilities.
        "--privileged" if raw else "--unprivileged",
        *(["-6"] if family == 6 else []),  # noqa: PLR2004 # IPv6
        *(["-Pn"] if policy.discovery == "none" else []),
        *([_TECHNIQUES[technique(policy, raw=raw)]] if ports.tcp_count else []),
        *(["-sU"] if ports.udp_count else []),
        *(["--top-ports", str(ports.top)] if ports.top else ["-p", str(ports)]),
        *(["-sV", "--version-intensity", str(policy.version_intensity)] if policy.service_detection else []),
        *(["-O"] if policy.os_detection else []),
        *(["--script", ",".join(policy.scripts)] if policy.scripts else []),
        f"-T{policy.timing}",
        *_number("--min-rate", min_rate),
        *_number("--max-rate", max_rate),
        # nmap lowers its initial timeout to this by itself.
        *_number("--max-rtt-timeout", policy.max_rtt_timeout, "ms"),
        *_number("--max-retries", _FAST_TCP_RETRIES if fast_tcp and policy.max_retries is None else policy.max_retries),
        *_number("--host-timeout", policy.host_timeout, "s"),
        *("--min-hostgroup", group, "--max-hostgroup", group),
    ]


def _group(policy: ScanPolicy, ports: int) -> int:
    """Return the size of nmap's host groups: how many addresses it probes in parallel.

    nmap writes a group when all of it is finished, so the group is the unit of streaming and resuming. With discovery a group
    contains hosts that answered, and nmap's own size works best, but not the small first groups that it makes by default.
    Without discovery a whole group may be silent, and a small group limits how much an interrupted attempt loses: a silent
    /26 with 100 ports at 2,000 probes per second takes 11.5 s in groups of 8, 7.4 s in one group of 64, and little more than
    that in groups of 16.
    """
    hosts = _SILENT_GROUP_HOSTS if policy.discovery == "none" else GROUP_HOSTS
    return max(hosts, _GROUP_PROBES // ports)


def _number(option: str, value: int | None, unit: str = "") -> list[str]:
    return [] if value is None else [option, f"{value}{unit}"]
