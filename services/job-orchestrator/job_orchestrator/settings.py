"""Settings of job-orchestrator, read from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from scanfleet.settings import (
    CommonSettings,
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


class Settings(CommonSettings, InternalApiSettings, KafkaSettings, AuditSettings, TargetSettings, GrantSettings):
    chunk_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs chunks, read once at start; result-store verifies workers' reports "
        "with its public key.",
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
        description="Timeout in seconds of a job that waits for a worker with raw packets, if none is available; then it fails.",
    )
