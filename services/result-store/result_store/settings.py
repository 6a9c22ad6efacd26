"""What result-store is told by its environment."""

from __future__ import annotations

from scanfleet.settings import CommonSettings, InternalTokenSettings, KafkaSettings, MongoSettings


class Settings(CommonSettings, KafkaSettings, MongoSettings, InternalTokenSettings):
    """Every setting of result-store."""
