"""Translation of a chunk for nmap."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanfleet.contracts.messages import HostDetails, HostScanned, PortFound, ScanChunk, ScriptOutput
from scanfleet.contracts.messages.fields import MAX_BYTES
from scanfleet.scanning.outcomes import Outcome, networks
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, Preset, ScanPolicy, fill_in
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Network, TargetRules
from scanner_worker.domain.scan import (
    Host,
    ScanError,
    arguments,
    detection_of,
    fit,
    outcome,
    permit,
    printable,
    services,
    together,
)

MakeChunk = Callable[..., ScanChunk]

LOOPBACK = TargetRules(allowed=(ip_network("127.0.0.0/8"), ip_network("::1/128")))

# The permitted patterns of arguments before the targets.
SHAPES = re.compile(
    r"-v|-n|-oX|-|--stats-every|1s|--privileged|--unprivileged|-6|-Pn|-sS|-sT|-sU|-sV|-O|-p|--top-ports|-T[0-5]|--script"
    r"|--version-intensity|--min-rate|--max-rate|--max-rtt-timeout|--max-retries|--host-timeout|--min-hostgroup"
    r"|--max-hostgroup"
    r"|[0-9]{1,8}m?s?|(T:|U:)?[0-9]+(-[0-9]+)?(,(U:)?[0-9]+(-[0-9]+)?)*"
    r"|(\([a-z]+ and not \([a-z ]+\)\)|[a-z-]+)(,(\([a-z]+ and not \([a-z ]+\)\)|[a-z-]+))*",
)
TARGET = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}|[0-9a-f:]+/[0-9]{1,3}")


@st.composite
def policies(draw: st.DrawFn) -> ScanPolicy:
    given_fields = {
        "ports": draw(st.sampled_from(["22", "1-100", "T:1-5,8080,U:53,67-69", "U:53", "top:100", "0", "-"])),
        "technique": draw(st.sampled_from(["auto", "connect", "syn"])),
        "discovery": draw(st.sampled_from(["default", "none"])),
        "service_detection": draw(st.booleans()),
        "version_intensity": draw(st.integers(0, 9)),
        "os_detection": draw(st.booleans()),
        "scripts": tuple(draw(st.lists(st.sampled_from(sorted(ADMITTED_SCRIPTS)), unique=True))),
        "timing": draw(st.integers(0, 5)),
        "max_rate": draw(st.none() | st.integers(1, 10_000_000)),
        "max_rtt_timeout": draw(st.none() | st.integers(50, 10_000)),
        "max_retries": draw(st.none() | st.integers(0, 10)),
        "host_timeout": draw(st.none() | st.integers(1, 86_400)),
    }
    return fill_in(draw(st.sampled_from(Preset)), given_fields)


def line_of(chunk: ScanChunk, targets: Sequence[Network], *, raw: bool) -> list[str]:
    return arguments(chunk, PortSet.parse(chunk.ports), targets, raw=raw)


@pytest.mark.proves("G12")
@given(
    policy=policies(),
    first=st.sampled_from(["127.9.0.3", "2001:db8::5"]),
    outcomes=st.text(alphabet=".asd", min_size=1, max_size=64).filter(lambda text: "." in text),
    raw=st.booleans(),
    rates=st.tuples(*[st.none() | st.integers(1, 10_000_000)] * 2),
)
def test_arguments_match_known_patterns(
    policy: ScanPolicy, first: str, outcomes: str, raw: bool, rates: tuple[int | None, int | None]
) -> None:
    """For any policy and blanks, arguments are only known words, numbers, ports and canonical networks."""
    chunk = ScanChunk(
        job_id=1,
        chunk_id="1-0",
        attempt=1,
        worker_id="w",
        user_id=7,
        first_address=first,
        outcomes=outcomes,
        policy=policy,
        ports=policy.ports,
        lease_seconds=10,
        estimate_seconds=1,
        min_rate=rates[0],
        max_rate=rates[1],
    )
    targets = list(networks(first, outcomes))
    argv = line_of(chunk, targets, raw=raw)
    split = argv.index("--")
    assert all(SHAPES.fullmatch(argument) for argument in argv[:split]), argv
    assert argv[split + 1 :] == [str(network) for network in targets]
    assert all(TARGET.fullmatch(target) for target in argv[split + 1 :])
    assert len(set(argv[split + 1 :])) == len(targets)


def test_arguments_have_an_option_for_each_field(make_chunk: MakeChunk) -> None:
    """Each field of a policy sets its option, and an unset field sets none."""
    chunk = make_chunk(
        {
            "ports": "T:22,U:53",
            "discovery": "none",
            "service_detection": True,
            "version_intensity": 3,
            "os_detection": True,
            "scripts": ("banner", "http-title"),
            "timing": 2,
            "max_rate": 100,
            "max_rtt_timeout": 250,
            "max_retries": 1,
            "host_timeout": 30,
        },
    )
    line = " ".join(line_of(chunk, [ip_network("127.9.1.0/30")], raw=True))
    assert "--privileged -Pn -sS -sU -p T:22,U:53 -sV --version-intensity 3 -O --script banner,http-title -T2" in line
    assert "--max-rate 100 --max-rtt-timeout 250ms --max-retries 1 --host-timeout 30s" in line
    plain = line_of(make_chunk({"service_detection": False, "timing": 3}), [ip_network("::1/128")], raw=False)
    assert {"--unprivileged", "-6", "-sT"} <= set(plain)
    assert not {
        "-sV",
        "-O",
        "--script",
        "-Pn",
        "-sU",
        "--min-rate",
        "--max-rate",
        "--max-rtt-timeout",
        "--max-retries",
    } & set(plain)
    assert plain[plain.index("--host-timeout") + 1] == "900s"


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"timing": 4}, "--max-retries 10"),
        ({"timing": 5, "max_rtt_timeout": 100}, "--max-rtt-timeout 100ms --max-retries 10"),
        ({"timing": 4, "max_retries": 0}, "--max-retries 0"),
        ({"timing": 3}, ""),
        ({"timing": 3, "max_retries": 1}, "--max-retries 1"),
        ({"timing": 4, "ports": "U:53"}, ""),
    ],
)
def test_arguments_of_fast_timings_repeat_probes_up_to_ten_times(
    make_chunk: MakeChunk, changed: dict[str, Any], options: str
) -> None:
    """TCP probes at timings 4 and 5 are repeated up to ten times, unless the policy says otherwise."""
    line = " ".join(line_of(make_chunk({"ports": "22"} | changed), [ip_network("127.9.1.0/28")], raw=True))
    assert re.sub(r".* -T\d( --min-rate \d+)? ?(.*?) ?--host-timeout .*", r"\2", line) == options


@pytest.mark.parametrize(
    ("of_policy", "target", "floor"),
    [
        (None, "127.9.1.0/32", "256"),
        (None, "127.9.1.0/30", "1024"),
        (None, "127.9.1.0/28", "2000"),
        (2_000, "127.9.1.0/32", "2000"),
    ],
)
def test_arguments_of_few_addresses_have_low_rate_floor(
    make_chunk: MakeChunk, of_policy: int | None, target: str, floor: str
) -> None:
    """The floor of a timing is at most 256 for each address; a policy's own min_rate is followed."""
    chunk = make_chunk({"min_rate": of_policy}).model_copy(update={"min_rate": 2_000})
    argv = line_of(chunk, [ip_network(target)], raw=False)
    assert argv[argv.index("--min-rate") + 1] == floor


@pytest.mark.parametrize(
    ("of_policy", "of_chunk", "line"),
    [
        (None, {"min_rate": 500}, "--min-rate 500"),
        (None, {"min_rate": 500, "max_rate": 2_000}, "--min-rate 500 --max-rate 2000"),
        (None, {"min_rate": 500, "max_rate": 20}, "--min-rate 20 --max-rate 20"),
        (100, {"min_rate": 500, "max_rate": 20}, "--min-rate 20 --max-rate 20"),
        (100, {"min_rate": 500}, "--min-rate 100 --max-rate 100"),
        (100, {}, "--max-rate 100"),
    ],
)
def test_arguments_rates_are_the_chunks(
    make_chunk: MakeChunk, of_policy: int | None, of_chunk: dict[str, int], line: str
) -> None:
    """The chunk's rate limit replaces the policy's, and the floor never exceeds it."""
    argv = line_of(make_chunk({"max_rate": of_policy}, **of_chunk), [ip_network("127.9.1.0/30")], raw=True)
    assert f"-T4 {line} --max-retries 10 --host-timeout" in " ".join(argv)


@pytest.mark.parametrize(
    ("discovery", "ports", "group"),
    [("default", "22,80", 512), ("default", "top:1000", 64), ("none", "22,80", 512), ("none", "top:1000", 16)],
)
def test_arguments_groups_of_silent_hosts_are_small(
    make_chunk: MakeChunk, discovery: str, ports: str, group: int
) -> None:
    """Without discovery a host group is small, so that a silent network is reported and resumed in small steps."""
    argv = line_of(make_chunk({"discovery": discovery, "ports": ports}), [ip_network("127.9.1.0/30")], raw=True)
    assert f"--min-hostgroup {group} --max-hostgroup {group}" in " ".join(argv)


def test_arguments_top_ports_are_counted(make_chunk: MakeChunk) -> None:
    """top:N becomes --top-ports N, and nmap must announce that number of ports."""
    chunk = make_chunk({"ports": "top:100"})
    argv = line_of(chunk, [ip_network("127.9.1.0/30")], raw=True)
    assert argv[argv.index("--top-ports") + 1] == "100"
    assert "-p" not in argv
    assert services(chunk.policy.port_set) == {"tcp": 100}


@pytest.mark.proves("A3", "G12")
def test_permit_forbidden_addresses_are_refused(make_chunk: MakeChunk) -> None:
    """Only the addresses that the rules forbid are refused, with the rule as the reason."""
    rules = TargetRules(allowed=LOOPBACK.allowed, denied=(ip_network("127.9.1.1/32"), ip_network("127.9.1.6/31")))
    permitted = permit(make_chunk(outcomes="a......."), rules, raw=True)
    assert permitted.outcomes == "ar....rr"
    assert [str(network) for network in networks("127.9.1.0", permitted.outcomes)] == ["127.9.1.2/31", "127.9.1.4/31"]
    assert "127.9.1.1/32" in permitted.reason


@pytest.mark.proves("A3", "G12")
def test_permit_without_allowed_network_refuses_all(make_chunk: MakeChunk) -> None:
    """Without an allowed network every blank is refused, and existing outcomes are kept."""
    assert permit(make_chunk(outcomes=".a.d"), TargetRules(allowed=()), raw=True).outcomes == "rard"


@pytest.mark.parametrize(
    "policy",
    [{"technique": "syn"}, {"os_detection": True}, {"ports": "U:53"}],
    ids=["syn", "os detection", "udp"],
)
def test_permit_without_raw_packets_refuses_raw_policies(make_chunk: MakeChunk, policy: dict[str, object]) -> None:
    """A worker without raw packets refuses policies that need them, with the reason."""
    chunk = make_chunk(policy)
    assert permit(chunk, LOOPBACK, raw=True).outcomes == "...."
    permitted = permit(chunk, LOOPBACK, raw=False)
    assert permitted.outcomes == "rrrr"
    assert "raw packets" in permitted.reason


def test_permit_tcp_part_needs_no_raw_packets(make_chunk: MakeChunk) -> None:
    """The chunk's own ports decide, not all ports of the policy."""
    chunk = make_chunk({"ports": "T:80,U:53"}, ports="80")
    assert permit(chunk, LOOPBACK, raw=False).outcomes == "...."


def test_together_compatible_chunks_share_an_nmap(make_chunk: MakeChunk) -> None:
    """Small chunks with the same user, policy and ports share one nmap, of any job and attempt, in queue order."""
    chunks = [
        make_chunk(job_id=number, first_address=f"127.9.{number}.0", chunk_id=f"{number}-0", attempt=number)
        for number in (3, 1, 2)
    ]
    assert together(chunks, 1) == chunks
    assert together(chunks[:1], 1) == chunks[:1]
    assert together([make_chunk(first_address="127.9.1.4"), make_chunk()], 1) == [
        make_chunk(first_address="127.9.1.4"),
        make_chunk(),
    ]


@pytest.mark.parametrize(
    ("waiting", "free", "sizes"),
    [
        (18, 1, [18]),
        (18, 2, [9, 9]),
        (18, 16, [2, 2, *[1] * 14]),
        (5, 16, [1] * 5),
        (1, 1, [1]),
        (60, 2, [20, 20]),  # 0.25 s each: at most five seconds in one nmap
    ],
)
def test_together_compatible_chunks_are_split_evenly(
    make_chunk: MakeChunk, waiting: int, free: int, sizes: list[int]
) -> None:
    """Waiting chunks are split evenly, and no slot is idle while another has two chunks."""
    left = [make_chunk(first_address=f"127.9.{n}.0", chunk_id=f"1-{n}", estimate_seconds=0.25) for n in range(waiting)]
    taken = []
    for slots in range(free, 0, -1):
        if left:
            chosen = together(left, slots)
            taken.append(len(chosen))
            left = [chunk for chunk in left if chunk not in chosen]
    assert taken == sizes


def test_together_leaves_a_slot_for_another_kind(make_chunk: MakeChunk) -> None:
    """A chunk that is not compatible with those before it does not wait for them while a slot is free."""
    alike = [make_chunk(first_address=f"127.9.{number}.0", estimate_seconds=0.2) for number in range(6)]
    other = make_chunk(first_address="127.9.9.0", user_id=8)
    assert together([*alike, other], 2) == alike
    assert together([*alike, other], 3) == alike[:3]
    assert together([*alike, other], 1) == alike


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ({}, {"user_id": 8}),
        ({"timing": 3}, {}),
        ({"ports": "22,80,443"}, {"ports": "22,80"}),
        ({}, {"ports": "22"}),
        ({}, {"first_address": "::1", "outcomes": "."}),
        ({}, {"first_address": "127.9.1.3"}),
        ({}, {"first_address": "127.9.0.253"}),
        ({}, {"first_address": "127.9.1.0"}),
        ({}, {"failures": 1}),
        ({}, {"limit": 1}),
        ({}, {"max_rate": 100}),
        ({}, {"min_rate": 500}),
        ({}, {"estimate_seconds": 4.1}),
        ({}, {"outcomes": "." * 509}),
    ],
    ids=[
        "another user",
        "another policy",
        "another policy with the same part of its ports",
        "other ports",
        "another family",
        "an address twice, at its end",
        "an address twice, at its beginning",
        "the same addresses",
        "an attempt after a failure",
        "a limit",
        "another rate limit",
        "another rate floor",
        "too long",
        "too many addresses",
    ],
)
def test_together_different_chunks_do_not_share(
    make_chunk: MakeChunk, policy: dict[str, object], fields: dict[str, object]
) -> None:
    """Chunks that differ in a property that affects nmap or users do not share it, and a compatible chunk still joins."""
    first, alike = make_chunk(), make_chunk(first_address="127.9.7.0")
    other = make_chunk(policy, **{"first_address": "127.9.2.0"} | fields)
    assert together([first, other, alike], 1) == [first, alike]
    assert together([other, first], 1) == [other]


@pytest.mark.parametrize("field", ["failures", "limit"])
def test_together_failed_chunks_do_not_share(make_chunk: MakeChunk, field: str) -> None:
    """Chunks that failed or have a limit do not share an nmap with each other either."""
    again = [make_chunk(**{field: 1}), make_chunk(**{field: 1}, first_address="127.9.2.0")]
    assert together(again, 1) == again[:1]


def test_together_size_is_bounded(make_chunk: MakeChunk) -> None:
    """Chunks are combined up to the shortest planned duration, and a later smaller chunk that fits joins them."""
    chunks = [
        make_chunk(first_address=f"127.9.{number}.0", estimate_seconds=seconds)
        for number, seconds in enumerate([2.0, 2.0, 2.0, 1.0, 0.5])
    ]
    assert together(chunks, 1) == [chunks[0], chunks[1], chunks[3]]


@pytest.mark.parametrize(("ports", "joined"), [("1-1000", 2), ("1-51", 2), ("1-10", 10), ("1-2", 51)])
def test_together_addresses_are_bounded(make_chunk: MakeChunk, ports: str, joined: int) -> None:
    """With 20 addresses nmap still captures only their packets; more share an nmap only up to 1,024 probes."""
    chunks = [
        make_chunk({"ports": ports}, first_address=f"127.{net}.1.0", outcomes="." * 10, estimate_seconds=0.01)
        for net in range(100)
    ]
    assert len(together(chunks, 1)) == joined


def host(*, ports: int = 2, reasons: set[bytes] = frozenset({b"reset"}), up: bool = True, late: bool = False) -> Host:  # type: ignore[assignment] # a set as default would be shared
    return Host("127.9.1.0", up, late, ports, reasons, b"")


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (host(), Outcome.ANSWERED),
        (host(reasons={b"user-set", b"syn-ack", b"no-response"}), Outcome.ANSWERED),
        (host(reasons={b"echo-reply"}), Outcome.ANSWERED),
        (host(reasons={b"user-set", b"no-response"}), Outcome.SILENT),
        (host(reasons={b"user-set", b"host-unreach", b"net-unreach", b"time-exceeded"}), Outcome.SILENT),
        (host(up=False, ports=0), Outcome.DOWN),
        (host(late=True, ports=0), Outcome.TIMED_OUT),
        (host(ports=1), Outcome.BLANK),
        (host(ports=3), Outcome.BLANK),
    ],
)
def test_outcome_requires_all_ports(seen: Host, code: Outcome) -> None:
    """A host has an outcome only if it accounts for every port, is down, or timed out."""
    assert outcome(seen, 2) == code


def test_printable_unsafe_characters_are_escaped() -> None:
    """Control characters, direction marks and invalid characters are escaped, and nothing is dropped."""
    assert printable("a\x1b[31m\u202eb\x00\x85\ud800\ufeff") == r"a\x1b[31m\u202eb\x00\x85\ud800\ufeff"
    assert printable("<b>é 日本\nx", keep="\n") == "<b>é 日本\nx"
    assert printable("a\nb") == r"a\nb"


@given(st.text(alphabet=st.characters()))
def test_printable_any_text_is_valid_utf8(text: str) -> None:
    """The escaped form of any text is valid UTF-8 without control characters."""
    escaped = printable(text)
    escaped.encode()
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in escaped)


def scanned(ports: int, **texts: str) -> HostScanned:
    return HostScanned(
        job_id=1,
        chunk_id="1-0",
        attempt=1,
        worker_id="w",
        user_id=7,
        address="127.9.1.0",
        outcome="a",
        technique="syn",
        ports=tuple(
            PortFound(port=50_000 + number, protocol="udp", status="open|filtered", **texts) for number in range(ports)
        ),
    )


def size(message: HostScanned) -> int:
    return len(message.model_dump_json(exclude_defaults=True).encode())


def test_fit_drops_raw_data_before_banners() -> None:
    """A host that is too large loses its raw data, then its banners, and is marked as trimmed."""
    small = scanned(10, raw_data="<port/>", banner="hello")
    assert fit(small) is small
    without_raw = fit(scanned(100, raw_data="x" * 20_000, banner="hello"))
    assert without_raw.trimmed
    assert {(port.raw_data, port.banner) for port in without_raw.ports} == {("", "hello")}
    without_banner = fit(scanned(100, raw_data="x" * 20_000, banner="é" * 20_000, version="1.0"))
    assert {(port.raw_data, port.banner, port.version) for port in without_banner.ports} == {("", "", "1.0")}


def test_fit_drops_the_element_and_output_of_host_scripts_first() -> None:
    """A host that is too large loses nmap's element, then the output of its host scripts, and keeps its other details."""
    details = HostDetails(mac="52:54:00:12:34:56", scripts=(ScriptOutput(id="x", output="é" * 60_000),))
    longer = details.model_copy(update={"element": "x" * 60_000})
    without = fit(scanned(1, raw_data="x" * 870_000).model_copy(update={"details": longer}))
    assert (without.trimmed, without.details) == (True, details)
    kept = fit(scanned(1, raw_data="x" * 870_000).model_copy(update={"details": details}))
    assert kept.details == details
    trimmed = fit(scanned(1, raw_data="x" * 890_000).model_copy(update={"details": details}))
    assert trimmed.trimmed
    assert trimmed.details == HostDetails(mac="52:54:00:12:34:56")
    assert len(trimmed.ports[0].raw_data) == 890_000


def test_fit_keeps_all_ports() -> None:
    """8,192 open ports with all their texts fit into one message, with every port in it."""
    tarpit = fit(
        scanned(8_192, raw_data="x" * 500, banner="b" * 100, version="é" * 80, os_info="o" * 80, service="s" * 60)
    )
    assert len(tarpit.ports) == 8_192
    assert size(tarpit) <= MAX_BYTES


@pytest.mark.proves("A13", "G12")
@pytest.mark.parametrize(
    "field", [{"scripts": ["http-robots"]}, {"scripts": ["default"]}, {"technique": "sctp"}, {"discovery": "arp"}]
)
def test_arguments_disallowed_policy_fails_the_chunk(make_chunk: MakeChunk, field: dict[str, object]) -> None:
    """A stored policy that is no longer allowed fails the chunk without a command line, and the reason names the field."""
    chunk = make_chunk().model_copy(update={"policy": ScanPolicy.model_validate(field)})
    with pytest.raises(ScanError, match=next(iter(field))):
        line_of(chunk, list(networks(chunk.first_address, chunk.outcomes)), raw=True)


@pytest.mark.parametrize(
    ("policy", "detection"),
    [
        ({"service_detection": False}, ""),
        ({}, "sV7"),
        ({"service_detection": True, "version_intensity": 0, "os_detection": True}, "sV0/O"),
        ({"service_detection": False, "scripts": ("ssl-cert", "banner")}, "banner,ssl-cert"),
        ({"os_detection": True, "scripts": ("banner",)}, "sV7/O/banner"),
    ],
)
def test_detection_of_equal_policies_is_equal(policy: dict[str, Any], detection: str) -> None:
    """Scans are comparable if the same detection ran, in whatever order the policy names its scripts."""
    assert detection_of(ScanPolicy.model_validate(policy)) == detection
