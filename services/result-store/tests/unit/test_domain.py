from __future__ import annotations

import tracemalloc
from collections import deque
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from result_store.domain.results import ClosedChunk, Host, Place, StoredHost, close, fault_of, fold, key_of
from result_store_testing import EPOCH, Log, host, scanned
from scanfleet.contracts.messages import ChunkIncomplete, PortFound
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.ports import PortSet
from scanfleet_testing.chunk_grants import ALL_PORTS, signed


def stored(address: str, outcome: str = "a", *, at: int = 0) -> StoredHost:
    return StoredHost(address, Outcome(outcome), Place(EPOCH + timedelta(milliseconds=at), at))


END = Place(EPOCH + timedelta(milliseconds=100), 100)


def test_fold_duplicate_hosts_keeps_the_first() -> None:
    """Of two hosts with the same chunk and address a batch keeps the first in the log."""
    batch = fold(Log().append(host("127.9.8.1", 22), host("127.9.8.1", 80, attempt=2)))
    [kept] = batch.hosts.values()
    assert (kept.scanned.attempt, kept.place.offset) == (1, 0)


def test_fold_address_in_two_chunks_is_two_hosts() -> None:
    """The port blocks of one address are separate chunks, and each keeps its host."""
    assert len(fold(Log().append(host(chunk_id="1-0"), host(chunk_id="1-1"))).hosts) == 2


def test_batch_chunk_ids_cover_hosts_and_ends() -> None:
    """The chunk ids of a batch are those of its hosts and of its ChunkScanned messages."""
    batch = fold(Log().append(host(chunk_id="1-0"), scanned("a", chunk_id="2-0")))
    assert batch.chunk_ids == {"1-0", "2-0"}


@pytest.mark.proves("G9")
@pytest.mark.parametrize("ranges", ["x", "1-", "5-4", "65536", "1,,2", "53", "50-60"])
def test_fault_of_invalid_open_filtered_is_named(ranges: str) -> None:
    """Malformed ranges, or ranges with a port that is also listed, are a fault, known before anything is stored."""
    assert fault_of(host("127.9.8.1", PortFound(port=53, protocol="udp"), open_filtered=ranges))


@pytest.mark.proves("A25", "G19")
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_fault_of_port_listed_twice_is_named(protocol: Any) -> None:
    """A port can be listed once per protocol, so that the ports of a chunk bound the results of each of its hosts."""
    once = PortFound(port=80, protocol=protocol)
    twice = host("127.9.8.1", PortFound(port=79), once, once.model_copy(update={"status": "open|filtered"}))
    assert fault_of(twice) == f"it has the {protocol.upper()} port 80 twice"


def test_fold_port_of_both_protocols_is_valid() -> None:
    """The same number in TCP and in UDP, listed or not, is two ports."""
    both = (PortFound(port=53), PortFound(port=53, protocol="udp"), PortFound(port=54))
    [kept] = fold(Log().append(host("127.9.8.1", *both, open_filtered="54"))).hosts.values()
    assert kept.result_count == 4


def test_results_of_all_ports_have_bounded_memory() -> None:
    """A host with all UDP ports silent is expanded one result at a time."""
    [silent] = fold(Log().append(host("127.9.8.1", open_filtered="0-65535"))).hosts.values()
    tracemalloc.start()
    last = deque(silent.results(1), maxlen=1)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (last.port, last.id, silent.result_count) == (65_535, 65_536, 65_536)
    assert peak < 1 << 20


def test_close_all_claimed_hosts_stored_closes() -> None:
    """A chunk closes if each code that claims a host has one; down, excluded and refused claim none."""
    hosts = [stored("127.9.8.0", "a"), stored("127.9.8.1", "s"), stored("127.9.8.2", "t")]
    chunk = close(scanned("astdxr", nmap="7.95"), END, hosts)
    assert chunk == ClosedChunk(
        1, "1-0", "127.9.8.0", "astdxr", 7, "connect", "7.95", str(PortSet.parse(ALL_PORTS)), at=END.created_at
    )


@pytest.mark.parametrize("letter", ["a", "s", "t", "."])
def test_close_missing_host_is_incomplete(letter: str) -> None:
    """An address that is blank, or is answered, silent or timed out without a stored host, is reported as missing."""
    verdict = close(scanned(f"a{letter}d", attempt=3, worker_id="w-3"), END, [stored("127.9.8.0")])
    assert verdict == ChunkIncomplete(
        job_id=1,
        chunk_id="1-0",
        attempt=3,
        worker_id="w-3",
        addresses=("127.9.8.1",),
    )


@pytest.mark.parametrize("letter", ["d", ".", "s", "t"])
def test_close_stored_host_overrides_outcome(letter: str) -> None:
    """The outcome that an earlier attempt reported overrides the code in the last map."""
    chunk = close(scanned(letter), END, [stored("127.9.8.0", "a")])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == "a"


@pytest.mark.parametrize("letter", ["x", "r"])
def test_close_unprobed_address_keeps_outcome(letter: str) -> None:
    """A host reported for an excluded or refused address changes no code and is not a result."""
    chunk = close(scanned(letter), END, [stored("127.9.8.0", "a")])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == letter
    assert not chunk.counts("127.9.8.0")


def test_close_host_outside_the_map_is_ignored() -> None:
    """A stored host outside the map's addresses, or of the other family, is ignored and is not a result."""
    strangers = ["127.9.7.255", "127.9.8.1", "::1"]
    chunk = close(scanned("d"), END, [stored(each) for each in strangers])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == "d"
    assert not any(chunk.counts(each) for each in strangers)


def test_close_later_host_does_not_count() -> None:
    """Only hosts that precede the ChunkScanned in the log count, even if a replica has stored later ones."""
    assert isinstance(close(scanned("a"), END, [stored("127.9.8.0", at=101)]), ChunkIncomplete)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place(EPOCH, 10_000), id="before-broker-data-loss"),
        pytest.param(Place(EPOCH + timedelta(seconds=9), 99), id="faster-clock"),
        pytest.param(Place(END.created_at, 99), id="same-millisecond"),
    ],
)
def test_precedes_by_offset_or_time(place: Place) -> None:
    """A host precedes by offset or by time, so that neither a recreated log nor clock skew leaves a chunk open."""
    assert isinstance(close(scanned("a"), END, [StoredHost("127.9.8.0", Outcome.ANSWERED, place)]), ClosedChunk)


def test_close_ipv6_addresses_are_canonical() -> None:
    """Missing IPv6 addresses are reported in canonical form."""
    verdict = close(scanned("aa", first_address="2001:db8::ff"), END, [stored("2001:db8::ff")])
    assert isinstance(verdict, ChunkIncomplete)
    assert verdict.addresses == ("2001:db8::100",)


def test_close_replies_continue_the_trace() -> None:
    """Both replies to a ChunkScanned carry its traceparent."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    message = scanned("a", traceparent=trace)
    missing = close(message, END, [])
    whole = close(message, END, [stored("127.9.8.0")])
    assert isinstance(missing, ChunkIncomplete)
    assert isinstance(whole, ClosedChunk)
    assert missing.traceparent == whole.announcement(message).traceparent == trace


def test_results_are_numbered_in_port_order() -> None:
    """A host's results are ordered by port, then protocol, under consecutive ids."""
    found = host("127.9.8.1", 443, PortFound(port=53, protocol="udp", status="open|filtered"), 53)
    results = Host(found, END).results(5)
    assert [(r.id, r.port, r.protocol) for r in results] == [(5, 53, "tcp"), (6, 53, "udp"), (7, 443, "tcp")]


def test_results_fields_come_from_port_and_host() -> None:
    """Each public field comes from the port or its host; both times are the broker's timestamp."""
    port = PortFound(
        port=22,
        protocol="tcp",
        status="open",
        service="ssh",
        version="OpenSSH 9.2p1",
        os_info="Linux 5.X",
        banner="SSH-2.0",
        raw_data="<port/>",
    )
    [result] = Host(host("127.9.8.1", port), END).results(1)
    assert result.model_dump() == {
        "id": 1,
        "job_id": 1,
        "ip_address": "127.9.8.1",
        "port": 22,
        "protocol": "tcp",
        "service": "ssh",
        "version": "OpenSSH 9.2p1",
        "os_info": "Linux 5.X",
        "status": "open",
        "banner": "SSH-2.0",
        "raw_data": "<port/>",
        "created_at": END.created_at,
        "updated_at": END.created_at,
    }


@pytest.mark.parametrize(
    ("granted", "fields", "ports"),
    [
        ("top:3", {"common_ports": "443,22,80"}, "22,80,443"),
        ("top:3", {}, ""),
        ("T:22,80,U:53", {"common_ports": "443"}, "T:22,80,U:53"),
        ("8000-8100", {"nmap": ""}, ""),
    ],
)
def test_close_has_the_probed_ports_by_number(granted: str, fields: dict[str, Any], ports: str) -> None:
    """The ports of a closed chunk are those of its signed scope, by number; empty only if they are unknown."""
    chunk = close(signed(scanned("d", **({"nmap": "7.95"} | fields)), ports=granted), END, [])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.ports == ports


def test_close_keeps_how_the_chunk_was_scanned() -> None:
    """A closed chunk has the facts by which later scans are comparable, and the time of the report by the broker."""
    facts: dict[str, Any] = {"nmap": "7.95", "arguments": "0" * 64, "detection": "sV7/O", "discovery": "none"}
    chunk = close(scanned("d", **facts), END, [])
    assert isinstance(chunk, ClosedChunk)
    assert {name: getattr(chunk, name) for name in facts} == facts
    assert (chunk.user_id, chunk.technique, chunk.at) == (7, "connect", END.created_at)


@pytest.mark.parametrize(
    ("ports", "nmap", "technique"),
    [("T:22,U:53", "7.95", "connect"), ("U:53", "7.95", ""), ("T:22,U:53", "", "")],
)
def test_close_has_the_technique_of_tcp_ports(ports: str, nmap: str, technique: str) -> None:
    """A chunk of UDP ports has no TCP technique, whatever its policy names; without an nmap it is unknown."""
    message = scanned("d", nmap=nmap)
    assert message.grant is not None
    grant = message.grant.model_copy(update={"ports": ports})
    chunk = close(message.model_copy(update={"grant": grant}), END, [])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.technique == technique


@given(st.lists(st.ip_addresses(), min_size=2, max_size=2), st.lists(st.integers(0, 300_000), min_size=2, max_size=2))
def test_keys_sort_by_address_then_chunk(addresses: list[IPv4Address | IPv6Address], numbers: list[int]) -> None:
    """Keys sort by family, address and number of the chunk."""
    keys = [key_of(str(address), f"41-{number}") for address, number in zip(addresses, numbers, strict=True)]
    places = [(each.version, int(each), number) for each, number in zip(addresses, numbers, strict=True)]
    assert (keys[0] < keys[1]) == (places[0] < places[1])
    assert (keys[0] == keys[1]) == (places[0] == places[1])
