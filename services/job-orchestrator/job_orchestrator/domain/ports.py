"""The ports of the database: a repository for each subject.

Documents change by compare-and-set on their `rev`. `job_orchestrator.repository` has the MongoDB repositories,
`job_orchestrator_testing` the in-memory ones; both pass the same suite. Every method raises `DependencyError` if the database is
unavailable; its writes may or may not have been applied. A document that cannot be read is logged, counted and omitted
from the result, so that it affects no other. Commands are the exception: the query fails, because omitting a command
would let its submission be repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.census import DeletionCensus, JobCensus, OpenChunks, Standing
from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.fairness import Account, Accounts, Candidate, Credit, Held
from job_orchestrator.domain.job import UNFINISHED, ScanJob
from job_orchestrator.domain.quotas import Usage
from job_orchestrator.domain.resources import Content, Owned, ScanTarget, Subnet
from job_orchestrator.domain.retention import EndedJob, SubnetRetention
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry, Job, JobStatus
from scanfleet.scanning.policy import ScanPolicy


class ResourceRepository(Protocol[Content]):
    """The objects of one resource."""

    async def take_ids(self, count: int = 1) -> range:
        """Allocate `count` ids; the first one is 1."""

    async def exists(self, id_: int) -> bool:
        """Return whether the id exists, for any user."""

    async def count(self, user_id: int, limit: int) -> int:
        """Return the user's number of objects, counted up to `limit`."""

    async def add(self, *resources: Owned[Content]) -> None:
        """Insert those that neither exist nor were deleted in the last 8 days."""

    async def get(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Owned[Content]]:
        """Return the existing objects with these keys, each a user id and an object id."""

    async def page(self, user_id: int, skip: int, limit: int) -> tuple[list[Owned[Content]], int]:
        """Return a page of the user's objects, newest first, and their total number."""

    async def replace(self, resource: Owned[Content], *, unchanged_since: datetime | None = None) -> bool:
        """Update the object if it exists and, if given, its `updated_at` still equals `unchanged_since`."""

    async def replace_all(self, resources: Collection[Owned[Content]]) -> bool:
        """Update those of these objects that exist; return whether all of them do."""

    async def delete(self, user_id: int, id_: int) -> bool: ...


class SubnetRepository(ResourceRepository[ScanTarget], Protocol):
    async def equal_to(self, user_id: int, lines: Collection[tuple[str, ScanTarget]]) -> list[Subnet]:
        """Return one subnet of the user for each name and target that exist."""

    async def named(self, user_id: int, names: Collection[str]) -> list[Subnet]:
        """Return the user's subnets with these names, without their exclusions."""

    async def count_excludes(self, user_id: int, ids: Collection[int]) -> int:
        """Return the total number of networks that the user's subnets with these ids exclude."""


PolicyRepository = ResourceRepository[ScanPolicy]


class AuditRepository(Protocol):
    """The audit log: entries are added, read, and deleted by age; they never change."""

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        """Store the entries with the current time; entries with an existing id of the same service are ignored."""

    async def page(
        self,
        skip: int,
        limit: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        **words: str | None,
    ) -> tuple[list[rest.AuditEntry], int]:
        """Return a page of entries, the last received first, ties by id, and their number. An entry's id is `<service>/<id>`.

        With filters, at most 10,000 are counted: beyond that, the number is that of the entries up to this page, plus one if
        others may follow.

        Args:
            skip: number of entries to skip.
            limit: maximum number of entries.
            since: only entries received at or after this time.
            until: only entries received before this time.
            words: only entries whose fields have these values; None matches any value.
        """


class AccessRepository(Protocol):
    """User ids and revoked tokens."""

    async def user_id(self, issuer: str, subject: str) -> int:
        """Return the id of the issuer's user `subject`; the first call assigns it, and it never changes."""

    async def add_revocation(self, revocation: Revocation) -> bool:
        """Store the revocation; return False if there are already `MAX_REVOCATIONS`."""

    async def take_revocation_id(self) -> int: ...

    async def revocations(self) -> list[Revocation]:
        """Return all revocations, newest first."""

    async def has_revocation(self, id_: int) -> bool:
        """Return whether the revocation exists, even if it cannot be read."""

    async def delete_revocation(self, id_: int) -> bool:
        """Delete the revocation; return False if it does not exist."""


class CommandRepository(Protocol):
    async def insert(self, commands: Sequence[Command]) -> dict[str, Command]:
        """Insert each command unless its id or its user's idempotency key exists; return the stored ones by requested id."""

    async def get(self, ids: Collection[str]) -> dict[str, Command]: ...

    async def expired(self, ids: Collection[str]) -> set[str]:
        """Return those of these ids whose commands are stored as expired."""

    async def by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        """Return the commands with these users and idempotency keys, without their jobs, which may be a thousand each."""

    async def reject(self, commands: Sequence[Command]) -> None:
        """Store rejections of accepted cancels that arrived too late; the first rejection of a command is kept."""


class JobRepository(Protocol):
    async def take_ids(self, count: int = 1) -> range:
        """Allocate `count` ids; the first one is 1."""

    async def insert(self, jobs: Sequence[ScanJob]) -> None:
        """Insert those that do not exist yet."""

    async def missing(self, ids: Collection[int]) -> set[int]:
        """Return those of these ids that neither a job nor a receipt of a deletion has."""

    async def get(self, ids: Collection[int]) -> dict[int, ScanJob]: ...

    async def snapshots(self, ids: Collection[int]) -> list[rest.Snapshot]:
        """Return the states of these jobs, by id, without the rest of them, which can be thirty times as large."""

    async def save(self, jobs: Sequence[ScanJob]) -> set[int]:
        """Store each if its stored `rev` is unchanged, with `rev` incremented; return the ids that lost the race."""

    async def page(
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
        """Return a page of jobs, pending ones first, then by start and id, the latest first; and the number of matches.

        Args:
            user_id: owner of the jobs; None for every user.
            statuses: only jobs in these statuses; empty for all.
            skip: number of jobs to skip.
            limit: maximum number of jobs.
            subnet_id: only jobs of this subnet.
            policy_id: only jobs of this policy.
            since: only jobs created at or after this time.
        """

    async def latest(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        """Return the ids of unfinished jobs, in order.

        Args:
            user_id: owner of the jobs; None for every user.
            after: only greater ids.
            limit: maximum number of ids.
            changed_since: omit jobs that have not changed since this time.
        """

    async def ended(
        self, user_id: int | None, since: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        """Return end time and id of the user's (None: all) jobs that ended at or after `since`, in this order, after `after`."""

    async def unsettled(
        self, after: int, limit: int, partitions: Collection[int] | None = None
    ) -> dict[int, tuple[str, str]]:
        """Return status and reason to wait of jobs in `partitions` that are not settled, by id, in order, above `after`."""

    async def with_old_events(self, before: datetime, limit: int, partitions: Collection[int]) -> list[ScanJob]:
        """Return jobs in `partitions` whose outboxes have events from before `before`, or from `MAX_AHEAD` after it."""

    async def empty_outboxes(self, seqs: Mapping[int, int]) -> None:
        """Remove all events from the outboxes, by job, that contain none after this `seq`; idempotent.

        Raises:
            DependencyError: some of them may be empty.
        """

    async def has_unfinished(self, subnet_id: int) -> bool: ...

    async def unfinished(
        self,
        user_id: int,
        limit: int,
        *,
        statuses: Collection[JobStatus] = UNFINISHED,
        subnet_id: int | None = None,
        policy_id: int | None = None,
        granted_by: str | None = None,
    ) -> list[int]:
        """Return the ids of the user's matching unfinished jobs, in any order."""

    async def expired(self, before: datetime, limit: int, after: tuple[datetime, int] | None = None) -> list[EndedJob]:
        """Return settled jobs that ended before `before`, by end time and id, after `after` if given."""

    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        """Return the usage of those of these users who have unfinished jobs."""

    async def seconds_left(self) -> float:
        """Return the expected slot seconds of the unfinished jobs, without those outside the hours of their grants."""

    async def census(self) -> JobCensus: ...

    async def outbox_age(self) -> float:
        """Return the seconds since the oldest unpublished event by the database's clock; 0 if there is none."""


class DeletionRepository(Protocol):
    """Receipts that replace the documents of deleted jobs."""

    async def begin(self, job: ScanJob, receipt: Deletion) -> bool:
        """Replace the job by the receipt, due at once, unless the job has changed; return whether it was replaced."""

    async def due(self, now: datetime, limit: int, *, chunks: bool) -> list[Deletion]:
        """Return due deletions, the longest waiting first.

        Those that cannot be read are due again after a pause.

        Args:
            now: platform time.
            limit: maximum number.
            chunks: whether those in the stage of chunks, or those in any other.
        """

    async def advance(
        self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None, counts: Counts | None = None
    ) -> int:
        """Move deletions from `stage` to `to`, next due at `due`; skip those in any other stage; return the number moved.

        With `due` None they are complete, and their receipts expire after the store's retention time of receipts.
        """

    async def page(
        self, user_id: int | None, stages: Collection[Stage], skip: int, limit: int
    ) -> tuple[list[Deletion], int]:
        """Return the user's (None: all) deletions in these stages, the last requested first, and their total number."""

    async def census(self) -> DeletionCensus: ...


class RetentionRepository(Protocol):
    """Retention of the jobs of single subnets; it is deleted with the subnet."""

    async def days(self, subnet_id: int) -> int | None:
        """Return the subnet's own retention in days."""

    async def set_days(self, subnet_id: int, days: int | None) -> bool:
        """Store the retention of a subnet, or with None that it has none; return False if the subnet does not exist."""

    async def shortest(self) -> int | None:
        """Return the shortest retention that any subnet has."""

    async def begin_walk(self, now: datetime) -> datetime | None:
        """Record the time of a walk over the ended jobs; return that of the one before it on any replica."""

    async def halt(self, jump: timedelta) -> None:
        """Halt deletion by age on all replicas, because the database's clock changed by `jump`."""

    async def halted(self) -> timedelta | None:
        """Return the jump for which deletion by age is halted; None if it is not."""

    async def resume(self) -> bool:
        """Resume deletion by age; return whether it was halted."""

    async def of(self, subnet_ids: Collection[int]) -> dict[int, SubnetRetention]:
        """Return the retention of those of these subnets that exist."""


class ChunkRepository(Protocol):
    async def insert(self, chunks: Sequence[Chunk]) -> None:
        """Insert those that do not exist yet."""

    async def get(self, ids: Collection[str]) -> dict[str, Chunk]: ...

    async def save(self, chunks: Sequence[Chunk]) -> set[str]:
        """Store chunks as `JobRepository.save` stores jobs."""

    def of_job(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        """Yield the chunks with an index from `first` up to `end`, in order; a job can have hundreds of thousands."""

    def map_parts(self, job_id: int, first: int, end: int) -> AsyncIterator[MapPart]:
        """Yield the same part of each chunk that `of_job` yields."""

    async def queued(self, job_id: int, first: int, end: int) -> list[int]:
        """Return the indexes from `first` up to `end` of the queued chunks; one that changes meanwhile may be omitted."""

    async def ids_in(self, job_ids: Collection[int], states: Collection[ChunkState], limit: int) -> list[str]:
        """Return ids of these jobs' chunks in these states; one that changes its state meanwhile may be omitted."""

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        """Return the standing of each job, in one consistent read."""

    async def overdue(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        """Return the scanned chunks of jobs in these partitions that result-store must be asked to check now.

        A pause beyond `MAX_PAUSE` is ignored.
        """

    async def count_open(self, job_id: int) -> OpenChunks: ...

    async def count(self, job_id: int) -> int:
        """Return the number of chunks of the job."""

    async def delete(self, job_id: int, limit: int) -> int:
        """Delete up to `limit` chunks of the job, and keep their attempts as long as receipts; return the number deleted."""

    async def census(self) -> Counter[ChunkState]:
        """Return the number of chunks in each state that is not final, each counted up to `MAX_COUNTED`."""


class DispatchRepository(Protocol):
    """Queued and held chunks, users' accounts, and workers."""

    async def waiting_users(self, *, raw: bool) -> list[int]:
        """Return the users with queued chunks; without `raw`, chunks that need raw packets do not count."""

    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        jobs: Collection[int] | None = None,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        """Return the user's first `limit` queued chunks that may start, by turn; a delay beyond `MAX_DELAY` is ignored.

        With `jobs` it returns only chunks of these jobs. It omits those of the jobs to `skip`, and of jobs of which one of the
        first chunks cannot be read.
        """

    async def first_turns(self, users: Collection[int]) -> dict[int, int]:
        """Return the lowest turn of the queued chunks of each of these users, or else of the other open ones.

        A job with a `max_rate` may have no queued chunk. Open chunks do not count beside queued ones: one that a worker holds for
        long may be far behind the others of its job.
        """

    async def held(
        self, partitions: Collection[int] | None = None, known: Mapping[str, Held] | None = None
    ) -> list[Held]:
        """Return the chunks that workers hold; with `partitions` only those of jobs in these partitions.

        Attempts that are `known`, by chunk, need not be read again: their fields do not change.
        """

    async def accounts(self, users: Collection[int]) -> Accounts:
        """Return the existing accounts of these users and all active accounts."""

    async def deactivate_accounts(self, left_out: Collection[int] = ()) -> None:
        """Deactivate the accounts of users without queued or held chunks; the queued chunks of `left_out` do not count.

        If there are any, delete accounts that have been inactive for `KEEP_IDLE` and are not above the global virtual time: without
        one, a user starts at that time too.
        """

    async def activate_accounts(self, accounts: Iterable[Account], virtual: float) -> None:
        """Activate these accounts, and raise the global virtual time to `virtual`."""

    async def charge(self, seconds: Mapping[int, float]) -> None:
        """Add seconds to the accounts of these users."""

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        """Store that these workers announced themselves now, by the database's clock."""

    async def live_workers(self, within: timedelta) -> list[Credit]:
        """Return workers with slots that announced themselves within a time, without their partition."""


class Store(Protocol):
    """The repositories of one database."""

    @property
    def subnets(self) -> SubnetRepository: ...
    @property
    def policies(self) -> PolicyRepository: ...
    @property
    def audit(self) -> AuditRepository: ...
    @property
    def access(self) -> AccessRepository: ...
    @property
    def commands(self) -> CommandRepository: ...
    @property
    def jobs(self) -> JobRepository: ...
    @property
    def deletions(self) -> DeletionRepository: ...
    @property
    def retention(self) -> RetentionRepository: ...
    @property
    def chunks(self) -> ChunkRepository: ...
    @property
    def dispatch(self) -> DispatchRepository: ...

    async def time(self) -> datetime:
        """Return the time of the database's clock, in UTC."""
