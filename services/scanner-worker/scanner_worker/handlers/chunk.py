"""Run one attempt on a chunk, from its claim to its final report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, aclosing, suppress
from typing import Any, Final

import structlog

from scanfleet.contracts.messages import (
    ChunkClaimed,
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    HostScanned,
    Message,
    PortFound,
    ScanChunk,
)
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, Topic
from scanfleet.errors import DependencyError, Rule
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Publisher
from scanfleet.scanning.nmap_options import technique
from scanfleet.scanning.outcomes import Outcome, index_of
from scanfleet.scanning.ports import PortSet
from scanner_worker.domain.ports import Found
from scanner_worker.domain.scan import (
    REASON_CHARS,
    CannotStartError,
    Host,
    KilledByGuardError,
    NoRouteError,
    ScanError,
    detection_of,
    fit,
    outcome,
    permit,
    scripts_of,
)
from scanner_worker.handlers.batch import Abilities, ClockStepError, Share, TooSlowError
from scanner_worker.metrics import ADDRESSES, CHUNKS

CLAIM_SECONDS: Final = 0.25  # delay before a claim is published; a shorter scan publishes only its final report
BEAT_SECONDS: Final = 1.0  # interval of ChunkProgressed: a third of the shortest lease
RETRY_SECONDS: Final = 0.5  # delay between attempts to publish; each attempt already waits for the broker
# Fraction of the lease without an acknowledged heartbeat after which nmap is stopped: before the chunk is reassigned.
FENCE: Final = 2 / 3
NOT_NOW: Final = Outcome.EXCLUDED  # code of an address beyond the chunk's limit, in the map that nmap gets

_HOURS_OVER: Final = "the hours in which the user may scan have ended"

Denied = Callable[[ScanChunk, str, Rule], None]
"""Called with a chunk that has forbidden addresses, why they are forbidden, and by which rule."""

_log = structlog.stdlib.get_logger(__name__)


class ChunkScan:
    """Scans one chunk and reports its hosts, its progress and its result."""

    def __init__(self, chunk: ScanChunk, abilities: Abilities, publisher: Publisher, denied: Denied) -> None:
        self.chunk = chunk
        self._abilities = abilities
        self._publisher = publisher
        self._denied = denied
        self._map = list(chunk.outcomes)
        self._ports = PortSet.parse(chunk.ports)
        self._technique = technique(chunk.policy, raw=abilities.raw)
        self._fence: asyncio.Timeout | None = None
        self._work: asyncio.Task[None] | None = None
        self._stopped = ""
        self._unacknowledged = False
        after = chunk.stop_after_seconds
        self._stop_at = None if after is None else asyncio.get_running_loop().time() + after

    async def run(self, share: Share) -> None:
        """Scan the chunk, and report its end until Kafka has acknowledged it."""
        about = {"scanfleet.chunk.id": self.chunk.chunk_id}
        with tracing.span("scan chunk", self.chunk.traceparent, "consumer", about), self._logged():
            await self._report_end(await self._outcome(share))

    async def release(self, reason: str) -> None:
        """Release the chunk without scanning it."""
        with tracing.within(self.chunk.traceparent), self._logged():
            await self._report_end(self._released(reason))

    def stop(self, reason: str) -> None:
        """Kill nmap and release the chunk, unless every address is finished."""
        self._stopped = self._stopped or reason
        if self._work is not None:
            self._work.cancel()

    async def _outcome(self, share: Share) -> Message:
        try:
            async with share:
                permitted = permit(self.chunk, self._abilities.rules, self._abilities.grants, raw=self._abilities.raw)
                self._map = list(permitted.outcomes)
                if permitted.denied:
                    self._denied(self.chunk, permitted.denied, permitted.rule)
                if self._stop_at is not None and asyncio.get_running_loop().time() >= self._stop_at:
                    self.stop(_HOURS_OVER)
                if not self._stopped:
                    await self._hold_and_scan(share)
        except (CannotStartError, KilledByGuardError, TooSlowError, ClockStepError) as error:
            too_slow = isinstance(error, TooSlowError)
            return self._released(str(error), share.seconds, share, too_slow=too_slow)
        except ScanError as error:
            return self._failed(str(error), share, no_route=isinstance(error, NoRouteError))
        except Exception as error:  # noqa: BLE001 # one faulty host must not stop the others; the log has the traceback
            _log.exception("chunk_failed", cause="unexpected error")
            reason = f"the worker failed: {type(error).__name__}"
            return self._failed(reason, share)
        if Outcome.BLANK in self._map:
            return self._released(self._stopped, share.seconds, share, unacknowledged=self._unacknowledged)
        return ChunkScanned(
            **self._state,
            first_address=self.chunk.first_address,
            slot_seconds=share.seconds,
            **({"technique": self._technique} | self._probed(share)),
            nmap=share.nmap,
            arguments=share.arguments,
            reason=permitted.reason[:REASON_CHARS],
            grant=self.chunk.grant,
        )

    async def _hold_and_scan(self, share: Share) -> None:
        """Scan while the lease is valid and the user's hours last; `_stopped` is the reason for remaining blanks."""
        self._work = asyncio.create_task(self._scan(share))
        beating = asyncio.create_task(self._beat(share))
        loop = asyncio.get_running_loop()
        ending = loop.call_at(self._stop_at, self.stop, _HOURS_OVER) if self._stop_at is not None else None
        try:
            async with asyncio.timeout(self.chunk.lease_seconds * FENCE) as self._fence:
                await asyncio.wait((self._work, beating), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            self._stopped = "Kafka did not acknowledge a heartbeat within two thirds of the lease"
            self._unacknowledged = True
        finally:
            if ending:
                ending.cancel()
            tasks, self._work, self._fence = (self._work, beating), None, None
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _scan(self, share: Share) -> None:
        if Outcome.BLANK not in self._map:
            return
        blanks = [index for index, code in enumerate(self._map) if code == Outcome.BLANK]
        later = set(blanks[self.chunk.limit :] if self.chunk.limit else ())
        wanted = "".join(NOT_NOW if index in later else code for index, code in enumerate(self._map))
        with tracing.span("nmap", tracing.current()):
            async with aclosing(share.scan(wanted)) as found:
                async for hosts in found:
                    await self._publish_hosts(hosts)

    async def _publish_hosts(self, hosts: Found) -> None:
        """Publish the hosts; set their outcome codes only after they are acknowledged."""
        codes: dict[int, Outcome] = {}
        messages: list[HostScanned] = []
        for host, ports in hosts:
            index = index_of(self.chunk.first_address, host.address)
            code = outcome(host, self._ports.count)
            if self._map[index] == Outcome.BLANK and index not in codes:
                codes[index] = code
                if code is not Outcome.DOWN:
                    messages.append(self._host(host, code, ports))
        try:
            async with asyncio.timeout(self.chunk.lease_seconds * FENCE):
                await self._publish(SCAN_RESULTS, messages)
        except TimeoutError:
            self._unacknowledged = not self._stopped
            self.stop("Kafka did not acknowledge hosts within two thirds of the lease")
            return
        for index, code in codes.items():
            self._map[index] = code
            ADDRESSES.labels(code.name.lower()).inc()

    def _host(self, host: Host, code: Outcome, ports: tuple[PortFound, ...]) -> HostScanned:
        return fit(
            HostScanned(
                **self._token,
                user_id=self.chunk.user_id,
                address=host.address,
                outcome=code.value,
                technique=self._technique,
                ports=ports,
                open_filtered=host.open_filtered,
                details=host.details,
                grant=self.chunk.grant,
            ),
        )

    async def _beat(self, share: Share) -> None:
        await asyncio.sleep(CLAIM_SECONDS)
        await self._heartbeat(ChunkClaimed(**self._token, **self._probed(share)))
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            await self._heartbeat(ChunkProgressed(**self._state))

    async def _heartbeat(self, message: Message) -> None:
        sent = asyncio.get_running_loop().time()
        await self._publish(SCAN_PROGRESS, [message])
        if self._fence is not None:
            self._fence.reschedule(sent + self.chunk.lease_seconds * FENCE)

    async def _report_end(self, end: Message) -> None:
        if isinstance(end, ChunkScanned):
            # Without it the orchestrator requests the verdict from result-store; but without a report in time the lease expires.
            with suppress(TimeoutError):
                async with asyncio.timeout(self.chunk.lease_seconds * FENCE):
                    await self._publish(SCAN_RESULTS, [end])
        await self._publish(SCAN_PROGRESS, [end])
        CHUNKS.labels(type(end).__name__.removeprefix("Chunk").lower()).inc()
        _log.info("chunk_ended", how=type(end).__name__, reason=getattr(end, "reason", ""))

    async def _publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        # Retry indefinitely: all of these messages are idempotent, and a chunk without a final report would wait until its
        # lease expires. While nmap runs, the lease bounds the retries.
        while messages:
            try:
                await self._publisher.publish(topic, messages)
            except DependencyError as error:
                _log.warning("publish_failed", topic=topic.name, error=str(error), retry_seconds=RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    def _logged(self) -> AbstractContextManager[None]:
        """Add the chunk to every log line."""
        return structlog.contextvars.bound_contextvars(job_id=self.chunk.job_id, chunk_id=self.chunk.chunk_id)

    def _released(
        self,
        reason: str,
        seconds: float = 0.0,
        share: Share | None = None,
        *,
        too_slow: bool = False,
        unacknowledged: bool = False,
    ) -> ChunkReleased:
        return ChunkReleased(
            **self._state,
            **(self._probed(share) if share else {}),
            reason=reason[:REASON_CHARS],
            slot_seconds=seconds,
            too_slow=too_slow,
            unacknowledged=unacknowledged,
        )

    def _failed(self, reason: str, share: Share, *, no_route: bool = False) -> ChunkFailed:
        reason = reason[:REASON_CHARS]
        probed = self._probed(share)
        return ChunkFailed(**self._state, **probed, reason=reason, slot_seconds=share.seconds, no_route=no_route)

    def _probed(self, share: Share) -> dict[str, Any]:
        """Return what this attempt probes; empty if nmap was not started."""
        run = share.nmap_run
        if run is None:
            return {}
        return {
            "technique": self._technique,
            "scripts": scripts_of(self.chunk.policy),
            "common_ports": share.common_ports,
            "detection": detection_of(self.chunk.policy),
            "discovery": self.chunk.policy.discovery,
            "run": run,
        }

    @property
    def _token(self) -> dict[str, Any]:
        return self.chunk.token._asdict()

    @property
    def _state(self) -> dict[str, Any]:
        return {**self._token, "outcomes": "".join(self._map)}
