"""The error root: an error says what must happen next.

A `PublicError` is an answer for the caller and carries its HTTP status. A `MessageError` is the message's own fault: the
bus runtime sends the message to the dead-letter topic. A `DependencyError` is a bad day of something that we stand on:
the bus runtime retries in place without committing, and HTTP answers 503.
"""

from __future__ import annotations

from enum import StrEnum


class Rule(StrEnum):
    """Why something was refused, in the words of the audit log."""

    TOKEN = "token"  # noqa: S105 # a rule's name: there is no token, or not a good one
    OWNER = "owner"
    ROLE = "role"
    REQUEST = "request"
    TARGETS = "targets"
    STATE = "state"
    RATE = "rate"
    CONCURRENCY = "concurrency"
    MESSAGE = "message"
    SIGNATURE = "signature"


class ScanfleetError(Exception):
    """Root of every error that Scanfleet raises on purpose."""


class PublicError(ScanfleetError):
    """An answer to the caller: rendered as `{"error": message}` with `status`."""

    status = 500
    rule: Rule | None = None
    """What was broken; an error with a rule is a refusal, and the audit log tells of it."""

    def __init__(
        self,
        message: str,
        *,
        headers: dict[str, str] | None = None,
        rule: Rule | None = None,
        target: str = "",
        reason: str = "",
    ) -> None:
        """Tell the caller `message`.

        Args:
            message: what the caller reads.
            headers: that go with the answer.
            rule: what was broken, when it is not what this kind of error says by itself.
            target: what was asked for, when the path does not say it.
            reason: what the audit log says beyond the rule; the caller does not read it.
        """
        super().__init__(message)
        self.message = message
        self.headers = headers or {}
        self.rule = rule or self.rule
        self.target = target
        self.reason = reason


class BadRequestError(PublicError):
    status = 400
    rule = Rule.REQUEST


class UnauthorizedError(PublicError):
    """A missing or bad token; always says how to authenticate (RFC 6750)."""

    status = 401
    rule = Rule.TOKEN

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"}, reason=reason)


class ForbiddenError(PublicError):
    status = 403
    rule = Rule.OWNER


class NotFoundError(PublicError):
    status = 404


class ConflictError(PublicError):
    status = 409
    rule = Rule.STATE


class TooLargeError(PublicError):
    status = 413


class PreconditionFailedError(PublicError):
    """The thing has changed since the caller read it."""

    status = 412


class TooManyRequestsError(PublicError):
    """The caller asks more than their share; they may go on after `retry_after` seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: int = 1, rule: Rule) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)}, rule=rule)


class UnavailableError(PublicError):
    """Something we need is away; the caller may repeat after `retry_after` seconds."""

    status = 503

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class MessageError(ScanfleetError):
    """This message can never be handled: dead-letter it and go on."""


class DependencyError(ScanfleetError):
    """A dependency is away or slow: retry in place, commit nothing, be unready."""


class ConfigurationError(DependencyError):
    """A setting is wrong: retries do not help until an operator corrects it, so `/readyz` says what is wrong."""
