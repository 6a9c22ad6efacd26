"""Where a request came from, behind proxies that are trusted to report it."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from scanfleet.targets import Network


class Proxies:
    """The proxies before a service.

    Args:
        networks: in which every address is one of them.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    def __contains__(self, host: str) -> bool:
        if not self._networks or (address := _address(host)) is None:
            return False
        return any(address in network for network in self._networks)

    def source(self, peer: str, forwarded: Sequence[str]) -> str:
        """The address that the request came from.

        Each proxy appends the address that it was called from to X-Forwarded-For, and whatever is left of that its caller may
        have made up. So this is the last address that is no trusted proxy's, or the first one when all are.

        Args:
            peer: what the connection came from.
            forwarded: the values of X-Forwarded-For, in order.
        """
        source = peer
        hops = [hop for value in forwarded for hop in value.split(",")]
        while source in self and hops:
            address = _address(hops.pop())
            if address is None:
                break  # the proxy before it reports nonsense; it is the last hop that is known
            source = str(address)
        return source


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address in one hop; some proxies add its port, and brackets if it is IPv6."""
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
