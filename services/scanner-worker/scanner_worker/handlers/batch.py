"""Scan compatible chunks with one nmap: each chunk receives its own hosts and can leave at any time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Self

import structlog

from scanfleet.contracts.messages import Run, ScanChunk
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.scanning.outcomes import Outcome, index_of, networks
from scanfleet.scanning.policy import ADMITTED_SCRIPTS
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import Network, TargetRules
from scanner_worker.domain.ports import Found, Scanner
from scanner_worker.domain.scan import (
    CannotStartError,
    Host,
    KilledByGuardError,
    NoRouteError,
    ScanError,
    arguments,
    digest,
    outcome,
)

SLACK_SECONDS: Final = 15.0  # extra time in which nmap applies its host timeout to a single address itself

# Marks an address in a share's map as finished, so that no later nmap scans it again.
_FINISHED: Final = Outcome.EXCLUDED


@dataclass(frozen=True, slots=True)
class Abilities:
    """The capabilities and limits of this worker.

    Attributes:
        slots: maximum number of concurrent nmap processes.
        raw: whether nmap may send raw packets.
        rules: which targets may be scanned.
        grants: what each user may scan.
        attempt_seconds: timeout of one nmap with more than one address.
        scripts: the NSE scripts that a policy may name.
        egress: the address that targets see instead of the worker's own; None if it is the same or unknown.
    """

    slots: int
    raw: bool
    rules: TargetRules
    attempt_seconds: float
    scripts: AbstractSet[str] = ADMITTED_SCRIPTS
    grants: UserGrants | None = None
    egress: str | None = None


class TooSlowError(Exception):
    """An attempt on several addresses exceeded its timeout."""


class ClockStepError(Exception):
    """nmap ended hosts before their host timeout, since this machine's clock was set forward."""


_BY_COST: Final = (ClockStepError, NoRouteError, ScanError)
"""Errors of single hosts; of several, the batch has the one that costs its chunks least."""

_NO_FAILURES: Final = (CannotStartError, KilledByGuardError, NoRouteError, TooSlowError, ClockStepError)
"""Errors that are no failure of the started nmap, and have effects of their own."""


class Batch:
    """Scans compatible chunks with one nmap; when a chunk leaves early, another nmap scans the remaining addresses.

    Attributes:
        shares: one per chunk, in order. nmap starts once every share has requested its addresses or left.
        fault: the error that ended nmap; None if nmap finished, was not needed, or all shares left.
        finished: whether nmap finished successfully, with all addresses.
        failed: whether nmap was started and failed, and finished no chunk, also none of those that left early.
        common_ports: the ports of a `top` set by number; empty for another set.
        arguments: the digest of nmap's last arguments without targets; empty if it was not started.
    """

    def __init__(self, chunks: Sequence[ScanChunk], abilities: Abilities, scanner: Scanner) -> None:
        self.shares = tuple(Share(self, chunk) for chunk in chunks)
        self.fault: BaseException | None = None
        self.finished = False
        self.failed = False
        self.common_ports = ""
        self.arguments = ""
        self._abilities = abilities
        self._scanner = scanner
        self._chunk = chunks[0]  # all chunks have the same policy and ports
        self._active = list(self.shares)
        self._started = asyncio.Event()
        self._nmap: asyncio.Task[None] | None = None
        self._rules = ""
        self._began = 0.0
        self._spent_seconds = 0.0  # charged so far to each share that has not left
        self._since = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Run until no share receives any more hosts; meanwhile every share must be entered and left."""
        try:
            await self._started.wait()
            with structlog.contextvars.bound_contextvars(chunk_ids=[share.chunk.chunk_id for share in self._active]):
                self.fault = await self._scan()
                started = bool(self.arguments)  # otherwise this worker does not execute the policy
                failed = started and isinstance(self.fault, Exception) and not isinstance(self.fault, _NO_FAILURES)
                self.failed = failed and all(share.targets for share in self.shares)
        finally:
            for share in self._active:
                share.end(self.fault)

    @property
    def nmap(self) -> str:
        """nmap's version."""
        return self._scanner.version

    def nmap_run(self, first_address: str) -> Run | None:
        """Return how nmap runs for the chunk that begins with this address; None if it was not started."""
        if not self.arguments:
            return None
        return Run(
            nmap=self.nmap,
            arguments=self.arguments,
            source=self._scanner.source(first_address),
            egress=self._abilities.egress,
            rules=self._rules,
            began=asyncio.get_running_loop().time() - self._began,
        )

    def start_if_ready(self) -> None:
        """Start nmap if every remaining share has requested its addresses."""
        if all(share.requested for share in self._active):
            self._started.set()

    async def leave(self, share: Share) -> float:
        """Remove the share; return its part of the slot's seconds once no packet is sent to its addresses any more."""
        now = asyncio.get_running_loop().time()
        self._spent_seconds += (now - self._since) / len(self._active)
        self._since = now
        self._active.remove(share)
        spent = self._spent_seconds
        self.start_if_ready()
        if self._nmap is not None and (share.targets or not self._active):
            self._nmap.cancel()
            await asyncio.wait((self._nmap,))
        return spent

    async def _scan(self) -> BaseException | None:
        """Run nmap, again after a share has left, until a run ends by itself; return its error or None."""
        loop, limit = asyncio.get_running_loop(), self._abilities.attempt_seconds
        several = sum(network.num_addresses for network in self._targets()) > 1
        if not several:
            # nmap applies its own host timeout, but without host discovery, which can take longer than that at timing 0.
            limit = max(limit, self._chunk.policy.host_timeout + SLACK_SECONDS)
        deadline = loop.time() + limit
        while targets := self._targets():
            earlier = self.arguments
            self._nmap = asyncio.create_task(self._run_nmap(targets))
            await asyncio.wait((self._nmap,), timeout=max(deadline - loop.time(), 0))
            if not self._nmap.done():
                self._nmap.cancel()
                await asyncio.wait((self._nmap,))
                if several:
                    return TooSlowError(
                        f"nmap was stopped after {limit:g} s, the timeout for more than one address (SCANFLEET_ATTEMPT_SECONDS)"
                    )
                await self._time_out()
                return None
            if not self._nmap.cancelled():  # it is cancelled if a share with remaining targets leaves
                error = self._nmap.exception()
                if isinstance(error, CannotStartError):
                    self.arguments = earlier
                self.finished = error is None
                return error
        return None

    async def _time_out(self) -> None:
        """Report the remaining address as timed out."""
        for share in self._active:
            for network in share.targets:
                address = str(network.network_address)
                await share.put(
                    [(Host(address, up=True, timed_out=True, ports=0, reasons=frozenset(), element=b""), ())]
                )

    def _targets(self) -> list[Network]:
        return [network for share in self._active for network in share.targets]

    async def _run_nmap(self, targets: Sequence[Network]) -> None:
        ports = PortSet.parse(self._chunk.ports)
        if ports.top:
            ranked = await self._scanner.ranked(ports)
            self.common_ports = str(ranked)
            if ports.above:  # nmap has no option for a part of its most common ports
                ports = ranked
        line = arguments(self._chunk, ports, targets, raw=self._abilities.raw, scripts=self._abilities.scripts)
        if not self.arguments:
            self._rules, self._began = self._abilities.rules.digest, asyncio.get_running_loop().time()
        self.arguments = digest(line)
        due = asyncio.get_running_loop().time() + self._chunk.policy.host_timeout
        faults: list[Exception] = []
        try:
            async with aclosing(self._scanner.scan(line, ports)) as found:
                async for hosts in found:
                    judged = [self._fault(host, ports.count, due) for host, _ in hosts]
                    faults += [fault for fault in judged if fault]
                    valid = [each for each, fault in zip(hosts, judged, strict=True) if not fault]
                    for share, own in self._sorted(valid).items():
                        if share in self._active:
                            await share.put(own)
        except NoRouteError as error:
            faults.append(error)
        if missing := sum(network.num_addresses for network in self._targets()):
            faults.append(ScanError(f"{missing} addresses are missing from nmap's output"))
        if faults:
            raise min(faults, key=lambda fault: _BY_COST.index(type(fault)))

    def _fault(self, host: Host, ports: int, due: float) -> Exception | None:
        """Return why nmap's result for the host is invalid; None if it is valid. `due` is when a host may have timed out."""
        if host.timed_out and asyncio.get_running_loop().time() < due:
            timeout = self._chunk.policy.host_timeout
            return ClockStepError(f"nmap ended hosts before their timeout of {timeout} s: the clock was set forward")
        # nmap's reason for such a host depends on the kernel's error, and for some errors is that of a silent host.
        if not host.answered and self._scanner.source(host.address) is None:
            return NoRouteError(f"nmap got no answer from {host.address}, and the worker has no route to it")
        if outcome(host, ports) is Outcome.BLANK:
            return ScanError(f"nmap reported {host.ports} of {ports} ports of {host.address}")
        return None

    def _sorted(self, hosts: Found) -> Mapping[Share, Found]:
        sorted_: defaultdict[Share, Found] = defaultdict(list)
        for host, ports in hosts:
            whose = next((share for share in self.shares if share.holds(host.address)), None)
            if whose is None:
                raise ScanError(f"nmap reported {host.address}, which is not one of its targets")
            sorted_[whose].append((host, ports))
        return sorted_


class Share:
    """A chunk's part of a batch: a context manager that leaves the batch on exit.

    Attributes:
        seconds: its part of the time in the slot, set on exit; the parts of a batch add up to the whole time.
        requested: whether it has requested its addresses.
    """

    def __init__(self, batch: Batch, chunk: ScanChunk) -> None:
        self.chunk = chunk
        self.seconds = 0.0
        self.requested = False
        self._batch = batch
        self._map: list[str] = []
        self._queue: asyncio.Queue[Found | BaseException | None] = asyncio.Queue()
        self._consumed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._consumed.set()
        self.seconds = await self._batch.leave(self)

    async def scan(self, outcomes: str) -> AsyncGenerator[Found]:
        """Yield the hosts of the blanks in `outcomes` as nmap finishes them.

        Raises:
            ScanError: nmap failed, and hosts are missing.
            TooSlowError: nmap exceeded its timeout, and hosts are missing.
            ClockStepError: nmap ended hosts early.
            CannotStartError, KilledByGuardError: as the scanner raised them.
        """
        self._map = list(outcomes)
        self.requested = True
        self._batch.start_if_ready()
        while True:
            self._consumed.set()
            item = await self._queue.get()
            if isinstance(item, list):
                yield item
            elif item is not None and Outcome.BLANK in self._map:
                raise item
            else:
                return

    @property
    def nmap(self) -> str:
        """The version of the nmap that scanned; empty if there was nothing to scan."""
        return self._batch.nmap if self.requested else ""

    @property
    def nmap_run(self) -> Run | None:
        """How nmap runs, up to now; None if it was not started."""
        return self._batch.nmap_run(self.chunk.first_address) if self.requested else None

    @property
    def common_ports(self) -> str:
        """The ports of a `top` set by number; empty for another set, and if there was nothing to scan."""
        return self._batch.common_ports

    @property
    def arguments(self) -> str:
        """The digest of nmap's arguments without targets; empty if there was nothing to scan."""
        return self._batch.arguments if self.requested else ""

    @property
    def targets(self) -> Sequence[Network]:
        """The networks that nmap has still to scan."""
        return tuple(networks(self.chunk.first_address, "".join(self._map)))

    def holds(self, address: str) -> bool:
        return 0 <= index_of(self.chunk.first_address, address) < len(self.chunk.outcomes)

    async def put(self, hosts: Found) -> None:
        """Queue hosts of this share, after the previous ones were consumed: backpressure for reading nmap's output."""
        await self._consumed.wait()
        self._consumed.clear()
        self._queue.put_nowait(hosts)
        for host, _ in hosts:
            self._map[index_of(self.chunk.first_address, host.address)] = _FINISHED

    def end(self, fault: BaseException | None) -> None:
        """Mark the end of the share's hosts, with the error that ended nmap."""
        self._queue.put_nowait(fault)
