"""What result-store is told by its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from scanfleet.settings import CommonSettings, InternalTokenSettings, KafkaSettings, MongoSettings


class Settings(CommonSettings, KafkaSettings, MongoSettings, InternalTokenSettings):
    """Every setting of result-store."""

    chunk_public_keys_file: Path = Field(
        description="PEM file with job-orchestrator's Ed25519 public key, by which results are verified, read once at start; for "
        "as long as scan-results is kept after the key was replaced, with the old and the new one.",
    )
