"""The orchestrator's settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from scanfleet.settings import (
    CommonSettings,
    GrantSettings,
    InternalTokenSettings,
    KafkaSettings,
    MongoSettings,
    TargetSettings,
)


class AuditSettings(MongoSettings):
    """Where the audit log is, and what signs it."""

    audit_key_file: Path = Field(
        description="Keys that sign the audit log, one a line of at least 32 characters, read once at start. The first signs; the "
        "others verify what was signed before they were replaced.",
    )
    audit_days: int = Field(
        365,  # an incident is often found months later; an entry has some 500 bytes
        ge=1,
        description="How many days an entry of the audit log is kept.",
    )


class Settings(CommonSettings, KafkaSettings, AuditSettings, InternalTokenSettings, TargetSettings, GrantSettings):
    chunk_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs chunks, read once at start; result-store verifies by it what workers "
        "report.",
    )
    lease_seconds: float = Field(
        30.0,
        ge=3.0,  # workers report each second
        description="Seconds that a dispatched or running chunk may go without a report before another worker gets it.",
    )
    stored_seconds: float = Field(
        60.0,
        gt=0,
        description="How long in seconds a scanned chunk waits for result-store before it is asked again.",
    )
    raw_worker_seconds: float = Field(
        600.0,  # longer than it takes to start a pod on a new node
        gt=0,
        description="Seconds that a job waits for a worker that may send raw packets, when none is available; then it fails.",
    )
