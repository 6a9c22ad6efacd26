"""Documents as this release writes them, with fixed values: `make release` keeps them, and later releases must read them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from result_store.domain.results import ClosedChunk, Host, Place
from result_store.repository import _chunk_document, _host_document, _port_set_document
from result_store_testing import EPOCH, host
from scanfleet.contracts.messages import PortFound


def golden() -> dict[str, dict[str, Any]]:
    """Return the documents of result-store's database by name: the collection, and what the example shows."""
    ssh = PortFound(
        port=22,
        service="ssh",
        version="OpenSSH 9.2p1 Debian 2 (protocol 2.0)",
        os_info="Linux",
        banner="SSH-2.0-OpenSSH_9.2p1 Debian-2",
        raw_data='<port protocol="tcp" portid="22"><state state="open" reason="syn-ack"/></port>',
    )
    place = Place(EPOCH, 4_711)
    answered = Host(host("127.9.8.1", ssh, 80, open_filtered="U:53,161-162"), place)
    silent = Host(host("127.9.8.2", outcome="s"), place)
    closed = ClosedChunk(
        1, "1-0", "127.9.8.0", "aadsddta", 7, "connect", "7.93", "22,80", "0" * 64, "sV7/banner", "default", EPOCH
    )
    many = replace(closed, chunk_id="1-1", ports=",".join(map(str, range(1, 200, 2))))
    return {
        "host": _host_document(answered) | {"first_id": 100},
        "host-silent": _host_document(silent),
        "chunk": _chunk_document(closed),
        "chunk-many-ports": _chunk_document(many),
        "port-set": _port_set_document(many),
    }
