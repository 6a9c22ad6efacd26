"""The source address of a request behind trusted proxies, and the client that limits count it as."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

from scanfleet.scanning.targets import Network

_IPV6_SITE: Final = 64  # smallest prefix of one subscriber: all of its addresses are one client


class Proxies:
    """The trusted proxies in front of a service.

    Args:
        networks: every address in these networks is a trusted proxy.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    def __contains__(self, host: str) -> bool:
        if not self._networks or (address := _address(host)) is None:
            return False
        return any(address in network for network in self._networks)

    def source(self, peer: str, forwarded: Sequence[str]) -> str:
        """Return the address that the request came from.

        Each proxy appends the address of its client to X-Forwarded-For; everything before that entry may be invented by
        the client. So the source is the last address that is not a trusted proxy, or the first one if all are.

        Args:
            peer: address of the connection's other end.
            forwarded: values of X-Forwarded-For, in order.
        """
        source = peer
        hops = [hop for value in forwarded for hop in value.split(",")]
        while source in self and hops:
            address = _address(hops.pop())
            if address is None:
                break  # the proxy reported an invalid address, so that proxy is the last known hop
            source = str(address)
        return source


def client_network(host: str) -> str:
    """Return what limits per client count a source as: an IPv4 address, in either spelling, or an IPv6 /64 network.

    Text that is not an address is returned as it is.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address), _IPV6_SITE), strict=False))


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address in one hop; some proxies add the port, and brackets around IPv6."""
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host.partition("%")[0])  # a zone names an interface of the proxy
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
