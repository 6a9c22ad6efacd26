"""The gateway's settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, HttpUrl

from scanfleet.settings import AuthSettings, CommonSettings, KafkaSettings


class Settings(CommonSettings, KafkaSettings, AuthSettings):
    internal_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs the tokens for the services behind, read once at start."
    )
    orchestrator_url: HttpUrl = Field(description="Where job-orchestrator answers queries.")
    result_store_url: HttpUrl = Field(description="Where result-store answers queries.")
    reply_seconds: float = Field(
        5.0,
        gt=0,
        le=30,  # for as long an internal token is good in any case
        description="How long in seconds a request waits for the reply to its command before the command is called off.",
    )
    max_waiting: int = Field(
        1_000,  # far more than are answered in a second; each is a small object and an open connection
        ge=1,
        description="The most requests that wait for a reply at once; one more is answered 503.",
    )
    writes_per_minute: int = Field(
        600,  # ten jobs a second, from one user, for as long as they like
        ge=1,
        description="The most requests of one user a minute that may change something; one more is answered 429. "
        "Each replica of the gateway counts its own.",
    )
    reads_per_minute: int = Field(
        60_000,  # many programs that poll in a tight loop; only against one that has gone mad
        ge=1,
        description="The most other requests of one user a minute; likewise.",
    )
    requests_at_once_per_user: int = Field(
        64,  # below the connections to a service behind, so that nobody can take them all
        ge=1,
        description="The most requests of one user under way at once, answers that are still read included; one more is "
        "answered 429. Each replica counts its own.",
    )
    requests_at_once: int = Field(
        1_000,  # with a body of the largest size each a gigabyte; all that is ordinary is a thousandth of that
        ge=1,
        description="The most requests of all users under way at once; one more is answered 503.",
    )
    upstream_seconds: float = Field(
        15.0,  # longer than the 10 s after which the services behind give up on their database
        gt=0,
        description="How long in seconds a service behind the gateway may be silent before it counts as away.",
    )
    upstream_connections: int = Field(
        500,  # half of all requests at once: those that wait for a reply to their command need none
        ge=1,
        description="The most connections to each service behind the gateway.",
    )
    heartbeat_seconds: float = Field(
        15.0,  # proxies cut what is idle for 30 to 60 s
        gt=0,
        description="How long in seconds a stream of job events may go without asking for the job's state, by which it "
        "learns of events that it did not hear, and without a sign of life.",
    )
    stalled_seconds: float = Field(
        60.0,
        gt=0,
        description="How long in seconds a client may take nothing of an answer before it is cut off.",
    )
