"""Convert the orchestrator's objects to MongoDB documents with the same field names, `id` as `_id`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import structlog

from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.chunk import HELD, Chunk, ChunkState, Token
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.fairness import Candidate, Clock, Credit, Held
from job_orchestrator.domain.job import Outgoing, Plan, ScanJob
from job_orchestrator.domain.plan import MAX_PORTS
from job_orchestrator.domain.resources import Policy, Subnet
from job_orchestrator.domain.totals import Totals
from job_orchestrator.metrics import UNREADABLE
from scanfleet.clock import utc_now
from scanfleet.contracts import rest
from scanfleet.contracts.messages import AuditEntry, Job, JobEvent, JobStatus, instance_of
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_PROGRESS
from scanfleet.runtime.mongo import Document
from scanfleet.scanning.policy import ScanPolicy

# Pending jobs have no start and come first: MongoDB sorts null last when descending, so they sort as if in the far future.
_FAR_FUTURE: Final = datetime(9999, 1, 1, tzinfo=UTC)

_Any = TypeVar("_Any")

_log = structlog.get_logger()


def _known(kind: Any, document: Document) -> Document:
    return {name: document[name] for name in kind.__slots__ if name in document} | {"id": document["_id"]}


def _shallow(each: Any) -> Document:
    return {"_id": each.id} | {name: getattr(each, name) for name in each.__slots__ if name != "id"}


def _fields(each: Any) -> Document:
    return {name: getattr(each, name) for name in each.__slots__}


def write_subnet(subnet: Subnet) -> Document:
    return _shallow(subnet)


def read_subnet(document: Document) -> Subnet:
    return Subnet(**(_known(Subnet, document) | {"exclude": tuple(document["exclude"])}))


def write_policy(policy: Policy) -> Document:
    return _shallow(policy) | {"scan": policy.scan.model_dump(mode="json")}


def read_policy(document: Document) -> Policy:
    return Policy(**(_known(Policy, document) | {"scan": ScanPolicy.model_validate(document["scan"])}))


def write_job(job: ScanJob) -> Document:
    document = _shallow(job) | {
        "policy": job.policy.model_dump(mode="json"),
        **_fields(job.plan),
        "totals": _fields(job.totals),
        "status": job.status.value,
        "sort_time": job.start_time or job.end_time or _FAR_FUTURE,
    }
    del document["plan"]  # its fields are the document's
    # An empty outbox is omitted, so that the sparse index contains only jobs with unpublished events.
    del document["outbox"]
    if job.outbox:
        document["outbox"] = [
            {"type": type(out.event).__name__, "at": out.at, "event": out.event.model_dump(mode="python") | _plain(out)}
            for out in job.outbox
        ]
    return document


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
    plan = Plan(**(old_plan | {name: document[name] for name in Plan.__slots__ if name in document}))
    converted = {
        "exclude": tuple(document["exclude"]),
        "policy": ScanPolicy.model_validate(document["policy"]),
        "plan": plan,
        "totals": _totals(document.get("totals", {})),
        "status": JobStatus(document["status"]),
        "outbox": outbox,
    }
    old: Document = {"made": plan.chunk_count, "partition": SCAN_PROGRESS.partition_of(str(document["_id"]))}
    return ScanJob(**(old | _known(ScanJob, document) | converted))


VIEW_FIELDS: Final = {name: 1 for name in Job.model_fields if name != "id"}


def read_view(document: Document) -> Job:
    """Read the fields of a job that a list shows, from a document with `VIEW_FIELDS` only: a tenth of the cost."""
    return Job(**({name: document[name] for name in VIEW_FIELDS if name in document} | {"id": document["_id"]}))


# Defaults for plans of release 0.1: all of their chunks exist, slice by slice.
_OLD_PLAN: Final = {"chunk_ports": MAX_PORTS, "estimate": 0.0, "blockwise": False}


def _totals(document: Document) -> Totals:
    known = {name: document[name] for name in Totals.__slots__ if name in document}
    unprobed = document.get("unprobed", None if known.get("done") else ())
    lists = {
        "reasons": tuple(document.get("reasons", ())),
        "unprobed": None if unprobed is None else tuple(unprobed),
    }
    return Totals(**(known | lists))


def write_deletion(deletion: Deletion) -> Document:
    """Without any field by which jobs are found."""
    known = {name: getattr(deletion, name) for name in Deletion.__slots__ if name != "job_id"}
    return {
        "_id": deletion.job_id,
        "deletion": known | {"stage": deletion.stage.value, "counts": write_counts(deletion.counts)},
    }


def write_counts(counts: Counts) -> Document:
    return _fields(counts)


def read_deletion(document: Document) -> Deletion:
    stored = document["deletion"]
    known = {name: stored[name] for name in Deletion.__slots__ if name in stored}
    counts = {name: stored["counts"][name] for name in Counts.__slots__} if "counts" in stored else {}
    return Deletion(job_id=document["_id"], **(known | {"stage": Stage(known["stage"]), "counts": Counts(**counts)}))


def write_chunk(chunk: Chunk) -> Document:
    # `held` marks the few chunks in the partial index for leases and dispatch.
    return _shallow(chunk) | {"state": chunk.state.value, "held": chunk.state in HELD}


# Fields that never change: a save omits them.
JOB_CONSTANTS: Final = frozenset(
    {"_id", "user_id", "policy_id", "subnet_id", "cidr", "exclude", "policy", "addresses", "excluded", "ports"}
    | {"chunk_addresses", "chunk_ports", "blocks", "chunk_count", "estimate", "partition", "created_at", "command_id"}
    | {"granted_by", "blockwise", "traceparent"}
)
CHUNK_CONSTANTS: Final = frozenset(
    {"_id", "job_id", "user_id", "index", "turn", "partition", "first_address", "ports", "port_count", "needs_raw"}
)


def read_chunk(document: Document) -> Chunk:
    converted = {"state": ChunkState(document["state"]), "failed_by": tuple(document.get("failed_by", ()))}
    return Chunk(**(_known(Chunk, document) | converted))


def read_candidate(document: Document) -> Candidate:
    return Candidate(
        chunk_id=document["_id"],
        user_id=document["user_id"],
        job_id=document["job_id"],
        estimate=document["estimate"],
        needs_raw=document["needs_raw"],
        failed_by=tuple(document.get("failed_by", ())),
    )


CANDIDATE: Final = dict.fromkeys(("user_id", "job_id", "estimate", "needs_raw", "failed_by"), 1)


def read_held(document: Document) -> Held:
    estimate = document.get("attempt_estimate")  # earlier releases store that of the whole chunk only
    return Held(
        token=Token(document["job_id"], document["_id"], document["attempt"], document["worker_id"]),
        user_id=document["user_id"],
        partition=document["partition"],
        estimate=document["estimate"] if estimate is None else estimate,
        share=document.get("share", 1.0),
        dispatched_at=document.get("dispatched_at"),
    )


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
    return Credit(
        worker_id=document["_id"],
        instance=instance_of(document["_id"]),
        slots=document["slots"],
        raw=document["raw"],
        partition=-1,
    )


def write_command(command: Command) -> Document:
    # All jobs of a command share one policy, stored once: a thousand copies would not fit in a document.
    jobs = [write_job(job) for job in command.jobs]
    document = _shallow(command) | {"jobs": jobs, "policy": [job.pop("policy") for job in jobs][:1], "at": utc_now()}
    if command.idempotency_key is None:
        del document["idempotency_key"]
    return document


def read_command(document: Document) -> Command:
    jobs = tuple(read_job(job | {"policy": document["policy"][0]}) for job in document["jobs"])
    return Command(**(_known(Command, document) | {"jobs": jobs}))


def write_audit(entry: AuditEntry, received_at: datetime, forget_at: datetime) -> Document:
    """Write an entry; its id is prefixed with the service."""
    return {
        "_id": f"{entry.service}/{entry.id}",
        **entry.model_dump(mode="python", exclude={"id"}),
        "received_at": received_at,
        "forget_at": forget_at,
    }


def read_audit(document: Document) -> rest.AuditEntry:
    """Read an entry; entries of release 0.1 have no separate time of receipt."""
    return rest.AuditEntry.model_validate({"received_at": document["time"], **document, "id": document["_id"]})


def read_clock(document: Document) -> Clock:
    return Clock(document["_id"], document.get("time", 0.0), document.get("active", False))


def write_revocation(revocation: Revocation) -> Document:
    return _shallow(revocation)


def read_revocation(document: Document) -> Revocation:
    return Revocation(**_known(Revocation, document))


def readable(read: Callable[[Document], _Any], document: Document, collection: str) -> _Any | None:
    """Return the document converted by `read`; log an error and return None if it cannot be read."""
    try:
        return read(document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        UNREADABLE.labels(collection).inc()
        _log.error("unreadable_document", collection=collection, id=document.get("_id"), error=str(error)[:500])
        return None
