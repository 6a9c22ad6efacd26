"""The gateway's settings."""

from __future__ import annotations

from pydantic import Field, HttpUrl

from scanfleet.settings import AuthSettings, CommonSettings, KafkaSettings


class Settings(CommonSettings, KafkaSettings, AuthSettings):
    orchestrator_url: HttpUrl = Field(description="Where job-orchestrator answers queries.")
    result_store_url: HttpUrl = Field(description="Where result-store answers queries.")
    reply_seconds: float = Field(
        5.0,
        gt=0,
        description="How long in seconds a request waits for the reply to its command before the command is called off.",
    )
    max_waiting: int = Field(
        1_000,  # far more than are answered in a second; each is a small object and an open connection
        ge=1,
        description="The most requests that wait for a reply at once; one more is answered 503.",
    )
    upstream_seconds: float = Field(
        15.0,  # longer than the 10 s after which the services behind give up on their database
        gt=0,
        description="How long in seconds a service behind the gateway may be silent before it counts as away.",
    )
    upstream_connections: int = Field(
        100,
        ge=1,
        description="The most connections to each service behind the gateway.",
    )
    stalled_seconds: float = Field(
        60.0,
        gt=0,
        description="How long in seconds a client may take nothing of an answer before it is cut off.",
    )
