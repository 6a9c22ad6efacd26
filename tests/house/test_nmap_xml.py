"""nmap's XML: what nmap wrote, read by a worker, stored, and exported again."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import nmap
import pytest

from result_store.api.host_xml import Reported
from result_store.api.hosts import merged
from result_store.api.nmap_xml import document
from result_store.domain.results import ClosedChunk, Host, Parts, Place
from result_store_testing import EPOCH, MemoryStore
from result_store_testing import host as host_of
from result_store_testing.dtd import Dtd
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.rest import ExportedJob
from scanner_worker.domain.scan import outcome
from scanner_worker.scanner.python_nmap import read
from scanner_worker.scanner.xml import Reader

RECORDINGS: Final = Path(__file__).parents[2] / "services/scanner-worker/tests/recordings"
COMPLETE: Final = sorted(path.stem for path in RECORDINGS.glob("*.xml"))


async def exported(recorded: bytes) -> str:
    """Return the export of a job whose worker had this output of nmap, with a chunk for each address."""
    reader = Reader(max_host_bytes=1 << 20)
    hosts = list(reader.feed(recorded))
    info = ET.fromstring(recorded).findall("scaninfo")  # noqa: S314 # a file of this repository
    asked = {each.attrib["protocol"]: each.attrib["services"] for each in info}
    ports = ",".join(f"{protocol[0].upper()}:{numbers}" for protocol, numbers in asked.items())
    discovery = "none" if b" -Pn " in recorded else "default"
    store = MemoryStore()
    for number, each in enumerate(hosts):
        id_, code = f"1-{number}", outcome(each, sum(reader.services.values())).value
        if each.up:
            details, found = read(each)
            fields: dict[str, Any] = {"outcome": code, "open_filtered": each.open_filtered, "details": details}
            await store.add([Host(host_of(each.address, *found, chunk_id=id_, **fields), Place(EPOCH, number))])
        tcp = asked.get("tcp", "")
        await store.close([ClosedChunk(1, id_, each.address, code, 7, "syn", reader.version, tcp, discovery=discovery)])
    job = ExportedJob(
        job_id=1,
        status=JobStatus.COMPLETED,
        error="",
        cidr=str(ip_network(hosts[0].address)),
        ports=ports,
        start=EPOCH,
        end=EPOCH,
    )
    of_hosts = merged(store.hosts_by_address(1, 7, Parts.DETAILS), Reported)
    listed = store.hosts_by_address(1, 7, Parts.PORTS)
    return "".join([part async for part in document(job, of_hosts, listed, lambda: store.chunks_by_address(1, 7))])


def seen(written: str) -> dict[str, Any]:
    """Return the hosts that python-nmap reads."""
    reader = object.__new__(nmap.PortScanner)  # without the constructor, which runs nmap
    found: dict[str, Any] = reader.analyse_nmap_xml_scan(written)["scan"]
    return found


def elements(written: str) -> dict[str, str]:
    """Return the host elements by address in canonical form, without the times at which they were scanned."""
    found = {}
    for host in ET.fromstring(written).iter("host"):  # noqa: S314 # written by nmap and by this platform
        for each in ("starttime", "endtime"):
            host.attrib.pop(each, None)
        (address,) = (each.attrib["addr"] for each in host.findall("address") if each.attrib["addrtype"] != "mac")
        found[address] = ET.canonicalize(ET.tostring(host), strip_text=True)
    return found


def sums(written: str) -> dict[str, set[tuple[str, str]]]:
    """Return the states and numbers of the ports that are summed up, by address."""
    hosts = ET.fromstring(written).iter("host")  # noqa: S314 # written by nmap and by this platform
    found = {
        host.find("address").attrib["addr"]: {  # type: ignore[union-attr] # every host has one
            (each.attrib["state"], each.attrib["count"]) for each in host.iter("extraports")
        }
        for host in hosts
    }
    return {address: states for address, states in found.items() if states}


@pytest.mark.parametrize("name", COMPLETE)
async def test_nmap_xml_export_contains_the_elements_of_nmap(name: str) -> None:
    """Of each host that has answered the export has the element that nmap wrote, of others their states and sums of ports."""
    recorded = (RECORDINGS / f"{name}.xml").read_bytes()
    written = await exported(recorded)
    assert Dtd().faults(written) == []
    own, other = seen(written), seen(recorded.decode())
    assert own.keys() == other.keys()
    assert {address: each["status"] for address, each in own.items()} == {
        address: each["status"] for address, each in other.items()
    }
    summed_up, expected = sums(written), sums(recorded.decode())
    unknown = {"127.9.1.8"} if name == "udp" else set()  # closed for its router's ICMP errors, as far as nmap reports
    assert {address: summed_up.get(address) for address in expected.keys() - unknown} == {
        address: states for address, states in expected.items() if address not in unknown
    }
    of_own, of_other = elements(written), elements(recorded.decode())
    answered = {host.address for host in Reader(max_host_bytes=1 << 20).feed(recorded) if host.answered}
    for address in answered:
        assert own[address] == other[address]
        assert of_own[address] == of_other[address]
