"""Write the ports of a host as nmap does: from the elements that its worker reported, or from the stored fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from result_store.api.elements import Element, MalformedError, attribute, read_port
from result_store.api.host_xml import contents
from scanfleet.contracts.messages import HostScanned, PortFound

_NOT_OPEN: Final = ("closed", "filtered")


def ports(host: HostScanned) -> Iterator[str]:
    """Yield the elements of the ports that nmap listed one by one, in its order."""
    found = {(each.protocol, each.port): each for each in host.ports}
    others = {key: each.written for key, each in _not_open(host)}
    for key in sorted(found.keys() | others.keys()):
        yield port(found[key]) if key in found else others[key]


def _not_open(host: HostScanned) -> Iterator[tuple[tuple[str, int], Element]]:
    if host.details is None or "<port " not in host.details.element:
        return  # most hosts: nmap sums up their ports that are not open
    for each in contents(host):
        if each.name == "port" and each.children[0][1]["state"] in _NOT_OPEN:
            yield (each.attributes["protocol"], int(each.attributes["portid"])), each


def port(found: PortFound) -> str:
    """Return the element of an open port."""
    try:
        element = read_port(found.raw_data)
    except MalformedError:
        return _from_fields(found)
    own = {"protocol": found.protocol, "portid": str(found.port)}
    same = element.attributes == own and element.children[0][1]["state"] == found.status
    return element.written if same else _from_fields(found)


def _from_fields(found: PortFound) -> str:
    parts = [f'<port protocol="{found.protocol}" portid="{found.port}">']
    parts.append(f'<state{attribute("state", found.status)} reason="unknown-response" reason_ttl="0"/>')
    if found.service:
        tls = found.service.startswith("ssl/")
        parts.append(f"<service{attribute('name', found.service.removeprefix('ssl/') or 'unknown')}")
        parts.append(attribute("product", found.version) if found.version else "")
        parts.append(attribute("tunnel", "ssl") if tls else "")
        parts.append(' method="probed" conf="10"/>' if found.version else ' method="table" conf="3"/>')
    if found.banner:
        parts.append(f'<script id="banner"{attribute("output", found.banner)}/>')
    return "".join((*parts, "</port>"))
