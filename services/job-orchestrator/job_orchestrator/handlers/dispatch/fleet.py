"""Track the workers whose announcements this replica reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from job_orchestrator.domain.fairness import Credit
from job_orchestrator.domain.ports import DispatchRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.metrics import DUPLICATE_WORKERS, IGNORED_WORKERS
from scanfleet.contracts.messages import FencingToken, WorkerReady
from scanfleet.runtime.bus import PartitionListener, Record

# Workers announce themselves every 2 s; after three missed announcements they get no chunks.
_SILENT_SECONDS: Final = 7.0
_NOTED_SECONDS: Final = 5.0  # interval at which a worker's announcements are stored
_PROCESSES: Final = 8  # of one name, by which more than two that run at once are recognised
_LOGGED: Final = 20  # instances that a log event names in a minute: a compromised worker may announce any number

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
        max_workers: maximum number of instances; announcements of others are ignored until one of them is silent.
        requeue_lost: requeues these attempts of dead workers, with the reason.
        wake: called after announcements: a worker may have a free slot.
    """

    def __init__(
        self,
        *,
        dispatch: DispatchRepository,
        held: HeldChunks,
        lease_seconds: float,
        max_workers: int,
        clock: PlatformTime,
        requeue_lost: Callable[[Collection[FencingToken], str], Awaitable[None]],
        wake: Callable[[], None],
    ) -> None:
        self._dispatch = dispatch
        self._held = held
        self._clock = clock
        self._requeue_lost = requeue_lost
        self._wake = wake
        # A worker whose leases have expired does not get the chunk again.
        self._silent_seconds = min(_SILENT_SECONDS, lease_seconds)
        self._max_workers = max_workers
        self._workers: dict[str, _Announced] = {}
        """By instance: a new process replaces the previous one."""
        self._caught_up: set[int] = set()
        self._logged: defaultdict[str, set[str]] = defaultdict(set)
        """The instances that the log names in this minute, by fault."""
        self._minute = 0

    async def handle(self, records: Sequence[Record[WorkerReady]]) -> None:
        now = self._clock.monotonic()
        self._remove_silent(now)
        room = self._max_workers - len(self._workers)
        announced: dict[str, _Announced] = {}
        for each in records:
            ready = each.message
            if ready.instance not in self._workers and ready.instance not in announced:
                if room <= 0:
                    self._report_ignored(ready.instance, now)
                    continue
                room -= 1
            credit = Credit(ready.worker_id, ready.instance, ready.slots, ready.raw, each.partition)
            before = announced.get(ready.instance) or self._workers.get(ready.instance)
            latest = _Announced(credit, now, now, each.offset, (ready.worker_id,))
            announced[ready.instance] = self._follow(before, latest) if before else latest
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
        self._remove_silent(self._clock.monotonic())
        return [each.credit for each in self._workers.values() if each.credit.partition in self._caught_up]

    def _remove_silent(self, now: float) -> None:
        self._workers = {id_: each for id_, each in self._workers.items() if each.at > now - self._silent_seconds}

    def _is_noted(self, credit: Credit, now: float) -> bool:
        known = self._workers.get(credit.instance)
        return known is not None and known.credit == credit and now - known.noted < _NOTED_SECONDS

    def _follow(self, before: _Announced, ready: _Announced) -> _Announced:
        """Return the announcement after that `before`; report a process that announces slots although another has replaced it."""
        processes = before.processes
        if ready.credit.slots and ready.credit.worker_id != processes[0]:  # without slots it may be leaving
            if ready.credit.worker_id in processes and ready.offset > before.offset:  # not a redelivered announcement
                self._report_duplicate(ready.credit.instance, ready.at)
            processes = (ready.credit.worker_id, *processes)[:_PROCESSES]
        return replace(ready, offset=max(before.offset, ready.offset), processes=processes)

    def _report_duplicate(self, instance: str, now: float) -> None:
        DUPLICATE_WORKERS.inc()
        if self._may_log("duplicate", instance, now):
            _log.error(
                "worker_name_duplicated",
                instance=instance,
                cause="two running workers announce themselves under this name, and each loses the chunks of the other",
                next_step="set a different SCANFLEET_INSTANCE for each worker",
            )

    def _report_ignored(self, instance: str, now: float) -> None:
        IGNORED_WORKERS.inc()
        if self._may_log("ignored", instance, now):
            _log.error(
                "worker_ignored",
                instance=instance,
                cause=f"this replica already has {self._max_workers} worker instances",
                next_step="if you run as many, raise SCANFLEET_MAX_WORKERS; otherwise a worker is compromised: see security.md",
            )

    def _may_log(self, event: str, instance: str, now: float) -> bool:
        if (minute := int(now // 60)) != self._minute:
            self._minute = minute
            self._logged.clear()
        logged = self._logged[event]
        if new := len(logged) < _LOGGED and instance not in logged:
            logged.add(instance)
        return new
