"""Jobs, chunks and audit entries as small as they can be."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from job_orchestrator.domain import plan
from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import Plan, ScanJob, create
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.topics import SCAN_PROGRESS
from scanfleet.scanning.policy import Preset, ScanPolicy, fill_in
from scanfleet.scanning.targets import Target

KEYS: Final = ChainKeys(["signs the audit log in tests alone"])
THEN: Final = datetime(2026, 1, 1, tzinfo=UTC)


def scan_policy(**given: Any) -> ScanPolicy:
    """Two ports and connect scans by default."""
    return fill_in(Preset.QUICK, {"ports": "22,80"} | given)


def scan_job(
    id_: int = 1,
    *,
    user_id: int = 7,
    cidr: str = "127.9.8.0/30",
    exclude: tuple[str, ...] = (),
    policy: ScanPolicy | None = None,
    **changed: Any,
) -> ScanJob:
    """A new job as a command makes it."""
    policy = policy or scan_policy()
    planned = plan.plan(policy, Target.parse(cidr, exclude))
    fields: dict[str, Any] = {
        "id": id_,
        "user_id": user_id,
        "policy_id": 1,
        "subnet_id": 1,
        "cidr": cidr,
        "exclude": exclude,
        "policy": policy,
        "plan": replace(planned, **{name: changed.pop(name) for name in Plan.__slots__ if name in changed}),
        "seconds_left": planned.estimate,
        "partition": SCAN_PROGRESS.partition_of(str(id_)),
        "created_at": THEN,
        "updated_at": THEN,
        "command_id": f"command-{id_}",
    }
    return create(ScanJob(**(fields | changed)))


def replanned(job: ScanJob, **changed: Any) -> ScanJob:
    return replace(job, plan=replace(job.plan, **changed))


def chunk(**changed: Any) -> Chunk:
    """A queued chunk of four addresses and two ports."""
    fields: dict[str, Any] = {
        "id": "1-0",
        "job_id": 1,
        "user_id": 7,
        "index": 0,
        "turn": 0,
        "partition": SCAN_PROGRESS.partition_of("1"),
        "first_address": "127.9.8.0",
        "outcomes": "....",
        "ports": "22,80",
        "port_count": 2,
        "estimate": 0.5,
        "needs_raw": False,
    }
    return Chunk(**(fields | changed))


def audit_entry(id_: str, **changed: Any) -> AuditEntry:
    """An accepted change of a user."""
    fields: dict[str, Any] = {
        "time": THEN,
        "service": "job-orchestrator",
        "subject": "7",
        "source": "192.0.2.17",
        "action": "create_subnet",
        "target": "/api/v1/subnet/1",
        "decision": "allowed",
        "rule": "",
        "request_id": "r-1",
    }
    return AuditEntry(id=id_, **(fields | changed))
