"""What result-store is told by its environment."""

from __future__ import annotations

from scanfleet.settings import AuthSettings, CommonSettings, KafkaSettings, MongoSettings


class Settings(CommonSettings, KafkaSettings, MongoSettings, AuthSettings):
    """Every setting of result-store."""
