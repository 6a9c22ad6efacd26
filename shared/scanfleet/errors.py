"""The error root: the class of an error determines how it is handled.

A `PublicError` is an answer to the caller and carries its HTTP status. A `MessageError` is a defect of the message: the
bus runtime dead-letters it. A `DependencyError` means that a dependency is temporarily unavailable: the bus runtime
retries in place without committing, and HTTP answers 503.
"""

from __future__ import annotations

from enum import StrEnum


class Rule(StrEnum):
    """The rule by which a request or message was refused, as named in the audit log."""

    TOKEN = "token"  # noqa: S105 # the name of a rule, not a secret
    OWNER = "owner"
    ROLE = "role"
    REQUEST = "request"
    TARGETS = "targets"
    GRANT = "grant"
    STATE = "state"
    RATE = "rate"
    CONCURRENCY = "concurrency"
    QUOTA = "quota"
    MESSAGE = "message"
    SIGNATURE = "signature"
    FLOOD = "flood"


class ScanfleetError(Exception):
    """Base class of every error that Scanfleet raises deliberately."""


class PublicError(ScanfleetError):
    """An error response to the caller, rendered as `{"error": message}` with `status`."""

    status = 500
    rule: Rule | None = None
    """The violated rule; an error with a rule is a refusal and gets an audit entry."""

    def __init__(
        self,
        message: str,
        *,
        headers: dict[str, str] | None = None,
        rule: Rule | None = None,
        target: str = "",
        reason: str = "",
    ) -> None:
        """Create the answer.

        Args:
            message: text for the caller.
            headers: additional headers of the answer.
            rule: the violated rule, if it is not the default of this class.
            target: the requested object, if the path does not name it.
            reason: details for the audit log; not shown to the caller.
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
    """The token is missing or invalid; the answer always has WWW-Authenticate (RFC 6750)."""

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
    """The object has changed since the caller read it."""

    status = 412
    rule = Rule.STATE


class TooManyRequestsError(PublicError):
    """The caller exceeds a rate or concurrency limit and may retry after `retry_after` seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: int = 1, rule: Rule) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)}, rule=rule)


class UnavailableError(PublicError):
    """A dependency is unavailable; the caller may retry after `retry_after` seconds."""

    status = 503

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class MessageError(ScanfleetError):
    """The message is invalid, so that a retry cannot succeed; the bus runtime dead-letters it."""


class DependencyError(ScanfleetError):
    """A dependency is unavailable or slow: retry in place without committing; the service is unready meanwhile."""


class ConfigurationError(DependencyError):
    """A setting is wrong: retries cannot succeed until an operator corrects it, so `/readyz` names the problem."""
