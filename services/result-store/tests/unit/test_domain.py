from __future__ import annotations

import tracemalloc
from collections import deque
from datetime import timedelta

import pytest

from result_store.domain import ClosedChunk, Host, Place, StoredHost, close, fold
from result_store.testing import EPOCH, Log, host, scanned
from scanfleet.errors import MessageError
from scanfleet.messages import ChunkIncomplete, PortFound
from scanfleet.outcomes import Outcome


def stored(address: str, outcome: str = "a", *, at: int = 0) -> StoredHost:
    return StoredHost(address, Outcome(outcome), Place(EPOCH + timedelta(milliseconds=at), at))


END = Place(EPOCH + timedelta(milliseconds=100), 100)


def test_the_first_of_equal_hosts_counts() -> None:
    """Of two hosts with one chunk and address a batch keeps the one that stands first in the log."""
    batch = fold(Log().append(host("127.9.8.1", 22), host("127.9.8.1", 80, attempt=2)))
    [kept] = batch.hosts.values()
    assert (kept.scanned.attempt, kept.place.offset) == (1, 0)


def test_one_address_in_two_chunks_is_two_hosts() -> None:
    """The port blocks of one address are chunks of their own, and each keeps its host."""
    assert len(fold(Log().append(host(chunk_id="1-0"), host(chunk_id="1-1"))).hosts) == 2


def test_a_batch_names_its_chunks() -> None:
    """The chunks of a batch are those of its hosts and of its ends."""
    batch = fold(Log().append(host(chunk_id="1-0"), scanned("a", chunk_id="2-0")))
    assert batch.chunk_ids == {"1-0", "2-0"}


@pytest.mark.proves("G9")
@pytest.mark.parametrize("ranges", ["x", "1-", "5-4", "65536", "1,,2", "53", "50-60"])
def test_fold_bad_open_filtered_is_the_messages_fault(ranges: str) -> None:
    """Ranges that are none, or name a listed port again are rejected before anything is stored."""
    with pytest.raises(MessageError):
        fold(Log().append(host("127.9.8.1", PortFound(port=53, protocol="udp"), open_filtered=ranges)))


def test_results_of_every_port_take_little_memory() -> None:
    """A host with every UDP port silent is expanded one result at a time."""
    [silent] = fold(Log().append(host("127.9.8.1", open_filtered="0-65535"))).hosts.values()
    tracemalloc.start()
    last = deque(silent.results(1), maxlen=1)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (last.port, last.id, silent.result_count) == (65_535, 65_536, 65_536)
    assert peak < 1 << 20


def test_a_chunk_closes_when_every_claim_is_borne_out() -> None:
    """A chunk closes when each letter that claims a host has one; down, excluded and refused claim none."""
    hosts = [stored("127.9.8.0", "a"), stored("127.9.8.1", "s"), stored("127.9.8.2", "t")]
    chunk = close(scanned("astdxr"), END, hosts)
    assert chunk == ClosedChunk(1, "1-0", "127.9.8.0", "astdxr")


@pytest.mark.parametrize("letter", ["a", "s", "t", "."])
def test_a_claim_without_a_host_keeps_the_chunk_open(letter: str) -> None:
    """An address called answered, silent or timed out without a stored host, or blank, is named as missing."""
    verdict = close(scanned(f"a{letter}d", attempt=3, worker_id="w-3"), END, [stored("127.9.8.0")])
    assert verdict == ChunkIncomplete(
        job_id=1,
        chunk_id="1-0",
        attempt=3,
        worker_id="w-3",
        addresses=("127.9.8.1",),
    )


@pytest.mark.parametrize("letter", ["d", ".", "s", "t"])
def test_a_stored_host_corrects_its_letter(letter: str) -> None:
    """What an earlier attempt reported first is what became of the address, whatever the last map calls it."""
    chunk = close(scanned(letter), END, [stored("127.9.8.0", "a")])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == "a"


@pytest.mark.parametrize("letter", ["x", "r"])
def test_an_address_that_was_never_to_be_probed_keeps_its_letter(letter: str) -> None:
    """A host reported for an excluded or refused address changes no letter and is no result."""
    chunk = close(scanned(letter), END, [stored("127.9.8.0", "a")])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == letter
    assert not chunk.counts("127.9.8.0")


def test_hosts_outside_the_map_change_nothing() -> None:
    """A stored host before or after the map's addresses, or of the other family, is passed over and is no result."""
    strangers = ["127.9.7.255", "127.9.8.1", "::1"]
    chunk = close(scanned("d"), END, [stored(each) for each in strangers])
    assert isinstance(chunk, ClosedChunk)
    assert chunk.outcomes == "d"
    assert not any(chunk.counts(each) for each in strangers)


def test_a_host_behind_the_end_does_not_close_its_chunk() -> None:
    """Only hosts that stand before the ChunkScanned in the log bear it out, whoever stored others meanwhile."""
    assert isinstance(close(scanned("a"), END, [stored("127.9.8.0", at=101)]), ChunkIncomplete)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place(EPOCH, 10_000), id="from before the broker lost its data"),
        pytest.param(Place(EPOCH + timedelta(seconds=9), 99), id="stamped by a faster clock"),
        pytest.param(Place(END.created_at, 99), id="in the same millisecond"),
    ],
)
def test_either_clock_or_offset_tells_what_came_before(place: Place) -> None:
    """A host counts as earlier by its offset or by its time: a new log and a leaning clock leave no chunk open."""
    assert isinstance(close(scanned("a"), END, [StoredHost("127.9.8.0", Outcome.ANSWERED, place)]), ClosedChunk)


def test_ipv6_chunks_close_too() -> None:
    """A map of IPv6 addresses names its missing ones canonically."""
    verdict = close(scanned("aa", first_address="2001:db8::ff"), END, [stored("2001:db8::ff")])
    assert isinstance(verdict, ChunkIncomplete)
    assert verdict.addresses == ("2001:db8::100",)


def test_the_answer_continues_the_trace() -> None:
    """Both answers to a ChunkScanned carry its traceparent."""
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


def test_a_result_says_what_the_host_said() -> None:
    """Each public field comes from the port or its host; both times are the broker's stamp."""
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
