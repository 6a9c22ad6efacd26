"""Store dispatched attempts and publish their assignments."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Final

import structlog

from job_orchestrator.domain import plan
from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.chunk import Chunk, ChunkState, cancel, dispatch
from job_orchestrator.domain.deletion import Stage
from job_orchestrator.domain.fairness import Candidate, Credit
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import AuditRepository, ChunkRepository, DeletionRepository, JobRepository
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.domain.user_grants import JobGrants
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.chunks.changer import ChunkChanger, granted, saved
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.handlers.dispatch.skips import Skips
from job_orchestrator.metrics import CHUNK_TRANSITIONS
from scanfleet.contracts.messages import ScanChunk
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.errors import DependencyError, Rule
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import Publisher
from scanfleet.scanning.policy import PolicyError, ScanPolicy, executable
from scanfleet.scanning.ports import PortSet
from scanfleet.security.chunk_grants import Signer

_SEND_SECONDS: Final = 1.0  # time for acknowledgements; then a round continues without the partitions that still wait
_MAX_EXPECTED: Final = 10_000  # jobs have one or two estimates each, and another one for their last chunk

_log = structlog.stdlib.get_logger(__name__)

Pick = tuple[Candidate, Credit, float]
"""A chunk, its worker, and the share of a slot that it will occupy."""


class AttemptSender:
    """Turns picks into stored attempts and their assignments.

    Args:
        publisher: publishes assignments.
        signer: signs the scope of each attempt.
        scripts: the NSE scripts that a policy may name.
        lease_seconds: lease timeout: the maximum time without a report of the chunk's worker.
        give_up: fails a job, with the reason; returns False if it cannot be failed.
        grants: the current user grants, which limit jobs and their hours.
        skips: receives the jobs that cannot be dispatched now.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        chunks: ChunkRepository,
        deletions: DeletionRepository,
        audit: AuditRepository,
        changer: ChunkChanger,
        held: HeldChunks,
        publisher: Publisher,
        signer: Signer,
        scripts: AbstractSet[str],
        lease_seconds: float,
        clock: PlatformTime,
        give_up: Callable[[int, str], Awaitable[bool]],
        grants: JobGrants,
        skips: Skips,
    ) -> None:
        self._jobs = jobs
        self._chunks = chunks
        self._deletions = deletions
        self._audit = audit
        self._changer = changer
        self._held = held
        self._publisher = publisher
        self._signer = signer
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._give_up = give_up
        self._grants = grants
        self._skips = skips
        self._scripts = frozenset(scripts)
        self._expected: dict[tuple[int, float], float] = {}
        """By job and a chunk's estimate, those dispatched last at the end: the slot seconds now expected of such a chunk."""
        self._sending: dict[int, asyncio.Task[None]] = {}
        """By partition of scan-tasks: the assignments that are not acknowledged yet."""

    def can_reach(self, worker_id: str) -> bool:
        """Return whether the partition of this worker's assignments has acknowledged the last ones."""
        return SCAN_TASKS.partition_of(worker_id) not in self._sending

    def expect(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the slot seconds expected of the last chunk like it that was dispatched.

        They follow from the chunks of its job that have ended since the candidate was created.
        """
        expected = self._expected.get((candidate.job_id, candidate.estimate))
        return candidate if expected is None else replace(candidate, estimate=expected)

    async def send(self, picks: Sequence[Pick]) -> bool:
        """Dispatch the picked chunks; return whether another round may dispatch more.

        Some may not be dispatched, because another replica changed them or their job ended; others of the job may be shorter than
        was known, so that workers can prefetch them. Chunks whose assignment cannot be sent are requeued when their leases expire.

        Raises:
            DependencyError: chunks may be dispatched whose assignment was not sent.
        """
        now = self._clock.now()
        jobs, chunks = await asyncio.gather(
            self._jobs.get({candidate.job_id for candidate, _, _ in picks}),
            self._changer.queued([candidate.chunk_id for candidate, _, _ in picks]),
        )
        leaderless = self._held.leaderless()
        over: list[str] = []
        due: dict[str, tuple[Chunk, ScanChunk]] = {}
        refused: dict[int, Candidate] = {}
        closed: dict[tuple[int, str], ScanJob] = {}
        lost: set[int] = set()
        shorter = False
        for candidate, worker, share in picks:
            job, chunk = jobs.get(candidate.job_id), chunks.get(candidate.chunk_id)
            if job is None or chunk is None:
                self._skips.skip(candidate, "unreadable document")
                lost |= {candidate.job_id} if job is None else set()
                continue
            try:
                if job.final:
                    over.append(chunk.id)
                elif self._grants.refusal(job) or _problem(job.policy, self._scripts):
                    refused[job.id] = candidate
                elif self._grants.closed(job, now):
                    closed[job.user_id, job.granted_by] = job
                elif job.partition in leaderless:
                    self._skips.await_leader(candidate)
                elif chunk.state is ChunkState.QUEUED:
                    size = plan.attempt_size(job, chunk)
                    estimate = plan.expected(job, PortSet.parse(chunk.ports), size)
                    attempt = dispatch(chunk, worker.worker_id, now, size=size, share=share, estimate=estimate)
                    due[chunk.id] = attempt, self._assignment(attempt, job)
                    shorter |= self._learn(job, chunk, candidate.estimate)
            except Exception as error:  # noqa: BLE001 # an error of one job must not stop the others
                self._skips.skip(candidate, repr(error))
        losers = await self._store([chunk for chunk, _ in due.values()])
        sent = [assignment for id_, (_, assignment) in due.items() if id_ not in losers]
        CHUNK_TRANSITIONS.labels(ChunkState.DISPATCHED).inc(len(sent))
        traces = {assignment.chunk_id: assignment.traceparent for assignment in sent}
        with tracing.spans("dispatch chunk", traces, "producer", "scanfleet.chunk.id") as onward:
            assignments = [
                assignment.model_copy(update={"traceparent": onward[assignment.chunk_id]}) for assignment in sent
            ]
            await self._publish(assignments)
        await self._cancel(over)
        for job_id, candidate in refused.items():
            await self._refuse(jobs[job_id], candidate)
        await self._await_hours(closed.values(), now)
        # A replica that stalled may have stored chunks of a job after its deletion was done.
        await self._deletions.advance(lost, Stage.DONE, Stage.CHUNKS, now)
        return shorter or len(sent) < len(picks)

    async def _publish(self, assignments: Iterable[ScanChunk]) -> None:
        """Publish the assignments; a partition without a leader delays only its own workers."""
        by_partition: defaultdict[int, list[ScanChunk]] = defaultdict(list)
        for assignment in assignments:
            by_partition[SCAN_TASKS.partition_of(assignment.worker_id)].append(assignment)
        sending = {
            partition: asyncio.create_task(self._publish_to(partition, each))
            for partition, each in by_partition.items()
        }
        self._sending |= sending
        if sending:
            sent, _ = await asyncio.wait(sending.values(), timeout=_SEND_SECONDS)
            for each in sent:
                each.result()

    async def _publish_to(self, partition: int, assignments: Sequence[ScanChunk]) -> None:
        try:
            await self._publisher.publish(SCAN_TASKS, assignments)
        except DependencyError as error:
            _log.warning(
                "publish_failed",
                topic=SCAN_TASKS.name,
                messages=len(assignments),
                error=str(error),
                next_step="the chunks are requeued when their leases expire",
            )
        finally:
            del self._sending[partition]

    async def _store(self, dispatched: Sequence[Chunk]) -> set[str]:
        """Store these chunks, which count as held from now on; return the ids of those that another replica has changed."""
        try:
            losers = await self._chunks.save(dispatched)
        except DependencyError:
            self._held.expire()
            raise
        if losers:
            self._held.expire()
        stored = [saved(chunk) for chunk in dispatched if chunk.id not in losers]
        self._held.add(stored)
        self._changer.cache(stored)
        return losers

    def _learn(self, job: ScanJob, chunk: Chunk, before: float) -> bool:
        """Keep the expected slot seconds of the chunk for the job's others like it; return whether they are fewer than `before`."""
        if chunk.attempt:
            return False  # it has fewer addresses left than the others
        key = job.id, chunk.estimate
        self._expected.pop(key, None)
        self._expected[key] = expected = plan.expected_of(job, chunk)
        if len(self._expected) > _MAX_EXPECTED:
            del self._expected[next(iter(self._expected))]
        return expected < before

    async def _refuse(self, job: ScanJob, candidate: Candidate) -> None:
        """Fail a job that the user grants or the scripts no longer allow, or skip it if it cannot be failed.

        They have changed since it was accepted.
        """
        if reason := self._grants.refusal(job):
            error = f"the user grants no longer allow the job: {reason}"
            target = f"/api/v1/task/{job.id}"
            entry = own_entry(
                f"dispatch-{job.id}", "dispatch_task", target, "refused", Rule.GRANT, user_id=job.user_id, reason=reason
            )
            await record(self._audit, [entry])
        else:
            error = f"the job's policy is no longer allowed: {_problem(job.policy, self._scripts)}"
        if not await self._give_up(job.id, error):
            self._skips.skip(candidate, f"cannot be failed; {error}")

    async def _await_hours(self, jobs: Iterable[ScanJob], now: datetime) -> None:
        for job in jobs:
            opens_at = self._grants.opens_at(job, now)
            await self._skips.await_hours(job, opens_at - now if opens_at else None)

    async def _cancel(self, over: Collection[str]) -> None:
        """Cancel chunks of a job that ended while another replica was still creating them."""
        if over:
            await self._changer.change(
                over,
                lambda chunk: cancel(chunk) if chunk.state is ChunkState.QUEUED else chunk,
                self._clock.now(),
            )

    def _assignment(self, chunk: Chunk, job: ScanJob) -> ScanChunk:
        ports = PortSet.parse(chunk.ports)
        left = self._grants.open_for(job, self._clock.now())
        return ScanChunk(
            job_id=chunk.job_id,
            chunk_id=chunk.id,
            attempt=chunk.attempt,
            worker_id=chunk.worker_id,
            user_id=chunk.user_id,
            first_address=chunk.first_address,
            outcomes=chunk.outcomes,
            policy=job.policy,
            ports=chunk.ports,
            lease_seconds=self._lease_seconds,
            estimate_seconds=chunk.expected,
            failures=chunk.failures,
            limit=chunk.attempted if chunk.limit or chunk.attempted < chunk.blank else None,
            max_rate=plan.nmap_rate(job.policy, job.plan.parallel),
            min_rate=plan.min_rate(job.policy, ports, job.plan.parallel),
            grant=granted(chunk, self._signer),
            granted_by=job.granted_by,
            stop_after_seconds=left.total_seconds() if left is not None else None,
            traceparent=job.traceparent,
        )


@lru_cache(maxsize=64)  # a long list of ports takes milliseconds, and each chunk of the job is checked
def _problem(policy: ScanPolicy, scripts: frozenset[str]) -> str:
    """Return why workers do not execute the policy; empty if they do."""
    try:
        executable(policy, scripts)
    except PolicyError as error:
        return str(error)
    return ""
