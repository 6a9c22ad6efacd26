"""The ports of the handlers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from scanfleet.contracts.messages import PortFound
from scanfleet.scanning.ports import PortSet
from scanner_worker.domain.scan import Host

Found = list[tuple[Host, tuple[PortFound, ...]]]


class Scanner(Protocol):
    def scan(self, arguments: Sequence[str], ports: PortSet) -> AsyncGenerator[Found]:
        """Yield finished hosts with their open ports. After the generator is closed, no process is left.

        Raises:
            ScanError: the run failed; the hosts that were yielded are valid.
            CannotStartError: nmap cannot be started.
            KilledByGuardError: the guard killed nmap.
        """

    @property
    def version(self) -> str:
        """nmap's version in its last run; empty before the first check."""

    def source(self, address: str) -> str | None:
        """Return the address from which packets to `address` are sent; None without a route. Sends nothing."""

    async def ranked(self, ports: PortSet) -> PortSet:
        """Return the TCP ports that a `top` set, or a part of one, stands for.

        Raises:
            CannotStartError: nmap does not list them here.
        """

    def hold(self, seconds: float) -> None:
        """Have every nmap killed if the event loop is blocked for `seconds`."""

    async def check(self) -> None:
        """Run nmap once without sending packets.

        Raises:
            CannotStartError: nmap cannot be used here; the message has the cause.
        """
