"""The gateway's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, HttpUrl, model_validator

from scanfleet.settings import (
    ApiSettings,
    AuthSettings,
    CommonSettings,
    GrantSettings,
    KafkaSettings,
    TlsSettings,
    Words,
)


def _origin(url: HttpUrl) -> HttpUrl:
    if url.path not in (None, "/") or url.query is not None or url.fragment is not None:
        raise ValueError("must be a scheme, a host and at most a port")
    return url


class Settings(CommonSettings, ApiSettings, TlsSettings, KafkaSettings, AuthSettings, GrantSettings):
    internal_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs the tokens for the services behind, read once at start."
    )
    orchestrator_url: HttpUrl = Field(description="URL of job-orchestrator.")
    result_store_url: HttpUrl = Field(description="URL of result-store.")
    reply_seconds: float = Field(
        5.0,
        gt=0,
        le=30,  # for as long an internal token is good in any case
        description="Seconds that a request waits for the reply to its command before the command is called off.",
    )
    writes_per_minute: int = Field(
        600,  # ten jobs a second, from one user, without a pause
        ge=1,
        description="The most requests of one user a minute that may change something, cancels apart; one more is answered "
        "429. Each replica of the gateway counts its own.",
    )
    reads_per_minute: int = Field(
        60_000,  # many programs that poll in a tight loop; only against a runaway one
        ge=1,
        description="The most other requests of one user a minute; likewise.",
    )
    cancels_per_minute: int = Field(
        600,
        ge=1,
        description="The most cancels of one user a minute, counted apart from all other requests; likewise.",
    )
    requests_at_once_per_user: int = Field(
        64,  # below the connections to a service behind, so that one user cannot take them all
        ge=1,
        description="The most requests of one user under way at once, answers that are still read included, cancels and "
        "event streams apart; one more is answered 429. Each replica counts its own.",
    )
    requests_at_once: int = Field(
        1_000,  # with a body of the largest size each a gigabyte; ordinary use is a thousandth of that
        ge=1,
        description="The most such requests of all users under way at once; one more is answered 503.",
    )
    cancels_at_once_per_user: int = Field(
        16,
        ge=1,
        description="The most cancels of one user under way at once; one more is answered 429. Each replica counts its own.",
    )
    cancels_at_once: int = Field(
        500,
        ge=1,
        description="The most cancels of all users under way at once; one more is answered 503.",
    )
    streams_at_once_per_user: int = Field(
        64,
        ge=1,
        description="The most event streams of one user open at once; one more is answered 429. Each replica counts its own.",
    )
    streams_at_once: int = Field(
        1_000,  # each stream queries the orchestrator once per heartbeat: 70 small queries per second
        ge=1,
        description="The most event streams of all users open at once; one more is answered 503.",
    )
    upstream_seconds: float = Field(
        15.0,  # longer than the 10 s after which the services behind give up on their database
        gt=0,
        description="Read timeout in seconds of requests to the services behind the gateway.",
    )
    upstream_connections: int = Field(
        500,  # half of all requests at once: those that wait for a reply to their command need none
        ge=1,
        description="The most connections to each service behind the gateway; cancels have as many of their own.",
    )
    oidc_client_id: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Client id at the issuer with which the command line and the page sign users in, published at "
        "`/api/v1/info`; without it users bring tokens of their own.",
    )
    oidc_scopes: Words = Field(
        ("openid", "offline_access"),
        description="Scopes that they ask the issuer for.",
    )
    oidc_client_secret_file: Path | None = Field(
        None,
        description="File with the secret of that client, if the issuer demands one, read once at start; used by the gateway for the "
        "page, which signs users in there if `SCANFLEET_PUBLIC_URL` is set.",
    )
    heartbeat_seconds: float = Field(
        15.0,  # proxies close connections that are idle for 30 to 60 s
        gt=0,
        description="Seconds between two looks of an event stream at its job's state, which find events that were lost, and "
        "the most that it sends nothing.",
    )
    session_keys_file: Path | None = Field(
        None,
        description="File with the Fernet keys that encrypt browser sessions, one on a line, the newest first, read once at start; "
        "every replica has the same. Without it sign-in to the page is off.",
    )
    public_url: Annotated[HttpUrl, AfterValidator(_origin)] | None = Field(
        None,
        description="The address that browsers use for the gateway (`https://scanfleet.example.com`). Without it the page's "
        "requests must come from the host that their `Host` header names.",
    )

    @model_validator(mode="after")
    def _https_with_certificates(self) -> Self:
        wanted = "https" if self.tls_ca_file else "http"
        if {self.orchestrator_url.scheme, self.result_store_url.scheme} != {wanted}:
            raise ValueError(
                "SCANFLEET_ORCHESTRATOR_URL and SCANFLEET_RESULT_STORE_URL are https with SCANFLEET_TLS_CA_FILE, and http without"
            )
        return self
