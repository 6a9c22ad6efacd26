"""Dispatch queued chunks to workers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

import structlog

from job_orchestrator.domain import fairness, plan
from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.chunk import Chunk, ChunkState, Token, cancel, dispatch
from job_orchestrator.domain.deletion import Stage
from job_orchestrator.domain.fairness import Candidate, Credit, Held
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ports import (
    AuditRepository,
    ChunkRepository,
    DeletionRepository,
    DispatchRepository,
    JobRepository,
)
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.domain.user_grants import JobGrants
from job_orchestrator.handlers.audit import record
from job_orchestrator.handlers.chunks import ChunkChanger, granted
from job_orchestrator.metrics import CHUNK_TRANSITIONS, SKIPPED_JOBS
from scanfleet.contracts.messages import ScanChunk, WorkerReady
from scanfleet.contracts.messages.topics import SCAN_TASKS
from scanfleet.errors import Rule
from scanfleet.runtime import tracing
from scanfleet.runtime.bus import PartitionListener, Publisher, Record
from scanfleet.runtime.loop import Loop
from scanfleet.scanning.ports import PortSet
from scanfleet.security.chunk_grants import Signer

_SILENT_SECONDS: Final = (
    7.0  # workers announce themselves every 2 s; after three missed announcements they get no chunks
)
_LOOK_SECONDS: Final = 0.1  # maximum wait of an idle worker for a chunk that another replica queued
_LEAST_SECONDS: Final = (
    0.025  # minimum interval of rounds: workers have prefetched work, and finished chunks are batched
)
_STOP_SECONDS: Final = (
    3.0  # for a round that has stored its dispatches, to publish their tasks before the process stops
)
_NOTED_SECONDS: Final = 5.0  # interval at which a worker's announcements are stored
_EXTRA: Final = 20  # approximate number of prefetched chunks for 2 seconds; more are picked in the next round
_USERS: Final = 64  # maximum users per round, those with the lowest virtual time
_REST_SECONDS: Final = 1.0  # interval of checks for idle users and live workers
_AHEAD_SECONDS: Final = 1.0  # interval of checks for small chunks while every slot is taken, unless chunks were created
_PICKS: Final = 128  # maximum chunks per round, so that a round reads some thousands at most
_SKIP_SECONDS: Final = 60.0  # for which a job whose documents cannot be read is skipped
_CLOSED_SECONDS: Final = 600.0  # for which jobs outside their hours are: the clock stops while a machine is suspended
_LEFT_OUT_SECONDS: Final = 10.0  # for which a user with only such jobs is; a new job that another replica created waits
_JOBS: Final = 100_000  # unfinished jobs of a user under one grant: far above the quota

_log = structlog.get_logger()

_Key = TypeVar("_Key")

_Pick = tuple[Candidate, Credit, float]
"""A chunk, its worker, and the share of a slot that it will occupy."""


@dataclass(frozen=True, slots=True)
class _Announced:
    credit: Credit
    at: float
    noted: float


class Dispatcher(PartitionListener):
    """Handles scan-workers, and dispatches chunks to the workers whose partitions this replica owns.

    Args:
        publisher: publishes tasks.
        signer: signs the scope of each attempt.
        lease_seconds: lease timeout: the maximum time without a report of the chunk's worker.
        requeue_lost: requeues these attempts of dead workers, with the reason.
        give_up: fails a job, with the reason.
        grants: the current user grants, which limit jobs and their hours.
    """

    def __init__(
        self,
        *,
        jobs: JobRepository,
        chunks: ChunkRepository,
        dispatch: DispatchRepository,
        deletions: DeletionRepository,
        audit: AuditRepository,
        changer: ChunkChanger,
        publisher: Publisher,
        signer: Signer,
        lease_seconds: float,
        clock: PlatformTime,
        requeue_lost: Callable[[Collection[Token], str], Awaitable[None]],
        give_up: Callable[[int, str], Awaitable[None]],
        grants: JobGrants,
    ) -> None:
        self._jobs = jobs
        self._chunks = chunks
        self._dispatch = dispatch
        self._deletions = deletions
        self._audit = audit
        self._changer = changer
        self._publisher = publisher
        self._signer = signer
        self._clock = clock
        self._requeue_lost = requeue_lost
        self._give_up = give_up
        self._grants = grants
        self._lease_seconds = lease_seconds
        self._silent_seconds = min(
            _SILENT_SECONDS, lease_seconds
        )  # a worker whose leases have expired does not get the chunk again
        self._workers: dict[str, _Announced] = {}
        """By instance: a new process replaces the previous one."""
        self._caught_up: set[int] = set()
        self._live: dict[str, Credit] = {}
        self._skipped: dict[int, dict[int, float]] = {}
        """By user and job, until when its chunks are skipped."""
        self._resting: dict[tuple[int, bool], float] = {}
        """By user without other chunks, with and without those that need raw packets, until when none is queried."""
        self._idle = False
        self._woken = False
        self._rest_due = float("-inf")
        self._ahead_due = float("-inf")
        self.loop = Loop("dispatch", _LOOK_SECONDS, self.fill, least=_LEAST_SECONDS, grace=_STOP_SECONDS)

    def wake(self, *, made: Collection[int] = ()) -> None:
        """Run a round immediately: there may be a free slot, or new work of the users whose chunks were `made`."""
        self._woken = True
        if made:
            self._ahead_due = float("-inf")
            self._resting = {key: until for key, until in self._resting.items() if key[0] not in made}
        self.loop.wake()

    async def handle(self, records: Sequence[Record[WorkerReady]]) -> None:
        now = self._clock.monotonic()
        announced: dict[str, Credit] = {}
        for each in records:
            ready = each.message
            announced[ready.instance] = Credit(ready.worker_id, ready.instance, ready.slots, ready.raw, each.partition)
        news = [credit for credit in announced.values() if not self._is_noted(credit, now)]
        await self._dispatch.seen_workers(news)
        for instance, credit in announced.items():
            noted = now if credit in news else self._workers[instance].noted
            self._workers[instance] = _Announced(credit, now, noted)
        self.wake()

    async def revoked(self, partitions: Collection[int]) -> None:
        self._caught_up -= set(partitions)
        self._workers = {
            instance: each for instance, each in self._workers.items() if each.credit.partition not in partitions
        }

    async def caught_up(self, partitions: Collection[int]) -> None:
        """Treat the announcements in these partitions as current.

        The last one of an instance is of its running process: chunks that another process of the instance holds are lost.
        """
        self._caught_up |= set(partitions)
        living = {
            instance: each.credit.worker_id
            for instance, each in self._workers.items()
            if each.credit.partition in self._caught_up
        }
        if not living:
            return
        lost = {
            each.token
            for each in await self._dispatch.held()
            if living.get(each.instance, each.token.worker_id) != each.token.worker_id
        }
        await self._requeue_lost(lost, "was replaced by another process")

    async def fill(self) -> None:
        """Dispatch queued chunks until there is no chunk or no capacity.

        Unless woken, consider only idle workers: a full one announces itself when it has capacity again.

        Raises:
            DependencyError: chunks may be dispatched whose message was not sent; their leases expire and they are requeued.
        """
        if not (self._woken or self._idle):
            return
        self._woken = False
        while await self._round() and not self.loop.stopping:
            pass

    def _is_noted(self, credit: Credit, now: float) -> bool:
        known = self._workers.get(credit.instance)
        return known is not None and known.credit == credit and now - known.noted < _NOTED_SECONDS

    async def _round(self) -> bool:
        """Dispatch one round of chunks; return whether another round may dispatch more."""
        now = self._clock.monotonic()
        self._workers = {id_: each for id_, each in self._workers.items() if each.at > now - self._silent_seconds}
        skipped = {user: _after(now, jobs) for user, jobs in self._skipped.items()}
        self._skipped = {user: jobs for user, jobs in skipped.items() if jobs}
        self._resting = _after(now, self._resting)
        mine = [each.credit for each in self._workers.values() if each.credit.partition in self._caught_up]
        self._idle = any(credit.slots for credit in mine)
        if not self._idle:
            return False
        held, _ = await asyncio.gather(self._dispatch.held(), self._refresh(now, {credit.raw for credit in mine}))
        by_worker: defaultdict[str, list[Held]] = defaultdict(list)
        for each in held:
            by_worker[each.token.worker_id].append(each)
        time = self._clock.now()
        credits_ = [fairness.fill(credit, by_worker[credit.worker_id], time) for credit in mine]
        self._idle = any(credit.held < credit.slots for credit in credits_)
        free = [credit for credit in credits_ if fairness.has_room(credit)]
        if not self._idle and now < self._ahead_due:
            return False  # a moment ago no chunk was small enough to be prefetched
        # Workers with raw packets choose first among all chunks, so that the others leave them the chunks that need raw packets.
        more = False
        for raw in (True, False):
            if workers := [credit for credit in free if credit.raw is raw]:
                more = await self._give(workers, held, raw=raw) or more
        if not more:
            self._ahead_due = now + _AHEAD_SECONDS
        return more

    def _left_out(self, looks: AbstractSet[bool]) -> set[int]:
        """Return the users who rest in every kind of query that the workers need, with raw packets or without."""
        return set[int].intersection(*({user for user, raw in self._resting if raw is look} for look in looks))

    async def _refresh(self, now: float, looks: AbstractSet[bool]) -> None:
        """Once a second, deactivate idle users and read the live workers."""
        if now < self._rest_due:
            return
        _, live = await asyncio.gather(
            self._dispatch.deactivate_clocks(self._left_out(looks)), self._dispatch.live_workers(fairness.LIVE)
        )
        self._live = {credit.instance: credit for credit in live}
        self._rest_due = now + _REST_SECONDS

    async def _give(self, workers: Sequence[Credit], held: Sequence[Held], *, raw: bool) -> bool:
        now = self._clock.now()
        users = [user for user in await self._dispatch.waiting_users(raw=raw) if (user, raw) not in self._resting]
        if not users:
            return False
        room = min(_PICKS, sum(max(0, credit.slots - credit.held) + _EXTRA for credit in workers))
        known = await self._dispatch.clocks(users)
        clocks = fairness.wake(known, users)
        times = fairness.tags(clocks, held, now)
        neediest = sorted(times, key=times.__getitem__)[:_USERS]
        queues = await asyncio.gather(
            *(self._dispatch.queue(user, room, now, raw=raw, skip=self._skipped.get(user, ())) for user in neediest)
        )
        without = [user for user, queue in zip(neediest, queues, strict=True) if not queue and user in self._skipped]
        # They would fill the list of the neediest.
        await asyncio.gather(*(self._rest(user, raw=raw) for user in without))
        fleet = self._live | {credit.instance: credit for credit in workers}
        waiting = {user: queue for user, queue in zip(neediest, queues, strict=True) if queue}
        of_waiting = {user: times[user] for user in waiting}
        round_ = fairness.Round(workers, of_waiting, fairness.occupied(held), fleet.values())
        picks: list[_Pick] = []
        for pick in round_.picks(waiting):
            picks.append(pick)
            if len(picks) == room:
                break
        woken = [clock for clock in clocks.values() if clock != known.users.get(clock.user_id)]
        if woken or picks:
            await self._dispatch.wake_clocks(woken, max(known.virtual, round_.virtual))
        if not picks:
            return False
        return await self._send(picks) or len(picks) == room

    async def _send(self, picks: Sequence[_Pick]) -> bool:
        """Return whether some were not sent, because another replica changed them or their job has ended."""
        now = self._clock.now()
        jobs, chunks = await asyncio.gather(
            self._jobs.get({candidate.job_id for candidate, _, _ in picks}),
            self._chunks.get([candidate.chunk_id for candidate, _, _ in picks]),
        )
        over: list[str] = []
        due: dict[str, tuple[Chunk, ScanChunk]] = {}
        refused: dict[int, str] = {}
        closed: dict[tuple[int, str], ScanJob] = {}
        lost: set[int] = set()
        for candidate, worker, share in picks:
            job, chunk = jobs.get(candidate.job_id), chunks.get(candidate.chunk_id)
            if job is None or chunk is None:
                self._skip(candidate, "unreadable document")
                lost |= {candidate.job_id} if job is None else set()
                continue
            try:
                if job.final:
                    over.append(chunk.id)
                elif refusal := self._grants.refusal(job):
                    refused[job.id] = refusal
                elif self._grants.closed(job, now):
                    closed[job.user_id, job.granted_by] = job
                elif chunk.state is ChunkState.QUEUED:
                    size = plan.attempt_size(job, chunk)
                    estimate = plan.expected(job, PortSet.parse(chunk.ports), size)
                    attempt = dispatch(chunk, worker.worker_id, now, size=size, share=share, estimate=estimate)
                    due[chunk.id] = attempt, self._task(attempt, job)
            except Exception as error:  # noqa: BLE001 # an error of one job must not stop the others
                self._skip(candidate, repr(error))
        losers = await self._chunks.save([chunk for chunk, _ in due.values()])
        sent = [task for id_, (_, task) in due.items() if id_ not in losers]
        CHUNK_TRANSITIONS.labels(ChunkState.DISPATCHED).inc(len(sent))
        traces = {task.chunk_id: task.traceparent for task in sent}
        with tracing.spans("dispatch chunk", traces, "producer", "scanfleet.chunk.id") as onward:
            tasks = [task.model_copy(update={"traceparent": onward[task.chunk_id]}) for task in sent]
            await self._publisher.publish(SCAN_TASKS, tasks)
        await self._cancel(over)
        for job_id, refusal in refused.items():
            await self._refuse(jobs[job_id], refusal)
        for job in closed.values():
            await self._await_hours(job, now)
        # A replica that stalled may have stored chunks of a job after its deletion was done.
        await self._deletions.advance(lost, Stage.DONE, Stage.CHUNKS, now)
        return len(sent) < len(picks)

    def _skip(self, candidate: Candidate, cause: str) -> None:
        """Skip a job whose documents cannot be read or dispatched, so that the user's other jobs continue."""
        self._skipped.setdefault(candidate.user_id, {})[candidate.job_id] = self._clock.monotonic() + _SKIP_SECONDS
        SKIPPED_JOBS.inc()
        _log.error("job_skipped", job_id=candidate.job_id, chunk_id=candidate.chunk_id, cause=cause)

    async def _await_hours(self, job: ScanJob, now: datetime) -> None:
        """Skip the job, and all others of its user under its grant, until the hours of the grant begin."""
        opens_at = self._grants.opens_at(job, now)
        seconds = min((opens_at - now).total_seconds(), _CLOSED_SECONDS) if opens_at else _CLOSED_SECONDS
        others = await self._jobs.unfinished(job.user_id, _JOBS, granted_by=job.granted_by)
        until = self._clock.monotonic() + seconds
        self._skipped.setdefault(job.user_id, {}).update(dict.fromkeys((job.id, *others), until))

    async def _rest(self, user: int, *, raw: bool) -> None:
        """Leave a user out whose queued chunks all belong to skipped jobs, until one of these may continue."""
        skipped, resting = self._skipped[user], self._resting
        monotonic = self._clock.monotonic()
        seconds = min(_LEFT_OUT_SECONDS, min(skipped.values()) - monotonic)
        unfinished = await self._jobs.unfinished(user, len(skipped) + 1)
        if not skipped.keys() >= set(unfinished):
            seconds = min(seconds, _REST_SECONDS)  # any replica may create or requeue a chunk of another job
        resting[user, raw] = monotonic + seconds  # without effect if `wake` has replaced the mapping during the query

    async def _refuse(self, job: ScanJob, reason: str) -> None:
        """Fail a job that the user grants no longer allow: they have changed since it was accepted."""
        target = f"/api/v1/task/{job.id}"
        entry = own_entry(
            f"dispatch-{job.id}", "dispatch_task", target, "refused", Rule.GRANT, user_id=job.user_id, reason=reason
        )
        await record(self._audit, [entry])
        await self._give_up(job.id, f"the user grants no longer allow the job: {reason}")

    async def _cancel(self, over: Collection[str]) -> None:
        """Cancel chunks of a job that ended while another replica was still creating them."""
        if over:
            await self._changer.change(
                over,
                lambda chunk: cancel(chunk) if chunk.state is ChunkState.QUEUED else chunk,
                self._clock.now(),
            )

    def _task(self, chunk: Chunk, job: ScanJob) -> ScanChunk:
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
            max_rate=plan.nmap_rate(job.policy),
            min_rate=plan.min_rate(job.policy, ports, job.plan.slice_count),
            grant=granted(chunk, self._signer),
            granted_by=job.granted_by,
            stop_after_seconds=left.total_seconds() if left is not None else None,
            traceparent=job.traceparent,
        )


def _after(now: float, untils: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: until for key, until in untils.items() if until > now}
