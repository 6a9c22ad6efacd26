"""The query parameters of the public REST API, a model per route: the services parse them, the gateway documents them.

A parameter that is a tuple is a list: repeated, or separated by commas. None is the value of a parameter that is missing.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, WithJsonSchema

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.fields import MAX_ID

ALL_USERS: Final = "all"
MAX_RESULTS: Final = 1_000_000  # maximum value of `limit`; without `limit` a response has all results

MAX_PAGE_SIZE: Final = 100
MAX_LEDGER_PAGE_SIZE: Final = 1_000  # a few hundred kilobytes, with long lists of ports about a megabyte
_MAX_PAGE: Final = 1_000_000_000  # limits the number of skipped documents to MongoDB's integer range
_WHOSE: Final = r"^(all|[1-9][0-9]{0,15})$"
_ID: Final[dict[str, Any]] = {"type": "integer", "minimum": 1, "maximum": MAX_ID}


def _known_field(name: str) -> str:
    if name not in rest.Result.model_fields:
        raise ValueError(f"must be of {', '.join(rest.Result.model_fields)}")
    return name


WhoseText = Annotated[str, Field(pattern=_WHOSE), rest.worded(_WHOSE, f'must be the id of a user, or "{ALL_USERS}"')]
Whose = Annotated[WhoseText, WithJsonSchema({"anyOf": [_ID, {"const": ALL_USERS}]})]
Id = Annotated[int, Field(ge=1, le=MAX_ID)]
Limit = Annotated[int, Field(ge=1, le=MAX_RESULTS)]
Port = Annotated[int, Field(ge=0, le=65_535), rest.worded(r"[0-9]{1,5}", "must be a number from 0 to 65535")]
Position = Annotated[int, Field(ge=0, le=MAX_ID)]
Status = Annotated[JobStatus, WithJsonSchema({"type": "string", "enum": list(JobStatus)})]
ResultField = Annotated[
    str, AfterValidator(_known_field), WithJsonSchema({"type": "string", "enum": list(rest.Result.model_fields)})
]
Text = Annotated[str, Field(max_length=200)]
AddressText = Annotated[str, Field(max_length=50)]


class Query(BaseModel):
    """The query parameters of a route."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Page(Query):
    """The parameters of every list."""

    page: Annotated[int, Field(ge=1, le=_MAX_PAGE)] = 1
    """Page number, from 1."""

    page_size: Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE)] = 10
    """Number of objects per page."""

    @property
    def skip(self) -> int:
        return (self.page - 1) * self.page_size


class Tasks(Page):
    status: tuple[Status, ...] = ()
    """Only jobs in one of these states; repeated, or separated by commas."""

    user_id: Whose | None = None
    """For administrators: the jobs of this user, or of `all` users; without it the caller's own."""

    subnet_id: Id | None = None
    """Only jobs of this subnet."""

    policy_id: Id | None = None
    """Only jobs of this policy."""

    since: rest.InputTime | None = None
    """Only jobs created at or after this time."""


class Events(Query):
    user_id: WhoseText | None = None  # as text, as releases have documented it
    """For administrators: the jobs of this user, or of `all` users; without it the caller's own."""


class LatestJobs(Events):
    """First the unfinished jobs, then those that have ended since a time. Not part of the public API."""

    after: Position = 0
    """Only unfinished jobs with a greater id."""

    ended_after: Annotated[str, Field(pattern=r"^\d{1,14}-\d{1,19}$")] | None = None
    """Only jobs that have ended, from there on; see `Snapshots.next_ended`."""

    changed_since: AwareDatetime | None = None
    """Only unfinished jobs that have changed since then."""

    ended_since: AwareDatetime | None = None
    """Also jobs that have ended since then."""


class Ledger(Page):
    page_size: Annotated[int, Field(ge=1, le=MAX_LEDGER_PAGE_SIZE)] = 100
    """Number of objects per page."""

    after: Position | None = None
    """Only addresses after this position: 0, then `next` of the page before. Such a page looks into a bounded number of chunks, so
    it may have fewer addresses than `page_size`, or none, although the list continues. Not together with `page`."""


class Map(Query):
    ports: Annotated[str, Field(max_length=8_000)] | None = None  # of the 8,192 bytes of a URL
    """Only blocks with some of these ports, in the syntax of a policy's `ports`."""

    from_: Annotated[AddressText | None, Field(alias="from")] = None
    """Only addresses from this one on. A response has at most 65,536 letters per block of ports."""

    by: Literal["address", "chunk"] = "address"
    """Whether a letter is the outcome of an address, or the worst one of the addresses of a chunk."""


class Results(Query):
    fields: tuple[ResultField, ...] = ()
    """Only these fields; without `raw_data` the response has a seventh of the size. Repeated, or separated by commas."""

    after: Position | None = None
    """Only results with a greater `id`. With this parameter or `limit` results are sorted by `id`."""

    limit: Limit | None = None
    """Maximum number of results; all without it."""

    port: tuple[Port, ...] = ()
    """Only these ports; repeated, or separated by commas."""

    service: Text | None = None
    """Only this service, as nmap names it."""

    address: AddressText | None = None
    """Only this address, or the addresses of this network."""


class Hosts(Query):
    after: AddressText | None = None
    """Only hosts after this address: the last one of the page before."""

    limit: Limit | None = None
    """Maximum number of hosts; all without it."""

    port: tuple[Port, ...] = ()
    """Only hosts with one of these ports; repeated, or separated by commas."""

    service: Text | None = None
    """Only hosts with this service, on one of the `port`s if given."""

    address: AddressText | None = None
    """Only this address, or the addresses of this network."""


class NmapXml(Query):
    hosts: Literal["all", "up"] = "all"
    """`up` leaves out the hosts that are down."""


class SubnetImport(Query):
    dry_run: bool = False
    """Whether to check each line and change nothing."""

    update: bool = False
    """Whether a line with the name of one existing subnet gives it another network or other exclusions, instead of creating a
    second subnet of that name."""


class Deletions(Page):
    state: Literal["open", "done"] | None = None
    """Only deletions in progress (open), or completed ones (done)."""

    user_id: Whose | None = None
    """For administrators: deletions of jobs of this user, or of `all` users; without it of the caller's own."""


class Audit(Page):
    subject: Text | None = None
    """Only entries about this user."""

    request_id: Text | None = None
    """Only entries of this request."""

    action: Text | None = None
    """Only entries of this operation, by its `operationId`."""

    decision: Literal["allowed", "refused"] | None = None
    """Only entries with this decision."""

    rule: Text | None = None
    """Only entries decided by this rule."""

    source: Text | None = None
    """Only requests from this address."""

    service: Text | None = None
    """Only entries of this service, for example `api-gateway`."""

    since: rest.InputTime | None = None
    """Only entries received at or after this time."""

    until: rest.InputTime | None = None
    """Only entries received before this time."""
