"""Track the workers whose announcements this replica reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import structlog

from job_orchestrator.domain.chunk import Token
from job_orchestrator.domain.fairness import Credit
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.held import HeldChunks
from job_orchestrator.metrics import DUPLICATE_WORKERS
from scanfleet.contracts.messages import WorkerReady
from scanfleet.runtime.bus import PartitionListener, Record

_SILENT_SECONDS: Final = (
    7.0  # workers announce themselves every 2 s; after three missed announcements they get no chunks
)
_NOTED_SECONDS: Final = 5.0  # interval at which a worker's announcements are stored

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Announced:
    credit: Credit
    at: float
    noted: float
    offset: int
    processes: tuple[str, ...]
    """The latest process of the instance with slots, and the one before it."""


class Fleet(PartitionListener):
    """Handles scan-workers: the capacity of the workers whose partitions this replica owns.

    Args:
        lease_seconds: lease timeout: the maximum time without a report of the chunk's worker.
        requeue_lost: requeues these attempts of dead workers, with the reason.
        wake: starts a round of dispatch, since a worker may have a free slot.
    """

    def __init__(
        self,
        *,
        dispatch: DispatchRepository,
        held: HeldChunks,
        lease_seconds: float,
        clock: PlatformTime,
        requeue_lost: Callable[[Collection[Token], str], Awaitable[None]],
        wake: Callable[[], None],
    ) -> None:
        self._dispatch = dispatch
        self._held = held
        self._clock = clock
        self._requeue_lost = requeue_lost
        self._wake = wake
        self._silent_seconds = min(
            _SILENT_SECONDS, lease_seconds
        )  # a worker whose leases have expired does not get the chunk again
        self._workers: dict[str, _Announced] = {}
        """By instance: a new process replaces the previous one."""
        self._caught_up: set[int] = set()

    async def handle(self, records: Sequence[Record[WorkerReady]]) -> None:
        now = self._clock.monotonic()
        announced: dict[str, _Announced] = {}
        for each in records:
            ready = each.message
            credit = Credit(ready.worker_id, ready.instance, ready.slots, ready.raw, each.partition)
            before = announced.get(ready.instance) or self._workers.get(ready.instance)
            latest = _Announced(credit, now, now, each.offset, (ready.worker_id,))
            announced[ready.instance] = _follow(before, latest) if before else latest
        noted = {id_: self._workers[id_].noted for id_, each in announced.items() if self._is_noted(each.credit, now)}
        await self._dispatch.seen_workers([each.credit for id_, each in announced.items() if id_ not in noted])
        # The dispatcher may have removed silent workers meanwhile.
        self._workers |= {id_: replace(each, noted=noted.get(id_, now)) for id_, each in announced.items()}
        self._wake()

    async def revoked(self, partitions: Collection[int]) -> None:
        self._caught_up -= set(partitions)
        self._workers = {
            instance: each for instance, each in self._workers.items() if each.credit.partition not in partitions
        }

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Treat the announcements in these partitions as current.

        The last one of an instance is of its running process: chunks that another process of the instance holds are lost.
        """
        # First: the previous owner of a partition may just have dispatched chunks to its workers.
        held = await self._held.read()
        self._caught_up |= set(partitions)
        living = {
            instance: each.credit.worker_id
            for instance, each in self._workers.items()
            if each.credit.partition in self._caught_up
        }
        lost = {each.token for each in held if living.get(each.instance, each.token.worker_id) != each.token.worker_id}
        await self._requeue_lost(lost, "was replaced by another process")

    def credits(self) -> list[Credit]:
        """Return the announced capacity of each worker of this replica that still announces itself."""
        now = self._clock.monotonic()
        self._workers = {id_: each for id_, each in self._workers.items() if each.at > now - self._silent_seconds}
        return [each.credit for each in self._workers.values() if each.credit.partition in self._caught_up]

    def _is_noted(self, credit: Credit, now: float) -> bool:
        known = self._workers.get(credit.instance)
        return known is not None and known.credit == credit and now - known.noted < _NOTED_SECONDS


def _follow(before: _Announced, ready: _Announced) -> _Announced:
    """Return the announcement after that `before`; report a process that announces slots although another has replaced it."""
    processes = before.processes
    if ready.credit.slots and ready.credit.worker_id != processes[0]:  # without slots it may be leaving
        if ready.credit.worker_id in processes and ready.offset > before.offset:  # not a redelivered announcement
            DUPLICATE_WORKERS.inc()
            _log_duplicate(ready.credit.instance, int(ready.at // 60))
        processes = (ready.credit.worker_id, processes[0])
    return replace(ready, offset=max(before.offset, ready.offset), processes=processes)


@lru_cache(maxsize=1_000)  # two processes replace each other every second
def _log_duplicate(instance: str, minute: int) -> None:  # noqa: ARG001 # the key of the cache
    _log.error(
        "duplicate_worker_name",
        instance=instance,
        cause="two running workers announce themselves under this name, and each loses the chunks of the other",
        next_step="set a different SCANFLEET_INSTANCE for each worker",
    )
