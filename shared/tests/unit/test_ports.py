"""Which ports a text names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanfleet.scanning.ports import (
    MAX_PORT,
    MAX_RANGES_TEXT,
    MAX_TEXT,
    MAX_TOP,
    PortSet,
    Range,
    parse_ranges,
    ranges_text,
)

PORT = st.integers(0, MAX_PORT)
ITEMS = st.lists(
    st.tuples(st.sampled_from("TU"), PORT, PORT).map(lambda i: (i[0], min(i[1:]), max(i[1:]))), min_size=1, max_size=12
)


def written(items: list[tuple[str, int, int]]) -> str:
    return ",".join(f"{protocol}:{low}" if low == high else f"{protocol}:{low}-{high}" for protocol, low, high in items)


TEXT = ITEMS.map(written)


def numbers(ranges: tuple[Range, ...]) -> set[int]:
    return {port for low, high in ranges for port in range(low, high + 1)}


def test_text_that_was_parsed_is_not_parsed_again() -> None:
    """The chunks of a job have the same ports, which can be a long list."""
    assert PortSet.parse("22,80") is PortSet.parse("22,80")


@pytest.mark.parametrize(
    ("text", "tcp", "udp"),
    [
        ("22", ((22, 22),), ()),
        ("22,80,8000-8100", ((22, 22), (80, 80), (8000, 8100)), ()),
        ("80,22,22,81", ((22, 22), (80, 81)), ()),
        ("T:80,U:53", ((80, 80),), ((53, 53),)),
        ("U:53,161,T:80,443", ((80, 80), (443, 443)), ((53, 53), (161, 161))),
        ("U:53", (), ((53, 53),)),
        ("-", ((1, 65_535),), ()),
        ("-100", ((1, 100),), ()),
        ("65000-", ((65_000, 65_535),), ()),
        ("0", ((0, 0),), ()),
        ("0-65535", ((0, 65_535),), ()),
        ("00080", ((80, 80),), ()),
        ("T:-,U:-3", ((1, 65_535),), ((1, 3),)),
        ("22,T:80", ((22, 22), (80, 80)), ()),
        (" 22, 80 ,443, ", ((22, 22), (80, 80), (443, 443)), ()),
        ("22,", ((22, 22),), ()),
        ("t:80,u:53", ((80, 80),), ((53, 53),)),
    ],
)
def test_reads_the_syntax_of_nmap(text: str, tcp: tuple[Range, ...], udp: tuple[Range, ...]) -> None:
    """Numbers, ranges, open ranges and protocol prefixes give sorted, disjoint ranges."""
    assert PortSet.parse(text) == PortSet(tcp, udp)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        ",22",
        "22,,",
        ", ,",
        "22,,80",
        "2 2",
        "T: 80",
        "ssh,80",
        "65536",
        "100-50",
        "1-2-3",
        "000080",
        "+80",
        "-1-5",
        "T:",
        "T:U:5",
        "S:80",
        "P:1",
        "http",
        "http*",
        "[1-80]",
        "22\n",
        "22\x00",
        "٢٢",
        "22 -oN x",
        "22;id",
        "$(id)",
        "top:0",
        "top:010",
        "top:-1",
        "top:",
        "TOP:10",
        "top:10,22",
        f"top:{MAX_TOP + 1}",
        "top:99999",
    ],
)
def test_parse_refuses_other_syntax(text: str) -> None:
    """Text that nmap, a shell or a reader could misread as ports is refused."""
    with pytest.raises(ValueError, match=r"port|top:N"):
        PortSet.parse(text)


@pytest.mark.parametrize("text", ["ssh,80", "http*", "[1-1024]"])
def test_parse_error_names_the_accepted_syntax(text: str) -> None:
    """The error for a service name or a bracket names it and the accepted forms."""
    with pytest.raises(ValueError, match=r'"T:80,U:53" or "top:100".*not names of services and nothing in brackets'):
        PortSet.parse(text)


@pytest.mark.parametrize("text", ["53,U:161", "53,T:80,U:161"])
def test_parse_refuses_ports_without_a_protocol_next_to_udp(text: str) -> None:
    """nmap would probe a port without a protocol by both, so the error asks for the protocol."""
    with pytest.raises(ValueError, match='need "T:"'):
        PortSet.parse(text)


def test_refuses_a_text_that_is_too_long() -> None:
    """The limit applies to the given and to the canonical text, so that a stored text can be parsed again."""
    with pytest.raises(ValueError, match="at most"):
        PortSet.parse("1," * MAX_TEXT + "1")
    listed = ",".join(str(port) for port in range(10_001, 10_001 + 2 * 1_666, 2))
    assert len(str(PortSet.parse(listed))) == MAX_TEXT - 5
    with pytest.raises(ValueError, match="at most"):
        PortSet.parse(f"{listed}-")  # one character more, and six in canonical form


@given(TEXT)
def test_canonical_text_round_trips(text: str) -> None:
    """Formatting and parsing again changes neither the ports nor the text."""
    ports = PortSet.parse(text)
    assert PortSet.parse(str(ports)) == ports
    assert str(PortSet.parse(str(ports))) == str(ports)


@given(ITEMS)
def test_counts_each_port_once(items: list[tuple[str, int, int]]) -> None:
    """Repeated ports in any order are contained once, and no other port is."""
    ports = PortSet.parse(written(items))
    tcp, udp = (
        set().union(*(range(low, high + 1) for named, low, high in items if named == protocol)) for protocol in "TU"
    )
    assert (numbers(ports.tcp), numbers(ports.udp)) == (tcp, udp)
    assert (ports.tcp_count, ports.udp_count, ports.count) == (len(tcp), len(udp), len(tcp) + len(udp))


@given(TEXT, st.integers(1, 70_000))
def test_blocks_hold_every_port_once_in_order(text: str, size: int) -> None:
    """Blocks of each protocol are full but for its last, are canonical, and hold each port of the set exactly once."""
    ports = PortSet.parse(text)
    size = max(size, ports.count // 50 + 1)  # some fifty blocks show as much as a hundred thousand
    blocks = list(ports.blocks(size))
    for of_protocol in ([b.tcp_count for b in blocks if b.tcp_count], [b.udp_count for b in blocks if b.udp_count]):
        assert of_protocol[:-1] == [size] * (len(of_protocol) - 1)
        assert all(0 < count <= size for count in of_protocol)
    assert not any(block.tcp and block.udp for block in blocks)
    assert sum(block.count for block in blocks) == ports.count
    assert set().union(*(numbers(block.tcp) for block in blocks)) == numbers(ports.tcp)
    assert set().union(*(numbers(block.udp) for block in blocks)) == numbers(ports.udp)
    assert all(PortSet.parse(str(block)) == block for block in blocks)
    assert blocks == [ports.block(number, size) for number in range(len(blocks))]


@given(TEXT, TEXT)
def test_sets_with_a_common_port_meet(text: str, other: str) -> None:
    """`meets` agrees with the intersection of the port numbers, in both directions."""
    some, others = PortSet.parse(text), PortSet.parse(other)
    shared = numbers(some.tcp) & numbers(others.tcp) or numbers(some.udp) & numbers(others.udp)
    assert some.meets(others) == others.meets(some) == bool(shared)


@given(st.integers(1, MAX_TOP), st.integers(1, MAX_TOP))
def test_blocks_of_top_ports_are_consecutive_ranks(top: int, size: int) -> None:
    """`top:N` counts N TCP ports, round-trips, and its blocks are consecutive ranks that round-trip too."""
    ports = PortSet.parse(f"top:{top}")
    assert (ports.count, ports.tcp_count, ports.udp_count) == (top, top, 0)
    assert str(ports) == f"top:{top}"
    size = max(size, top // 50 + 1)
    blocks = list(ports.blocks(size))
    assert sum(block.count for block in blocks) == top
    assert [block.above for block in blocks] == [0, *(block.top for block in blocks[:-1])]
    assert blocks == [ports.block(number, size) for number in range(len(blocks))]
    assert all(PortSet.parse(str(block)) == block for block in blocks)


@given(st.sets(st.integers(0, MAX_PORT), max_size=50))
def test_ranges_round_trip(ports: set[int]) -> None:
    """Ports in any order give the same ranges, and their text is canonical."""
    ranges = parse_ranges(",".join(map(str, ports)))
    assert [port for first, last in ranges for port in range(first, last + 1)] == sorted(ports)
    assert parse_ranges(ranges_text(ranges)) == ranges


def test_ranges_text_of_every_other_port_is_within_the_limit() -> None:
    """The longest ranges there are can be written and read."""
    ranges = tuple((port, port) for port in range(0, MAX_PORT + 1, 2))
    assert len(ranges_text(ranges)) <= MAX_RANGES_TEXT
    assert parse_ranges(ranges_text(ranges)) == ranges


@pytest.mark.parametrize(
    "text", ["x", "-5", "5-", "7-6", "65536", "1,,2", ",", "1, 2", "1-2-3", "1," * MAX_RANGES_TEXT]
)
def test_parse_ranges_malformed_is_rejected(text: str) -> None:
    """Text that is not a list of ports and ranges is rejected."""
    with pytest.raises(ValueError, match="port"):
        parse_ranges(text)


@pytest.mark.parametrize(
    ("some", "others", "meet"),
    [
        ("22,80", "80-90", True),
        ("22,80", "81-90", False),
        ("22", "U:22", False),
        ("T:1,U:53", "U:50-60", True),
        ("top:50", "top:51-100", False),
        ("top:51-100", "top:1000", True),
        ("top:50", "443", True),
        ("top:50", "U:53", False),
    ],
)
def test_meets_compares_numbers_and_ranks(some: str, others: str, *, meet: bool) -> None:
    """Numbers are compared by protocol, ranks with ranks; a rank may be any TCP port, since its number is unknown."""
    assert PortSet.parse(some).meets(PortSet.parse(others)) is meet
    assert PortSet.parse(others).meets(PortSet.parse(some)) is meet
