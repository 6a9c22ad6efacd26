"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket

# Below the kernel's ephemeral range (32768 and up): there, an outgoing connection could take the port of a process
# that is just being restarted.
FREE_RANGE = range(20_000, 32_000)
TRIES = 100  # of 12,000 ports: so many failures in a row have another cause


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        # As servers do: connections in TIME_WAIT do not block a port, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def choose(usual: int | None = None, host: str = "127.0.0.1") -> int:
    """Return `usual` if it is free, else a random free port.

    Raises:
        OSError: none was found.
    """
    if usual is not None and is_free(usual, host):
        return usual
    for port in random.sample(FREE_RANGE, TRIES):
        if is_free(port, host):
            return port
    raise OSError(f"found no free port on {host}")
