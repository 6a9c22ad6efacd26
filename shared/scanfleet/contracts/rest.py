"""The models of the public REST API: the orchestrator parses and returns them, the gateway documents them."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StrictBool,
    StrictInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scanfleet.clock import Time
from scanfleet.contracts.messages import Job, JobStatus, audit
from scanfleet.contracts.messages.commands import MAX_SUBNETS
from scanfleet.contracts.messages.fields import MAX_ID
from scanfleet.errors import BadRequestError
from scanfleet.scanning import policy as vocabulary
from scanfleet.scanning.policy import PolicyError, Preset, ScanPolicy, fill_in

MAX_EXCLUDES = 1_000  # per subnet: its document stays small and readable
MAX_BODY_BYTES = 16 * 1024  # per request; the largest policy, with 10,000 characters of ports, takes 13 kB
MAX_IMPORT_LINES = 1_000
BODY_LIMITS = {
    "/api/v1/task/estimate": 80 * 1024,  # 1,000 excluded IPv6 networks, and the values of a policy
    "/api/v1/task": 32 * 1024,  # 1,000 subnet ids of 17 digits
    "/api/v1/subnet/import": 128 * 1024,  # 1,000 lines of 128 characters
    "/api/v1/subnet": 64 * 1024,  # 1,000 excluded IPv6 networks
}
"""Larger body limits, by path prefix."""

MAX_NAME_CHARS = 50  # of an unknown field's name in an error
MAX_UNKNOWN = 5  # fields reported per error; enough to correct a request in a few attempts

Id = Annotated[StrictInt, Field(ge=1, le=MAX_ID)]


PRINTABLE = r"^[^\x00-\x1f\x7f]+$"


def worded(pattern: str, sentence: str) -> BeforeValidator:
    """Return a validator that reports text which does not match the pattern of its field by a sentence."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value and not re.fullmatch(pattern, value):
            raise PydanticCustomError("pattern", sentence)
        return value

    return BeforeValidator(check)


_WITHOUT_CONTROLS: Final = worded(PRINTABLE, "must be text without control characters")


def _rfc3339(value: Any) -> Any:
    # pydantic also accepts numbers as seconds since 1970, which are undocumented.
    if not isinstance(value, datetime) and not (isinstance(value, str) and _DATE_AND_TIME.match(value)):
        raise PydanticCustomError("time", "a time as in RFC 3339 is expected, such as 2026-01-01T12:00:00Z")
    return value


def _utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise PydanticCustomError("time", "must be a time with a time zone, such as 2026-01-01T12:00:00Z")
    # In UTC it may lie outside the years 1 to 9999, which neither datetime nor MongoDB can express.
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("time", "the time is out of range") from None


_DATE_AND_TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]")

InputTime = Annotated[datetime, BeforeValidator(_rfc3339), AfterValidator(_utc)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PRINTABLE), _WITHOUT_CONTROLS]


class _Body(BaseModel):
    """A request body. Unknown fields are rejected before validation, at the cost of one pass over the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        fields = cls.model_fields
        if isinstance(given, dict) and (unknown := [name for name in given if name not in fields]):
            named = ", ".join(ascii(name[:MAX_NAME_CHARS])[1:-1] for name in unknown[:MAX_UNKNOWN])
            more = f" and {len(unknown) - MAX_UNKNOWN} more" if len(unknown) > MAX_UNKNOWN else ""
            raise PydanticCustomError("unknown_fields", "unknown fields: {named}{more}", {"named": named, "more": more})
        return given


class NamedBody(_Body):
    """The body of an object that its user names."""

    name: Name


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Error(_Answer):
    error: str


class Done(_Answer):
    message: str


# Tasks


class CreateJobs(_Body):
    subnet_ids: Annotated[
        list[Id],
        Field(min_length=1, max_length=MAX_SUBNETS, json_schema_extra={"uniqueItems": True}),
    ]
    policy_id: Id


class CancelJobs(_Body):
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


class JobsCancelled(_Answer):
    message: str
    job_ids: list[int]


class CancelledPage(_Answer):
    """The jobs cancelled by one step of a bulk cancel. Not part of the public API."""

    job_ids: list[int]
    more: bool
    """Whether further jobs may match."""


class Expired(_Answer):
    """The command will never be executed. Not part of the public API."""

    state: Literal["expired"] = "expired"


class Accepted(_Answer):
    """The command was executed before its gateway asked to expire it. Not part of the public API."""

    state: Literal["accepted"] = "accepted"
    jobs: tuple[Job, ...]


class Rejected(_Answer):
    """The command was rejected before its gateway asked to expire it. Not part of the public API."""

    state: Literal["rejected"] = "rejected"
    status: int
    error: str


class Verdict(RootModel[Annotated[Expired | Accepted | Rejected, Field(discriminator="state")]]):
    """The answer to a gateway that asks to expire a command. Not part of the public API."""


class JobsCreated(_Answer):
    message: str
    jobs: list[Job]


class JobList(_Answer):
    jobs: list[Job]
    total: int
    page: int
    page_size: int


class TaskProgress(_Answer):
    status: JobStatus
    progress: Annotated[int, Field(ge=0, le=100)]
    machines_found: int
    error: str


class TaskStatus(_Answer):
    job_id: str
    status: TaskProgress
    job: Job

    @classmethod
    def of(cls, job: Job, *, progress: int, machines_found: int, error: str) -> Self:
        """Return the current state of a job."""
        status = TaskProgress(status=job.status, progress=progress, machines_found=machines_found, error=error)
        return cls(job_id=str(job.id), status=status, job=job)


class Snapshot(_Answer):
    """A task as of one `seq` of its job: the starting point of a reader of job events. Not part of the public API."""

    seq: int
    task: TaskStatus


class Snapshots(_Answer):
    """A page of current tasks, sorted by id. Not part of the public API."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    snapshots: list[Snapshot]
    next: int | None
    """The value of `after` for the next page; null if no unfinished task follows."""

    next_ended: str | None = None
    """The value of `ended_after` for the next page; null if no finished task follows."""

    time: AwareDatetime
    """Time of the database before the query."""


class JobSnapshot(_Answer):
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


class MapBlock(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    ports: str
    letters: str
    """One letter per `step` addresses: `a` answered, `s` silent, `d` down, `t` timed out, `x` excluded, `r` refused, `l` lost,
    `c` cancelled, `>` being scanned, `.` waiting."""


class CoverageMap(_Answer):
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


class Result(_Answer):
    """One port that nmap found open or open|filtered."""

    id: int
    job_id: int
    ip_address: str
    port: int
    protocol: str
    service: str
    version: str
    os_info: str
    status: str
    banner: str
    raw_data: str
    created_at: Time
    updated_at: Time


HostOutcome = Literal["answered", "silent", "timed_out"]


class HostPort(_Answer):
    """One port of a host that nmap found open or open|filtered; its texts are in the results."""

    port: int
    protocol: str
    status: str
    service: str
    version: str


class HostSystem(_Answer):
    """An operating system that nmap found probable."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    accuracy: int
    """Percent."""


class HostScript(_Answer):
    """Output of an NSE script about a host as a whole."""

    id: str
    output: str


class Host(_Answer):
    """An address that answered, or has ports that nmap found open or open|filtered."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: int
    ip_address: str
    outcome: HostOutcome
    """As in the ledger; `answered` if the address answered for any block of ports."""

    reason: str
    """Why the host is up, in nmap's words: `echo-reply`, `syn-ack`, `user-set` …"""

    hostnames: list[str]
    """Names that its services report; the platform does not query DNS."""

    mac: str
    """Hardware address, if the host is on a network of the worker."""

    vendor: str
    os_info: str
    """The most probable operating system; without OS detection what a service reports."""

    systems: list[HostSystem]
    """Operating systems found by OS detection, the most accurate first."""

    ports: list[HostPort]
    """The first ports that are open or open|filtered, at most 1,000."""

    open_filtered: str
    """UDP ports that are open|filtered without further information, as ranges; they are not in `ports`."""

    port_count: int
    """Number of ports that are open or open|filtered."""

    closed: int
    filtered: int
    scripts: list[HostScript]
    seconds: float | None
    """Duration of the scan of this host; null if unknown."""

    created_at: Time
    updated_at: Time


class ExportedJob(_Answer):
    """A finished job, for the document of its results. Not part of the public API."""

    job_id: int
    status: JobStatus
    error: str
    cidr: str
    ports: str
    start: AwareDatetime
    end: AwareDatetime


class LedgerRequest(_Answer):
    addresses: int
    ports: int
    probes: int


class LedgerCounts(_Answer):
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


class LedgerEntry(_Answer):
    """One address that was not completely probed, for one block of ports."""

    address: str
    ports: str
    outcome: str
    reason: str


class LedgerPage(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    addresses: list[LedgerEntry]
    total: int
    page: int
    page_size: int
    next: int | None = None
    """`after` of the next page; null at the end of the list."""


class Ledger(_Answer):
    """Every probe of a job by outcome. `accounted` proves that the job is complete."""

    job_id: int
    status: JobStatus
    accounted: bool
    request: LedgerRequest
    counts: LedgerCounts
    not_probed: LedgerPage
    eta_seconds: float | None
    """Seconds until the expected end of the job; null while unknown and after its end."""


class WaitingReason(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["paused", "window", "blackout", "no_worker", "no_raw_worker", "budget", "overlap", "queue"]
    until: Time | None
    """For `window`, when the grant's hours begin next; null if they never do, and for the other kinds."""

    detail: str


class Waiting(_Answer):
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


class SubnetRetentionBody(_Body):
    keep_results_days: Annotated[
        Annotated[StrictInt, Field(ge=1, le=MAX_DAYS)] | None,
        Field(
            description="Days after which ended jobs of the subnet are deleted; null for the platform's setting. "
            "The two newest completed jobs are kept."
        ),
    ]


class SubnetRetention(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    keep_results_days: int | None
    effective_days: int
    """The subnet's own days, else the platform's; 0 if jobs are not deleted by age."""


class DeletedCounts(_Answer):
    """Numbers of deleted documents of a job; each is null while unknown."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    hosts: int | None
    """Host documents of result-store: one per address and block of ports."""

    rows: int | None
    """Results."""

    chunks: int | None


class Deletion(_Answer):
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


class DeletionList(_Answer):
    deletions: list[Deletion]
    total: int
    page: int
    page_size: int


# Subnets


Cidr = Annotated[str, Field(max_length=50)]
Exclude = Annotated[
    list[Cidr] | None,
    Field(
        max_length=MAX_EXCLUDES,
        description="Networks to exclude; those outside the subnet have no effect, and the response shows the "
        "others merged.",
    ),
]


class SubnetBody(NamedBody):
    cidr: Cidr
    exclude: Exclude = []


class Subnet(_Answer):
    id: int
    user_id: int
    name: str
    cidr: str
    exclude: list[str]
    created_at: AwareDatetime
    updated_at: AwareDatetime


class SubnetList(_Answer):
    subnets: list[Subnet]
    total: int
    page: int
    page_size: int


class SubnetsImported(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    created: int
    updated: int = 0
    """Number of existing subnets that have the network and the exclusions of a line now."""

    subnets: list[Subnet]
    """One per line, in order; existing ones of the caller are not created again."""


class SubnetImportLine(_Answer):
    """The effect of an import for one line of the file."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    line: int
    """Number of the line in the file, from 1."""

    action: Literal["create", "update", "exists", "refused"]
    """`exists` if the caller has an equal subnet, or an earlier line has it; `update` only in an import with `update`."""

    id: int | None
    """Id of the existing subnet; null if there is none yet."""

    error: str | None
    """Why the line is refused."""


class SubnetImportCheck(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    lines: list[SubnetImportLine]
    """One per line, in order."""


# Policies


def _preset_decides() -> Any:
    """Default of a field that `PolicyBody.scan` fills in; a factory, so that no default is documented."""


class PolicyValues(_Body):
    """The values of a policy; omitted fields have the preset's values."""

    preset: Preset = Field(
        default=Preset.STANDARD,
        description="Values of omitted fields. `quick`: the 100 most common TCP ports, without service detection. "
        "`standard`: the 1,000 most common, with it. `full`: all TCP ports, with scripts. `sweep`: for silent or sparsely "
        "used networks, the 100 most common ports of every address, without discovery and with one retry.",
    )
    ports: vocabulary.Ports = Field(default_factory=_preset_decides)
    technique: vocabulary.TcpTechnique = Field(default_factory=_preset_decides)
    discovery: vocabulary.Discovery = Field(default_factory=_preset_decides)
    service_detection: vocabulary.ServiceDetection = Field(default_factory=_preset_decides)
    version_intensity: vocabulary.VersionIntensity = Field(default_factory=_preset_decides)
    os_detection: vocabulary.OsDetection = Field(default_factory=_preset_decides)
    scripts: vocabulary.Scripts = Field(default_factory=_preset_decides)
    timing: vocabulary.Timing = Field(default_factory=_preset_decides)
    max_rate: vocabulary.MaxRate = Field(default_factory=_preset_decides)
    min_rate: vocabulary.MinRate = Field(default_factory=_preset_decides)
    max_rtt_timeout: vocabulary.MaxRttTimeout = Field(default_factory=_preset_decides)
    max_retries: vocabulary.MaxRetries = Field(default_factory=_preset_decides)
    host_timeout: vocabulary.HostTimeout = Field(default_factory=_preset_decides)

    def scan(self, scripts: AbstractSet[str]) -> ScanPolicy:
        """Return the requested policy, validated against the allowed scripts.

        Raises:
            BadRequestError: a value is not allowed, or two values are inconsistent.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set - {"name", "preset"}}
        try:
            return fill_in(self.preset, given, scripts)
        except PolicyError as error:
            raise BadRequestError(str(error)) from error


class PolicyBody(PolicyValues, NamedBody):
    """A policy; omitted fields have the preset's values."""


class Policy(ScanPolicy):
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)  # a response has every field

    id: int
    user_id: int
    name: str
    created_at: AwareDatetime
    updated_at: AwareDatetime


class PolicyList(_Answer):
    policies: list[Policy]
    total: int
    page: int
    page_size: int


# Resources

Body_co = TypeVar("Body_co", bound=NamedBody, covariant=True)
Answer_co = TypeVar("Answer_co", bound=BaseModel, covariant=True)
List_co = TypeVar("List_co", bound=BaseModel, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource(Generic[Body_co, Answer_co, List_co]):
    """Objects of one kind, each owned by one user, which the user lists, creates, reads, replaces and deletes.

    The routes of the gateway and the orchestrator, and the calls of the client, are derived from it.
    """

    name: str
    """Of one object, in paths, ids and messages: `subnet`."""

    plural: str
    """The field of `listed` with the objects; also the collection, and the sequence of ids."""

    body: type[Body_co]
    answer: type[Answer_co]
    listed: type[List_co]
    replacing: str = ""
    """Documents the effect of a replacement on other objects."""

    deletable: str = ""
    """Documents which objects can be deleted, if not all; a deletion of others is answered 409."""

    @property
    def path(self) -> str:
        return f"/api/v1/{self.name}"

    @property
    def id_name(self) -> str:
        """Name of the id in paths and queries."""
        return f"{self.name}_id"


SUBNETS: Final = Resource(
    name="subnet",
    plural="subnets",
    body=SubnetBody,
    answer=Subnet,
    listed=SubnetList,
    replacing="existing jobs keep the previous one",
    deletable="that no unfinished job scans",
)
POLICIES: Final = Resource(
    name="policy",
    plural="policies",
    body=PolicyBody,
    answer=Policy,
    listed=PolicyList,
    replacing="existing jobs keep the previous one",
)
RESOURCES: Final[tuple[Resource[NamedBody, BaseModel, BaseModel], ...]] = (SUBNETS, POLICIES)


# Estimates


class EstimateBody(_Body):
    """A scan to estimate: a subnet by id or by its networks, and a policy by id or by its values."""

    subnet_id: Id | None = None
    cidr: Cidr | None = None
    exclude: Exclude = []
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


class EstimateRefusal(_Answer):
    """A reason for which the scan would be refused now."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    rule: str
    """Name of the rule, as in the audit log: `targets`, `grant`, `quota`, `request`."""

    field: str | None
    """The invalid field of the request; null if the refusal does not concern a single field."""

    error: str


class Estimate(_Answer):
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


# Audit


class AuditEntry(audit.AuditEntry):
    """One change or refusal."""

    received_at: Time
    """Time of recording, which orders the log; `time` is set by the reporting service."""

    genuine: bool = True
    """False if the platform has not signed the entry in this form: it was changed or added in the database."""


class AuditList(_Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    entries: list[AuditEntry]
    total: int
    """With filters, counted up to 10,000. On later pages it exceeds the number of entries up to that page while more may follow."""

    page: int
    page_size: int


# Access

Text = Annotated[str, Field(min_length=1, max_length=255, pattern=PRINTABLE), _WITHOUT_CONTROLS]


class RevocationBody(_Body):
    """The tokens to revoke: exactly one of `jti`, `sub` and `user_id`."""

    jti: Text | None = None
    """Id of a single token."""

    sub: Text | None = None
    """The user's name at the issuer."""

    user_id: Id | None = None
    issued_before: InputTime | None = None
    """Revoke only the user's tokens issued before this time; default now."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(each is not None for each in (self.jti, self.sub, self.user_id)) != 1:
            raise ValueError("give exactly one of jti, sub and user_id")
        if self.jti is not None and self.issued_before is not None:
            raise ValueError("issued_before needs sub or user_id")
        if self.issued_before is not None and self.issued_before.year < 1970:  # noqa: PLR2004 # start of Unix time
            raise ValueError("issued_before is before 1970")
        return self


class Revoked(_Answer):
    """Revoked tokens. Not part of the public API."""

    jti: str | None
    sub: str | None
    user_id: int | None
    issued_before: AwareDatetime | None


class Revocation(Revoked):
    id: int
    created_by: int
    created_at: AwareDatetime
    expires_at: AwareDatetime


class RevocationList(_Answer):
    revocations: list[Revocation]
    total: int
    page: int
    page_size: int


class SessionEnded(_Answer):
    logout_url: str | None
    """The issuer's URL for sign-out; null if it has none."""


class Subject(_Body):
    """A user's name at the issuer. Not part of the public API."""

    issuer: Annotated[str, Field(min_length=1, max_length=2_000)]
    subject: Text


MAX_ISSUER_KEYS = 100  # recorded keys; an issuer has only a few


class IssuerKeys(_Body):
    """Keys of an issuer that verify tokens, by their names. Not part of the public API."""

    issuer: Annotated[str, Field(min_length=1, max_length=2_000)]
    keys: Annotated[list[Text], Field(max_length=MAX_ISSUER_KEYS)]


class UserId(_Answer):
    """Not part of the public API."""

    user_id: Id


# The platform and the caller


class ScanLimits(_Answer):
    """The orchestrator's limits of scans. Not part of the public API by itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    presets: dict[Preset, ScanPolicy]
    """The policy of each preset."""

    scripts: list[str]
    """NSE scripts that a policy may name."""

    max_addresses: int
    """Maximum number of addresses per subnet."""


class Info(ScanLimits):
    """The settings that a client needs before it has a token; none of them is secret."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_serialization_defaults_required=True)

    version: str
    api: Literal["v1"]
    issuer: str
    """Issuer of the accepted tokens."""

    client_id: str | None
    """Client id at the issuer for sign-in; null if none is registered."""

    audience: str
    scopes: list[str]
    sign_in: list[Literal["token", "oidc"]]
    """`token`: with an existing token of the caller; `oidc`: at the issuer, with `client_id`."""

    sign_in_to_page: list[Literal["token", "oidc"]] = []
    """The same for the page of this gateway; empty when it has no browser sessions."""


class Quota(_Answer):
    """Quota of requests per minute."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int
    left: int
    reset: int
    """Seconds until more requests are permitted."""


class PlacesLeft(_Answer):
    """Concurrent requests."""

    limit: int
    left: int


class Limits(_Answer):
    """Limits of this user at this replica of the gateway; each replica counts separately."""

    reads: Quota
    writes: Quota
    cancels: Quota
    at_once: PlacesLeft


class Me(_Answer):
    """The caller, and the caller's remaining limits."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    user_id: int
    admin: bool
    expires_at: Time
    """Expiry of the token."""

    limits: Limits


# Paths and queries

MAX_HOST_PORTS = 1_000  # listed per host; the results have all
