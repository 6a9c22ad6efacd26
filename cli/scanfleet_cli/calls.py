"""The operations of the API as values, which `Client.send` and `AsyncClient.send` send.

A call has a method, a path, the type of its response, and whether it is safe to repeat. Each operation of the API has
one function, which usually has the name of its `operationId`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Literal, TypeVar
from uuid import uuid4

from pydantic import BaseModel, TypeAdapter

from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import JobStatus

T = TypeVar("T")
Body = TypeVar("Body", bound=rest.NamedBody)
Answer = TypeVar("Answer", bound=BaseModel)
Listed = TypeVar("Listed", bound=BaseModel)

NDJSON: Final = "application/x-ndjson"
PAGE_SIZE: Final = queries.MAX_PAGE_SIZE
LEDGER_PAGE_SIZE: Final = queries.MAX_LEDGER_PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and the type of its response."""

    method: str
    path: str
    answer: type[T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    csv: str | None = None
    """Body of an operation that reads CSV."""

    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """Whether the request is idempotent, so that it may be repeated after a cut connection."""

    def read(self, content: bytes) -> T:
        """Parse the body of a response.

        Raises:
            pydantic.ValidationError: it does not match the type.
        """
        return TypeAdapter(self.answer).validate_json(content)


@dataclass(frozen=True, slots=True)
class ListCall(Call[T]):
    """A request for one page of a list."""

    items: str = ""
    """Field of the response that holds the objects."""

    def page(self, number: int, size: int) -> ListCall[T]:
        return replace(self, query={**self.query, "page": number, "page_size": size})


# Tasks


def list_tasks(
    *,
    status: Sequence[JobStatus] = (),
    user_id: int | str | None = None,
    subnet_id: int | None = None,
    policy_id: int | None = None,
    since: str | None = None,
) -> ListCall[rest.JobList]:
    """List jobs of the caller; for administrators those of a user, or of `"all"`."""
    query = {
        "status": ",".join(status) or None,
        "user_id": user_id,
        "subnet_id": subnet_id,
        "policy_id": policy_id,
        "since": since,
    }
    return _list("/api/v1/task", rest.JobList, "jobs", query)


def create_tasks(subnet_ids: Sequence[int], policy_id: int, key: str | None = None) -> Call[rest.JobsCreated]:
    """Create a job for each subnet; repeating the call with the same key creates no others."""
    return Call(
        "POST",
        "/api/v1/task",
        rest.JobsCreated,
        body={"subnet_ids": list(subnet_ids), "policy_id": policy_id},
        headers=_with_key(key),
    )


def estimate_task(wanted: rest.EstimateBody) -> Call[rest.Estimate]:
    """Estimate a scan, with every reason to refuse it; creates nothing."""
    return Call("POST", "/api/v1/task/estimate", rest.Estimate, body=_given(wanted))


def read_task(job_id: int) -> Call[rest.TaskStatus]:
    return Call("GET", f"/api/v1/task/{job_id}", rest.TaskStatus)


def watch_task(job_id: int, last_event_id: str = "") -> Call[Any]:
    """Stream the states of a job; for `Client.events`."""
    return Call("GET", f"/api/v1/task/{job_id}/events", object, headers=_stream(last_event_id))


def watch_tasks(user_id: int | str | None = None, last_event_id: str = "") -> Call[Any]:
    """Stream the states of all jobs of the caller, for administrators of a user or `"all"`, without end."""
    return Call("GET", "/api/v1/events", object, query=_set({"user_id": user_id}), headers=_stream(last_event_id))


def cancel_task(job_id: int) -> Call[rest.Done]:
    return Call("POST", f"/api/v1/task/{job_id}/cancel", rest.Done)


def cancel_tasks(wanted: rest.CancelJobs) -> Call[rest.JobsCancelled]:
    return Call("POST", "/api/v1/task/cancel", rest.JobsCancelled, body=_given(wanted))


def read_results(
    job_id: int,
    accept: str = NDJSON,
    *,
    fields: str | None = None,
    after: int | None = None,
    limit: int | None = None,
    port: Sequence[int] | None = None,
    service: str | None = None,
    address: str | None = None,
) -> Call[list[rest.Result]]:
    """Read the results of a job; for `Client.results` and `Client.stream`. `fields` are names, separated by commas."""
    query = {
        "fields": fields,
        "after": after,
        "limit": limit,
        "port": port,
        "service": service,
        "address": address,
    }
    return Call(
        "GET", f"/api/v1/task/{job_id}/results", list[rest.Result], query=_set(query), headers={"Accept": accept}
    )


def read_hosts(
    job_id: int,
    *,
    after: str | None = None,
    limit: int | None = None,
    port: Sequence[int] | None = None,
    service: str | None = None,
    address: str | None = None,
) -> Call[list[rest.Host]]:
    """Read the hosts of a job, one JSON object a line; for `Client.stream`."""
    query = {"after": after, "limit": limit, "port": port, "service": service, "address": address}
    return Call("GET", f"/api/v1/task/{job_id}/hosts", list[rest.Host], query=_set(query), headers={"Accept": NDJSON})


def read_nmap_xml(job_id: int, hosts: str | None = None) -> Call[Any]:
    """Read the results of an ended job as nmap's XML; for `Client.stream`. `hosts="up"` leaves out those that are down."""
    return Call("GET", f"/api/v1/task/{job_id}/nmap.xml", object, query=_set({"hosts": hosts}))


def read_ledger(
    job_id: int, page: int = 1, page_size: int = LEDGER_PAGE_SIZE, *, after: int | None = None
) -> Call[rest.Ledger]:
    """Read the outcomes of a job, and the addresses that were not completely probed: a page, or those `after` a position."""
    query = {"page": page if after is None else None, "page_size": page_size, "after": after}
    return Call("GET", f"/api/v1/task/{job_id}/ledger", rest.Ledger, query=_set(query))


def read_waiting(job_id: int) -> Call[rest.Waiting]:
    return Call("GET", f"/api/v1/task/{job_id}/waiting", rest.Waiting)


def read_snapshot(job_id: int) -> Call[rest.JobSnapshot]:
    """Read the request of a job as submitted, regardless of later changes to its subnet and policy."""
    return Call("GET", f"/api/v1/task/{job_id}/snapshot", rest.JobSnapshot)


def read_map(
    job_id: int,
    *,
    ports: str | None = None,
    first: str | None = None,
    by: Literal["address", "chunk"] | None = None,
) -> Call[rest.CoverageMap]:
    """Read the outcome of each address or chunk of a job, for all its port blocks or that of `ports`, from `first` on."""
    query = _set({"ports": ports, "from": first, "by": by})
    return Call("GET", f"/api/v1/task/{job_id}/map", rest.CoverageMap, query=query)


def delete_task(job_id: int) -> Call[rest.Done]:
    """Delete an ended job with its results and its ledger."""
    return Call("DELETE", f"/api/v1/task/{job_id}", rest.Done)


def list_deletions(*, state: str | None = None, user_id: int | str | None = None) -> ListCall[rest.DeletionList]:
    """List receipts of the caller's deleted jobs, all or those that are `"open"` or `"done"`; for administrators others' too."""
    return _list("/api/v1/deletion", rest.DeletionList, "deletions", {"state": state, "user_id": user_id})


# The platform and the caller


def read_info() -> Call[rest.Info]:
    """Read the information that a client needs before it has a token."""
    return Call("GET", "/api/v1/info", rest.Info)


def read_me() -> Call[rest.Me]:
    """Read the caller, and the use of the caller's limits."""
    return Call("GET", "/api/v1/me", rest.Me)


# Resources


class _Operations(Generic[Body, Answer, Listed]):
    """The operations of a resource."""

    def __init__(self, resource: rest.Resource[Body, Answer, Listed]) -> None:
        self._resource = resource

    def list_all(self) -> ListCall[Listed]:
        return _list(self._resource.path, self._resource.listed, self._resource.plural)

    def create(self, body: Body, key: str | None = None) -> Call[Answer]:
        """Create an object; repeating the call with the same key creates no other."""
        path, headers = self._resource.path, _with_key(key)
        return Call("POST", path, self._resource.answer, body=_given(body), headers=headers)

    def read(self, id_: int) -> Call[Answer]:
        return Call("GET", f"{self._resource.path}/{id_}", self._resource.answer)

    def replace(self, id_: int, body: Body, if_match: str = "") -> Call[Answer]:
        path, headers = f"{self._resource.path}/{id_}", _if_match(if_match)
        return Call("PUT", path, self._resource.answer, body=_given(body), headers=headers)

    def delete(self, id_: int) -> Call[rest.Done]:
        return Call("DELETE", f"{self._resource.path}/{id_}", rest.Done)


_subnets = _Operations(rest.SUBNETS)
list_subnets, create_subnet, read_subnet = _subnets.list_all, _subnets.create, _subnets.read
replace_subnet, delete_subnet = _subnets.replace, _subnets.delete

_policies = _Operations(rest.POLICIES)
list_policies, create_policy, read_policy = _policies.list_all, _policies.create, _policies.read
replace_policy, delete_policy = _policies.replace, _policies.delete


def import_subnets(csv: str, *, update: bool = False) -> Call[rest.SubnetsImported]:
    """Create a subnet for each line unless it exists, or `update` the one of the same name; safe to repeat."""
    return _import(rest.SubnetsImported, csv, {"update": "true"} if update else {})


def check_subnets(csv: str, *, update: bool = False) -> Call[rest.SubnetImportCheck]:
    """Check each line of an import, and change nothing."""
    return _import(rest.SubnetImportCheck, csv, {"dry_run": "true"} | ({"update": "true"} if update else {}))


def _import(answer: type[Answer], csv: str, query: Mapping[str, str]) -> Call[Answer]:
    return Call("POST", "/api/v1/subnet/import", answer, query=query, csv=csv, headers={"Content-Type": "text/csv"})


def read_subnet_retention(subnet_id: int) -> Call[rest.SubnetRetention]:
    return Call("GET", f"/api/v1/subnet/{subnet_id}/retention", rest.SubnetRetention)


def replace_subnet_retention(subnet_id: int, keep_results_days: int | None) -> Call[rest.SubnetRetention]:
    """Set the days after which ended jobs of the subnet are deleted; None for the platform's."""
    body = {"keep_results_days": keep_results_days}
    return Call("PUT", f"/api/v1/subnet/{subnet_id}/retention", rest.SubnetRetention, body=body)


# Administrators


def list_audit(
    *,
    subject: str | None = None,
    request_id: str | None = None,
    action: str | None = None,
    decision: str | None = None,
    rule: str | None = None,
    source: str | None = None,
    service: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> ListCall[rest.AuditList]:
    """List the entries of the audit log that match."""
    filters = {
        "subject": subject,
        "request_id": request_id,
        "action": action,
        "decision": decision,
        "rule": rule,
        "source": source,
        "service": service,
        "since": since,
        "until": until,
    }
    return _list("/api/v1/audit", rest.AuditList, "entries", filters)


def list_revocations() -> ListCall[rest.RevocationList]:
    return _list("/api/v1/revocation", rest.RevocationList, "revocations")


def create_revocation(body: rest.RevocationBody) -> Call[rest.Revocation]:
    return Call("POST", "/api/v1/revocation", rest.Revocation, body=_given(body), repeatable=False)


def delete_revocation(revocation_id: int) -> Call[rest.Done]:
    return Call("DELETE", f"/api/v1/revocation/{revocation_id}", rest.Done)


def _list(path: str, answer: type[T], items: str, query: Mapping[str, Any] | None = None) -> ListCall[T]:
    return ListCall("GET", path, answer, query=_set(query or {}), items=items)


def _set(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _given(body: BaseModel) -> dict[str, Any]:
    """Return the fields that the caller set; the service applies its own defaults to the others."""
    return body.model_dump(mode="json", exclude_unset=True, warnings=False)


def _stream(last_event_id: str) -> dict[str, str]:
    return {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})


def _with_key(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key or uuid4().hex}


def _if_match(etag: str) -> dict[str, str]:
    return {"If-Match": etag} if etag else {}
