"""Settings of job-orchestrator, read from the environment."""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Final

from pydantic import Field

from job_orchestrator.domain.deletion import KEEP_RECEIPTS, LEAST_RECEIPT_DAYS
from job_orchestrator.domain.quotas import Quotas
from scanfleet.contracts.rest import MAX_DAYS
from scanfleet.runtime.settings import (
    CommonSettings,
    DeletionSettings,
    GrantSettings,
    InternalApiSettings,
    KafkaSettings,
    MongoSettings,
    TargetSettings,
)


class AuditSettings(MongoSettings):
    """Location and signing keys of the audit log."""

    audit_key_file: Path = Field(
        description="File with the keys that sign the audit log, one per line with at least 32 characters, read once at start. The "
        "first key signs; the others verify entries from before a key rotation.",
    )
    audit_days: int = Field(
        365,  # incidents are often detected months later; an entry has some 500 bytes
        ge=1,
        description="Retention time of audit log entries in days.",
    )


_LIMITS: Final = Quotas()


class Settings(
    CommonSettings, InternalApiSettings, KafkaSettings, AuditSettings, TargetSettings, GrantSettings, DeletionSettings
):
    chunk_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs chunks, read once at start; result-store verifies workers' reports "
        "with its public key.",
    )
    requests_only: bool = Field(
        False,
        description="Whether this process only answers the gateway's requests: it consumes no topic and dispatches no chunk. See "
        "[operations](operations.md#processes-for-queries).",
    )
    lease_seconds: float = Field(
        30.0,
        ge=3.0,  # workers report every second
        description="Lease timeout in seconds: a chunk without a report of its worker for this time is requeued.",
    )
    stored_seconds: float = Field(
        60.0,
        gt=0,
        description="Timeout in seconds of a check of a scanned chunk by result-store; then the orchestrator requests it again. Larger "
        "values count as 300.",
    )
    raw_worker_seconds: float = Field(
        600.0,  # longer than it takes to start a pod on a new node
        gt=0,
        description="Seconds that a job waits for a raw-packet worker when none is available; then the job fails. A "
        "restart of the orchestrator that owns the job restarts the timeout.",
    )
    max_workers: int = Field(
        2_000,
        ge=1,
        description="Maximum number of worker instances whose announcements an orchestrator replica accepts. While it has as many, it "
        "ignores other instances; those that it has continue to get chunks.",
    )
    keep_results_days: int = Field(
        365,
        ge=0,
        le=MAX_DAYS,
        description="How many days after its end a job is kept with its results, its chunks and its ledger; then it is deleted "
        "as by `DELETE /api/v1/task/{id}`. 0 disables deletion by age. A subnet may have its own number of days. "
        "The two newest completed jobs of each existing subnet are kept.",
    )
    keep_receipts_days: int = Field(
        KEEP_RECEIPTS.days,
        ge=LEAST_RECEIPT_DAYS,
        le=MAX_DAYS,
        description="Retention time in days of the receipts of completed deletions, which `GET /api/v1/deletion` "
        "lists. Applies to deletions that are completed from then on.",
    )
    probes_per_job: int = Field(
        _LIMITS.probes_per_job,  # a /16 with every TCP and UDP port has 8.6e9
        ge=1,
        description="Maximum number of probes (addresses × ports) per job; larger jobs are rejected with 400.",
    )
    chunks_per_job: int = Field(
        _LIMITS.chunks_per_job,  # a /16 with every TCP port has 65,536; slow timings make chunks of one port
        ge=1,
        description="Maximum number of chunks per job; larger jobs are rejected with 400.",
    )
    unfinished_jobs_per_user: int = Field(
        _LIMITS.unfinished_jobs_per_user,  # ten requests of the largest size
        ge=1,
        description="Maximum number of pending and running jobs per user. A request that would exceed it is rejected with "
        "429, or with 400 if it alone exceeds the limit.",
    )
    queued_seconds_per_user: float = Field(
        _LIMITS.queued_seconds_per_user,  # a thousand jobs of a /16 with every TCP port
        gt=0,
        description="Maximum total of the expected slot seconds of a user's pending and running jobs. "
        "A request that would exceed it is rejected with 429, or with 400 if it alone exceeds the limit.",
    )
    subnets_per_user: int = Field(
        _LIMITS.subnets_per_user,
        ge=1,
        description="Maximum number of subnets per user; a request for more is rejected with 400.",
    )
    policies_per_user: int = Field(
        _LIMITS.policies_per_user,
        ge=1,
        description="Maximum number of policies per user; a request for more is rejected with 400.",
    )

    @property
    def keep_results(self) -> timedelta | None:
        return timedelta(days=self.keep_results_days) if self.keep_results_days else None

    @property
    def quotas(self) -> Quotas:
        return Quotas(**{field.name: getattr(self, field.name) for field in fields(Quotas)})
