"""The orchestrator's settings."""

from __future__ import annotations

from pydantic import Field

from scanfleet.settings import CommonSettings, InternalTokenSettings, KafkaSettings, MongoSettings, TargetSettings


class Settings(CommonSettings, KafkaSettings, MongoSettings, InternalTokenSettings, TargetSettings):
    lease_seconds: float = Field(
        30.0,
        ge=3.0,  # workers give a sign of life each second
        description="How long in seconds a running chunk may be silent before another worker gets it.",
    )
    stored_seconds: float = Field(
        60.0,
        gt=0,
        description="How long in seconds a scanned chunk waits for result-store before it is asked again.",
    )
    audit_days: int = Field(
        365,  # an incident is often found months later; an entry has some 300 bytes
        ge=1,
        description="How many days an entry of the audit log is kept.",
    )
