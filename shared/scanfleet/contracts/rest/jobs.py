"""Jobs: requests, states, coverage maps, ledgers, estimates, retention and deletion."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, ConfigDict, Field, RootModel, StrictBool, StrictInt, model_validator

from scanfleet.clock import Time
from scanfleet.contracts.messages import Job, JobStatus
from scanfleet.contracts.messages.commands import MAX_SUBNETS
from scanfleet.contracts.rest.base import Answer, Body, Id
from scanfleet.contracts.rest.resources import Cidr, Exclude, PolicyValues
from scanfleet.scanning.policy import ScanPolicy


class CreateJobs(Body):
    subnet_ids: Annotated[
        list[Id],
        Field(min_length=1, max_length=MAX_SUBNETS, json_schema_extra={"uniqueItems": True}),
    ]
    policy_id: Id


class CancelJobs(Body):
    """Select the unfinished jobs to cancel: those that match every given filter, or all."""

    status: (
        Annotated[
            list[Literal[JobStatus.PENDING, JobStatus.RUNNING]],
            Field(min_length=1, max_length=2, description="Only jobs in one of these states."),
        ]
        | None
    ) = None
    subnet_id: Annotated[Id, Field(description="Only jobs of this subnet.")] | None = None
    policy_id: Annotated[Id, Field(description="Only jobs of this policy.")] | None = None
    all: Annotated[StrictBool, Field(description="Every unfinished job; cannot be combined with a filter.")] = False

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        filtered = any(each is not None for each in (self.status, self.subnet_id, self.policy_id))
        if self.all and filtered:
            raise ValueError('"all" cannot be combined with a filter')
        if not self.all and not filtered:
            raise ValueError('give a filter (status, subnet_id or policy_id), or {"all": true}')
        return self


class JobsCancelled(Answer):
    message: str
    job_ids: list[int]


class CancelledPage(Answer):
    """The jobs cancelled by one step of a bulk cancel. Not part of the public API."""

    job_ids: list[int]
    more: bool
    """Whether further jobs may match."""


class Expired(Answer):
    """The command will never be executed. Not part of the public API."""

    state: Literal["expired"] = "expired"


class Accepted(Answer):
    """The command was executed before its gateway asked to expire it. Not part of the public API."""

    state: Literal["accepted"] = "accepted"
    jobs: tuple[Job, ...]


class Rejected(Answer):
    """The command was rejected before its gateway asked to expire it. Not part of the public API."""

    state: Literal["rejected"] = "rejected"
    status: int
    error: str


class Verdict(RootModel[Annotated[Expired | Accepted | Rejected, Field(discriminator="state")]]):
    """The answer to a gateway that asks to expire a command. Not part of the public API."""


class JobsCreated(Answer):
    message: str
    jobs: list[Job]


class JobList(Answer):
    jobs: list[Job]
    total: int
    page: int
    page_size: int


class TaskProgress(Answer):
    status: JobStatus
    progress: Annotated[int, Field(ge=0, le=100)]
    machines_found: int
    error: str


class TaskStatus(Answer):
    job_id: str
    status: TaskProgress
    job: Job

    @classmethod
    def of(cls, job: Job, *, progress: int, machines_found: int, error: str) -> Self:
        """Return the current state of a job."""
        status = TaskProgress(status=job.status, progress=progress, machines_found=machines_found, error=error)
        return cls(job_id=str(job.id), status=status, job=job)


class Snapshot(Answer):
    """A task as of one `seq` of its job: the starting point of a reader of job events. Not part of the public API."""

    seq: int
    task: TaskStatus


class Snapshots(Answer):
    """A page of current tasks, sorted by id. Not part of the public API."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    snapshots: list[Snapshot]
    next: int | None
    """The value of `after` for the next page; null if no unfinished task follows."""

    next_ended: str | None = None
    """The value of `ended_after` for the next page; null if no finished task follows."""

    time: AwareDatetime
    """Time of the database before the query."""


class JobSnapshot(Answer):
    """The subnet and policy of a job as they were when it was created."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_serialization_defaults_required=True)

    job_id: int
    cidr: str
    exclude: list[str]
    policy: ScanPolicy
    addresses: int
    """Number of addresses of the subnet, including excluded ones."""

    excluded: int
    ports: int
    """Number of probes per address."""

    chunks: int
    """Number of chunks into which the job is divided."""

    estimate_seconds: float
    """Expected slot seconds of the whole job."""


class MapBlock(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    ports: str
    letters: str
    """One letter per `step` addresses: `a` answered, `s` silent, `d` down, `t` timed out, `x` excluded, `r` refused, `l` lost,
    `c` cancelled, `>` being scanned, `.` waiting."""


class CoverageMap(Answer):
    """The outcome of each address or chunk of a job, for each block of its ports."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: int
    seq: int
    """Increases with every state of the job."""

    status: JobStatus
    first: str
    """Address of the first letter."""

    addresses: int
    """Number of addresses with a letter in each block. If the subnet has more, request the next ones with `from`."""

    step: int = 1
    """Number of addresses of a letter, the last one excepted. With more than one, the letter is the worst of theirs: the
    first of `lrct>.asdx`."""

    blocks: list[MapBlock]


class ExportedJob(Answer):
    """A finished job, for the document of its results. Not part of the public API."""

    job_id: int
    status: JobStatus
    error: str
    cidr: str
    ports: str
    start: AwareDatetime
    end: AwareDatetime


class LedgerRequest(Answer):
    addresses: int
    ports: int
    probes: int


class LedgerCounts(Answer):
    """Probes (addresses × ports) by outcome; their sum is the request's `probes`."""

    answered: int
    silent: int
    down: int
    timed_out: int
    excluded: int
    refused: int
    cancelled: int
    lost: int
    waiting: int


class LedgerEntry(Answer):
    """One address that was not completely probed, for one block of ports."""

    address: str
    ports: str
    outcome: str
    reason: str


class LedgerPage(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    addresses: list[LedgerEntry]
    total: int
    page: int
    page_size: int
    next: int | None = None
    """`after` of the next page; null at the end of the list."""


class Ledger(Answer):
    """Every probe of a job by outcome. `accounted` proves that the job is complete."""

    job_id: int
    status: JobStatus
    accounted: bool
    request: LedgerRequest
    counts: LedgerCounts
    not_probed: LedgerPage
    eta_seconds: float | None
    """Seconds until the expected end of the job; null while unknown and after its end."""


class WaitingReason(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["paused", "window", "blackout", "no_worker", "no_raw_worker", "budget", "overlap", "queue"]
    until: Time | None
    """For `window`, when the grant's hours begin next; null if they never do, and for the other kinds."""

    detail: str


class Waiting(Answer):
    """The reason why a job does not progress."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: int
    waiting: bool
    """No worker holds a chunk of the job, and it has undispatched work."""

    since: Time | None
    next_possible_start: Time | None
    reasons: list[WaitingReason]
    queued_chunks: int
    held_chunks: int
    """Chunks that workers hold now."""

    eta_seconds: float | None
    """Seconds until the expected end of the job; null while unknown and after its end."""


# Retention and deletion


MAX_DAYS: Final = 36_500  # of any retention


class SubnetRetentionBody(Body):
    keep_results_days: Annotated[
        Annotated[StrictInt, Field(ge=1, le=MAX_DAYS)] | None,
        Field(
            description="Days after which ended jobs of the subnet are deleted; null for the platform's setting. "
            "The two newest completed jobs are kept."
        ),
    ]


class SubnetRetention(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    keep_results_days: int | None
    effective_days: int
    """The subnet's own days, else the platform's; 0 if jobs are not deleted by age."""


class DeletedCounts(Answer):
    """Numbers of deleted documents of a job; each is null while unknown."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    hosts: int | None
    """Host documents of result-store: one per address and block of ports."""

    rows: int | None
    """Results."""

    chunks: int | None


class Deletion(Answer):
    """The receipt of a deleted job."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: int
    user_id: int
    """Owner of the job."""

    subnet_id: int
    reason: Literal["request", "retention"]
    requested_by: int | None
    """The user who requested it; null for retention, and for deletions of older releases."""

    requested_at: Time
    state: Literal["waiting", "results", "chunks", "done"]
    """The current stage: deletion of the results, then of the chunks with the ledger. The job itself is deleted first.

    `waiting`: the last chunks of a cancelled job are being stopped.
    """

    completed_at: Time | None
    deleted: DeletedCounts


class DeletionList(Answer):
    deletions: list[Deletion]
    total: int
    page: int
    page_size: int


# Estimates


class EstimateBody(Body):
    """A scan to estimate: a subnet by id or by its networks, and a policy by id or by its values."""

    subnet_id: Id | None = None
    cidr: Cidr | None = None
    exclude: Exclude = []  # noqa: RUF012 # pydantic copies it
    policy_id: Id | None = None
    policy: PolicyValues | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.subnet_id is None) == (self.cidr is None):
            raise ValueError("give either subnet_id or cidr")
        if self.exclude and self.cidr is None:
            raise ValueError("exclude needs cidr: a subnet has its own")
        if (self.policy_id is None) == (self.policy is None):
            raise ValueError("give either policy_id or policy")
        return self


class EstimateRefusal(Answer):
    """A reason for which the scan would be refused now."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    rule: str
    """Name of the rule, as in the audit log: `targets`, `grant`, `quota`, `request`."""

    field: str | None
    """The invalid field of the request; null if the refusal does not concern a single field."""

    error: str


class Estimate(Answer):
    """A scan as it would be created if it were requested now. Nothing is created."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    addresses: int
    """Number of addresses of the subnet, including excluded ones."""

    excluded: int
    exclude: list[str]
    """The networks that are excluded: those within the subnet, merged, with its broadcast address if it has one."""

    tcp_ports: int
    udp_ports: int
    probes: int
    """Addresses that are not excluded × ports."""

    chunks: int
    """Number of chunks into which the job would be divided."""

    estimate_seconds: float
    """Expected slot seconds of the whole job: a fleet with several free slots needs less time."""

    needs_raw_packets: bool
    """Whether some of its ports need a worker that can send raw packets."""

    nmap_options: list[str]
    """Options of nmap for the first chunk, on a worker without raw packets unless the chunk needs them; empty if the
    policy cannot be executed."""

    refusals: list[EstimateRefusal]
    """Every reason for which the scan would be refused; empty if it would be accepted."""
