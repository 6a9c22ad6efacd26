"""Settings of result-store, read from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from scanfleet.runtime.settings import (
    CommonSettings,
    DeletionSettings,
    InternalApiSettings,
    KafkaSettings,
    MongoSettings,
)


class Settings(CommonSettings, InternalApiSettings, KafkaSettings, MongoSettings, DeletionSettings):
    """All settings of result-store."""

    chunk_public_keys_file: Path = Field(
        description="PEM file with job-orchestrator's Ed25519 public key, which verifies results. Read once at start. After a key "
        "rotation it holds the old and the new key for the retention time of scan-results.",
    )
