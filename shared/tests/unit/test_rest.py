"""Refusals of the bodies of the public API."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from scanfleet.contracts.rest import (
    BODY_LIMITS,
    MAX_BODY_BYTES,
    MAX_EXCLUDES,
    CreateJobs,
    EstimateBody,
    PolicyBody,
    PolicyValues,
    RevocationBody,
    SubnetBody,
)

BODY = {"subnet_ids": [1], "policy_id": 1}


def test_unknown_fields_are_refused_before_anything_is_validated() -> None:
    """A body with unknown fields has one error, which names the first five of them, and none about the others."""
    with pytest.raises(ValidationError) as caught:
        CreateJobs.model_validate({f"x{number}": 1 for number in range(1, 8)} | {"policy_id": "wrong"})
    (error,) = caught.value.errors()
    assert error["msg"] == "unknown fields: x1, x2, x3, x4, x5 and 2 more"


@pytest.mark.proves("A20")
@pytest.mark.parametrize("name", ["\ud800", "\u202e" * 10, "\x1b[2J", "x" * 100_000])
def test_unknown_field_is_named_in_short_ascii(name: str) -> None:
    """The name of an unknown field is escaped and cut in the error."""
    with pytest.raises(ValidationError) as caught:
        SubnetBody.model_validate({name: 1})
    text = str(caught.value.errors()[0]["msg"])
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.proves("A20")
def test_unknown_fields_cost_no_more_than_a_look_at_each() -> None:
    """100,000 unknown fields are refused in a small part of a second of CPU time, not validated one by one."""
    fields = {str(number): 0 for number in range(100_000)}
    started = time.process_time()
    for body in (CreateJobs, PolicyBody, SubnetBody):
        with pytest.raises(ValidationError):
            body.model_validate(fields)
    assert time.process_time() - started < 0.5


@pytest.mark.proves("A5")
def test_subnet_with_too_many_excludes_is_refused() -> None:
    """A subnet takes the limit of excludes, and not one more."""
    body = {"name": "x", "cidr": "10.0.0.0/16", "exclude": ["10.0.0.1"] * MAX_EXCLUDES}
    SubnetBody.model_validate(body)
    with pytest.raises(ValidationError, match=f"at most {MAX_EXCLUDES} items"):
        SubnetBody.model_validate(body | {"exclude": ["10.0.0.1"] * (MAX_EXCLUDES + 1)})


@pytest.mark.parametrize(
    "value", [1_767_225_600, 1_767_225_600.5, True, "1767225600", b"2026-01-01T00:00:00Z", "2026-01-01"]
)
def test_input_time_that_is_not_rfc3339_is_refused(value: object) -> None:
    """A number, which pydantic reads as seconds since 1970, is not the documented form of a time."""
    with pytest.raises(ValidationError, match="a time as in RFC 3339 is expected"):
        RevocationBody.model_validate({"user_id": 7, "issued_before": value})


@pytest.mark.parametrize("value", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"])
def test_input_time_outside_the_calendar_is_refused(value: str) -> None:
    """A time whose UTC lies outside the years 1 to 9999 could not be compared with stored times."""
    with pytest.raises(ValidationError, match="the time is out of range"):
        RevocationBody.model_validate({"user_id": 7, "issued_before": value})


def test_input_time_in_rfc3339_or_as_a_datetime_is_accepted() -> None:
    """A request has text; our own code has a datetime."""
    time_ = datetime(2026, 1, 1, tzinfo=UTC)
    for value in (time_, "2026-01-01T00:00:00Z", "2026-01-01t01:00:00+01:00"):
        assert RevocationBody.model_validate({"user_id": 7, "issued_before": value}).issued_before == time_


def test_largest_bodies_fit() -> None:
    """The largest body that each collection accepts is within its limit of bytes."""
    task = CreateJobs(subnet_ids=list(range(2**53 - 1_000, 2**53)), policy_id=2**53 - 1)
    assert len(task.model_dump_json()) < BODY_LIMITS["/api/v1/task"]
    name = "\U0001f600" * 200
    network = "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255/128"
    subnet = SubnetBody(name=name, cidr=network, exclude=[network] * MAX_EXCLUDES)
    assert len(subnet.model_dump_json(ensure_ascii=True)) < BODY_LIMITS["/api/v1/subnet"]
    ports = ",".join(["1"] * 5_000)
    assert len(PolicyBody(name=name, ports=ports).model_dump_json(ensure_ascii=True)) < MAX_BODY_BYTES
    values = PolicyValues(ports=ports, scripts=("x" * 64,) * 64)
    estimate = EstimateBody(cidr=network, exclude=subnet.exclude, policy=values)
    assert len(estimate.model_dump_json()) < BODY_LIMITS["/api/v1/task/estimate"]
