"""How the orchestrator's things lie in MongoDB: under the names of their fields, `id` as `_id`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.chunk import HELD, Chunk, ChunkState
from job_orchestrator.domain.fairness import Clock
from job_orchestrator.domain.job import Outgoing, ScanJob
from job_orchestrator.domain.store import Command, Policy, Subnet
from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry, Job, JobEvent, JobStatus
from scanfleet.messages.topics import SCAN_EVENTS
from scanfleet.mongo import Document
from scanfleet.policy import ScanPolicy

# Pending jobs have no start and come first: MongoDB sorts null last when descending, so they sort as if in the far future.
_FAR_FUTURE: Final = datetime(9999, 1, 1, tzinfo=UTC)


def _known(kind: Any, document: Document) -> Document:
    return {name: document[name] for name in kind.__slots__ if name in document} | {"id": document["_id"]}


def _shallow(each: Any) -> Document:
    return {"_id": each.id} | {name: getattr(each, name) for name in each.__slots__ if name != "id"}


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
        "status": job.status.value,
        "sort_time": job.start_time or job.end_time or _FAR_FUTURE,
    }
    # An empty outbox is no field at all, so that the sparse index holds only jobs with something to say.
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
    converted = {
        "exclude": tuple(document["exclude"]),
        "policy": ScanPolicy.model_validate(document["policy"]),
        "status": JobStatus(document["status"]),
        "outbox": outbox,
    }
    return ScanJob(**(_known(ScanJob, document) | converted))


def write_chunk(chunk: Chunk) -> Document:
    # `held` marks the few chunks that the partial indexes for workers and watchers are about.
    return _shallow(chunk) | {"state": chunk.state.value, "held": chunk.state in HELD}


def read_chunk(document: Document) -> Chunk:
    return Chunk(**(_known(Chunk, document) | {"state": ChunkState(document["state"])}))


def write_command(command: Command) -> Document:
    # All jobs of a command have one policy. Once for each of a thousand it would not fit in a document.
    jobs = [write_job(job) for job in command.jobs]
    document = _shallow(command) | {"jobs": jobs, "policy": [job.pop("policy") for job in jobs][:1], "at": utc_now()}
    if command.idempotency_key is None:
        del document["idempotency_key"]
    return document


def read_command(document: Document) -> Command:
    jobs = tuple(read_job(job | {"policy": document["policy"][0]}) for job in document["jobs"])
    return Command(**(_known(Command, document) | {"jobs": jobs}))


def write_audit(entry: AuditEntry) -> Document:
    return {"_id": entry.id} | entry.model_dump(mode="python", exclude={"id"})


def read_audit(document: Document) -> AuditEntry:
    return AuditEntry.model_validate(document | {"id": document["_id"]})


def read_clock(document: Document) -> Clock:
    return Clock(document["_id"], document.get("time", 0.0), document.get("active", False))


def write_revocation(revocation: Revocation) -> Document:
    return _shallow(revocation)


def read_revocation(document: Document) -> Revocation:
    return Revocation(**_known(Revocation, document))
