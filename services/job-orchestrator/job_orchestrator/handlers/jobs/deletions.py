"""Delete ended jobs: first from every query, then, once no worker scans for them, their results, then their chunks.

An event for subscribers completes the deletion.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import structlog

from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.domain.deletion import REASONS, Counts, Deletion, Stage, announcement, is_own, request
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import (
    AuditRepository,
    ChunkRepository,
    DeletionRepository,
    JobRepository,
    RetentionRepository,
)
from job_orchestrator.domain.retention import EndedJob, is_due
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.metrics import DELETED_CHUNKS, DELETED_JOBS, DELETIONS, RETENTION_HALTED
from scanfleet.contracts.messages import DeleteResults, ResultsDeleted
from scanfleet.contracts.messages.deletions import DeletionReason
from scanfleet.contracts.messages.topics import SCAN_CHANGES, SCAN_DELETIONS
from scanfleet.errors import MessageError
from scanfleet.runtime.best_effort import best_effort, try_publish
from scanfleet.runtime.bus import Publisher, Record
from scanfleet.runtime.loop import Loop

_STEP_SECONDS: Final = 1.0  # interval of steps while deletions are due
_LOOK_SECONDS: Final = 10.0  # interval of looks for deletions that another replica accepted and left, when it stopped
_AT_ONCE: Final = 100  # maximum number of deletions per step
_ASK_AGAIN: Final = timedelta(seconds=60)  # interval of repeated requests: deleting a large job may take this long
_ANNOUNCE_AGAIN: Final = timedelta(seconds=60)  # interval of events that are not acknowledged
_ANNOUNCED_LATER: Final = (
    "the events are published again after a minute; "
    "if the topic or its ACL is missing, run python -m scanfleet.kafka create-topics and create-acls"
)
_EXPIRE_SECONDS: Final = 600.0  # interval of walks over the ended jobs
_LOOK: Final = 500  # number of ended jobs read per step of a walk; most of them may not be due
_ROUNDS: Final = 20  # each lost race is a job whose outbox was emptied

_log = structlog.stdlib.get_logger(__name__)


class Deletions:
    """Handles scan-deletions. Runs on every replica; concurrent steps are harmless.

    Args:
        keys: sign these requests.
        publisher: for requests to result-store, and for subscribers.
        cancel_chunks: cancels some chunks of a job that are not final, with the reason; returns whether there were any.
        keep: age after the end at which jobs are deleted, unless their subnet has its own; None deletes none by age.
        per_second: maximum number of chunks that this replica deletes per second.

    Attributes:
        keep: as given.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        deletions: DeletionRepository,
        retention: RetentionRepository,
        chunks: ChunkRepository,
        audit: AuditRepository,
        keys: ChainKeys,
        publisher: Publisher,
        outbox: Outbox,
        clock: PlatformTime,
        cancel_chunks: Callable[[int, str], Awaitable[bool]],
        keep: timedelta | None,
        per_second: int,
    ) -> None:
        self._jobs = jobs
        self._deletions = deletions
        self._retention = retention
        self._chunks = chunks
        self._audit = audit
        self._keys = keys
        self._publisher = publisher
        self._outbox = outbox
        self._clock = clock
        self._cancel_chunks = cancel_chunks
        self.keep = keep
        self._per_step = round(per_second * _STEP_SECONDS)
        self._expired = float("-inf")
        self._after: tuple[datetime, int] | None = None
        """End time and id of the last job that the previous step looked at, if there may be more."""
        self.loop = Loop("deletions", _LOOK_SECONDS, self.step, least=_STEP_SECONDS, vital=False)

    async def delete(
        self, job_ids: Collection[int], reason: DeletionReason, *, requested_by: int | None = None
    ) -> set[int]:
        """Accept the deletion of those of these jobs that have ended; return their ids.

        From then on no response contains the jobs; their stored data is deleted step by step.

        Args:
            job_ids: ids of the jobs.
            reason: the reason of the deletion.
            requested_by: the user who requested it.

        Raises:
            DependencyError: some are accepted; calling again accepts the others.
        """
        now = self._clock.now()
        return await self._accept(
            [DeleteResults(job_id=id_, reason=reason, requested_by=requested_by, requested_at=now) for id_ in job_ids]
        )

    async def _accept(self, requests: Collection[DeleteResults]) -> set[int]:
        left = {request.job_id: request for request in requests}
        accepted: set[int] = set()
        for _ in range(_ROUNDS):
            ended = [job for job in (await self._jobs.get(left)).values() if job.final]
            await self._outbox.publish(ended)  # their outboxes are deleted with them
            for job in ended:
                if not job.settled:  # the dispatcher must find no chunk without a job
                    await self._cancel_chunks(job.id, "job deleted")
            receipts = [self._receipt(job, left[job.id]) for job in ended]
            done = await asyncio.gather(*map(self._deletions.begin, ended, receipts))
            for receipt, is_done in zip(receipts, done, strict=True):
                DELETIONS.labels(receipt.reason).inc(is_done)
            accepted |= {job.id for job, is_done in zip(ended, done, strict=True) if is_done}
            left = {job.id: left[job.id] for job in ended if job.id not in accepted}
            if not left:
                break
        if accepted:
            self.loop.wake()
        return accepted

    def _receipt(self, job: ScanJob, request: DeleteResults) -> Deletion:
        return Deletion(
            job_id=job.id,
            user_id=job.user_id,
            subnet_id=job.subnet_id,
            reason=request.reason,
            requested_by=request.requested_by,
            requested_at=request.requested_at or self._clock.now(),
            stage=Stage.RESULTS if job.settled else Stage.WAITING,
        )

    async def step(self) -> None:
        """Continue accepted deletions, and accept those of expired jobs.

        Raises:
            DependencyError: the next step does what this one left.
        """
        await self._expire()
        now = self._clock.now()
        due = await self._deletions.due(now, _AT_ONCE, chunks=False)
        without_results = await self._deletions.due(now, _AT_ONCE, chunks=True)
        if due or without_results or self._after is not None:
            self.loop.wake()  # the next step may find more
        waiting = [each.job_id for each in due if each.stage is Stage.WAITING]
        stopped = [id_ for id_ in waiting if not await self._cancel_chunks(id_, "job deleted")]
        await self._deletions.advance(stopped, Stage.WAITING, Stage.RESULTS, now)
        asked = [each for each in due if each.stage is Stage.RESULTS]
        requests = [request(each, self._keys) for each in asked]
        await try_publish(self._publisher, SCAN_DELETIONS, requests, "result-store is asked again after a minute")
        asked_ids = [each.job_id for each in asked]
        await self._deletions.advance(asked_ids, Stage.RESULTS, Stage.RESULTS, now + _ASK_AGAIN)
        await self._delete_some(without_results, now)

    async def _delete_some(self, due: Collection[Deletion], now: datetime) -> None:
        """Delete up to a step's number of chunks; a job with more continues after the other jobs."""
        left = self._per_step
        done: list[Deletion] = []
        for each in due:
            if not left:
                break
            deleted = await self._chunks.delete(each.job_id, left)
            DELETED_CHUNKS.inc(deleted)
            if deleted < left:
                done.append(each)
            else:
                await self._deletions.advance([each.job_id], Stage.CHUNKS, Stage.CHUNKS, now)
            left -= deleted
        await self._complete(done, now)

    async def _complete(self, done: Sequence[Deletion], now: datetime) -> None:
        """Notify subscribers that nothing is left of these jobs, and complete the deletions that were acknowledged."""
        by_partition: defaultdict[int, list[Deletion]] = defaultdict(list)
        for each in done:
            by_partition[SCAN_CHANGES.partition_of(str(each.job_id))].append(each)
        answers = await asyncio.gather(*map(self._announce, by_partition.values()))
        acknowledged = [each for answer in answers for each in answer]
        for reason in REASONS:
            ended = [each.job_id for each in acknowledged if each.reason == reason]
            DELETED_JOBS.labels(reason).inc(await self._deletions.advance(ended, Stage.CHUNKS, Stage.DONE, None))
        others = [each.job_id for each in done if each not in acknowledged]
        await self._deletions.advance(others, Stage.CHUNKS, Stage.CHUNKS, now + _ANNOUNCE_AGAIN)

    async def _announce(self, deletions: Collection[Deletion]) -> Collection[Deletion]:
        """Publish the events of one partition, which may have no leader; return the deletions that the bus has acknowledged."""
        async with best_effort(SCAN_CHANGES, len(deletions), _ANNOUNCED_LATER):
            await self._publisher.publish(SCAN_CHANGES, [announcement(each) for each in deletions])
            return deletions
        return ()

    async def handle(self, records: Sequence[Record[DeleteResults | ResultsDeleted]]) -> None:
        deleted = {each.message.job_id: each.message for each in records if isinstance(each.message, ResultsDeleted)}
        await asyncio.gather(*map(self._delete_chunks, deleted.values()))
        sources = {
            each.message: f"{each.topic}/{each.partition}/{each.offset}"
            for each in records
            if isinstance(each.message, DeleteResults)
        }
        await self._repeat(sources)
        self.loop.wake()

    async def _repeat(self, sources: Mapping[DeleteResults, str]) -> None:
        """Delete jobs again that a restored backup contains.

        Otherwise no job of a request exists any more.

        Args:
            sources: the requests, with their positions in the log.

        Raises:
            MessageError: result-store or an administrator of the bus has sent the request, or a release that did not sign it.
        """
        jobs = await self._jobs.get({request.job_id for request in sources})
        repeated = {request: source for request, source in sources.items() if request.job_id in jobs}
        if forged := [request.job_id for request in repeated if not is_own(request, self._keys)]:
            raise MessageError(f"job {forged[0]} is not deleted: the signature is not one of job-orchestrator")
        entries = [
            own_entry(
                f"repeated-deletion-{request.job_id}",
                "delete_task",
                f"/api/v1/task/{request.job_id}",
                "allowed",
                "restore",
                user_id=request.requested_by,
                source=source,
                reason="the job was deleted before the restore",
            )
            for request, source in repeated.items()
            if jobs[request.job_id].final
        ]
        await record(self._audit, entries)
        await self._accept(repeated)

    async def _delete_chunks(self, message: ResultsDeleted) -> None:
        # Counted before the first is deleted, so that a repeated step counts none twice.
        chunks = await self._chunks.count(message.job_id)
        counts = Counts(hosts=message.hosts, rows=message.rows, chunks=chunks)
        await self._deletions.advance([message.job_id], Stage.RESULTS, Stage.CHUNKS, self._clock.now(), counts)

    async def _expire(self) -> None:
        now = self._clock.now()  # read with `jump`: a jump during the queries below does not change it
        if self._clock.jump is not None:
            await self._retention.halt(self._clock.jump)
            self._clock.jump, self._expired = None, float("-inf")
        if self._clock.monotonic() - self._expired < _EXPIRE_SECONDS or await self._is_halted():
            return
        shortest = await self._shortest()
        if self._after is None and await self._is_too_late(now, shortest):
            return
        due, last = await self._due(now, shortest)
        ids = (await self._jobs.get([job.id for job in due])).keys()  # without those that cannot be read
        if ids:
            await self._delete_expired(ids)
        if last is None:
            self._after, self._expired = None, self._clock.monotonic()
        else:
            self._after = (last.end_time, last.id)

    async def _delete_expired(self, ids: Collection[int]) -> None:
        expired = [
            own_entry(f"retention-{id_}", "delete_task", f"/api/v1/task/{id_}", "allowed", "retention") for id_ in ids
        ]
        await record(self._audit, expired)
        await self.delete(ids, "retention")

    async def _is_halted(self) -> bool:
        """Return whether deletion by age is halted: a clock that jumped forward would make all jobs old."""
        jump = await self._retention.halted()
        RETENTION_HALTED.set(jump is not None)
        if jump is not None:
            _log.error(
                "retention_halted",
                cause="the database's clock has jumped, or no orchestrator was running for longer than the shortest retention",
                jump_seconds=jump.total_seconds(),
                next_step="check the clock, then run python -m job_orchestrator.operator.retention resume",
            )
            self._expired = self._clock.monotonic()
        return jump is not None

    async def _is_too_late(self, now: datetime, shortest: timedelta | None) -> bool:
        """Halt deletion by age if no replica has begun a walk within the shortest retention.

        The database's clock may have jumped while no orchestrator was running; jobs that ended just before would be deleted.
        """
        before = await self._retention.begin_walk(now)
        if before is None or shortest is None or now - before <= shortest:
            return False
        await self._retention.halt(now - before)
        return await self._is_halted()

    async def _shortest(self) -> timedelta | None:
        """Return the shortest age at which jobs are deleted; None if none is deleted by age."""
        own = await self._retention.shortest()
        return min(filter(None, (self.keep, timedelta(days=own or 0))), default=None)

    async def _due(self, now: datetime, shortest: timedelta | None) -> tuple[list[EndedJob], EndedJob | None]:
        """Return the next jobs to delete by age, and the job after which the walk continues; None at its end."""
        page: list[EndedJob] = []
        due: list[EndedJob] = []
        if shortest is not None:
            page = await self._jobs.expired(now - shortest, _LOOK, self._after)
            subnets = await self._retention.of({job.subnet_id for job in page})
            due = [job for job in page if is_due(job, subnets.get(job.subnet_id), self.keep, now)]
        last = due[_AT_ONCE - 1] if len(due) > _AT_ONCE else page[-1] if len(page) == _LOOK else None
        return due[:_AT_ONCE], last
