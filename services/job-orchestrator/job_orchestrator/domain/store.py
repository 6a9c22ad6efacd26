"""What the handlers need of a database: documents that change by compare-and-set on their `rev`, and the queries over them.

`job_orchestrator.repository` is the real one, `job_orchestrator.testing` holds the in-memory one; both pass the same suite.
Every method raises `DependencyError` when the database is unavailable, and then anything that it was to write may be
written. A document that cannot be read is logged, counted and left out of the answer, so that it stops nothing but itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.fairness import Candidate, Clock, Clocks, Credit, Held
from job_orchestrator.domain.job import ScanJob
from scanfleet import rest
from scanfleet.messages import AuditEntry, JobStatus
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
    """What was decided on one command id; the first insert stands.

    `accepted` submits name all their jobs with their snapshots, so that anyone can finish making them.
    """

    id: str
    user_id: int
    state: Literal["accepted", "rejected", "expired"]
    body: str = ""
    """Hash of what was asked, to tell a repeat from another request under the same key."""
    idempotency_key: str | None = None
    jobs: tuple[ScanJob, ...] = ()
    cancels: int | None = None
    """The job that a cancel is about."""
    admin: bool = False
    """The cancel is an administrator's, who may cancel another user's job."""
    status: int = 0
    error: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenChunks:
    """The chunks of one job that workers hold or could be given."""

    queued: int = 0
    queued_raw: int = 0
    """Of the queued ones, those that need raw packets."""
    held: int = 0


UNFINISHED: Final = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """How much there is of what is unfinished. Ages are in seconds by the database's clock."""

    jobs: Counter[JobStatus]
    job_ages: Mapping[JobStatus, float]
    """Of the oldest job in each status, since it was created."""
    chunks: Counter[ChunkState]
    slot_seconds: float
    """Slot seconds that all unfinished jobs are expected to take: what there is to scale on."""
    outbox_age: float
    """Of the oldest event that waits in an outbox; 0 when none does."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The chunks of a job that have not ended, at one moment."""

    open: int = 0
    begun: bool = False
    """Whether a worker has begun on one of them."""
    lowest: int | None = None
    """The first of them by index; None when there is none."""


class Resources(Protocol):
    """Subnets and policies: plain documents of one user each."""

    async def exists(self, kind: Literal["subnets", "policies"], id_: int) -> bool:
        """Whether anybody has one of this id."""

    async def add_subnet(self, subnet: Subnet) -> None: ...
    async def subnets(self, user_id: int, ids: Collection[int]) -> list[Subnet]: ...
    async def list_subnets(self, user_id: int, skip: int, limit: int) -> tuple[list[Subnet], int]: ...
    async def replace_subnet(self, subnet: Subnet, *, unchanged_since: datetime | None = None) -> bool:
        """Store its fields if it is there, and if given, if its `updated_at` is still that one."""

    async def delete_subnet(self, user_id: int, subnet_id: int) -> bool: ...

    async def add_policy(self, policy: Policy) -> None: ...
    async def policies(self, user_id: int, ids: Collection[int]) -> list[Policy]: ...
    async def list_policies(self, user_id: int, skip: int, limit: int) -> tuple[list[Policy], int]: ...
    async def replace_policy(self, policy: Policy, *, unchanged_since: datetime | None = None) -> bool:
        """Store its fields if it is there, and if given, if its `updated_at` is still that one."""

    async def delete_policy(self, user_id: int, policy_id: int) -> bool: ...


class Audit(Protocol):
    """The audit log: entries are added, read, and forgotten by age; none is ever changed."""

    async def add_audit(self, entries: Sequence[AuditEntry]) -> None:
        """Stamp them with the time now; those whose service has one of the same id already stay as they are."""

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

        Args:
            skip: how many to pass over.
            limit: how many.
            since: only those received then or later.
            until: only those received before.
            words: only those whose fields of these names have these values; None is any.
        """


class Store(Resources, Audit, Protocol):
    async def time(self) -> datetime:
        """The database's clock, UTC."""

    async def take_ids(self, name: str, count: int = 1) -> range:
        """Fresh integers of the sequence `name`, from 1."""

    # Commands

    async def insert_commands(self, commands: Sequence[Command]) -> dict[str, Command]:
        """Insert each unless its id or its user's idempotency key is there; answer what stands now, by the id asked."""

    async def commands(self, ids: Collection[str]) -> dict[str, Command]: ...

    async def commands_by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]: ...

    async def reject_command(self, command_id: str, status: int, error: str, rule: str) -> None:
        """An accepted cancel that came too late."""

    # Jobs

    async def insert_jobs(self, jobs: Sequence[ScanJob]) -> None:
        """Those that are there already stay as they are."""

    async def jobs(self, ids: Collection[int]) -> dict[int, ScanJob]: ...

    async def save_jobs(self, jobs: Sequence[ScanJob]) -> set[int]:
        """Store each if its stored `rev` is still its `rev`, raised by one; answer the ids that lost the race."""

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
    ) -> tuple[list[ScanJob], int]:
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
        self,
        user_id: int | None,
        after: int,
        limit: int,
        *,
        changed_since: datetime | None = None,
        ended_since: datetime | None = None,
    ) -> list[int]:
        """Ids above `after`, in order, of jobs that are unfinished or have ended since. None is every user.

        Args:
            user_id: whose jobs.
            after: the id to go on after.
            limit: how many.
            changed_since: leaves out unfinished ones that have not changed since.
            ended_since: without it none that has ended.
        """

    async def unsettled_jobs(
        self,
        after: int,
        limit: int,
        partitions: Collection[int] | None = None,
    ) -> list[int]:
        """Ids above `after`, in order, of jobs that are not final or have chunks that are not; those in `partitions`."""

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
    ) -> list[int]:
        """Ids of the user's unfinished jobs that match, in any order."""

    # Chunks

    async def insert_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Those that are there already stay as they are."""

    async def chunks(self, ids: Collection[str]) -> dict[str, Chunk]: ...

    def job_chunks(self, job_id: int, first: int = 0, end: int | None = None) -> AsyncIterator[Chunk]:
        """The chunks with an index from `first` up to `end`, in order; a job can have hundreds of thousands."""

    async def active_chunks(self, job_id: int, first: int) -> list[Chunk]:
        """The chunks from index `first` on that are not queued."""

    async def chunks_in(self, job_id: int, states: Collection[ChunkState], limit: int) -> list[str]:
        """Ids of chunks in these states; one that moves meanwhile may be left out."""

    async def save_chunks(self, chunks: Sequence[Chunk]) -> set[str]:
        """As `save_jobs`."""

    async def standings(self, job_ids: Collection[int]) -> dict[int, Standing]:
        """Of each job, all at one moment."""

    async def watched_chunks(self, partitions: Collection[int]) -> list[Held]:
        """Chunks that workers hold, of jobs in these partitions."""

    async def overdue_chunks(self, now: datetime, limit: int, partitions: Collection[int]) -> list[Chunk]:
        """Scanned chunks of jobs in these partitions that result-store is to be asked about."""

    async def chunk_counts(self, job_id: int) -> OpenChunks: ...

    # Dispatch

    async def waiting_users(self, *, raw: bool) -> list[int]:
        """Users with queued chunks; without those chunks that need raw packets if not `raw`."""

    async def queue(
        self,
        user_id: int,
        limit: int,
        now: datetime,
        *,
        raw: bool,
        skip: Collection[int] = (),
    ) -> list[Candidate]:
        """The user's first `limit` queued chunks that may go, by turn; without those of the jobs to `skip`."""

    async def first_turn(self, user_id: int) -> int:
        """The lowest turn among the user's queued chunks, or 0."""

    async def held(self) -> list[Held]:
        """Every chunk that any worker holds."""

    async def clocks(self, users: Collection[int]) -> Clocks:
        """The clocks of these users, where they have one, and of all that are active."""

    async def rest_clocks(self) -> None:
        """Put to rest the clocks of users with neither queued nor held chunks."""

    async def wake_clocks(self, clocks: Iterable[Clock], virtual: float) -> None:
        """Make these clocks active, and raise the global virtual time to `virtual`."""

    async def charge(self, seconds: Mapping[int, float]) -> None:
        """Add to the clocks of these users."""

    async def seen_workers(self, workers: Iterable[Credit]) -> None:
        """Note that these workers announced themselves now, by the database's clock."""

    async def live_workers(self, within: timedelta) -> list[Credit]:
        """Workers with slots that announced themselves within a time; their partition is not known."""

    # What is going on

    async def seconds_left(self) -> float:
        """Slot seconds that all unfinished jobs are expected to take."""

    async def census(self) -> Census: ...
