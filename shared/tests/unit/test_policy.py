"""The vocabulary of scan policies."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from scanfleet.scanning.policy import (
    ADMITTED_SCRIPTS,
    PRESETS,
    VERSION_SCRIPTS,
    PolicyError,
    Preset,
    ScanPolicy,
    executable,
    fill_in,
)


def test_presets_are_distinct_and_complete() -> None:
    """A preset needs no other value, and no two presets are equal."""
    policies = [fill_in(preset, {}) for preset in Preset]
    assert len({policy.model_dump_json(exclude={"preset"}) for policy in policies}) == len(Preset)
    assert all(PRESETS[preset].keys() == ScanPolicy.model_fields.keys() - {"preset"} for preset in Preset)


@pytest.mark.parametrize("preset", Preset)
def test_given_field_overrides_the_preset(preset: Preset) -> None:
    """A given field replaces the preset's value and leaves the others."""
    policy = fill_in(preset, {"ports": "22", "timing": 0})
    assert policy == fill_in(preset, {}).model_copy(update={"ports": "22", "timing": 0})


def test_policy_round_trips_through_json() -> None:
    """The JSON of a policy parses to an equal policy."""
    policy = fill_in(Preset.FULL, {"ports": "80,22,81", "max_rate": 100})
    assert policy.ports == "22,80-81"
    assert ScanPolicy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.proves("A2", "G12")
@pytest.mark.parametrize(
    "given",
    [
        {"ports": "22 -oN x"},
        {"ports": ""},
        {"ports": 22},
        {"ports": None},
        {"technique": "-sS"},
        {"technique": "udp"},
        {"discovery": "arp"},
        {"service_detection": "yes"},
        {"service_detection": 1},
        {"version_intensity": 10},
        {"version_intensity": -1},
        {"version_intensity": "7"},
        {"version_intensity": True},
        {"os_detection": None},
        {"scripts": "banner"},
        {"scripts": ["default"]},
        {"scripts": ["safe"]},
        {"scripts": ["vuln"]},
        {"scripts": ["http-grep"]},
        {"scripts": ["default,vuln"]},
        {"scripts": ["default or vuln"]},
        {"scripts": ["./x.nse"]},
        {"scripts": ["http-*"]},
        {"scripts": ["banner"] * 100_000},
        {"timing": 6},
        {"timing": 2.0},
        {"max_rate": 0},
        {"max_rate": 1.5},
        {"max_rate": 10**30},
        {"max_retries": 11},
        {"host_timeout": 0},
        {"host_timeout": "10; id"},
        {"arguments": "-oN x"},
        {"user_id": 1},
        {"$set": {"timing": 5}},
    ],
)
def test_policy_with_an_unknown_value_is_refused(given: dict[str, Any]) -> None:
    """A value of another type, range or word, and any other field, is invalid."""
    with pytest.raises(PolicyError):
        fill_in(Preset.STANDARD, given)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({}, False),
        ({"technique": "connect"}, False),
        ({"technique": "syn"}, True),
        ({"os_detection": True}, True),
        ({"ports": "U:53"}, True),
        ({"ports": "T:1-65535"}, False),
    ],
)
def test_needs_raw_is_true_for_syn_os_detection_and_udp(given: dict[str, Any], *, needed: bool) -> None:
    """SYN by name, OS detection and UDP need raw packets; other policies do not."""
    assert fill_in(Preset.STANDARD, given).needs_raw is needed


def test_scripts_that_users_are_promised_are_admitted() -> None:
    """The API names these at least."""
    promised = {"banner", "http-title", "ssl-cert", "ssh-hostkey", "smb-os-discovery", "snmp-info"}
    assert promised | VERSION_SCRIPTS <= ADMITTED_SCRIPTS


def test_script_must_be_allowed_by_the_operator() -> None:
    """A longer list allows its names, and any other script is refused with the allowed names."""
    policy = fill_in(Preset.QUICK, {"scripts": ["http-grep"]}, {"http-grep"})
    assert executable(policy, {"http-grep"}).scripts == ("http-grep",)
    with pytest.raises(PolicyError, match=r"scripts\.0: http-grep is not one of the allowed scripts: banner, dns-nsid"):
        executable(policy)


OTHERS = {
    "preset": "gentle",
    "technique": "sctp",
    "discovery": "arp",
    "scripts": ["http-robots"],
    "max_rate": 2_000_000_000,
    "min_rate": 20_000_000,
    "max_rtt_timeout": 60_000,
    "max_retries": 50,
    "host_timeout": 1_000_000,
}
"""Values that another release may allow and this one does not."""


@pytest.mark.parametrize("name", OTHERS)
def test_stored_policy_of_another_release_is_read_but_not_executed(name: str) -> None:
    """A value that only another release allows is read and written unchanged, but not executed."""
    policy = ScanPolicy.model_validate({name: OTHERS[name]})
    assert policy.model_dump(mode="json")[name] == OTHERS[name]
    with pytest.raises(PolicyError, match=name):
        executable(policy)


def test_stored_policy_with_missing_or_unknown_fields_is_read() -> None:
    """A missing field has its default and an unknown one is ignored; the other fields are kept."""
    assert ScanPolicy.model_validate({}) == fill_in(Preset.STANDARD, {})
    assert ScanPolicy.model_validate({"timing": 1, "colour": {"deep": [1]}}).timing == 1


@pytest.mark.proves("A2", "G12")
@pytest.mark.parametrize(
    "forged",
    [
        {"scripts": ["a,b"]},
        {"scripts": ["./x.nse"]},
        {"scripts": ["http-*"]},
        {"scripts": ["banner"] * 65},
        {"scripts": ["b" * 65]},
        {"technique": "-sS"},
        {"preset": "quick --script"},
        {"discovery": ""},
        {"max_rate": 2**31},
        {"max_rate": -1},
        {"host_timeout": "10; id"},
        {"ports": "22 -oN x"},
        {"timing": 6},
    ],
)
def test_stored_policy_fields_are_bounded(forged: dict[str, Any]) -> None:
    """Words, numbers and lists of a stored policy are bounded, whichever release wrote them."""
    with pytest.raises(ValidationError):
        ScanPolicy.model_validate(forged)


def test_policy_with_min_rate_above_max_rate_is_not_executable() -> None:
    """A policy with min_rate above max_rate is read but not executed."""
    policy = ScanPolicy.model_validate({"min_rate": 200, "max_rate": 100})
    with pytest.raises(PolicyError, match="above max_rate"):
        executable(policy)
