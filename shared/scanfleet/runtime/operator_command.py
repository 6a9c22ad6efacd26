"""Operators' commands: their entry point, which prints the result or the reason for the failure, and their audit entries."""

from __future__ import annotations

import asyncio
import os
import pwd
import sys
from collections.abc import Coroutine
from typing import Any
from uuid import uuid4

import structlog

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.audit import MAX_REASON_CHARS
from scanfleet.errors import DependencyError


def log_to_stderr() -> None:
    """Log JSON lines on standard error: standard output carries the command's result."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def run(work: Coroutine[Any, Any, str]) -> int:
    """Run `work` and print its result on standard output, or the unavailable dependency on standard error.

    Returns:
        The exit code: 1 when a dependency was unavailable and the command may be run again.
    """
    log_to_stderr()
    try:
        result = asyncio.run(work)
    except DependencyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(result)
    return 0


def command_entry(service: str, action: str, target: str, *, refused: str = "") -> AuditEntry:
    """Return the audit entry of an operator's command.

    Args:
        service: the service of the command.
        action: the name of the operation.
        target: the object of the operation.
        refused: the reason for a refusal; empty if the command is executed.
    """
    uid = os.getuid()  # not the name in the environment, which the operator can set
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:  # an id without a name, as in a container
        user = str(uid)
    return AuditEntry(
        id=uuid4().hex,
        time=utc_now(),
        service=service,
        subject="",
        source=f"command line, system user {user}"[:200],
        action=action,
        target=target,
        decision="refused" if refused else "allowed",
        rule="operator",
        reason=refused[:MAX_REASON_CHARS],
        request_id="",
    )
