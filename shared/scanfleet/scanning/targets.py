"""Scan targets: the syntax of networks, the target rules, and excluded addresses.

The rules fail closed: targets that no rule allows are refused. They are checked when a subnet is stored, when a job is
created from it, and by the worker immediately before nmap starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_address, ip_network
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Annotated, Final

from pydantic import BeforeValidator

Network = IPv4Network | IPv6Network

DEFAULT_MAX_ADDRESSES: Final = 65_536  # a /16: the largest private network in common use
_LONGEST_WITH_BROADCAST: Final = 30  # prefix length: a /31 is a link between two hosts (RFC 3021)

# Stricter than `ipaddress`: no netmask, no zone, no leading zero in the prefix length.
_NETWORK = re.compile(r"[0-9a-fA-F:.]{2,45}(/(0|[1-9][0-9]{0,2}))?")

# Never scanned, whatever the configuration: these have no legitimate use as targets but help an attacker.
_NEVER: Final[tuple[tuple[Network, str], ...]] = (
    (IPv4Network("0.0.0.0/8"), "unspecified addresses"),
    (IPv4Network("169.254.0.0/16"), "link-local addresses and the metadata services among them"),
    (IPv4Network("224.0.0.0/4"), "multicast addresses"),
    (IPv4Network("240.0.0.0/4"), "reserved and broadcast addresses"),
    (IPv6Network("::/128"), "unspecified addresses"),
    (IPv6Network("fe80::/10"), "link-local addresses"),
    (IPv6Network("ff00::/8"), "multicast addresses"),
    # Metadata services that clouds keep outside the link-local networks: Alibaba, Azure, Oracle, AWS and its EKS, Google,
    # Scaleway.
    (IPv4Network("100.100.100.200/32"), "metadata services"),
    (IPv4Network("168.63.129.16/32"), "metadata services"),
    (IPv4Network("192.0.0.192/32"), "metadata services"),
    (IPv6Network("fd00:ec2::254/128"), "metadata services"),
    (IPv6Network("fd00:ec2::23/128"), "metadata services"),
    (IPv6Network("fd20:ce::254/128"), "metadata services"),
    (IPv6Network("fd00:42::42/128"), "metadata services"),
    # These also map to IPv4 addresses, but the mapping depends on an unknown translator or relay.
    (IPv6Network("64:ff9b:1::/48"), "local NAT64 addresses"),
    (IPv6Network("2001::/32"), "Teredo addresses"),
)

# IPv6 addresses with an embedded IPv4 address after the prefix; packets to them reach that IPv4 address.
_EMBEDDING: Final = (
    IPv6Network("::/96"),  # IPv4-compatible (RFC 4291)
    IPv6Network("::ffff:0:0/96"),  # IPv4-mapped (RFC 4291)
    IPv6Network("::ffff:0:0:0/96"),  # IPv4-translated (RFC 2765)
    IPv6Network("64:ff9b::/96"),  # NAT64 (RFC 6052)
    IPv6Network("2002::/16"),  # 6to4 (RFC 3056)
)
_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)  # followed by an IPv4 address, in the lower half of any address (RFC 5214)
_LOOPBACK: Final = IPv6Network("::1/128")

NAT64_LENGTHS: Final = frozenset({32, 40, 48, 56, 64, 96})
"""Prefix lengths of a site's own NAT64 (RFC 6052)."""


def parse_network(text: str) -> Network:
    """Parse a network such as `10.1.2.0/24` or `2001:db8::/64`; a single address is a /32 or /128.

    Raises:
        ValueError: the syntax is different, or host bits are set. The message is suitable for users.
    """
    unreadable = f'{text[:50]!r} is not a network such as "10.1.2.0/24" or "2001:db8::/64"'
    if _NETWORK.fullmatch(text) is None:
        raise ValueError(unreadable)
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(unreadable) from None
    if network.network_address != ip_address(text.partition("/")[0]):
        raise ValueError(f"{text} has host bits set; the network is {network}")
    return network


def _parsed(value: object) -> object:
    return parse_network(value) if isinstance(value, str) else value


FROM_TEXT: Final = BeforeValidator(_parsed)
"""Validator that parses text with `parse_network`."""

ParsedNetwork = Annotated[Network, FROM_TEXT]


@dataclass(frozen=True, slots=True)
class TargetRules:
    """The operator's configuration of allowed and denied networks."""

    allowed: tuple[Network, ...]
    denied: tuple[Network, ...] = ()
    max_addresses: int = DEFAULT_MAX_ADDRESSES
    nat64: tuple[IPv6Network, ...] = ()
    """Prefixes of the site's NAT64, of a length in `NAT64_LENGTHS`."""

    @property
    def digest(self) -> str:
        """SHA-256 of the rules in canonical form, so that a record states which rules were in force."""
        networks = [sorted(map(str, each)) for each in (self.allowed, self.denied, self.nat64)]
        return sha256(json.dumps([*networks, self.max_addresses]).encode()).hexdigest()

    def refusal(self, network: Network) -> str | None:
        """Return the rule that forbids scanning `network` as a sentence for the user; None if all of it may be scanned.

        Deny wins over allow, and several allowed networks together may cover one. An IPv6 network whose addresses embed
        IPv4 addresses must be acceptable itself, and so must every IPv4 address that it embeds.
        """
        if network.num_addresses > self.max_addresses:
            return f"{network} has {network.num_addresses} addresses; a subnet has at most {self.max_addresses}"
        for never, what in _NEVER:
            if network.overlaps(never):
                return f"{network} overlaps {never}: {what} are never scanned"
        for denied in self.denied:
            if network.overlaps(denied):
                return f"{network} overlaps {denied}, which this platform denies"
        for embedded in _embedded(network, self.nat64):
            if reason := self.refusal(embedded):
                return f"{network} leads to IPv4 addresses: {reason}"
        if not _within_any(network, self.allowed):
            return f"{network} is not within the networks that this platform allows"
        return None


def covers(network: Network, allowed: Iterable[Network], nat64: Iterable[IPv6Network] = ()) -> bool:
    """Return whether `network`, and all IPv4 that it embeds, lie within `allowed`, several of which may cover it together."""
    allowed = tuple(allowed)
    return all(_within_any(each, allowed) for each in (network, *_embedded(network, nat64)))


@dataclass(frozen=True, slots=True)
class Target:
    """A network to scan, without some networks in it."""

    network: Network
    holes: tuple[tuple[int, int], ...] = ()
    """The excluded networks as half-open ranges of positions: sorted, disjoint, merged, and not all of the network."""

    @classmethod
    def parse(cls, cidr: str, exclude: Iterable[str] = ()) -> Target:
        """Parse a subnet. Exclusions outside the network have no effect; overlapping or adjacent ones are merged.

        So one list of exclusions can serve every subnet of a site. Its cost is a few microseconds per exclusion, because a
        request may refer to a hundred thousand of them.

        Raises:
            ValueError: a text is not a network, or every address is excluded. The message is suitable for users.
        """
        network = parse_network(cidr)
        family, first, size = network.version, int(network.network_address), network.num_addresses
        given = [(start - first, end - first) for version, start, end in map(_span, exclude) if version == family]
        if any(start <= 0 and end >= size for start, end in given):
            raise ValueError(f"every address of {network} is excluded")
        target = cls(network, _merged((start, end) for start, end in given if start >= 0 and end <= size))
        if target.included == 0:
            raise ValueError(f"every address of {network} is excluded")
        return target

    @property
    def included(self) -> int:
        """The number of addresses to scan."""
        return self.network.num_addresses - sum(end - start for start, end in self.holes)

    @property
    def exclude(self) -> tuple[str, ...]:
        """The excluded networks in canonical form."""
        write = _ipv4 if isinstance(self.network, IPv4Network) else _ipv6
        bits, first = self.network.max_prefixlen, int(self.network.network_address)
        return tuple(f"{write(first + start)}/{bits + 1 - (end - start).bit_length()}" for start, end in self.holes)

    def without_broadcast(self) -> Target:
        """Exclude the network's broadcast address: every host would answer a raw packet to it.

        Loopback networks and a /31 or /32 have none.

        Raises:
            ValueError: no other address is left. The message is suitable for users.
        """
        network = self.network
        if isinstance(network, IPv6Network) or network.is_loopback or network.prefixlen > _LONGEST_WITH_BROADCAST:
            return self
        end = network.num_addresses
        target = Target(network, _merged((*self.holes, (end - 1, end))))
        if target.included == 0:
            raise ValueError(f"every address of {network} but its broadcast address is excluded")
        return target


def _span(text: str) -> tuple[int, int, int]:
    """Return the IP version of a network, and the half-open range of its addresses as integers.

    Raises:
        ValueError: as `parse_network`, which takes ten times as long.
    """
    match = _NETWORK.fullmatch(text)
    address, slash, length = text.partition("/")
    version, bits, family = (6, 128, AF_INET6) if ":" in address else (4, 32, AF_INET)
    try:
        first = int.from_bytes(inet_pton(family, address))
        size = 1 << (bits - int(length) if slash else 0)
    except (OSError, ValueError):
        match = None
    if match is None or first % size:
        network = parse_network(text)
        return network.version, int(network.network_address), int(network.broadcast_address) + 1
    return version, first, first + size


def _ipv4(address: int) -> str:
    """Return the address as `ipaddress` writes it, which takes ten times as long."""
    return inet_ntop(AF_INET, address.to_bytes(4))


def _ipv6(address: int) -> str:
    """Return the address as `_ipv4` does."""
    text = inet_ntop(AF_INET6, address.to_bytes(16))
    return str(IPv6Address(address)) if "." in text else text  # the spelling of an embedded IPv4 address differs


def _merged(networks: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the fewest networks, sorted, that contain the same positions of a larger network."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(networks):
        # Networks are disjoint or contain one another, and of those with the same start the smallest is first.
        if merged and end <= merged[-1][1]:
            continue
        while merged and merged[-1][0] >= start:
            merged.pop()
        low, size = start, end - start
        while merged and merged[-1] == (low - size, low) and low % (2 * size):
            low, size = merged.pop()[0], 2 * size
        merged.append((low, low + size))
    return tuple(merged)


def _within(inner: Network, outer: Network) -> bool:
    """Return the same as `subnet_of`, which raises if the families differ."""
    return inner.network_address in outer and inner.prefixlen >= outer.prefixlen


def _within_any(network: Network, outer: Iterable[Network]) -> bool:
    # Once collapsed, a union of networks covers another only if one of its members does.
    family = [each for each in outer if each.version == network.version]
    union = collapse_addresses(family)  # type: ignore[type-var] # typed for one family, which these are
    return any(_within(network, each) for each in union)


def _embedded(network: Network, nat64: Iterable[IPv6Network]) -> Iterable[IPv4Network]:
    """Yield the IPv4 networks embedded in `network`: all of IPv4 if it contains a whole embedding prefix."""
    if isinstance(network, IPv4Network) or network == _LOOPBACK:
        return
    for prefix in (*_EMBEDDING, *nat64):
        if network.overlaps(prefix):
            yield _read(network, [bit for bit in range(prefix.prefixlen, 128) if bit not in _U_OCTET][:32])
    # In the half of the identifier before the IPv4 address, these bits are equal in all addresses.
    fixed = min(max(network.prefixlen - 64, 0), 32)
    half = int(network.network_address) >> 32 & 0xFFFF_FFFF
    if any(half >> (32 - fixed) == isatap >> (32 - fixed) for isatap in _ISATAP):
        yield _read(network, range(96, 128))


_U_OCTET: Final = range(64, 72)  # no embedded address has bits here (RFC 6052)


def _read(network: IPv6Network, bits: Sequence[int]) -> IPv4Network:
    """Return the IPv4 network encoded in these 32 bits of `network`; bit 0 is the first."""
    length = sum(bit < network.prefixlen for bit in bits)
    address = 0
    for bit in bits:
        address = address << 1 | (int(network.network_address) >> (127 - bit) & 1)
    return IPv4Network((address >> (32 - length) << (32 - length), length))
