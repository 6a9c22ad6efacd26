"""Job events, for whoever watches a job: each state once, none after a later one, and in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from api_gateway.metrics import STREAMS
from scanfleet.bus import Record
from scanfleet.errors import UnavailableError
from scanfleet.messages import JobEvent, JobStatus
from scanfleet.rest import Snapshot, TaskProgress, TaskStatus


class Watch:
    """One look at one job. It keeps at most one state for each status: the latest that was not told yet."""

    def __init__(self) -> None:
        self.ended = False
        self._seq = 0  # the highest heard
        self._waiting: dict[JobStatus, Snapshot] = {}
        self._news = asyncio.Event()

    def begin(self, now: Snapshot) -> None:
        """Tell this first, or what was heard since it was true; nothing older."""
        newer = {status: heard for status, heard in self._waiting.items() if heard.seq > now.seq}
        self._waiting = {now.task.status.status: now} | newer
        self._seq = max(self._seq, now.seq)
        self._news.set()

    def hear(self, snapshot: Snapshot) -> None:
        """Tell this next, unless it is old or a duplicate."""
        if snapshot.seq > self._seq:
            self._seq = snapshot.seq
            self._waiting[snapshot.task.status.status] = snapshot
            self._news.set()

    def end(self) -> None:
        self.ended = True
        self._news.set()

    async def next(self, until: float) -> Snapshot | None:
        """The state to tell next; None when there was none until then (on the loop's clock), or the watch has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not (self._waiting or self.ended):
                    self._news.clear()
                    await self._news.wait()
        if self.ended or not self._waiting:
            return None
        return self._waiting.pop(next(iter(self._waiting)))


class Watches:
    """All looks at jobs of this process. It handles all of scan-events: the job may be in any partition."""

    def __init__(self) -> None:
        self._by_job: defaultdict[int, set[Watch]] = defaultdict(set)
        self._ended = False

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            event = record.message
            if isinstance(event, JobEvent) and event.job.id in self._by_job:
                snapshot = _snapshot(event)
                for watch in self._by_job[event.job.id]:
                    watch.hear(snapshot)

    async def assigned(self, partitions: Collection[int]) -> None:
        """Nothing is kept by partition."""

    async def revoked(self, partitions: Collection[int]) -> None:
        """Nothing is kept by partition."""

    async def caught_up(self, partitions: Collection[int]) -> None:
        """What was not heard a watch asks for."""

    @contextmanager
    def watch(self, job_id: int) -> Iterator[Watch]:
        """Hear every event of the job that is read from now on.

        Raises:
            UnavailableError: this process is about to end.
        """
        if self._ended:
            raise UnavailableError("this replica is about to end; try again")
        watch = Watch()
        self._by_job[job_id].add(watch)
        STREAMS.inc()
        try:
            yield watch
        finally:
            STREAMS.dec()
            self._by_job[job_id].remove(watch)
            if not self._by_job[job_id]:
                del self._by_job[job_id]

    def end(self) -> None:
        """End every watch, and begin none any more."""
        self._ended = True
        for watches in self._by_job.values():
            for watch in watches:
                watch.end()


def _snapshot(event: JobEvent) -> Snapshot:
    progress = TaskProgress(
        status=event.job.status,
        progress=event.progress,
        machines_found=event.machines_found,
        error=event.error,
    )
    return Snapshot(seq=event.seq, task=TaskStatus(job_id=str(event.job.id), status=progress, job=event.job))
