"""Cancel the chunks of ended jobs, and stop the scans of those that workers hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from job_orchestrator.domain.chunk import HELD, OPEN, ChunkState, cancel
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import ChunkRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.chunks.changer import STOPPED_LATER, ChunkChanger, stops
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.runtime.best_effort import try_publish
from scanfleet.runtime.bus import Publisher

_PAGE: Final = 1_000  # chunks cancelled at once: about 50 ms, then other jobs are processed


def reason(job: ScanJob) -> str:
    """Return why the scans of an ended job are stopped."""
    return f"job {job.status}"


def reasons(jobs: Iterable[ScanJob]) -> dict[int, str]:
    """Return the same by id, of those jobs that have ended and may have open chunks."""
    return {job.id: reason(job) for job in jobs if job.final and not job.settled}


class ChunkCanceller:
    """Cancels chunks of jobs that have ended. A job that is interrupted meanwhile is repeated by the next sweep."""

    def __init__(
        self, *, chunks: ChunkRepository, changer: ChunkChanger, publisher: Publisher, clock: PlatformTime
    ) -> None:
        self._chunks = chunks
        self._changer = changer
        self._publisher = publisher
        self._clock = clock

    async def stop_scans(self, reasons: Mapping[int, str]) -> bool:
        """Cancel all chunks of these ended jobs that workers hold.

        Args:
            reasons: for the workers, by id of the job.

        Returns:
            Whether there were any.

        Raises:
            DependencyError: the next sweep stops the others.
        """
        stopped = False
        while reasons and await self.cancel(reasons, HELD):
            stopped = True
        return stopped

    async def cancel_page(self, job_id: int, reason: str) -> bool:
        """Cancel a page of the job's chunks that are not final, first those that are being scanned.

        Args:
            job_id: id of the job, which has ended and may be deleted.
            reason: for the workers that scan.

        Returns:
            Whether any chunk was cancelled; then there may be more.
        """
        stopped = await self.stop_scans({job_id: reason})
        return await self.cancel({job_id: reason}, OPEN - HELD) or stopped

    async def cancel(self, reasons: Mapping[int, str], states: Collection[ChunkState] = OPEN) -> bool:
        """Cancel a page of the chunks of these ended jobs in these states; return whether there were any."""
        changed = await self._changer.change(
            await self._chunks.ids_in(reasons, states, _PAGE),
            lambda chunk: cancel(chunk) if chunk.state in OPEN else chunk,
            self._clock.now(),
        )
        held = [each.before for each in changed if each.moved and each.before.state in HELD]
        stopped = stops((chunk.token, reasons[chunk.job_id]) for chunk in held)
        await try_publish(self._publisher, SCAN_TASKS, stopped, STOPPED_LATER)
        return any(each.moved for each in changed)
