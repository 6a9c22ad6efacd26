"""Translate a chunk for nmap: the permitted addresses, the command line, and the outcome code of each host."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from math import ceil
from typing import Any, Final, NamedTuple

from scanfleet.contracts.messages import HostDetails, HostScanned, ScanChunk
from scanfleet.contracts.messages.fields import MAX_BYTES, MAX_EVENT_ID_CHARS
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.errors import Rule
from scanfleet.scanning.nmap_options import nmap_options
from scanfleet.scanning.outcomes import Outcome, index_of, networks
from scanfleet.scanning.policy import (
    ADMITTED_SCRIPTS,
    BATCH_SECONDS,
    VERSION_SCRIPTS,
    PolicyError,
    ScanPolicy,
    executable,
    max_joined_addresses,
)
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Network, TargetRules

_MAX_HOST_BYTES: Final = MAX_BYTES - 2 * MAX_EVENT_ID_CHARS  # leaves room for the id of the event
REASON_CHARS: Final = 500  # maximum length of a failure reason, which becomes part of the job's `error`

FROM_HOST: Final = frozenset(
    {
        # to discovery
        *(b"arp-response", b"nd-response", b"echo-reply", b"timestamp-reply", b"addressmask-reply", b"proto-response"),
        b"localhost-response",
        # to a probe of a port
        *(b"syn-ack", b"split-handshake-syn", b"reset", b"conn-refused", b"tcp-response", b"udp-response"),
        *(b"init-ack", b"abort"),
        # a script set the port's state after an answer
        b"script-set",
        # for a UDP port; the reader leaves out those that another machine may have sent
        b"port-unreach",
    },
)
"""nmap's reasons that only the address itself can cause: a closed list for nmap 7.92 and newer."""

# Characters that are not plain text: they affect a terminal or a page (control characters including C1, separators,
# zero-width and direction marks), or they are invalid (surrogates, non-characters).
_NO_TEXT: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]",
)


class ScanError(Exception):
    """nmap crashed, stalled or wrote malformed output. Counts against the chunk; the job's owner sees the message."""


class NoRouteError(ScanError):
    """This machine has no route to targets that nmap skipped or got no answer from: neither the worker nor the targets failed."""


class CannotStartError(Exception):
    """This worker cannot start nmap: a failure of the worker, not of the chunk. The message has the cause and the remedy."""


class KilledByGuardError(Exception):
    """The guard killed nmap because this worker's event loop was blocked: a failure of the worker, not of the chunk."""


class Host(NamedTuple):
    """A complete `<host>` element."""

    address: str
    up: bool
    timed_out: bool
    ports: int
    """Number of ports that it accounts for, listed individually or summarized."""

    reasons: AbstractSet[bytes]
    """nmap's reasons for the states of the host and its ports, without those that another machine may have caused."""

    element: bytes
    """The element as nmap wrote it, without the end tag: UTF-8 with well-formed elements and no other markup.

    It includes host scripts (`<hostscript>`), OS matches and other details of the host.
    """

    open_filtered: str = ""
    """The silent UDP ports that nmap summarizes, as in HostScanned."""

    details: HostDetails | None = None
    """Facts that nmap reports about the host as a whole; None before they were read, and for a silent or down host."""

    @property
    def answered(self) -> bool:
        # Without discovery nmap reports every address as up, "user-set"; then only a port can have answered.
        return self.up and not self.timed_out and bool(self.reasons & FROM_HOST)


@dataclass(frozen=True, slots=True)
class Permitted:
    """The result of checking a chunk against the worker's target rules."""

    outcomes: str
    reason: str
    """Why addresses are refused; empty if none is."""

    denied: str
    """Why addresses may not be scanned, in the text of the rule; empty if all of them may be scanned."""

    rule: Rule = Rule.TARGETS
    """The name of that rule."""


def together(waiting: Sequence[ScanChunk], free_slots: int) -> Sequence[ScanChunk]:
    """Choose the first of `waiting` and the chunks that can share its nmap: same user, policy, ports and rates.

    Compatible chunks are split evenly over the free slots, less one slot for each waiting chunk of another kind. No address
    is chosen twice, and together the chunks have at most 20 addresses, or 1,024 probes if that is more. A chunk that has
    failed or has a limit does not share an nmap: a target that crashes nmap must not fail other chunks a second time.
    """
    first, *others = waiting
    alike = [other for other in others if _alike(first, other)]
    slots = max(1, free_slots - (len(others) - len(alike)))
    most = ceil((1 + len(alike)) / slots)
    most_addresses = max_joined_addresses(PortSet.parse(first.ports).count)
    chosen, seconds, addresses = [first], first.estimate_seconds, len(first.outcomes)
    for other in alike:
        longer, more = seconds + other.estimate_seconds, addresses + len(other.outcomes)
        fits = len(chosen) < most and longer <= BATCH_SECONDS and more <= most_addresses
        if fits and all(_disjoint(each, other) for each in chosen):
            chosen.append(other)
            seconds, addresses = longer, more
    return chosen


def _alike(one: ScanChunk, other: ScanChunk) -> bool:
    if any(chunk.failures or chunk.limit for chunk in (one, other)):
        return False
    # Chunks of different users are not combined although that would save starts: a shared nmap waits for the slowest host of
    # its group and fails with any host that crashes it, so one user's targets would delay and fail another's.
    return _kind(one) == _kind(other)


def _kind(chunk: ScanChunk) -> tuple[object, ...]:
    family = ip_address(chunk.first_address).version
    return family, chunk.user_id, chunk.ports, chunk.max_rate, chunk.min_rate, chunk.policy


def _disjoint(one: ScanChunk, other: ScanChunk) -> bool:
    distance = int(ip_address(other.first_address)) - int(ip_address(one.first_address))
    return distance >= len(one.outcomes) or -distance >= len(other.outcomes)


def permit(chunk: ScanChunk, rules: TargetRules, grants: UserGrants | None = None, *, raw: bool) -> Permitted:
    """Refuse each address that may not be scanned, or all of them if this worker cannot execute the policy."""
    # Only the chunk's own ports count: the TCP part of a policy with UDP ports does not need raw packets.
    here = chunk.policy.model_copy(update={"ports": chunk.ports})
    refused: list[Network] = []
    # The orchestrator dispatches no such chunk, unless its document is damaged: nmap would not start, for which the worker would
    # exclude itself, and so would the next one.
    unable = "the chunk needs raw packets, which this worker may not send" if here.needs_raw and not raw else ""
    denied, rule = "", Rule.TARGETS
    # The rate that nmap gets: its part of the job's, if the job has one.
    asked = chunk.policy.model_copy(update={"max_rate": chunk.max_rate or chunk.policy.max_rate})

    def refusal(network: Network) -> str | None:
        if (why := rules.refusal(network)) or grants is None:
            return why
        return grants.refusal(chunk.granted_by, chunk.user_id, network, asked, rules.nat64)

    for network in networks(chunk.first_address, chunk.outcomes):
        for part, why in _judged(network, refusal):
            if unable or why:
                refused.append(part)
            if why and not denied:
                denied, rule = why, Rule.TARGETS if rules.refusal(part) else Rule.GRANT
    codes = list(chunk.outcomes)
    for network in refused:
        start = index_of(chunk.first_address, str(network.network_address))
        codes[start : start + network.num_addresses] = Outcome.REFUSED * network.num_addresses
    return Permitted("".join(codes), unable or denied, denied, rule)


def _judged(network: Network, refusal: Callable[[Network], str | None]) -> Iterable[tuple[Network, str]]:
    why = refusal(network)
    if why is None:
        yield network, ""
    elif network.num_addresses == 1:
        yield network, why
    else:
        for half in network.subnets():
            yield from _judged(half, refusal)


def scripts_of(policy: ScanPolicy) -> tuple[str, ...]:
    """Return the NSE scripts that nmap runs for a policy."""
    return tuple(sorted(VERSION_SCRIPTS.union(policy.scripts) if policy.service_detection else set(policy.scripts)))


def detection_of(policy: ScanPolicy) -> str:
    """Return the detection that nmap runs for a policy, as in ChunkScanned: `sV7/O/banner,ssl-cert`."""
    parts = (
        f"sV{policy.version_intensity}" if policy.service_detection else "",
        "O" if policy.os_detection else "",
        ",".join(sorted(policy.scripts)),
    )
    return "/".join(part for part in parts if part)


def arguments(
    chunk: ScanChunk,
    ports: PortSet,
    targets: Sequence[Network],
    *,
    raw: bool,
    scripts: AbstractSet[str] = ADMITTED_SCRIPTS,
) -> list[str]:
    """Build nmap's arguments, which consist of numbers and fixed words.

    Args:
        chunk: the chunk, or one of those that share this nmap.
        ports: the chunk's ports; by number where the chunk has a part of the most common ports.
        targets: distinct networks of one family.
        raw: whether raw packets may be sent.
        scripts: the NSE scripts that a policy may name.

    Raises:
        ScanError: the policy has values that this worker does not support, or a script that is not in `scripts`.
    """
    try:
        policy = executable(chunk.policy, scripts)
    except PolicyError as error:
        raise ScanError(f"this worker cannot execute the policy; change the policy: {error}") from error
    options = nmap_options(
        policy,
        ports,
        addresses=sum(target.num_addresses for target in targets),
        family=targets[0].version,
        min_rate=chunk.min_rate,
        max_rate=chunk.max_rate or policy.max_rate,
        raw=raw,
    )
    return [*options, "--", *map(str, targets)]


def digest(line: Sequence[str]) -> str:
    """Return the SHA-256 of these arguments of nmap up to the targets, which other chunks of a scan do not share."""
    return sha256("\0".join(line[: line.index("--")]).encode()).hexdigest()


def services(ports: PortSet) -> dict[str, int]:
    """Return the port counts that nmap must announce, by protocol: `<scaninfo numservices>`."""
    counts = {"tcp": ports.tcp_count, "udp": ports.udp_count}
    return {protocol: count for protocol, count in counts.items() if count}


def outcome(host: Host, ports: int) -> Outcome:
    """Return the outcome of a host in a chunk of `ports` ports; blank if it does not account for all of them."""
    if not host.up:
        return Outcome.DOWN
    if host.timed_out:
        return Outcome.TIMED_OUT
    if host.ports != ports:
        return Outcome.BLANK
    return Outcome.ANSWERED if host.answered else Outcome.SILENT


def printable(text: str, *, keep: str = "") -> str:
    r"""Return `text` with characters that are not plain text escaped (`\x1b`, `\u202e`), except those in `keep`."""

    def escape(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _NO_TEXT.sub(escape, text)


def fit(host: HostScanned) -> HostScanned:
    """Return `host` trimmed to the size limit of a message: texts are dropped, ports are kept."""
    for field in _EXPENDABLE:
        if len(host.model_dump_json(exclude_defaults=True).encode()) <= _MAX_HOST_BYTES:
            break
        host = host.model_copy(update={**_without(host, field), "trimmed": True})
    return host


def _without(host: HostScanned, field: str) -> dict[str, Any]:
    if field not in HostDetails.model_fields:
        return {"ports": tuple(port.model_copy(update={field: ""}) for port in host.ports)}
    empty = HostDetails.model_fields[field].default
    return {"details": host.details and host.details.model_copy(update={field: empty})}


_EXPENDABLE: Final = ("element", "scripts", "raw_data", "banner", "os_info", "version", "service")
