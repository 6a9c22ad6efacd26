"""Waiting for a condition, bounded."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

PAUSE = 0.05  # seconds: short beside any start, cheap beside any process


def until(condition: Callable[[], bool], limit: float, what: str, pause: float = PAUSE) -> None:
    """Return when `condition()` holds.

    Args:
        condition: looked at again and again.
        limit: seconds.
        what: finishes the sentence "gave up waiting for …".
        pause: seconds between two looks.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"gave up waiting for {what} after {limit:g} s")
        time.sleep(pause)


def listens(host: str, port: int, limit: float) -> None:
    """Return when something accepts connections on `host:port`.

    Raises:
        TimeoutError: nothing did in time.
    """

    def accepts() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, port)) == 0

    until(accepts, limit, f"{host}:{port} to accept connections")
