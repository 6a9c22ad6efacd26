"""The document in nmap's XML format: what it has, what it refuses, and its bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import quoteattr

import httpx2
import nmap
import pytest
from hypothesis import given
from hypothesis import strategies as st

from result_store.api import nmap_xml
from result_store.api.elements import text
from result_store.api.host_xml import Reported
from result_store.api.hosts import merged
from result_store.api.nmap_xml import document
from result_store.api.port_xml import port
from result_store.domain.results import ClosedChunk, Host, Parts, Place
from result_store_testing import EPOCH, MemoryStore, host
from result_store_testing.dtd import Dtd
from result_store_testing.http import ISSUER, client, store_of
from scanfleet.contracts.messages import HostDetails, HostScanned, PortFound, ScriptOutput, SystemMatch
from scanfleet.contracts.messages.results import MAX_ELEMENT_CHARS
from scanfleet.contracts.rest import ExportedJob
from scanfleet_testing.event_loop import counting_turns

JOB: dict[str, Any] = {
    "job_id": 1,
    "status": "completed",
    "error": "",
    "cidr": "127.9.8.0/29",
    "ports": "T:22,80,U:53",
    "start": datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
    "end": datetime(2026, 1, 1, 0, 0, 12, tzinfo=UTC).isoformat(),
}
RAW = (
    '<port protocol="tcp" portid="22"><state state="open" reason="syn-ack" reason_ttl="64"/><service name="ssh" '
    'product="OpenSSH" method="probed" conf="10"><cpe>cpe:/a:openbsd:openssh</cpe></service><script id="banner" '
    'output="SSH&#xa;2"><elem key="k">v&lt;</elem>\n</script></port>'
)
HOSTILE = "]]>&\"'<script>\x00\x1b[31m\x9b\u202e\ufffe\r\n\t\N{SNOWMAN}"


ESCAPED = quoteattr(HOSTILE.translate({0: "\\x00", 0x1B: "\\x1b", 0xFFFE: "\\ufffe"}))


async def post(store: MemoryStore, query: str = "", *, user: int = 7, **changed: Any) -> httpx2.Response:
    async with client(store) as http:
        path = f"/internal/jobs/1/nmap.xml{query}"
        return await http.post(path, json=JOB | changed, headers=ISSUER.bearer(user))


async def written(store: MemoryStore, query: str = "", **changed: Any) -> ET.Element:
    response = await post(store, query, **changed)
    assert response.status_code == 200, response.text
    return ET.fromstring(response.text)  # noqa: S314 # written by this service


def attributes(element: ET.Element | None) -> dict[str, str]:
    assert element is not None
    return element.attrib


async def full() -> MemoryStore:
    details = HostDetails(
        reason="echo-reply",
        mac="52:54:00:12:34:56",
        vendor="Q&A",
        systems=(SystemMatch(name="Linux 5", accuracy=98, line=7),),
        scripts=(ScriptOutput(id="smb-os-discovery", output="\n  OS"),),
        closed=1,
        filtered=2,
        seconds=11,
    )
    store = await store_of(
        host("127.9.8.1", PortFound(port=22, service="ssh", raw_data=RAW), details=details, chunk_id="1-0"),
        host("127.9.8.1", open_filtered="53", outcome="s", chunk_id="1-1"),
        host("127.9.8.9", 80, chunk_id="1-2"),
    )
    await store.close(
        [
            ClosedChunk(1, "1-0", "127.9.8.0", "dastxr", 7, "syn", "7.93"),
            ClosedChunk(1, "1-1", "127.9.8.0", "dsssxr", 7, "", "7.93"),
        ]
    )
    return store


async def test_document_has_the_job_and_every_probed_address() -> None:
    """Head, hosts by address, and statistics are nmap's; excluded and refused addresses are left out."""
    root = await written(await full())
    assert root.attrib == {
        "scanner": "nmap",
        "args": "nmap -p T:22,80,U:53 127.9.8.0/29 (Scanfleet job 1)",
        "start": "1767225600",
        "startstr": "Thu Jan  1 00:00:00 2026",
        "version": "7.93",
        "xmloutputversion": "1.05",
    }
    assert [each.attrib for each in root.findall("scaninfo")] == [
        {"type": "syn", "protocol": "tcp", "numservices": "2", "services": "22,80"},
        {"type": "udp", "protocol": "udp", "numservices": "1", "services": "53"},
    ]
    found = [
        (attributes(each.find("address"))["addr"], attributes(each.find("status"))["state"])
        for each in root.iter("host")
    ]
    assert found == [(f"127.9.8.{n}", "down" if n == 0 else "up") for n in (0, 1, 2, 3, 9)]
    assert [each.get("timedout") for each in root.iter("host")] == [None, None, None, "true", None]
    assert attributes(root.find("runstats/hosts")) == {"up": "4", "down": "1", "total": "5"}
    finished = attributes(root.find("runstats/finished"))
    assert (finished["exit"], finished["elapsed"], finished["time"]) == ("success", "12.00", "1767225612")
    assert len((await written(await full(), "?hosts=up")).findall("host")) == 4


async def test_document_host_has_its_details_and_ports() -> None:
    """Chunks of an address are one host, with the numbers of ports in each state and the elements that nmap wrote."""
    found = (await written(await full())).findall("host")[1]
    assert found.attrib == {"starttime": "1767225589", "endtime": "1767225600"}
    assert attributes(found.find("status")) == {"state": "up", "reason": "echo-reply", "reason_ttl": "0"}
    assert [each.attrib for each in found.findall("address")][1] == {
        "addr": "52:54:00:12:34:56",
        "addrtype": "mac",
        "vendor": "Q&A",
    }
    assert [(each.get("state"), each.get("count")) for each in found.findall("ports/extraports")] == [
        ("closed", "1"),
        ("filtered", "2"),
        ("open|filtered", "1"),
    ]
    assert attributes(found.find("ports/extraports/extrareasons"))["ports"] == "53"
    ssh = found.find("ports/port")
    assert ssh is not None
    assert ET.canonicalize(ET.tostring(ssh), strip_text=True) == ET.canonicalize(RAW, strip_text=True)
    assert attributes(found.find("os/osmatch")) == {"name": "Linux 5", "accuracy": "98", "line": "7"}
    assert attributes(found.find("hostscript/script")) == {"id": "smb-os-discovery", "output": "\n  OS"}


HEAD = '<status state="up" reason="reset" reason_ttl="63"/>\n<address addr="127.9.8.1" addrtype="ipv4"/>\n'
CLOSED = '<port protocol="tcp" portid="21"><state state="closed" reason="reset" reason_ttl="63"/></port>'
SUM = '<extraports state="closed" count="2">\n<extrareasons reason="reset" count="2" proto="tcp" ports="{}"/>\n</extraports>'
OS = (
    '<os><portused state="open" proto="tcp" portid="22"/>\n<osmatch name="Linux 5" accuracy="98" line="7">\n<osclass '
    'type="general purpose" vendor="Linux" osfamily="Linux" osgen="5.X" accuracy="98"><cpe>cpe:/o:linux</cpe></osclass>\n'
    "</osmatch></os>"
)
DISORDERED = OS.replace("<osmatch", '<osfingerprint fingerprint="x"/><osmatch', 1)
SCRIPT = '<script id="{}" output="{}"><table key="k"><elem>v</elem></table></script>'


def about(*inner: str, ports: str = "") -> HostDetails:
    """Return details with nmap's own element, which differ from it."""
    element = f"{HEAD}<hostnames>\n</hostnames>\n<ports>{ports}</ports>\n{''.join(inner)}\n"
    return HostDetails(reason="echo-reply", closed=9, filtered=9, seconds=1, element=element)


async def only_host(*messages: HostScanned) -> ET.Element:
    """Return the element of the only host of a valid document."""
    response = await post(await store_of(*messages))
    assert Dtd().faults(response.text) == []
    [found] = ET.fromstring(response.text).findall("host")  # noqa: S314 # written by this service
    return found


async def test_document_host_has_the_elements_of_nmap() -> None:
    """Closed ports, classes of systems, uptime, times and structured output of scripts are those that nmap wrote."""
    rest = '<uptime seconds="3" lastboot="x"/><distance value="2"/><hostscript>{}</hostscript><times srtt="-1" rttvar="7" to="1"/>'
    details = about(OS, rest.format(SCRIPT.format("smb", "o")), ports=SUM.format("23-24") + CLOSED)
    found = await only_host(host("127.9.8.1", PortFound(port=22, raw_data=RAW), details=details))
    found.attrib.clear()
    open_port = f"{CLOSED}{RAW}"
    expected = f"<host>{details.element.replace(CLOSED, open_port)}</host>"
    assert ET.canonicalize(ET.tostring(found), strip_text=True) == ET.canonicalize(expected, strip_text=True)


async def test_document_host_of_several_chunks_has_each_element_once() -> None:
    """Sums, listed ports and scripts of all chunks are joined; of other elements the first one is written."""
    uptime = '<uptime seconds="{}"/>'
    first = about("<os/>", uptime.format(1), ports=SUM.format("23-24") + CLOSED)
    scripts = SCRIPT.format("a", "x") + SCRIPT.format("b", "x")
    second = about(OS, uptime.format(2), f"<hostscript>{scripts}</hostscript>", ports=SUM.format("25,27"))
    third = HostDetails(reason="reset", closed=3, scripts=(ScriptOutput(id="c", output="y"),))
    found = await only_host(
        host("127.9.8.1", 20, 22, chunk_id="1-0", details=first),
        host("127.9.8.1", 30, chunk_id="1-1", details=second),
        host("127.9.8.1", chunk_id="1-2", details=third),
        host("127.9.8.1", 31, chunk_id="1-3", details=about(f"<hostscript>{SCRIPT.format('a', 'x')}</hostscript>")),
    )
    assert [each.attrib for each in found.iter("extraports")] == [{"state": "closed", "count": "7"}]
    reasons = [each.attrib for each in found.iter("extrareasons")]
    assert reasons == [{"reason": "reset", "count": "4", "proto": "tcp", "ports": "23-25,27"}]
    assert [each.get("portid") for each in found.iter("port")] == ["20", "21", "22", "30", "31"]
    assert [each.get("seconds") for each in found.iter("uptime")] == ["1"]
    assert [each.get("vendor") for each in found.findall("os/osmatch/osclass")] == ["Linux"]
    assert [each.get("id") for each in found.findall("hostscript/script")] == ["a", "b", "c"]


@pytest.mark.proves("A29")
@pytest.mark.parametrize(
    "element",
    [
        "text",
        "</host><host>",
        HEAD.replace("127.9.8.1", "127.9.8.2"),
        HEAD.replace("127.9.8.1", "x"),
        HEAD.replace('state="up"', 'state="down"'),
        f"{HEAD}<ports>{SUM.format('x')}</ports>",
        f"{HEAD}<ports>{SUM.format('1').replace('count=', 'onload=')}</ports>",
        f"{HEAD}<ports>{CLOSED.replace('<state', '<b/><state')}</ports>",
        f"{HEAD}{DISORDERED}",
        f"{HEAD}<os>&e;</os>",
        f"{HEAD}<script id='x' output='y'/>",
        f"{HEAD}<runstats/>",
        f'<!DOCTYPE host [<!ENTITY e "x">]>{HEAD}',
        f"{HEAD}<hostscript>{'<table>' * 60_000}",
    ],
)
async def test_document_host_that_nmap_did_not_write_is_written_from_its_fields(element: str) -> None:
    """A reported element that is cut, forged or of another address is not copied."""
    details = HostDetails(reason="echo-reply", closed=1, element=element[:MAX_ELEMENT_CHARS])
    found = await only_host(host("127.9.8.1", 22, details=details))
    assert [each.get("addr") for each in found.iter("address")] == ["127.9.8.1"]
    assert attributes(found.find("status")) == {"state": "up", "reason": "echo-reply", "reason_ttl": "0"}
    assert [each.tag for each in found.iter()][1:] == [
        *("status", "address", "hostnames", "ports", "extraports", "port", "state"),
    ]


@pytest.mark.proves("A29")
async def test_document_host_has_no_port_twice_and_none_that_is_no_result() -> None:
    """A port of the element that is a result, or is open, is not written beside the results."""
    forged = (CLOSED.replace("21", "22"), CLOSED.replace("21", "23").replace("closed", "open"), CLOSED, CLOSED)
    found = await only_host(host("127.9.8.1", 22, details=about(ports="".join(forged))))
    assert [each.get("portid") for each in found.iter("port")] == ["21", "22"]
    assert [each.get("state") for each in found.iter("state")] == ["closed", "open"]


async def test_document_silent_ports_of_an_answering_host_are_counted_once() -> None:
    """UDP ports without an answer are in the element and in a field; they are those of the field."""
    silent = (
        SUM.format("53,67").replace("closed", "open|filtered").replace("tcp", "udp").replace("reset", "no-response")
    )
    found = await only_host(host("127.9.8.1", open_filtered="53,67", details=about(ports=silent)))
    assert [each.attrib for each in found.iter("extraports")] == [{"state": "open|filtered", "count": "2"}]
    [reason] = [each.attrib for each in found.iter("extrareasons")]
    assert reason == {"reason": "no-response", "count": "2", "proto": "udp", "ports": "53,67"}


async def test_document_silent_addresses_have_sums_of_their_tcp_ports() -> None:
    """A TCP port that did not answer is filtered, also at a host that answered in another chunk; of UDP ports that is unknown."""
    store = await store_of(host("127.9.8.1", 22, chunk_id="1-1", details=about(ports=CLOSED)))
    parts = [("1-0", "sst", "1-20"), ("1-1", "sad", "21-40"), ("1-2", "ssd", "U:53")]
    await store.close([
        ClosedChunk(1, id_, "127.9.8.0", letters, 7, "syn", "7.93", ports, discovery="none") for id_, letters, ports in parts
    ])  # fmt: skip
    root = await written(store)
    summed_up = [[(each.get("state"), each.get("count")) for each in of.iter("extraports")] for of in root.iter("host")]
    assert summed_up == [[("filtered", "40")], [("filtered", "20")], []]
    assert [attributes(each.find("status"))["reason"] for each in root.iter("host")] == [
        "user-set",
        "reset",
        "user-set",
    ]


async def test_document_long_list_of_ports_is_summed_up() -> None:
    """A list that is longer than a policy's text may be, as of the 3,000 most common ports, is counted."""
    store = MemoryStore()
    ports = ",".join(str(number) for number in range(1, 60_000, 20))
    await store.close([ClosedChunk(1, "1-0", "127.9.8.0", "sd", 7, "syn", "7.93", ports, discovery="none")])
    root = await written(store)
    assert [(each.get("state"), each.get("count")) for each in root.iter("extraports")] == [("filtered", "3000")]


async def test_pieces_of_a_document_with_few_hosts_keep_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """While addresses are left out, white space between elements is written in time."""
    monkeypatch.setattr(nmap_xml, "BEGIN_SECONDS", 0.0)
    monkeypatch.setattr(nmap_xml, "SILENT_SECONDS", 0.0)

    async def parts() -> AsyncIterator[str]:
        for part in ("<nmaprun>", "", "", "<host/>", "</nmaprun>"):
            yield part

    pieces = [piece.content async for piece in nmap_xml._pieces(parts())]
    assert pieces == [b"<nmaprun>", b"\n", b"\n", b"<host/>", b"</nmaprun>", b""]


async def test_document_is_read_by_python_nmap() -> None:
    """Another reader of nmap's documents finds the same hosts and ports."""
    response = await post(await full())
    assert response.headers["content-type"].startswith("application/xml")
    assert response.headers["content-disposition"] == 'attachment; filename="scanfleet-job-1.xml"'
    assert response.headers["x-content-type-options"] == "nosniff"
    reader = object.__new__(nmap.PortScanner)  # without the constructor, which runs nmap
    scan = reader.analyse_nmap_xml_scan(response.text)["scan"]
    assert scan["127.9.8.1"]["tcp"][22]["product"] == "OpenSSH"
    assert scan["127.9.8.1"]["vendor"] == {"52:54:00:12:34:56": "Q&A"}
    assert scan["127.9.8.9"]["tcp"][80]["state"] == "open"
    assert scan["127.9.8.0"]["status"]["state"] == "down"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"status": "failed", "error": HOSTILE},
            "job failed: ]]>&\"'<script>\\x00\\x1b[31m\x9b\u202e\\ufffe\r\n\t\N{SNOWMAN}",
        ),
        ({"status": "cancelled"}, "job cancelled"),
    ],
)
async def test_document_of_an_unsuccessful_job_has_an_error(changed: dict[str, Any], message: str) -> None:
    """The statistics of a failed or cancelled job have the error; a job without any chunk is a valid document."""
    finished = attributes((await written(MemoryStore(), **changed)).find("runstats/finished"))
    assert (finished["exit"], finished["errormsg"]) == ("error", message)


async def test_document_names_common_ports_by_number() -> None:
    """The ports of a `top` set are those that the chunks of an address list; without a list there is no number of them."""
    store = MemoryStore()
    parts = [("1-0", "22,80"), ("1-1", "443"), ("1-2", "")]
    await store.close([ClosedChunk(1, id_, "127.9.8.0", "d", 7, "connect", "7.93", ports) for id_, ports in parts])
    root = await written(store, ports="top:5")
    expected = {"type": "connect", "protocol": "tcp", "numservices": "5", "services": "22,80,443"}
    assert attributes(root.find("scaninfo")) == expected
    assert root.get("args") == "nmap --top-ports 5 127.9.8.0/29 (Scanfleet job 1)"


@pytest.mark.parametrize(("ports", "services"), [("top:2", "22,80"), ("T:22,80", "22,80")])
async def test_document_names_the_ports_of_the_first_slice_that_was_scanned(ports: str, services: str) -> None:
    """Slices of refused addresses have neither ports nor a version of nmap; the head has those of a later one."""
    store = MemoryStore()
    chunks = [ClosedChunk(1, f"1-{number}", f"127.9.8.{number}", "r", 7, "syn") for number in range(2)]
    await store.close([*chunks, ClosedChunk(1, "1-2", "127.9.8.2", "d", 7, "syn", "7.93", "22,80")])
    root = await written(store, ports=ports)
    expected = {"type": "syn", "protocol": "tcp", "numservices": "2", "services": services}
    assert [each.attrib for each in root.findall("scaninfo")] == [expected]
    assert root.get("version") == "7.93"
    assert len(root.findall("host")) == 1


@pytest.mark.parametrize(("technique", "version"), [("", ""), ("syn", "7.93")])
async def test_document_has_no_scan_info_if_the_probes_are_unknown(technique: str, version: str) -> None:
    """The head names neither technique nor ports of a `top` set if no closed chunk has them."""
    store = MemoryStore()
    await store.close([ClosedChunk(1, "1-0", "127.9.8.0", "aall", 7, technique, version)])
    assert (await written(store, ports="top:100")).findall("scaninfo") == []


async def test_document_host_with_one_block_of_ports_that_timed_out_is_timed_out() -> None:
    """A host that answered in one chunk and timed out in another was not scanned completely; other hosts were."""
    store = await store_of(
        host("127.9.8.1", 22, chunk_id="1-0"),
        host("127.9.8.1", outcome="t", chunk_id="1-1"),
        host("127.9.8.2", 22, chunk_id="1-0"),
        host("127.9.8.9", 22, chunk_id="1-2"),  # of chunks that were not closed
        host("127.9.8.9", outcome="t", chunk_id="1-3", open_filtered="5"),
    )
    await store.close(
        [ClosedChunk(1, id_, "127.9.8.0", letters, 7) for id_, letters in (("1-0", "daas"), ("1-1", "dtss"))]
    )
    late = [
        (attributes(each.find("address"))["addr"], each.get("timedout")) for each in (await written(store)).iter("host")
    ]
    assert late == [
        ("127.9.8.0", None),
        ("127.9.8.1", "true"),
        ("127.9.8.2", None),
        ("127.9.8.3", None),
        ("127.9.8.9", "true"),
    ]


async def test_document_ranges_of_several_blocks_are_joined() -> None:
    """Ranges of ports that adjoin, in the head and at a host, are written as one."""
    store = await store_of(
        host("127.9.8.1", open_filtered="1-1000", outcome="s", chunk_id="1-0"),
        host("127.9.8.1", open_filtered="1001-2000", outcome="s", chunk_id="1-1"),
    )
    parts = [("1-2", "1-1000"), ("1-3", "1001-2000")]
    await store.close([ClosedChunk(1, id_, "127.9.8.8", "d", 7, "connect", "7.93", ports) for id_, ports in parts])
    root = await written(store, ports="top:2000")
    assert attributes(root.find("scaninfo"))["services"] == "1-2000"
    assert attributes(root.find("host/ports/extraports/extrareasons"))["ports"] == "1-2000"


@pytest.mark.parametrize("outcomes", [("dddd", "d.ad"), ("d.ad", "dd"), ("ddad",)])
async def test_document_lists_addresses_at_both_ends_of_a_block(outcomes: tuple[str, ...]) -> None:
    """Outcomes before, between and after hosts are written, also if the block ends at the last address of its family."""
    first, second, last = (f"255.255.255.{n}" for n in (252, 253, 255))
    store = await store_of(host("127.9.8.1", 22), host(first, 22), host(last, 22))
    await store.close(
        [ClosedChunk(1, f"1-{number}", first, letters, 7) for number, letters in enumerate(outcomes, start=1)]
    )
    store.chunks["1-9"] = ClosedChunk(1, "1-9", "::1", "d", 7)
    root = await written(store)
    found = [attributes(each.find("address")) for each in root.iter("host")]
    expected = ["127.9.8.1", first, second, "255.255.255.254", last, "::1"]
    assert [each["addr"] for each in found] == expected
    assert {each["addrtype"] for each in found} == {"ipv4", "ipv6"}
    assert attributes(root.find("runstats/hosts")) == {"up": "4", "down": "2", "total": "6"}


async def test_document_is_limited_to_the_caller_and_refused_if_unsorted() -> None:
    """Neither hosts nor maps of another user are written, and a job that an earlier release has stored is a 409."""
    store = await full()
    other = await post(store, user=8)
    assert ET.fromstring(other.text).findall("host") == []  # noqa: S314 # written by this service
    store.unsorted.add(1)
    assert (await post(store)).status_code == 409
    async with client(store) as http:
        assert (await http.post("/internal/jobs/1/nmap.xml", json=JOB)).status_code == 401


@pytest.mark.proves("A29")
@pytest.mark.parametrize(
    "element", ["", HOSTILE, f"{HEAD}<hostscript><script id={ESCAPED} output={ESCAPED}/></hostscript>"]
)
async def test_document_hostile_text_is_ascii(element: str) -> None:
    """Hostile names, banners and outputs are text of a well-formed document of printable ASCII."""
    details = HostDetails(
        reason=HOSTILE,
        vendor=HOSTILE,
        mac="52:54:00:12:34:56",
        scripts=(ScriptOutput(id=HOSTILE, output=HOSTILE),),
        element=element,
    )
    found = PortFound(port=80, service=HOSTILE, version=HOSTILE, banner=HOSTILE, raw_data=HOSTILE)
    store = await store_of(host("127.9.8.1", found, details=details))
    response = await post(store)
    assert response.content.isascii()
    assert response.text.replace("\n", "").isprintable()
    expected = "]]>&\"'<script>\\x00\\x1b[31m\x9b\u202e\\ufffe\r\n\t\N{SNOWMAN}"
    [only] = ET.fromstring(response.text).findall("host")  # noqa: S314 # written by this service
    assert attributes(only.find("hostscript/script")) == {"id": expected, "output": expected}
    assert attributes(only.find("ports/port/script"))["output"] == expected
    assert attributes(only.find("ports/port/service"))["product"] == expected


DEEP = (
    '<port protocol="tcp" portid="22"><state state="open" reason="syn-ack" reason_ttl="64"/><script id="x" output="y">'
)


@pytest.mark.proves("A29")
@pytest.mark.parametrize(
    "raw",
    [
        "",
        "<port",
        RAW[:-1],
        RAW + "<port/>",
        RAW.replace('portid="22"', 'portid="23"'),
        RAW.replace('protocol="tcp"', 'protocol="udp"'),
        RAW.replace('state="open"', 'state="closed"'),
        RAW.replace("<state ", "<state onload='x' "),
        RAW.replace("reason_ttl=", "ttl="),
        RAW.replace('reason_ttl="64"', 'reason_ttl="&lt;"'),
        RAW.replace('conf="10"', 'conf="11"'),
        RAW.replace("<cpe>", "<host>").replace("</cpe>", "</host>"),
        RAW.replace("<cpe>", "text<cpe>"),
        RAW.replace("<service", "<script id='a' output='b'/><service"),
        RAW.replace("cpe:/a", "&entity;"),
        '<!DOCTYPE port [<!ENTITY e "x">]>' + RAW,
        "<port protocol='tcp' portid='22'></port>",
        "<port protocol='tcp' portid='22'><?php x?></port>",
        f"{DEEP}{'<table>' * 100_000}",
        f"{DEEP}{'<table>' * 100}{'</table>' * 100}</script></port>",
    ],
)
def test_port_that_nmap_did_not_write_is_written_from_its_fields(raw: str) -> None:
    """A reported element that is cut, forged or does not conform to nmap's document type is not copied."""
    found = PortFound(port=22, service="ssl/http", version="nginx 1", banner="<b>", raw_data=raw)
    assert port(found) == (
        '<port protocol="tcp" portid="22"><state state="open" reason="unknown-response" reason_ttl="0"/>'
        '<service name="http" product="nginx 1" tunnel="ssl" method="probed" conf="10"/>'
        '<script id="banner" output="&#60;b&#62;"/></port>'
    )


@given(st.text(alphabet=st.characters(codec=None)))
def test_text_is_printable_ascii_and_round_trips(value: str) -> None:
    """Any text is printable ASCII, and round-trips unless XML does not allow one of its characters."""
    made = text(value)
    assert made.isascii()
    assert made.isprintable()
    read = ET.fromstring(f'<a b="{made}">{made}</a>')  # noqa: S314 # written by this service
    assert read.get("b") == (read.text or "")
    if all(ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000 and c not in "\ufffe\uffff" for c in value):
        assert read.get("b") == value


async def test_document_of_a_large_job_is_bounded_in_memory() -> None:
    """Memory does not grow with the number of hosts, ports and chunks."""
    script = f"<hostscript>{SCRIPT.format('x', 'y' * 1_000)}</hostscript>"
    ports = tuple(PortFound(port=number, raw_data="x" * 1_000) for number in range(100))

    async def hosts(parts: Parts) -> AsyncIterator[Host]:
        for number in range(2_000):
            address = f"127.9.{number // 250}.{number % 250}"
            reported = about(script).model_copy(update={"element": about(script).element.replace("127.9.8.1", address)})
            scanned = host(address, *(ports if parts is Parts.PORTS else ()), details=reported)
            yield Host(scanned, Place(EPOCH, number))

    async def chunks() -> AsyncIterator[ClosedChunk]:
        for number in range(8):
            for block in range(50):
                yield ClosedChunk(1, f"1-{number}-{block}", f"127.9.{number}.0", "s" * 256, 7, "syn", "7.93", "1-100")

    job = ExportedJob.model_validate(JOB)
    size = 0
    tracemalloc.start()
    async for part in document(job, merged(hosts(Parts.DETAILS), Reported), hosts(Parts.PORTS), chunks):
        size += len(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 20 << 20
    assert peak < 4 << 20


@pytest.mark.proves("A29")
@pytest.mark.parametrize(("outputs", "chars", "most"), [(30, 1_500, 120_000), (1, 60_000, 1_100_000)])
async def test_document_host_of_many_large_chunks_is_bounded_in_memory(outputs: int, chars: int, most: int) -> None:
    """The data kept of the elements of a host does not grow with the number of its chunks, of reasons and of outputs."""

    async def hosts() -> AsyncIterator[Host]:
        for number in range(200):
            scripts = "".join(SCRIPT.format(f"{number}-{each}", "y" * chars) for each in range(outputs))
            reasons = "".join(SUM.format("1-65535").replace('"reset"', f'"{number}-{each}"') for each in range(18))
            details = about(f"<hostscript>{scripts}</hostscript>", ports=reasons)
            yield Host(host("127.9.8.1", chunk_id=f"1-{number}", details=details), Place(EPOCH, number))

    tracemalloc.start()
    [found] = [each async for each in merged(hosts(), Reported)]
    size = len(found.before_ports) + len(found.behind_ports)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.7 * most < size < most
    assert peak < 4 << 20


async def test_document_of_a_large_job_leaves_turns_to_others() -> None:
    """While a long list of addresses is merged and written, the event loop runs other tasks after each block."""
    blocks, store = 64, MemoryStore()

    async def chunks() -> AsyncIterator[ClosedChunk]:
        for number in range(blocks):
            yield ClosedChunk(1, f"1-{number}", f"127.9.{4 * number}.0", "d" * 1_024, 7)

    size = 0
    found = merged(store.hosts_by_address(1, 7, Parts.DETAILS), Reported)
    ports = store.hosts_by_address(1, 7, Parts.PORTS)
    async with counting_turns() as turns:
        async for part in document(ExportedJob.model_validate(JOB), found, ports, chunks):
            size += len(part)
    assert size > blocks * 1_024 * 100
    assert turns.count >= blocks


async def test_document_of_a_host_with_many_ports_leaves_turns_to_others() -> None:
    """While the ports of one host are written, the event loop runs other tasks after each fifty ports."""
    chunks, ports = 4, tuple(PortFound(port=number) for number in range(2_000))

    async def hosts(parts: Parts) -> AsyncIterator[Host]:
        for number in range(chunks):
            listed = ports if parts is Parts.PORTS else ()
            yield Host(host("127.9.8.1", *listed, chunk_id=f"1-{number}"), Place(EPOCH, number))

    size, found = 0, merged(hosts(Parts.DETAILS), Reported)
    closed = partial(MemoryStore().chunks_by_address, 1, 7)
    async with counting_turns() as turns:
        async for part in document(ExportedJob.model_validate(JOB), found, hosts(Parts.PORTS), closed):
            size += len(part)
    assert size > chunks * 2_000 * 50
    assert turns.count >= chunks * 40
