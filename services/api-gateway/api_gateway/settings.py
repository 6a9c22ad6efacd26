"""The gateway's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, HttpUrl, model_validator

from scanfleet.runtime.settings import (
    ApiSettings,
    AuthSettings,
    CommonSettings,
    GrantSettings,
    KafkaSettings,
    TlsSettings,
    Words,
    is_authentic,
)


def _origin(url: HttpUrl) -> HttpUrl:
    if url.path not in (None, "/") or url.query is not None or url.fragment is not None:
        raise ValueError("must be a scheme, a host and at most a port")
    return url


class Settings(CommonSettings, ApiSettings, TlsSettings, KafkaSettings, AuthSettings, GrantSettings):
    internal_key_file: Path = Field(
        description="PEM file with the Ed25519 key that signs the tokens for the services behind the gateway, read once at start."
    )
    orchestrator_url: HttpUrl = Field(description="URL of job-orchestrator.")
    result_store_url: HttpUrl = Field(description="URL of result-store.")
    reply_seconds: float = Field(
        5.0,
        gt=0,
        le=30,  # minimum remaining life of an internal token
        description="Seconds that a request waits for the reply to its command before the gateway expires the command.",
    )
    writes_per_minute: int = Field(
        600,  # ten jobs a second, from one user, without a pause
        ge=1,
        description="Maximum number of modifying requests per user and minute, except cancels; further ones are "
        "rejected with 429. Each replica counts separately.",
    )
    reads_per_minute: int = Field(
        60_000,  # enough for many programs that poll in a tight loop
        ge=1,
        description="Maximum number of other requests per user and minute, enforced in the same way.",
    )
    cancels_per_minute: int = Field(
        600,
        ge=1,
        description="Maximum number of cancels per user and minute, counted separately and enforced in the same way.",
    )
    sign_ins_per_minute: int = Field(
        60,  # an office may share one address
        ge=1,
        description="Maximum number of sign-ins per minute and IPv4 address or IPv6 /64 network; above it the page "
        "asks the user to try again. Each replica counts separately.",
    )
    requests_at_once_per_user: int = Field(
        64,  # below `upstream_connections`, so that one user cannot use all of them
        ge=1,
        description="Maximum number of concurrent requests per user, except cancels and event streams; further ones are "
        "rejected with 429. A request ends when its response is sent completely. Each replica counts separately.",
    )
    requests_at_once: int = Field(
        1_000,  # with bodies of the maximum size 128 MiB; ordinary use is a thousandth of that
        ge=1,
        description="Maximum number of such requests of all users; further ones are rejected with 503.",
    )
    cancels_at_once_per_user: int = Field(
        16,
        ge=1,
        description="Maximum number of concurrent cancels per user; further ones are rejected with 429. Each replica counts separately.",
    )
    cancels_at_once: int = Field(
        500,
        ge=1,
        description="Maximum number of concurrent cancels of all users; further ones are rejected with 503.",
    )
    streams_at_once_per_user: int = Field(
        64,
        ge=1,
        description="Maximum number of open event streams per user; further ones are rejected with 429. Each replica counts separately.",
    )
    streams_at_once: int = Field(
        1_000,  # each stream queries the orchestrator once per heartbeat: 70 small queries per second
        ge=1,
        description="Maximum number of open event streams of all users; further ones are rejected with 503.",
    )
    upstream_seconds: float = Field(
        15.0,  # longer than the 10 s timeout of the services for their database
        gt=0,
        description="Read timeout in seconds of requests to the services behind the gateway.",
    )
    upstream_connections: int = Field(
        500,  # half of `requests_at_once`: requests that wait for the reply to a command need none
        ge=1,
        description="Maximum number of connections to each service behind the gateway. Cancels have a second pool of the "
        "same size.",
    )
    oidc_client_id: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Client id at the issuer with which the command line and the page sign users in, published at "
        "`/api/v1/info`; without it users provide their own tokens.",
    )
    oidc_scopes: Words = Field(
        ("openid", "offline_access"),
        description="Scopes that the command line and the page request from the issuer.",
    )
    oidc_client_secret_file: Path | None = Field(
        None,
        description="File with the secret of that client, if the issuer requires one, read once at start. The gateway uses it for "
        "sign-in to the page, which needs `SCANFLEET_PUBLIC_URL`.",
    )
    heartbeat_seconds: float = Field(
        15.0,  # proxies close connections that are idle for 30 to 60 s
        gt=0,
        description="Interval in seconds at which an event stream queries the state of its jobs, to find lost events, and sends "
        "a heartbeat.",
    )
    session_keys_file: Path | None = Field(
        None,
        description="File with the Fernet keys that encrypt browser sessions, one per line, the newest first, read once at start; "
        "the same for every replica. Without it, sign-in to the page is disabled.",
    )
    public_url: Annotated[HttpUrl, AfterValidator(_origin)] | None = Field(
        None,
        description="URL of the gateway for browsers (`https://scanfleet.example.com`), which the `Origin` of the page's requests "
        "must match. Without it the `Origin` must match the `Host` header.",
    )

    @property
    def signs_in(self) -> bool:
        """Whether users can sign in to the page at the issuer."""
        return None not in (self.session_keys_file, self.public_url, self.oidc_client_id)

    @model_validator(mode="after")
    def _authentic_issuer(self) -> Self:
        if self.signs_in and not is_authentic(self.jwt_issuer):
            raise ValueError(
                "SCANFLEET_JWT_ISSUER is not an https URL, which sign-in to the page needs: an attacker on the network path "
                "could replace the issuer's responses"
            )
        return self

    @model_validator(mode="after")
    def _https_with_certificates(self) -> Self:
        wanted = "https" if self.tls_ca_file else "http"
        if {self.orchestrator_url.scheme, self.result_store_url.scheme} != {wanted}:
            raise ValueError(
                "SCANFLEET_ORCHESTRATOR_URL and SCANFLEET_RESULT_STORE_URL are https with SCANFLEET_TLS_CA_FILE, and http without"
            )
        return self
