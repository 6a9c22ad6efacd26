"""Errors of the SDK and of the command, and the exit code of each."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """Exit codes of the command."""

    DONE = 0
    FAULT = 1
    REFUSED = 2
    JOB_FAILED = 3
    NOT_ALLOWED = 4
    NOT_FOUND = 5
    UNAVAILABLE = 6
    JOB_CANCELLED = 7
    MATCHED = 8
    TIMED_OUT = 124
    INTERRUPTED = 130


MEANINGS: Final[dict[Exit, str]] = {
    Exit.DONE: "done",
    Exit.FAULT: "fault of the service or of the command",
    Exit.REFUSED: "wrong usage, or the service refused the request",
    Exit.JOB_FAILED: "the job failed: some addresses were not probed",
    Exit.NOT_ALLOWED: "not signed in, token refused, or forbidden",
    Exit.NOT_FOUND: "the object does not exist, or is not yours",
    Exit.UNAVAILABLE: "the service is unavailable or busy after retries; safe to repeat",
    Exit.JOB_CANCELLED: "the job was cancelled",
    Exit.MATCHED: "--fail-on matched",
    Exit.TIMED_OUT: "--timeout ran out; the job continues",
    Exit.INTERRUPTED: "interrupted; the job continues",
}

_BY_STATUS: Final = {
    401: Exit.NOT_ALLOWED,
    403: Exit.NOT_ALLOWED,
    404: Exit.NOT_FOUND,
    429: Exit.UNAVAILABLE,
    502: Exit.UNAVAILABLE,
    503: Exit.UNAVAILABLE,
    504: Exit.UNAVAILABLE,
}
_UNSAFE: Final = "the request may have been carried out: check before you repeat it"
_NOT_FOUND: Final = re.compile(r"\b(Job|Policy|Subnet)\b.* not found")
_TARGET_RULES: Final = {
    "is not within the networks that this platform allows": "ask the operator who sets SCANFLEET_ALLOWED_NETWORKS",
    "which this platform denies": "ask the operator who sets SCANFLEET_DENIED_NETWORKS",
    "a subnet has at most": "register smaller networks, or ask the operator who sets SCANFLEET_MAX_ADDRESSES",
}
"""Hints for refusals by target rules, by a part of their text; networks that are never scanned have no setting."""

_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500


class ScanfleetError(Exception):
    """Base class of the errors of the SDK and of the command."""


class ApiError(ScanfleetError):
    """The service returned an error.

    Args:
        status: HTTP status.
        message: error message of the service.
        request_id: id of the request in the logs of the service; may be empty.
        unsure: the outcome of an attempt is unknown; the service may have carried it out.
        repeatable: repeating the call is safe regardless.
    """

    def __init__(
        self, status: int, message: str, request_id: str = "", *, unsure: bool = False, repeatable: bool = True
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.request_id = request_id
        self.unsure = unsure
        self.repeatable = repeatable


class UnavailableError(ScanfleetError):
    """The service is unreachable, or the connection was cut.

    Args:
        message: what failed, with the URL and the cause.
        unsure: the outcome of an attempt is unknown; the service may have carried it out.
        repeatable: repeating the call is safe regardless.
        reached: a connection was established.
    """

    def __init__(self, message: str, *, unsure: bool = False, repeatable: bool = True, reached: bool = True) -> None:
        super().__init__(message)
        self.unsure = unsure
        self.repeatable = repeatable
        self.reached = reached


class CommandError(ScanfleetError):
    """The command ends with an error message and an exit code.

    Args:
        message: what failed.
        code: exit code.
        hint: what to do next; may be empty.
        status: HTTP status of the response that is the cause; None without one.
        request_id: of that response; may be empty.
    """

    def __init__(
        self,
        message: str,
        code: Exit = Exit.REFUSED,
        *,
        hint: str = "",
        status: int | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.status = status
        self.request_id = request_id


def explain(error: ScanfleetError) -> CommandError:
    """Return the error with which the command ends."""
    if isinstance(error, CommandError):
        return error
    unsafe = isinstance(error, ApiError | UnavailableError) and error.unsure and not error.repeatable
    if isinstance(error, ApiError):
        return CommandError(
            error.message,
            Exit.FAULT if unsafe else _code(error.status),
            hint=_UNSAFE if unsafe else _hint(error.status, error.message),
            status=error.status,
            request_id=error.request_id,
        )
    if unsafe:
        return CommandError(str(error), Exit.FAULT, hint=_UNSAFE)
    return CommandError(str(error), Exit.UNAVAILABLE, hint="scanfleet doctor")


def _code(status: int) -> Exit:
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return Exit.REFUSED if _CLIENT_ERROR <= status < _SERVER_ERROR else Exit.FAULT


def _hint(status: int, message: str) -> str:
    match status:
        case 400 | 404:
            return hint_of_refusal(message)
        case 401:
            return "sign in with `scanfleet login`; `scanfleet whoami` shows the source of the token"
        case 403:
            return "scanfleet whoami"
        case 429 | 503:
            return "repeat the command later; `scanfleet limits` shows the limits and their current use"
        case 500:
            return "report the request id to the operator of the service"
    return ""


def hint_of_refusal(message: str) -> str:
    """Return what to do about a refused request; may be empty."""
    for rule, hint in _TARGET_RULES.items():
        if rule in message:
            return hint
    missing = _NOT_FOUND.search(message)
    return f"it does not exist, or is not yours: scanfleet {missing[1].lower()} list" if missing else ""
