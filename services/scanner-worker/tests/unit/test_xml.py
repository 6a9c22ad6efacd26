"""Incremental parsing of nmap's XML."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanfleet.scanning.outcomes import Outcome
from scanner_worker.domain.scan import Host, outcome
from scanner_worker.scanner.xml import MAX_TOKEN, BadXmlError, Reader

Recording = Callable[[str], bytes]

HEAD = b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE nmaprun>\n<nmaprun scanner="nmap">\n'
TAIL = b'<runstats><finished time="1" exit="success"/><hosts up="1" down="0" total="1"/></runstats>\n</nmaprun>\n'
MAX_HOST = 4 << 20


def a_host(address: str = "127.9.1.1", inside: bytes = b"") -> bytes:
    return (
        b'<host starttime="1"><status state="up" reason="reset" reason_ttl="0"/>\n'
        b'<address addr="%s" addrtype="ipv4"/>\n<ports>%s</ports>\n</host>\n' % (address.encode(), inside)
    )


def read(document: bytes, piece: int = 1 << 16) -> tuple[list[Host], str]:
    """Return the hosts and the error."""
    reader = Reader(max_host_bytes=MAX_HOST)
    hosts: list[Host] = []
    try:
        for start in range(0, len(document), piece):
            hosts.extend(reader.feed(document[start : start + piece]))
        reader.close()
    except BadXmlError as error:
        return hosts, str(error)
    return hosts, ""


def codes(hosts: list[Host], ports: int) -> dict[str, Outcome]:
    return {host.address: outcome(host, ports) for host in hosts}


@pytest.mark.parametrize(
    ("name", "ports", "expected"),
    [
        ("closed", 100, dict.fromkeys(("127.9.1.8", "127.9.1.9", "127.9.1.10", "127.9.1.11"), Outcome.ANSWERED)),
        ("listed_closed", 10, dict.fromkeys(("127.9.1.8", "127.9.1.9"), Outcome.ANSWERED)),
        ("many_open", 100, dict.fromkeys(("127.9.1.2", "127.9.1.3"), Outcome.ANSWERED)),
        ("versions", 6, {"127.9.1.1": Outcome.ANSWERED}),
        (
            "silent",
            100,
            {"127.9.5.0": Outcome.SILENT, "127.9.5.1": Outcome.SILENT, "127.9.1.8": Outcome.ANSWERED},
        ),
        ("unreachable", 30, {"127.9.6.1": Outcome.SILENT}),
        ("timed_out", 100, {"127.9.5.1": Outcome.TIMED_OUT, "127.9.1.8": Outcome.ANSWERED}),
        (
            "down",
            2,
            {"10.77.0.1": Outcome.ANSWERED} | {f"10.77.0.{last}": Outcome.DOWN for last in (8, 9, 10, 11)},
        ),
        (
            "udp",
            60,
            {"127.9.5.1": Outcome.SILENT, "127.9.1.8": Outcome.SILENT},
        ),  # "port unreachable" of unknown senders
        ("prohibited", 3, {"10.88.0.1": Outcome.SILENT, "127.9.1.8": Outcome.ANSWERED}),
        ("prohibited_many", 60, {"10.88.0.1": Outcome.SILENT}),
        ("prohibited_udp", 3, {"10.88.0.1": Outcome.SILENT, "127.9.1.8": Outcome.ANSWERED}),
        ("udp_listed", 6, {"127.9.5.1": Outcome.SILENT}),
        ("os", 25, {"127.9.1.1": Outcome.ANSWERED}),
        ("ipv6", 2, {"::1": Outcome.ANSWERED}),
    ],
)
def test_outcome_of_recorded_hosts(recording: Recording, name: str, ports: int, expected: dict[str, Outcome]) -> None:
    """Hosts of every kind in recorded output of nmap have the expected outcomes."""
    hosts, fault = read(recording(name))
    assert fault == ""
    assert codes(hosts, ports) == expected
    assert set(codes(hosts, ports + 1).values()) <= {
        Outcome.BLANK,
        Outcome.DOWN,
        Outcome.TIMED_OUT,
    }


def test_reader_services_are_known_before_the_first_host(recording: Recording) -> None:
    """The number of ports by protocol is available before the first host."""
    reader = Reader(max_host_bytes=MAX_HOST)
    next(iter(reader.feed(recording("udp_listed"))))
    assert reader.services == {"tcp": 1, "udp": 5}


def with_reasons(*reasons: str) -> bytes:
    """Build a host that is up without discovery, with one port per protocol and reason ("tcp reset")."""
    listed = "".join(
        f'<port protocol="{protocol}" portid="{number}"><state state="x" reason="{reason}" reason_ttl="64" {sender.rstrip()}/></port>'
        for number, (protocol, reason, sender) in enumerate((f"{each}  ".split(" ", 2) for each in reasons), start=1)
    )
    return HEAD + a_host(inside=listed.encode()).replace(b'reason="reset"', b'reason="user-set"', 1) + TAIL


@pytest.mark.proves("G16")
@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("tcp syn-ack", Outcome.ANSWERED),
        ("tcp conn-refused", Outcome.ANSWERED),
        ('tcp reset reason_ip="127.9.1.1"', Outcome.ANSWERED),
        ('tcp reset reason_ip="10.0.0.1"', Outcome.SILENT),
        ("udp udp-response", Outcome.ANSWERED),
        ("udp port-unreach", Outcome.ANSWERED),
        ('udp port-unreach reason_ip="10.0.0.1"', Outcome.SILENT),
        ("tcp port-unreach", Outcome.SILENT),
        ("tcp admin-prohibited", Outcome.SILENT),
        ("tcp host-prohibited", Outcome.SILENT),
        ("udp net-prohibited", Outcome.SILENT),
        ("tcp host-unreach", Outcome.SILENT),
        ("tcp no-responses", Outcome.SILENT),
        ("tcp a-new-reason", Outcome.SILENT),
    ],
)
def test_outcome_only_the_hosts_own_answer_counts(reason: str, code: Outcome) -> None:
    """A port's reason makes a host answered only if no other machine can have caused it."""
    hosts, fault = read(with_reasons("tcp no-response", reason))
    assert (fault, codes(hosts, 2)) == ("", {"127.9.1.1": code})


def summed_up(state: str, count: int, *reasons: bytes) -> bytes:
    group = b'<extraports state="%s" count="%d">\n%s\n</extraports>' % (state.encode(), count, b"\n".join(reasons))
    return HEAD + a_host(inside=group).replace(b'reason="reset"', b'reason="user-set"', 1) + TAIL


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (b"reset", Outcome.ANSWERED),
        (b"conn-refused", Outcome.ANSWERED),
        (b"port-unreach", Outcome.SILENT),
        (b"admin-prohibited", Outcome.SILENT),
        (b"no-responses", Outcome.SILENT),
    ],
)
def test_outcome_summarized_icmp_errors_do_not_count(reason: bytes, code: Outcome) -> None:
    """nmap omits the sender of summarized errors, so they are no evidence of the host."""
    hosts, _ = read(
        summed_up("closed", 60, b'<extrareasons reason="%s" count="60" proto="tcp" ports="1-60"/>' % reason)
    )
    assert codes(hosts, 60) == {"127.9.1.1": code}


def test_open_filtered_is_canonical() -> None:
    """Summarized silent ports of any number of elements are read as sorted, disjoint ranges."""
    document = summed_up(
        "open|filtered",
        5,
        b'<extrareasons reason="no-response" count="4" proto="udp" ports="20,5,7-8"/>',
        b'<extrareasons reason="admin-prohibited" count="1" proto="udp" ports="6"/>',
    )
    (host,), fault = read(document)
    assert (host.open_filtered, host.ports, fault) == ("5-8,20", 5, "")


@pytest.mark.proves("G16")
@pytest.mark.parametrize("numbers", [b"", b'proto="udp" ports="1-4"', b'proto="tcp" ports="1-5"'])
def test_open_filtered_without_numbers_leaves_the_host_blank(numbers: bytes) -> None:
    """A host whose silent ports nmap counts but does not list is blank, because its results would be missing."""
    (host,), fault = read(summed_up("open|filtered", 5, b'<extrareasons reason="no-response" count="5" %s/>' % numbers))
    assert (outcome(host, 5), fault) == (Outcome.BLANK, "")


def test_reader_addresses_are_canonical() -> None:
    """Addresses are normalized to Python's notation, and invalid ones are rejected."""
    hosts, _ = read(HEAD + a_host("::FFFF:127.0.0.1") + a_host("2001:DB8:0:0::1") + TAIL)
    assert [host.address for host in hosts] == [str(ip_address("::ffff:127.0.0.1")), "2001:db8::1"]
    hosts, fault = read(HEAD + a_host("127.9.1.1") + a_host("2001:db8::x") + TAIL)
    assert ([host.address for host in hosts], "address" in fault) == (["127.9.1.1"], True)


def task(kind: str, name: str, percent: str = "") -> bytes:
    more = f' percent="{percent}" remaining="9" etc="1"' if percent else ""
    return f'<task{kind} task="{name}" time="1795840069"{more}/>\n'.encode()


def test_reader_moves_count_only_changes() -> None:
    """A task that begins or ends, a changed percentage and a host are progress; the same percentage again is not."""
    reader = Reader(max_host_bytes=MAX_HOST)
    list(reader.feed(HEAD))
    seen = []
    for piece in (
        task("begin", "Connect Scan"),
        task("progress", "Connect Scan", "0.00"),
        task("progress", "Connect Scan", "0.00"),
        task("progress", "Connect Scan", "0.01"),
        task("progress", "Connect Scan", "0.01") * 9,
        task("end", "Connect Scan"),
        task("begin", "NSE"),
        b'<verbose level="1"/>\n',
        a_host(),
    ):
        before = reader.moves
        list(reader.feed(piece))
        seen.append(reader.moves - before)
    assert seen == [1, 1, 0, 1, 0, 1, 1, 0, 1]
    assert reader.task == "NSE"


def test_reader_progress_of_recorded_nmap_is_counted(recording: Recording) -> None:
    """Fed line by line, real output shows progress, and the reader has nmap's version and phase."""
    reader = Reader(max_host_bytes=MAX_HOST)
    moves = []
    for line in recording("silent").splitlines(keepends=True):
        list(reader.feed(line))
        moves.append(reader.moves)
    assert reader.version == "7.93"
    assert reader.task == "SYN Stealth Scan"
    assert moves == sorted(moves)
    assert moves[-1] >= 5


def test_reader_progress_does_not_accumulate() -> None:
    """A day of progress without a finished host is neither stored nor mistaken for a host."""

    def day() -> Iterator[bytes]:
        yield HEAD + task("begin", "Ping Scan")
        for second in range(86_400):
            yield task("progress", "Ping Scan", f"{second / 864:.2f}")

    reader_fault, peak = fed(day())
    assert (reader_fault, peak < 1 << 20) == ("", True)


def test_reader_skipped_targets_are_listed(recording: Recording) -> None:
    """Targets that nmap had no route to are not hosts, and the reader lists them."""
    reader = Reader(max_host_bytes=MAX_HOST)
    assert [host.address for host in reader.feed(recording("skipped"))] == ["127.9.1.8"]
    reader.close()
    assert reader.skipped == ["10.88.0.0", "10.88.0.1"]


@pytest.mark.parametrize("name", ["many_open", "versions", "down", "udp"])
@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_reader_piece_size_does_not_matter(recording: Recording, name: str, piece: int) -> None:
    """A document read byte by byte gives the same hosts as one read at once."""
    assert read(recording(name), piece) == read(recording(name))


@pytest.mark.proves("A14", "G16")
@pytest.mark.parametrize("name", ["closed", "versions", "down", "timed_out"])
def test_reader_truncated_document_keeps_complete_hosts(recording: Recording, name: str) -> None:
    """A document cut at any byte gives exactly the hosts that ended before the cut, and is reported as truncated."""
    document = recording(name)
    whole, _ = read(document)
    for cut in range(len(document.rstrip())):
        hosts, fault = read(document[:cut])
        assert hosts == whole[: document[:cut].count(b"</host>")]
        assert fault


def test_reader_hosts_before_an_error_are_kept() -> None:
    """Hosts that were complete before a malformed byte are kept, and the error is reported."""
    hosts, fault = read(HEAD + a_host("127.9.1.1") + a_host("127.9.1.2") + b"<host><status <<<" + a_host("127.9.1.3"))
    assert [host.address for host in hosts] == ["127.9.1.1", "127.9.1.2"]
    assert fault


def test_reader_host_hints_are_ignored() -> None:
    """nmap's early hint about a host is not mistaken for the host."""
    hint = a_host("127.9.1.9").replace(b"<host ", b"<hosthint ").replace(b"</host>", b"</hosthint>")
    hosts, fault = read(HEAD + hint + a_host("127.9.1.1") + TAIL)
    assert ([host.address for host in hosts], fault) == (["127.9.1.1"], "")


def test_reader_failed_exit_status_is_rejected() -> None:
    """A complete document in which nmap reports failure is rejected."""
    assert read(HEAD + TAIL)[1] == ""
    assert "finished" in read(HEAD + TAIL.replace(b"success", b"error"))[1]
    assert "finished" in read(HEAD + b"</nmaprun>")[1]


@pytest.mark.proves("A14")
@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE nmaprun [<!ENTITY a "x"><!ENTITY b "&a;&a;&a;">]><nmaprun>&b;</nmaprun>',
        b'<!DOCTYPE nmaprun [<!ENTITY a "%s">]><nmaprun>%s</nmaprun>' % (b"x" * 50_000, b"&a;" * 50_000),
        b'<!DOCTYPE nmaprun [<!ENTITY a SYSTEM "file:///etc/passwd">]><nmaprun>&a;</nmaprun>',
        b'<!DOCTYPE nmaprun SYSTEM "file:///etc/passwd"><nmaprun/>',
        b'<!DOCTYPE nmaprun [<!ATTLIST host a CDATA "x">]><nmaprun/>',
        b"<!DOCTYPE other><nmaprun/>",
        b"<other/>",
        HEAD + b"&undefined;",
        HEAD + b"<!-- " + a_host() + b" -->",
        HEAD + b"<![CDATA[" + a_host() + b"]]>",
        HEAD + b"<?php " + a_host() + b"?>",
        HEAD + b'<host a="/>/>/>/>">',
        HEAD + b"<a>" * 70_000,
        HEAD + a_host(inside=b"<table>" * 20_000),
        b"\xff\xfe<\x00n\x00m\x00a\x00p\x00r\x00u\x00n\x00>\x00",
    ],
    ids=[
        "billion laughs",
        "quadratic entities",
        "external entity",
        "external document type",
        "default attributes",
        "another document type",
        "another root",
        "undefined entity",
        "comment",
        "CDATA",
        "instruction",
        "bare >",
        "deep nesting",
        "deep nesting in a host",
        "UTF-16",
    ],
)
def test_reader_hostile_documents_are_rejected(document: bytes) -> None:
    """Markup that nmap never writes is rejected with a reason and without a host."""
    hosts, fault = read(document)
    assert (hosts, bool(fault)) == ([], True)


def fed(pieces: Iterator[bytes]) -> tuple[str, int]:
    """Return the error and the peak memory of reading."""
    reader = Reader(max_host_bytes=MAX_HOST)
    tracemalloc.start()
    fault = ""
    try:
        for piece in pieces:
            for _ in reader.feed(piece):
                pass
    except BadXmlError as error:
        fault = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return fault, peak


@pytest.mark.proves("A14", "G11")
def test_reader_endless_input_has_bounded_memory() -> None:
    """An endless attribute, text, host or nesting is rejected within the memory limits."""
    piece = 1 << 16
    copies = 4  # of a limit: buffers grow by copying, and over-allocation differs between Python versions

    def endless(start: bytes, again: bytes) -> Iterator[bytes]:
        yield HEAD + start
        for _ in range(100 * (1 << 20) // piece):
            yield again * (piece // len(again))

    assert "bytes" in (ended := fed(endless(b'<host a="', b"x")))[0]
    assert ended[1] < copies * MAX_TOKEN
    assert "host of more" in (ended := fed(endless(b"<host a='b'>", b"<elem>text</elem>")))[0]
    assert ended[1] < copies * MAX_HOST
    assert "nested" in (ended := fed(endless(b"", b"<aaa>")))[0]
    assert ended[1] < copies * MAX_TOKEN


def test_reader_memory_is_independent_of_host_count() -> None:
    """Sixteen times as many hosts need no more memory to read."""

    def hosts(number: int) -> Iterator[bytes]:
        yield HEAD
        for index in range(number):
            yield a_host(f"10.0.{index >> 8}.{index & 255}", b'<port protocol="tcp" portid="1"/>' * 5)

    few, many = fed(hosts(500))[1], fed(hosts(8_000))[1]
    assert many < 2 * few


def test_reader_invalid_characters_are_escaped() -> None:
    """References and bytes that XML forbids are kept as escapes, so that one invalid banner does not fail a chunk."""
    inside = (
        b'<port protocol="tcp" portid="1"><x a="&#x1b;[31m &#xd800; &#xfffe; \x01 \xff\xe2\x80 &#xe9; &#xa;"/></port>'
    )
    for piece in (1, 5, 1000):
        hosts, fault = read(HEAD + a_host(inside=inside) + TAIL, piece)
        assert fault == ""
        assert rb"\x1b[31m \ud800 \ufffe \x01 \xff\xe2\x80 &#xe9; &#xa;" in hosts[0].element


@pytest.mark.proves("A14")
@given(st.binary(max_size=300), st.integers(1, 50))
def test_reader_any_bytes_give_hosts_or_an_error(noise: bytes, piece: int) -> None:
    """Noise in the middle of a document breaks neither the reader nor the hosts before it."""
    hosts, _ = read(HEAD + a_host("127.9.1.1") + noise + a_host("127.9.1.2") + TAIL, piece)
    assert hosts[0].address == "127.9.1.1"


@pytest.mark.proves("A14")
@given(
    st.lists(st.sampled_from([b"<", b">", b"/", b"host", b" ", b'"', b"=", b"<host>", b"</host>", b"&", b"#x1;", b"a"]))
)
def test_reader_any_markup_gives_hosts_or_an_error(parts: list[bytes]) -> None:
    """No arrangement of markup raises anything but the reader's own error."""
    read(HEAD + b"".join(parts))
