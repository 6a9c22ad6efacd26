"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from functools import cache
from itertools import cycle

# Below the kernel's ephemeral range (32768 and up): there, an outgoing connection could take the port of a process
# that is just being restarted.
FREE_RANGE = range(20_000, 32_000)
BLOCK = 400  # ports of one process: a test process chooses about 20 for each of its stacks


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
    """Return `usual` if it is free, else a free port that no other running process chooses.

    Raises:
        OSError: none was found.
    """
    if usual is not None and is_free(usual, host):
        return usual
    numbers = _own_ports()
    for _ in range(BLOCK):
        port = next(numbers)
        if is_free(port, host):
            return port
    raise OSError(f"found no free port on {host}")


@cache
def _own_ports() -> Iterator[int]:
    """Claim a block of ports until this process ends, and return its ports repeatedly.

    A server listens seconds after its port was chosen. Without the claim, two processes that start stacks at the same time
    could choose the same port, and each would take the other's answers for its own.

    Raises:
        OSError: other processes hold all blocks.
    """
    blocks = [FREE_RANGE[first : first + BLOCK] for first in range(0, len(FREE_RANGE), BLOCK)]
    for block in random.sample(blocks, len(blocks)):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", block[0]))
        except OSError:
            claim.close()
            continue
        claim.detach()  # the kernel releases it when the process ends
        return cycle(block[1:])
    raise OSError(f"other processes hold all ports from {FREE_RANGE.start} to {FREE_RANGE.stop - 1}: end some of them")
