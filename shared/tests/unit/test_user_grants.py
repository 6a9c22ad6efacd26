"""User grants: a scan may begin only within the limits for every user and one complete grant of its user."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from scanfleet.contracts.user_grants import Admitted, GrantError, Limits, UserGrants, Window
from scanfleet.runtime.settings import GrantSettings
from scanfleet.scanning.policy import Preset, ScanPolicy, fill_in

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
INSIDE = IPv4Network("10.1.2.0/24")

FILE = """
[everyone]
max_rate = 5000
max_timing = 4

[[grants]]
name = "site"
users = [7]
networks = ["10.1.0.0/16", "2001:db8::/32"]
max_rate = 1000
max_timing = 3
scripts = ["banner", "http-title"]

[[grants]]
name = "night"
roles = ["night-shift"]
hours = ["22:00-06:00"]
"""
GRANTS = UserGrants.parse(FILE)


def policy(**changed: object) -> ScanPolicy:
    return fill_in(Preset.STANDARD, dict(changed))


def admit(
    policy: ScanPolicy, *, user_id: int = 7, roles: tuple[str, ...] = (), network: str = "10.1.2.0/24"
) -> Admitted:
    return GRANTS.admit(user_id, frozenset(roles), ip_network(network), policy, now=NOON)


def test_admit_scan_within_a_grant_names_it_and_gets_its_rate() -> None:
    """A policy without a limit gets the lowest one that applies; a policy with a lower limit does not change."""
    admitted = admit(policy(scripts=("banner",)))
    assert (admitted.grant, admitted.policy.max_rate) == ("site", 1_000)
    assert admit(policy(max_rate=10)).policy.max_rate == 10


@pytest.mark.parametrize(
    ("asked", "network", "sentence"),
    [
        ({}, "10.2.0.0/24", "10.2.0.0/24 is not within the networks of grant site: 10.1.0.0/16, 2001:db8::/32"),
        ({}, "10.0.0.0/15", "10.0.0.0/15 is not within the networks of grant site: 10.1.0.0/16, 2001:db8::/32"),
        ({"max_rate": 2_000}, "10.1.2.0/24", "max_rate 2000 is above 1000 probes a second, the most of grant site"),
        ({"max_rate": 6_000}, "10.1.2.0/24", "max_rate 6000 is above 5000 probes a second, the most for every user"),
        ({"min_rate": 1_001}, "10.1.2.0/24", "min_rate 1001 is above 1000 probes a second, the most of grant site"),
        ({"timing": 4}, "10.1.2.0/24", "timing 4 is above 3, the highest of grant site"),
        ({"timing": 5}, "10.1.2.0/24", "timing 5 is above 4, the highest for every user"),
        (
            {"scripts": ("ssl-cert", "banner")},
            "10.1.2.0/24",
            "scripts ssl-cert are not among those of grant site: banner, http-title",
        ),
    ],
)
def test_admit_scan_beyond_a_limit_names_grant_and_limit(asked: dict[str, object], network: str, sentence: str) -> None:
    """The refusal has the requested value, the limit, and the grant that sets it."""
    with pytest.raises(GrantError, match=f"^{sentence}$"):
        admit(policy(**asked), network=network)


def test_admit_user_without_a_grant_is_refused() -> None:
    """A user whom no grant covers by id, by role or as every user may scan nothing."""
    with pytest.raises(GrantError, match=r"^user 8 has no grant to scan$"):
        admit(policy(), user_id=8, roles=("day-shift",))


def test_admit_outside_the_hours_names_them() -> None:
    """A role's grant is for its hours alone."""
    with pytest.raises(GrantError, match=r"^it is 12:00 UTC, and the hours of grant night are 22:00-06:00$"):
        admit(policy(), user_id=8, roles=("night-shift",))
    night = NOON.replace(hour=23)
    assert GRANTS.admit(8, frozenset({"night-shift"}), INSIDE, policy(), now=night).grant == "night"


def test_admit_tries_every_grant_of_the_caller() -> None:
    """A scan that the first grant refuses may be allowed by another; if none allows it, each has its reason."""
    night = NOON.replace(hour=23)
    roles = frozenset({"night-shift"})
    assert GRANTS.admit(7, roles, INSIDE, policy(timing=4), now=night).grant == "night"
    with pytest.raises(GrantError, match=r"^timing 4 .* of grant site; it is 12:00 UTC.* of grant night are"):
        GRANTS.admit(7, roles, INSIDE, policy(timing=4), now=NOON)


def test_grant_without_users_and_roles_is_for_every_user() -> None:
    """A default grant, so that a file may have only limits for all users."""
    grants = UserGrants.parse('[everyone]\nscripts = []\n[[grants]]\nname = "all"')
    assert grants.admit(99, frozenset(), INSIDE, policy(), now=NOON).grant == "all"
    with pytest.raises(GrantError, match=r"^scripts banner are not among those for every user: none$"):
        grants.admit(99, frozenset(), INSIDE, policy(scripts=("banner",)), now=NOON)


def test_refusal_of_a_job_whose_grant_has_changed() -> None:
    """A job goes on under the grant that it names, if that is still there, still its user's, and still allows it."""
    capped = policy(max_rate=1_000)
    assert GRANTS.refusal("site", 7, INSIDE, capped) is None
    assert GRANTS.refusal("night", 8, INSIDE, capped) is None  # by a role that cannot be seen any more
    assert GRANTS.refusal("site", 8, INSIDE, capped) == "user 8 has no grant site to scan"
    assert GRANTS.refusal("gone", 7, INSIDE, capped) == "user 7 has no grant gone to scan"
    assert "not within" in str(GRANTS.refusal("site", 7, IPv4Network("10.9.0.0/24"), capped))


def test_refusal_of_a_job_from_before_there_were_grants() -> None:
    """It names none: any grant of its user that needs no role counts, and it must have a rate where there is a limit."""
    assert GRANTS.refusal("", 7, INSIDE, policy(max_rate=1_000)) is None
    assert "max_rate without a limit" in str(GRANTS.refusal("", 7, INSIDE, policy()))
    assert GRANTS.refusal("", 8, INSIDE, policy(max_rate=1)) == "user 8 has no grant to scan"


@pytest.mark.proves("A3")
@pytest.mark.parametrize("network", ["::ffff:10.2.0.0/120", "64:ff9b::a02:0/120", "2001:db8:64::a02:0/120"])
def test_refusal_of_ipv6_that_leads_outside_the_networks(network: str) -> None:
    """A grant for the IPv6 network is none for the IPv4 addresses that it leads to."""
    limits = Limits.model_validate({"networks": ["::/0", "10.1.0.0/16"]})
    nat64 = (IPv6Network("2001:db8:64::/96"),)
    assert limits.refusal(ip_network(network), policy(), nat64)
    assert limits.refusal(ip_network(network.replace("a02", "a01").replace("10.2", "10.1")), policy(), nat64) is None


times = st.timedeltas(timedelta(), timedelta(days=1) - timedelta(microseconds=1))
clocks = st.times().map(lambda time: f"{time:%H:%M}")


@given(begin=clocks, end=clocks, after=times)
def test_window_left_agrees_with_a_walk_over_the_day(begin: str, end: str, after: timedelta) -> None:
    """It is open from its begin until its end, over midnight too, and `left` leads to the end exactly."""
    if begin == end:
        with pytest.raises(ValueError, match="is empty"):
            Window.parse(f"{begin}-{end}")
        return
    now = NOON.replace(hour=0) + after
    clock = f"{now:%H:%M:%S.%f}"
    inside = begin <= clock < end if begin < end else clock >= begin or clock < end
    left = Window.parse(f"{begin}-{end}").left(now)
    assert bool(left) is inside
    if inside:
        assert f"{now + left:%H:%M:%S.%f}" == f"{end}:00.000000"


@pytest.mark.parametrize(
    "text", ["22-06", "24:00-06:00", "1:00-2:00", "22:60-23:00", "22:00..06:00", "", "00:00-24:00 "]
)
def test_window_in_any_other_spelling_is_refused(text: str) -> None:
    """Hours in any other format are rejected."""
    with pytest.raises(ValueError, match="is not a window"):
        Window.parse(text)


def test_hours_that_touch_go_on() -> None:
    """The end of one window is no end where another begins, and windows that fill the day have none."""
    limits = Limits.model_validate({"hours": ["22:00-24:00", "00:00-06:00"]})
    assert limits.open_for(NOON.replace(hour=23)) == timedelta(hours=7)
    assert Limits.model_validate({"hours": ["00:00-24:00"]}).open_for(NOON) is None


def test_opens_at_is_when_every_limit_is_open() -> None:
    """The next begin at which neither everyone's hours nor the grant's are closed."""
    text = '[everyone]\nhours = ["20:00-23:00"]\n[[grants]]\nname = "a"\nhours = ["22:00-06:00"]'
    grants = UserGrants.parse(text)
    assert grants.opens_at("a", 7, NOON) == NOON.replace(hour=22)
    assert grants.open_for("a", 7, NOON.replace(hour=22, minute=30)) == timedelta(minutes=30)
    assert grants.open_for("a", 7, NOON) == timedelta()
    never = UserGrants.parse(text.replace("22:00-06:00", "01:00-02:00"))
    assert never.opens_at("a", 7, NOON) is None


networks = st.builds(
    lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
    st.integers(10 << 24, (11 << 24) - 1),
    st.integers(8, 32),
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "networks": st.lists(networks.map(str), max_size=3),
        "max_rate": st.integers(1, 20),
        "max_timing": st.integers(0, 5),
        "scripts": st.lists(st.sampled_from(["banner", "http-title", "ssl-cert"]), max_size=3),
        "hours": st.lists(st.sampled_from(["00:00-12:00", "12:00-24:00", "22:00-06:00"]), min_size=1, max_size=2),
    },
)


@given(
    everyone=limits,
    each=st.lists(limits | st.just({}), min_size=1, max_size=3),
    named=st.lists(st.sampled_from([{"users": [7]}, {"users": [8]}, {"roles": ["r"]}, {}]), min_size=3, max_size=3),
    roles=st.sampled_from([frozenset(), frozenset({"r"})]),
    network=networks,
    asked=st.fixed_dictionaries(
        {"timing": st.integers(0, 5), "scripts": st.lists(st.sampled_from(["banner", "ssl-cert"]), unique=True)},
        optional={"max_rate": st.integers(1, 20)},
    ),
    hour=st.integers(0, 23),
)
def test_admit_never_exceeds_a_limit(
    *,
    everyone: dict[str, object],
    each: list[dict[str, object]],
    named: list[dict[str, object]],
    roles: frozenset[str],
    network: IPv4Network,
    asked: dict[str, object],
    hour: int,
) -> None:
    """An admitted scan is within the limits for all and within one grant of the caller; a refused one within none."""
    now = NOON.replace(hour=hour)
    grants = UserGrants.model_validate(
        {
            "everyone": everyone,
            "grants": [one | who | {"name": f"g{n}"} for n, (one, who) in enumerate(zip(each, named, strict=False))],
        }
    )
    given_policy = policy(**asked)
    try:
        admitted = grants.admit(7, roles, network, given_policy, now=now)
    except GrantError:
        admitted = None

    def keeps(limit: Limits) -> bool:
        hours = [window.text for window in limit.hours] if limit.hours else ["00:00-24:00"]
        spans = {"00:00-12:00": range(12), "12:00-24:00": range(12, 24), "22:00-06:00": (*range(22, 24), *range(6))}
        return (
            (
                limit.networks is None
                or _covered(network, [net for net in limit.networks if isinstance(net, IPv4Network)])
            )
            and (limit.max_rate is None or (given_policy.max_rate or 0) <= limit.max_rate)
            and (limit.max_timing is None or given_policy.timing <= limit.max_timing)
            and (limit.scripts is None or set(given_policy.scripts) <= set(limit.scripts))
            and any(hour in spans.get(text, range(24)) for text in hours)
        )

    own = [g for g in grants.grants if not (g.users or g.roles) or 7 in g.users or roles & set(g.roles)]
    keeping = [g for g in own if keeps(g) and keeps(grants.everyone)]
    assert (admitted.grant if admitted else None) == (keeping[0].name if keeping else None)
    if admitted:
        most = [limit.max_rate for limit in (grants.everyone, keeping[0]) if limit.max_rate is not None]
        assert all(admitted.policy.max_rate is not None and admitted.policy.max_rate <= rate for rate in most)
        assert grants.refusal(admitted.grant, 7, network, admitted.policy) is None


def _covered(network: IPv4Network, allowed: list[IPv4Network]) -> bool:
    """By another way than the code's: each end of each allowed network splits the one in question."""
    pieces = {network}
    for split in allowed:
        pieces = {
            part
            for piece in pieces
            for part in (
                [*piece.address_exclude(split), split] if split != piece and split.subnet_of(piece) else [piece]
            )
        }
    return all(any(piece.subnet_of(net) for net in allowed) for piece in pieces)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[everyone]\nmax_rate = 5",
        "grants = []",
        "[[grants]]\nusers = [7]",
        '[[grants]]\nname = "a"\nuser = [7]',
        '[[grants]]\nname = "a"\nusers = ["7"]',
        '[[grants]]\nname = "a"\nusers = [0]',
        '[[grants]]\nname = "a"\nroles = [""]',
        '[[grants]]\nname = "a b"',
        '[[grants]]\nname = "a"\n[[grants]]\nname = "a"',
        '[[grants]]\nname = "a"\nnetworks = ["10.1.2.3/8"]',
        '[[grants]]\nname = "a"\nnetworks = "10.0.0.0/8"',
        '[[grants]]\nname = "a"\nmax_rate = 0',
        '[[grants]]\nname = "a"\nmax_rate = 1.5',
        '[[grants]]\nname = "a"\nmax_timing = 6',
        '[[grants]]\nname = "a"\nscripts = ["default,vuln"]',
        '[[grants]]\nname = "a"\nhours = []',
        '[[grants]]\nname = "a"\nhours = ["9-17"]',
        "not toml",
        "\x00",
    ],
)
def test_grants_file_that_is_wrong_stops_the_start(tmp_path: Path, text: str) -> None:
    """An invalid file of grants is refused by name: an error never disables the limits."""
    file = tmp_path / "grants.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"grants.toml"):
        _ = GrantSettings(grants_file=file).user_grants


def test_grants_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    """A file that is not there, or no file, is an error; no setting is no limit."""
    for file in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(OSError, match=str(file)):
            _ = GrantSettings(grants_file=file).user_grants
    assert GrantSettings().user_grants is None


def test_grants_are_bounded() -> None:
    """So many roles and grants that a command could not carry them are refused."""
    many = [{"name": f"g{n}", "roles": [f"r{n}", f"s{n}"]} for n, _ in enumerate(product(range(10), range(51)))]
    with pytest.raises(ValidationError, match="1020 roles"):
        UserGrants.model_validate({"grants": many})
