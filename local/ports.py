"""Free TCP ports on the loopback interface, and those of a stack."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import cycle
from pathlib import Path

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


class Ports:
    """The ports of a stack's processes, by name; a service's process has `<name>` for its API and `<name>-probes`.

    Args:
        file: keeps the ports.
        usual: preferred ports; others are random.
    """

    def __init__(self, file: Path, usual: Mapping[str, int]) -> None:
        self._file = file
        self._usual = usual

    def choose(self, names: Iterable[str]) -> None:
        """Reuse the previous ports that are still free, so that clients find the stack at the same addresses."""
        before = self.numbers
        numbers: dict[str, int] = {}
        for name in names:
            number = choose(before.get(name, self._usual.get(name)))
            while number in numbers.values():
                number = choose()
            numbers[name] = number
        self._file.write_text(json.dumps(numbers, indent=2))

    @property
    def numbers(self) -> dict[str, int]:
        """The ports by name; none before the first start."""
        try:
            numbers: dict[str, int] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        return numbers

    def moved(self) -> dict[str, tuple[int, int]]:
        """Return the preferred port of each process that listens on another one, and that port."""
        return {
            name: (self._usual[name], port)
            for name, port in self.numbers.items()
            if port != self._usual.get(name, port)
        }

    def address(self, name: str) -> str:
        """Return `host:port` of a server or of a service's API."""
        return f"127.0.0.1:{self.numbers[name]}"

    def addresses(self, name: str) -> list[str]:
        """Return `host:port` of each port of a process."""
        return [self.address(key) for key in (name, f"{name}-probes") if key in self.numbers]

    def probes(self, name: str) -> str:
        """Return the URL of the probes and metrics of a service's process."""
        return f"http://{self.address(f'{name}-probes')}"
