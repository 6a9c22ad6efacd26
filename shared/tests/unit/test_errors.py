"""Errors determine the next step of the loop or the response."""

from __future__ import annotations

import pytest

from scanfleet import errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.BadRequestError, 400),
        (errors.UnauthorizedError, 401),
        (errors.ForbiddenError, 403),
        (errors.NotFoundError, 404),
        (errors.ConflictError, 409),
        (errors.TooLargeError, 413),
        (errors.UnavailableError, 503),
    ],
)
def test_public_error_has_its_status_and_message(error: type[errors.PublicError], status: int) -> None:
    """Each public error has one HTTP status and the caller's message."""
    answer = error("what is wrong")
    assert (answer.status, answer.message, str(answer)) == (status, "what is wrong", "what is wrong")


def test_public_error_has_retry_or_authentication_headers() -> None:
    """401 has WWW-Authenticate, and 429 and 503 have Retry-After."""
    too_many = errors.TooManyRequestsError("slowly", retry_after=5, rule=errors.Rule.RATE)
    assert (too_many.status, too_many.headers) == (429, {"Retry-After": "5"})
    assert errors.UnauthorizedError("no token").headers == {"WWW-Authenticate": "Bearer"}
    assert errors.UnavailableError("busy", retry_after=5).headers == {"Retry-After": "5"}
    assert errors.NotFoundError("no such job").headers == {}


def test_refusal_names_its_rule() -> None:
    """An error is a refusal if it names the violated rule; a missing token always does."""
    assert errors.UnauthorizedError("no token").rule is errors.Rule.TOKEN
    assert errors.ForbiddenError("not yours", rule=errors.Rule.OWNER).rule is errors.Rule.OWNER
    assert errors.NotFoundError("no such job").rule is None


def test_error_classes_are_disjoint() -> None:
    """No error is an answer, a message error and a dependency error at once; all have one base class."""
    ways = (errors.PublicError, errors.MessageError, errors.DependencyError)
    assert all(issubclass(way, errors.ScanfleetError) for way in ways)
    assert not any(issubclass(one, other) for one in ways for other in ways if one is not other)
