"""One attempt on a chunk, from its claim to the report of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any, Final

import structlog
from prometheus_client import Counter

from scanfleet import tracing
from scanfleet.bus import Publisher
from scanfleet.errors import DependencyError
from scanfleet.messages import (
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
from scanfleet.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, Topic
from scanfleet.outcomes import Outcome, index_of
from scanfleet.ports import PortSet
from scanner_worker.domain import (
    REASON_CHARS,
    CannotStartError,
    Host,
    KilledByGuardError,
    ScanError,
    fit,
    outcome,
    permit,
    scripts_of,
    technique,
)
from scanner_worker.handlers.batch import Abilities, Found, Share, TooSlowError

CLAIM_S: Final = 0.25  # of scanning before it is claimed: one that ends sooner says all with its end
BEAT_S: Final = 1.0  # between two ChunkProgressed: a third of the shortest lease
RETRY_S: Final = 0.5  # between two tries of a send; each try already waits for the broker
FENCE: Final = 2 / 3  # of the lease, without an acknowledged heartbeat: nmap is gone before another worker takes over
NOT_NOW: Final = Outcome.EXCLUDED  # for an address beyond the chunk's limit, in the map that nmap gets

Denied = Callable[[ScanChunk, str], None]
"""Told of a chunk with addresses that may not be scanned, and of the rule that says so."""

_addresses = Counter("scanfleet_worker_addresses", "Addresses done, by outcome.", ["outcome"])
_ends = Counter("scanfleet_worker_chunks", "Chunks that ended here, by how.", ["end"])
_log = structlog.stdlib.get_logger(__name__)


class ChunkScan:
    """Scans one chunk and reports its hosts, its progress and its end."""

    def __init__(self, chunk: ScanChunk, abilities: Abilities, publisher: Publisher, denied: Denied) -> None:
        self.chunk = chunk
        self._abilities = abilities
        self._publisher = publisher
        self._denied = denied
        self._map = list(chunk.outcomes)
        self._ports = PortSet.parse(chunk.ports)
        self._technique = technique(chunk.policy, raw=abilities.raw)
        self._doubt = ""
        self._fence: asyncio.Timeout | None = None
        self._work: asyncio.Task[None] | None = None
        self._stopped = ""

    async def run(self, share: Share) -> Message:
        """Answer how the chunk ended, once Kafka has acknowledged that."""
        about = {"scanfleet.chunk.id": self.chunk.chunk_id}
        with tracing.span("scan chunk", self.chunk.traceparent, "consumer", about), self._logged():
            end = await self._outcome(share)
            await self._report_end(end)
            return end

    async def release(self, reason: str) -> None:
        """Release the chunk without having begun."""
        with tracing.within(self.chunk.traceparent), self._logged():
            await self._report_end(self._released(reason))

    def stop(self, reason: str) -> None:
        """Kill nmap and release the chunk, unless every address is done."""
        self._stopped = self._stopped or reason
        if self._work is not None:
            self._work.cancel()

    async def _outcome(self, share: Share) -> Message:
        try:
            async with share:
                permitted = permit(self.chunk, self._abilities.rules, raw=self._abilities.raw)
                self._map = list(permitted.outcomes)
                if permitted.denied:
                    self._denied(self.chunk, permitted.denied)
                if not self._stopped:
                    await self._hold_and_scan(share)
        except (CannotStartError, KilledByGuardError, TooSlowError) as error:
            return self._released(str(error), share.seconds, too_slow=isinstance(error, TooSlowError))
        except ScanError as error:
            return ChunkFailed(**self._state, reason=str(error)[:REASON_CHARS], slot_seconds=share.seconds)
        except Exception as error:  # noqa: BLE001 # one strange host must not stop the others; the log has the trace
            _log.exception("the worker failed to scan a chunk")
            reason = f"the worker failed: {type(error).__name__}"
            return ChunkFailed(**self._state, reason=reason, slot_seconds=share.seconds)
        if Outcome.BLANK in self._map:
            return self._released(self._stopped, share.seconds)
        return ChunkScanned(
            **self._state,
            first_address=self.chunk.first_address,
            slot_seconds=share.seconds,
            technique=self._technique,
            nmap=share.nmap,
            scripts=scripts_of(self.chunk.policy) if share.nmap else (),
            reason=permitted.reason[:REASON_CHARS],
            grant=self.chunk.grant,
        )

    async def _hold_and_scan(self, share: Share) -> None:
        """Scan for as long as the lease is ours; `_stopped` says why blanks are left."""
        self._work = asyncio.create_task(self._scan(share))
        beating = asyncio.create_task(self._beat())
        try:
            async with asyncio.timeout(self.chunk.lease_seconds * FENCE) as self._fence:
                await asyncio.wait((self._work, beating), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            self._stopped = "the bus acknowledged no heartbeat in time"
        finally:
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
        blanks = [index for index, letter in enumerate(self._map) if letter == Outcome.BLANK]
        asked, later = blanks[: self.chunk.limit], set(blanks[self.chunk.limit :] if self.chunk.limit else ())
        wanted = "".join(NOT_NOW if index in later else letter for index, letter in enumerate(self._map))
        with tracing.span("nmap", tracing.current()):
            async with aclosing(share.scan(wanted)) as found:
                async for hosts in found:
                    await self._tell(hosts)
        if blank := sum(self._map[index] == Outcome.BLANK for index in asked):
            raise ScanError(self._doubt or f"{blank} addresses are missing from what nmap wrote")

    async def _tell(self, hosts: Found) -> None:
        """Publish the hosts; only when they are acknowledged are their letters set."""
        letters: dict[int, Outcome] = {}
        messages: list[HostScanned] = []
        for host, ports in hosts:
            index = index_of(self.chunk.first_address, host.address)
            letter = outcome(host, self._ports.count)
            if letter is Outcome.BLANK:
                self._doubt = f"nmap accounts for {host.ports} of {self._ports.count} ports of {host.address}"
            elif self._map[index] == Outcome.BLANK and index not in letters:
                letters[index] = letter
                if letter is not Outcome.DOWN:
                    messages.append(self._host(host, letter, ports))
        await self._publish(SCAN_RESULTS, messages)
        for index, letter in letters.items():
            self._map[index] = letter
            _addresses.labels(letter.name.lower()).inc()

    def _host(self, host: Host, letter: Outcome, ports: tuple[PortFound, ...]) -> HostScanned:
        return fit(
            HostScanned(
                **self._token,
                user_id=self.chunk.user_id,
                address=host.address,
                outcome=letter.value,
                technique=self._technique,
                ports=ports,
                open_filtered=host.open_filtered,
                grant=self.chunk.grant,
            ),
        )

    async def _beat(self) -> None:
        await asyncio.sleep(CLAIM_S)
        await self._heartbeat(ChunkClaimed(**self._token))
        while True:
            await asyncio.sleep(BEAT_S)
            await self._heartbeat(ChunkProgressed(**self._state))

    async def _heartbeat(self, message: Message) -> None:
        sent = asyncio.get_running_loop().time()
        await self._publish(SCAN_PROGRESS, [message])
        if self._fence is not None:
            self._fence.reschedule(sent + self.chunk.lease_seconds * FENCE)

    async def _report_end(self, end: Message) -> None:
        if isinstance(end, ChunkScanned):
            await self._publish(SCAN_RESULTS, [end])
        await self._publish(SCAN_PROGRESS, [end])
        _ends.labels(type(end).__name__.removeprefix("Chunk").lower()).inc()
        _log.info("chunk ended", how=type(end).__name__, reason=getattr(end, "reason", ""))

    async def _publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        # Without end: each of these messages may be in the log twice, and a chunk whose end is not reported waits for its
        # lease to expire. While nmap runs, the fence ends this.
        while messages:
            try:
                await self._publisher.publish(topic, messages)
            except DependencyError as error:
                _log.warning("will send again", topic=topic.name, error=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _logged(self) -> AbstractContextManager[None]:
        """Let every line of the log name the chunk."""
        return structlog.contextvars.bound_contextvars(job_id=self.chunk.job_id, chunk_id=self.chunk.chunk_id)

    def _released(self, reason: str, seconds: float = 0.0, *, too_slow: bool = False) -> ChunkReleased:
        return ChunkReleased(**self._state, reason=reason[:REASON_CHARS], slot_seconds=seconds, too_slow=too_slow)

    @property
    def _token(self) -> dict[str, Any]:
        return self.chunk.model_dump(include={"job_id", "chunk_id", "attempt", "worker_id"})

    @property
    def _state(self) -> dict[str, Any]:
        return {**self._token, "outcomes": "".join(self._map)}
