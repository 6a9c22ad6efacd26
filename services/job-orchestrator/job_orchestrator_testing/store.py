"""An in-memory `Store`, for tests without a database, that passes the same suite as the one on MongoDB."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal

from job_orchestrator.domain.chunk import HELD, OPEN, Chunk, ChunkState
from job_orchestrator.domain.deletion import Deletion, Stage
from job_orchestrator.domain.fairness import Candidate, Clock, Clocks, Credit, Held
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.store import UNFINISHED, Census, Command, OpenChunks, Policy, Standing, Subnet
from scanfleet import rest
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.messages import AuditEntry, Job, JobStatus

_FAR_FUTURE = datetime(9999, 1, 1, tzinfo=UTC)


class MemoryStore:
    """Set `unavailable` to let every call fail as if the database were unreachable."""

    def __init__(self) -> None:
        self.unavailable = False
        self._ids: Counter[str] = Counter()
        self._audit: dict[str, rest.AuditEntry] = {}
        self._subnets: dict[int, Subnet] = {}
        self._policies: dict[int, Policy] = {}
        self._commands: dict[str, Command] = {}
        self._jobs: dict[int, ScanJob] = {}
        self._receipts: dict[int, tuple[Deletion, datetime | None]] = {}
        """By job, with when to go on."""
        self._chunks: dict[str, Chunk] = {}
        self._clocks: dict[int, Clock] = {}
        self._virtual = 0.0
        self._workers: dict[str, tuple[Credit, float]] = {}

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and name != "unavailable" and object.__getattribute__(self, "unavailable"):
            raise DependencyError("the database is unavailable")
        return object.__getattribute__(self, name)

    async def time(self) -> datetime:
        return utc_now()

    async def take_ids(self, name: str, count: int = 1) -> range:
        self._ids[name] += count
        return range(self._ids[name] - count + 1, self._ids[name] + 1)

    # Subnets and policies

    async def exists(self, kind: Literal["subnets", "policies"], id_: int) -> bool:
        return id_ in (self._subnets if kind == "subnets" else self._policies)

    async def owned(self, kind: Literal["subnets", "policies"], user_id: int, limit: int) -> int:
        all_: Collection[Subnet | Policy] = (self._subnets if kind == "subnets" else self._policies).values()
        return min(limit, sum(each.user_id == user_id for each in all_))

    async def add_subnet(self, subnet: Subnet) -> None:
        self._subnets.setdefault(subnet.id, subnet)

    async def add_subnets(self, subnets: Sequence[Subnet]) -> None:
        for subnet in subnets:
            self._subnets.setdefault(subnet.id, subnet)

    async def subnets_of(self, user_id: int, cidrs: Collection[str]) -> list[Subnet]:
        return [each for each in self._subnets.values() if each.user_id == user_id and each.cidr in cidrs]

    async def subnets(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Subnet]:
        return {key: each for each in self._subnets.values() if (key := (each.user_id, each.id)) in keys}

    async def list_subnets(self, user_id: int, skip: int, limit: int) -> tuple[list[Subnet], int]:
        mine = sorted((s for s in self._subnets.values() if s.user_id == user_id), key=lambda s: -s.id)
        return mine[skip : skip + limit], len(mine)

    async def replace_subnet(self, subnet: Subnet, *, unchanged_since: datetime | None = None) -> bool:
        before = self._subnets.get(subnet.id)
        known = before is not None and before.user_id == subnet.user_id and unchanged_since in (None, before.updated_at)
        if known:
            self._subnets[subnet.id] = subnet
        return known

    async def delete_subnet(self, user_id: int, subnet_id: int) -> bool:
        return bool(await self.subnets([(user_id, subnet_id)])) and bool(self._subnets.pop(subnet_id))

    async def add_policy(self, policy: Policy) -> None:
        self._policies.setdefault(policy.id, policy)

    async def policies(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Policy]:
        return {key: each for each in self._policies.values() if (key := (each.user_id, each.id)) in keys}

    async def list_policies(self, user_id: int, skip: int, limit: int) -> tuple[list[Policy], int]:
        mine = sorted((p for p in self._policies.values() if p.user_id == user_id), key=lambda p: -p.id)
        return mine[skip : skip + limit], len(mine)

    async def replace_policy(self, policy: Policy, *, unchanged_since: datetime | None = None) -> bool:
        before = self._policies.get(policy.id)
        known = before is not None and before.user_id == policy.user_id and unchanged_since in (None, before.updated_at)
        if known:
            self._policies[policy.id] = policy
        return known

    async def delete_policy(self, user_id: int, policy_id: int) -> bool:
        return bool(await self.policies([(user_id, policy_id)])) and bool(self._policies.pop(policy_id))

    # Commands

    async def insert_commands(self, commands: Sequence[Command]) -> dict[str, Command]:
        stands: dict[str, Command] = {}
        for command in commands:
            key = (command.user_id, command.idempotency_key or "")
            same_key = (await self.commands_by_key([key])).get(key) if command.idempotency_key else None
            stands[command.id] = self._commands.get(command.id) or same_key or command
            if stands[command.id] is command:
                self._commands[command.id] = command
        return stands

    async def commands(self, ids: Collection[str]) -> dict[str, Command]:
        return {id_: self._commands[id_] for id_ in ids if id_ in self._commands}

    async def commands_by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        by_key = {(each.user_id, each.idempotency_key): each for each in self._commands.values()}
        return {key: by_key[key] for key in keys if key in by_key}

    async def reject_command(self, command_id: str, status: int, error: str, rule: str) -> None:
        command = self._commands[command_id]
        if command.state == "accepted":
            self._commands[command_id] = replace(command, state="rejected", status=status, error=error, rule=rule)

    # The audit log

    async def add_audit(self, entries: Sequence[AuditEntry]) -> None:
        now = utc_now()
        for entry in entries:
            id_ = f"{entry.service}/{entry.id}"
            kept = rest.AuditEntry(**entry.model_dump() | {"id": id_, "received_at": now})
            self._audit.setdefault(id_, kept)

    async def list_audit(
        self,
        skip: int,
        limit: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        **words: str | None,
    ) -> tuple[list[rest.AuditEntry], int]:
        found = [
            entry
            for entry in self._audit.values()
            if all(value in (None, getattr(entry, name)) for name, value in words.items())
            and (since is None or entry.received_at >= since)
            and (until is None or entry.received_at < until)
        ]
        found.sort(key=lambda entry: (entry.received_at, entry.id), reverse=True)
        return found[skip : skip + limit], len(found)

    # Jobs

    async def insert_jobs(self, jobs: Sequence[ScanJob]) -> None:
        for job in jobs:
            if job.id not in self._receipts:
                self._jobs.setdefault(job.id, job)

    async def jobs(self, ids: Collection[int]) -> dict[int, ScanJob]:
        return {id_: self._jobs[id_] for id_ in ids if id_ in self._jobs}

    async def save_jobs(self, jobs: Sequence[ScanJob]) -> set[int]:
        losers = {job.id for job in jobs if job.id not in self._jobs or self._jobs[job.id].rev != job.rev}
        self._jobs |= {job.id: replace(job, rev=job.rev + 1) for job in jobs if job.id not in losers}
        return losers

    async def list_jobs(
        self,
        user_id: int | None,
        statuses: Collection[JobStatus],
        skip: int,
        limit: int,
        *,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        since: datetime | None = None,
    ) -> tuple[list[Job], int]:
        mine = [
            job
            for job in self._jobs.values()
            if user_id in (None, job.user_id)
            and (not statuses or job.status in statuses)
            and subnet_id in (None, job.subnet_id)
            and policy_id in (None, job.policy_id)
            and (since is None or job.created_at >= since)
        ]
        mine.sort(key=lambda job: (job.start_time or job.end_time or _FAR_FUTURE, job.id), reverse=True)
        return [job.view for job in mine[skip : skip + limit]], len(mine)

    async def latest_jobs(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        mine = (job for job in self._jobs.values() if user_id in (None, job.user_id) and job.id > after)
        unfinished = (job for job in mine if not job.final)
        return sorted(job.id for job in unfinished if changed_since is None or job.updated_at >= changed_since)[:limit]

    async def ended_jobs(
        self, user_id: int | None, since: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        mine = (job for job in self._jobs.values() if user_id in (None, job.user_id))
        ended = sorted((job.end_time, job.id) for job in mine if job.end_time is not None and job.end_time >= since)
        return [each for each in ended if after is None or each > after][:limit]

    async def unsettled_jobs(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> list[int]:
        unsettled = (job for job in self._jobs.values() if job.id > after and not job.settled)
        return sorted(job.id for job in unsettled if partitions is None or job.partition in partitions)[:limit]

    async def jobs_with_old_events(self, before: datetime, limit: int) -> list[int]:
        old = (job.id for job in self._jobs.values() if any(out.at < before for out in job.outbox))
        return list(islice(old, limit))

    async def has_unfinished_jobs(self, subnet_id: int) -> bool:
        return any(job.subnet_id == subnet_id and not job.final for job in self._jobs.values())

    async def unfinished_jobs(
        self,
        user_id: int,
        limit: int,
        *,
        statuses: Collection[JobStatus] = UNFINISHED,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        granted_by: str | None = None,
    ) -> list[int]:
        matching = (
            job.id
            for job in self._jobs.values()
            if job.user_id == user_id
            and job.status in statuses
            and subnet_id in (None, job.subnet_id)
            and policy_id in (None, job.policy_id)
            and granted_by in (None, job.granted_by)
        )
        return list(islice(matching, limit))

    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        usage: dict[int, Usage] = {}
        for job in self._jobs.values():
            if job.user_id in users and not job.final:
                usage[job.user_id] = usage.get(job.user_id, Usage()) + Usage(1, job.seconds_left)
        return usage

    # Deletions

    async def delete_job(self, job: ScanJob, receipt: Deletion) -> bool:
        if self._jobs.get(job.id) != job:
            return False
        del self._jobs[job.id]
        self._receipts[job.id] = (receipt, receipt.requested_at)
        return True

    async def due_deletions(self, now: datetime, limit: int) -> list[Deletion]:
        due = sorted((at, id_) for id_, (_, at) in self._receipts.items() if at is not None and at <= now)
        return [self._receipts[id_][0] for _, id_ in due[:limit]]

    async def advance_deletions(self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None) -> int:
        found = {id_: self._receipts[id_][0] for id_ in job_ids if id_ in self._receipts}
        moved = {id_: (replace(each, stage=to), due) for id_, each in found.items() if each.stage is stage}
        self._receipts |= moved
        return len(moved)

    async def delete_chunks(self, job_id: int, limit: int) -> int:
        ids = [chunk.id for chunk in self._chunks.values() if chunk.job_id == job_id][:limit]
        for id_ in ids:
            del self._chunks[id_]
        return len(ids)

    async def expired_jobs(
        self, before: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        ended = sorted((job.end_time, job.id) for job in self._jobs.values() if job.end_time and job.settled)
        return [each for each in ended if each[0] < before and (after is None or each > after)][:limit]

    # Chunks

    async def insert_chunks(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._chunks.setdefault(chunk.id, chunk)

    async def chunks(self, ids: Collection[str]) -> dict[str, Chunk]:
        return {id_: self._chunks[id_] for id_ in ids if id_ in self._chunks}

    async def job_chunks(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        for chunk in sorted((c for c in self._chunks.values() if c.job_id == job_id), key=lambda c: c.index):
            if first <= chunk.index and (end is None or chunk.index < end):
                yield chunk

    async def active_chunks(self, job_id: int, first: int) -> list[Chunk]:
        return [chunk async for chunk in self.job_chunks(job_id, first) if chunk.state is not ChunkState.QUEUED]

    async def chunks_in(self, job_id: int, states: Collection[ChunkState], limit: int) -> list[str]:
        mine = (c.id for c in self._chunks.values() if c.job_id == job_id and c.state in states)
        return list(islice(mine, limit))

    async def save_chunks(self, chunks: Sequence[Chunk]) -> set[str]:
        losers = {
            chunk.id for chunk in chunks if chunk.id not in self._chunks or self._chunks[chunk.id].rev != chunk.rev
        }
        self._chunks |= {chunk.id: replace(chunk, rev=chunk.rev + 1) for chunk in chunks if chunk.id not in losers}
        return losers

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        standings: dict[int, Standing] = {}
        for job_id in job_ids:
            mine = [chunk for chunk in self._chunks.values() if chunk.job_id == job_id and chunk.state in OPEN]
            standings[job_id] = Standing(
                open=len(mine),
                begun=any(chunk.state in {ChunkState.RUNNING, ChunkState.SCANNED} for chunk in mine),
                lowest=min((chunk.index for chunk in mine), default=None),
            )
        return standings

    async def watched_chunks(self, partitions: Collection[int]) -> list[Held]:
        return [each for each in self._held() if each.partition in partitions]

    async def overdue_chunks(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        overdue = (
            chunk
            for chunk in self._chunks.values()
            if chunk.state is ChunkState.SCANNED
            and chunk.partition in partitions
            and (chunk.ask_at is None or chunk.ask_at < now)
        )
        return list(islice(overdue, limit))

    async def chunk_counts(self, job_id: int) -> OpenChunks:
        queued = [chunk for chunk in self._queued(raw=True) if chunk.job_id == job_id]
        return OpenChunks(
            queued=len(queued),
            queued_raw=sum(chunk.needs_raw for chunk in queued),
            held=sum(chunk.job_id == job_id and chunk.state in HELD for chunk in self._chunks.values()),
        )

    # Dispatch

    async def waiting_users(self, *, raw: bool) -> list[int]:
        return sorted({chunk.user_id for chunk in self._queued(raw=raw)})

    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        mine = (
            chunk
            for chunk in self._queued(raw=raw)
            if chunk.user_id == user_id
            and chunk.job_id not in skip
            and (chunk.not_before is None or chunk.not_before <= now)
        )
        return [
            Candidate(chunk.id, user_id, chunk.job_id, chunk.estimate, chunk.needs_raw, chunk.failed_by)
            for chunk in sorted(mine, key=lambda chunk: chunk.turn)[:limit]
        ]

    async def first_turn(self, user_id: int) -> int:
        queued = (chunk for chunk in self._chunks.values() if chunk.state is ChunkState.QUEUED)
        return min((chunk.turn for chunk in queued if chunk.user_id == user_id), default=0)

    async def held(self) -> list[Held]:
        return self._held()

    async def clocks(self, users: Collection[int]) -> Clocks:
        known = {user: clock for user, clock in self._clocks.items() if clock.active or user in users}
        return Clocks(known, self._virtual)

    async def deactivate_clocks(self, left_out: Collection[int] = ()) -> None:
        busy = {
            chunk.user_id
            for chunk in self._chunks.values()
            if chunk.state in HELD or (chunk.state is ChunkState.QUEUED and chunk.user_id not in left_out)
        }
        self._clocks |= {user: replace(clock, active=False) for user, clock in self._clocks.items() if user not in busy}

    async def wake_clocks(self, clocks: Iterable[Clock], virtual: float) -> None:
        self._virtual = max(self._virtual, virtual)
        for clock in clocks:
            time_ = max(clock.time, self._clocks.get(clock.user_id, clock).time)
            self._clocks[clock.user_id] = Clock(clock.user_id, time_, active=True)

    async def charge(self, seconds: Mapping[int, float]) -> None:
        for user, more in seconds.items():
            clock = self._clocks.get(user, Clock(user))
            self._clocks[user] = replace(clock, time=clock.time + more)

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        self._workers |= {worker.worker_id: (worker, time.monotonic()) for worker in workers}

    async def live_workers(self, within: timedelta) -> list[Credit]:
        since = time.monotonic() - within.total_seconds()
        return [
            replace(worker, partition=-1) for worker, seen in self._workers.values() if worker.slots and seen > since
        ]

    async def seconds_left(self) -> float:
        return sum(job.seconds_left for job in self._jobs.values() if job.status in UNFINISHED)

    async def census(self) -> Census:
        jobs = [job for job in self._jobs.values() if job.status in UNFINISHED]
        outgoing = [out.at for job in self._jobs.values() for out in job.outbox]
        return Census(
            jobs=Counter(job.status for job in jobs),
            job_ages={
                status: max(_age(job.created_at) for job in jobs if job.status is status)
                for status in {job.status for job in jobs}
            },
            chunks=Counter(chunk.state for chunk in self._chunks.values() if chunk.state in OPEN),
            slot_seconds=sum(job.seconds_left for job in jobs),
            outbox_age=max(map(_age, outgoing), default=0.0),
        )

    def _queued(self, *, raw: bool) -> list[Chunk]:
        queued = (chunk for chunk in self._chunks.values() if chunk.state is ChunkState.QUEUED)
        return [chunk for chunk in queued if raw or not chunk.needs_raw]

    def _held(self) -> list[Held]:
        return [
            Held(
                token=chunk.token,
                user_id=chunk.user_id,
                partition=chunk.partition,
                estimate=chunk.estimate,
                share=chunk.share,
                dispatched_at=chunk.dispatched_at,
            )
            for chunk in self._chunks.values()
            if chunk.state in HELD
        ]


def _age(time_: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - time_).total_seconds())
