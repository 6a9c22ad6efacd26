"""Change chunks: read, decide, compare-and-set, and retry for those that another replica changed meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Final

import structlog
from pydantic import ValidationError

from job_orchestrator.domain.attempts import Probed
from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, elapsed
from job_orchestrator.domain.ports import ChunkRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.account_cache import AccountCache
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.metrics import CHUNK_TRANSITIONS
from scanfleet.contracts.messages import ChunkScanned, FencingToken, StopChunk
from scanfleet.contracts.messages.chunks import Grant
from scanfleet.errors import DependencyError
from scanfleet.security.chunk_grants import Signer

_log = structlog.stdlib.get_logger(__name__)

STOPPED_LATER: Final = "the next heartbeat of each worker is answered with a stop"
"""How the loss of a StopChunk is repaired, for the log."""

_MAX_CACHED: Final = 10_000  # the chunks that other replicas have changed stay until `verify`
_ROUNDS: Final = 20  # each lost race is progress of another replica; this many in a row are an error


@dataclass(frozen=True, slots=True)
class Changed:
    """A chunk as it was read, and with its stored changes; equal if nothing changed."""

    before: Chunk
    after: Chunk

    @property
    def stored(self) -> Chunk:
        """The chunk as the next change must find it."""
        return self.after if self.after == self.before else saved(self.after)

    @property
    def moved(self) -> bool:
        return self.before.state is not self.after.state


def saved(chunk: Chunk) -> Chunk:
    """Return the chunk as it is stored after a save of this version."""
    return replace(chunk, rev=chunk.rev + 1)


class ChunkChanger:
    """Changes chunks, and charges their users for attempts that end.

    Open chunks of the jobs whose reports this replica handles are cached as they were stored last: chunks that a worker holds until
    they end, and others, also requeued ones, at most until the next check of leases, about a second later. Another replica may have
    changed one since: a change of it loses the compare-and-set, and only `enough` decides without reading the chunk.

    Args:
        partitions: returns the partitions of scan-progress that this replica owns.
    """

    def __init__(
        self,
        chunks: ChunkRepository,
        accounts: AccountCache,
        held: HeldChunks,
        partitions: Callable[[], Collection[int]],
        clock: PlatformTime,
    ) -> None:
        self._chunks = chunks
        self._accounts = accounts
        self._held = held
        self._partitions = partitions
        self._clock = clock
        self._cached: dict[str, Chunk] = {}
        self._touched: set[int] = set()

    async def change(
        self,
        ids: Collection[str],
        decide: Callable[[Chunk], Chunk],
        now: datetime,
        *,
        charge: bool = True,
        enough: Callable[[Chunk], bool] = lambda _: False,
        prepare: Callable[[Iterable[Changed]], Awaitable[None]] | None = None,
    ) -> list[Changed]:
        """Apply `decide` to each chunk and store the changes; `decide` runs again for a chunk that lost a race.

        Args:
            ids: ids of the chunks.
            decide: returns the new version of a chunk.
            now: platform time.
            charge: whether users are charged for attempts that end; not for those of lost workers.
            enough: whether a cached chunk suffices if `decide` does not change it.
            prepare: called with the changes before they are saved.

        Raises:
            DependencyError: the database is unavailable.
        """
        done: list[Changed] = []
        left = set(ids)
        for _ in range(_ROUNDS):
            if not left:
                if charge:
                    await self._charge(done, now)
                return done
            cached = [Changed(chunk, decide(chunk)) for id_ in left if (chunk := self._cached.get(id_))]
            changes = [each for each in cached if each.after != each.before or enough(each.before)]
            if unknown := left - {each.before.id for each in changes}:
                read = await self._chunks.get(unknown)
                changes += [Changed(chunk, decide(chunk)) for chunk in read.values()]
            if prepare:
                await prepare(changes)
            for each in changes:
                self._cached.pop(each.before.id, None)
            try:
                left = await self._chunks.save([each.after for each in changes if each.after != each.before])
            finally:  # not before the save: a sweep that reads the chunks now would not find what it stores
                mine = self._partitions()
                self._touched.update(each.after.job_id for each in changes if each.after.partition in mine)
            stored = [each for each in changes if each.before.id not in left]
            for each in stored:
                if each.moved:
                    CHUNK_TRANSITIONS.labels(each.after.state).inc()
                self.cache([each.stored])
                if each.after.state not in HELD:
                    self._held.end(each.after)
            done += stored
        raise DependencyError(f"chunks were changed by other replicas {_ROUNDS} times in a row: {sorted(left)[:5]}")

    def cache(self, chunks: Iterable[Chunk]) -> None:
        """Keep those of these chunks, as they are stored, whose next change this replica probably makes."""
        mine = self._partitions()
        self._cached |= {each.id: each for each in chunks if each.state in OPEN and each.partition in mine}
        for id_ in list(islice(self._cached, max(0, len(self._cached) - _MAX_CACHED))):
            del self._cached[id_]  # the oldest

    async def queued(self, ids: Collection[str]) -> dict[str, Chunk]:
        """Return these chunks for a change that the caller stores; those that were cached may have changed since.

        Raises:
            DependencyError: the database is unavailable.
        """
        known = {id_: chunk for id_ in ids if (chunk := self._cached.pop(id_, None))}
        if unknown := set(ids) - known.keys():
            known |= await self._chunks.get(unknown)
        return known

    def take_touched(self) -> set[int]:
        """Return the jobs in partitions of this replica whose chunks it may have changed since the last call."""
        touched, self._touched = self._touched, set()
        return touched

    def verify(self, partitions: Collection[int], held: Collection[FencingToken]) -> None:
        """Keep only those of the cached chunks of jobs in these partitions whose attempts are among those that workers hold."""
        self._cached = {
            id_: chunk
            for id_, chunk in self._cached.items()
            if chunk.partition not in partitions or chunk.token in held
        }

    def forget(self, partitions: Collection[int]) -> None:
        """Remove the cached chunks of jobs in these partitions: another replica handles their reports from now on."""
        self.verify(partitions, ())

    async def _charge(self, changed: Iterable[Changed], now: datetime) -> None:
        """Charge users for attempts that have ended, by the platform's clock, but not for its steps."""
        seconds: defaultdict[int, float] = defaultdict(float)
        for each in changed:
            if each.before.state in HELD and each.after.state not in HELD:
                seconds[each.after.user_id] += elapsed(each.before, now, self._clock.stepped_at)
        await self._accounts.charge(seconds)


def stop(token: FencingToken, reason: str) -> StopChunk:
    """Return the message that ends the nmap of this token's holder."""
    return StopChunk(**token._asdict(), reason=reason)


def stops(reasons: Iterable[tuple[FencingToken, str]]) -> list[StopChunk]:
    """Return the stops of these tokens, except of those from damaged documents without a valid id of a worker."""
    stops_: list[StopChunk] = []
    for token, reason in reasons:
        try:
            stops_.append(stop(token, reason))
        except ValidationError as error:  # the scans of the other chunks must stop
            _log.error("scan_not_stopped", job_id=token.job_id, chunk_id=token.chunk_id, cause=str(error))
    return stops_


def granted(chunk: Chunk, signer: Signer) -> Grant:
    """Return the signed scope of the chunk's current attempt."""
    return signer.grant(
        job_id=chunk.job_id,
        chunk_id=chunk.id,
        attempt=chunk.attempt,
        worker_id=chunk.worker_id,
        user_id=chunk.user_id,
        first_address=chunk.first_address,
        outcomes=chunk.outcomes,
        ports=chunk.ports,
    )


def scanned_again(chunks: Iterable[Chunk], signer: Signer) -> Iterator[ChunkScanned]:
    """Yield messages that ask result-store again to check these chunks, except damaged ones with an invalid token."""
    for chunk in chunks:
        try:
            yield _scanned_again(chunk, signer)
        except ValidationError as error:  # the other chunks must be checked
            _log.error("check_not_requested", job_id=chunk.job_id, chunk_id=chunk.id, cause=str(error))


def _scanned_again(chunk: Chunk, signer: Signer) -> ChunkScanned:
    probed, run = chunk.probed or Probed(), chunk.run
    return ChunkScanned(
        job_id=chunk.job_id,
        chunk_id=chunk.id,
        attempt=chunk.attempt,
        worker_id=chunk.worker_id,
        first_address=chunk.first_address,
        outcomes=chunk.outcomes,
        slot_seconds=0.0,
        technique=chunk.technique or "connect",  # the field is required; without `nmap` it has no meaning
        grant=granted(chunk, signer),
        nmap=run.nmap if run else "",
        arguments=run.arguments if run else "",
        scripts=probed.scripts,
        common_ports=probed.common_ports,
        detection=probed.detection,
        discovery=probed.discovery,
        run=run,
    )
