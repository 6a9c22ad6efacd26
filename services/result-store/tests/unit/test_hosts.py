"""The list of hosts: merged chunks, filters, pages, bounds and rights."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from result_store.api.hosts import HostSelection, Machine, _selected, merged
from result_store.domain.results import ClosedChunk, Parts
from result_store_testing import MemoryStore, host
from result_store_testing.http import client, get, store_of
from scanfleet.contracts.messages import HostDetails, PortFound, ScriptOutput, SystemMatch
from scanfleet.contracts.messages.results import MAX_OUTPUT_CHARS
from scanfleet.contracts.rest import MAX_HOST_PORTS, Host

PATH = "/api/v1/task/1/hosts"
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e\r\n]]>&\x7f\x9b31m"


async def test_host_has_exactly_the_public_fields() -> None:
    """A host has exactly the fields of the API; details that nmap did not report are empty."""
    details = HostDetails(
        reason="echo-reply",
        mac="52:54:00:12:34:56",
        vendor="QEMU virtual NIC",
        hostnames=("files.example.com",),
        systems=(
            SystemMatch(name="Linux 5.0 - 5.14", accuracy=98, line=1),
            SystemMatch(name="Linux 4.15", accuracy=90),
        ),
        scripts=(ScriptOutput(id="smb-os-discovery", output="\n  OS: Windows"),),
        closed=14,
        filtered=2,
        seconds=11.0,
    )
    port = PortFound(port=22, service="ssh", version="OpenSSH 9.2p1", os_info="Linux", banner="b", raw_data="r")
    store = await store_of(host("127.9.8.1", port, details=details, open_filtered="53,67-69"), host("127.9.8.2"))
    full, bare = (await get(store, PATH)).json()
    assert full == {
        "job_id": 1,
        "ip_address": "127.9.8.1",
        "outcome": "answered",
        "reason": "echo-reply",
        "hostnames": ["files.example.com"],
        "mac": "52:54:00:12:34:56",
        "vendor": "QEMU virtual NIC",
        "os_info": "Linux 5.0 - 5.14",
        "systems": [{"name": "Linux 5.0 - 5.14", "accuracy": 98}, {"name": "Linux 4.15", "accuracy": 90}],
        "ports": [{"port": 22, "protocol": "tcp", "status": "open", "service": "ssh", "version": "OpenSSH 9.2p1"}],
        "open_filtered": "53,67-69",
        "port_count": 5,
        "closed": 14,
        "filtered": 2,
        "scripts": [{"id": "smb-os-discovery", "output": "\n  OS: Windows"}],
        "seconds": 11.0,
        "created_at": "2026-01-01T00:00:00.000Z",
        "updated_at": "2026-01-01T00:00:00.000Z",
    }
    assert list(bare) == list(full) == list(Host.model_fields)
    assert {name: value for name, value in bare.items() if value} == {
        "job_id": 1,
        "ip_address": "127.9.8.2",
        "outcome": "answered",
        "created_at": "2026-01-01T00:00:00.001Z",
        "updated_at": "2026-01-01T00:00:00.001Z",
    }


async def test_chunks_of_an_address_are_one_host() -> None:
    """Ports, numbers and details of an address in several chunks are added up, and its best outcome is that of the host."""
    script = ScriptOutput(id="x", output="same")
    store = await store_of(
        host(
            "127.9.8.1", 443, chunk_id="1-9", details=HostDetails(mac="52:54:00:12:34:56", closed=2, scripts=(script,))
        ),
        host("127.9.8.1", chunk_id="1-10", outcome="t", open_filtered="5"),
        host(
            "127.9.8.1",
            22,
            chunk_id="1-11",
            details=HostDetails(reason="syn-ack", closed=3, seconds=2, scripts=(script,)),
        ),
        host("127.9.8.0", outcome="s", open_filtered="7-9", chunk_id="1-0"),
        host("127.9.8.2", outcome="t", chunk_id="1-0"),
    )
    silent, found = (await get(store, PATH)).json()
    assert (silent["outcome"], silent["open_filtered"], silent["port_count"]) == ("silent", "7-9", 3)
    assert [each["port"] for each in found["ports"]] == [22, 443]
    assert (found["outcome"], found["reason"], found["mac"]) == ("answered", "syn-ack", "52:54:00:12:34:56")
    assert (found["closed"], found["seconds"], found["open_filtered"], found["port_count"]) == (5, 2.0, "5", 3)
    assert found["scripts"] == [{"id": "x", "output": "same"}]
    assert (found["created_at"], found["updated_at"]) == ("2026-01-01T00:00:00.000Z", "2026-01-01T00:00:00.002Z")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("port=22", ["1", "2"]),
        ("port=80,443", ["2", "3"]),
        ("service=ssh", ["1"]),
        ("service=ssh&port=80", []),
        ("port=53", ["3"]),
        ("port=53&service=domain", []),
        ("address=127.9.8.2", ["2"]),
        ("address=127.9.8.0/31&limit=5", ["1"]),
        ("limit=2", ["1", "2"]),
        ("limit=1&after=127.9.8.1", ["2"]),
        ("after=127.9.8.4", []),
        ("limit=1&port=443", ["3"]),
    ],
)
async def test_hosts_are_filtered_and_paged(query: str, found: list[str]) -> None:
    """A host is selected by its ports, the service on one of them, and its address; pages begin after an address."""
    store = await store_of(
        host("127.9.8.1", PortFound(port=22, service="ssh")),
        host("127.9.8.2", 22, 80),
        host("127.9.8.3", 443, open_filtered="50-60"),
        host("127.9.8.4"),
    )
    response = await get(store, f"{PATH}?{query}")
    assert [each["ip_address"].removeprefix("127.9.8.") for each in response.json()] == found


@pytest.mark.parametrize(
    "query", ["after=x", "after=127.9.8.0/24", "port=-1", "address=300.1.1.1", "limit=0", "limit=x"]
)
async def test_hosts_invalid_query_returns_400(query: str) -> None:
    """An invalid parameter is a 400 that names it."""
    response = await get(MemoryStore(), f"{PATH}?{query}")
    assert response.status_code == 400
    assert query.partition("=")[0] in response.json()["error"]


async def test_hosts_of_other_users_are_not_listed() -> None:
    """Hosts of another user are not returned, even if the gateway forwards the request; an administrator gets all."""
    store = await store_of(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8))
    assert [each["ip_address"] for each in (await get(store, PATH)).json()] == ["127.9.8.1"]
    assert (await get(store, PATH, user=9)).json() == []
    assert len((await get(store, PATH, user=1, admin=True)).json()) == 2
    async with client(store) as http:
        assert (await http.get(PATH)).status_code == 401


async def test_hosts_late_host_is_not_listed() -> None:
    """A host that a closed chunk does not claim is not listed."""
    store = await store_of(host("127.9.8.0", 22), host("127.9.8.1", 80))
    await store.close([ClosedChunk(1, "1-0", "127.9.8.0", "ad")])
    assert [each["ip_address"] for each in (await get(store, PATH)).json()] == ["127.9.8.0"]


async def test_hosts_of_a_job_of_the_first_release_return_409() -> None:
    """The hosts of a job that an earlier release has stored are refused rather than listed in part."""
    store = await store_of(host("127.9.8.1", 22))
    store.unsorted.add(1)
    response = await get(store, PATH)
    assert response.status_code == 409
    assert "read its results" in response.json()["error"]


@pytest.mark.proves("A29")
async def test_hosts_hostile_text_is_ascii() -> None:
    """Hostile names and outputs round-trip exactly, in a document of printable ASCII that browsers do not render as a page."""
    details = HostDetails(hostnames=(HOSTILE,), scripts=(ScriptOutput(id=HOSTILE, output=HOSTILE),), vendor=HOSTILE)
    store = await store_of(host("127.9.8.1", details=details))
    response = await get(store, PATH)
    [found] = response.json()
    assert (found["hostnames"], found["vendor"]) == ([HOSTILE], HOSTILE)
    assert found["scripts"] == [{"id": HOSTILE, "output": HOSTILE}]
    assert response.content.isascii()
    assert response.text.isprintable()
    assert response.headers["x-content-type-options"] == "nosniff"
    lines = await get(store, PATH, accept="application/x-ndjson")
    assert [json.loads(line) for line in lines.text.splitlines()] == [found]
    assert lines.text.removesuffix("\n").isprintable()


async def test_host_output_that_does_not_fit_omits_no_other() -> None:
    """An output that exceeds the amount of one host is left out, and smaller ones after it are kept."""
    first, large, small = (
        ScriptOutput(id=f"{n}", output="x" * length) for n, length in enumerate((MAX_OUTPUT_CHARS - 10, 11, 10))
    )
    details = HostDetails(scripts=(first,)), HostDetails(scripts=(large, small))
    store = await store_of(*(host("127.9.8.1", chunk_id=f"1-{n}", details=each) for n, each in enumerate(details)))
    [found] = (await get(store, PATH)).json()
    assert [each["id"] for each in found["scripts"]] == [first.id, small.id]


async def test_host_with_every_port_and_many_chunks_is_bounded() -> None:
    """A host lists 1,000 ports and one host's amount of output, whatever its chunks have; it counts all of its ports."""
    details = [HostDetails(scripts=(ScriptOutput(id="x", output=f"{n}" * 30_000),)) for n in range(10)]
    chunks = [
        host("127.9.8.1", *range(5_000 * n, 5_000 * n + 5_000), chunk_id=f"1-{n}", details=details[n])
        for n in range(10)
    ]
    store = await store_of(*chunks)
    [found] = (await get(store, PATH)).json()
    assert found["port_count"] == 50_000
    assert [each["port"] for each in found["ports"]] == list(range(MAX_HOST_PORTS))
    assert sum(len(each["output"]) for each in found["scripts"]) <= MAX_OUTPUT_CHARS
    tracemalloc.start()
    [_] = [each async for each in merged(store.hosts_by_address(1, 7, Parts.SUMMARY), Machine)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


async def test_hosts_filter_has_bounded_cost() -> None:
    """A filter of many ports costs little on hosts with many ranges of silent ports, and other requests run in between."""
    silent = ",".join(str(port) for port in range(1, 4_221, 2))
    store = await store_of(*(host(f"127.9.8.{last}", open_filtered=silent) for last in range(1, 21)))
    query = "port=" + ",".join(str(port) for port in range(2, 3_419, 2))
    began = time.process_time()
    assert (await get(store, f"{PATH}?{query}")).json() == []
    assert time.process_time() - began < 1  # comparing each port with each range takes four seconds


async def test_search_for_hosts_has_a_turn_for_each_that_is_left_out() -> None:
    """A search that finds few hosts can begin its response in time, and is cancelled when the client leaves."""
    store = await store_of(*(host(f"127.9.8.{number}", 22 if number == 3 else 80) for number in range(5)))
    hosts = store.hosts_by_address(1, 7, Parts.SUMMARY)
    found = [len(list(some)) async for some in _selected(hosts, HostSelection(ports=((22, 22),)))]
    assert found == [0, 0, 0, 1, 0]
