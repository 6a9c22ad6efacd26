"""Deletes finished jobs: first from view, then their results, then their chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Final

from job_orchestrator.domain.deletion import Deletion, Reason, Stage
from job_orchestrator.domain.store import Store
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.jobs import Jobs
from job_orchestrator.metrics import DELETED_JOBS, DELETIONS
from scanfleet.audit import write_line
from scanfleet.bus import Publisher, Record
from scanfleet.clock import utc_now
from scanfleet.loop import Loop
from scanfleet.messages import AuditEntry, DeleteResults, ResultsDeleted
from scanfleet.messages.topics import ORCHESTRATOR, SCAN_DELETIONS

_STEP_SECONDS: Final = 1.0
_CHUNKS: Final = 2_000  # deleted in one step: what this costs the database is a fraction of what dispatch may need
_AT_ONCE: Final = 100  # deletions that one step goes on with
_ASK_AGAIN: Final = timedelta(seconds=60)  # for result-store to delete what a large job has found
_EXPIRE_SECONDS: Final = 10.0  # between two looks for jobs that are too old, of which `_AT_ONCE` are deleted
_ROUNDS: Final = 20  # each lost race is the outbox of a job that was emptied


class Deletions:
    """Handles scan-deletions. Runs on every replica; two of them do no harm.

    Args:
        store: where jobs and chunks are.
        publisher: for requests to result-store.
        jobs: publishes what is left in the outboxes of the jobs.
        clock: the platform's time.
        keep: age after the end at which jobs are deleted; None deletes none by age.
    """

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        jobs: Jobs,
        clock: PlatformTime,
        *,
        keep: timedelta | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._jobs = jobs
        self._clock = clock
        self._keep = keep
        self._monotonic = monotonic
        self._expired = float("-inf")
        self.loop = Loop("deletions", _STEP_SECONDS, self.step, vital=False)

    async def delete(self, job_ids: Collection[int], reason: Reason) -> set[int]:
        """Accept the deletion of those of these jobs that have ended with all their chunks; answers which.

        From then on the jobs are in no answer; what was stored of them is deleted step by step.

        Raises:
            DependencyError: some are accepted; calling again accepts the others.
        """
        accepted: set[int] = set()
        left = set(job_ids)
        for _ in range(_ROUNDS):
            ended = [job for job in (await self._store.jobs(left)).values() if job.settled]
            await self._jobs.publish_outboxes(ended)  # what their outboxes hold goes with them
            now = self._clock.now()
            for job in ended:
                receipt = Deletion(
                    job_id=job.id, user_id=job.user_id, subnet_id=job.subnet_id, reason=reason, requested_at=now
                )
                if await self._store.delete_job(job, receipt):
                    DELETIONS.labels(reason).inc()
                    accepted.add(job.id)
            left = {job.id for job in ended} - accepted
            if not left:
                break
        if accepted:
            self.loop.wake()
        return accepted

    async def step(self) -> None:
        """Go on with what was accepted, and accept what is too old.

        Raises:
            DependencyError: the next step does what this one left.
        """
        await self._expire()
        now = self._clock.now()
        due = await self._store.due_deletions(now, _AT_ONCE)
        asked = [each for each in due if each.stage is Stage.RESULTS]
        await self._publisher.publish(
            SCAN_DELETIONS, [DeleteResults(job_id=each.job_id, reason=each.reason) for each in asked]
        )
        for each in asked:
            await self._store.advance_deletion(each.job_id, Stage.RESULTS, Stage.RESULTS, now + _ASK_AGAIN)
        left = _CHUNKS
        for each in due:
            if each.stage is Stage.CHUNKS and left:
                deleted = await self._store.delete_chunks(each.job_id, left)
                if deleted < left:
                    await self._store.advance_deletion(each.job_id, Stage.CHUNKS, Stage.DONE, None)
                    DELETED_JOBS.inc()
                else:
                    self.loop.wake()
                left -= deleted

    async def handle(self, records: Sequence[Record]) -> None:
        messages = [record.message for record in records]
        for message in messages:
            if isinstance(message, ResultsDeleted):
                await self._store.advance_deletion(message.job_id, Stage.RESULTS, Stage.CHUNKS, self._clock.now())
        # Our own: they find nothing, except after the database was set back to a backup, when the topic is read again.
        for reason in ("request", "retention"):
            ids = {each.job_id for each in messages if isinstance(each, DeleteResults) and each.reason == reason}
            await self.delete(ids, reason)
        self.loop.wake()

    async def assigned(self, partitions: Collection[int]) -> None: ...

    async def revoked(self, partitions: Collection[int]) -> None: ...

    async def caught_up(self, partitions: Collection[int]) -> None: ...

    async def _expire(self) -> None:
        if self._keep is None or self._monotonic() - self._expired < _EXPIRE_SECONDS:
            return
        self._expired = self._monotonic()
        ids = await self._store.expired_jobs(self._clock.now() - self._keep, _AT_ONCE)
        if not ids:
            return
        entries = [_audit_entry(id_) for id_ in ids]
        await self._store.add_audit(entries)  # one of the same id stays as it is
        for entry in entries:
            write_line(entry)
        await self.delete(ids, "retention")


def _audit_entry(job_id: int) -> AuditEntry:
    return AuditEntry(
        id=f"retention-{job_id}",
        time=utc_now(),
        service=ORCHESTRATOR,
        subject="",
        source="",
        action="delete_task",
        target=f"/api/v1/task/{job_id}",
        decision="allowed",
        rule="retention",
        request_id="",
    )
