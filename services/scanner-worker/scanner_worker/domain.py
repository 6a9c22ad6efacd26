"""What a chunk means for nmap: which addresses may be scanned, the command line, and the letter of each host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, NamedTuple

from scanfleet.messages import HostScanned, ScanChunk, Technique
from scanfleet.messages.topics import MAX_BYTES
from scanfleet.outcomes import MAX_ADDRESSES, Outcome, index_of, networks
from scanfleet.policy import GROUP_HOSTS, ExecutablePolicy, PolicyError, ScanPolicy, executable
from scanfleet.ports import PortSet
from scanfleet.targets import Network, TargetRules

REASON_CHARS: Final = 500  # of why a chunk failed: it becomes part of a job's `error`, which a person reads

BATCH_SECONDS: Final = 5.0  # of estimates in one nmap with others: less than that, and starting nmap is felt

_GROUP_PROBES: Final = 1024  # probes of one host group at least, as nmap itself has it

# Reasons of nmap's that the address itself cannot have given: silence, and a router's word that nothing is there.
_NOT_FROM_HOST: Final = frozenset({b"no-response", b"host-unreach", b"net-unreach", b"time-exceeded"})

# What is no plain text: it acts on a terminal or a page (control characters, C1 among them, separators, zero-width and
# direction marks) or is no character at all (surrogates, non-characters).
_NO_TEXT: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]",
)


class ScanError(Exception):
    """A scan that does not count; says why to whoever owns the job."""


class Host(NamedTuple):
    """A finished `<host>` of nmap's."""

    address: str
    up: bool
    timed_out: bool
    ports: int
    """How many ports it accounts for, listed and summed up."""

    reasons: AbstractSet[bytes]
    """Why nmap takes the host, or a port of it, for what it says."""

    element: bytes
    """As nmap wrote it, but for the end tag: UTF-8 that holds well-formed elements and no other markup."""


@dataclass(frozen=True, slots=True)
class Permitted:
    """What is left of a chunk when the rules were asked once more."""

    outcomes: str
    reason: str
    """Why addresses are refused; empty when none is."""

    denied: str
    """Which rule forbids addresses; empty when they all may be scanned."""


def together(waiting: Sequence[ScanChunk]) -> Sequence[ScanChunk]:
    """The first of `waiting`, and what one nmap can scan with it: chunks of the same user, policy and ports.

    No address is there twice, and together they are no more than a chunk may be. One that was given back or has failed before
    goes alone: a target that nmap cannot cope with takes nobody with it a second time.
    """
    first, *others = waiting
    chosen, seconds, addresses = [first], first.estimate_seconds, len(first.outcomes)
    for other in others:
        longer, more = seconds + other.estimate_seconds, addresses + len(other.outcomes)
        if longer <= BATCH_SECONDS and more <= MAX_ADDRESSES and all(_alike(each, other) for each in chosen):
            chosen.append(other)
            seconds, addresses = longer, more
    return chosen


def _alike(one: ScanChunk, other: ScanChunk) -> bool:
    if one.attempt > 1 or other.attempt > 1:
        return False
    if (one.user_id, one.ports, one.policy) != (other.user_id, other.ports, other.policy):
        return False
    begins, other_begins = ip_address(one.first_address), ip_address(other.first_address)
    if begins.version != other_begins.version:
        return False
    distance = int(other_begins) - int(begins)
    return distance >= len(one.outcomes) or -distance >= len(other.outcomes)


def permit(chunk: ScanChunk, rules: TargetRules, *, raw: bool) -> Permitted:
    """Refuse what may not be scanned, address by address, and everything if it cannot be done here."""
    # What counts is the chunk's own ports: the TCP part of a policy with UDP ports can be done without raw packets.
    here = chunk.policy.model_copy(update={"ports": chunk.ports})
    refused: list[Network] = []
    unable = f"{_needs(here)} raw packets, which no worker here may send" if here.needs_raw and not raw else ""
    denied = ""
    for network in networks(chunk.first_address, chunk.outcomes):
        for part, why in _judged(network, rules):
            if unable or why:
                refused.append(part)
            denied = denied or why
    letters = list(chunk.outcomes)
    for network in refused:
        start = index_of(chunk.first_address, str(network.network_address))
        letters[start : start + network.num_addresses] = Outcome.REFUSED * network.num_addresses
    return Permitted("".join(letters), unable or denied, denied)


def _needs(policy: ScanPolicy) -> str:
    if policy.technique == "syn":
        return "technique syn needs"
    return "OS detection needs" if policy.os_detection else "UDP ports need"


def _judged(network: Network, rules: TargetRules) -> Iterable[tuple[Network, str]]:
    why = rules.refusal(network)
    if why is None:
        yield network, ""
    elif network.num_addresses == 1:
        yield network, why
    else:
        for half in network.subnets():
            yield from _judged(half, rules)


def technique(policy: ScanPolicy, *, raw: bool) -> Technique:
    """How TCP ports are probed: as the policy says; auto is SYN where raw packets may be sent."""
    return "syn" if policy.technique == "syn" or (policy.technique == "auto" and raw) else "connect"


def _executable(chunk: ScanChunk) -> ExecutablePolicy:
    try:
        return executable(chunk.policy)
    except PolicyError as error:
        raise ScanError(str(error)) from error


def arguments(chunk: ScanChunk, targets: Sequence[Network], *, raw: bool) -> list[str]:
    """nmap's arguments for `targets`, which are distinct and of one family. Made of numbers and fixed words alone."""
    policy, ports = _executable(chunk), PortSet.parse(chunk.ports)
    # nmap's own group size, but never the small first groups that it makes for impatient people: a group is written when
    # all of it is done, so it is the grain of streaming and resuming, and a smaller one only waits more often.
    group = str(max(GROUP_HOSTS, _GROUP_PROBES // ports.count))
    return [
        *("-v", "-n", "-oX", "-", "--stats-every", "1s"),
        # Left alone, nmap takes root for able and everyone else for not, whatever capabilities they have.
        "--privileged" if raw else "--unprivileged",
        *(["-6"] if targets[0].version == 6 else []),  # noqa: PLR2004 # IPv6
        *(["-Pn"] if policy.discovery == "none" else []),
        *([_TECHNIQUES[technique(policy, raw=raw)]] if ports.tcp_count else []),
        *(["-sU"] if ports.udp_count else []),
        *(["--top-ports", str(ports.top)] if ports.top else ["-p", str(ports)]),
        *(["-sV", "--version-intensity", str(policy.version_intensity)] if policy.service_detection else []),
        *(["-O"] if policy.os_detection else []),
        *(["--script", policy.script_selection] if policy.scripts else []),
        f"-T{policy.timing}",
        *_number("--max-rate", policy.max_rate),
        *_number("--max-retries", policy.max_retries),
        *_number("--host-timeout", policy.host_timeout, "s"),
        *("--min-hostgroup", group, "--max-hostgroup", group),
        "--",
        *map(str, targets),
    ]


_TECHNIQUES: Final[dict[Technique, str]] = {"connect": "-sT", "syn": "-sS"}


def _number(option: str, value: int | None, unit: str = "") -> list[str]:
    return [] if value is None else [option, f"{value}{unit}"]


def services(ports: PortSet) -> dict[str, int]:
    """What nmap must say that it probes: `<scaninfo numservices>` by protocol."""
    counts = {"tcp": ports.tcp_count, "udp": ports.udp_count}
    return {protocol: count for protocol, count in counts.items() if count}


def outcome(host: Host, ports: int) -> Outcome:
    """The letter of a host of a chunk of `ports`; blank when its ports do not add up."""
    if not host.up:
        return Outcome.DOWN
    if host.timed_out:
        return Outcome.TIMED_OUT
    if host.ports != ports:
        return Outcome.BLANK
    # With discovery off nmap takes every address as up, "user-set"; then only a port can have answered.
    if host.reasons <= _NOT_FROM_HOST | {b"user-set"}:
        return Outcome.SILENT
    return Outcome.ANSWERED


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with all that is no plain text written as an escape (`\x1b`, `\u202e`), except the characters to `keep`."""

    def escape(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _NO_TEXT.sub(escape, text)


def fit(host: HostScanned, limit: int = MAX_BYTES) -> HostScanned:
    """`host` within the bus's size limit. Its ports stay, whatever else must go."""
    for field in _EXPENDABLE:
        if len(host.model_dump_json(exclude_defaults=True)) <= limit:
            break
        host = host.model_copy(
            update={"ports": tuple(port.model_copy(update={field: ""}) for port in host.ports), "trimmed": True},
        )
    return host


_EXPENDABLE: Final = ("raw_data", "banner", "os_info", "version", "service")
