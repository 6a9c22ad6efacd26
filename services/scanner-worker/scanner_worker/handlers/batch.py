"""One nmap for chunks that are alike: each has its own hosts of it, and may leave when it must."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol, Self

import structlog

from scanfleet.messages import PortFound, ScanChunk
from scanfleet.outcomes import Outcome, index_of, networks
from scanfleet.policy import ADMITTED_SCRIPTS
from scanfleet.ports import PortSet
from scanfleet.targets import Network, TargetRules
from scanner_worker.domain import Host, ScanError, arguments, services

SLACK_S: Final = 15.0  # for nmap to end a single address itself after its host timeout

_GIVEN: Final = Outcome.EXCLUDED  # in a share's map: nmap is done with it, and no later one is asked again

Found = list[tuple[Host, tuple[PortFound, ...]]]


class Scanner(Protocol):
    def scan(self, arguments: Sequence[str], services: Mapping[str, int]) -> AsyncGenerator[Found]:
        """Yield finished hosts with their open ports; once it is closed nothing runs any more.

        Raises:
            ScanError: the run does not count; the hosts that were yielded do.
            CannotStartError: nmap cannot be started.
            KilledByGuardError: the guard killed nmap.
        """

    @property
    def version(self) -> str:
        """nmap's, as it said last; empty while it has not been checked."""

    async def ranked(self, ports: PortSet) -> PortSet:
        """The TCP ports that a part of a `top` set stands for.

        Raises:
            ScanError, CannotStartError: as `scan`.
        """

    def hold(self, seconds: float) -> None:
        """Have every nmap killed once the event loop has stood still for `seconds`."""

    async def check(self) -> None:
        """Try nmap out without sending anything.

        Raises:
            CannotStartError: nmap cannot be used here; says why.
        """


@dataclass(frozen=True, slots=True)
class Abilities:
    """What this worker can do and may do.

    Attributes:
        slots: how many nmaps side by side.
        raw: whether nmap may send raw packets here.
        rules: what may be scanned.
        attempt_seconds: how long one nmap may scan more than one address.
        scripts: the NSE scripts that a policy may name.
    """

    slots: int
    raw: bool
    rules: TargetRules
    attempt_seconds: float
    scripts: AbstractSet[str] = ADMITTED_SCRIPTS


class TooSlowError(Exception):
    """An attempt on several addresses ran out of its time."""


class Batch:
    """Scans chunks that are alike with one nmap, and with another one for the rest of them when one has left.

    Attributes:
        shares: one for each chunk, in their order. nmap starts when each share asked for its addresses, or was left.
        fault: what nmap failed with, or what ended it; None if it was not needed, was left by all, or finished.
        finished: whether nmap came to a good end.
    """

    def __init__(self, chunks: Sequence[ScanChunk], abilities: Abilities, scanner: Scanner) -> None:
        self.shares = tuple(Share(self, chunk) for chunk in chunks)
        self.fault: BaseException | None = None
        self.finished = False
        self._abilities = abilities
        self._scanner = scanner
        self._chunk = chunks[0]  # its policy and ports are those of all
        self._here = list(self.shares)
        self._begun = asyncio.Event()
        self._nmap: asyncio.Task[None] | None = None
        self._spent = 0.0  # by each of those who are still here
        self._since = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Return when no share gets any more hosts; every share must be entered and left meanwhile."""
        try:
            await self._begun.wait()
            with structlog.contextvars.bound_contextvars(chunk_ids=[share.chunk.chunk_id for share in self._here]):
                self.fault = await self._scan()
        finally:
            for share in self._here:
                share.end(self.fault)

    @property
    def nmap(self) -> str:
        """nmap's version."""
        return self._scanner.version

    def begin(self) -> None:
        """Start nmap if nobody who is here has yet to say what it wants."""
        if all(share.asks for share in self._here):
            self._begun.set()

    async def leave(self, share: Share) -> float:
        """Return, when no packet goes to the share's addresses any more, its part of the slot's seconds."""
        now = asyncio.get_running_loop().time()
        self._spent += (now - self._since) / len(self._here)
        self._since = now
        self._here.remove(share)
        spent = self._spent
        self.begin()
        if self._nmap is not None and (share.targets or not self._here):
            self._nmap.cancel()
            await asyncio.wait((self._nmap,))
        return spent

    async def _scan(self) -> BaseException | None:
        """Run nmap until one has come to its end; answers what went wrong."""
        loop, limit = asyncio.get_running_loop(), self._abilities.attempt_seconds
        several = sum(network.num_addresses for network in self._targets()) > 1
        if not several:
            # nmap's own host timeout ends it, but does not count host discovery, which timing 0 can stretch beyond it.
            limit = max(limit, self._chunk.policy.host_timeout + SLACK_S)
        deadline = loop.time() + limit
        while targets := self._targets():
            self._nmap = asyncio.create_task(self._run_nmap(targets))
            await asyncio.wait((self._nmap,), timeout=max(deadline - loop.time(), 0))
            if not self._nmap.done():
                self._nmap.cancel()
                await asyncio.wait((self._nmap,))
                if several:
                    return TooSlowError(
                        f"nmap was stopped after {limit:g} s, the limit for more than one address (SCANFLEET_ATTEMPT_SECONDS)"
                    )
                await self._time_out()
                return None
            if not self._nmap.cancelled():  # as it is when a share with targets is left
                self.finished = self._nmap.exception() is None
                return self._nmap.exception()
        return None

    async def _time_out(self) -> None:
        """Report the address that is left as timed out."""
        for share in self._here:
            for network in share.targets:
                address = str(network.network_address)
                await share.give(
                    [(Host(address, up=True, timed_out=True, ports=0, reasons=frozenset(), element=b""), ())]
                )

    def _targets(self) -> list[Network]:
        return [network for share in self._here for network in share.targets]

    async def _run_nmap(self, targets: Sequence[Network]) -> None:
        chunk, ports = self._chunk, PortSet.parse(self._chunk.ports)
        if ports.above:
            ports = await self._scanner.ranked(ports)
            chunk = chunk.model_copy(update={"ports": str(ports)})
        line = arguments(chunk, targets, raw=self._abilities.raw, scripts=self._abilities.scripts)
        async with aclosing(self._scanner.scan(line, services(ports))) as found:
            async for hosts in found:
                for share, own in self._sorted(hosts).items():
                    if share in self._here:
                        await share.give(own)

    def _sorted(self, hosts: Found) -> Mapping[Share, Found]:
        sorted_: defaultdict[Share, Found] = defaultdict(list)
        for host, ports in hosts:
            whose = next((share for share in self.shares if share.holds(host.address)), None)
            if whose is None:
                raise ScanError(f"nmap reports {host.address}, which it was not asked for")
            sorted_[whose].append((host, ports))
        return sorted_


class Share:
    """A chunk's part of a batch, to be left as a context in any case.

    Attributes:
        seconds: its part of the time in the slot, once it was left: together those of a batch are the whole.
        asks: whether it has said what it wants.
    """

    def __init__(self, batch: Batch, chunk: ScanChunk) -> None:
        self.chunk = chunk
        self.seconds = 0.0
        self.asks = False
        self._batch = batch
        self._map: list[str] = []
        self._news: asyncio.Queue[Found | BaseException | None] = asyncio.Queue()
        self._told = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._told.set()
        self.seconds = await self._batch.leave(self)

    async def scan(self, outcomes: str) -> AsyncGenerator[Found]:
        """Yield the hosts of the blanks in `outcomes`, whatever nmap is done with.

        Raises:
            ScanError: nmap failed, and hosts are missing.
            TooSlowError: nmap took too long, and hosts are missing.
            CannotStartError, KilledByGuardError: as the scanner raised them.
        """
        self._map = list(outcomes)
        self.asks = True
        self._batch.begin()
        while True:
            self._told.set()
            news = await self._news.get()
            if isinstance(news, list):
                yield news
            elif news is not None and Outcome.BLANK in self._map:
                raise news
            else:
                return

    @property
    def nmap(self) -> str:
        """The version of the nmap that scanned; empty when there was nothing to scan."""
        return self._batch.nmap if self.asks else ""

    @property
    def targets(self) -> Sequence[Network]:
        """What nmap has still to scan."""
        return tuple(networks(self.chunk.first_address, "".join(self._map)))

    def holds(self, address: str) -> bool:
        return 0 <= index_of(self.chunk.first_address, address) < len(self.chunk.outcomes)

    async def give(self, hosts: Found) -> None:
        """Hand on hosts of ours; waits until those before are told, so that nmap gets no further ahead than that."""
        await self._told.wait()
        self._told.clear()
        self._news.put_nowait(hosts)
        for host, _ in hosts:
            self._map[index_of(self.chunk.first_address, host.address)] = _GIVEN

    def end(self, fault: BaseException | None) -> None:
        """Nothing more comes."""
        self._news.put_nowait(fault)
