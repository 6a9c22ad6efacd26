"""Waiting for a condition with a timeout."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

PAUSE_SECONDS = 0.05  # between two checks: short compared with any start, and cheap


def until(condition: Callable[[], bool], limit_seconds: float, what: str, pause_seconds: float = PAUSE_SECONDS) -> None:
    """Wait until `condition()` holds.

    Args:
        condition: checked repeatedly.
        limit_seconds: timeout.
        what: completes the message "timed out waiting for …".
        pause_seconds: time between two checks.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {limit_seconds:g} s waiting for {what}")
        time.sleep(pause_seconds)


def listens(host: str, port: int, limit_seconds: float) -> None:
    """Wait until a server accepts connections on `host:port`.

    Raises:
        TimeoutError: no server did in time.
    """

    def accepts() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, port)) == 0

    until(accepts, limit_seconds, f"{host}:{port} to accept connections")
