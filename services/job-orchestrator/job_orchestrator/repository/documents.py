"""Convert the orchestrator's objects to MongoDB documents with the same field names, `id` as `_id`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Callable
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Final, TypeVar

import structlog
from pydantic import AwareDatetime, BaseModel, TypeAdapter

from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.chunk import HELD, Chunk
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator.domain.deletion import Counts, Deletion
from job_orchestrator.domain.fairness import Account, Candidate, Credit, Held
from job_orchestrator.domain.job import Outgoing, Plan, ScanJob
from job_orchestrator.domain.plan import MAX_PORTS
from job_orchestrator.domain.resources import Owned, Policy, ScanTarget, Subnet
from job_orchestrator.domain.retention import EndedJob
from job_orchestrator.metrics import UNREADABLE
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry, FencingToken, Job, JobEvent, instance_of
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_PROGRESS
from scanfleet.runtime.mongo import Document
from scanfleet.scanning.outcomes import address_key
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.ports import PortSet

# Every field is validated, so that code that reads many documents receives no damaged object: `readable` omits them.
_JOB: Final = TypeAdapter(ScanJob)
_CHUNK: Final = TypeAdapter(Chunk)
_CANDIDATE: Final = TypeAdapter(Candidate)
_HELD: Final = TypeAdapter(Held)
_MAP_PART: Final = TypeAdapter(MapPart)
_CREDIT: Final = TypeAdapter(Credit)
_ACCOUNT: Final = TypeAdapter(Account)
_DELETION: Final = TypeAdapter(Deletion)
_ENDED: Final = TypeAdapter(EndedJob)
_TARGET: Final = TypeAdapter(ScanTarget)

# Pending jobs have no start and come first: MongoDB sorts null last when descending, so they sort as if in the far future.
_FAR_FUTURE: Final = datetime(9999, 1, 1, tzinfo=UTC)

NOT_DELETED: Final[Document] = {"user_id": {"$exists": True}}
"""Matches the objects of resources: a deleted one leaves a document without its fields."""

_AT_ONCE: Final = 100  # documents that are converted before other tasks run: at most 20 ms

_Any = TypeVar("_Any")

_log = structlog.stdlib.get_logger(__name__)


def _known(kind: Any, document: Document) -> Document:
    return {name: document[name] for name in kind.__slots__ if name in document} | {"id": document["_id"]}


def _shallow(each: Any) -> Document:
    return {"_id": each.id} | {name: getattr(each, name) for name in each.__slots__ if name != "id"}


def _fields(each: Any) -> Document:
    return {name: getattr(each, name) for name in each.__slots__}


def _write_owned(owned: Owned[_Any], content: Document) -> Document:
    document = _shallow(owned) | content
    del document["content"]  # its fields are the document's
    return document


class _Common(BaseModel):
    id: int
    user_id: int
    name: str
    created_at: AwareDatetime
    updated_at: AwareDatetime


def _read_owned(document: Document, content: _Any) -> Owned[_Any]:
    return Owned(content=content, **dict(_Common.model_validate(document | {"id": document["_id"]})))


def write_subnet(subnet: Subnet) -> Document:
    return _write_owned(subnet, _fields(subnet.content))


def read_subnet(document: Document) -> Subnet:
    return _read_owned(document, _TARGET.validate_python(document))


def write_policy(policy: Policy) -> Document:
    return _write_owned(policy, {"scan": policy.content.model_dump(mode="json")})


def read_policy(document: Document) -> Policy:
    return _read_owned(document, ScanPolicy.model_validate(document["scan"]))


def write_job(job: ScanJob) -> Document:
    document = _shallow(job)
    del document["plan"]  # its fields are the document's
    del document["outbox"]
    return document | {"policy": job.policy.model_dump(mode="json"), **_fields(job.plan)} | _job_state(job)


def update_job(job: ScanJob) -> Document:
    """Return the update that stores the job as its next revision; fields of a newer release are kept."""
    fields = {name: getattr(job, name) for name in _JOB_VARIABLES} | _job_state(job) | {"rev": job.rev + 1}
    fields |= {f"totals.{name}": value for name, value in fields.pop("totals").items()}
    return {"$set": fields} | ({} if job.outbox else {"$unset": {"outbox": ""}})


def _job_state(job: ScanJob) -> Document:
    state: Document = {
        "totals": _fields(job.totals) | {"tcp": _fields(job.totals.tcp), "udp": _fields(job.totals.udp)},
        "status": job.status.value,
        "sort_time": job.start_time or job.end_time or _FAR_FUTURE,
    }
    # An empty outbox is omitted, so that the sparse index contains only jobs with unpublished events.
    if job.outbox:
        state["outbox"] = [
            {"type": type(out.event).__name__, "at": out.at, "event": out.event.model_dump(mode="python") | _plain(out)}
            for out in job.outbox
        ]
    return state


def _plain(out: Outgoing) -> Document:
    return {"job": out.event.job.model_dump(mode="python") | {"status": out.event.job.status.value}}


_EVENTS: Final = {kind.__name__: kind for kind in SCAN_EVENTS.messages if issubclass(kind, JobEvent)}


def read_job(document: Document) -> ScanJob:
    trace = document.get("traceparent")
    outbox = tuple(
        Outgoing(
            _EVENTS[each["type"]](**(each["event"] | {"job": Job(**each["event"]["job"]), "traceparent": trace})),
            each["at"],
        )
        for each in document.get("outbox", ())
    )
    old_plan = _OLD_PLAN | {"blocks": -(-document["ports"] // MAX_PORTS)}
    plan = old_plan | {name: document[name] for name in Plan.__slots__ if name in document}
    totals = _totals(document.get("totals", {}))
    converted = {"id": document["_id"], "rev": document["rev"], "plan": plan, "totals": totals, "outbox": outbox}
    old: Document = {"made": plan["chunk_count"], "partition": SCAN_PROGRESS.partition_of(str(document["_id"]))}
    return _JOB.validate_python(old | document | converted)


VIEW_FIELDS: Final = {name: 1 for name in Job.model_fields if name != "id"}


def read_view(document: Document) -> Job:
    """Read the fields of a job that a list shows, from a document with `VIEW_FIELDS` only: a tenth of the cost."""
    return Job.model_validate(document | {"id": document["_id"]})


_STATE: Final = {"progress": 0, "machines_found": 0, "error": ""}

SNAPSHOT_FIELDS: Final = VIEW_FIELDS | dict.fromkeys(("seq", *_STATE), 1)


def read_snapshot(document: Document) -> rest.Snapshot:
    """Read the state of a job, from a document with `SNAPSHOT_FIELDS` only."""
    state = {name: document.get(name, default) for name, default in _STATE.items()}
    return rest.Snapshot(seq=document.get("seq", 0), task=rest.TaskStatus.of(read_view(document), **state))


def read_ended(document: Document) -> EndedJob:
    return _ENDED.validate_python(document | {"id": document["_id"]})


# Defaults for plans of release 0.1: all of their chunks exist, slice by slice.
_OLD_PLAN: Final = {"chunk_ports": MAX_PORTS, "estimate": 0.0, "blockwise": False}


def _totals(document: Document) -> Document:
    return {"unprobed": None if document.get("done") else ()} | document


def write_deletion(deletion: Deletion) -> Document:
    """Write a receipt, which has no field by which jobs are found."""
    known = {name: getattr(deletion, name) for name in Deletion.__slots__ if name != "job_id"}
    return {
        "_id": deletion.job_id,
        "deletion": known | {"stage": deletion.stage.value, "counts": write_counts(deletion.counts)},
    }


def write_counts(counts: Counts) -> Document:
    return _fields(counts)


def read_deletion(document: Document) -> Deletion:
    return _DELETION.validate_python(document["deletion"] | {"job_id": document["_id"]})


def write_chunk(chunk: Chunk) -> Document:
    return _shallow(chunk) | {"key": address_key(chunk.first_address)} | _chunk_state(chunk)


def update_chunk(chunk: Chunk) -> Document:
    """Return the update that stores the chunk as its next revision; fields of a newer release are kept."""
    fields = {name: getattr(chunk, name) for name in _CHUNK_VARIABLES}
    return {"$set": fields | _chunk_state(chunk) | {"rev": chunk.rev + 1}}


def _chunk_state(chunk: Chunk) -> Document:
    # `held` marks the few chunks in the partial index for leases and dispatch.
    return {
        "state": chunk.state.value,
        "held": chunk.state in HELD,
        "attempts": [_fields(each) | {"run": each.run and each.run.model_dump()} for each in chunk.attempts],
        "probed": chunk.probed and _fields(chunk.probed),
    }


# Fields that never change are not updated.
_JOB_CONSTANTS: Final = frozenset(
    {"id", "user_id", "policy_id", "subnet_id", "cidr", "exclude", "policy", "plan", "partition", "created_at"}
    | {"command_id", "granted_by", "traceparent", "zone"}
)
_CHUNK_CONSTANTS: Final = frozenset(
    {"id", "job_id", "user_id", "zone", "index", "turn", "partition", "first_address", "ports", "port_count"}
    | {"needs_raw"}
)
_JOB_VARIABLES: Final = tuple(name for name in ScanJob.__slots__ if name not in _JOB_CONSTANTS | {"outbox"})
_CHUNK_VARIABLES: Final = tuple(name for name in Chunk.__slots__ if name not in _CHUNK_CONSTANTS)


def read_chunk(document: Document) -> Chunk:
    chunk = _CHUNK.validate_python(document | {"id": document["_id"], "rev": document["rev"]})
    ip_address(chunk.first_address)
    PortSet.parse(chunk.ports)
    return chunk


MAP_FIELDS: Final = dict.fromkeys(MapPart.__slots__, 1)


def read_map_part(document: Document) -> MapPart:
    part = _MAP_PART.validate_python({"reach": 0} | document)
    ip_address(part.first_address)
    return part


def read_candidate(document: Document) -> Candidate:
    return _CANDIDATE.validate_python(document | {"chunk_id": document["_id"]})


CANDIDATE: Final[Document] = dict.fromkeys(
    ("user_id", "job_id", "estimate", "needs_raw", "failed_by", "no_route", "first_address", "port_count"), 1
) | {
    # The length of a damaged map would fail the query of all chunks.
    "addresses": {"$cond": [{"$eq": [{"$type": "$outcomes"}, "string"]}, {"$strLenBytes": "$outcomes"}, 1]}
}


def read_held(document: Document) -> Held:
    token = FencingToken(document["job_id"], document["_id"], document["attempt"], document["worker_id"])
    read: Document = {"share": 1.0, "dispatched_at": None} | document | {"token": token}
    if (
        estimate := document.get("attempt_estimate")
    ) is not None:  # earlier releases store that of the whole chunk only
        read["estimate"] = estimate
    return _HELD.validate_python(read)


HELD_FIELDS: Final = dict.fromkeys(
    (
        "attempt",
        "worker_id",
        "user_id",
        "job_id",
        "partition",
        "estimate",
        "attempt_estimate",
        "share",
        "dispatched_at",
    ),
    1,
)


def read_worker(document: Document) -> Credit:
    # A replica of 0.2 stores a document for each process.
    worker_id = document["worker_id"] if "worker_id" in document else document["_id"]
    return _CREDIT.validate_python(
        document | {"worker_id": worker_id, "instance": instance_of(worker_id), "partition": -1}
    )


def write_command(command: Command, at: datetime) -> Document:
    # All jobs of a command share one policy, stored once: a thousand copies would not fit in a document.
    jobs = [write_job(job) for job in command.jobs]
    document = _shallow(command) | {"jobs": jobs, "policy": [job.pop("policy") for job in jobs][:1], "at": at}
    if command.idempotency_key is None:
        del document["idempotency_key"]
    if not command.created:
        del document["created"]
    return document


async def read_command(document: Document) -> Command:
    """Read a command; other tasks run meanwhile, since it may have a thousand jobs. Without the field `jobs` it has none."""
    jobs: list[ScanJob] = []
    if stored := document.get("jobs", ()):
        policy = ScanPolicy.model_validate(document["policy"][0])
        for number, job in enumerate(stored, 1):
            jobs.append(read_job(job | {"policy": policy}))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
    return Command(**(_known(Command, document) | {"jobs": tuple(jobs)}))


def write_audit(entry: AuditEntry, received_at: datetime, forget_at: datetime) -> Document:
    """Write an entry; its id is prefixed with the service."""
    return {
        "_id": f"{entry.service}/{entry.id}",
        **entry.model_dump(mode="python", exclude={"id"}),
        "received_at": received_at,
        "forget_at": forget_at,
    }


def read_audit(document: Document, *, genuine: bool = False) -> rest.AuditEntry:
    """Read an entry; entries of release 0.1 have no separate time of receipt."""
    stated = {"id": document["_id"], "genuine": genuine}
    return rest.AuditEntry.model_validate({"received_at": document["time"], **document, **stated})


def read_account(document: Document) -> Account:
    return _ACCOUNT.validate_python(document | {"user_id": document["_id"]})


def read_virtual(document: Document) -> Account:
    """Read the global virtual time, which is stored among the users' accounts, as the account of a user 0."""
    return read_account(document | {"_id": 0})


def write_revocation(revocation: Revocation) -> Document:
    return _shallow(revocation)


def read_revocation(document: Document) -> Revocation:
    # By the model of the responses: otherwise one damaged field would fail every response that has the whole list.
    return Revocation(**dict(rest.Revocation.model_validate(document | {"id": document["_id"]})))


async def read_all(
    read: Callable[[Document], _Any], found: AsyncIterable[Document], collection: str, limit: int | None = None
) -> list[_Any]:
    """Return the documents that can be read, up to `limit` of them; other tasks run meanwhile."""
    all_: list[_Any] = []
    number = 0
    async for document in found:
        if (each := readable(read, document, collection)) is not None:
            all_.append(each)
        if len(all_) == limit:
            break
        number += 1
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return all_


def readable(read: Callable[[Document], _Any], document: Document, collection: str) -> _Any | None:
    """Return the document converted by `read`; count it and return None if it cannot be read, and log it once a minute."""
    try:
        return read(document)
    except Exception as error:  # noqa: BLE001 # one document must not stop the others, whatever is wrong with it
        UNREADABLE.labels(collection).inc()
        _log_unreadable(collection, str(document.get("_id")), str(error)[:500], int(time.monotonic() // 60))
        return None


@lru_cache(maxsize=1_000)  # dispatch reads the documents of held chunks up to forty times a second
def _log_unreadable(collection: str, id_: str, error: str, minute: int) -> None:  # noqa: ARG001 # the key of the cache
    _log.error("document_unreadable", collection=collection, id=id_, error=error)
