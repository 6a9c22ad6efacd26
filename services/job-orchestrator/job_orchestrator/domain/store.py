"""The database port of the handlers: documents that change by compare-and-set on their `rev`, and queries over them.

`job_orchestrator.repository` has the MongoDB store, `job_orchestrator_testing` the in-memory one; both pass the same suite.
Every method raises `DependencyError` if the database is unavailable; its writes may then be done or not. A document that
cannot be read is logged, counted and omitted from the result, so that it affects no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.deletion import Deletion, Stage
from job_orchestrator.domain.fairness import Candidate, Clock, Clocks, Credit, Held
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.quotas import Usage
from scanfleet import rest
from scanfleet.messages import AuditEntry, Job, JobStatus
from scanfleet.policy import ScanPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    id: int
    user_id: int
    name: str
    cidr: str
    exclude: tuple[str, ...]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    id: int
    user_id: int
    name: str
    scan: ScanPolicy
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The decision on one command id; the first insert wins.

    `accepted` submits contain all of their jobs with their snapshots, so that any replica can finish creating them.
    """

    id: str
    user_id: int
    state: Literal["accepted", "rejected", "expired"]
    body: str = ""
    """Hash of the request, which distinguishes a retry from another request with the same key."""
    idempotency_key: str | None = None
    jobs: tuple[ScanJob, ...] = ()
    cancels: int | None = None
    """The job that a cancel refers to."""
    admin: bool = False
    """Whether an administrator cancels, who may cancel jobs of other users."""
    status: int = 0
    error: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenChunks:
    """Numbers of chunks of one job that workers hold or can get."""

    queued: int = 0
    queued_raw: int = 0
    """The queued chunks that need raw packets."""
    held: int = 0


UNFINISHED: Final = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Numbers of unfinished jobs and chunks. Ages are in seconds by the database's clock."""

    jobs: Counter[JobStatus]
    job_ages: Mapping[JobStatus, float]
    """Age of the oldest job in each status, since its creation."""
    chunks: Counter[ChunkState]
    slot_seconds: float
    """Expected slot seconds of all unfinished jobs, for scaling."""
    outbox_age: float
    """Age of the oldest unpublished event; 0 if there is none."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The chunks of a job that have not ended, in one consistent read."""

    open: int = 0
    begun: bool = False
    """Whether a worker has started one of them."""
    lowest: int | None = None
    """The lowest index of them; None if there is none."""


class Resources(Protocol):
    """Subnets and policies, each owned by one user."""

    async def exists(self, kind: Literal["subnets", "policies"], id_: int) -> bool:
        """Return whether the id exists, for any user."""

    async def owned(self, kind: Literal["subnets", "policies"], user_id: int, limit: int) -> int:
        """How many the user has, counted up to `limit`."""

    async def add_subnet(self, subnet: Subnet) -> None: ...
    async def add_subnets(self, subnets: Sequence[Subnet]) -> None: ...
    async def subnets_of(self, user_id: int, cidrs: Collection[str]) -> list[Subnet]:
        """Return the user's subnets of these networks."""

    async def subnets(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Subnet]:
        """Return the existing ones of these, each given by user and id."""

    async def list_subnets(self, user_id: int, skip: int, limit: int) -> tuple[list[Subnet], int]: ...
    async def replace_subnet(self, subnet: Subnet, *, unchanged_since: datetime | None = None) -> bool:
        """Store its fields if it is there, and if given, if its `updated_at` is still that one."""

    async def delete_subnet(self, user_id: int, subnet_id: int) -> bool: ...

    async def add_policy(self, policy: Policy) -> None: ...
    async def policies(self, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], Policy]:
        """Return the existing ones of these, each given by user and id."""

    async def list_policies(self, user_id: int, skip: int, limit: int) -> tuple[list[Policy], int]: ...
    async def replace_policy(self, policy: Policy, *, unchanged_since: datetime | None = None) -> bool:
        """Store its fields if it is there, and if given, if its `updated_at` is still that one."""

    async def delete_policy(self, user_id: int, policy_id: int) -> bool: ...


class Audit(Protocol):
    """The audit log: entries are added, read, and deleted by age; they never change."""

    async def add_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Store the entries with the current time; entries with an existing id of the same service are ignored."""

    async def list_audit(
        self,
        skip: int,
        limit: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        **words: str | None,
    ) -> tuple[list[rest.AuditEntry], int]:
        """The last received first, ties by id; and how many there are. An entry's id is `<service>/<id>`.

        With filters, at most 10,000 are counted: from there on, the number is that of the entries up to this page, and one
        more if others may follow.

        Args:
            skip: how many to pass over.
            limit: how many.
            since: only those received then or later.
            until: only those received before.
            words: only those whose fields of these names have these values; None is any.
        """


class Deletions(Protocol):
    """Receipts that replace the documents of deleted jobs."""

    async def delete_job(self, job: ScanJob, receipt: Deletion) -> bool:
        """Replace the job by the receipt, due at once, unless the job has changed; answers whether it was done."""

    async def due_deletions(self, now: datetime, limit: int) -> list[Deletion]:
        """Return due deletions, the longest waiting first."""

    async def advance_deletions(self, job_ids: Collection[int], stage: Stage, to: Stage, due: datetime | None) -> int:
        """Move deletions from `stage` to `to`, next due at `due`; skip those in any other stage; return the number moved.

        With `due` None the receipts are forgotten after `KEEP_RECEIPTS`.
        """

    async def delete_chunks(self, job_id: int, limit: int) -> int:
        """Delete up to `limit` chunks of the job; return the number deleted."""

    async def expired_jobs(
        self, before: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        """Return end time and id of settled jobs that ended before then, in this order, behind `after` if it is given."""


class Store(Resources, Audit, Deletions, Protocol):
    async def time(self) -> datetime:
        """Return the time of the database's clock, in UTC."""

    async def take_ids(self, name: str, count: int = 1) -> range:
        """Allocate `count` integers of the sequence `name`, which starts at 1."""

    # Commands

    async def insert_commands(self, commands: Sequence[Command]) -> dict[str, Command]:
        """Insert each command unless its id or its user's idempotency key exists; return the stored ones by requested id."""

    async def commands(self, ids: Collection[str]) -> dict[str, Command]: ...

    async def commands_by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]: ...

    async def reject_command(self, command_id: str, status: int, error: str, rule: str) -> None:
        """Reject an accepted cancel that came too late."""

    # Jobs

    async def insert_jobs(self, jobs: Sequence[ScanJob]) -> None:
        """Insert those that do not exist yet."""

    async def jobs(self, ids: Collection[int]) -> dict[int, ScanJob]: ...

    async def save_jobs(self, jobs: Sequence[ScanJob]) -> set[int]:
        """Store each if its stored `rev` is unchanged, with `rev` incremented; return the ids that lost the race."""

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
        """Newest start first, pending before all, ties by id, newest first; and how many match. None is every user.

        Args:
            user_id: whose jobs.
            statuses: only these; none is all.
            skip: how many to pass over.
            limit: how many.
            subnet_id: only jobs of this subnet.
            policy_id: only jobs of this policy.
            since: only jobs that were created then or later.
        """

    async def latest_jobs(
        self, user_id: int | None, after: int, limit: int, *, changed_since: datetime | None = None
    ) -> list[int]:
        """Return ids above `after`, in order, of unfinished jobs. None is every user.

        Args:
            user_id: whose jobs.
            after: the id to go on after.
            limit: how many.
            changed_since: leaves out those that have not changed since.
        """

    async def ended_jobs(
        self, user_id: int | None, since: datetime, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[tuple[datetime, int]]:
        """Return end time and id of jobs that ended then or later, in this order, behind `after` if it is given. None is every user."""

    async def unsettled_jobs(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> list[int]:
        """Return ids above `after`, in order, of jobs in `partitions` that are not settled."""

    async def jobs_with_old_events(self, before: datetime, limit: int) -> list[int]: ...

    async def has_unfinished_jobs(self, subnet_id: int) -> bool: ...

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
        """Return the ids of the user's matching unfinished jobs, in any order."""

    async def usage(self, users: Collection[int]) -> dict[int, Usage]:
        """The unfinished jobs of those of these users who have any."""

    # Chunks

    async def insert_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Insert those that do not exist yet."""

    async def chunks(self, ids: Collection[str]) -> dict[str, Chunk]: ...

    def job_chunks(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        """Yield the chunks with an index from `first` up to `end`, in order; a job can have hundreds of thousands."""

    async def active_chunks(self, job_id: int, first: int) -> list[Chunk]:
        """Return the chunks from index `first` on that are not queued."""

    async def chunks_in(self, job_id: int, states: Collection[ChunkState], limit: int) -> list[str]:
        """Return ids of chunks in these states; one that changes its state meanwhile may be omitted."""

    async def save_chunks(self, chunks: Sequence[Chunk]) -> set[str]:
        """Store chunks as `save_jobs` stores jobs."""

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        """Return the standing of each job, in one consistent read."""

    async def watched_chunks(self, partitions: Collection[int]) -> list[Held]:
        """Return the chunks that workers hold, of jobs in these partitions."""

    async def overdue_chunks(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        """Return the scanned chunks of jobs in these partitions for which result-store is due to be asked."""

    async def chunk_counts(self, job_id: int) -> OpenChunks: ...

    # Dispatch

    async def waiting_users(self, *, raw: bool) -> list[int]:
        """Return the users with queued chunks; without `raw`, chunks that need raw packets do not count."""

    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        """Return the user's first `limit` queued chunks that may start, by turn, without those of the jobs to `skip`."""

    async def first_turn(self, user_id: int) -> int:
        """Return the lowest turn among the user's queued chunks, or 0."""

    async def held(self) -> list[Held]:
        """Return every chunk that any worker holds."""

    async def clocks(self, users: Collection[int]) -> Clocks:
        """Return the existing clocks of these users and all active clocks."""

    async def deactivate_clocks(self, left_out: Collection[int] = ()) -> None:
        """Deactivate the clocks of users with neither queued nor held chunks; the queued ones of `left_out` do not count."""

    async def wake_clocks(self, clocks: Iterable[Clock], virtual: float) -> None:
        """Activate these clocks, and raise the global virtual time to `virtual`."""

    async def charge(self, seconds: Mapping[int, float]) -> None:
        """Add seconds to the clocks of these users."""

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        """Store that these workers announced themselves now, by the database's clock."""

    async def live_workers(self, within: timedelta) -> list[Credit]:
        """Return workers with slots that announced themselves within a time, without their partition."""

    # Monitoring

    async def seconds_left(self) -> float:
        """Return the expected slot seconds of all unfinished jobs."""

    async def census(self) -> Census: ...
