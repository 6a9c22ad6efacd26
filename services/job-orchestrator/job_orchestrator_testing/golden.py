"""Documents as this release writes them, with fixed values: a release stores them, and later releases must read them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

from job_orchestrator.domain import chunk as chunks
from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.deletion import Counts, Deletion, Stage
from job_orchestrator.domain.job import JobTrigger, change
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.repository import documents
from job_orchestrator_testing.builders import THEN, chunk, scan_job, scan_policy
from scanfleet.contracts.messages import AuditEntry, ChunkClaimed, ChunkFailed, ChunkProgressed, ChunkScanned

_SOON: Final = THEN + timedelta(seconds=2)
_LATER: Final = THEN + timedelta(minutes=1)
_PATIENCE: Final = timedelta(seconds=60)
_WORKER: Final = "scanner-worker-1-3f9ac2"
_REQUEST: Final = "c-5f1c9c6e0b0a4d6f9a41"


def golden() -> dict[str, dict[str, Any]]:
    """Return the documents of the orchestrator's database by name: the collection, and what the example shows."""
    return _jobs() | _chunks() | _commands() | _others()


def _jobs() -> dict[str, dict[str, Any]]:
    policy = scan_policy(ports="T:22,80,8000-8100,U:53", technique="syn", scripts=("banner",), min_rate=100)
    pending = scan_job(41, exclude=("127.9.8.2",), policy=policy, command_id=_REQUEST)
    running = change(pending, JobTrigger.START, _SOON)
    jobs = {
        "pending": pending,
        "running": replace(running, outbox=(), progress=50, machines_found=1, eta_seconds=30.0),
        "completed": change(running, JobTrigger.COMPLETE, _LATER, progress=100, machines_found=2),
        "failed": change(running, JobTrigger.FAIL, _LATER, error="2 addresses were not scanned"),
        "cancelled": change(pending, JobTrigger.CANCEL, _LATER, cancel_command="c-7"),
    }
    return {f"job-{name}": documents.write_job(job) for name, job in jobs.items()}


def _chunks() -> dict[str, dict[str, Any]]:
    queued = chunk(id="41-0", job_id=41)
    dispatched = chunks.dispatch(queued, _WORKER, _SOON, size=4, share=1.0, estimate=0.5)
    token = {"job_id": 41, "chunk_id": "41-0", "attempt": 1, "worker_id": _WORKER}
    running = chunks.apply(dispatched, ChunkClaimed(**token), _SOON, _PATIENCE)
    partly = chunks.apply(running, ChunkProgressed(**token, outcomes="as.."), _SOON, _PATIENCE)
    ended = token | {"slot_seconds": 4.0}
    facts = {"technique": "connect", "nmap": "7.95", "discovery": "default"}
    scanned = ChunkScanned(**ended, **facts, outcomes="asda", user_id=7, first_address="127.9.8.0")
    failed = ChunkFailed(**ended, outcomes="as..", reason="nmap ended with exit code 1")
    examples = {
        "queued": queued,
        "dispatched": dispatched,
        "running": partly,
        "scanned": chunks.apply(partly, scanned, _LATER, _PATIENCE),
        "requeued": chunks.apply(partly, failed, _LATER, _PATIENCE),
        "cancelled": chunks.cancel(partly),
    }
    return {f"chunk-{name}": documents.write_chunk(each) for name, each in examples.items()}


def _commands() -> dict[str, dict[str, Any]]:
    job = scan_job(41, command_id=_REQUEST)
    submit: dict[str, Any] = {"body": "5d41402a", "idempotency_key": "nightly-2026-03-14"}
    commands = {
        "submit": Command(id=_REQUEST, user_id=7, state="accepted", jobs=(job,), **submit),
        "created": Command(
            id="c-6",
            user_id=7,
            state="accepted",
            body="7d793037",
            idempotency_key="lab",
            created='{"id":5,"user_id":7,"name":"lab","cidr":"127.9.8.0/24","exclude":[],'
            '"created_at":"2026-03-14T09:00:00Z","updated_at":"2026-03-14T09:00:00Z"}',
        ),
        "cancel": Command(id="c-7", user_id=7, state="accepted", cancels=41),
        "rejected": Command(id="c-8", user_id=7, state="rejected", status=400, error="not yours", rule="owner"),
        "expired": Command(id="c-9", user_id=7, state="expired"),
    }
    return {f"command-{name}": documents.write_command(each, THEN) for name, each in commands.items()}


def _others() -> dict[str, dict[str, Any]]:
    owned: dict[str, Any] = {"id": 5, "user_id": 7, "name": "lab", "created_at": THEN, "updated_at": THEN}
    entry = AuditEntry(
        id="9d0f4c1e6b7a4a0e8f5d2c3b1a098765",
        time=THEN,
        service="job-orchestrator",
        subject="7",
        source="192.0.2.17",
        action="create_subnet",
        target="169.254.169.254/32",
        decision="refused",
        rule="targets",
        request_id="r-7f3a",
    )
    revocation = Revocation(
        id=1,
        jti=None,
        sub=None,
        user_id=7,
        issued_before=THEN,
        created_by=1,
        created_at=THEN,
        expires_at=THEN + timedelta(days=31),
    )
    deletion = Deletion(
        job_id=41,
        user_id=7,
        subnet_id=5,
        reason="request",
        requested_at=THEN,
        requested_by=7,
        stage=Stage.DONE,
        counts=Counts(hosts=2, rows=3, chunks=1),
        completed_at=_LATER,
    )
    subnet = documents.write_subnet(Owned(content=ScanTarget("127.9.8.0/24", ("127.9.8.4/30",)), **owned))
    return {
        "audit": documents.write_audit(entry, _SOON, THEN + timedelta(days=365)),
        # Clocks, workers and the retention of subnets are written by updates of single fields.
        "clock": {"_id": 7, "time": 1234.5, "active": True},
        "deletion": documents.write_deletion(deletion),
        "policy": documents.write_policy(Owned(content=scan_policy(), **owned)),
        "revocation": documents.write_revocation(revocation),
        "subnet": subnet,
        "subnet-with-retention": subnet | {"keep_results_days": 30},
        "worker": {"_id": _WORKER, "slots": 4, "raw": False, "seen": _SOON},
    }
