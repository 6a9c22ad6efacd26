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
        description="Timeout in seconds for result-store to check a scanned chunk before it is asked again.",
    )
    raw_worker_seconds: float = Field(
        600.0,  # longer than it takes to start a pod on a new node
        gt=0,
        description="Timeout in seconds of a job that waits for a worker with raw packets, if none is available; then it fails. "
        "It begins again with a restart of the orchestrator that owns the job.",
    )
    keep_results_days: int = Field(
        365,
        ge=0,
        le=MAX_DAYS,
        description="How many days after its end a job is kept with its results, its chunks and its ledger; then it is deleted "
        "as by `DELETE /api/v1/task/{id}`. 0 keeps all until they are deleted by hand. A subnet may have its own number of days. "
        "The two newest completed jobs of each existing subnet are kept.",
    )
    keep_receipts_days: int = Field(
        KEEP_RECEIPTS.days,
        ge=LEAST_RECEIPT_DAYS,
        le=MAX_DAYS,
        description="How many days after its completion a deletion is listed by `GET /api/v1/deletion`. Applies to deletions that "
        "are completed from then on.",
    )
    probes_per_job: int = Field(
        _LIMITS.probes_per_job,  # a /16 with every TCP and UDP port has 8.6e9
        ge=1,
        description="Maximum number of probes (addresses × ports) of one job; a larger one is answered 400.",
    )
    chunks_per_job: int = Field(
        _LIMITS.chunks_per_job,  # a /16 with every TCP port has 65,536; slow timings make chunks of one port
        ge=1,
        description="Maximum number of chunks that one job may be cut into; a larger one is answered 400.",
    )
    unfinished_jobs_per_user: int = Field(
        _LIMITS.unfinished_jobs_per_user,  # ten requests of the largest size
        ge=1,
        description="Maximum number of pending and running jobs of one user. A request for more is answered 429, and 400 "
        "if it alone asks for more.",
    )
    queued_seconds_per_user: float = Field(
        _LIMITS.queued_seconds_per_user,  # a thousand jobs of a /16 with every TCP port
        gt=0,
        description="Maximum number of slot seconds that the pending and running jobs of one user may be expected to take. "
        "A request for more is answered 429, and 400 if it alone asks for more.",
    )
    subnets_per_user: int = Field(
        _LIMITS.subnets_per_user,
        ge=1,
        description="Maximum number of subnets of one user; one more is answered 400.",
    )
    policies_per_user: int = Field(
        _LIMITS.policies_per_user,
        ge=1,
        description="Maximum number of policies of one user; one more is answered 400.",
    )

    @property
    def keep_results(self) -> timedelta | None:
        return timedelta(days=self.keep_results_days) if self.keep_results_days else None

    @property
    def quotas(self) -> Quotas:
        return Quotas(**{field.name: getattr(self, field.name) for field in fields(Quotas)})
