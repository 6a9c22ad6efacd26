"""Scan targets: syntax, rules, exclusions."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scanfleet.scanning.targets import NAT64_LENGTHS, Network, Target, TargetRules, parse_network

EVERYTHING = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


def rules(*allowed: str, denied: tuple[str, ...] = (), max_addresses: int = 65_536) -> TargetRules:
    return TargetRules(tuple(map(parse_network, allowed)), tuple(map(parse_network, denied)), max_addresses)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    length = draw(st.integers(0, 32))
    if draw(st.booleans()):
        return IPv4Network((draw(st.integers(0, 2**32 - 1)) >> (32 - length) << (32 - length), length))
    length = draw(st.integers(0, 128))
    return IPv6Network((draw(st.integers(0, 2**128 - 1)) >> (128 - length) << (128 - length), length))


@given(networks())
def test_parse_network_accepts_canonical_text(network: Network) -> None:
    """Every network in its canonical spelling is parsed to itself."""
    assert parse_network(str(network)) == network


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("127.0.0.1", "127.0.0.1/32"),
        ("::1", "::1/128"),
        ("2001:DB8:0::/48", "2001:db8::/48"),
        ("::ffff:1.2.3.4", "::ffff:102:304/128"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_reads_single_addresses_and_any_spelling_of_ipv6(text: str, network: str) -> None:
    """A single address is the longest prefix, and IPv6, which is unambiguous, may have any standard spelling."""
    assert parse_network(text) == parse_network(network)


@pytest.mark.proves("A1", "A4", "G12")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.1",
        "0x7f000001",
        "0x7f.0.0.1",
        "010.0.0.1",
        "2130706433",
        "1.2.3.4/33",
        "1.2.3.0/24-5",
        "1.2.3.1-5",
        "1.2.3.*",
        "1.2.3.0/024",
        "1.2.3.0/+24",
        "1.2.3.0/",
        "1.2.3.0/255.255.255.0",
        "1.2.3.0/0.0.0.255",
        "1.2.3.4/32/32",
        "1.2.3.4,1.2.3.5",
        "1.2.3.4 1.2.3.5",
        " 1.2.3.4",
        "1.2.3.4\n",
        "1.2.3.4\x00",
        "1.2.3.4 -oN x",
        "-iL",
        "$(id)",
        "localhost",
        "\u0661.2.3.4",
        "\uff11.2.3.4",
        "::/129",
        ":::",
        "fe80::1%eth0",
        "[::1]",
        "::ffff:010.0.0.1",
        "0" * 100_000,
    ],
)
def test_refuses_odd_spellings(text: str) -> None:
    """Text that another program could parse as a different network is refused, in a short message that shows it."""
    with pytest.raises(ValueError, match="is not a network such as") as refusal:
        parse_network(text)
    assert repr(text[:50]) in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(("text", "network"), [("10.0.0.1/24", "10.0.0.0/24"), ("2001:db8::1/64", "2001:db8::/64")])
def test_names_the_network_of_an_address_with_host_bits(text: str, network: str) -> None:
    """An address that stands for its network is refused with the network's own text."""
    with pytest.raises(ValueError, match=f"host bits set; the network is {network}"):
        parse_network(text)


@pytest.mark.proves("A1", "A4", "G12")
@given(st.text(max_size=60))
def test_parse_network_returns_or_raises_value_error(text: str) -> None:
    """Every text is parsed or raises ValueError; a parsed one is plain ASCII without spaces."""
    try:
        parse_network(text)
    except ValueError:
        return
    assert text.isascii()
    assert not set(text) - set("0123456789abcdefABCDEF.:/")


def test_rules_allow_no_target_by_default() -> None:
    """An operator who names no networks has allowed none."""
    assert rules().refusal(parse_network("127.0.0.1")) == (
        "127.0.0.1/32 is not within the networks that this platform allows"
    )


def test_rules_allow_a_network_within_an_allowed_one() -> None:
    """A network is allowed if all of it is, and refused if any part is not."""
    assert rules("10.0.0.0/8").refusal(parse_network("10.1.0.0/16")) is None
    assert rules("10.0.0.0/8").refusal(parse_network("10.0.0.0/8").supernet()) is not None
    assert rules("10.0.0.0/24").refusal(parse_network("10.0.0.0/23")) is not None
    assert rules("::1").refusal(parse_network("0.0.0.1")) is not None


def test_rules_allow_a_network_covered_by_several_together() -> None:
    """A network that two allowed networks cover together is allowed, in any order and with overlaps."""
    halves = rules("10.0.1.0/24", "::1", "10.0.0.0/25", "10.0.0.0/26", "10.0.0.128/25")
    assert halves.refusal(parse_network("10.0.0.0/23")) is None
    assert halves.refusal(parse_network("10.0.0.0/22")) is not None


@pytest.mark.proves("A3", "G12")
def test_deny_wins_over_allow() -> None:
    """A network that touches a denied one is refused, and the refusal names the denied one."""
    both = rules("10.0.0.0/8", denied=("10.0.5.0/24",))
    assert both.refusal(parse_network("10.0.4.0/24")) is None
    for touching in ("10.0.5.7", "10.0.5.0/24", "10.0.4.0/23"):
        assert both.refusal(parse_network(touching)) == (
            f"{parse_network(touching)} overlaps 10.0.5.0/24, which this platform denies"
        )


@pytest.mark.proves("A5")
def test_rules_refuse_a_network_above_the_size_limit() -> None:
    """The largest allowed network has exactly the maximum size."""
    small = rules("10.0.0.0/8", max_addresses=256)
    assert small.refusal(parse_network("10.0.0.0/24")) is None
    assert small.refusal(parse_network("10.0.0.0/23")) == "10.0.0.0/23 has 512 addresses; a subnet has at most 256"


@pytest.mark.proves("A3", "G12")
@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "0.1.2.3",
        "169.254.169.254",
        "169.254.0.0/16",
        "169.0.0.0/8",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "::",
        "::/127",
        "fe80::1",
        "fe80::/64",
        "febf::1",
        "ff02::1",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:42::42",
        "fd00::/16",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "64:ff9b:1::7f00:1",
    ],
)
def test_rules_always_refuse_special_networks(text: str) -> None:
    """Special and undecidable networks are refused even if all networks are allowed."""
    everything = TargetRules(EVERYTHING, max_addresses=2**128)
    reason = everything.refusal(parse_network(text))
    assert reason is not None
    assert reason.endswith("are never scanned")


@pytest.mark.proves("A3", "G12")
@pytest.mark.parametrize(
    "text",
    [
        "::ffff:169.254.169.254",
        "::ffff:a9fe:a9fe",
        "::169.254.169.254",
        "::ffff:0:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "2002:a9fe:a9fe::/48",
        "2001:db8::5efe:169.254.169.254",
        "2001:db8::200:5efe:169.254.169.254",
        "2001:db8::5efe:10.0.0.0/120",
        "2001:db8::5efe:0:0/96",
        "2001:db8::5e00:0:0/88",
        "2001:db8::/64",
        "::ffff:10.0.0.1",
        "::ffff:0.0.0.0/96",
        "::ffff:169.254.0.0/112",
        "2002::/16",
        "2002::/15",
        "64:ff9b::/64",
        "2002:a9fe::/32",
        "::/64",
        "2000::/3",
        "::/0",
    ],
)
def test_rules_refuse_ipv6_with_a_refused_embedded_ipv4(text: str) -> None:
    """An IPv6 network is refused if an IPv4 address that its packets may reach is refused."""
    everything = TargetRules(EVERYTHING, (IPv4Network("10.0.0.0/8"),), max_addresses=2**128)
    assert everything.refusal(parse_network(text)) is not None


@pytest.mark.parametrize(
    "text",
    ["::ffff:127.0.0.0/104", "64:ff9b::127.0.0.1", "2002:7f00:1::/96", "2001:db8::200:5efe:127.0.0.0/104"],
)
def test_rules_allow_ipv6_only_if_its_embedded_ipv4_is_allowed(text: str) -> None:
    """Allowing only the IPv6 network, or only the IPv4 network, does not allow the embedding."""
    network = parse_network(text)
    limit = 2**128
    assert rules("127.0.0.0/8", "::/0", max_addresses=limit).refusal(network) is None
    assert rules("127.0.0.0/8", max_addresses=limit).refusal(network) is not None
    assert rules("::/0", max_addresses=limit).refusal(network) == (
        f"{network} leads to IPv4 addresses: "
        f"{'127.0.0.0/8' if text.endswith('/104') else '127.0.0.1/32'} is not within the networks that this platform allows"
    )


def test_rules_find_no_ipv4_in_the_ipv6_loopback() -> None:
    """::1 looks like an IPv4-compatible address but is not one."""
    assert rules("::1").refusal(parse_network("::1")) is None


@given(networks(), st.lists(networks(), max_size=4), st.lists(networks(), max_size=4), st.data())
def test_rules_allow_a_network_only_if_each_address_is_allowed(
    network: Network,
    allowed: list[Network],
    denied: list[Network],
    data: st.DataObject,
) -> None:
    """Every address of an allowed network is allowed by itself."""
    both = TargetRules((*allowed, *EVERYTHING), tuple(denied), max_addresses=2**128)
    if both.refusal(network) is None:
        inner = network[data.draw(st.integers(0, network.num_addresses - 1))]
        assert both.refusal(parse_network(str(inner))) is None


@pytest.mark.proves("A3", "G12")
@given(
    prefix=st.sampled_from(["::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "2002::/16"]),
    address=st.ip_addresses(v=4),
    tail=st.integers(0, 2**80 - 1),
)
def test_rules_refuse_every_embedding_of_a_refused_ipv4(prefix: str, address: IPv4Address, tail: int) -> None:
    """No IPv6 spelling of a refused IPv4 address is allowed."""
    outer = IPv6Network(prefix)
    room = 96 - outer.prefixlen
    embedding = outer[(int(address) << room) | (tail >> (80 - room))]
    everything = TargetRules(EVERYTHING, (IPv4Network("10.0.0.0/8"), IPv4Network("0.0.0.0/5")))
    if everything.refusal(IPv4Network(address)) is not None and embedding != ip_address("::1"):
        assert everything.refusal(IPv6Network(embedding)) is not None


@pytest.mark.proves("A3", "G12")
@given(
    subnet=st.integers(0, 2**64 - 1),
    identifier=st.sampled_from([0x0000_5EFE, 0x0200_5EFE]),
    address=st.ip_addresses(v=4),
)
def test_rules_refuse_isatap_with_a_refused_ipv4(subnet: int, identifier: int, address: IPv4Address) -> None:
    """An ISATAP identifier with a refused IPv4 address is refused in any network."""
    embedding = IPv6Network((subnet << 64) | (identifier << 32) | int(address))
    everything = TargetRules(EVERYTHING, (IPv4Network("10.0.0.0/8"), IPv4Network("0.0.0.0/5")))
    if everything.refusal(IPv4Network(address)) is not None:
        assert everything.refusal(embedding) is not None


_RFC_6052 = [  # the table of its section 2.4: 192.0.2.33 below each prefix
    ("2001:db8::/32", "2001:db8:c000:221::"),
    ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
    ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
    ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
    ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
]


@pytest.mark.proves("A3", "G12")
@pytest.mark.parametrize(("prefix", "text"), _RFC_6052)
def test_rules_apply_to_ipv4_behind_a_nat64_prefix(prefix: str, text: str) -> None:
    """Addresses of a named NAT64 prefix of each length are refused like the IPv4 addresses behind them."""
    allowed = (IPv6Network("2001:db8::/32"), IPv4Network("192.0.0.0/16"))
    network = parse_network(text)
    site = TargetRules(allowed, (IPv4Network("192.0.2.33/32"),), nat64=(IPv6Network(prefix),))
    assert site.refusal(network) == (
        f"{network} leads to IPv4 addresses: 192.0.2.33/32 overlaps 192.0.2.33/32, which this platform denies"
    )
    assert replace(site, denied=()).refusal(network) is None
    assert replace(site, denied=(), allowed=allowed[:1]).refusal(network) is not None
    assert replace(site, nat64=()).refusal(network) is None


def test_nat64_lengths_are_those_of_the_rfc() -> None:
    """A setting takes the lengths that RFC 6052 defines."""
    assert {IPv6Network(prefix).prefixlen for prefix, _ in _RFC_6052} == NAT64_LENGTHS


@pytest.mark.parametrize(
    ("exclude", "effective", "included"),
    [
        (["10.0.0.9", "10.0.0.0/30"], ["10.0.0.0/30", "10.0.0.9/32"], 11),
        (["10.0.1.0", "::1", "192.168.0.0/16", "10.0.0.9"], ["10.0.0.9/32"], 15),
        (["10.0.0.8/30", "10.0.0.9", "10.0.0.8/30"], ["10.0.0.8/30"], 12),
        (["10.0.0.1", "10.0.0.0"], ["10.0.0.0/31"], 14),
        (["10.0.1.0/24"], [], 16),
    ],
)
def test_excludes_with_harmless_surplus_are_reduced(exclude: list[str], effective: list[str], included: int) -> None:
    """Networks outside, inside one another, repeated or adjacent become the fewest sorted ones of the same effect."""
    target = Target.parse("10.0.0.0/28", exclude)
    assert list(target.exclude) == effective
    assert target.included == included


@given(st.lists(networks(), max_size=8))
def test_reduced_excludes_leave_out_the_same_addresses(exclude: list[Network]) -> None:
    """An address is left out by the reduced list exactly if any given network holds it."""
    network = IPv4Network("10.0.0.0/28")
    exclude += map(parse_network, ("10.0.0.4/31", "10.0.0.5", "10.0.0.6/31"))
    left = [address for address in network if not any(address in inner for inner in exclude)]
    if not left:
        with pytest.raises(ValueError, match=r"every address of 10\.0\.0\.0/28 is excluded"):
            Target.parse(str(network), map(str, exclude))
        return
    target = Target.parse(str(network), map(str, exclude))
    reduced = [IPv4Network(each) for each in target.exclude]
    assert [address for address in network if not any(address in inner for inner in reduced)] == left
    assert target.included == len(left)
    assert reduced == list(collapse_addresses(reduced))


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "::/0", "::ffff:0:0/96", "::/96"])
@given(st.data())
def test_reduced_excludes_are_written_as_ipaddress_does(cidr: str, data: st.DataObject) -> None:
    """The reduced list of any networks of the family is that of `ipaddress`, in its text form."""
    network = parse_network(cidr)
    least, whole = network.prefixlen + 1, network.max_prefixlen
    low, high = int(network.network_address), int(network.broadcast_address)
    drawn = data.draw(st.lists(st.tuples(st.integers(low, high), st.integers(least, whole)), max_size=6))
    exclude = [type(network)((address >> (whole - bits) << (whole - bits), bits)) for address, bits in drawn]
    reduced = list(collapse_addresses(exclude))  # type: ignore[type-var] # typed for one family, which these are
    assume(reduced != [network])
    assert Target.parse(cidr, map(str, exclude)).exclude == tuple(map(str, reduced))


@given(
    st.text("0123456789af:./", max_size=20)
    | st.from_regex(r"[0-9.]{7,15}/[0-9]{1,3}", fullmatch=True)
    | networks().map(str)
)
def test_exclude_is_a_network_as_any_other(text: str) -> None:
    """A text is accepted as an exclude, or refused with the same message, as it is as a network."""
    try:
        network = parse_network(text)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            Target.parse("0.0.0.0/0", [text])
        return
    assume(network.prefixlen > 0)
    for whole in ("0.0.0.0/0", "::/0"):
        inside = parse_network(whole).version == network.version
        assert Target.parse(whole, [text]).exclude == ((str(network),) if inside else ())


@pytest.mark.proves("G20")
@pytest.mark.parametrize("cidr", ["10.0.0.0/16", "2001:db8::/112"])
def test_target_with_many_excludes_costs_little_each(cidr: str) -> None:
    """A thousand excludes, all that a subnet may have, are parsed and written in less than 10 microseconds each."""
    network = parse_network(cidr)
    exclude = [str(ip_network((network.network_address + 2 * place, network.max_prefixlen))) for place in range(1_000)]
    seconds = []
    for _ in range(5):
        began = time.process_time()
        written = Target.parse(cidr, exclude).without_broadcast().exclude
        seconds.append(time.process_time() - began)
        assert set(written) >= set(exclude)
    assert min(seconds) < 0.01


@pytest.mark.proves("A5")
@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["10.0.0.0/24"], "every address of 10.0.0.0/24 is excluded"),
        (["10.0.0.0/23"], "every address of 10.0.0.0/24 is excluded"),
        (["10.0.0.128/25", "10.0.0.0/25"], "every address of 10.0.0.0/24 is excluded"),
        (["10.0.0.1", "nonsense"], "'nonsense' is not a network"),
        (["10.0.0.1/30"], "has host bits set"),
    ],
)
def test_target_refuses_invalid_excludes(exclude: list[str], message: str) -> None:
    """An exclude that is not a network, or leaves nothing to scan, is refused by name."""
    with pytest.raises(ValueError, match=message):
        Target.parse("10.0.0.0/24", exclude)


@pytest.mark.parametrize(
    ("cidr", "exclude", "effective"),
    [
        ("10.0.0.0/24", [], ["10.0.0.255/32"]),
        ("10.0.0.0/30", ["10.0.0.2"], ["10.0.0.2/31"]),
        ("10.0.0.0/30", ["10.0.0.3"], ["10.0.0.3/32"]),
        ("10.0.0.0/31", [], []),
        ("10.0.0.7", [], []),
        ("127.0.0.0/24", [], []),
        ("2001:db8::/120", [], []),
    ],
)
def test_without_broadcast_leaves_out_the_last_address(cidr: str, exclude: list[str], effective: list[str]) -> None:
    """The last address of an IPv4 network is excluded, except of loopback networks, links and single addresses."""
    assert list(Target.parse(cidr, exclude).without_broadcast().exclude) == effective


def test_without_broadcast_of_the_only_address_is_refused() -> None:
    """A target that consists of the broadcast address alone is refused by name."""
    with pytest.raises(ValueError, match=r"every address of 10\.0\.0\.0/30 but its broadcast address is excluded"):
        Target.parse("10.0.0.0/30", ["10.0.0.0/31", "10.0.0.2"]).without_broadcast()


@given(st.data())
def test_holes_are_exactly_the_excluded_addresses(data: st.DataObject) -> None:
    """The position of an address is in a hole if and only if the address is in an excluded network."""
    network = parse_network(data.draw(st.sampled_from(["10.0.0.0/26", "255.255.255.192/26", "2001:db8::40/122"])))
    pieces: list[Network] = list(network.subnets(new_prefix=network.max_prefixlen - data.draw(st.integers(0, 5))))
    exclude = data.draw(st.lists(st.sampled_from(pieces), unique=True, max_size=len(pieces) - 1))
    target = Target.parse(str(network), map(str, exclude))
    excluded = [position for position, each in enumerate(network) if any(each in inner for inner in exclude)]
    assert [position for hole in target.holes for position in range(*hole)] == excluded
    assert target.included == network.num_addresses - len(excluded)


def test_digest_of_equal_rules_is_equal() -> None:
    """The digest does not depend on the order in which networks are configured, and every rule changes it."""
    one = rules("10.0.0.0/8", "127.0.0.0/8", denied=("10.9.0.0/16",))
    assert one.digest == rules("127.0.0.0/8", "10.0.0.0/8", denied=("10.9.0.0/16",)).digest
    others = [
        rules("10.0.0.0/8", "127.0.0.0/8"),
        rules("10.0.0.0/8", "127.0.0.0/8", "10.9.0.0/16"),
        replace(one, max_addresses=1),
        replace(one, nat64=(IPv6Network("64:ff9b:1::/48"),)),
    ]
    assert len({each.digest for each in (one, *others)}) == 1 + len(others)
